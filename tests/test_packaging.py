"""Wheel, sdist and editable install: what is in them, and that they work from a folder of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DEPENDENCIES = sysconfig.get_path("purelib")

pytestmark = pytest.mark.packaging

USE = """
import importlib.util, sys
import powerplan, powerplan.kernels, powerplan.models
from powerplan.cli import main
sys.path.remove("")  # The current folder: a checkout has folders of these names.
assert not any(importlib.util.find_spec(name) for name in ("kernels", "models")), "a top-level module was installed"
assert main(["wsfr", "gpt2-small", "--ctx", "64k"]) == 0
assert main(["hardware", "h100-sxm"]) == 0
print(powerplan.__file__, powerplan.kernels.__file__, powerplan.models.__file__, sep="\\n")
"""


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--outdir", out, ROOT]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    (sdist,) = out.glob("*.tar.gz")
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


def run(folder: Path, python: str, code: str, *search: str) -> list[str]:
    """Run `code` in `folder` with `search` as PYTHONPATH and return the lines that it prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(search), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [python, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def use(folder: Path, python: str, *search: str) -> list[str]:
    """Run USE and return its last three lines, the packages' files."""
    lines = run(folder, python, USE, *search)
    assert any("1:4.89" in line for line in lines)
    return lines[-3:]


def test_the_wheel_holds_one_package_and_its_data(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        names = archive.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"powerplan", "powerplan_llm"}
    catalogue = {path.name for path in (ROOT / "models" / "catalogue").glob("*.yaml")}
    assert {Path(name).name for name in names if "models/catalogue/" in name} == catalogue
    for needed in (
        "hardware.yaml",
        "published.yaml",
        "training_runs.yaml",
        "py.typed",
        "kernels/__init__.py",
        "models/__init__.py",
        "webpage/page.html.j2",
        "webpage/page.js",
        "webpage/style.css",
    ):
        assert f"powerplan/{needed}" in names
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "powerplan").rglob("*.py")}
    assert sources <= set(names), f"not packaged: {sorted(sources - set(names))}"


def test_the_distribution_has_a_name_of_its_own(distributions: tuple[Path, Path]) -> None:
    """`powerplan` on the package index is another project; the command and the package keep that name."""
    assert all(path.name.startswith("powerplan_llm-") for path in distributions)
    with zipfile.ZipFile(distributions[1]) as archive:
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
        (scripts,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/entry_points.txt"))
    assert "\nName: powerplan-llm\n" in metadata
    assert "powerplan = powerplan.cli:run" in scripts
    assert "Requires-Dist: powerplan[" not in metadata


def test_nobody_is_told_to_install_another_project() -> None:
    files = [ROOT / "README.md", ROOT / "pyproject.toml", *(ROOT / "docs").glob("*.md")]
    files += [path for name in ("powerplan", "kernels", "models", "examples") for path in (ROOT / name).rglob("*.py")]
    for path in files:
        assert not re.search(r"install '?powerplan(?!-llm)\b|\bpowerplan\[\w", path.read_text(encoding="utf-8")), path


def test_the_wheel_works(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", tmp_path]
    subprocess.run([*pip, distributions[1]], check=True, capture_output=True)
    assert all(str(tmp_path) in path for path in use(tmp_path, sys.executable, str(tmp_path)))


def test_the_sdist_holds_what_a_build_and_a_reader_need(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    for needed in (
        "pyproject.toml",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "Makefile",
        "kernels/__init__.py",
        "models/catalogue/gpt2-small.yaml",
        "tests/test_packaging.py",
        "docs/accounting.md",
        "docs/assets/site.css",
        "mkdocs.yml",
        "examples/plan_in_a_notebook.ipynb",
    ):
        assert needed in names
    assert not any("__pycache__" in name for name in names)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return a copy of the sources in a folder named powerplan, and a Python that has it installed as `make` does."""
    folder = tmp_path_factory.mktemp("checkout")
    copy = folder / "powerplan"
    # A copy, because an editable install builds its links inside the checkout: these tests may run through such links.
    for name in ("powerplan", "kernels", "models"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    venv.create(folder / "venv", with_pip=False)
    python = str(folder / "venv" / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--editable", copy]
    installed = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert installed.returncode == 0, installed.stderr
    return copy, python


@pytest.mark.parametrize("place", ["elsewhere", "the folder above", "the checkout"])
def test_the_editable_install_works(checkout: tuple[Path, str], tmp_path: Path, place: str) -> None:
    """Python looks in the current folder first: there it must not take the checkout for the package, or half of it."""
    copy, python = checkout
    folder = {"elsewhere": tmp_path, "the folder above": copy.parent, "the checkout": copy}[place]
    # PYTHONPATH gives the dependencies; .pth files there are not read, so the other editable install stays out.
    files = use(folder, python, DEPENDENCIES)
    assert [Path(file).resolve() for file in files] == [
        copy / name / "__init__.py" for name in ("powerplan", "kernels", "models")
    ]


def test_an_edit_shows_at_once(checkout: tuple[Path, str], tmp_path: Path) -> None:
    copy, python = checkout
    version = copy / "powerplan" / "version.py"
    before = version.read_text(encoding="utf-8")
    edited = version.with_name("edited.py")
    edited.write_text('__version__ = "edited"\n', encoding="utf-8")
    edited.replace(version)  # As editors save: a new file takes the old one's name.
    try:
        printed = run(tmp_path, python, "import powerplan; print(powerplan.__version__)", DEPENDENCIES)
        assert printed == ["edited"]
    finally:
        version.write_text(before, encoding="utf-8")


@pytest.mark.parametrize("place", ["the folder above", "the checkout"])
def test_the_wheel_works_beside_a_checkout(
    distributions: tuple[Path, Path], checkout: tuple[Path, str], tmp_path: Path, place: str
) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        archive.extractall(tmp_path)
    copy, python = checkout
    # In the checkout Python finds the sources first, and then all three packages must be those of the checkout.
    folder, origin = (copy, copy) if place == "the checkout" else (copy.parent, tmp_path)
    assert all(Path(file).is_relative_to(origin) for file in use(folder, python, str(tmp_path), DEPENDENCIES))
