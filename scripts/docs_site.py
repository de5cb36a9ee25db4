"""What the documentation site has beside docs/*.md; MkDocs calls it as a hook (mkdocs.yml).

README.md is the home page, CHANGELOG.md and the notebook are pages, and REFERENCE has the pages of the API. A link to
another file of the repository leads to a copy of it; one to a file that is not there fails the build.
"""

from __future__ import annotations

import base64
import json
import posixpath
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "build" / "docs-sources"
"""The package as it is installed, with kernels/ and models/ inside: what the API's pages are read from."""

NOTEBOOK = "examples/plan_in_a_notebook.ipynb"
PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", NOTEBOOK: "notebook.md"}
"""Files of the repository that are pages of the site, and the pages' paths. Those in docs/ are pages of their own."""

HOME = "---\nhide: [navigation]\n---\n\n"
"""What stands before the home page: it is the only page of its section."""

LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
"""The path in a markdown link, without its anchor."""

REFERENCE = {
    "powerplan": (
        "Planning, in Python and without torch. [Python](../api.md) shows how these are used together.",
        [
            "wsfr",
            "answers.wsfr.WsfrAnswer",
            "compare",
            "answers.compare.CompareAnswer",
            "recommend",
            "answers.recommend.RecommendAnswer",
            "search.result.Candidate",
            "solve",
            "answers.solve.SolveAnswer",
            "answers.solve.EqualStateAnswer",
            "degrees",
            "answers.degrees.DegreesAnswer",
            "budget",
            "answers.budget.BudgetAnswer",
            "training.Bought",
            "training.Budget",
            "answers.sizes.SizesAnswer",
            "train",
            "answers.train.TrainAnswer",
            "run.plan.TrainingPlan",
            "run.plan.PhasePlan",
            "run.layouts.Layout",
            "decode",
            "answers.decode.DecodeAnswer",
            "serving.Serving",
            "serving.Step",
            "answers.base.Answer",
            "page",
            "webpage.page.Page",
            "flops_per_step",
            "load_model",
            "LoadedModel",
            "ModelSpec",
            "Convention",
            "Accounting",
            "Row",
            "lengths.histogram.Lengths",
            "lengths.flops.DocumentRow",
            "Parameters",
            "tpow_dim",
            "spow_dim",
            "tiled_spow_dim",
            "PowerplanError",
            "InputError",
            "InfeasibleError",
            "MachineError",
        ],
    ),
    "powerplan.kernels": (
        "Power attention in torch and Triton. [Kernels](../kernels.md) explains engines, states and speeds, and "
        "[Several devices](../distributed.md) sequences that lie on several ranks.",
        [
            "power_attention",
            "power_attention_step",
            "power_state",
            "ContextParallel",
            "PowerState",
            "empty_state",
            "spow",
            "tiled_spow",
        ],
    ),
    "powerplan.models": (
        "Layers and models of a spec in torch. [Models](../models.md) and [transformers](../transformers.md) show them "
        "at work.",
        [
            "build_layer",
            "build_model",
            "Decoder",
            "Cache",
            "Slot",
            "generate",
            "use_power_attention",
            "power_class",
            "register_power_attention",
            "PowerCache",
        ],
    ),
}
"""Pages of the API, by package: the first paragraph, and the names in their order. One with a dot is of a module."""


def on_startup(**_: Any) -> None:
    """Make the folder of the sources: mkdocstrings drops paths that are not there when it reads its settings."""
    SOURCES.mkdir(parents=True, exist_ok=True)


def on_config(config: MkDocsConfig) -> None:
    """Lay out the sources that the API's pages are read from."""
    shutil.rmtree(SOURCES, ignore_errors=True)
    only_python = _ignoring_all_but(".py")
    shutil.copytree(ROOT / "powerplan", SOURCES / "powerplan", ignore=only_python)
    for name in ("kernels", "models"):
        shutil.copytree(ROOT / name, SOURCES / "powerplan" / name, ignore=only_python)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages that are not in docs/, and the files of the repository that pages link to."""
    from mkdocs.structure.files import File

    for source, page in PAGES.items():
        text = page_of(source)
        files.append(File.generated(config, page, content=HOME + text if page == "index.md" else text))
    for package in REFERENCE:
        files.append(File.generated(config, reference_path(package), content=reference_page(package)))
    sources = [*PAGES, *(f"docs/{file.src_uri}" for file in files.documentation_pages() if not file.generated_by)]
    for linked in sorted({path for source in sources for path in linked_files(source)}):
        files.append(File.generated(config, linked, abs_src_path=str(ROOT / linked)))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Return the page with its links to files of the repository led to where the site has them."""
    path = page.file.src_uri
    if path in PAGES.values() or path.startswith("reference/"):
        return markdown  # Made for the site.
    return relinked(markdown, f"docs/{path}" if (ROOT / "docs" / path).is_file() else path)


def page_of(source: str) -> str:
    """Return a file of the repository as a page of the site."""
    text = (ROOT / source).read_text(encoding="utf-8")
    return relinked(notebook_page(text) if source == NOTEBOOK else text, source)


def relinked(markdown: str, source: str) -> str:
    """Return markdown whose links between files of the repository are links between those of the site.

    Args:
        markdown: The text.
        source: The file that it is from, from the root of the repository.
    """
    here = posixpath.dirname(site_path(source))

    def lead(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        return posixpath.relpath(site_path(target), here or ".")

    # The name after ``` may be one word only.
    return LINK.sub(lead, markdown).replace("```console shape", "```console")


def site_path(source: str) -> str:
    """Return where the site has a file of the repository; both paths are from the root."""
    return PAGES.get(source, source.removeprefix("docs/"))


def linked_files(source: str) -> Iterator[str]:
    """Yield the files that a page links to, of those that are neither pages nor in docs/."""
    text = (ROOT / source).read_text(encoding="utf-8")
    for link in LINK.finditer(text):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        if target not in PAGES and not target.startswith("docs/") and (ROOT / target).is_file():
            yield target


def reference_path(package: str) -> str:
    return f"reference/{package.rpartition('.')[2]}.md"


def reference_page(package: str) -> str:
    """Return the page of the API of a package, in mkdocstrings' markdown."""
    text, names = REFERENCE[package]
    return "\n\n".join((f"# {package}", text, *(f"::: {package}.{name}" for name in names))) + "\n"


def notebook_page(text: str) -> str:
    """Return a notebook as markdown: its cells, and below each what it printed and drew.

    Outputs are text, markdown and PNG; of those that an output has, the richest is shown.
    """
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [_shown(output) for output in cell.get("outputs", ())]
    return "\n\n".join(parts) + "\n"


def _shown(output: dict[str, Any]) -> str:
    data = output.get("data") or {"text/plain": output["text"]}
    if "image/png" in data:
        image = base64.b64encode(base64.b64decode("".join(data["image/png"]))).decode()
        return f"![What the cell draws](data:image/png;base64,{image})"
    if "text/markdown" in data:
        return "".join(data["text/markdown"])
    return f"```text\n{''.join(data['text/plain']).rstrip()}\n```"


def _ignoring_all_but(suffix: str) -> Any:
    def ignored(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if not name.endswith(suffix) and not Path(folder, name).is_dir()]

    return ignored
