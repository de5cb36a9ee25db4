"""The names of models that are written: short ones by default, others on demand, and files that round-trip."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import powerplan
from powerplan.cli import main
from powerplan.documents import parse_yaml
from powerplan.dump import check_name, short_name
from powerplan.errors import InputError
from powerplan.validation import validate


@pytest.mark.parametrize(
    ("name", "change", "short"),
    [
        ("gpt2-small", "power p=2", "gpt2-small-power-p2"),
        ("gpt2-small", "window 7,084", "gpt2-small-window-7084"),
        ("gpt2-small", "9 power p=2 6x128 + 3 power p=2", "gpt2-small-9-power-p2-6x128-3-power-p2"),
        ("gpt2-small with power:p=2,gated=true", "", "gpt2-small-power-p2-gated-true"),
        ("gemma-2-2b at 24 x 2304 with power p=2", "", "gemma-2-2b-24x2304-power-p2"),
        ("My model (v2)", "", "My-model-v2"),
        ("llama-3.2-1b", "", "llama-3.2-1b"),
        ("模型", "power p=2", "模型-power-p2"),
        ("()", "", "()"),
    ],
)
def test_short_names(name: str, change: str, short: str) -> None:
    assert short_name(name, change) == short


@given(st.text(max_size=200), st.text(max_size=200))
def test_a_short_name_is_one_that_is_allowed(name: str, change: str) -> None:
    short = short_name(name, change)
    if short != name:
        assert len(short) <= 80
        assert not set(short) & set(" :=,+/()'\"\n")


@pytest.mark.parametrize("name", ["a", "gpt2-small-power-p2", "1.5B_v2", "ein-überlanges-modell", "x" * 200])
def test_names_that_are_allowed(name: str) -> None:
    assert check_name(name, "name") == name


@pytest.mark.parametrize("name", ["", " ", "a b", "-a", ".a", "a/b", "a:b", "a\nb", "x" * 201, "a\u202eb"])
def test_names_that_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"^name: "):
        check_name(name, "name")


def written(arguments: list[str], path: Path) -> powerplan.ModelSpec:
    assert main([*arguments, "--write", str(path)]) == 0
    return validate(parse_yaml(path.read_text(encoding="utf-8"), "written.yaml"))


def test_a_recommended_model_has_a_short_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["recommend", "gpt2-small", "--ctx", "64k"]
    spec = written(arguments, tmp_path / "one.yaml")
    assert spec.name == "gpt2-small-9-power-p2-6x128-3-power-p2"
    mine = written([*arguments, "--name", "my_model-1.0"], tmp_path / "two.yaml")
    assert mine.name == "my_model-1.0"
    assert mine.layers == spec.layers == powerplan.recommend("gpt2-small", "64k").recommended.spec.layers
    capsys.readouterr()
    assert main(["wsfr", str(tmp_path / "two.yaml"), "--ctx", "1k"]) == 0
    assert capsys.readouterr().out.startswith("my_model-1.0: ")


def test_a_model_that_stays_keeps_its_name() -> None:
    answer = powerplan.recommend("gpt2-small", "13k", only="attention")
    assert answer.name() == "gpt2-small"
    assert answer.to_yaml(name="mine").startswith("name: mine\n")
    with pytest.raises(InputError, match=r"^name: 'a b' holds ' '; a name has letters, digits and \. _ -"):
        answer.to_yaml(name="a b")


def test_a_sized_model_has_a_short_name() -> None:
    answer = powerplan.budget(gpu_hours=1000, gpu="h100-sxm", context="8k")
    assert answer.to_yaml(len(answer.rows) - 1).startswith("name: ")
    for place, row in enumerate(answer.rows):
        read = validate(parse_yaml(answer.to_yaml(place), "sized.yaml"))
        assert read.name == short_name(row.spec.name)
        assert " " not in read.name
    assert answer.to_yaml(0, "mine").startswith("name: mine\n")


def test_models_prints_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, name in [
        ([], "gpt2-small"),
        (["--mixer", "power:p=2"], "gpt2-small-power-p2"),
        (["--mixer", "power:p=2", "--name", "mine"], "mine"),
        (["--name", "12"], "'12'"),
    ]:
        assert main(["models", "gpt2-small", "--yaml", *arguments]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"name: {name}\n")
        assert validate(parse_yaml(text, "again.yaml")).name == name.strip("'")
