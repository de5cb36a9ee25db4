"""One candidate has one set of numbers, whichever command counts it."""

from __future__ import annotations

from pathlib import Path

import pytest

import powerplan
from powerplan.accounting import Row
from powerplan.report.dims import dims_report, states_report

CONTEXT = 65_536
HYBRID = str(Path(__file__).resolve().parents[2] / "examples" / "hybrid.yaml")
MODELS = ("gpt2-small", "llama-3-8b", "gemma-2-9b", "power-coder-3b", "deepseek-v3", "kimi-linear-48b-a3b", HYBRID)


@pytest.mark.parametrize("model", MODELS)
def test_every_candidate_is_what_other_commands_count_of_its_file(model: str, tmp_path: Path) -> None:
    """As --write writes it and, where all layers take one mixer, as --mixer spells it."""
    answer = powerplan.recommend(model, CONTEXT, top=1000)
    assert len(answer.candidates) > 5
    path = tmp_path / "candidate.yaml"
    for place, candidate in enumerate(answer.candidates):
        path.write_text(answer.to_yaml(place), encoding="utf-8")
        assert powerplan.wsfr(path, CONTEXT).rows == (candidate.row,)
        bought = powerplan.budget(path, CONTEXT, tokens=10**9).budget
        assert bought.row == candidate.row
        assert bought.total_flops == 3 * 10**9 * candidate.row.flops_per_token
        plan = candidate.plan
        if not (plan.is_mix or plan.scope.partial or plan.unchanged):
            assert powerplan.wsfr(model, CONTEXT, mixer=candidate.mixer).rows == (candidate.row,)


def test_one_head_has_one_state_in_every_table() -> None:
    """dims of heads, dims of kinds and dims of a model with such heads: a normaliser where the degree is even."""
    mixers = {degree.p: degree.mixers for degree in powerplan.degrees("gpt2-small", CONTEXT, p=[1, 2, 3, 4]).degrees}
    for row in dims_report([64], [1, 2, 3, 4], 8, None).rows:
        ((mixer, _layers),) = mixers[row["p"]]
        elements = mixer.state_size(1).recurrent // mixer.kv_heads
        assert row["state_bytes"] == 4 * elements
        assert row["normaliser_elements"] == (row["spow"] if row["p"] % 2 == 0 else 0)
        states = states_report([64], [row["p"]], None, "kda").rows
        assert [one["state_elements"] for one in states if one["kind"] == "power"] == [elements]


@pytest.mark.parametrize("model", ["gpt2-small", "llama-3-8b", HYBRID])
def test_one_name_is_one_mixer_in_every_table(model: str) -> None:
    candidates = powerplan.recommend(model, CONTEXT, top=1000).candidates
    alternatives = powerplan.budget(model, CONTEXT, tokens=10**9).alternatives
    runs = powerplan.train(model, CONTEXT, tokens=10**10, gpu="h100-sxm", devices=64).others
    degrees = powerplan.degrees(model, CONTEXT, p=[1, 2, 3, 4]).degrees
    tables: list[dict[str, Row]] = [
        {candidate.label: candidate.row for candidate in candidates},
        {other.swap.describe(): other.budget.row for other in alternatives if other.swap},
        {run.name: run.plan.accounting.row(CONTEXT) for run in runs},
        {degree.swap.describe(): degree.row for degree in degrees},
    ]
    assert len(tables[0]) == len(candidates), "no two candidates are called the same"
    for name in ("power p=2", "power p=3"):
        assert all(name in table for table in tables)
    for name in {name for table in tables for name in table}:
        rows = [table[name] for table in tables if name in table]
        assert rows.count(rows[0]) == len(rows), name
