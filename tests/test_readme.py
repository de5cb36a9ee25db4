"""Every example of the README runs, and prints what the README says."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path

import pytest

from powerplan.cli import main
from powerplan.ffn import FFNS
from powerplan.load import catalogue_names, load_model
from powerplan.mixers import MIXERS
from powerplan.mixers.formulas import SYMBOLS
from powerplan.rope import SCALINGS, Rope
from powerplan.spec import LayerGroup, ModelSpec, Norm

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SPEC = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)[0]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[tuple[str, str]]:
    """Return the commands of the console blocks, each with the output that follows it."""
    found = []
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output.rstrip("\n")))
    return found


@pytest.mark.parametrize("block", blocks("console shape"), ids=lambda text: text[:60])
def test_commands_print_the_lines_that_the_readme_picks(
    block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In such a block "..." stands for any text, and other lines may stand between."""
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    monkeypatch.chdir(tmp_path)
    command, _, output = block.removeprefix("$ ").partition("\n")
    program, *arguments = shlex.split(command)
    assert program == "powerplan"
    assert main(arguments) == 0
    printed = " ".join(capsys.readouterr().out.split())
    for line in output.splitlines():
        pieces = (re.escape(" ".join(piece.split())) for piece in line.split("..."))
        found = re.search(".*?".join(pieces), printed)
        assert found, line
        printed = printed[found.end() :]


@pytest.mark.parametrize(("command", "output"), commands(), ids=lambda text: text[:60])
def test_commands_print_what_the_readme_says(
    command: str,
    output: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(SPEC, encoding="utf-8")
    Path("mistyped.yaml").write_text(SPEC.replace("heads: 12, head_dim: 64, window", "head: 12, head_dim: 64, window"))
    program, *arguments = shlex.split(command)
    assert program == "powerplan"
    code = main(arguments)
    captured = capsys.readouterr()
    assert code in ((2, 3) if output.startswith("error:") else (0,))
    printed = [line.rstrip() for line in (captured.out + captured.err).rstrip("\n").split("\n")]
    assert printed == output.split("\n")


def test_there_are_commands_and_code() -> None:
    assert len(commands()) == 3
    assert len(blocks("console shape")) == 1
    assert len(blocks("python")) == 2


def test_the_yaml_is_a_spec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(SPEC, encoding="utf-8")
    assert main(["wsfr", str(path)]) == 0
    assert "mine: " in capsys.readouterr().out


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str) -> None:
    assert "assert" in code
    exec(compile(code, "README.md", "exec"), {})


def test_docs_spec_names_every_field_and_its_examples_are_specs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "spec.md").read_text(encoding="utf-8")
    parts = [ModelSpec, Norm, LayerGroup, Rope, *SCALINGS.values(), *MIXERS.values(), *FFNS.values()]
    fields = {field for part in parts for field in part.__struct_fields__}
    missing = {field for field in fields if not re.search(rf"\b{field}\b", text)}
    assert missing == set()
    for index, example in enumerate(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)):
        path = tmp_path / f"{index}.yaml"
        path.write_text(example, encoding="utf-8")
        assert load_model(path).spec.layer_count == 16


def test_docs_families_is_made_from_the_tables() -> None:
    text = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert text == runpy.run_path(str(ROOT / "scripts" / "families_docs.py"))["families_page"]()
    for family in ("llama", "llava", "bert"):
        assert family in text


def test_docs_accounting_names_every_kind() -> None:
    text = (ROOT / "docs" / "accounting.md").read_text(encoding="utf-8").split("## Per layer")[1]
    assert {kind for kind in (*MIXERS, *FFNS) if f"`{kind}`" not in text} == set()


def test_docs_accounting_explains_every_letter() -> None:
    letters = (ROOT / "docs" / "accounting.md").read_text(encoding="utf-8").split("## Letters")[1].split("## ")[0]
    named = {
        letter.strip() for row in letters.splitlines() for cell in row.split("|")[1::2] for letter in cell.split(",")
    }
    assert set(SYMBOLS) <= named


def test_figures_in_prose() -> None:
    assert f"{len(catalogue_names())} built-in models" in README
    assert README.count("\n") < 200
    results = ROOT / "benchmarks" / "results"
    started = json.loads((results / "startup.json").read_text(encoding="utf-8"))
    ratio = f"{started['ratio']:.1f} times `python -c 'import typer'`"
    assert f"`powerplan wsfr gpt2-small --ctx 64k`: {started['median_s']:.2f} s, {ratio}" in README
    assert started["ratio"] <= started["target_ratio"]
    timed = json.loads((results / "recommend.json").read_text(encoding="utf-8"))["results"][-1]
    assert f"{timed['candidates']:,} candidates\n  for {timed['model']} in {timed['median_s']:.2f} s" in README
