"""Wheel, sdist and editable install: what is in them, and that they work from a folder of their own."""

from __future__ import annotations

import os
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


def use(folder: Path, python: str, *search: str) -> list[str]:
    """Run USE in `folder` with `search` as PYTHONPATH and return the last three lines, the packages' files."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(search), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([python, "-c", USE], cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1:4.89" in done.stdout
    return done.stdout.splitlines()[-3:]


def test_the_wheel_holds_one_package_and_its_data(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        names = archive.namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"powerplan"}
    catalogue = {path.name for path in (ROOT / "models" / "catalogue").glob("*.yaml")}
    assert {Path(name).name for name in names if "models/catalogue/" in name} == catalogue
    for needed in ("hardware.yaml", "published.yaml", "py.typed", "kernels/__init__.py", "models/__init__.py"):
        assert f"powerplan/{needed}" in names
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "powerplan").rglob("*.py")}
    assert sources <= set(names), f"not packaged: {sorted(sources - set(names))}"


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
    ):
        assert needed in names
    assert not any("__pycache__" in name for name in names)


def test_the_editable_install_works(tmp_path: Path) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = str(tmp_path / "venv" / "bin" / "python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--editable", ROOT]
    installed = subprocess.run(pip, capture_output=True, text=True, check=False)
    assert installed.returncode == 0, installed.stderr
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    # PYTHONPATH gives the dependencies; .pth files there are not read, so the other editable install stays out.
    files = use(folder, python, DEPENDENCIES)
    assert files == [str(ROOT / name / "__init__.py") for name in ("powerplan", "kernels", "models")]
