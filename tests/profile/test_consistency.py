"""A saved profile that contradicts itself is refused, with the place of what does not agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from powerplan.cli import main
from powerplan.errors import InputError
from powerplan.profile.result import load_profile

SAVED = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "profile-cpu.json"

Change = Callable[[Any], object]


def at(*path: Any, **changes: Any) -> Change:
    """Return a change of the mapping at a path."""

    def change(data: Any) -> None:
        for step in path:
            data = data[step]
        data.update(changes)

    return change


WRONG: dict[str, tuple[Change, str]] = {
    "faster at nothing": (
        at("crossover", 0, faster_at=None),
        "crossover[0].faster_at: null is not what the times tried say, 8192",
    ),
    "crosses elsewhere": (at("crossover", 0, context=64), "crossover[0].context: 64 is not between 5,792 and 8,192"),
    "an estimate too many": (
        at("crossover", 0, estimate=64),
        "crossover[0].estimate: stands where no context was faster, and only there",
    ),
    "no contexts": (at("crossover", 0, tried=[]), "crossover[0].tried: is empty; at least one context is needed"),
    "contexts fall": (
        lambda data: data["crossover"][0]["tried"].reverse(),
        "crossover[0].tried[1]: context 8,192 does not follow 16,384; contexts rise",
    ),
    "another mixer overtakes": (
        at("crossover", 0, name="power p=5"),
        "crossover[0].name: the results have no forward time of 'power p=5' alone",
    ),
    "an unknown pass": (
        at("results", 0, **{"pass": "train"}),
        "results[0].pass: 'train' is not known; allowed are forward, forward+backward, decode",
    ),
    "a split of nothing": (
        at("split", 0, context=1025),
        "split[0]: the results have no forward time of 'power p=2' alone at 1,025 tokens",
    ),
    "another time in the split": (at("split", 0, state_ms=1.0), "split[0].state_ms: 1.0 is not the time in the "),
    "another ratio in the split": (at("split", 0, wsfr_time=9.0), "split[0].wsfr_time: 9.0 is not the ratio of the "),
    "another layer in the split": (
        at("split", 0, layer_ms=None),
        "split[0].layer_ms: null is not the time of the layer in the results",
    ),
    "a row twice": (
        lambda data: data["results"].append(data["results"][0]),
        "is the second timing of projections, forward, 2,048 tokens, 'power p=2'",
    ),
    "another dtype": (at("results", 0, dtype="bf16"), "results[0].dtype: bf16 is not that of the profile, fp32"),
    "another batch": (at("results", 0, batch=2), "results[0].batch: 2 is not that of the profile, 1"),
    "a run half described": (
        lambda data: data["missing"][0].pop("context"),
        "missing[0]: needs context, or says in words what is missing",
    ),
    "a run described twice": (
        at("missing", 0, what="all"),
        "missing[0]: says what is missing in words, and by part, pass, context, name",
    ),
    "a breakdown of nothing": (
        lambda data: data["breakdown"].append(
            {"name": "x", "impl": "torch", "pass": "decode", "context": 1, "parts": []}
        ),
        "breakdown[0]: the results have no decode time of 'x' alone at 1 tokens",
    ),
    "an unknown key": (at("split", 0, stat_ms=1.0), "split[0].stat_ms: unknown key; did you mean state_ms? "),
    "a wrong result": (at("checks", 0, share_of_budget=1.5), "checks[0].share_of_budget: 1.5 is out of range; "),
    "a title that moves the cursor": (
        at("layer", model="a\x9b2J"),
        "layer.model: holds a character that does not print, '\\x9b'",
    ),
    "a key that does not print": (at("layer", **{"\x7f": 1}), "layer.'\\x7f': holds a character that does not print, "),
}


@pytest.mark.parametrize("case", WRONG)
def test_contradictions(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, message = WRONG[case]
    data = json.loads(SAVED.read_text(encoding="utf-8"))
    change(data)
    path = tmp_path / "p.json"
    path.write_text(json.dumps(data, indent=1), encoding="utf-8")
    with pytest.raises(InputError) as refused:
        load_profile(str(path))
    assert message in str(refused.value)
    assert str(refused.value).startswith(f"{path}:")
    assert main(["profile", "--show", str(path)]) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"error: {refused.value}\n")
