"""One thread to a worker, and memory that nobody has written to reads as NaN."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Read when a kernel is defined, so before any is imported: they run here in Triton's interpreter, on the CPU.
os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # In deterministic mode torch.empty is filled with NaN: a kernel that leaves a hole cannot pass by luck.
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
