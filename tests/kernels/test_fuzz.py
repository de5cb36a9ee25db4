"""Random calls of the public functions, valid ones and hostile ones: an answer that is right, or an error that names
the argument.

POWERPLAN_FUZZ=4000 pytest tests/kernels/test_fuzz.py runs that many random calls instead of a few fixed ones.
"""

from __future__ import annotations

import os
import random
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from device import ON_GPU
from torch import Tensor

import powerplan.kernels
from powerplan.kernels import PowerState, empty_state, power_attention, power_attention_step, spow, tiled_spow

ROUNDS = os.environ.get("POWERPLAN_FUZZ")
CALLS = int(ROUNDS) if ROUNDS else 300
BLOCKS = 10
FIRST_SEED = random.SystemRandom().randrange(10**9) if ROUNDS else 0

pytestmark = [
    pytest.mark.skipif(ON_GPU, reason="values on a GPU are not looked at, and most cases are refusals"),
    pytest.mark.filterwarnings("ignore"),  # numpy's, of infinities in Triton's interpreter, and those of sparse tensors
]

Call = tuple[Callable[..., Any], dict[str, Any]]

SCALARS: list[Any] = [
    *(None, True, False, 0, 1, 2, 3, 4, -1, 5, 2.5, 2.0, "no", "", "torch", "x" * 10_000, "a\nb"),
    *(float("nan"), float("inf"), 1j, 1e-300, 1e300, 10**30, -(10**30), 10**400, 10**5000, 2**31, 2**31 - 1),
    *([], {}, (), object(), b"2", torch.tensor(2), torch.tensor(True), np.int64(2), np.float32(2)),
    *(torch.float32, torch.ones(2, 3), PowerState(torch.ones(1)), print),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OTHER_DTYPES = [torch.int32, torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn]
FOLDER = str(Path(powerplan.kernels.__file__).parent)


def positive(pick: random.Random, dtype: torch.dtype, *shape: int) -> Tensor:
    """Return random numbers from 0.2 to 1.2: sums of such numbers lose no digits. Strides vary."""
    make = torch.Generator().manual_seed(pick.randrange(10**9))
    order = pick.choice([list(range(len(shape))), pick.sample(range(len(shape)), len(shape))])
    x = torch.rand([shape[dim] for dim in order], generator=make, dtype=torch.float64) + 0.2
    x = x.permute([order.index(dim) for dim in range(len(shape))]).to(dtype)
    return x[..., ::2].repeat_interleave(2, -1)[..., : shape[-1]] if pick.random() < 0.1 else x


def valid(pick: random.Random) -> Call:
    """Return a call that must be answered."""
    dtype, p = pick.choice(DTYPES), pick.choice([1, 2, 2, 2, 3, 4])
    if pick.random() < 0.1:
        embed, x = pick.choice([spow, tiled_spow]), positive(pick, dtype, 2, pick.randint(1, 9))
        return embed, {"x": x, "p": p} | ({"tile": pick.choice([1, 2, 8, 9])} if embed is tiled_spow else {})
    batch, tokens, groups, repeats = (pick.randint(1, most) for most in (2, 9, 2, 2))
    key_dim, value_dim = pick.randint(1, 5), pick.randint(1, 4)
    normalize = p % 2 == 0 and pick.random() < 0.6
    k, v = (
        positive(pick, dtype, batch, tokens, groups, key_dim),
        positive(pick, dtype, batch, tokens, groups, value_dim),
    )
    if pick.random() < 0.1:
        return empty_state, {"k": k, "v": v, "p": p, "normalize": normalize}
    given: dict[str, Any] = {"q": positive(pick, dtype, batch, tokens, groups * repeats, key_dim), "k": k, "v": v}
    given |= {"p": p, "normalize": normalize, "log_g": gates(pick, batch, tokens, groups)}
    if pick.random() < 0.3:
        given["scale"] = pick.choice([0.5, 1, -1, 2.0])
    sequences = batch
    if batch == 1 and pick.random() < 0.3 and tokens > 1:
        cuts = sorted(pick.sample(range(1, tokens), pick.randint(0, tokens - 1)))
        given["cu_seqlens"] = torch.tensor([0, *cuts, tokens], dtype=pick.choice([torch.int32, torch.int64]))
        sequences = len(cuts) + 1
    start = None
    if pick.random() < 0.4:
        past = [positive(pick, dtype, sequences, 2, groups, size) for size in (key_dim, key_dim, value_dim)]
        start = power_attention(*past, p=p, normalize=normalize, return_state=True)[1]
        start = PowerState(*(None if x is None else x.detach() for x in start))
    if pick.random() < 0.2:
        one = {name: x[:, 0] for name, x in given.items() if name in ("q", "k", "v")}
        log_g = None if given["log_g"] is None else given["log_g"][:, 0]
        given = {name: given[name] for name in ("p", "normalize", "scale") if name in given}
        start = empty_state(k, v, p, normalize) if start is None or sequences != batch else start
        return power_attention_step, one | {"log_g": log_g, "state": start} | given
    impl = pick.choices(["auto", "torch", "recurrent", "reference", "triton"], [2, 5, 2, 2, 1])[0]
    # Triton has no float64, its interpreter no products of bf16, and 64 steps of phi (p = 4) take it a second.
    if impl == "triton" and (dtype in (torch.float64, torch.bfloat16) or p == 4):
        impl = "torch"
    given |= {"impl": impl, "return_state": pick.random() < 0.5, "initial_state": start}
    if pick.random() < 0.7:
        given["chunk_size"] = pick.choice([1, 2, 3, 7, 100, 2**31 - 1])
    return power_attention, given


def gates(pick: random.Random, batch: int, tokens: int, groups: int) -> Tensor | None:
    if pick.random() < 0.3:
        return None
    log_g = -positive(pick, pick.choice([torch.float32, torch.float64]), batch, tokens, groups)
    for _ in range(pick.choice([0, 0, 2, 20])):
        log_g[pick.randrange(batch), pick.randrange(tokens)] = pick.choice([0.0, -torch.inf, -1e4, -80.0, -1e-30])
    return log_g


def changed(pick: random.Random, name: str, x: Any) -> Any:
    """Return something else in place of a value: for tensors mostly another tensor."""
    if isinstance(x, PowerState) and pick.random() < 0.8:
        kv, key = x
        if pick.random() < 0.5:
            return PowerState(changed(pick, "kv", kv), key)
        return PowerState(kv, None if pick.random() < 0.5 else changed(pick, "key", key))
    if not isinstance(x, Tensor) or x.layout != torch.strided or 0 in (*x.shape, x.ndim) or pick.random() < 0.2:
        return pick.choice(SCALARS)
    x = x.detach().clone()
    place = tuple(pick.randrange(size) for size in x.shape)
    if pick.random() < 0.3 and x.is_floating_point():
        x[place] = pick.choice([torch.nan, torch.inf, -torch.inf, 0.0, 1e30, 1e-30, -1.0])
        return x
    changes: list[Callable[[], Tensor]] = [
        lambda: x.to(pick.choice(DTYPES + OTHER_DTYPES)),
        lambda: x.to("meta"),
        lambda: x.to_sparse(),
        lambda: x[0],
        lambda: x[..., None],
        lambda: x[..., :0],
        lambda: x[:0],
        lambda: torch.cat((x, x), pick.randrange(x.ndim)),
        lambda: x.mT if x.ndim > 1 else x.flip(0),
        lambda: torch.tensor(1.0),
        lambda: x.clone().requires_grad_() if x.is_floating_point() else x,
        lambda: x.expand(2, *x.shape),
        lambda: x.double() + 1,
        lambda: -x.double(),
        lambda: torch.nested.nested_tensor([torch.ones(2, 3)], layout=torch.jagged),
    ]
    return pick.choice(changes)()


def hostile(pick: random.Random) -> Call:
    """Return a call with one to three arguments changed."""
    function, given = valid(pick)
    for _ in range(pick.randint(1, 3)):
        name = pick.choice(sorted(given))
        if name in "qkv" and pick.random() < 0.15:  # all of them alike
            how = pick.choice([lambda x: x.to("meta"), lambda x: x.to(torch.float8_e4m3fn), lambda x: x.cfloat()])
            given |= {other: how(x) for other, x in given.items() if other in ("q", "k", "v") and isinstance(x, Tensor)}
        else:
            given[name] = changed(pick, name, given[name])
    return function, given


def is_refused(call: Call) -> tuple[bool, Any]:
    """Return whether the call is refused, and what it returns if not. The refusal must be one of the package's own."""
    function, given = call
    try:
        return False, function(**given)
    except (ValueError, TypeError) as error:
        refusal = error
    text = str(refusal)
    assert type(refusal) in (ValueError, TypeError), repr(refusal)
    assert traceback.extract_tb(refusal.__traceback__)[-1].filename.startswith(FOLDER), repr(refusal)
    assert text.isprintable(), text
    assert 10 < len(text) < 400, text
    about = {*given, "shapes must be", "no dim may be 0", "heads of q", "phi of", "the state"}
    assert any(name in text for name in about), text
    return True, text


def tensors_of(returned: Any) -> list[Tensor]:
    parts = returned if isinstance(returned, tuple) else (returned,)
    return [x for part in parts for x in (part if isinstance(part, tuple) else (part,)) if x is not None]


def wide(x: Any) -> Any:
    """Return a value with all numbers of 16 and 32 bits as float64."""
    if isinstance(x, PowerState):
        return PowerState(*(wide(part) for part in x))
    return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x


def check_answer(call: Call) -> None:
    """Call, and compare outputs, states and gradients with the definition in float64."""
    function, given = call
    differentiated = function is power_attention and given["q"].dtype in (torch.float32, torch.float64)
    exact = {name: wide(x) for name, x in given.items()}
    if function is power_attention:
        exact["impl"] = "reference"
    leaves: list[list[Tensor]] = [[], []]
    for arguments, own in zip((given, exact), leaves, strict=True):
        for name in ("q", "k", "v", "log_g") if differentiated else ():
            if arguments[name] is not None:
                arguments[name] = arguments[name].detach().requires_grad_()
                own.append(arguments[name])
    refused, returned = is_refused(call)
    assert not refused, returned
    got, right = tensors_of(returned), tensors_of(function(**exact))
    dtype = next(x for name, x in given.items() if name in ("q", "k", "x")).dtype
    # In float64, sums of gates of -100 are the larger error, on both sides.
    rounding = (2**14 if dtype == torch.float64 else 64) * torch.finfo(dtype).eps
    for one, other in zip(got, right, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one.double(), other.double(), rtol=rounding, atol=1e-30)
    if differentiated:
        grads = [
            torch.autograd.grad(sum(x.double().square().sum() for x in outs), own)
            for outs, own in ((got, leaves[0]), (right, leaves[1]))
        ]
        largest = max(grad.abs().max().item() for grad in grads[1])
        for one, other in zip(*grads, strict=True):
            own = max(rounding, torch.finfo(one.dtype).eps)  # Gates may be float32 beside float64.
            torch.testing.assert_close(one.double(), other.double(), rtol=own, atol=rounding * largest)


def seeds(block: int) -> range:
    return range(FIRST_SEED + block, FIRST_SEED + CALLS, BLOCKS)


def told(seed: int, run: Callable[[random.Random], None]) -> None:
    try:
        run(random.Random(seed))
    except BaseException as error:
        error.add_note(f"with random.Random({seed})")
        raise


@pytest.mark.parametrize("block", range(BLOCKS))
def test_valid_calls_are_answered_rightly(block: int) -> None:
    for seed in seeds(block):
        told(seed, lambda pick: check_answer(valid(pick)))


@pytest.mark.parametrize("block", range(BLOCKS))
def test_hostile_calls_are_answered_or_refused(block: int) -> None:
    def run(pick: random.Random) -> None:
        refused, returned = is_refused(hostile(pick))
        assert refused or all(isinstance(x, Tensor) for x in tensors_of(returned))

    for seed in seeds(block):
        told(seed, run)
