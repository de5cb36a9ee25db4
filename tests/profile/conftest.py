"""A model small enough to be timed in a test, and one thread to a worker."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

TINY = """
name: tiny
vocab_size: 100
hidden_size: 32
norm: {kind: rmsnorm, per_layer: 2}
layers:
  - repeat: 2
    mixer: {kind: attention, heads: 4, kv_heads: 2, head_dim: 8}
    ffn: {kind: mlp, intermediate_size: 64}
"""


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_text() -> str:
    return TINY


@pytest.fixture
def tiny(tiny_text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write tiny.yaml into an empty working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(tiny_text, encoding="utf-8")
    return path
