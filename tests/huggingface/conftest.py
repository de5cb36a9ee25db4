"""Fixtures of the reader tests: a config.json in a temporary folder, and the packages that serve as oracles."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from powerplan.load import LoadedModel, load_model

Read = Callable[[dict[str, Any] | str], LoadedModel]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Write a config (a dict, or JSON text) to config.json, with one key to a line, and read it as a user would."""

    def write_and_load(config: dict[str, Any] | str) -> LoadedModel:
        path = tmp_path / "config.json"
        path.write_text(config if isinstance(config, str) else json.dumps(config, indent=2), encoding="utf-8")
        return load_model(path)

    return write_and_load


@pytest.fixture(scope="module")
def torch() -> Iterator[Any]:
    """torch on one thread: these models are too small for more, and under xdist the threads fight for the cores."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def transformers() -> Any:
    return pytest.importorskip("transformers")
