"""One definition of "balanced", and one way to judge several contexts."""

from __future__ import annotations

import json

import pytest

import powerplan
from powerplan.balance import verdict_of
from powerplan.cli import main
from powerplan.load import catalogue_names


def sentence(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["wsfr", *arguments]) == 0
    out = capsys.readouterr().out
    return " ".join(out.rpartition("\n\n")[2].split())


@pytest.mark.parametrize(
    ("contexts", "expected"),
    [
        ("64k", "state-heavy: 4.9x as many state as weight FLOPs at 65,536 tokens; balanced at 13,403"),
        (
            "8k,64k",
            "weight-heavy at 8,192 tokens (1.6x as many weight as state FLOPs), state-heavy at 65,536 (4.9x as many "
            "state as weight FLOPs); balanced at 13,403",
        ),
        (
            "64k,8k,1k",
            "weight-heavy at 1,024 and 8,192 tokens (up to 13.1x as many weight as state FLOPs), state-heavy at 65,536 "
            "(4.9x as many state as weight FLOPs); balanced at 13,403",
        ),
        (
            "13000,14000,1M",
            "balanced at 13,000 and 14,000 tokens, state-heavy at 1,048,576 (78.2x as many state as weight FLOPs); "
            "balanced at 13,403",
        ),
    ],
)
def test_every_context_is_judged(capsys: pytest.CaptureFixture[str], contexts: str, expected: str) -> None:
    assert sentence(capsys, "gpt2-small", "--ctx", contexts) == expected
    assert powerplan.wsfr("gpt2-small", contexts).to_dict()["verdict"] == expected


def test_a_model_that_never_balances(capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence(capsys, "rwkv7-1.5b", "--ctx", "1k,1M") == (
        "weight-heavy at 1,024 and 1,048,576 tokens (up to 98.4x as many weight as state FLOPs); its state stays "
        "lighter than its weights at any context"
    )


@pytest.mark.parametrize("name", catalogue_names()[::6])
def test_a_side_is_that_of_the_ratio(name: str) -> None:
    answer = powerplan.wsfr(name, "1k,32k,1M")
    said = answer.to_dict()["verdict"]
    for row in answer.rows:
        if row.wsfr is not None:
            side = verdict_of(row.wsfr).side
            named = "balanced" if side == "balanced" else f"{side}-heavy"
            head = said.partition(f"{row.context:,}")[0]
            assert max(("weight-heavy", "state-heavy", "balanced"), key=head.rfind) == named


@pytest.mark.parametrize("context", [12_700, 12_800, 13_403, 14_000, 14_200])
def test_balanced_is_the_same_in_wsfr_and_recommend(context: int) -> None:
    row = powerplan.wsfr("gpt2-small", context).to_dict()["rows"][0]
    candidates = powerplan.recommend("gpt2-small", context).to_dict()["candidates"]
    own = next(candidate for candidate in candidates if candidate["mixer"] == "as it is")
    assert row["verdict"].startswith("balanced") == own["why"].startswith("balanced") == own["target_met"]


def test_json_keeps_a_verdict_for_each_row() -> None:
    rows = json.loads(powerplan.wsfr("gpt2-small", "8k,64k").to_json())["rows"]
    assert rows[0]["verdict"] == "weight-heavy: 1.6x as many weight as state FLOPs at 8,192 tokens; balanced at 13,403"
