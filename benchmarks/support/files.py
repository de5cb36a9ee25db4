"""Result files, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


def print_result(result: dict[str, Any], path: str | None) -> None:
    """Print a result as JSON, and keep it in a file where a path is given."""
    text = json.dumps(result, indent=2)
    print(text)
    if path is not None:
        Path(path).write_text(f"{text}\n", encoding="utf-8")


def write(data: dict[str, Any], path: Path) -> None:
    """Write JSON so that a reader finds the old file or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(json.dumps(data, indent=1) + "\n")
    os.chmod(file.name, 0o644)  # noqa: PTH101
    os.replace(file.name, path)  # noqa: PTH105
