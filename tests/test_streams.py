"""Signals and standard streams of the command itself: exit codes, one line on stderr, and no result lost.

No test waits for a time: a child sends itself the signal at a certain import or step, or says on stderr where it is.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from warm import CLOSED, GONE, Warm

from powerplan.cli import interrupts, main
from powerplan.errors import PowerplanError
from powerplan.load import load_model

RUN = "from powerplan.cli import run; run()"
"""What the script of the command does."""

AT_IMPORT = """
import os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # A background job would pass it on ignored.
number, module = int(sys.argv[1]), sys.argv[2]
del sys.argv[1:3]

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            os.kill(os.getpid(), number)

sys.meta_path.insert(0, Finder())
from powerplan.cli import run
run()
"""
"""Run the command line with a signal that comes when a module is about to be imported."""

AT_STEP = """
import os, signal, sys
import powerplan.output

signal.signal(signal.SIGINT, signal.default_int_handler)
numbers, steps = [int(word) for word in sys.argv[1].split(",")], int(sys.argv[2])
del sys.argv[1:3]

def tell(self, text):
    global steps
    steps -= 1
    if steps == 0:
        os.kill(os.getpid(), numbers[0])

def write(*arguments, write=powerplan.output._write_file):
    for number in numbers[1:]:
        os.kill(os.getpid(), number)
    write(*arguments)

if steps:
    from powerplan.profile import session, timing
    session.Session._tell = tell
    timing.MIN_REPEATS = timing.MAX_REPEATS = 2
powerplan.output._write_file = write
from powerplan.cli import run
run()
"""
"""Run the command line with a signal at a step of a profile, and others before each file is written."""

PROFILE = ["profile", "tiny.yaml", "--p", "2", "--ctx", "64, 128", "--pass", "forward", "--against", "none"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    layer = "{mixer: {kind: attention, heads: 2, head_dim: 8}, ffn: {kind: mlp, intermediate_size: 32, gated: true}}"
    Path("tiny.yaml").write_text(
        f"name: tiny\nvocab_size: 100\nhidden_size: 16\ntie_embeddings: true\nlayers: [{layer}]\n", encoding="utf-8"
    )
    return tmp_path


def run(code: str, *arguments: str, suffix: str = "") -> subprocess.CompletedProcess[str]:
    """Run Python code with arguments in a shell that redirects with `suffix`."""
    words = ["bash", "-c", f'"$@" {suffix}', "bash", sys.executable, "-c", code, *arguments]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    "module",
    ["powerplan.cli.streams", "typer", "yaml"],
)
def test_a_signal_while_planning_is_loaded(number: int, code: int, module: str) -> None:
    done = run(AT_IMPORT, str(int(number)), module, "wsfr", "tiny.yaml", "--ctx", "1k")
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "error: interrupted\n")


def test_ctrl_c_before_the_handlers_stand() -> None:
    for module in ("powerplan.cli.interrupts", "powerplan.errors"):
        done = run(AT_IMPORT, str(int(signal.SIGINT)), module, "wsfr", "tiny.yaml")
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


@pytest.mark.parametrize("module", ["torch._C", "powerplan.profile.runner"])
def test_ctrl_c_while_torch_is_loaded(module: str) -> None:
    done = run(AT_IMPORT, str(int(signal.SIGINT)), module, *PROFILE, "--save", "out.json")
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in done.stderr
    assert [path.name for path in Path().iterdir()] == ["tiny.yaml"]


def test_the_entry_point_loads_nothing_before_it_stands() -> None:
    """Python's own start, and a few files: whatever else is imported, `run` is in charge of Ctrl-C by then."""
    code = "import sys; before = set(sys.modules); import powerplan.cli; print(*set(sys.modules) - before)"
    loaded = set(run(code).stdout.split())
    assert {name for name in loaded if name.startswith("powerplan")} == {"powerplan", "powerplan.cli"}
    assert not loaded & {"typer", "msgspec", "yaml", "re", "pathlib", "dataclasses"}


def test_an_ignored_signal_stays_ignored() -> None:
    """As a shell without job control starts its background jobs."""
    code = AT_IMPORT.replace("signal.default_int_handler", "signal.SIG_IGN")
    done = run(code, str(int(signal.SIGINT)), "typer", "wsfr", "tiny.yaml", "--ctx", "1k")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("numbers", "code"), [("15", 143), ("2,2", 130)])
def test_what_was_measured_is_printed_and_saved(numbers: str, code: int) -> None:
    """The second number comes while the file is being written, as of a user who presses Ctrl-C twice."""
    steps = "6"  # The matrix product, the check, the projections twice, the FFN; then another.
    done = run(AT_STEP, numbers, steps, *PROFILE, "--time-limit", "2h", "--save", "out.json")
    assert done.returncode == code, done.stderr
    assert done.stderr.splitlines()[-1] == "error: interrupted"
    assert "interrupted: what was measured until then" in done.stdout
    saved = json.loads(Path("out.json").read_text(encoding="utf-8"))
    assert saved["interrupted"] is True
    assert saved["results"]
    assert sorted(path.name for path in Path().iterdir()) == ["out.json", "tiny.yaml"]


@pytest.mark.parametrize(("numbers", "written"), [("0,2", True), ("0,15", True), ("0,2,2", False)])
def test_a_file_is_written_before_ctrl_c_ends_a_command(numbers: str, written: bool) -> None:
    done = run(AT_STEP, numbers, "0", "recommend", "tiny.yaml", "--ctx", "1k", "--write", "out.yaml")
    assert (done.returncode, done.stderr.splitlines()[-1]) == (143 if "15" in numbers else 130, "error: interrupted")
    assert Path("out.yaml").exists() is written
    assert {path.name for path in Path().iterdir()} <= {"out.yaml", "tiny.yaml"}


def test_an_exception_that_a_signal_has_become() -> None:
    """A library that is interrupted in C code may raise another exception than KeyboardInterrupt."""

    def fail(number: int | None) -> None:
        with interrupts.kept() as signals:
            if number is not None:
                with pytest.raises(KeyboardInterrupt):
                    signals.take(number)
            raise SystemError("initialization raised unreported exception")

    with pytest.raises(PowerplanError, match="interrupted") as raised:
        fail(signal.SIGTERM)
    assert raised.value.exit_code == 143
    with pytest.raises(SystemError, match="unreported"):
        fail(None)


BIG, SMALL, WRONG = ["models", "--format", "json"], ["wsfr", "tiny.yaml", "--ctx", "1k"], ["wsfr", "zzz"]
NOTED = ["recommend", "tiny.yaml", "--format", "json", "--write", "out.yaml", "--force"]
UNSAVED = ["recommend", "tiny.yaml", "--ctx", "64k", "--write", "/dev/full"]
UNSAVED_ERROR = "error: --write: /dev/full cannot be written: No space left on device\n"
FULL = "error: cannot write the result: No space left on device\n"
NO_MODEL = "error: 'zzz' is neither a file nor a built-in model (powerplan models lists them)\n"


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    with Warm() as child:
        yield child


STREAMS: list[tuple[list[str], dict[str, str], int, str]] = [
    (BIG, {"stdout": CLOSED}, 0, ""),
    (SMALL, {"stdout": CLOSED}, 0, ""),
    (BIG, {"stdin": CLOSED, "stdout": CLOSED, "stderr": CLOSED}, 0, ""),
    (WRONG, {"stdout": CLOSED}, 2, NO_MODEL),
    (WRONG, {"stderr": CLOSED}, 2, ""),
    (WRONG, {"stdin": CLOSED, "stdout": CLOSED, "stderr": CLOSED}, 2, ""),
    (WRONG, {"stderr": "/dev/full"}, 2, ""),
    (WRONG, {"stderr": GONE}, 2, ""),
    (WRONG, {"stdout": GONE, "stderr": GONE}, 2, ""),
    (["wsfr", "--nope"], {"stdout": GONE, "stderr": GONE}, 2, ""),
    (BIG, {"stdout": "/dev/full"}, 4, FULL),
    (SMALL, {"stdout": "/dev/full"}, 4, FULL),
    (["--help"], {"stdout": "/dev/full"}, 4, FULL),
    (["wsfr", "--help"], {"stdout": "/dev/full"}, 4, FULL),
    (["--version"], {"stdout": "/dev/full"}, 4, FULL),
    (BIG, {"stdout": "/dev/full", "stderr": "/dev/full"}, 4, ""),
    (BIG, {"stdout": "/dev/full", "stderr": CLOSED}, 4, ""),
    (BIG, {"stdout": GONE}, 0, ""),
    (UNSAVED, {"stdout": "/dev/full"}, 4, UNSAVED_ERROR),
    (UNSAVED, {"stdout": GONE}, 4, UNSAVED_ERROR),
    (SMALL, {"stdout": GONE}, 0, ""),
    (["--help"], {"stdout": GONE}, 0, ""),
    (BIG, {"stdout": GONE, "stderr": "/dev/full"}, 0, ""),
]


@pytest.mark.parametrize(("arguments", "streams", "code", "err"), STREAMS, ids=lambda value: str(value)[:30])
def test_streams_that_fail(arguments: list[str], streams: dict[str, str], code: int, err: str, warm: Warm) -> None:
    done = warm.run(arguments, **streams)
    assert (done.code, done.out, done.err) == (code, b"", err.encode())


def test_a_completion_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Typer ends the process itself there."""
    monkeypatch.setenv("_POWERPLAN_COMPLETE", "source_zsh")
    for suffix, expected in ((">/dev/full", (4, "", FULL)), (">&-", (0, "", ""))):
        done = run(RUN, suffix=suffix)
        assert (done.returncode, done.stdout, done.stderr) == expected


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (FileNotFoundError(2, "No such file or directory", "x.yaml"), 4, "error: x.yaml: No such file or directory\n"),
        (OSError("odd"), 4, "error: cannot write the result: odd\n"),
        (MemoryError(), 4, "error: out of memory\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (typer.Exit(1), 2, ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_else_may_end_a_command(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: Any, **settings: Any) -> None:
        raise error

    monkeypatch.setattr("powerplan.report.dims.dims_report", fail)
    assert main(["dims"]) == code
    assert capsys.readouterr().err == said


def test_a_new_process_finds_its_streams_so_too() -> None:
    for suffix, expected in (("2>&-", (2, "", "")), (">&-", (2, "", NO_MODEL)), ("2>/dev/full", (2, "", ""))):
        done = run(RUN, *WRONG, suffix=suffix)
        assert (done.returncode, done.stdout, done.stderr) == expected


@pytest.mark.parametrize("stderr", [CLOSED, "/dev/full", GONE])
def test_notes_that_cannot_be_told_cost_nothing(stderr: str, warm: Warm) -> None:
    done = warm.run(NOTED, stderr=stderr)
    assert done.code == 0
    assert json.loads(done.out)["context"] == 65_536
    assert load_model("out.yaml").spec.name.startswith("tiny")


@pytest.mark.parametrize(("stdout", "code"), [("/dev/full", 4), (GONE, 0), (CLOSED, 0)])
def test_files_are_written_whatever_becomes_of_the_answer(stdout: str, code: int, warm: Warm) -> None:
    done = warm.run(NOTED, stdout=stdout)
    assert done.code == code
    assert b"note: wrote out.yaml" in done.err
    assert load_model("out.yaml").spec.name.startswith("tiny")


def test_a_closed_stream_gives_its_number_to_no_file() -> None:
    """What libraries write to file number 2 must not reach the file that is written."""
    code = "import os\nfsync = os.fsync\nos.fsync = lambda number: (os.write(2, b'a warning'), fsync(number))\n"
    assert run(code + RUN, *NOTED, suffix="<&- 2>&-").returncode == 0
    assert load_model("out.yaml").spec.name.startswith("tiny")


LOCALE = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("variables", [{"PYTHONIOENCODING": "ascii:strict"}, LOCALE], ids=["ascii", "locale C"])
@pytest.mark.parametrize("arguments", [[*SMALL, "--explain"], ["--help"], ["wsfr", "mod\u00e8le\U0001d11e"]])
def test_streams_of_few_characters(arguments: list[str], variables: dict[str, str]) -> None:
    command = [sys.executable, "-c", RUN, *arguments]
    done = subprocess.run(command, capture_output=True, env=os.environ | variables, check=False)
    assert done.returncode == (0 if arguments[0] == "--help" or "tiny.yaml" in arguments else 2)
    assert (done.stdout or done.stderr).isascii()
