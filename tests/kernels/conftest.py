"""Where the tests run, and memory that nobody has written to reads as NaN.

On a CPU, Triton's kernels run in its interpreter, with one thread to a worker. With POWERPLAN_TEST_DEVICE=cuda the same
tests run on a GPU: new tensors are on it unless they say otherwise, and kernels are compiled. That would hide a tensor
that an engine itself makes on the wrong device; benchmarks/support/gpu/ checks every engine without a default device.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch
from device import DEVICE, ON_GPU

if ON_GPU:
    # Deterministic mode refuses products of cuBLAS without it, and it is read when the first one starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_default_device(DEVICE)
elif find_spec("triton") is not None:
    from interpreter import quicken

    quicken()

CPU_ONLY = {
    "test_api.py": "refusals are made on the host, and values on a GPU are not looked at",
    "test_the_embedding_is_the_power_of_the_product": "no kernel runs",
    "test_the_tiled_embedding_is_the_power_of_the_product": "no kernel runs",
    "test_tiles_are_the_embedding_in_another_order": "no kernel runs",
    "test_the_counter_the_planner_and_dims_agree": "counts FLOPs of the torch engine, 100 shapes without a result",
    "test_tuning_takes_the_fastest_and_times_a_shape_once": "compiles 30 blocks one after another, which takes minutes",
}
"""Tests, and files of tests, that only make sense on a CPU, with the reason."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name in (item.path.name, item.name.partition("[")[0]):
            if ON_GPU and item.path.parent.name == "kernels" and name in CPU_ONLY:
                item.add_marker(pytest.mark.skip(reason=f"on a CPU only: {CPU_ONLY[name]}"))


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # In deterministic mode torch.empty is filled with NaN: a kernel that leaves a hole cannot pass by luck.
    # On a GPU torch's own sums along a dim have no deterministic form, and may only warn.
    torch.use_deterministic_algorithms(True, warn_only=ON_GPU)
    warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation", category=UserWarning)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    if ON_GPU:
        _leave_where_the_device_is_lost()


def _leave_where_the_device_is_lost() -> None:
    """End this worker of pytest-xdist after an illegal access: all later tests of the process would fail for it.

    xdist names the test, and starts another worker for those that are left.
    """
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            raise
        os.write(2, f"\nthe device is lost: {str(error).splitlines()[0]}\n".encode())
        os._exit(3)
