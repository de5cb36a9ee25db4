"""Sizes as people write them, numbers as people read them."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerplan.errors import InputError, did_you_mean
from powerplan.units import (
    MAX_CONTEXT,
    format_bytes,
    format_count,
    format_duration,
    format_parameters,
    format_ratio,
    json_number,
    parse_bytes,
    parse_context,
    parse_contexts,
    parse_count,
    parse_integers,
    parse_ratio,
    parse_share,
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("65536", 65_536),
        ("65_536", 65_536),
        ("64k", 65_536),
        ("64K", 65_536),
        ("1M", 1_048_576),
        ("1m", 1_048_576),
        ("1.5k", 1_536),
        ("2g", 2**31),
        ("1e6", 1_000_000),
        (" 8k ", 8_192),
    ],
)
def test_contexts_are_read(text: str, size: int) -> None:
    assert parse_context(text) == size


@given(st.integers(1, MAX_CONTEXT))
def test_plain_numbers_read_as_themselves(size: int) -> None:
    assert parse_context(str(size)) == size


def test_lists_keep_order_and_drop_repeats() -> None:
    assert parse_contexts("8k,1k,8192,64k") == [8192, 1024, 65_536]
    assert parse_integers("4,2,4", "--p", 1, 9) == [4, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("64q", "'64q' is not a size in tokens; write 65536, 64k"),
        ("0.3k", "'0.3k' is not a whole number of tokens"),
        ("0", "'0' is out of range; a context is 1 to 1,125,899,906,842,624 tokens"),
        ("2000000g", "is out of range"),
        ("-5", "is not a size in tokens"),
    ],
)
def test_bad_sizes_say_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^--ctx: .*{message}"):
        parse_context(text, "--ctx")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1k"),
        (247_064_064, "247.1M"),
        (1_207_977_984, "1.208G"),
        (999_885_952, "999.9M"),
        (999_960_000, "1G"),
        (Fraction(5, 2), "2.5"),
        (10**27, "1,000Y"),
    ],
)
def test_counts(value: int | Fraction, text: str) -> None:
    assert format_count(value) == text


def test_parameters_and_bytes() -> None:
    assert format_parameters(8_030_261_248) == "8.03B"
    assert format_parameters(1_026_408_232_448) == "1.026T"
    assert format_bytes(36 * 2**20) == "36 MiB"
    assert format_bytes(1023) == "1,023 B"
    assert format_bytes(Fraction(9, 4) * 2**30) == "2.25 GiB"


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (Fraction(130_772, 10_000), "13.1:1"),
        (Fraction(1), "1:1"),
        (Fraction(10, 49), "1:4.9"),
        (Fraction(204_527, 10**6), "1:4.89"),
        (Fraction(1, 1_234), "1:1,234"),
        (Fraction(9_999, 10), "1,000:1"),
    ],
)
def test_ratios(ratio: Fraction, text: str) -> None:
    assert format_ratio(ratio) == text


def test_json_numbers_are_exact_where_they_can_be() -> None:
    assert json_number(Fraction(6, 2)) == 3
    assert isinstance(json_number(Fraction(6, 2)), int)
    assert json_number(Fraction(1, 4)) == 0.25
    assert json_number(2**70) == 2**70


def test_did_you_mean_prefers_what_begins_alike() -> None:
    devices = ["h200", "h100-pcie", "h100-sxm"]
    assert did_you_mean("h100", devices, count=2) == "; did you mean h100-sxm or h100-pcie?"
    assert did_you_mean("kv_head", ["heads", "kv_heads"]) == "; did you mean kv_heads?"
    assert did_you_mean("zzz", ["heads"]) == ""


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e21", 10**21), ("300B", 3 * 10**11), ("1.5T", 15 * 10**11), ("124_000", 124_000), ("2k", 2000), ("1E", 10**18)],
)
def test_counts_are_decimal(text: str, value: int) -> None:
    assert parse_count(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [("512MiB", 512 * 2**20), ("2GB", 2 * 10**9), ("1.5 GiB", 3 * 2**29), ("1k", 1024), ("7", 7), ("7B", 7)],
)
def test_bytes_are_binary_with_an_i_and_decimal_without(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["0", "0.1B", "-1", "MiB", "1 XB", "1e3", "9" * 200, "999999999999PiB"])
def test_bytes_that_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^--max-state: '.*' is (not a size in bytes|out of range)"):
        parse_bytes(text, "--max-state")


@pytest.mark.parametrize(("text", "value"), [("1:1", 1), ("3:1", 3), ("1:2.5", Fraction(2, 5)), ("4:2", 2)])
def test_targets(text: str, value: Fraction) -> None:
    assert parse_ratio(text) == value


@pytest.mark.parametrize("text", ["0:1", "1:0", "1", "1:", "1/2", "-1:1", "a:b", "1:1:1"])
def test_ratios_that_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^--target: '.*' (is not a ratio|has a side of 0)"):
        parse_ratio(text, "--target")


@pytest.mark.parametrize(("text", "value"), [("0.4", Fraction(2, 5)), ("40%", Fraction(2, 5)), ("1", 1)])
def test_shares(text: str, value: Fraction) -> None:
    assert parse_share(text) == value


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (3.1e-6, "3.1 us"),
        (0.042, "42 ms"),
        (90, "90 s"),
        (3600, "60 min"),
        (18_720, "5.2 h"),
        (1.0714e6, "12.4 days"),
        (1e10, "317 years"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
