"""Words and settings in one text, as `--only` and `--parallel` take them."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import powerplan
from powerplan.errors import InputError
from powerplan.lists import parse_settings, parse_words, split_words
from powerplan.swap import parse_swap
from powerplan.swap.value import KINDS

NAMES = ("alpha", "beta", "gamma")
SPACES = st.text(" ", max_size=2)


@given(
    st.dictionaries(st.sampled_from(NAMES), st.text("abc=0 ", max_size=5).map(str.strip), min_size=1), SPACES, SPACES
)
def test_settings_are_read_as_written(values: dict[str, str], before: str, after: str) -> None:
    text = ",".join(f"{before}{name}{after}={before}{value}{after}" for name, value in values.items())
    found = parse_settings(text, NAMES, "--these", "alpha=1")
    assert list(found.items()) == list(values.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpha", "--these: 'alpha' is not a part; write alpha=1"),
        ("alpha=1,", "--these: '' is not a part; write alpha=1"),
        ("alpha=1, bta=2", "--these: 'bta' is not a part; did you mean beta? allowed are alpha, beta, gamma"),
        ("alpha=1,alpha=1", "--these: alpha is given twice"),
        ("\x1b[2J=1", r"--these: '\x1b[2J' is not a part; allowed are alpha, beta, gamma"),
    ],
)
def test_wrong_settings_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        parse_settings(text, NAMES, "--these", "alpha=1", of="a part")


@pytest.mark.parametrize("words", ["beta, alpha,beta", ["beta", "alpha", "beta"], ("beta", "alpha")])
def test_words_lose_repeats_and_keep_their_order(words: Any) -> None:
    assert parse_words(words, NAMES, "--these") == ["beta", "alpha"]


def test_no_words_are_none() -> None:
    assert parse_words((), NAMES, "--these") == []
    assert split_words("") == [""]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "only: '' is not known; allowed are "),
        (["power", 3], "only: 3 is not known; allowed are "),
        (None, "only: null is not known; allowed are "),
        (b"power", "only: 112 is not known; allowed are "),
        ("power,windw", "only: 'windw' is not known; did you mean window? allowed are "),
    ],
)
def test_other_words_are_refused(words: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        powerplan.recommend("gpt2-small", only=words)


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_about_a_mixer_shows_one_that_is_read(kind: str) -> None:
    with pytest.raises(InputError) as raised:
        parse_swap(f"{kind}:x")
    example = raised.value.problem.removeprefix(f"'x' is not a setting of {kind}; write ")
    assert parse_swap(example).kind == kind
