"""What the interface refuses, with the message for each."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import powerplan.kernels
from powerplan.dims import default_chunk_size
from powerplan.kernels import (
    PowerState,
    empty_state,
    engines,
    power_attention,
    power_attention_step,
    spow,
    tiled_spow,
)
from powerplan.kernels.call import CallShape, Inputs, Outputs
from powerplan.kernels.triton import support


def tensors(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {"q": torch.randn(1, 6, 4, 8), "k": torch.randn(1, 6, 2, 8), "v": torch.randn(1, 6, 2, 5)}
    return made | changes


def state(**changes: Tensor | None) -> PowerState:
    return PowerState(**{"kv": torch.zeros(1, 2, 36, 5), "key": torch.zeros(1, 2, 36)} | changes)  # type: ignore[arg-type]


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"q": [1.0]}, TypeError, "q must be a tensor, and is list"),
    ({"k": torch.randn(1, 6, 16)}, ValueError, r"k must have the dims batch, time, heads, head dim, .* \[1, 6, 16\]"),
    ({"v": torch.randn(1, 6, 2, 5).double()}, ValueError, "v is torch.float64 on cpu, and q is torch.float32 on cpu"),
    ({"v": torch.randn(1, 6, 2, 5, device="meta")}, ValueError, "v is torch.float32 on meta, and q is .* on cpu"),
    (
        {name: torch.ones(1, 6, 2, 8, dtype=torch.int64) for name in "qkv"},
        TypeError,
        "q is torch.int64; allowed are torch.float64, torch.float32, torch.bfloat16, torch.float16",
    ),
    (
        {"q": torch.randn(1, 5, 4, 8)},
        ValueError,
        r"shapes must be q \[B, T, H, K\], .* q \[1, 5, 4, 8\], k \[1, 6, 2, 8\]",
    ),
    ({"q": torch.randn(1, 6, 4, 7)}, ValueError, r"shapes must be .* q \[1, 6, 4, 7\]"),
    ({"v": torch.randn(1, 6, 1, 5)}, ValueError, r"shapes must be .* v \[1, 6, 1, 5\]"),
    ({"v": torch.randn(1, 6, 2, 0)}, ValueError, r"no dim may be 0: .* v \[1, 6, 2, 0\]"),
    ({"q": torch.randn(1, 6, 3, 8)}, ValueError, "the 3 heads of q must be a multiple of the 2 heads of k and v"),
    ({"p": 5}, ValueError, "p must be 1, 2, 3 or 4, and is 5"),
    ({"p": 0}, ValueError, "p must be 1, 2, 3 or 4, and is 0"),
    ({"p": 3}, ValueError, "p=3 gives weights of both signs, .*: use an even p, or normalize=False"),
    ({"log_g": torch.zeros(1, 6, 4)}, ValueError, r"log_g must be \[B, T, G\] = \[1, 6, 2\], and is \[1, 6, 4\]"),
    (
        {"log_g": torch.zeros(1, 6, 2, dtype=torch.int32)},
        ValueError,
        "log_g must be .* on cpu, and is torch.int32",
    ),
    ({"log_g": torch.full((1, 6, 2), 0.5)}, ValueError, "log_g must be at most 0 .* its largest value is 0.5"),
    ({"log_g": torch.full((1, 6, 2), torch.nan)}, ValueError, "its largest value is nan"),
    ({"chunk_size": 0}, ValueError, r"chunk_size must be an integer of at least 1 and below 2\^31, and is 0"),
    ({"chunk_size": 16.0}, ValueError, r"chunk_size must be an integer of at least 1 and below 2\^31, and is 16.0"),
    ({"p": 2.0}, ValueError, "p must be 1, 2, 3 or 4, and is 2.0"),
    ({"p": True}, ValueError, "p must be 1, 2, 3 or 4, and is True"),
    ({"scale": torch.nan}, ValueError, "scale must be a finite number, and is nan"),
    ({"log_g": [0.0]}, TypeError, "log_g must be a tensor or None, and is list"),
    ({"log_g": torch.zeros(1, 6, 2).to(torch.float8_e4m3fn)}, ValueError, "and is torch.float8_e4m3fn on cpu"),
    ({"log_g": torch.zeros(1, 6, 2).to_sparse()}, ValueError, "log_g must be a dense tensor, and is torch.sparse_coo"),
    ({"log_g": torch.zeros(1, 6, 2, device="meta")}, ValueError, "on cpu, and is torch.float32 on meta"),
    ({"q": torch.randn(1, 6, 4, 8).to_sparse()}, ValueError, "q must be a dense tensor, and is torch.sparse_coo"),
    (
        {"k": torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged)},
        ValueError,
        "k must be a dense tensor, and is nested",
    ),
    (
        {name: torch.ones(1, 6, 2, 8, dtype=torch.complex64) for name in "qkv"},
        TypeError,
        "q is torch.complex64; allowed are torch.float64",
    ),
    ({"chunk_size": 10**30}, ValueError, "chunk_size must be .* below .*, and is an integer of more than 30 digits"),
    ({"chunk_size": 10**5000}, ValueError, "chunk_size must be .*, and is an integer of more than 30 digits"),
    ({"chunk_size": True}, ValueError, "chunk_size must be .*, and is True"),
    ({"scale": 10**400}, ValueError, "scale must be a finite number, and is an integer of more than 30 digits"),
    ({"scale": torch.inf}, ValueError, "scale must be a finite number, and is inf"),
    ({"scale": 1j}, ValueError, "scale must be a finite number, and is 1j"),
    ({"scale": "1"}, ValueError, "scale must be a finite number, and is '1'"),
    ({"scale": True}, ValueError, "scale must be a finite number, and is True"),
    ({"scale": torch.tensor(1.0)}, ValueError, "scale must be a finite number, and is Tensor"),
    (
        {"scale": 1e-20},
        ValueError,
        "the size of scale must be between 1.08e-19 and 1.84e.19, or 0, for p=2 in torch.float32, and scale is 1e-20",
    ),
    ({"scale": -1e20}, ValueError, "the size of scale must be between .*, and scale is -1e.20"),
    ({"normalize": "no"}, TypeError, "normalize must be True or False, and is 'no'"),
    ({"normalize": torch.tensor(True)}, TypeError, "normalize must be True or False, and is Tensor"),
    ({"return_state": 1}, TypeError, "return_state must be True or False, and is 1"),
    ({"p": "x" * 1000}, ValueError, "p must be 1, 2, 3 or 4, and is 'x{40}...'"),
    ({"p": torch.tensor(2)}, ValueError, "p must be 1, 2, 3 or 4, and is Tensor"),
    ({"impl": None}, ValueError, "impl must be auto, reference, recurrent, torch, triton, and is None"),
    ({"impl": ["torch"]}, ValueError, "impl must be auto, reference, recurrent, torch, triton, and is list"),
    (
        {name: torch.randn(1, 2, 2, 1024) for name in "qkv"} | {"p": 4},
        ValueError,
        "phi of 1,024 features has 46,081,900,800 entries for p=4, and may have 16,777,216: use a smaller head dim",
    ),
    ({"initial_state": PowerState(None, None)}, TypeError, "the state's kv must be a tensor, and is NoneType"),  # type: ignore[arg-type]
    ({"initial_state": state(key=[0])}, TypeError, "the state's key must be a tensor or None"),  # type: ignore[arg-type]
    (
        {"initial_state": state(kv=torch.zeros(1, 2, 36, 5).to_sparse())},
        ValueError,
        "the state's kv must be a dense tensor, and is torch.sparse_coo",
    ),
    (
        {name: torch.ones(1, 6, 2, 8, device="meta") for name in "qkv"}
        | {"cu_seqlens": torch.tensor([0, 6], device="meta"), "impl": "reference"},
        ValueError,
        "impl='reference' reads cu_seqlens, which has no values on the meta device",
    ),
    (
        {name: torch.randn(1, 6, 2, 8).double() for name in "qkv"} | {"impl": "triton"},
        ValueError,
        "impl='triton' takes torch.float32, torch.bfloat16, torch.float16, and q is torch.float64",
    ),
    (
        {name: torch.randn(1, 6, 2, 65) for name in "qkv"} | {"impl": "triton", "p": 3, "normalize": False},
        ValueError,
        "impl='triton' takes head dims of q and k up to 64 for p=3 in torch.float32, and it is 65",
    ),
    (
        {name: torch.randn(1, 6, 2, 65) for name in "qkv"} | {"impl": "triton", "p": 1, "normalize": False},
        ValueError,
        "impl='triton' takes head dims of q and k up to 64 for p=1 in torch.float32, and it is 65",
    ),
    (
        {"v": torch.randn(1, 6, 2, 65), "impl": "triton"},
        ValueError,
        "impl='triton' takes head dims of v up to 64 in torch.float32, and it is 65",
    ),
    (
        {"q": torch.randn(1, 6, 4, 8).half(), "k": torch.randn(1, 6, 2, 8).half()}
        | {"v": torch.randn(1, 6, 2, 129).half(), "impl": "triton"},
        ValueError,
        "impl='triton' takes head dims of v up to 128 in torch.float16, and it is 129",
    ),
    ({"initial_state": (1, 2)}, TypeError, "the state must be a PowerState, and is tuple"),
    ({"cu_seqlens": [0, 6]}, TypeError, "cu_seqlens must be a tensor, and is list"),
    ({"impl": "cuda"}, ValueError, "impl must be auto, reference, recurrent, torch, triton, and is 'cuda'"),
    (
        {"initial_state": state(kv=torch.zeros(2, 2, 36, 5))},
        ValueError,
        r"the state's kv must be \[1, 2, 36, 5\], and is \[2, 2, 36, 5\]$",
    ),
    (
        {"initial_state": state(kv=torch.zeros(1, 2, 120, 5))},
        ValueError,
        r"the state's kv must be \[1, 2, 36, 5\], and is \[1, 2, 120, 5\], which is one of p=3$",
    ),
    ({"initial_state": state(key=torch.zeros(1, 2, 35))}, ValueError, r"the state's key must be \[1, 2, 36\]"),
    (
        {"initial_state": state(kv=torch.zeros(1, 2, 36, 5).double())},
        ValueError,
        "the state's kv must be torch.float32 on cpu, and is torch.float64 on cpu",
    ),
    ({"initial_state": state(key=None)}, ValueError, "comes from normalize=False and has no key part"),
    (
        {"cu_seqlens": torch.tensor([0, 6]), "q": torch.randn(2, 6, 4, 8), "k": torch.randn(2, 6, 2, 8)}
        | {"v": torch.randn(2, 6, 2, 5)},
        ValueError,
        "cu_seqlens packs sequences in one batch row, and q has 2 rows",
    ),
    (
        {"cu_seqlens": torch.tensor([0.0, 6.0])},
        ValueError,
        "at least 2 integers in one dim, int32 .*, and is torch.float32",
    ),
    ({"cu_seqlens": torch.tensor([0j, 6])}, ValueError, "at least 2 integers in one dim, .*, and is torch.complex64"),
    ({"cu_seqlens": torch.tensor([False, True])}, ValueError, r"int32 or int64, and is torch.bool of shape \[2\]"),
    ({"cu_seqlens": torch.tensor([0, 6], dtype=torch.uint8)}, ValueError, "int32 or int64, and is torch.uint8"),
    ({"cu_seqlens": torch.tensor([0])}, ValueError, "cu_seqlens must be at least 2 integers"),
    ({"cu_seqlens": torch.tensor([[0, 6]])}, ValueError, r"and is torch.int64 of shape \[1, 2\]"),
    ({"cu_seqlens": torch.tensor([0, 6], device="meta")}, ValueError, "must be on cpu as q is, and is on meta"),
    ({"cu_seqlens": torch.tensor([1, 6])}, ValueError, "must rise from 0 to 6, the length of q, and begins with 1"),
    ({"cu_seqlens": torch.tensor([0, 3, 3, 6])}, ValueError, r"rise from 0 to 6, .*, and has 3 after 3 \(entry 2\)"),
    ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, ValueError, r"rise from 0 to 6, .*, and has 2 after 4 \(entry 2\)"),
    ({"cu_seqlens": torch.tensor([0, 5])}, ValueError, "must rise from 0 to 6, the length of q, and ends with 5"),
    ({"cu_seqlens": torch.tensor([0, 3, 7]).int()}, ValueError, "must rise from 0 to 6, .*, and ends with 7"),
    (
        {"cu_seqlens": torch.tensor([0, 2, 6]), "initial_state": state()},
        ValueError,
        r"the state's kv must be \[2, 2, 36, 5\], and is \[1, 2, 36, 5\]",
    ),
]


@pytest.mark.parametrize(("changes", "kind", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refusals(changes: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        power_attention(**tensors(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.randn(1, 1, 4, 8)}, r"q must have the dims batch, heads, head dim, and has shape \[1, 1, 4, 8\]"),
        ({"p": 3}, "p=3 gives weights of both signs"),
        ({"state": state(kv=torch.zeros(1, 2, 35, 5))}, "the state's kv must be"),
        ({"log_g": torch.ones(1, 2)}, "log_g must be at most 0"),
        ({"q": [1.0]}, "q must be a tensor, and is list"),
        ({"log_g": [1.0]}, "log_g must be a tensor or None, and is list"),
        ({"impl": "torch"}, "impl must be auto, recurrent, triton, and is 'torch'"),
        ({"impl": "triton", "q": torch.randn(1, 4, 8).requires_grad_()}, "impl='triton' has no gradients for a step"),
        ({"impl": ["triton"]}, "impl must be auto, recurrent, triton, and is list"),
        ({"state": None}, "the state must be a PowerState, and is NoneType"),
        ({"state": PowerState(None)}, "the state's kv must be a tensor, and is NoneType"),  # type: ignore[arg-type]
        ({"normalize": "no"}, "normalize must be True or False, and is 'no'"),
        ({"scale": 10**400}, "scale must be a finite number"),
        ({"scale": 1e-20}, "the size of scale must be between"),
        ({"log_g": torch.zeros(1, 2).to(torch.float8_e5m2)}, "log_g must be .*, and is torch.float8_e5m2"),
        ({"v": torch.randn(1, 2, 5, device="meta")}, "v is torch.float32 on meta, and q is torch.float32 on cpu"),
        ({"log_g": torch.tensor(0.0)}, r"log_g must be \[B, G\] = \[1, 2\], and is \[\]"),
    ],
    ids=range(17),
)
def test_refusals_of_a_step(changes: dict[str, Any], message: str) -> None:
    made: dict[str, Any] = {"q": torch.randn(1, 4, 8), "k": torch.randn(1, 2, 8), "v": torch.randn(1, 2, 5)}
    with pytest.raises((ValueError, TypeError), match=message):
        power_attention_step(**made | {"log_g": None, "state": state()} | changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, torch.ones(1, 6, 2, 5), 2), "k must be a tensor, and is NoneType"),
        ((torch.ones(1, 6, 2, 8), None, 2), "v must be a tensor, and is NoneType"),
        ((torch.ones(6, 2, 8), torch.ones(6, 2, 5), 2), "k and v must have the dims batch, time, heads, head dim"),
        ((torch.ones(1, 6, 2, 8), torch.ones(1, 6, 1, 5), 2), r"shapes must be k \[B, T, G, K\]"),
        ((torch.ones(1, 6, 2, 0), torch.ones(1, 6, 2, 5), 2), "no dim may be 0"),
        ((torch.ones(1, 6, 2, 8).int(), torch.ones(1, 6, 2, 5).int(), 2), "k is torch.int32; allowed are"),
        ((torch.ones(1, 6, 2, 8), torch.ones(1, 6, 2, 5).half(), 2), "v is torch.float16 on cpu, and k is"),
        ((torch.ones(1, 6, 2, 8), torch.ones(1, 6, 2, 5), 2, "no"), "normalize must be True or False, and is 'no'"),
        ((torch.ones(1, 6, 2, 512), torch.ones(1, 6, 2, 5), 4), "phi of 512 features has 2,896,986,240 entries"),
        *(
            ((torch.ones(1, 6, 2, 8), torch.ones(1, 6, 2, 5), p), f"p must be 1, 2, 3 or 4, and is {p}")
            for p in (0, 2.5, -1, True)
        ),
    ],
    ids=range(13),
)
def test_refusals_of_an_empty_state(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        empty_state(*arguments)


@pytest.mark.parametrize("embed", [spow, tiled_spow])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 2), "x must be a tensor, and is NoneType"),
        ((torch.ones(2, 3).int(), 2), "x is torch.int32; allowed are"),
        ((torch.ones(2, 3).to_sparse(), 2), "x must be a dense tensor"),
        ((torch.tensor(1.0), 2), r"x must have features in its last dim, and has shape \[\]"),
        ((torch.ones(2, 0), 2), r"x must have features in its last dim, and has shape \[2, 0\]"),
        ((torch.ones(2, 3000), 4), r"phi\(x\) would have \d+ entries in its last dim, and may have 16777216"),
        *(((torch.ones(2, 3), p), "p must be an integer from 1 to 16, and is") for p in (0, -1, True, 2.0, 17, 10**30)),
    ],
    ids=range(12),
)
def test_refusals_of_an_embedding(embed: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        embed(*arguments)


@pytest.mark.parametrize("tile", [0, -1, 2.0, True, None])
def test_refusals_of_a_tile(tile: Any) -> None:
    with pytest.raises(ValueError, match="tile must be an integer of at least 1, and is"):
        tiled_spow(torch.ones(2, 3), 2, tile)
    with pytest.raises(ValueError, match=r"phi\(x\) would have .* entries"):
        tiled_spow(torch.ones(2, 3), 2, 10**30)


@pytest.mark.parametrize("impl", ["reference", "recurrent", "torch", "triton"])
def test_the_longest_chunk_is_one_chunk(impl: str) -> None:
    made = tensors()
    whole = power_attention(**made, chunk_size=2**31 - 1, impl=impl)
    assert torch.equal(whole, power_attention(**made, chunk_size=6, impl=impl))  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", ["reference", "recurrent", "torch", "triton"])
def test_tensors_without_values_give_one_without(impl: str) -> None:
    made = {name: x.to("meta") for name, x in tensors().items()}
    out, end = power_attention(**made, impl=impl, return_state=True)
    assert (out.shape, out.device.type, end.kv.shape) == ((1, 6, 4, 5), "meta", (1, 2, 36, 5))


def test_states_are_copied_and_saved(tmp_path: Path) -> None:
    made = tensors()
    end = power_attention(**made, return_state=True)[1]
    torch.save(tuple(end), tmp_path / "state.pt")
    copies = (
        copy.deepcopy(end),
        pickle.loads(pickle.dumps(end)),
        PowerState(*torch.load(tmp_path / "state.pt")),
    )
    following = power_attention(**made, initial_state=end)
    for other in copies:
        assert isinstance(other, PowerState)
        assert torch.equal(power_attention(**made, initial_state=other), following)  # type: ignore[arg-type]


def test_output_has_the_dtype_of_the_values_and_the_state_is_fp32() -> None:
    low = {name: x.bfloat16() for name, x in tensors().items()}
    for impl in ("reference", "recurrent", "torch"):
        out, end = power_attention(**low, impl=impl, return_state=True)
        assert out.dtype == torch.bfloat16
        assert end.kv.dtype == torch.float32
        assert end.key is not None
        assert end.key.dtype == torch.float32


def test_an_empty_state_is_no_state() -> None:
    made = tensors()
    empty = empty_state(made["k"], made["v"], p=2)
    torch.testing.assert_close(power_attention(**made, initial_state=empty), power_attention(**made))


def test_default_chunk_sizes() -> None:
    assert [default_chunk_size(64, p) for p in (1, 2, 3, 4)] == [128, 256, 1024, 256]
    assert [default_chunk_size(64, p, "triton") for p in (1, 2, 3, 4)] == [256, 1024, 4096, 4096]
    with pytest.raises(ValueError, match="engine must be torch or triton, and is 'cuda'"):
        default_chunk_size(64, 2, "cuda")


@pytest.mark.parametrize("engine", ["torch", "triton"])
def test_each_engine_takes_its_own_default_chunk_size(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[str, int]] = []

    def listen(engine: str, inputs: Inputs, state: Tensor | None, shape: CallShape, *_: bool) -> Outputs:
        taken.append((engine, shape.chunk_size))
        nothing = torch.empty(0)
        return Outputs(nothing, nothing, None, nothing)

    monkeypatch.setattr(engines, "forward", listen)
    power_attention(**tensors(), impl=engine)
    power_attention(**tensors(), impl=engine, chunk_size=3)
    assert taken == [(engine, default_chunk_size(8, 2, engine)), (engine, 3)]


def test_triton_needs_a_gpu_or_its_interpreter_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="impl='triton' runs on a CUDA device, and q is on cpu; on the CPU only under"):
        power_attention(**tensors(), impl="triton")
    one = {name: x[:, 0] for name, x in tensors().items()}
    with pytest.raises(ValueError, match="impl='triton' runs on a CUDA device, and q is on cpu"):
        power_attention_step(**one, log_g=None, state=state(), impl="triton")


def test_triton_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "INSTALLED", False)
    with pytest.raises(ValueError, match="impl='triton' needs the triton package, which is not installed"):
        power_attention(**tensors(), impl="triton")


def test_names_are_found_and_others_are_not() -> None:
    for name in powerplan.kernels.__all__:
        assert getattr(powerplan.kernels, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'power_atention'"):
        powerplan.kernels.power_atention  # noqa: B018
