"""The arrows of docs/architecture.md, held: who imports whom, and what planning must not load."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from children import HUNG_S

ROOT = Path(__file__).resolve().parent.parent
PLANNING = [
    "import powerplan",
    "import powerplan.cli; assert powerplan.cli.main(['wsfr', 'gpt2-small', '--ctx', '64k']) == 0",
    "import powerplan.cli; assert powerplan.cli.main(['models']) == 0",
    "import powerplan.cli; assert powerplan.cli.main(['dims']) == 0",
    "import powerplan.cli; assert powerplan.cli.main(['dims', '--model', 'gpt2-small']) == 0",
    "import powerplan.cli; assert powerplan.cli.main(['hardware', 'h100-sxm']) == 0",
    "import powerplan.cli; assert powerplan.cli.main(['schema']) == 0",
    "import powerplan.cli; assert powerplan.cli.main(['recommend']) == 0",
    "import powerplan.cli; assert powerplan.cli.main(['budget', 'gpt2-small', '--flops', '1e21']) == 0",
    "import powerplan.cli; assert powerplan.cli.main(['budget', '--flops', '1e21']) == 0",
    "import powerplan.cli; assert powerplan.cli.main(['compare', 'gpt2-small', 'gpt2-xl']) == 0",
    "import powerplan.cli; assert powerplan.cli.main(['decode', 'gpt2-small']) == 0",
    "import powerplan.cli; assert powerplan.cli.main(['reproduce', 'all']) == 0",
    "import powerplan.cli; assert powerplan.cli.main(['profile', '--help']) == 0",
    "import powerplan.cli; assert powerplan.cli.main(['profile', '--p', '9']) == 2",
    "import powerplan.cli; assert powerplan.cli.main(['report', '--help']) == 0",
    "import powerplan; assert powerplan.page('gpt2-small', '64k').asked.context == 65536",
    "import powerplan.profile",
    "import powerplan.kernels",
    "import powerplan.models",
]

LAYERS = [
    {"errors", "textfiles", "units", "lists", "part", "dims", "dtypes", "balance", "choices", "curves", "version"},
    {"mixers", "ffn", "extras"},
    {"quantization", "rope"},
    {"spec"},
    {
        "documents",
        "validation",
        "typed",
        "huggingface",
        "load",
        "dump",
        "schema",
        "lookalikes",
        "accounting",
        "entries",
        "explanation",
        "shorthand",
        "longest",
        "hardware",
        "defaults",
        "doctor",
    },
    {"swap", "measured", "output", "lengths"},
    {"training", "serving", "run", "caches"},
    {"roofline"},
    {"search"},
    {"profile"},
    {"reproduce"},
    {"report"},
    {"plots"},
    {"answers"},
    {"webpage"},
    {"cli"},
    {"__main__"},
]
"""Modules of powerplan/ from the bottom: each may import its own row and those above it in this list."""


@pytest.mark.parametrize("code", PLANNING)
def test_planning_loads_no_torch(code: str) -> None:
    heavy = "{'torch', 'triton', 'transformers', 'numpy', 'matplotlib', 'jinja2', 'vl_convert'} & set(sys.modules)"
    script = f"import sys\n{code}\nloaded = {heavy}\nassert not loaded, loaded"
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, cwd=ROOT.parent, timeout=HUNG_S)


def imported(path: Path) -> set[str]:
    """Return the dotted names that a module imports, at its top or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def level(module: str) -> int:
    for index, names in enumerate(LAYERS):
        if module in names:
            return index
    raise AssertionError(f"powerplan/{module} has no place in the layers of tests/test_architecture.py")


def module_of(path: Path) -> str:
    return path.relative_to(ROOT / "powerplan").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sources("powerplan"), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows_point_down(path: Path) -> None:
    if path == ROOT / "powerplan" / "__init__.py":
        return
    own = level(module_of(path))
    for name in imported(path):
        package, _, rest = name.partition(".")
        module = rest.split(".")[0]
        if package != "powerplan" or not module:
            continue
        if module in ("kernels", "models"):
            message = f"{path.name} imports {name}: planning stands without them"
            assert module_of(path) in ("profile", "doctor"), message
            continue
        assert level(module) <= own, f"{path.name} imports {name}, which stands above it"


@pytest.mark.parametrize("path", sources("kernels"), ids=lambda path: str(path.relative_to(ROOT)))
def test_kernels_know_dimensions_only(path: Path) -> None:
    for name in imported(path):
        if name.startswith("powerplan."):
            assert name.startswith(("powerplan.kernels", "powerplan.dims")), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sources("models"), ids=lambda path: str(path.relative_to(ROOT)))
def test_models_know_specs_and_kernels(path: Path) -> None:
    allowed = ("models", "kernels", "spec", "rope", "mixers", "ffn", "dims", "errors")
    for name in imported(path):
        if name.startswith("powerplan."):
            assert name.split(".")[1] in allowed, f"{path.name} imports {name}"


def test_implementations_stand_alone() -> None:
    implementations = {"reference", "recurrent", "chunked"}
    for path in [ROOT / "kernels" / f"{name}.py" for name in implementations] + sources("kernels/triton"):
        names = imported(path)
        assert not {f"powerplan.kernels.{other}" for other in implementations - {path.stem}} & names


def test_triton_is_imported_by_its_kernels_alone() -> None:
    """Torch's engine runs where there is no triton: what needs it is imported when it is asked for."""
    assert not [path for path in (ROOT / "kernels").glob("*.py") if "triton" in imported(path)]
    script = "import sys, torch; from powerplan.kernels import power_attention as attend\n"
    script += (
        "x = torch.ones(1, 4, 1, 8); attend(x, x, x); loaded = {'powerplan.kernels.triton.run'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", f"{script}\nassert not loaded, loaded"], check=True, timeout=HUNG_S)


@pytest.mark.parametrize(
    "path",
    [
        path
        for folder in ("powerplan", "kernels", "models", "tests", "examples", "benchmarks")
        for path in sources(folder)
    ],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_files_have_one_subject(path: Path) -> None:
    assert path.read_text(encoding="utf-8").count("\n") <= 420


def test_every_module_has_its_place_in_the_page() -> None:
    """But for classes of kinds, whose names are those of their kinds."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    of_kinds = {ROOT / "powerplan" / "mixers", ROOT / "models" / "mixers", ROOT / "powerplan" / "run" / "export"}
    modules = [path for folder in ("powerplan", "kernels", "models") for path in sources(folder)]
    named = [path for path in modules if not path.stem.startswith("__") and path.parent not in of_kinds]
    assert len(named) > 200
    assert [str(path.relative_to(ROOT)) for path in named if not re.search(rf"\b{path.stem}\b", page)] == []


def test_torch_is_named_where_tensors_are() -> None:
    naming = [path for path in sources("powerplan") if {"torch", "triton"} & imported(path)]
    assert {module_of(path) for path in naming} == {"doctor", "profile", "huggingface"}
    assert [path.name for path in naming if module_of(path) == "huggingface"] == ["meta.py"]  # For --like alone.
