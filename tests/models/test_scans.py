"""The scans of Mamba and Mamba-2 against their recurrences, token by token."""

from __future__ import annotations

import plain_mixers as plain
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recurrences import check_float32, check_gradients, check_pieces
from torch import Tensor

from powerplan.models.mixers.scans import (
    TOKENS_PER_SCAN,
    grouped_scan,
    grouped_state,
    grouped_step,
    selective_scan,
    selective_state,
    selective_step,
)


def grouped_inputs(tokens: int, dtype: torch.dtype = torch.float64, strongest: float = 3.0) -> dict[str, Tensor]:
    """c, b [2, T, 2, 5], x [2, T, 6, 3], log_g [2, T, 6]; few decays are strong, most are weak."""
    torch.manual_seed(tokens)
    return {
        "c": torch.randn(2, tokens, 2, 5, dtype=dtype),
        "b": torch.randn(2, tokens, 2, 5, dtype=dtype),
        "x": torch.randn(2, tokens, 6, 3, dtype=dtype),
        "log_g": -strongest * torch.rand(2, tokens, 6, dtype=dtype) ** 3,
    }


def selective_inputs(tokens: int, dtype: torch.dtype = torch.float64, largest: float = 1.0) -> dict[str, Tensor]:
    """x, step [2, T, 7], rate [7, 4], b, c [2, T, 4]."""
    torch.manual_seed(tokens)
    return {
        "x": torch.randn(2, tokens, 7, dtype=dtype),
        "step": largest * torch.rand(2, tokens, 7, dtype=dtype) ** 3,
        "rate": -torch.arange(1, 5, dtype=dtype).expand(7, 4) - torch.rand(7, 1, dtype=dtype),
        "b": torch.randn(2, tokens, 4, dtype=dtype),
        "c": torch.randn(2, tokens, 4, dtype=dtype),
    }


def grouped_by_steps(given: dict[str, Tensor]) -> Tensor:
    outs = []
    for row in range(2):
        c, b, x, log_g = (given[name][row].transpose(0, 1) for name in ("c", "b", "x", "log_g"))
        q, k = (plain.by_group(part, x.shape[0]) for part in (c, b))
        outs.append(plain.linear_steps(q, k, x, log_g.exp()[..., None], None).transpose(0, 1))
    return torch.stack(outs)


def selective_by_steps(given: dict[str, Tensor]) -> Tensor:
    rows = [
        plain.mamba1_steps(*(given[name][row] if name != "rate" else given[name] for name in given), plain.Tally())
        for row in range(2)
    ]
    return torch.stack(rows)


@settings(max_examples=10)
@given(tokens=st.integers(1, 70), chunk_size=st.sampled_from([1, 5, 8, 20, 64, 200]))
def test_chunks_of_mamba2_equal_the_recurrence(tokens: int, chunk_size: int) -> None:
    given = grouped_inputs(tokens)
    torch.testing.assert_close(grouped_scan(**given, state=None, chunk_size=chunk_size)[0], grouped_by_steps(given))


@pytest.mark.parametrize("tokens", [1, 2, 15, 17, 60, TOKENS_PER_SCAN, TOKENS_PER_SCAN + 1, 2 * TOKENS_PER_SCAN + 9])
def test_the_selective_scan_equals_the_recurrence(tokens: int) -> None:
    given = selective_inputs(tokens)
    torch.testing.assert_close(selective_scan(**given, state=None)[0], selective_by_steps(given))


@settings(max_examples=10)
@given(first=st.integers(1, 40), second=st.integers(1, 40))
def test_a_state_is_its_own_and_the_transition_times_the_one_before(first: int, second: int) -> None:
    given = grouped_inputs(first + second)
    _, before = grouped_scan(**{name: x[:, :first] for name, x in given.items()}, state=None, chunk_size=8)
    own, decay = grouped_state(*(given[name][:, first:] for name in ("b", "x", "log_g")))
    after = own + torch.unflatten(decay, 1, (2, 1, 3, 1)) * before
    torch.testing.assert_close(after, grouped_scan(**given, state=None, chunk_size=8)[1])


@pytest.mark.parametrize("tokens", [1, 30, TOKENS_PER_SCAN + 1])
def test_so_it_is_channel_by_channel(tokens: int) -> None:
    given = selective_inputs(20 + tokens)
    parts = [
        {name: x if name == "rate" else x[:, at] for name, x in given.items()} for at in (slice(20), slice(20, None))
    ]
    _, before = selective_scan(**parts[0], state=None)
    del parts[1]["c"]
    own, transition = selective_state(**parts[1])
    torch.testing.assert_close(own + transition * before, selective_scan(**given, state=None)[1])


def test_gradients_equal_those_of_the_recurrences() -> None:
    grouped, selective = grouped_inputs(45), selective_inputs(45)
    check_gradients(grouped, lambda given: grouped_scan(**given, state=None, chunk_size=20)[0], grouped_by_steps)
    check_gradients(selective, lambda given: selective_scan(**given, state=None)[0], selective_by_steps)


def test_states_of_mamba2_go_on_in_pieces_and_steps() -> None:
    check_pieces(
        grouped_inputs(60), lambda given, state: grouped_scan(**given, state=state, chunk_size=16), grouped_step
    )


def test_states_of_mamba1_go_on_in_pieces_and_steps() -> None:
    check_pieces(
        selective_inputs(60), lambda given, state: selective_scan(**given, state=state), selective_step, ("rate",)
    )


def test_the_state_of_a_long_stretch_in_float32() -> None:
    """Log decays of up to 0.03 add up to 31 over 4,096 tokens, where neighbours in float32 are 2^-19 apart."""
    given = {name: grouped_inputs(4096, strongest=0.03)[name] for name in ("b", "x", "log_g")}
    for name in given:
        given[name] = given[name].float().double()
    exact, narrow = grouped_state(**given), grouped_state(**{name: x.float() for name, x in given.items()})
    for one, two in zip(narrow, exact, strict=True):
        assert (one.double() - two).abs().max() < 2.0**-20 * two.abs().max()


@pytest.mark.parametrize("strongest", [1.0, 19.0, 300.0])
def test_strong_decays_stay_finite_in_float32(strongest: float) -> None:
    """Of 128 log decays of up to 20 a sum is rounded to 2^-24 of 2,560; the selective scan adds up 16 of any size."""
    grouped, selective = (make(200, torch.float32, strongest) for make in (grouped_inputs, selective_inputs))
    allowed = 4 * 128 * min(strongest, 20.0) * 2**-24
    check_float32(grouped, lambda given: grouped_scan(**given, state=None, chunk_size=128)[0], allowed)
    check_float32(selective, lambda given: selective_scan(**given, state=None)[0], allowed)


def test_half_precision_goes_through_float32() -> None:
    for narrow, run in (
        (grouped_inputs(70, torch.bfloat16), lambda part: grouped_scan(**part, state=None, chunk_size=16)),
        (selective_inputs(70, torch.bfloat16), lambda part: selective_scan(**part, state=None)),
    ):
        out, state = run(narrow)  # type: ignore[no-untyped-call]
        exact, last = run({name: part.float() for name, part in narrow.items()})  # type: ignore[no-untyped-call]
        assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
        torch.testing.assert_close(out, exact.bfloat16())
        torch.testing.assert_close(state, last)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(run(narrow)[0], out)  # type: ignore[no-untyped-call]
