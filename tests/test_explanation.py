"""What `--explain` says beside the formulas: where mean keys and dimensions come from, and the sums of the model."""

from __future__ import annotations

import json
import math
import re
from fractions import Fraction
from pathlib import Path

import pytest

import powerplan
from powerplan.cli import main
from powerplan.explanation import explain
from powerplan.load import catalogue_names, load_model
from powerplan.mixers.formulas import Convention
from powerplan.swap import with_mixer

CONTEXTS = (1, 1_000, 65_536)
CONVENTIONS = [Convention(causal, form) for causal in ("exact", "full") for form in ("recurrent", "chunked")]


def value_of(text: str) -> Fraction:
    """Evaluate numbers as they are printed: 4,096·4,097/(2·65,536), C(17, 2)·8^2."""
    plain = re.sub(r",(?=\d)", "", text).replace("·", "*").replace("^", "**")
    exact = re.sub(r"(?<![\w.])(\d+\.\d+|\d+)(?![\w.])", r"F('\1')", plain)
    names = {"F": Fraction, "C": lambda n, k: math.comb(int(n), int(k)), "__builtins__": {}}
    return Fraction(eval(exact, names))


@pytest.mark.parametrize("convention", CONVENTIONS, ids=str)
def test_a_letter_has_the_value_that_its_derivation_gives(convention: Convention) -> None:
    found: dict[str, int] = {}
    for name in catalogue_names():
        for line in (line for context in CONTEXTS for line in explain(load_model(name).spec, context, convention)):
            for own in line.derived:
                first, *rest = own.numbers.split(" = ")
                assert value_of(first) == line.term.symbols[own.letter], (name, own)
                for last in rest:
                    about = value_of(last.removeprefix("about "))
                    assert about == pytest.approx(value_of(first), rel=1e-3)
                    assert last.startswith("about ") or about == value_of(first)
                found[own.letter] = found.get(own.letter, 0) + 1
    assert found["keys"] > 100
    assert found["D"] > 10
    assert ("late" in found) == (convention.form == "chunked")


@pytest.mark.parametrize("convention", CONVENTIONS, ids=str)
@pytest.mark.parametrize("p", [1, 2, 3])
def test_the_dimension_of_phi_in_each_form(p: int, convention: Convention) -> None:
    spec, _ = with_mixer(load_model("qwen2.5-0.5b").spec, f"power:p={p},normalize=false,head_dim=36,tile=5")
    derived = {own.letter: own for line in explain(spec, 4_096, convention) for own in line.derived}
    tiled = convention.form == "chunked" and p > 1
    size = math.comb(8 + p - 1, p) * 5**p if tiled else math.comb(36 + p - 1, p)
    assert value_of(derived["D"].numbers.split(" = ")[0]) == size
    assert ("b^p" in derived["D"].formula) == tiled


def test_the_sums_of_the_worked_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["wsfr", "gpt2-small", "--ctx", "64k", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "    with keys = (t + 1)/2 = (65,536 + 1)/2 = 32,768.5\n" in out
    assert "    56,623,104 + 113,246,208 + 77,194,752 = 247,064,064\n" in out
    assert "    247,064,064 / 1,207,977,984 = 0.2045 = 1:4.89\n" in out


@pytest.mark.parametrize("name", ["gpt2-small", "gemma-2-2b", "kimi-linear", "power-coder-3b", "mamba2-130m"])
def test_sums_that_are_printed_are_those_of_the_table(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    row = powerplan.wsfr(name, 3_000).rows[0]
    assert main(["wsfr", name, "--ctx", "3000", "--explain"]) == 0
    told = capsys.readouterr().out.split("All of the model at 3,000 tokens\n")[1]
    sums = dict(re.findall(r"  (\S.*)\n    (.*)\n", told))
    for words, value in (
        ("state elements of a sequence", row.state_elements),
        ("weight FLOPs per token", row.weight_flops_per_token),
        ("state FLOPs per token", row.state_flops_per_token),
    ):
        parts, _, last = sums[words].rpartition(" = ")
        assert value_of(last) == pytest.approx(value, abs=5e-4)
        assert sum(value_of(part) for part in (parts or last).split(" + ")) == pytest.approx(value, abs=0.02)


def test_a_model_without_state_has_no_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "convolutions.yaml"
    path.write_text(
        "name: c\nvocab_size: 10\nhidden_size: 8\nlayers:\n"
        "  - pattern: [{mixer: {kind: short_conv, inner_size: 8, conv_size: 3}}]\n",
        encoding="utf-8",
    )
    assert main(["wsfr", str(path), "--ctx", "1k", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "  state FLOPs per token\n    0\n" in out
    assert "weight over state" not in out


def test_json_has_the_formulas_of_letters(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["wsfr", "gemma-2-2b", "--ctx", "8k", "--explain", "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)["explain"]
    keys = {line["derived"]["keys"] for line in lines if "keys" in line["derived"]}
    assert keys == {"(t + 1)/2", "w·(w + 1)/(2·t) + (t - w)·w/t"}
