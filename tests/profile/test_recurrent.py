"""Recurrent kinds under `--against`: what runs is what is counted, it is checked, and it fits the memory."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from powerplan.cli import main
from powerplan.errors import InputError
from powerplan.load import catalogue_spec
from powerplan.measured import RECURRENT
from powerplan.mixers import Convention, LogLinear, Mamba1
from powerplan.mixers.delta import RWKV7, DeltaRule
from powerplan.mixers.formulas import total
from powerplan.mixers.ssm import mean_levels
from powerplan.models.mixers import scans
from powerplan.profile.checks import check_layer
from powerplan.profile.memory import bytes_needed, peak_of
from powerplan.profile.options import workload_of
from powerplan.profile.runs import prepare
from powerplan.profile.workload import Point, TimedMixer, Workload


def timed_of(kind: str) -> tuple[Workload, TimedMixer]:
    workload = workload_of(catalogue_spec("gpt2-small"), against=kind)
    (timed,) = workload.baselines
    return workload, timed


@pytest.mark.parametrize("kind", RECURRENT)
def test_a_kind_is_timed_as_a_swap_makes_it(kind: str) -> None:
    workload, timed = timed_of(kind)
    assert (timed.mixer.kind, timed.text, timed.impl) == (kind, kind, "torch")
    assert any(kind in note for note in workload.notes)
    assert timed.shape.heads % timed.shape.kv_heads == 0


@pytest.mark.parametrize("kind", RECURRENT)
def test_what_runs_is_what_is_counted(kind: str) -> None:
    """As in tests/models/test_flops.py: the dense chunks of a forward pass, and one more token."""
    workload, timed = timed_of(kind)
    mixer, tokens = timed.mixer, 150

    def executed(point: Point) -> int:
        with FlopCounterMode(display=False) as counter:
            prepare(workload, timed, point)()
        # The state of a decoding step is built by a run of one token, which is no part of the step.
        return int(counter.get_total_flops())

    terms = mixer.state_flops_terms(tokens, Convention(causal="full", form="chunked"))
    expected = Fraction(total(terms)) * tokens
    if isinstance(mixer, LogLinear):
        levels = mean_levels(tokens, mixer.chunk_size, True) - mean_levels(tokens, mixer.chunk_size, False)
        expected -= tokens * 2 * mixer.inner_size * mixer.state_dim * levels
    if isinstance(mixer, Mamba1):
        expected -= tokens * 2 * mixer.inner_size * mixer.state_dim
    if isinstance(mixer, DeltaRule | RWKV7):  # Torch does not count triangular solves.
        (solve,) = {term.symbols["solve"] for term in terms}
        expected -= tokens * mixer.heads * solve
    assert executed(Point("state", "forward", tokens)) == expected


@pytest.mark.parametrize("kind", RECURRENT)
@pytest.mark.parametrize("pass_name", ["decode", "forward", "train"])
def test_runs_need_less_memory_than_expected(kind: str, pass_name: str) -> None:
    workload, timed = timed_of(kind)
    point = Point("state", pass_name, 300)
    needed = bytes_needed(workload, timed, point)
    peak = peak_of(prepare(workload, timed, point), "cpu")
    assert needed / 12 <= peak <= needed


@pytest.mark.parametrize("kind", RECURRENT)
def test_layers_are_checked_token_by_token(kind: str) -> None:
    result = check_layer(*timed_of(kind))
    assert result.share_of_budget <= 1
    assert result.against == "float64, output and gradient, 44 tokens"


def test_a_wrong_recurrence_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decays that are left out of the products within a chunk."""
    right = scans.chunk_products
    monkeypatch.setattr(scans, "chunk_products", lambda c, b, cumsum: right(c, b, torch.zeros_like(cumsum)))
    assert check_layer(*timed_of("mamba2")).share_of_budget > 1


def test_a_profile_against_recurrent_kinds(tiny: Path, little_work: None, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--against", "attention,kda,mamba2", "--ctx", "64", "--pass", "decode,train", "--time-limit", "2h"]
    assert main(["profile", "tiny.yaml", *options, "--save", "out.json"]) == 0
    printed = capsys.readouterr().out
    rows: list[dict[str, Any]] = json.loads(Path("out.json").read_text())["results"]
    found = {(row["part"], row["pass"], row["mixer"]) for row in rows}
    for kind in ("kda", "mamba2"):
        for run in (("state", "decode"), ("state", "forward+backward"), ("layer", "forward+backward")):
            assert (*run, kind) in found
        assert ("projections", "decode", kind) not in found
    assert "is the fastest chunk" not in printed
    layers = printed.partition("forward+backward, the layer:")[2]
    assert re.search(r"64 +kda +\S+ \S+ +\S+ \S+\n", layers), "state and layer, and nothing else"
    assert main(["profile", "--show", "out.json"]) == 0
    assert capsys.readouterr().out == printed
    assert main(["recommend", "tiny.yaml", "--ctx", "64", "--measured", "out.json"]) == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"against": "kdaa"}, "'kdaa' is not known; did you mean kda?"),
        ({"against": "sse"}, "'sse' is not known"),
        (
            {"mixer": "kda"},
            "kda: profile times attention, windows, .*; give it as --against kda$",
        ),
        ({"mixer": "mla"}, "mla: profile times attention, windows, power and linear attention$"),
    ],
)
def test_what_is_not_timed(settings: dict[str, Any], message: str) -> None:
    spec = catalogue_spec("deepseek-v3" if settings.get("mixer") == "mla" else "gpt2-small")
    with pytest.raises(InputError, match=message):
        workload_of(spec, **settings)
