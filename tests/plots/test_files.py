"""Files of figures: their formats, the same bytes each time, and every message of `--plot` and `plot`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
from children import HUNG_S
from fuzzing import PROFILE

import powerplan
from powerplan.cli import main
from powerplan.errors import InputError, MachineError
from powerplan.plots.figure import MAX_HEIGHT, figure_bytes

COMMANDS = [
    "wsfr gpt2-small",
    "wsfr gpt2-small --by layer",
    "compare gpt2-small mamba2-130m --format csv",
    "budget gpt2-small --flops 1e20",
    "budget gpt2-small mamba2-130m --flops 1e20 --format markdown",
    "budget --flops 1e20 --ctx 8k",
    "decode gpt2-small --gpu h100-sxm --format json",
    "recommend gpt2-small",
    f"profile --show {PROFILE}",
]
MAGIC = {"png": b"\x89PNG\r\n\x1a\n", "svg": b"<?xml", "pdf": b"%PDF-"}


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_draws(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In each format, and the same bytes again: in one format for each command, in turns."""
    drawn_again = list(MAGIC)[COMMANDS.index(command) % len(MAGIC)]
    assert main(command.split()) == 0
    plain = capsys.readouterr()
    for suffix, magic in MAGIC.items():
        path = Path(f"out.{suffix}")
        assert main([*command.split(), "--plot", str(path)]) == 0
        captured = capsys.readouterr()
        assert captured.out == plain.out
        assert captured.err == f"{plain.err}note: wrote out.{suffix}\n"
        first = path.read_bytes()
        assert first.startswith(magic)
        assert main([*command.split(), "--plot", str(path)]) == 2
        assert capsys.readouterr().err == f"error: --plot: out.{suffix} exists; --force overwrites it\n"
        if suffix == drawn_again:
            assert main([*command.split(), "--plot", str(path), "--force"]) == 0
            assert path.read_bytes() == first
            capsys.readouterr()
    assert sorted(path.name for path in Path().iterdir()) == ["out.pdf", "out.png", "out.svg"]


@pytest.mark.parametrize("command", COMMANDS)
def test_messages(command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    Path("folder.png").mkdir()
    for path, problem in {
        "x.gif": "x.gif must end in .png, .svg, .pdf",
        "x": "x must end in .png, .svg, .pdf",
        "no/x.png": "no/x.png: there is no folder no",
        "folder.png": "folder.png is a folder; give a file",
        "": "is empty; give a file",
    }.items():
        assert main([*command.split(), "--plot", path]) == 2
        captured = capsys.readouterr()
        assert (captured.out, captured.err.splitlines()[-1]) == ("", f"error: --plot: {problem}")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([*command.split(), "--plot", "x.png"]) == 4
    message = "error: --plot needs matplotlib, and it is not installed: pip install matplotlib\n"
    assert capsys.readouterr().err.endswith(message)
    assert not Path("x.png").exists()


def test_a_file_that_is_read_is_not_drawn_into(capsys: pytest.CaptureFixture[str]) -> None:
    Path("model.svg").write_text(powerplan.load_model("gpt2-small").origin, encoding="utf-8")
    for command in ("wsfr model.svg", "compare gpt2-small model.svg", "decode gpt2-small model.svg"):
        assert main([*command.split(), "--plot", "./model.svg", "--force"]) == 2
        message = "error: --plot: ./model.svg is the file that MODEL reads; give another\n"
        assert capsys.readouterr().err == message
    command = "budget gpt2-small --measured model.svg --plot model.svg --force"
    assert main(command.split()) == 2
    assert capsys.readouterr().err == "error: --plot: model.svg is the file that --measured reads; give another\n"


def test_a_figure_too_high_to_draw(capsys: pytest.CaptureFixture[str]) -> None:
    contexts = ",".join(str(1000 + place) for place in range(int(2 * MAX_HEIGHT)))
    command = f"wsfr gpt2-small --by component --ctx {contexts} --plot x.png --format csv"
    assert main(command.split()) == 2
    message = "error: --plot: the figure would be 402 inches high; ask for fewer models, contexts or candidates\n"
    assert capsys.readouterr().err == message
    assert not Path("x.png").exists()


def test_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = powerplan.wsfr("gpt2-small", "64k")
    answer.plot("out.png")
    first = Path("out.png").read_bytes()
    assert first.startswith(MAGIC["png"])
    with pytest.raises(InputError, match=r"^path: out.png exists; force=True overwrites it$"):
        answer.plot("out.png")
    answer.plot(Path("out.png"), force=True)
    assert Path("out.png").read_bytes() == first
    with pytest.raises(InputError, match=r"^path: out.jpg must end in .png, .svg, .pdf$"):
        answer.plot("out.jpg")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for draw in (answer.figure, lambda: answer.plot("other.png")):
        with pytest.raises(MachineError, match=r"^plot needs matplotlib, and it is not installed"):
            draw()
    assert not Path("other.png").exists()


def test_svg_keeps_its_text() -> None:
    text = figure_bytes(powerplan.wsfr("llama-3-8b", "64k").figure(), "svg").decode()
    for words in ("balanced at 57,255", "llama-3-8b: weight-state FLOP ratio", "1:1.14", "context, tokens"):
        assert words in text
    assert "dc:date" not in text


def test_settings_of_a_notebook_change_nothing_and_are_not_changed() -> None:
    answer = powerplan.wsfr("gpt2-small", "64k")
    before = figure_bytes(answer.figure(), "png")
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "axes.facecolor": "red"}):
        settings = dict(matplotlib.rcParams)
        assert figure_bytes(answer.figure(), "png") == before
        assert dict(matplotlib.rcParams) == settings


def test_no_window_and_no_global_state() -> None:
    """A notebook keeps its backend: figures are made without pyplot."""
    script = "import sys, powerplan; powerplan.wsfr('gpt2-small', '1k').plot('x.png')\n"
    script += "assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, timeout=HUNG_S)


@pytest.mark.parametrize(
    "command",
    [
        "budget gpt2-small --tokens 1e30 --ctx 1125899906842624",
        "budget gpt2-small --flops 1e40",
        "budget gpt2-small gpt2-xl --flops 1e40",
        "budget --flops 1e40 --ctx 8k",
        "decode gpt2-small --gpu h100-sxm --ctx 1125899906842624",
        "wsfr gpt2-small --ctx 1,1125899906842624",
    ],
)
def test_numbers_of_more_than_64_bits(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = main([*command.split(), "--plot", "out.svg"])
    assert (code, capsys.readouterr().err.splitlines()[-1]) == (0, "note: wrote out.svg")


def test_a_backend_that_there_is_none_of() -> None:
    command = [sys.executable, "-m", "powerplan", "wsfr", "gpt2-small", "--plot", "out.svg"]
    environment = {**os.environ, "MPLBACKEND": "nonsense"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HUNG_S, check=False)
    assert (ended.returncode, ended.stdout) == (4, "")
    assert ended.stderr.startswith("error: --plot: matplotlib does not load: ")
    assert ended.stderr.count("\n") == 1
    assert not Path("out.svg").exists()
