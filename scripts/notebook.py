"""Run examples/plan_in_a_notebook.ipynb and keep what its cells print and draw; it needs nbclient and ipykernel.

python scripts/notebook.py [TARGET.ipynb]
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "plan_in_a_notebook.ipynb"


def executed(notebook: Any) -> Any:
    """Run all cells of a notebook in a new process, in place, and return it; an error in a cell is raised."""
    from nbclient import NotebookClient
    from traitlets.config import Config

    # Through sockets in a folder: a port would be open to others on the machine.
    with TemporaryDirectory() as folder:
        config = Config({"KernelManager": {"transport": "ipc", "ip": str(Path(folder, "kernel"))}})
        NotebookClient(notebook, kernel_name="python3", timeout=300, config=config).execute(cwd=NOTEBOOK.parent)
    for cell in notebook.cells:
        cell.metadata.clear()  # When it began and ended.
        for output in cell.get("outputs", ()):
            if "text/markdown" in output.get("data", ()):
                del output["data"]["text/plain"]  # Addresses of objects, which are others in each run.
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def main() -> None:
    import nbformat

    notebook = executed(nbformat.read(NOTEBOOK, as_version=4))
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else NOTEBOOK
    target.write_text(f"{nbformat.writes(notebook)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
