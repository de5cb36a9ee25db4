"""Models whose layers have different heads, or gates: every command gives the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from powerplan.accounting import Accounting
from powerplan.cli import main
from powerplan.load import load_model
from powerplan.mixers import Attention, Power
from powerplan.swap import with_mixer


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Run a command that must succeed and return its JSON."""
    assert main([*arguments, "--format", "json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


UNLIKE = """
name: unlike
vocab_size: 32000
hidden_size: 2048
layers:
  - repeat: 4
    pattern:
      - mixer: {kind: linear, heads: 8, head_dim: 256}
        ffn: {kind: mlp, intermediate_size: 8192}
      - mixer: {kind: attention, heads: 16, kv_heads: 4, head_dim: 64}
        ffn: {kind: mlp, intermediate_size: 8192}
"""
HYBRID = Path(__file__).resolve().parents[2] / "examples" / "hybrid.yaml"


@pytest.mark.parametrize("text", [UNLIKE, HYBRID.read_text(encoding="utf-8")], ids=["unlike", "hybrid"])
def test_every_command_counts_the_same_swap_alike(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str
) -> None:
    """recommend, its --solve window, budget and wsfr --mixer: one answer, where layers have other heads, or gates."""
    path = tmp_path / "model.yaml"
    path.write_text(text, encoding="utf-8")
    answer = run(capsys, "recommend", str(path), "--ctx", "64k", "--top", "200")
    window = answer["balanced_window"]
    assert run(capsys, "recommend", str(path), "--ctx", "64k", "--solve", "window")["value"] == window
    budget = {row["mixer"]: row for row in run(capsys, "budget", str(path), "--ctx", "64k")["alternatives"]}
    rows = {row["mixer"]: row for row in answer["candidates"]}
    assert rows[f"window:{window}"]["wsfr"] == pytest.approx(1, rel=1e-3)
    same = (f"window:{window}", "power:p=2", "power:p=3,normalize=false")
    for mixer in same:
        accounting = Accounting(with_mixer(load_model(path).spec, mixer)[0])
        row, found = accounting.row(65_536), [answers[mixer] for answers in (rows, budget) if mixer in answers]
        assert {one["wsfr"] for one in found} == {float(row.wsfr or 0)}
        assert {one["state_bytes"] for one in found} == {row.state_bytes}
        assert rows[mixer]["params_total"] == accounting.total_parameters.with_embeddings
    assert set(same) <= set(rows)
    assert set(same) <= set(budget)


def test_what_is_one_kind_is_written_as_one_kind(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "out.yaml"
    assert main(["recommend", str(HYBRID), "--ctx", "64k", "--write", str(path)]) == 0
    assert "9 attention + 7 power p=2" in capsys.readouterr().out
    uses = load_model(path).spec.layer_uses()
    assert [(use.count, use.layer.mixer) for use in uses] == [
        (9, Attention(heads=32, kv_heads=8, head_dim=64)),
        (7, Power(heads=32, kv_heads=8, head_dim=64, p=2, gated=True)),
    ]
