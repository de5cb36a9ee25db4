"""Where kernel tests run: on the device of POWERPLAN_TEST_DEVICE; without it on the CPU, in Triton's interpreter."""

from __future__ import annotations

import os

import torch

DEVICE = os.environ.get("POWERPLAN_TEST_DEVICE", "cpu")
"""The default device of all tensors in kernel tests: cpu, cuda or cuda:1."""

ON_GPU = DEVICE != "cpu"


def triton_dtypes() -> tuple[torch.dtype, ...]:
    """Return the dtypes that Triton's kernels can be tested in: its interpreter cannot multiply bfloat16."""
    return (torch.float32, torch.float16, torch.bfloat16) if ON_GPU else (torch.float32, torch.float16)
