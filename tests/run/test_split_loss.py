"""The peak of a cross entropy over logits that devices share, against what torch's allocator gives and takes back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import loss_parallel
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore

from powerplan.accounting import Accounting
from powerplan.load import catalogue_spec
from powerplan.run.degrees import Degrees
from powerplan.run.loads import model_load
from powerplan.run.memory import memory_of
from powerplan.run.recipe import Recipe
from powerplan.run.stages import stage_loads

TOKENS, ENTRIES, WIDTH = 256, 4096, 8


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Two ranks, of which this process is one; what they send goes nowhere."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def loss_of(mesh: DeviceMesh | None) -> None:
    """Run the loss forward and backward; with a mesh, this rank has one of two parts of the vocabulary."""
    hidden = torch.zeros(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    head = torch.zeros(ENTRIES, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(TOKENS, dtype=torch.long)
    if mesh is None:
        logits = hidden @ head.t()
        loss = F.cross_entropy(logits.float(), labels)
        del logits
        loss.backward()
        return
    part = DTensor.from_local(head.detach(), mesh, [Shard(0)]).requires_grad_()
    with loss_parallel():
        logits = DTensor.from_local(hidden, mesh, [Replicate()]) @ part.t()
        loss = F.cross_entropy(logits.float(), labels)
        del logits
        loss.backward()


def peak_bytes_a_logit(mesh: DeviceMesh | None) -> float:
    loss_of(mesh)  # What is made once, at the first call, does not count.
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        loss_of(mesh)
    assert found.profiler is not None
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak / TOKENS / ENTRIES


def planned_bytes_a_logit(tp: int) -> float:
    """Return what the loss of Llama 3 takes at its peak, less the input of the LM head that devices gather."""
    spec = catalogue_spec("llama-3-8b")
    model = model_load(Accounting(spec), 8192, Recipe())
    held = memory_of(model, list(enumerate(stage_loads(model, 1))), Degrees(tp=tp), 1)
    assert held.place == "the loss"
    gathered = 8192 * spec.hidden_size * 2 if tp > 1 else 0
    return (held.working - gathered) * tp / 8192 / spec.vocab_size


def test_one_device_has_three_fp32_tensors_of_its_logits() -> None:
    assert peak_bytes_a_logit(None) == pytest.approx(planned_bytes_a_logit(1), rel=0.01)


def test_devices_that_share_the_vocabulary_have_four(mesh: DeviceMesh) -> None:
    assert peak_bytes_a_logit(mesh) == pytest.approx(planned_bytes_a_logit(2), rel=0.01)
    assert planned_bytes_a_logit(2) == pytest.approx(16)
