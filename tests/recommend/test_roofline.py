"""Times of a token by the roofline, by hand: FLOPs decide at long contexts, and the weights' bytes at short ones."""

from __future__ import annotations

from fractions import Fraction

import pytest

from powerplan.accounting import Accounting
from powerplan.hardware import Peak
from powerplan.load import catalogue_spec
from powerplan.roofline import Roofline

PEAK = Peak("x", Fraction(10**12), Fraction(10**9), "the bf16 peak")


def test_a_short_sequence_takes_the_time_of_its_bytes() -> None:
    """gpt2-small: 123,653,376 weights are read, and 16 tokens keep 12 x 2 x 768 numbers each; in bf16, in 3 passes."""
    spec = catalogue_spec("gpt2-small")
    row = Accounting(spec).row(16)
    times = Roofline(PEAK).times(spec, row)
    weights, state = 2 * 123_653_376, 2 * 12 * 2 * 768 * 16
    assert times.train == pytest.approx(3 * (weights + state) / 16 / 1e9, rel=1e-12)
    assert times.decode == pytest.approx((weights + state + 2 * 12 * 2 * 768) / 1e9, rel=1e-12)
    assert (times.measured, times.missing) == (False, None)


def test_a_long_sequence_takes_the_time_of_its_flops() -> None:
    spec = catalogue_spec("gpt2-small")
    row = Accounting(spec).row(65_536)
    state = 4 * 12 * 768 * Fraction(65_536 + 1, 2)  # 2 FLOPs for keys and 2 for values, of each key and channel.
    assert row.state_flops_per_token == state
    assert Roofline(PEAK).times(spec, row).train == pytest.approx(
        3 * float(row.weight_flops_per_token + state) / 1e12, rel=1e-12
    )
