"""Files that commands write: refused before any work where they cannot be written, then whole or not at all."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import powerplan
from powerplan.cli import main
from powerplan.errors import InputError, MachineError
from powerplan.load import catalogue_text, load_model
from powerplan.output import check_targets, write_whole

OLD = b"what was there before"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Fill the working directory with one of each kind of what a path may lead to, and return it."""
    monkeypatch.chdir(tmp_path)
    Path("model.yaml").write_text(catalogue_text("gpt2-small"), encoding="utf-8")
    for name in ("old.yaml", "old.png", "old.json", "fixed.yaml"):
        Path(name).write_bytes(OLD)
    Path("fixed.yaml").chmod(0o444)
    Path("folder.yaml").mkdir()
    Path("dangling.yaml").symlink_to("gone.yaml")
    Path("loop.yaml").symlink_to("loop.yaml")
    Path("link.yaml").symlink_to("old.yaml")
    Path("model-link.yaml").symlink_to("model.yaml")
    os.link("model.yaml", "model-hard.yaml")
    os.link("old.yaml", "hard.yaml")
    return tmp_path


def contents(folder: Path) -> dict[str, Any]:
    """Return what is in a folder: the bytes of files, where links lead, None for anything else."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        content = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = content
    return found


REFUSED = {
    "dangling.yaml": "dangling.yaml is a link to a file that does not exist; give another",
    "loop.yaml": "loop.yaml cannot be written: Too many levels of symbolic links",
    "fixed.yaml": "fixed.yaml is read-only",
    f"{'a' * 300}.yaml": f"{'a' * 300}.yaml cannot be written: File name too long",
    f"{'a/' * 3000}x.yaml": f"{'a/' * 400}...",
    "nope/": "nope/ is a folder; give a file",
    "old.yaml/": "old.yaml/ is a folder; give a file",
    "old.yaml/.": "old.yaml/. is a folder; give a file",
    "..": ".. is a folder; give a file",
    "folder.yaml": "folder.yaml is a folder; give a file",
    "nope/x.yaml": "nope/x.yaml: there is no folder nope",
    "old.yaml/x.yaml": "old.yaml/x.yaml: old.yaml is not a folder",
    "old.yaml/x/y.yaml": "old.yaml/x/y.yaml: there is no folder old.yaml/x",
    "": "is empty; give a file",
    " ": "is empty; give a file",
    "a\0b.yaml": r"a\x00b.yaml cannot be written: it holds a NUL character",
    "\ud800.yaml": r"\ud800.yaml cannot be written: 'utf-8' codec can't encode ...",
    "model.yaml": "model.yaml is the file that MODEL reads; give another",
    "./model.yaml": "./model.yaml is the file that MODEL reads; give another",
    "folder.yaml/../model.yaml": "folder.yaml/../model.yaml is the file that MODEL reads; give another",
    "model-link.yaml": "model-link.yaml is the file that MODEL reads; give another",
    "model-hard.yaml": "model-hard.yaml is the file that MODEL reads; give another",
}


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a command begins to work."""

    def begun(*arguments: Any, **settings: Any) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(powerplan, "recommend", begun, raising=False)
    monkeypatch.setattr("powerplan.cli.profile._session", begun)
    monkeypatch.setattr("powerplan.profile.load_profile", begun)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("path", REFUSED, ids=lambda path: ascii(path)[:30])
@pytest.mark.parametrize("command", ["recommend --write", "profile --save"])
def test_a_target_that_cannot_be_written(
    path: str, command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(folder)
    name, option = command.split()
    assert main([name, "model.yaml", "--force", option, path]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    begin, dots, _ = f"error: {option}: {REFUSED[path]}".partition("...")
    assert line.startswith(begin)
    assert dots or line == begin
    assert contents(folder) == before


PAIRS = {
    "recommend --write x.png --plot x.png": "--plot: x.png is the file of --write too; give two files",
    "recommend --write x.png --plot ./x.png": "--plot: ./x.png is the file of --write too; give two files",
    "recommend --write x.png --plot folder.yaml/../x.png": "--plot: folder.yaml/../x.png is the file of --write ...",
    "profile --save x.svg --plot x.svg": "--plot: x.svg is the file of --save too; give two files",
    "recommend --write same.png --plot old.png": "--plot: old.png is the file of --write too; give two files",
    "recommend --write same-hard.png --plot old.png": "--plot: old.png is the file of --write too; give two files",
    "recommend --plot x.gif": "--plot: x.gif must end in .png, .svg, .pdf",
    "recommend --plot x": "--plot: x must end in .png, .svg, .pdf",
    "profile --plot x.PNG.": "--plot: x.PNG. must end in .png, .svg, .pdf",
    "recommend --measured old.json --write old.json": "--write: old.json is the file that --measured ...",
    "profile --show old.png --plot old.png": "--plot: old.png is the file that --show reads; give another",
    "recommend config --write config/config.json": "--write: config/config.json is the file that MODEL reads; ...",
}


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("command", PAIRS)
def test_targets_that_are_something_else_already(
    command: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("same.png").symlink_to("old.png")
    os.link("old.png", "same-hard.png")
    Path("config").mkdir()
    Path("config/config.json").write_text("{}")
    before = contents(folder)
    assert main([*command.split(), "--force"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    begin, dots, _ = f"error: {PAIRS[command]}".partition("...")
    assert captured.err.startswith(begin if dots else f"{begin}\n")
    assert captured.err.count("\n") == 1
    assert contents(folder) == before


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(("code", "number"), [(2, errno.EACCES), (2, errno.EROFS), (4, errno.ENOSPC), (4, errno.EIO)])
def test_a_folder_that_takes_no_file(
    code: int, number: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch(path: Path, *arguments: Any, **settings: Any) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(Path, "touch", touch)
    assert main(["recommend", "model.yaml", "--write", "new.yaml"]) == code
    assert capsys.readouterr().err == f"error: --write: new.yaml cannot be written: {os.strerror(number)}\n"


AS_ANOTHER = """
import os, sys
from powerplan.errors import InputError
from powerplan.output import check_targets
os.setuid(65534)
os.chdir(sys.argv[1])
for path in ("new.yaml", "theirs.yaml"):
    try:
        check_targets({"--write": path}, True)
    except InputError as error:
        print(error)
"""
"""Check two files of a folder as a user who may write neither."""


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
def test_a_folder_without_permission_for_a_user() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:  # The folders above tmp_path are root's alone.
        Path(name).chmod(0o755)
        Path(name, "theirs.yaml").write_bytes(OLD)
        done = subprocess.run([sys.executable, "-c", AS_ANOTHER, name], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        "--write: new.yaml cannot be written: Permission denied",
        "--write: theirs.yaml is read-only",
    ]


def test_a_working_directory_that_is_gone(folder: Path) -> None:
    Path("gone").mkdir()
    os.chdir("gone")
    shutil.rmtree(folder / "gone")
    with pytest.raises(InputError, match=r"out\.yaml cannot be written: No such file or directory"):
        check_targets({"--write": "out.yaml"}, True)


def test_a_socket(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        with pytest.raises(InputError, match="--write: socket is not a file that can be written"):
            check_targets({"--write": "socket"}, True)


def test_the_longest_names_are_written() -> None:
    for name in ("é" * 127, "𝄞" * 63, "a" * 255):
        check_targets({"--write": name}, False)
        write_whole(name, b"x", False, "--write")
        assert Path(name).read_bytes() == b"x"


def test_a_link_stays_and_its_file_is_written() -> None:
    write_whole("link.yaml", b"new", True, "--write")
    assert Path("link.yaml").is_symlink()
    assert Path("old.yaml").read_bytes() == b"new"
    assert Path("hard.yaml").read_bytes() == OLD  # Another name of the old file, which has been replaced.


def test_permissions_follow_the_umask() -> None:
    before = os.umask(0o027)
    try:
        write_whole("new.yaml", b"new", False, "--write")
    finally:
        os.umask(before)
    assert Path("new.yaml").stat().st_mode & 0o777 == 0o640


def failing(number: int) -> Callable[..., Any]:
    def fail(*arguments: Any, **settings: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def test_without_hard_links(number: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", failing(number))
    write_whole("new.yaml", b"new", False, "--write")
    after = contents(folder)
    assert after.pop("new.yaml") == b"new"
    appear = Path("late.yaml")
    monkeypatch.setattr(os, "link", lambda *names: appear.write_bytes(OLD) and failing(number)())
    with pytest.raises(InputError, match=r"late\.yaml exists; --force overwrites it"):
        write_whole("late.yaml", b"new", False, "--write")
    assert appear.read_bytes() == OLD
    monkeypatch.setattr(os, "link", failing(number))
    monkeypatch.setattr(Path, "replace", failing(errno.EIO))
    with pytest.raises(MachineError, match=r"failed\.yaml cannot be written: Input/output error"):
        write_whole("failed.yaml", b"new", False, "--write")
    appear.unlink()
    Path("new.yaml").unlink()
    assert contents(folder) == after


def test_a_file_that_appears_meanwhile_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def late(source: Path, target: Path) -> None:
        target.write_bytes(OLD)
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    before = contents(folder)
    with pytest.raises(InputError, match=r"--write: new\.yaml exists; --force overwrites it"):
        write_whole("new.yaml", b"new", False, "--write")
    assert contents(folder) == before | {"new.yaml": OLD}


STEPS = [(os, "fsync"), (Path, "open"), (Path, "replace")]


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step[1])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), RuntimeError()]
)
def test_nothing_is_left_of_a_write_that_fails(
    step: tuple[Any, str], error: BaseException, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C comes once the step is done, as signals do; the others come in its place."""
    before, do = contents(folder), getattr(*step)

    def fail(*arguments: Any, **settings: Any) -> None:
        if isinstance(error, KeyboardInterrupt):
            result = do(*arguments, **settings)
            if step[1] == "open":
                result.close()
        raise error

    monkeypatch.setattr(*step, fail)
    with pytest.raises(MachineError if isinstance(error, OSError) else type(error)):
        write_whole("old.yaml", b"new", True, "--write")
    monkeypatch.undo()
    after = contents(folder)
    if not (isinstance(error, KeyboardInterrupt) and step[1] == "replace"):
        assert after == before
    assert set(after) == set(before)


def test_the_disk_is_told_before_the_name_and_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    fsync, link = os.fsync, os.link

    def told(descriptor: int) -> None:
        done.append("folder" if Path(f"/dev/fd/{descriptor}").is_dir() else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", told)
    monkeypatch.setattr(os, "link", lambda *names: done.append("name") or link(*names))
    write_whole("new.yaml", b"new", False, "--write")
    assert done == ["file", "name", "folder"]


SMALL_FILES = """
import resource, signal, sys
from powerplan.cli import run
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
run()
"""
"""Run the command line where no file may grow beyond 100 bytes."""


@pytest.mark.parametrize("extra", [["--force"], []])
def test_a_file_that_outgrows_its_limit(folder: Path, extra: list[str]) -> None:
    assert resource.RLIMIT_FSIZE is not None
    before = contents(folder)
    target = "old.yaml" if extra else "new.yaml"
    command = [sys.executable, "-c", SMALL_FILES, "recommend", "model.yaml", "--ctx", "64k", "--write", target, *extra]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (4, f"error: --write: {target} cannot be written: File too large\n")
    assert "gpt2-small" in done.stdout  # What was found is printed all the same.
    assert contents(folder) == before


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_pipes_and_devices_take_the_content_as_it_is(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    for path in (f"/dev/fd/{writer}", "/dev/null"):
        check_targets({"--write": path}, False)
        write_whole(path, b"name: x", False, "--write")
    assert os.read(reader, 100) == b"name: x"
    check_targets({"--write": "/dev/null", "--plot": "/dev/null"}, False)
    with pytest.raises(MachineError, match="/dev/full cannot be written: No space left on device"):
        write_whole("/dev/full", b"name: x", False, "--write")
    os.mkfifo("fifo")
    with pytest.raises(MachineError, match="fifo cannot be written: No such device or address"):
        write_whole("fifo", b"name: x", False, "--write")


def test_a_pipe_that_is_read_slowly_gets_everything(pipe: tuple[int, int]) -> None:
    content = bytes(range(256)) * 2000
    writing = threading.Thread(target=write_whole, args=(f"/dev/fd/{pipe[1]}", content, False, "--write"))
    writing.start()
    read = b""
    while len(read) < len(content):
        read += os.read(pipe[0], 1000)
    writing.join()
    assert read == content


def test_an_output_is_no_place_where_standard_output_goes(folder: Path) -> None:
    code = "from powerplan.cli import run; run()"
    with Path("out.yaml").open("w") as out:
        for target in ("out.yaml", "/dev/stdout"):
            command = [sys.executable, "-c", code, "recommend", "model.yaml", "--write", target, "--force"]
            done = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True, check=False)
            message = f"error: --write: {target} is where standard output goes; give another file\n"
            assert (done.returncode, done.stderr) == (2, message)
    assert Path("out.yaml").read_bytes() == b""


def test_standard_output_can_be_the_file(folder: Path) -> None:
    code = "from powerplan.cli import run; run()"
    command = [sys.executable, "-c", code, "recommend", "model.yaml", "--ctx", "64k", "--format", "json"]
    command += ["--write", "/dev/stdout"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    Path("read.yaml").write_text(done.stdout[: done.stdout.index("{\n")], encoding="utf-8")
    assert load_model("read.yaml").spec.name.startswith("gpt2-small-")


def test_matplotlib_is_missed_before_anything_is_measured(
    no_work: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command in ("profile", "recommend"):
        assert main([command, "model.yaml", "--plot", "x.png"]) == 4
        message = "error: --plot needs matplotlib, and it is not installed: pip install matplotlib\n"
        assert capsys.readouterr().err == message
