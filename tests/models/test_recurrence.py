"""Chunked delta rules and gated linear attention against their recurrences, token by token."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import plain_mixers as plain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrences import check_float32, check_gradients, check_pieces
from torch import Tensor

from powerplan.models.mixers import recurrence
from powerplan.models.mixers.fla import delta_rule_by_fla, fla_supports
from powerplan.models.mixers.recurrence import (
    delta_rule,
    delta_rule_state,
    gated_linear_attention,
    gated_linear_state,
    recurrent_step,
)

KINDS = ["deltanet", "gated_deltanet", "kda", "gla"]


def inputs(kind: str, tokens: int, dtype: torch.dtype = torch.float64, strongest: float = 3.0) -> dict[str, Tensor]:
    """q, k [2, T, 3, 6], v [2, T, 3, 5], and what the kind needs besides; few decays are strong, most are weak."""
    torch.manual_seed(tokens)
    size = (2, tokens, 3)
    tensors = {name: torch.randn(*size, 6, dtype=dtype) for name in "qk"} | {"v": torch.randn(*size, 5, dtype=dtype)}
    tensors["k"] = tensors["k"] / tensors["k"].norm(dim=-1, keepdim=True)
    if kind != "gla":
        tensors["beta"] = torch.rand(size, dtype=dtype)
    if kind != "deltanet":
        channels = size if kind == "gated_deltanet" else (*size, 6)
        tensors["log_g"] = -strongest * torch.rand(channels, dtype=dtype) ** 3
    return tensors


def chunked(given: dict[str, Tensor], chunk_size: int, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    if "beta" not in given:
        return gated_linear_attention(**given, state=state, chunk_size=chunk_size)
    return delta_rule(**{"log_g": None, **given}, state=state, chunk_size=chunk_size)


def by_steps(given: dict[str, Tensor]) -> Tensor:
    """The recurrences of tests/plain_mixers.py, which have heads in front, for each sequence."""
    outs = []
    for row in range(2):
        own = {name: x[row].transpose(0, 1) for name, x in given.items()}
        q, k, v = own["q"], own["k"], own["v"]
        decay: Any = None
        if "log_g" in own:
            decay = own["log_g"].exp()
            decay = decay if decay.ndim == 3 else decay[..., None]
        if "beta" in own:
            out = plain.delta_steps(q, k, v, own["beta"][..., None], decay, plain.Tally())
        else:
            out = plain.linear_steps(q, k, v, decay, None)
        outs.append(out.transpose(0, 1))
    return torch.stack(outs)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8)
@given(tokens=st.integers(1, 70), chunk_size=st.sampled_from([1, 5, 8, 20, 64, 200]))
def test_chunks_equal_the_recurrence(kind: str, tokens: int, chunk_size: int) -> None:
    given = inputs(kind, tokens)
    torch.testing.assert_close(chunked(given, chunk_size)[0], by_steps(given))


def left_behind(given: dict[str, Tensor], chunk_size: int) -> tuple[Tensor, Tensor]:
    """Return the state of tokens that follow nothing, and their transition as a matrix [B, H, K, K]."""
    given = {"log_g": None, **given}  # type: ignore[dict-item]
    del given["q"]
    if "beta" in given:
        state, transition = delta_rule_state(**given, chunk_size=chunk_size, with_transition=True)
        assert transition is not None
        return state, transition
    state, transition = gated_linear_state(**given, chunk_size=chunk_size)
    assert transition.shape[-1] == 1
    return state, transition[..., 0].diag_embed()


def product_of_tokens(given: dict[str, Tensor]) -> Tensor:
    """Return the product of the tokens' own transitions (I - beta k k^T) diag(exp(log_g)), the last one in front."""
    k = given["k"]
    product = torch.eye(k.shape[-1], dtype=k.dtype).expand(k.shape[0], k.shape[2], -1, -1)
    for t in range(k.shape[1]):
        log_g = given.get("log_g", torch.zeros_like(k))[:, t]
        product = (log_g if log_g.ndim == 3 else log_g[..., None]).exp()[..., None] * product
        if "beta" in given:
            key = k[:, t, :, :, None]
            product = product - given["beta"][:, t, :, None, None] * (key @ (key.mT @ product))
    return product


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8)
@given(first=st.integers(1, 40), second=st.integers(1, 40), chunk_size=st.sampled_from([1, 5, 8, 20, 64]))
def test_a_state_is_its_own_and_the_transition_times_the_one_before(
    kind: str, first: int, second: int, chunk_size: int
) -> None:
    given = inputs(kind, first + second)
    before, _ = left_behind({name: x[:, :first] for name, x in given.items()}, chunk_size)
    after = {name: x[:, first:] for name, x in given.items()}
    own, transition = left_behind(after, chunk_size)
    torch.testing.assert_close(transition, product_of_tokens(after))
    torch.testing.assert_close(own + transition @ before, chunked(given, chunk_size)[1])


def test_a_state_alone_is_the_same_without_its_transition() -> None:
    given = inputs("kda", 30)
    del given["q"]
    state, transition = delta_rule_state(**given, chunk_size=8, with_transition=False)
    assert transition is None
    torch.testing.assert_close(state, delta_rule_state(**given, chunk_size=8, with_transition=True)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_the_recurrence(kind: str) -> None:
    check_gradients(inputs(kind, 45), lambda given: chunked(given, 20)[0], by_steps)


@pytest.mark.parametrize("kind", KINDS)
def test_states_go_on_in_pieces_and_steps(kind: str) -> None:
    def step(**one: Any) -> tuple[Tensor, Tensor]:
        return recurrent_step(**{"beta": None, "log_g": None, **one})

    check_pieces(inputs(kind, 60), lambda given, state: chunked(given, 16, state), step)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("strongest", [1.0, 19.0, 300.0])
def test_strong_decays_stay_finite_in_float32(kind: str, strongest: float) -> None:
    """Decays of up to exp(-300) a token count as exp(-20): zero beside anything in float32.

    Sums of 64 log decays of up to 20 are rounded to 2^-24 of 1,280, and exponents are differences of two. The strongest
    decays are clamped: nothing depends on them, in float64 not to within its own clamp of exp(-80).
    """
    narrow, allowed = inputs(kind, 200, torch.float32, strongest), 4 * 64 * min(strongest, 20.0) * 2**-24
    check_float32(narrow, lambda given: chunked(given, 64)[0], allowed)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_goes_through_float32(kind: str) -> None:
    given = {name: x.to(torch.bfloat16) for name, x in inputs(kind, 70).items()}
    out, state = chunked(given, 16)
    exact, last = chunked({name: x.float() for name, x in given.items()}, 16)
    assert out.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    torch.testing.assert_close(out, exact.bfloat16())
    torch.testing.assert_close(state, last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(chunked(given, 16)[0], out)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_arguments_of_flash_linear_attention(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels need a GPU: here stand functions of their names and arguments, which check shapes and dtypes."""
    names = {"deltanet": "delta_rule", "gated_deltanet": "gated_delta_rule", "kda": "kda"}
    calls: list[str] = []

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        beta: Tensor,
        g: Tensor | None = None,
        scale: float | None = None,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        calls.append(kind)
        assert {x.dtype for x in (q, k, v, beta)} == {torch.bfloat16}
        assert initial_state is None or initial_state.dtype == torch.float32
        assert (g is None) == (kind == "deltanet")
        scaled = q * (q.shape[-1] ** -0.5 if scale is None else scale)
        out, state = delta_rule(scaled, k, v, beta, g, initial_state, 64)
        return out, state if output_final_state else None

    for name in names.values():
        module = ModuleType(f"fla.ops.{name}")
        setattr(module, f"chunk_{name}", kernel)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    given = inputs(kind, 40, torch.bfloat16)
    given |= {name: x.float() for name, x in given.items() if name in ("beta", "log_g")}
    arguments = {"log_g": None, **given}
    _, state = delta_rule(**arguments, state=None, chunk_size=64)
    for start in (None, state):
        by_fla, expected = (
            delta_rule_by_fla(**arguments, state=start),
            delta_rule(**arguments, state=start, chunk_size=64),
        )
        torch.testing.assert_close(by_fla[1], expected[1], rtol=2**-8, atol=2**-8)  # beta in half precision
        torch.testing.assert_close(by_fla[0], expected[0], rtol=2**-6, atol=2**-6)
    assert calls == [kind, kind]
    # The state without queries takes the same kernels, with the transition as more columns of the state.
    answers = iter([True])
    monkeypatch.setattr(recurrence, "fla_supports", lambda *_: next(answers, False))
    del arguments["q"]
    by_fla = delta_rule_state(**arguments, chunk_size=8, with_transition=True)
    expected = delta_rule_state(**arguments, chunk_size=8, with_transition=True)
    assert calls == [kind, kind, kind]
    torch.testing.assert_close(by_fla, expected, rtol=2**-6, atol=2**-6)
    assert not fla_supports(given["q"], given["v"])
