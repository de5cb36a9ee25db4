"""MODEL that cannot be read: nothing there, no permission, no text, too large, a folder, a pipe, a device."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from children import HUNG_S

from powerplan.cli import main
from powerplan.load import catalogue_text, load_model

SCRIPT = Path(sys.executable).with_name("powerplan")
LISTS = "(powerplan models lists them)"

CONTENT = {
    "UTF-16": ("name: tiny".encode("utf-16"), "is not UTF-8 text (byte 0xff at offset 0)"),
    "UTF-16 without a mark": ("name: tiny".encode("utf-16-le"), "is not text (a NUL character at offset 1)"),
    "Latin-1": ("name: café".encode("latin-1"), "is not UTF-8 text (byte 0xe9 at offset 9)"),
    "binary": (b"\x7fELF\x02\x01\x01\x00\x00", "is not text (a NUL character at offset 7)"),
    "NUL": (b"name: a\0b", "is not text (a NUL character at offset 7)"),
    "half a surrogate pair": (b"name: \xed\xa0\x80", "is not UTF-8 text (byte 0xed at offset 6)"),
    "more than 1 MiB": (b"#" * (2**20 + 1), "is larger than 1 MiB; a model spec is a few kilobytes"),
}

NAMES = {
    "": "MODEL: is empty; give a file, a folder with a config.json, or a catalogue name",
    " \n": "MODEL: is empty; give a file, a folder with a config.json, or a catalogue name",
    "missing.yaml": "missing.yaml: no such file",
    "missing.YML": "missing.YML: no such file",
    "missing.json": "missing.json: no such file",
    "missing/model.yaml": "missing/model.yaml: no such file",
    "./gpt2-small": "./gpt2-small: no such file or folder",
    "../llama-3-8b": "../llama-3-8b: no such file or folder",
    "/missing/gpt2-small": "/missing/gpt2-small: no such file or folder",
    "models/mine/gpt2-small": "'models/mine/gpt2-small' is neither a file nor a built-in model; did you mean ...",
    "https://huggingface.co/gpt2": "'https://huggingface.co/gpt2' is neither a file nor a built-in model ...",
    "gpt2-smal": "'gpt2-smal' is neither a file nor a built-in model; "
    f"did you mean gpt2-small, gpt2-xl or gpt2-124m? {LISTS}",
    "lama-3-8b": "'lama-3-8b' is neither a file nor a built-in model; "
    f"did you mean llama-3-8b, llama-3.1-8b or llama-3-70b? {LISTS}",
    "llama": "'llama' is neither a file nor a built-in model; "
    f"did you mean llama-2-7b, llama-3-8b or llama-2-70b? {LISTS}",
    "zzz": f"'zzz' is neither a file nor a built-in model {LISTS}",
    "q\0z": rf"'q\x00z' is neither a file nor a built-in model {LISTS}",
    "a\0b.yaml": r"a\x00b.yaml: cannot be read: embedded null byte",
    "a\nb\x1b[2J": rf"'a\nb\x1b[2J' is neither a file nor a built-in model {LISTS}",
    "a\nb\x1b[2J.yaml": r"a\nb\x1b[2J.yaml: no such file",
    "\udcff.yaml": r"\udcff.yaml: no such file",
    "a" * 300: f"'{'a' * 55}...' is neither a file nor a built-in model {LISTS}",
    "a" * 300 + ".yaml": f"{'a' * 300}.yaml: cannot be read: File name too long",
    "a" * 100_000: f"'{'a' * 55}...' is neither a file nor a built-in model {LISTS}",
    "a" * 100_000 + ".yaml": f"{'a' * 1000} ... {'a' * 959}.yaml: cannot be read: File name too long",
}


@pytest.mark.parametrize("case", CONTENT)
@pytest.mark.parametrize("name", ["model.yaml", "config.json", "model"])
def test_a_file_that_is_no_text(
    expect_refusal: Callable[[list[str], str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    case: str,
) -> None:
    content, message = CONTENT[case]
    if case == "more than 1 MiB" and name == "config.json":
        content, message = 16 * content, "is larger than 16 MiB; a config.json has some megabytes at most"
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    expect_refusal(["models", name], f"{name}: {message}")


@pytest.mark.parametrize("model", NAMES, ids=lambda model: ascii(model)[:30])
def test_a_model_that_is_not_there(
    expect_refusal: Callable[[list[str], str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    monkeypatch.chdir(tmp_path)
    expect_refusal(["wsfr", model], NAMES[model])


def test_only_an_organisation_may_stand_before_a_name() -> None:
    assert load_model("openai-community/gpt2-small").origin == "catalogue: gpt2-small"


def test_folders(
    expect_refusal: Callable[[list[str], str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("spec.yaml").mkdir()
    Path("nested/config.json").mkdir(parents=True)
    expect_refusal(["wsfr", "empty"], "empty: is a folder without a config.json that can be read")
    expect_refusal(["wsfr", "spec.yaml"], "spec.yaml: is a folder without a config.json that can be read")
    expect_refusal(["wsfr", "nested"], "nested/config.json: is a folder, not a file")
    expect_refusal(["wsfr", "."], ".: is a folder without a config.json that can be read")


def test_no_permission(
    expect_refusal: Callable[[list[str], str], None], spec: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: str, flags: int) -> int:
        raise PermissionError(13, "Permission denied", path)

    arguments = spec("name: tiny")
    monkeypatch.setattr(os, "open", denied)
    expect_refusal(arguments, "model.yaml: cannot be read: permission denied")


def test_no_permission_to_look_into_a_folder(
    expect_refusal: Callable[[list[str], str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", denied)
    expect_refusal(["wsfr", "/secret/model"], "/secret/model: no such file or folder")


def test_a_read_that_fails_half_way(
    expect_refusal: Callable[[list[str], str], None], spec: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: str, flags: int) -> int:
        raise OSError(5, "Input/output error", path)

    arguments = spec("name: tiny")
    monkeypatch.setattr(os, "open", broken)
    expect_refusal(arguments, "model.yaml: cannot be read: Input/output error")


@pytest.mark.parametrize(
    ("device", "message"),
    [("/dev/null", "is empty"), ("/dev/zero", "is larger than 1 MiB; a model spec is a few kilobytes")],
)
def test_devices(expect_refusal: Callable[[list[str], str], None], device: str, message: str) -> None:
    expect_refusal(["wsfr", device], f"{device}: {message}")


def test_a_pipe_without_a_writer_does_not_hang(
    expect_refusal: Callable[[list[str], str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe.yaml")
    assert stat.S_ISFIFO(Path("pipe.yaml").stat().st_mode)
    expect_refusal(["wsfr", "pipe.yaml"], "pipe.yaml: is empty")


def test_a_pipe_with_a_writer_is_read() -> None:
    reader, writer = os.pipe()
    os.write(writer, catalogue_text("gpt2-small").encode())
    os.close(writer)
    try:
        assert load_model(f"/dev/fd/{reader}").spec.name == "gpt2-small"
    finally:
        os.close(reader)


def test_a_note_stays_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a\x1b[2J\n").mkdir()
    Path("a\x1b[2J\n/gpt2-small").write_text(catalogue_text("gpt2-small"))
    monkeypatch.chdir("a\x1b[2J\n")
    assert main(["models", "gpt2-small", "--format", "json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "note: read the file gpt2-small; there is also a built-in model of this name\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([b"wsfr", b"missing.yaml"], "missing.yaml: no such file"),
        ([b"wsfr", b"\xff\xfe.yaml"], r"\udcff\udcfe.yaml: no such file"),
        ([b"wsfr", b"gpt2-small", b"--ctx", b"64q"], "--ctx: '64q' is not a size in tokens; write 65536, 64k ..."),
        ([b"wsfr", b"gpt2-small", b"--ctx", b"\xff"], r"--ctx: '\udcff' is not a size in tokens; write ..."),
        ([b"hardware", b"h100"], "'h100' is not a known device; did you mean h100-sxm, h100-pcie or h100-sxm5? ..."),
        ([b"models", b"--yaml"], "--yaml: is for one model; such as powerplan models gpt2-small --yaml"),
    ],
)
def test_the_script_itself(arguments: list[bytes], message: str) -> None:
    process = subprocess.run([bytes(SCRIPT), *arguments], capture_output=True, text=True, check=False, timeout=HUNG_S)
    assert process.returncode == 2
    assert process.stdout == ""
    assert process.stderr.count("\n") == 1
    assert process.stderr.startswith(f"error: {message.removesuffix('...')}")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_said_in_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        process = subprocess.run([SCRIPT, "models"], stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert process.returncode == 4
    assert process.stderr == "error: cannot write the result: No space left on device\n"


def test_a_closed_output_is_no_traceback() -> None:
    command = f"'{SCRIPT}' models >&-; '{SCRIPT}' wsfr zzz 2>&-; echo $?"
    process = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert (process.stdout, process.stderr) == ("2\n", "")


def test_a_terminal_of_few_characters_gets_escapes() -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    command: list[str | Path] = [SCRIPT, "wsfr", "gpt2-small", "--ctx", "1k", "--explain"]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert process.returncode == 0
    assert r"2\xb712\xb7(64 + 64)\xb7512.5" in process.stdout
