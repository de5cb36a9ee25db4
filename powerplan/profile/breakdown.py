"""Where the time of one run goes: by kernel on a GPU, by stage of the algorithm and by operator on a processor."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch._C._autograd import DeviceType

from powerplan.profile.result import OperationTime
from powerplan.profile.timing import Run


def torch_profiler(gpu: bool, **settings: Any) -> Any:
    """Return torch's profiler as a context manager, silenced: it would write to stderr when it starts and stops."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]
    return profile(activities=activities, **settings)


def breakdown(run: Run, device: str, most: int = 12) -> list[OperationTime]:
    """Return the `most` operations of one run that took longest, after a warm-up. On a GPU they are kernels; on a
    processor first the stages that the implementation marks ("power: ...", each holds operators), then operators."""

    def longest(events: Iterable[Any], microseconds: str) -> list[OperationTime]:
        operations = [OperationTime(event.key, event.count, getattr(event, microseconds) / 1e6) for event in events]
        return sorted(operations, key=lambda operation: -operation.seconds)[:most]

    run()
    gpu = device.startswith("cuda")
    with torch_profiler(gpu) as record:
        run()
        if gpu:
            torch.cuda.synchronize()
    events = record.key_averages()
    if gpu:
        return longest((event for event in events if event.device_type == DeviceType.CUDA), "self_device_time_total")
    stages = longest((event for event in events if event.key.startswith("power: ")), "cpu_time_total")
    return stages + longest((event for event in events if event.key.startswith("aten::")), "self_cpu_time_total")
