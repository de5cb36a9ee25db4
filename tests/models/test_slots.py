"""Gated slot attention in chunks against its recurrence, token by token."""

from __future__ import annotations

import plain_mixers as plain
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import MIXERS
from recurrences import check_float32, check_gradients, check_pieces
from torch import Tensor

from powerplan.models.mixers.slots import GatedSlotAttention, slot_attention, slot_step, slots_left_behind

NAMES = ("q", "k", "v", "log_f")


def inputs(tokens: int, dtype: torch.dtype = torch.float64, strongest: float = 3.0) -> dict[str, Tensor]:
    """q, k [2, T, 3, 6], v [2, T, 3, 5], log_f [2, T, 3, 4]; few slots are emptied at once, most fade."""
    torch.manual_seed(tokens)
    size = (2, tokens, 3)
    tensors = [torch.randn(*size, features, dtype=dtype) for features in (6, 6, 5)]
    return dict(zip(NAMES, (*tensors, -strongest * torch.rand(*size, 4, dtype=dtype) ** 3), strict=True))


def by_steps(given: dict[str, Tensor]) -> Tensor:
    outs = []
    for row in range(2):
        q, k, v, log_f = (given[name][row].transpose(0, 1) for name in NAMES)
        outs.append(plain.gsa_steps(q, k, v, log_f.exp(), plain.Tally()).transpose(0, 1))
    return torch.stack(outs)


@settings(max_examples=10)
@given(tokens=st.integers(1, 70), chunk_size=st.sampled_from([1, 5, 8, 20, 64, 200]))
def test_chunks_equal_the_recurrence(tokens: int, chunk_size: int) -> None:
    given = inputs(tokens)
    torch.testing.assert_close(slot_attention(**given, state=None, chunk_size=chunk_size)[0], by_steps(given))


@settings(max_examples=8)
@given(first=st.integers(1, 40), second=st.integers(1, 40), strongest=st.sampled_from([3.0, 200.0]))
def test_slots_are_their_own_and_the_transition_times_those_before(first: int, second: int, strongest: float) -> None:
    given = inputs(first + second, strongest=strongest)
    _, before = slot_attention(**{name: x[:, :first] for name, x in given.items()}, state=None, chunk_size=8)
    own, transition = slots_left_behind(*(given[name][:, first:] for name in ("k", "v", "log_f")), chunk_size=8)
    expected = slot_attention(**given, state=None, chunk_size=8)[1]
    torch.testing.assert_close(own + transition * before, expected)


def test_gradients_equal_those_of_the_recurrence() -> None:
    check_gradients(inputs(45), lambda given: slot_attention(**given, state=None, chunk_size=20)[0], by_steps)


def test_states_go_on_in_pieces_and_steps() -> None:
    check_pieces(inputs(60), lambda given, state: slot_attention(**given, state=state, chunk_size=16), slot_step)


@pytest.mark.parametrize("strongest", [1.0, 19.0, 300.0])
def test_strong_gates_stay_finite_in_float32(strongest: float) -> None:
    """Sums of 64 log gates of up to 20 are rounded to 2^-24 of 1,280, and exponents are differences of two."""
    narrow, allowed = inputs(200, torch.float32, strongest), 4 * 64 * min(strongest, 20.0) * 2**-24
    check_float32(narrow, lambda given: slot_attention(**given, state=None, chunk_size=64)[0], allowed)


def test_half_precision_goes_through_float32() -> None:
    given = inputs(70, torch.bfloat16)
    out, state = slot_attention(**given, state=None, chunk_size=16)
    exact, last = slot_attention(**{name: part.float() for name, part in given.items()}, state=None, chunk_size=16)
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(out, exact.bfloat16())
    torch.testing.assert_close(state, last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(slot_attention(**given, state=None, chunk_size=16)[0], out)


def test_the_layer_equals_its_equations() -> None:
    """As flash-linear-attention's layer: SiLU before and after, gates divided by 8, no scale, one norm over all."""
    torch.manual_seed(0)
    mixer = GatedSlotAttention(MIXERS["gsa"], 16, dtype=torch.float64)  # type: ignore[arg-type]
    with torch.no_grad():
        for weight in mixer.parameters():
            weight.normal_(std=0.5)
    x = torch.randn(2, 19, 16, dtype=torch.float64)
    q, k, v = (F.silu(project(x)).unflatten(-1, (2, -1)) for project in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    log_f = F.logsigmoid(mixer.forget(x)).unflatten(-1, (2, 3)) / 8
    out = F.silu(by_steps(dict(zip(NAMES, (q, k, v, log_f), strict=True)))).flatten(-2)
    out = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt() * mixer.output_norm.weight
    torch.testing.assert_close(mixer(x), out @ mixer.o_proj.weight.T)
