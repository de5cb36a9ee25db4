"""Where the time of one run goes: by kernel on a GPU, by stage of the algorithm and operator on a CPU."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from powerplan.profile.timing import Run


@dataclass(frozen=True)
class Part:
    """One kernel, stage or operator: how often it ran, and its own seconds."""

    name: str
    calls: int
    seconds: float


def recorder(gpu: bool, **settings: Any) -> Any:
    """Return torch's profiler, which would otherwise tell stderr when it starts and stops."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if gpu else [ProfilerActivity.CPU]
    return profile(activities=activities, **settings)


def breakdown(run: Run, device: str, most: int = 12) -> list[Part]:
    """Return the parts of one run that took longest, after a warm-up.

    On a CPU these are first the stages that the implementation marks ("power: ..."; they hold operators), then
    operators by their own time. On a GPU they are kernels.
    """
    import torch
    from torch._C._autograd import DeviceType

    run()
    gpu = device.startswith("cuda")
    with recorder(gpu) as record:
        run()
        if gpu:
            torch.cuda.synchronize()
    events = record.key_averages()
    if gpu:
        kernels = [event for event in events if event.device_type == DeviceType.CUDA]
        return _longest([Part(event.key, event.count, event.self_device_time_total / 1e6) for event in kernels], most)
    stages = [
        Part(event.key, event.count, event.cpu_time_total / 1e6) for event in events if event.key.startswith("power: ")
    ]
    operators = [
        Part(event.key, event.count, event.self_cpu_time_total / 1e6)
        for event in events
        if event.key.startswith("aten::")
    ]
    return _longest(stages, most) + _longest(operators, most)


def _longest(parts: list[Part], most: int) -> list[Part]:
    return sorted(parts, key=lambda part: -part.seconds)[:most]
