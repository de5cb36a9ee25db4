"""Random targets of --write, --save and --plot: written whole, or refused with nothing begun and nothing changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzzing import PROFILE, Ended, check_contract, fuzz, run
from hypothesis import given
from hypothesis import strategies as st

import powerplan
from powerplan.cli import profile as profile_command
from powerplan.load import catalogue_text
from powerplan.profile import load_profile, to_json

SUFFIXES = ["", ".yaml", ".json", ".png", ".svg", ".pdf", ".gif", ".PNG"]
NAMES = [
    "new",
    "old",
    "fixed",
    "folder",
    "dangling",
    "loop",
    "link",
    "hard",
    "inside",
    "pipe",
    "é" * 120,
    "a" * 300,
    "\udcff",
]
FOLDERS = [
    "",
    "./",
    "folder/",
    "folder/../",
    "closed/",
    "no/",
    "old.yaml/",
    "linked/",
    ".//",
    "/proc/",
    "/no/",
    "~/",
]  # No folder outside the test's own that could be written to.
FIGURE = b"a figure"


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Go to a folder for the tests, and let no command work: they give answers that are known before."""
    answer, measured = powerplan.recommend("gpt2-small", "64k"), load_profile(str(PROFILE))
    folder = tmp_path_factory.mktemp("targets")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(powerplan, "recommend", lambda *arguments, **settings: answer)
        patch.setattr(profile_command, "_session", lambda *arguments: measured)
        patch.setattr("powerplan.profile.load_profile", lambda path: measured)
        patch.setattr(profile_command, "_measured", lambda session, signals: measured)
        for command in ("recommend", "profile"):
            patch.setattr(f"powerplan.plots.{command}.{command}_figure", lambda *arguments: None)
        patch.setattr("powerplan.plots.figure.figure_bytes", lambda *arguments: FIGURE)
        patch.setattr("powerplan.plots.figure.check_library", lambda: None)
        patch.setattr("pathlib.Path.home", lambda: folder)
        yield folder
        os.chdir("/")


def fill(ground: Path) -> None:
    """Put one of each kind of what a path may lead to into the folder."""
    for path in ground.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    for name in ("folder", "closed"):
        (ground / name).mkdir()
    (ground / "linked").symlink_to("folder")
    (ground / "model.yaml").write_text(catalogue_text("gpt2-small"), encoding="utf-8")
    for suffix in (".yaml", ".json", ".png", ".svg"):
        for name in ("old", "fixed", "folder/inside"):
            (ground / f"{name}{suffix}").write_bytes(b"before")
        (ground / f"fixed{suffix}").chmod(0o444)
        (ground / f"folder{suffix}").mkdir()
        (ground / f"dangling{suffix}").symlink_to("gone")
        (ground / f"loop{suffix}").symlink_to(f"loop{suffix}")
        (ground / f"link{suffix}").symlink_to(f"old{suffix}")
        os.link(ground / f"old{suffix}", ground / f"hard{suffix}")
        os.mkfifo(ground / f"pipe{suffix}")


def contents(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        content = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = content
    return found


paths = st.builds("{}{}{}".format, st.sampled_from(FOLDERS), st.sampled_from(NAMES), st.sampled_from(SUFFIXES))
devices = st.sampled_from(
    ["/dev/null", "/dev/full", "/dev/stdin", "/proc/self/mem", "/sys/x", "/", ".", "..", "", " ", "-", "\0"]
)
targets = paths | paths | devices | st.text(max_size=8).filter(lambda text: "/" not in text)
models = st.sampled_from(["gpt2-small", "model.yaml", "./model.yaml", "old.yaml"])


@fuzz(300)
@given(
    first=targets,
    second=targets | st.none(),
    model=models,
    command=st.sampled_from(["recommend", "profile", "show"]),
    force=st.booleans(),
)
def test_targets(ground: Path, first: str, second: str | None, model: str, command: str, force: bool) -> None:
    fill(ground)
    before = contents(ground)
    words = {
        "recommend": ["recommend", model, "--ctx", "64k", "--write", first],
        "profile": ["profile", model, "--save", first],
        "show": ["profile", "--show", str(PROFILE), "--plot", first],
    }[command]
    if command != "show" and second is not None:
        words += ["--plot", second]
    ended = ends_well_but_for_streams([*words, *(["--force"] if force else [])])
    after = contents(ground)
    assert not [name for name in after if ".powerplan-" in name]
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    written = {
        line.removeprefix("note: wrote ").split(": ")[0] for line in ended.err.splitlines() if "note: wrote " in line
    }
    assert len(changed) <= len(written)
    assert before.keys() <= after.keys()
    if not force:
        assert not changed & before.keys()
    expected = {b"before", FIGURE, to_json(load_profile(str(PROFILE)))}
    for name in changed:
        assert after[name] in expected or after[name].startswith(b"name: ")
    if ended.code == 2:
        assert not changed


def ends_well_but_for_streams(words: list[str]) -> Ended:
    """As ends_well, but where a write fails after the work (/dev/full, a pipe that nobody reads) there is an answer."""
    ended = run(words)
    if ended.code == 4 and ended.out:
        assert ended.err.splitlines()[-1].startswith("error: --")
    else:
        check_contract(ended)
    return ended
