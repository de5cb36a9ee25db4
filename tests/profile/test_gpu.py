"""What a profile does differently on a GPU, as far as it can be seen without one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from powerplan.hardware import Peak
from powerplan.load import catalogue_spec
from powerplan.profile import checks, machine, workload_of
from powerplan.profile import memory as profile_memory
from powerplan.profile.memory import bytes_needed, memory_limited
from powerplan.profile.record import Record
from powerplan.profile.result import CheckResult
from powerplan.profile.scheduler import COMPILE_S, Scheduler, TimeLimit
from powerplan.profile.workload import Point, Workload


def on_gpu(model: str = "llama-3-8b", **settings: Any) -> Workload:
    return workload_of(catalogue_spec(model), device="cuda", **settings)


@pytest.mark.parametrize(
    ("degrees", "dtype", "impl", "note"),
    [
        ("2", None, "triton", None),
        ("2", "fp32", "torch", "takes head dims of q and k up to 64 for p=2 in torch.float32, and it is 128"),
        ("3", None, "torch", "takes head dims of q and k up to 64 for p=3 in torch.bfloat16, and it is 128"),
    ],
)
def test_auto_is_triton_where_it_runs(degrees: str, dtype: str | None, impl: str, note: str | None) -> None:
    pytest.importorskip("triton")
    workload = on_gpu(degrees=degrees, dtype=dtype, against="softmax,linear")
    assert [timed.impl for timed in workload.subjects] == [impl]
    assert [timed.impl for timed in workload.baselines] == ["sdpa", "torch" if dtype == "fp32" else "triton"]
    found = [text for text in workload.notes if f"power p={degrees} runs on the torch engine: impl='triton' " in text]
    assert [text.partition("impl='triton' ")[2] for text in found] == ([] if note is None else [note])


def test_a_named_implementation_is_taken() -> None:
    assert [timed.impl for timed in on_gpu(degrees="3", impl="triton").subjects] == ["triton"]


@pytest.mark.parametrize(("supported", "dtype"), [(True, "bf16"), (False, "fp16")])
def test_the_dtype_is_one_that_the_gpu_has(supported: bool, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    assert machine.default_dtype("cuda") == dtype
    assert machine.default_dtype("cpu") == "fp32"


@pytest.mark.parametrize(("device", "index"), [("cuda", 3), ("cuda:1", 1)])
def test_memory_is_limited_on_a_numbered_device(device: str, index: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.cuda.set_per_process_memory_fraction raises for "cuda"."""
    limits: list[tuple[float, object]] = []
    fake = SimpleNamespace(
        current_device=lambda: 3,
        get_device_properties=lambda _: SimpleNamespace(total_memory=80e9),
        set_per_process_memory_fraction=lambda share, device: limits.append((share, device)),
    )
    monkeypatch.setattr(profile_memory, "torch", SimpleNamespace(cuda=fake, device=torch.device))
    with memory_limited(20_000_000_000, device):
        assert limits == [(0.25, index)]
    assert limits[1:] == [(1.0, index)]


def test_states_kept_by_triton_are_counted() -> None:
    """64k tokens in chunks of 2,048, K = V = 128: 32 states of 8 heads and 8,704 x 128 numbers, and their gradients."""
    workload = on_gpu(degrees="2")
    (subject,) = workload.subjects
    point = Point("state", "train", 65536)
    states = 32 * 8 * 8704 * 128
    bf16, fp16 = bytes_needed(workload, subject, point), bytes_needed(replace(workload, dtype="fp16"), subject, point)
    assert bf16 > 2 * 2 * states
    assert fp16 - bf16 == 2 * 2 * states


@pytest.mark.parametrize("kind", ["OutOfResources", "AssertionError"])
def test_a_kernel_that_does_not_fit_is_not_timed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's errors are neither ValueError nor RuntimeError; other errors are faults of this program."""
    error = type(
        kind, (Exception,), {"__module__": "triton.runtime.errors" if kind == "OutOfResources" else "builtins"}
    )

    def fails(*_: object) -> CheckResult:
        raise error("out of resource: shared memory, Required: 240000, Hardware limit: 232448")

    monkeypatch.setattr(checks, "check_kernel", fails)
    workload = on_gpu(degrees="2")
    record = Record(workload)
    if kind == "AssertionError":
        with pytest.raises(error):
            checks._check(workload, workload.subjects[0], record)
        return
    checks._check(workload, workload.subjects[0], record)
    assert record.able(workload.subjects) == []
    assert record.first_reason().endswith("out of resource: shared memory, Required: 240000, Hardware limit: 232448")


def test_time_to_compile_a_window_is_expected() -> None:
    workload = on_gpu(degrees="2")
    window = next(timed for timed in workload.baselines if timed.text.startswith("window"))
    peak = Peak("a GPU", 10**15, 3 * 10**12, "measured")  # type: ignore[arg-type]
    scheduler = Scheduler(
        workload, machine.Machine("cuda", "a GPU", lambda _: 0.0, 1e15, 3e12, peak, None), TimeLimit(60)
    )
    for context, part, compiles in ((65536, "state", True), (1024, "state", False), (65536, "ffn", False)):
        point = Point(part, "forward", context)
        assert scheduler.fits(window, point, COMPILE_S) is not compiles
        assert scheduler.fits(window, point, COMPILE_S + 10)
