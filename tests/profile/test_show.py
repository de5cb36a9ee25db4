"""What the report of a profile remarks: rows of one run, layers slower than their parts, rows without a check."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import msgspec
import pytest

from powerplan.choices import Format
from powerplan.profile.result import Profile, load_profile
from powerplan.report.profile import profile_report
from powerplan.report.render import render

SAVED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "profile-cpu.json"


@pytest.fixture
def saved() -> Profile:
    return load_profile(str(SAVED))


def shown(profile: Profile) -> str:
    return " ".join(render(profile_report(profile), "table").split())


def test_a_row_of_one_run_says_so(saved: Profile) -> None:
    text = shown(saved)
    assert "16,384 attention 3.03 s 1 run 5.41k" in text
    assert "16,384 power p=2 1.21 s 2% 13.6k" in text
    assert "4,096 attention 116 ms 304 ms 190 ms 595 ms* 2.21:1" in text
    assert "1,024 attention 29.1 ms 76.1 ms 17.9 ms 101 ms 5.89:1" in text


def test_a_layer_much_slower_than_its_parts_is_remarked(saved: Profile) -> None:
    assert "the time of its parts" not in shown(saved)
    slow = msgspec.structs.replace(saved.split[0], layer_ms=4.4 * (saved.split[0].weight_ms + saved.split[0].state_ms))
    text = shown(msgspec.structs.replace(saved, split=(slow, *saved.split[1:])))
    remark = "forward: the layer with power p=2 at 1,024 tokens took 4.4x the time of its parts; other programs"
    assert text.count(remark) == text.count("the time of its parts") == 1


def test_rows_without_a_check_are_named(saved: Profile) -> None:
    assert "not checked" not in shown(saved)
    checks = tuple(check for check in saved.checks if check.impl != "sdpa")
    assert "not checked: attention, window 1,040 " in shown(msgspec.structs.replace(saved, checks=checks))


def test_columns_are_explained_before_the_table(saved: Profile) -> None:
    text = render(profile_report(saved), "table")
    legend, _, table = text.partition("forward, the mixer alone:")
    heading = table.split("\n")[2]
    for word in heading.split()[2:]:
        assert f"{word}:" in legend, word
    assert text.index("The layer in parts.") < text.index("forward, the layer:")
    assert "fwd" not in text


def test_files_of_earlier_versions_say_attention(saved: Profile) -> None:
    """They call attention softmax, and stay as they are; what is printed has one word for it."""
    assert '"softmax"' in SAVED.read_text()
    for form in get_args(Format):
        assert "softmax" not in render(profile_report(saved), form)
    assert {row.name for row in saved.part("layer")} == {"power p=2", "attention", "window 1,040"}
    assert {crossover.against for crossover in saved.crossover} == {"attention"}
