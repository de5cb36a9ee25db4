"""`powerplan report`: where the page goes, what is said, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from powerplan.cli import main
from powerplan.errors import InputError
from powerplan.webpage.page import Page

ARGUMENTS = ["report", "gpt2-small", "--ctx", "64k"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str], code: int) -> str:
    """Run a command that must end with `code`, and return its one line of stderr."""
    assert main(arguments) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


def test_it_writes_plan_html_and_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vl_convert")
    assert main(ARGUMENTS) == 0
    captured = capsys.readouterr()
    text = (folder / "plan.html").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert "<code>powerplan report gpt2-small --ctx 64k</code>" in text
    assert "<code>powerplan recommend gpt2-small --ctx 64k --write new.yaml</code>" in text
    assert captured.out == ""
    size = f"{(folder / 'plan.html').stat().st_size / 1024:,.4g}"
    assert captured.err == f"note: wrote plan.html: {size} KiB, one page for a browser\n"


def test_a_file_that_exists_is_kept(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vl_convert")
    (folder / "mine.html").write_text("mine", encoding="utf-8")
    line = refused(capsys, [*ARGUMENTS, "-o", "mine.html"], 2)
    assert line == "error: --output: mine.html exists; --force overwrites it"
    assert (folder / "mine.html").read_text(encoding="utf-8") == "mine"
    assert main([*ARGUMENTS, "-o", "mine.html", "--force"]) == 0
    assert (folder / "mine.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_a_dash_is_standard_output(folder: Path, capsysbinary: pytest.CaptureFixture[bytes]) -> None:
    pytest.importorskip("vl_convert")
    assert main([*ARGUMENTS, "-o", "-"]) == 0
    out = capsysbinary.readouterr().out.decode()
    assert out.startswith("<!DOCTYPE html>")
    assert out.endswith("</html>\n")
    assert list(folder.iterdir()) == []


def test_it_never_writes_over_its_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model.yaml").write_text("name: mine", encoding="utf-8")
    line = refused(capsys, ["report", "model.yaml", "-o", "model.yaml", "--force"], 2)
    assert line == "error: --output: model.yaml is the file that MODEL reads; give another"


@pytest.mark.parametrize(("module", "package"), [("vl_convert", "vl-convert-python"), ("jinja2", "jinja2")])
def test_a_missing_library_is_one_message(
    module: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    pytest.importorskip("vl_convert")
    monkeypatch.setitem(sys.modules, module, None)
    line = refused(capsys, ARGUMENTS, 4)
    install = "pip install jinja2 vl-convert-python"
    assert line == f"error: report needs {package}, and it is not installed: {install}"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--devices", "8"], "--devices: needs the device; such as --gpu h100-sxm"),
        (["--tokens", "1B"], "--tokens: needs the device; such as --gpu h100-sxm"),
        (["--gpu", "h100"], "'h100' is not a known device; did you mean"),
        (["--measured", "none.json"], "none.json: no such file"),
        (["--top", "0"], "--top: 0 is out of range; allowed are 1 to 1,000"),
        (["-o", "no/plan.html"], "--output: no/plan.html: there is no folder no"),
    ],
)
def test_bad_options_are_one_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    pytest.importorskip("vl_convert")
    assert refused(capsys, [*ARGUMENTS, *arguments], 2).startswith(f"error: {message}")
    assert list(folder.iterdir()) == []


def test_python_saves_a_page_too(folder: Path, plain: Page) -> None:
    plain.save(folder / "page.html")
    assert (folder / "page.html").read_text(encoding="utf-8") == plain.html
    with pytest.raises(InputError, match=r"path: .*page\.html exists"):
        plain.save(folder / "page.html")
    plain.save(folder / "page.html", force=True)
