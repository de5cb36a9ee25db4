"""Defaults from powerplan.toml and pyproject.toml: which are taken, what is said of them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from powerplan.cli import main
from powerplan.cli.app import COMMANDS
from powerplan.defaults import find_defaults

OWN, PROJECT = "powerplan.toml", "pyproject.toml"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def answer(capsys: pytest.CaptureFixture[str], command: str) -> tuple[dict[str, Any], str]:
    """Return the JSON of a command that succeeds, and its notes."""
    assert main([*command.split(), "--json"]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def contexts(result: dict[str, Any]) -> list[int]:
    return [row["context"] for row in result["rows"]]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (OWN, 'ctx = ["8k", 16384]\ndtype = "fp8"\n'),
        (PROJECT, '[project]\nname = "x"\n[tool.powerplan]\nctx = "8k, 16k"\ndtype = "fp8"\n'),
        (PROJECT, '[tool]\npowerplan.ctx = "8k,16k"\npowerplan.dtype = "fp8"\n'),
    ],
)
def test_the_defaults_of_a_file(file: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(file).write_text(text)
    result, err = answer(capsys, "wsfr gpt2-small")
    assert contexts(result) == [8192, 16384]
    assert result["convention"]["dtype"] == "fp8"
    assert err.replace(", 16k", ",16k").replace("16384", "16k") == f"note: defaults of {file}: ctx 8k,16k; dtype fp8\n"
    given, err = answer(capsys, "wsfr gpt2-small --ctx 1k --dtype bf16")
    assert (contexts(given), given["convention"]["dtype"], err) == ([1024], "bf16", "")
    assert answer(capsys, "wsfr gpt2-small -q") == (result, "")
    assert answer(capsys, "dims")[1] == ""


def test_numbers_are_written_as_options_take_them(capsys: pytest.CaptureFixture[str]) -> None:
    Path(OWN).write_text('gpu = "h100-sxm"\ndevices = 64\nprice = 2.5\n[budget]\nflops = 1e21\nmfu = 0.123456789\n')
    result, err = answer(capsys, "budget gpt2-small --ctx 8k")
    assert result["total_flops"] == 10**21
    assert err.startswith("note: defaults of powerplan.toml: gpu h100-sxm; devices 64; flops 1e21; mfu 0.123456789\n")
    result, _ = answer(capsys, "train llama-3-8b --ctx 8k --tokens 100B")
    assert result["cost"] == pytest.approx(2.5 * result["gpu_hours"])


def test_what_needs_a_device_is_taken_with_one(capsys: pytest.CaptureFixture[str]) -> None:
    for table in ("", "[recommend]\n", "[decode]\n", "[budget]\n"):
        given = "devices = 64\n" + {"": "price = 2.5\nmfu = 0.3\n", "[budget]\n": "mfu = 0.3\n"}.get(table, "")
        Path(OWN).write_text(table + given)
        for command in ("recommend gpt2-small", "decode gpt2-small", "budget gpt2-small --flops 1e21"):
            assert "defaults of" not in answer(capsys, command)[1]
    Path(OWN).write_text("devices = 64\nprice = 2.5\nmfu = 0.3\n")
    _, err = answer(capsys, "budget gpt2-small --flops 1e21 --gpu h100-sxm")
    assert "note: defaults of powerplan.toml: devices 64; mfu 0.3\n" in err


def test_the_table_of_a_command_comes_before_the_shared_one(capsys: pytest.CaptureFixture[str]) -> None:
    Path(OWN).write_text('ctx = "64k"\n\n[wsfr]\nctx = "1k"\nby = "layer"\n')
    result, _ = answer(capsys, "wsfr gpt2-small")
    assert contexts(result) == [1024]
    assert "by_layer" in result["rows"][0]
    assert contexts(answer(capsys, "compare gpt2-small gpt2-xl")[0]["models"][0]) == [65536]


def test_where_a_file_is_looked_for(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = folder / "repository" / "a" / "b"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    names = [*COMMANDS]
    (folder / OWN).write_text('ctx = "1k"\n')
    assert find_defaults(names).file == ""  # Without a repository only the working directory counts.
    (folder / "repository" / ".git").mkdir()
    assert find_defaults(names).file == ""  # It is above the repository.
    (folder / "repository" / OWN).write_text('ctx = "2k"\n')
    assert contexts(answer(capsys, "wsfr gpt2-small")[0]) == [2048]
    (inner.parent / PROJECT).write_text("[tool.other]\nctx = 1\n")
    assert find_defaults(names).file == f"../../{OWN}"
    (inner.parent / PROJECT).write_text('[tool.powerplan]\nctx = "3k"\n')
    assert find_defaults(names).file == f"../{PROJECT}"
    (inner.parent / OWN).write_text('ctx = "4k"\n')
    assert find_defaults(names).file == f"../{OWN}"
    assert find_defaults(names).place("ctx") == f"../{OWN}:1: ctx"


def test_another_tools_file_costs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for content in (b"\xff", b"[tool.other", b"# powerplan, tool\n", b"[tool.powerplanner]\nx = 1\n"):
        Path(PROJECT).write_bytes(content)
        assert answer(capsys, "dims")[1] == ""


def test_a_folder_that_has_been_removed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = folder / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert answer(capsys, "dims")[1] == ""


def test_profile_has_only_its_own_table(capsys: pytest.CaptureFixture[str]) -> None:
    Path(OWN).write_text('ctx = "64q"\ndtype = "int4"\n[profile]\nbatch = "zzz"\n')
    assert main(["profile", "gpt2-small"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "note: defaults of powerplan.toml: batch zzz",
        "error: powerplan.toml:4: batch: 'zzz' is not an integer; write one from 1 to 65,536",
    ]


def test_a_format(capsys: pytest.CaptureFixture[str]) -> None:
    Path(OWN).write_text('format = "csv"\n')
    assert main(["dims", "-q"]) == 0
    assert capsys.readouterr().out.startswith("head_dim,p,")
    for command in (
        "models gpt2-small --yaml",
        "wsfr gpt2-small --explain",
        "dims --json",
        "schema",
        "wsfr gpt2-small --json",
    ):
        assert main(command.split()) == 0
        assert capsys.readouterr().err == ""


def test_what_one_answer_has_no_place_for(capsys: pytest.CaptureFixture[str]) -> None:
    Path(OWN).write_text('gpu = "h100-sxm"\ndevices = 8\nprice = 2.5\n')
    result, _ = answer(capsys, "recommend gpt2-small --solve p")
    assert result["schema"] == "powerplan.solve/1"
    assert main(["recommend", "gpt2-small", "--solve", "p", "--price", "3"]) == 2
    assert "leave --price out" in capsys.readouterr().err


def test_a_list_for_a_command_of_one_value(capsys: pytest.CaptureFixture[str]) -> None:
    Path(OWN).write_text('ctx = ["8k", "64k"]\nprice = [1, 2]\ngpu = "h100-sxm"\n')
    _, err = answer(capsys, "train llama-3-8b --tokens 1B --devices 8")
    said = "defaults of powerplan.toml: gpu h100-sxm; not ctx or price, which is a list here"
    assert err.splitlines()[0] == f"note: {said}"


def test_a_context_is_for_the_model_of_dims(capsys: pytest.CaptureFixture[str]) -> None:
    Path(OWN).write_text('ctx = "8k"\n')
    assert answer(capsys, "dims")[1] == ""
    with_model, err = answer(capsys, "dims --model gpt2-small --p 2")
    assert with_model["context"] == 8192
    assert err == "note: defaults of powerplan.toml: ctx 8k\n"


def test_doctor_shows_them(capsys: pytest.CaptureFixture[str]) -> None:
    nothing = {one["what"]: one["found"] for one in answer(capsys, "doctor")[0]["findings"]}
    assert nothing["defaults"] == "none: no powerplan.toml, no [tool.powerplan] in pyproject.toml"
    Path(OWN).write_text('ctx = ["8k", "64k"]\n[train]\ndevices = 64\n')
    found = {one["what"]: one["found"] for one in answer(capsys, "doctor")[0]["findings"]}
    assert found["defaults"] == "powerplan.toml"
    assert (found["default of ctx"], found["default of train devices"]) == ("8k,64k", "64")


MESSAGES = {
    'ctx = "64q"': "powerplan.toml:1: ctx: '64q' is not a size in tokens; ...",
    "# a\n\nctx = 0": "powerplan.toml:3: ctx: '0' is out of range; ...",
    'context = "64k"': "powerplan.toml:1: context: unknown key; did you mean ctx? allowed are ctx, ...",
    'weights_dtype = "fp8"': "powerplan.toml:1: weights_dtype: unknown key; did you mean weights-dtype? ...",
    'dtype = "bf61"': "powerplan.toml:1: dtype: 'bf61' is not known; did you mean bf16? ...",
    "[wsfr]\ndtype = ['bf16', 'fp8']": "powerplan.toml:2: dtype: takes one value, and this is a list",
    "[wsfr]\nby = 'layers'": "powerplan.toml:2: by: 'layers' is not known; did you mean layer? ...",
    "[wsfr]\nflops = 1": "powerplan.toml:2: flops: unknown key; allowed are ctx, by, like, mixer, ...",
    "[wsfr]\noutput = 'x'": "powerplan.toml:2: output: unknown key; ...",
    "[wsfr]\nexplain = 'x'": "powerplan.toml:2: explain: unknown key; ...",
    "[wfsr]\nctx = 1": "powerplan.toml:1: wfsr: unknown key; did you mean [wsfr]? ...",
    "wsfr = 3": "powerplan.toml:1: wsfr: unknown key; did you mean [wsfr]? ...",
    "ctx = true": "powerplan.toml:1: ctx: true is not text or a number, or a list of them",
    "ctx = 1979-05-27": "powerplan.toml:1: ctx: datetime.date(1979, 5, 27) is not text or a number, or ...",
    "ctx = [[1]]": "powerplan.toml:1: ctx: [1] is not text or a number, or a list of them",
    "ctx = []": "powerplan.toml:1: ctx: is an empty list",
    "[ctx]\na = 1": "powerplan.toml:1: ctx: {a: 1} is not text or a number, or a list of them",
    "\nctx": "powerplan.toml:2: is not valid TOML: expected '=' after a key in a key/value pair",
    "ctx = 1\nctx = 2": "powerplan.toml:2: is not valid TOML: cannot overwrite a value",
    "= 1": "powerplan.toml:1:1: is not valid TOML: ...",
    "ctx = '": "powerplan.toml:1: is not valid TOML: ...",
    f"ctx = {'9' * 5000}": "powerplan.toml: is not valid TOML: a number of thousands of digits",
    f"ctx = {'[' * 5000}": "powerplan.toml: is not valid TOML: ...",
    f"ctx = {'9' * 4000}": "powerplan.toml:1: ctx: ...",
    "\x00": "powerplan.toml: is not text (a NUL character at offset 0)",
    '"\\u001b[2J" = 1': r"powerplan.toml:1: \x1b[2J: unknown key; ...",
    f"#{'x' * 2**20}": "powerplan.toml: is larger than 1 MiB; defaults are a few lines",
}


@pytest.mark.parametrize("text", MESSAGES, ids=lambda text: ascii(text)[:30])
def test_what_is_wrong_with_a_file(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(OWN).write_text(text)
    assert main(["wsfr", "gpt2-small"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    *notes, error = captured.err.splitlines()
    assert all(note.startswith("note: defaults of powerplan.toml: ") for note in notes)
    begin, dots, _ = f"error: {MESSAGES[text]}".partition("...")
    assert error.startswith(begin) if dots else error == begin
    assert error.isprintable()


def test_the_table_of_a_project_file(capsys: pytest.CaptureFixture[str]) -> None:
    for text, message in {
        "[tool.powerplan]\n\nctz = 1\n": "pyproject.toml:3: ctz: unknown key; did you mean ctx? ...",
        "[tool.powerplan.wsfr]\nctx = '64q'\n": "pyproject.toml:2: ctx: '64q' is not a size ...",
        "[tool]\npowerplan = 3\n": "pyproject.toml: tool.powerplan: is 3, and not a table",
        "[tool.powerplan\n": "pyproject.toml:1:16: is not valid TOML: ...",
    }.items():
        Path(PROJECT).write_text(text)
        assert main(["wsfr", "gpt2-small"]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message.removesuffix('...')}")


@pytest.mark.parametrize(
    "text",
    [
        "tool.powerplan.ctx = '64q'",
        "tool = {powerplan = {ctx = '64q'}}",
        "tool = { 'powerplan' = {ctx = '64q'} }",
        "[tool.'powerplan']\nctx = '64q'",
        '["tool" . "powerplan"]\nctx = "64q"',
        "[tool]\n'powerplan'.ctx = '64q'",
        "[tool]\n  powerplan = {ctx = '64q'}",
    ],
)
def test_every_spelling_of_the_table(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(PROJECT).write_text(text)
    assert main(["wsfr", "gpt2-small"]) == 2
    assert "ctx: '64q' is not a size in tokens" in capsys.readouterr().err


def test_a_name_that_is_no_file(capsys: pytest.CaptureFixture[str]) -> None:
    Path(PROJECT).write_text("[tool.powerplan]\nctx = '8k'\n")
    own = Path(OWN)
    own.mkdir()
    assert main(["wsfr", "gpt2-small"]) == 2
    assert capsys.readouterr().err == "error: powerplan.toml: is a folder, not a file\n"
    own.rmdir()
    own.symlink_to("gone")
    assert main(["wsfr", "gpt2-small"]) == 2
    assert capsys.readouterr().err == "error: powerplan.toml: no such file\n"
    own.unlink()
    own.symlink_to(OWN)
    assert main(["wsfr", "gpt2-small"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: powerplan.toml: cannot be read: ")
    assert error.count("\n") == 1


def test_a_default_of_one_command_that_another_cannot_take(capsys: pytest.CaptureFixture[str]) -> None:
    Path(OWN).write_text('dtype = "fp8"\n')
    assert main(["train", "llama-3-8b", "--gpu", "h100-sxm"]) == 2
    assert capsys.readouterr().err == (
        "error: powerplan.toml:1: dtype: 'fp8' is not known; allowed are bf16, fp16, fp32 for train; "
        "a table of its own, [train], comes before it\n"
    )


def test_the_library_reads_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    import powerplan

    Path(OWN).write_text("this is no TOML")
    assert powerplan.wsfr("gpt2-small", "64k").rows[0].context == 65_536
