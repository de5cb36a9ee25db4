"""Calls of flash-linear-attention's kernels, which need a GPU. Here functions with their signatures stand for them.

The functions compute token by token, from what the kernels document: [B, T, H, K] tensors, natural logarithms of
decays, queries times `scale` (K^-0.5 where it is None), states [B, H, K, V].
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from kinds import spec_of
from torch import Tensor

from powerplan.mixers import GLA, GSA, KDA, RWKV7, DeltaNet, Forgetting, GatedDeltaNet, LogLinear, Mamba1, Mamba2, Mixer
from powerplan.models import build_layer
from powerplan.models.cache import Slot
from powerplan.models.mixers import fla, forgetting, recurrence, rwkv, scans, slots
from powerplan.models.mixers.forgetting import forgetting_attention
from powerplan.models.mixers.recurrence import delta_rule, gated_linear_attention
from powerplan.models.mixers.rwkv import STRONGEST_LOG_G, rank_one_rule, rank_one_state
from powerplan.models.mixers.scans import grouped_scan
from powerplan.models.mixers.slots import slot_attention
from powerplan.profile.options import _runs_in_fla

SIGNATURES = json.loads(Path(__file__).parent.parent.joinpath("data", "fla_signatures.json").read_text())["signatures"]
FUNCTIONS = (forgetting, recurrence, rwkv, scans, slots)

Given = dict[str, Any]


def matrix_states(arguments: Given, decay: Tensor, write: Callable[[Given, int, Tensor], Tensor]) -> tuple[Tensor, Any]:
    """Outputs [B, T, H, V] and the last state of S = diag(decay) S + write(t, S), where S is the one before."""
    q, v, scale = arguments["q"], arguments["v"], arguments["scale"]
    assert decay.shape == q.shape == arguments["k"].shape
    assert v.shape[:3] == q.shape[:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    state = arguments["initial_state"]
    if state is None:
        state = torch.zeros(q.shape[0], *q.shape[2:], v.shape[-1], dtype=wide)
    assert state.shape == (q.shape[0], *q.shape[2:], v.shape[-1])
    assert state.dtype == wide
    outs = []
    for token in range(q.shape[1]):
        decayed = decay[:, token, :, :, None].to(wide).exp() * state
        state = decayed + write(arguments, token, state)
        query = q[:, token].to(wide) * (q.shape[-1] ** -0.5 if scale is None else scale)
        outs.append(torch.einsum("bhk,bhkv->bhv", query, state))
    assert arguments["output_final_state"]
    return torch.stack(outs, 1).to(v.dtype), state


def outer(k: Tensor, v: Tensor) -> Tensor:
    return k[..., :, None] * v[..., None, :]


def write_values(arguments: Given, token: int, state: Tensor) -> Tensor:
    return outer(arguments["k"][:, token].to(state.dtype), arguments["v"][:, token].to(state.dtype))


def gla(arguments: Given) -> Any:
    return matrix_states(arguments, arguments["g"], write_values)


def simple_gla(arguments: Given) -> Any:
    assert arguments["g_gamma"] is None
    return matrix_states(arguments, arguments["g"][..., None].expand_as(arguments["k"]), write_values)


def rwkv7(arguments: Given) -> Any:
    lowest = arguments["lower_bound"]
    assert lowest == STRONGEST_LOG_G
    assert (arguments["w"] >= lowest).all()

    def write(given: Given, token: int, state: Tensor) -> Tensor:
        reading, placing = given["a"][:, token].to(state.dtype), given["b"][:, token].to(state.dtype)
        return outer(placing, torch.einsum("bhk,bhkv->bhv", reading, state)) + write_values(given, token, state)

    return matrix_states(arguments | {"q": arguments["r"]}, arguments["w"], write)


def gsa(arguments: Given) -> Any:
    """Gated linear attention to the slots' keys, a softmax over slots, and gated linear attention to their values."""
    keys, values = arguments["initial_state"] or (None, None)
    shared = {"output_final_state": True, "g": arguments["g"], "scale": arguments["scale"]}
    q, k, v, s = (arguments[name] for name in "qkvs")
    # The gate of the first pass is along its values: the slots. Transposed, it decays the keys of a pass.
    wide = torch.promote_types(q.dtype, torch.float32)
    state = torch.zeros(*q.shape[::2][:2], q.shape[-1], s.shape[-1], dtype=wide) if keys is None else keys
    assert state.shape == (q.shape[0], q.shape[2], q.shape[-1], s.shape[-1])
    scores = []
    for token in range(q.shape[1]):
        state = state * arguments["g"][:, token, :, None].to(wide).exp() + outer(
            k[:, token].to(wide), s[:, token].to(wide)
        )
        query = q[:, token].to(wide) * (q.shape[-1] ** -0.5 if arguments["scale"] is None else arguments["scale"])
        scores.append(torch.einsum("bhk,bhkm->bhm", query, state))
    read = torch.stack(scores, 1).softmax(-1)
    second = shared | {"q": read, "k": s.to(wide), "v": v.to(wide), "scale": 1.0, "initial_state": values}
    out, values = gla(second)
    return out.to(v.dtype), [state, values]


def forgetting_attn(arguments: Given) -> Tensor:
    q, k, v, g, scale = (arguments[name] for name in ("q", "k", "v", "g", "scale"))
    assert g.shape == q.shape[:3]
    repeats = q.shape[2] // k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k, v = (part.to(wide).transpose(1, 2) for part in (q, k, v))
    k, v = (part.repeat_interleave(repeats, 1) for part in (k, v))
    sums = g.to(wide).cumsum(1).mT
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale) + sums[..., :, None] - sums[..., None, :]
    unseen = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).to(arguments["v"].dtype)


def delta(arguments: Given) -> Any:
    g, k = arguments.get("g"), arguments["k"]
    decay = torch.zeros_like(k) if g is None else (g if g.ndim == 4 else g[..., None].expand_as(k))

    def write(given: Given, token: int, state: Tensor) -> Tensor:
        key, beta = given["k"][:, token].to(state.dtype), given["beta"][:, token, :, None].to(state.dtype)
        decayed = decay[:, token, :, :, None].to(state.dtype).exp() * state
        return outer(key, beta * (given["v"][:, token] - torch.einsum("bhk,bhkv->bhv", key, decayed)))

    return matrix_states(arguments, decay, write)


STAND_INS: dict[str, Callable[[Given], Any]] = {
    "fla.ops.delta_rule.chunk_delta_rule": delta,
    "fla.ops.gated_delta_rule.chunk_gated_delta_rule": delta,
    "fla.ops.kda.chunk_kda": delta,
    "fla.ops.gla.chunk_gla": gla,
    "fla.ops.simple_gla.chunk_simple_gla": simple_gla,
    "fla.ops.rwkv7.chunk_rwkv7": rwkv7,
    "fla.ops.gsa.chunk_gsa": gsa,
    "fla.ops.forgetting_attn.parallel_forgetting_attn": forgetting_attn,
}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put the stand-ins where the kernels are imported from. The list names those that were called."""
    calls: list[str] = []

    def kernel(name: str) -> Callable[..., Any]:
        signature = inspect.signature(eval(f"lambda {SIGNATURES[name]}: None"))

        def run(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            assert not bound.arguments.get("kwargs"), "kernels take more names than they read"
            given = dict(bound.arguments)
            heads = {given[part].dtype for part in ("q", "r", "k", "v", "a", "b", "s", "beta") if part in given}
            assert len(heads) == 1, "one dtype for what the kernels multiply"
            gates = {given[part].dtype for part in "gw" if given.get(part) is not None}
            assert gates <= {torch.promote_types(heads.pop(), torch.float32)}
            calls.append(name.rpartition(".")[2])
            return STAND_INS[name](given)

        return run

    for name in SIGNATURES:
        path, _, function = name.rpartition(".")
        module = ModuleType(path)
        setattr(module, function, kernel(name))
        monkeypatch.setitem(sys.modules, path, module)
    return calls


def use_fla(monkeypatch: pytest.MonkeyPatch, supports: Callable[..., bool]) -> None:
    for module in FUNCTIONS:
        monkeypatch.setattr(module, "fla_supports", supports)


def drawn(*features: int, tokens: int = 37) -> Tensor:
    return torch.randn(2, tokens, *features, dtype=torch.float64)


def decays(*features: int, strongest: float = 2.0) -> Tensor:
    return -strongest * torch.rand(2, 37, *features, dtype=torch.float64) ** 3


def cases() -> dict[str, tuple[str, Callable[..., tuple[Tensor, Tensor]], list[Tensor], tuple[int, ...]]]:
    """The kernel of each kind, its twin in torch, what both take, and the shape of a state."""
    torch.manual_seed(0)
    heads, state = [drawn(4, 6), drawn(4, 6), drawn(4, 5)], (2, 4, 6, 5)
    unit = F.normalize(drawn(4, 6), dim=-1)
    rate, beta = torch.rand(2, 37, 4, 6).double(), torch.rand(2, 37, 4).double()
    corrected = [drawn(4, 6), unit, drawn(4, 5), beta]
    ranked = [*heads, -unit, unit * rate, decays(4, 6, strongest=0.6)]
    return {
        "deltanet": ("chunk_delta_rule", lambda *x, **o: delta_rule(*x, None, **o), corrected, state),
        "gated_deltanet": ("chunk_gated_delta_rule", delta_rule, [*corrected, decays(4)], state),
        "kda": ("chunk_kda", delta_rule, [*corrected, decays(4, 6)], state),
        "gla": ("chunk_gla", gated_linear_attention, [*heads, decays(4, 6)], state),
        "mamba2": (
            "chunk_simple_gla",
            grouped_scan,
            [drawn(2, 6), drawn(2, 6), drawn(6, 5), decays(6)],
            (2, 2, 6, 3, 5),
        ),
        "rwkv7": ("chunk_rwkv7", rank_one_rule, ranked, state),
        "gsa": ("chunk_gsa", slot_attention, [*heads, decays(4, 3)], (2, 4, 3, 11)),
    }


@pytest.mark.parametrize("kind", cases())
@pytest.mark.parametrize("continued", [False, True])
def test_a_kernel_gives_what_torch_gives(
    kind: str, continued: bool, monkeypatch: pytest.MonkeyPatch, called: list[str]
) -> None:
    name, run, inputs, shape = cases()[kind]
    state = torch.randn(shape, dtype=torch.float64) if continued else None
    leaves = [part.requires_grad_() for part in (*inputs, *([] if state is None else [state]))]
    expected = run(*inputs, state=state, chunk_size=16)
    assert not called
    use_fla(monkeypatch, lambda *_: True)
    found = run(*inputs, state=state, chunk_size=16)
    assert called == [name]
    torch.testing.assert_close(found, expected)
    grads = [torch.randn_like(part) for part in expected]
    own, other = (torch.autograd.grad(result, leaves, grads) for result in (found, expected))
    torch.testing.assert_close(own, other)


def test_a_state_without_queries_takes_the_kernel(monkeypatch: pytest.MonkeyPatch, called: list[str]) -> None:
    _, *inputs = cases()["rwkv7"][2]
    run = partial(rank_one_state, *inputs, chunk_size=16, with_transition=True)
    expected = run()
    use_fla(monkeypatch, lambda *_: True)
    torch.testing.assert_close(run(), expected)
    assert called == ["chunk_rwkv7"]


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_forgetting_attention_by_its_kernel(kv_heads: int, monkeypatch: pytest.MonkeyPatch, called: list[str]) -> None:
    torch.manual_seed(0)
    inputs = [drawn(4, 6), drawn(kv_heads, 6), drawn(kv_heads, 5), decays(4)]
    leaves = [part.requires_grad_() for part in inputs]
    expected = forgetting_attention(*inputs)
    use_fla(monkeypatch, lambda *_: True)
    found = forgetting_attention(*inputs)
    assert called == ["parallel_forgetting_attn"]
    torch.testing.assert_close(found, expected)
    grad = torch.randn_like(found)
    own, other = (torch.autograd.grad(result, leaves, grad) for result in (found, expected))
    torch.testing.assert_close(own, other)
    forgetting_attention(*inputs, window=9)
    forgetting_attention(inputs[0][:, 5:], *inputs[1:])
    monkeypatch.setattr(forgetting, "MAX_FORGETTING_TOKENS", 36)
    forgetting_attention(*inputs)
    assert len(called) == 1, "a window, earlier keys and long sequences run in torch"


def test_strong_decays_count_as_in_torch(monkeypatch: pytest.MonkeyPatch, called: list[str]) -> None:
    """A decay of exp(-10,000) would leave float32 sums of log decays no digits for those that follow."""
    torch.manual_seed(0)
    heads = [drawn(4, 6).float(), drawn(4, 6).float(), drawn(4, 5).float()]
    log_g = decays(4, 6).float()
    log_g[:, 7] = -10_000.0
    expected = gated_linear_attention(*heads, log_g, None, 16)
    use_fla(monkeypatch, lambda *_: True)
    given: list[Tensor] = []
    monkeypatch.setitem(
        STAND_INS, "fla.ops.gla.chunk_gla", lambda arguments: (given.append(arguments["g"]), gla(arguments))[1]
    )
    found = gated_linear_attention(*heads, log_g, None, 16)
    assert given[0].min() == -20
    torch.testing.assert_close(found, expected)


SIZES: dict[str, Any] = {"heads": 2, "head_dim": 16, "v_head_dim": 18}
RANKS = {"decay_rank": 3, "rate_rank": 2, "gate_rank": 4}
LAYERS: dict[str, Mixer] = {
    "chunk_delta_rule": DeltaNet(**SIZES),
    "chunk_gated_delta_rule": GatedDeltaNet(**SIZES | {"heads": 4}, key_heads=2),
    "chunk_kda": KDA(**SIZES, gate_rank=3),
    "chunk_gla": GLA(**SIZES, gate_rank=3),
    "chunk_simple_gla": Mamba2(heads=4, head_dim=18, state_dim=16, groups=2),
    "chunk_rwkv7": RWKV7(**SIZES, **RANKS, channel_mix=False),
    "chunk_gsa": GSA(**SIZES, slots=16),
    "parallel_forgetting_attn": Forgetting(heads=4, kv_heads=2, head_dim=16, v_head_dim=18),
}
"""A mixer for each kernel."""


def on_cuda(part: Tensor) -> Any:
    return SimpleNamespace(is_cuda=True, dtype=part.dtype, shape=part.shape)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # Torch's RMSNorm of float32 weights under autocast.
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("autocast", [False, True])
def test_modules_hand_over_what_kernels_take(
    name: str, autocast: bool, monkeypatch: pytest.MonkeyPatch, called: list[str]
) -> None:
    """In bf16, and under autocast with weights in float32. A second piece continues from the state of the first."""
    torch.manual_seed(0)
    mixer = build_layer(spec_of(LAYERS[name]), 0).mixer
    mixer = mixer if autocast else mixer.bfloat16()
    x = torch.randn(2, 30, 16, dtype=torch.float32 if autocast else torch.bfloat16)

    def run() -> Tensor:
        slot = Slot()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), torch.no_grad():
            return torch.cat([mixer(part, slot) for part in x.split(17, 1)], 1)

    expected = run()
    assert not called
    supports = fla.fla_supports
    monkeypatch.setattr(fla, "HAS_FLA", True)
    use_fla(monkeypatch, lambda q, v, *sizes: supports(on_cuda(q), on_cuda(v), *sizes))
    found = run()
    assert called == [name] * (1 if name == "parallel_forgetting_attn" else 2)
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= 2**-5 * expected.abs().max()


@pytest.mark.parametrize("name", LAYERS)
def test_a_cpu_runs_torch(name: str, monkeypatch: pytest.MonkeyPatch, called: list[str]) -> None:
    monkeypatch.setattr(fla, "HAS_FLA", True)
    mixer = build_layer(spec_of(LAYERS[name]), 0).mixer.bfloat16()
    mixer(torch.randn(1, 9, 16, dtype=torch.bfloat16))
    assert not called


def test_what_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    def supports(*sizes: int, dtype: torch.dtype = torch.bfloat16, v_dtype: torch.dtype | None = None) -> bool:
        q, v = (torch.empty(1, 1, 1, size, dtype=dtype, device="meta") for size in sizes[:2])
        return fla.fla_supports(on_cuda(q), on_cuda(v.to(v_dtype or dtype)), *sizes[2:])

    monkeypatch.setattr(fla, "HAS_FLA", False)
    assert not supports(64, 64)
    monkeypatch.setattr(fla, "HAS_FLA", True)
    assert supports(64, 64)
    assert supports(16, 18)
    assert supports(256, 512, 64, dtype=torch.float16)
    assert not supports(64, 64, dtype=torch.float32)
    assert not supports(64, 64, v_dtype=torch.float32)
    for sizes in ((8, 64), (64, 8), (63, 64), (64, 63), (258, 64), (64, 64, 8), (64, 64, 17)):
        assert not supports(*sizes), sizes


@pytest.mark.parametrize(
    ("found", "installed"),
    [("0.6.0", True), ("0.10.1", True), ("1.0", True), ("0.7.dev3", True), ("0.5.9", False), ("unknown", False)],
)
def test_older_versions_count_as_not_installed(found: str, installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fla, "find_spec", lambda _: object())
    monkeypatch.setattr(fla, "version", lambda _: found)
    assert fla._is_installed() == installed


def test_no_package_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(fla, "version", version)
    monkeypatch.setattr(fla, "find_spec", lambda _: object())
    assert not fla._is_installed()
    monkeypatch.setattr(fla, "find_spec", lambda _: None)
    assert not fla._is_installed()


def test_profile_names_the_engine_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    recurrent = {name: mixer for name, mixer in LAYERS.items() if name.startswith("chunk")}
    monkeypatch.setattr(fla, "HAS_FLA", True)
    for mixer in recurrent.values():
        assert _runs_in_fla(mixer, "cuda", "bf16")
        assert not _runs_in_fla(mixer, "cuda", "fp32")
        assert not _runs_in_fla(mixer, "cpu", "bf16")
    without = [
        Mamba1(inner_size=16, dt_rank=3),
        LogLinear(heads=4, head_dim=16, max_levels=9),
        GSA(**SIZES, slots=8),
        GLA(**SIZES | {"head_dim": 8}, gate_rank=3),
        Mamba2(heads=4, head_dim=16, state_dim=512),
    ]
    assert not any(_runs_in_fla(mixer, "cuda", "bf16") for mixer in without)
    monkeypatch.setattr(fla, "HAS_FLA", False)
    assert not any(_runs_in_fla(mixer, "cuda", "bf16") for mixer in recurrent.values())
