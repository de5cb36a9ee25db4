"""Every implementation against the definition in float64: outputs, states and all gradients, in every dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from device import ON_GPU, triton_dtypes

from powerplan.kernels import power_attention
from powerplan.kernels.embedding import spow
from powerplan.kernels.state import PowerState
from powerplan.kernels.testing import Case, arguments, beyond_budget, results, state_of, variants

DEGREES = [(1, False), (2, True), (2, False), (3, False), (4, True), (4, False)]
SHAPES = variants(
    Case(),
    tokens=[1, 2, 16, 63, 130],
    key_dim=[1, 5, 16],
    value_dim=[1, 16],
    groups=[1, 3],
    repeats=[1, 3],
    batch=[1],
)
IMPLS = ["recurrent", "torch", "triton"]
LONG = Case(tokens=300, gated=False, batch=1, groups=1, repeats=1, key_dim=64, value_dim=64)


def check(case: Case, impl: str, dtype: torch.dtype, chunk: int = 16, low_products: bool = False) -> None:
    inputs = case.inputs(dtype)
    returned = power_attention(
        *arguments(inputs),
        inputs["log_g"],
        p=case.p,
        normalize=case.normalize,
        chunk_size=chunk,
        initial_state=state_of(inputs),
        return_state=True,
        impl=impl,
    )
    assert beyond_budget(case, dtype, results(*returned, inputs), inputs, low_products) == {}


def check_usual_dtypes(case: Case, impl: str) -> None:
    if impl != "triton":  # It has no float64.
        check(case, impl, torch.float64)
    check(case, impl, torch.float32)
    if impl == "triton" and ON_GPU:
        check_low_precision(case, impl, torch.bfloat16)
        check_low_precision(case, impl, torch.float16)


def check_low_precision(case: Case, impl: str, dtype: torch.dtype) -> None:
    """Triton's kernels multiply operands of 16 bits, those of the state too; tf32 has fp16's fraction."""
    check(case, impl, dtype, low_products=impl == "triton")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("p", "normalize"), DEGREES)
def test_degrees_gates_and_states(p: int, normalize: bool, gated: bool, with_state: bool, impl: str) -> None:
    case = Case(p=p, normalize=normalize, gated=gated, with_state=with_state, tokens=40, key_dim=6)
    if impl == "triton" and p == 4:  # 64 steps of phi, each a few milliseconds in the interpreter
        case = replace(case, tokens=20, batch=1, groups=1, key_dim=5)
    check_usual_dtypes(case, impl)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_shapes(case: Case, impl: str) -> None:
    if impl != "triton":
        check_usual_dtypes(case, impl)
    check(replace(case, with_state=True), impl, torch.float32)
    if impl == "triton" and ON_GPU:
        check_low_precision(replace(case, with_state=True), impl, torch.bfloat16)


@pytest.mark.parametrize(
    ("p", "normalize", "key_dim"), [(1, False, 24), (2, True, 24), (2, False, 17), (2, True, 17), (3, False, 17)]
)
def test_several_tiles_of_features_in_triton(p: int, normalize: bool, key_dim: int) -> None:
    """Pairs and triples of tiles have other weights than a tile with itself, and an odd dim ends within one."""
    case = Case(p=p, normalize=normalize, key_dim=key_dim, tokens=18, batch=1, groups=1, repeats=1, with_state=True)
    check(case, "triton", torch.float32)


@pytest.mark.slow
def test_several_tiles_of_features_for_p_4_in_triton() -> None:
    check(Case(p=4, key_dim=9, tokens=18, batch=1, groups=1, repeats=1, with_state=True), "triton", torch.float32)


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("p", "normalize"), DEGREES)
def test_low_precision(p: int, normalize: bool, dtype: torch.dtype, impl: str) -> None:
    if impl == "triton" and dtype not in triton_dtypes():
        pytest.skip("the interpreter of triton cannot multiply bfloat16: make gpu runs this on a GPU")
    case = Case(p=p, normalize=normalize, tokens=40, key_dim=6)
    if impl == "triton" and p == 4:
        case = replace(case, tokens=20, batch=1, groups=1, key_dim=5)
    for seed in range(3 if impl == "torch" else 1):
        check_low_precision(replace(case, seed=seed), impl, dtype)


@pytest.mark.parametrize(("p", "normalize"), [(1, False), (2, True), (2, False), (3, False)])
def test_sixteen_bit_operands_in_triton(p: int, normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 inputs take another way through the kernels than float32 ones: here with fp16 in its place."""
    import triton.language as tl

    from powerplan.kernels.triton import shapes

    def narrow(dtype: torch.dtype) -> tuple[object, str, torch.dtype]:
        return tl.float16, "ieee", torch.float16

    monkeypatch.setattr(shapes, "operand", narrow)
    case = Case(p=p, normalize=normalize, tokens=34, key_dim=10, batch=1, groups=1, with_state=True)
    shapes._launch_shape.cache_clear()  # A shape keeps its constants, operands among them.
    try:
        check(case, "triton", torch.float16, low_products=True)
    finally:
        shapes._launch_shape.cache_clear()


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("chunk", [1, 7, 40, 41, 1000])
def test_chunk_sizes(chunk: int, impl: str) -> None:
    case = Case(tokens=40, with_state=True)
    if impl == "triton":
        check(replace(case, batch=1, groups=1), impl, torch.float32, chunk)
    else:
        check(case, impl, torch.float64, chunk)


def test_many_chunks_restart_from_saved_states() -> None:
    check(Case(tokens=130, batch=1, groups=1), "torch", torch.float64, chunk=4)


def test_degrees_in_several_blocks() -> None:
    """phi of p = 3 at K = 24 has 5,120 rows: more than one block of the expansion."""
    from powerplan.kernels.tiles import PHI_BLOCK_ROWS, TILE, tiling

    assert len(tiling(24, 3, TILE, PHI_BLOCK_ROWS).blocks) > 1
    check(Case(p=3, normalize=False, key_dim=24, tokens=33, batch=1, groups=1), "torch", torch.float64)


def test_a_sum_of_equal_terms_is_no_error() -> None:
    """Head dim 64 in fp16, as gpt2-small has it: plain torch sums the constant feature exactly, chunks do not."""
    check(LONG, "torch", torch.float16, chunk=128)


def test_a_wrong_state_is_an_error() -> None:
    """One token of 300 left out, or sums rounded as fp16 rounds them: the state is beyond its budget in both parts."""
    inputs = LONG.inputs(torch.float16)
    out, state = power_attention(*arguments(inputs), chunk_size=128, return_state=True)
    _, k, v = arguments(inputs)
    assert state.key is not None
    phi = spow(k[:, -1].detach().float(), LONG.p)
    without = PowerState(state.kv - phi[..., None] * v[:, -1, :, None].detach(), state.key - phi)
    rounded = PowerState(state.kv.half().float(), state.key.half().float())
    right = results(out, state, inputs)
    assert beyond_budget(LONG, torch.float16, right, inputs) == {}
    for wrong in (without, rounded):
        changed = {**right, "state kv": wrong.kv, "state key": wrong.key}
        assert beyond_budget(LONG, torch.float16, changed, inputs).keys() == {"state kv", "state key"}
