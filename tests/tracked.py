"""What torch's own memory trackers find in a training step of a model: the oracle of powerplan.run's memory.

Models are made of fake tensors, which have sizes and no memory, so that a step takes no arithmetic. Mixtures of experts
read back how many rows each expert has, and run on real tensors.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._composable.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from powerplan.models import build_model
from powerplan.models.decoder import Decoder
from powerplan.spec import ModelSpec

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Tracked:
    """Bytes by the tracker's categories ("Sharded Param", "OptState", "Activation", "Temp" ...).

    at_peak: when their sum was highest. after_backward: at the end of the last backward pass, before the optimizer.
    """

    at_peak: dict[str, int]
    after_backward: dict[str, int]

    @property
    def activations(self) -> int:
        """What the forward pass made, and what the backward pass made beside gradients of weights."""
        return sum(self.at_peak.get(name, 0) for name in ("Activation", "Temp"))


def saved_by_layer(spec: ModelSpec, tokens: int, dtype: str) -> list[int]:
    """Return the bytes of all storages, but for weights, that autograd saves while each layer runs.

    A storage that several operators save counts once, in the first layer that saves it.
    """
    sizes: dict[int, int] = defaultdict(int)
    with _tensors(spec):
        model = build_model(spec, dtype=DTYPES[dtype])
        batch = _batch(spec, tokens)
        seen = {weight.untyped_storage()._cdata: weight.untyped_storage() for weight in model.parameters()}
        seen[batch.untyped_storage()._cdata] = batch.untyped_storage()
        current = [-1]

        def pack(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage._cdata not in seen:
                seen[storage._cdata] = storage
                sizes[current[0]] += storage.nbytes()
            return x

        for index, layer in enumerate(model.layers):
            layer.register_forward_pre_hook(lambda *_, at=index: current.__setitem__(0, at))
            layer.register_forward_hook(lambda *_: current.__setitem__(0, -1))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model.loss(batch)
    return [sizes[index] for index in range(len(model.layers))]


def tracked_step(spec: ModelSpec, tokens: int, dtype: str, *, checkpoint: bool = False) -> Tracked:
    """Return what MemTracker finds at the peak of a forward and backward pass on one sequence, in one format.

    Gradients are there from a step before. They take the same memory all the time, so that the peak of the sum is that
    of the activations.

    checkpoint: whether each layer keeps its input alone, by torch.utils.checkpoint.
    """
    with _tensors(spec):
        model = build_model(spec, dtype=DTYPES[dtype])
        _checkpoint(model, checkpoint)
        batch, tracker = _batch(spec, tokens), MemTracker()
        for weight in model.parameters():
            weight.grad = torch.zeros_like(weight)
        tracker.track_external(model)
        with tracker:
            model.loss(batch).mean().backward()
            after_backward = _by_category(tracker.get_tracker_snapshot("current"))
        return Tracked(_by_category(tracker.get_tracker_snapshot("peak")), after_backward)


def tracked_forward(spec: ModelSpec, tokens: int, dtype: str) -> int:
    """Return the bytes that MemTracker finds beside the weights at the peak of the layers' forward pass, no gradients.

    The caller of a layer lets its input go as soon as the layer does.
    """
    with FakeTensorMode(), torch.no_grad():
        model = build_model(spec, dtype=DTYPES[dtype])
        weights = sum(weight.nbytes for weight in model.parameters())
        stream = [torch.empty(1, tokens, spec.hidden_size, dtype=DTYPES[dtype])]
        tracker = MemTracker()
        tracker.track_external(model, stream[0])
        with tracker:
            for layer in model.layers:
                stream.append(layer(stream.pop(), None))
        return _by_category(tracker.get_tracker_snapshot("peak"))["Total"] - weights


def tracked_fsdp_steps(
    spec: ModelSpec, tokens: int, ranks: int, *, dtype: str = "bf16", checkpoint: bool = False
) -> Tracked:
    """Return what FSDPMemTracker finds at the peak of two steps of AdamW under FSDP2, on one of `ranks` devices.

    Weights are fp32; layers compute in `dtype`, and gradients are reduced in fp32. The second step has the optimizer's
    states from its start on. Each layer and the whole model are sharded modules.
    """
    with _process_group(ranks) as mesh, _tensors(spec):
        model = build_model(spec, dtype=torch.float32)
        _checkpoint(model, checkpoint)
        policy = MixedPrecisionPolicy(param_dtype=DTYPES[dtype], reduce_dtype=torch.float32)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh, mp_policy=policy)
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        batch, tracker = _batch(spec, tokens), FSDPMemTracker(model, optimizer)
        with tracker:
            for _ in range(2):
                _loss(model, batch).backward()
                after_backward = _by_category(tracker.get_tracker_snapshot("current"))
                optimizer.step()
                optimizer.zero_grad()
                tracker.reset_mod_stats()
        return Tracked(_by_category(tracker.get_tracker_snapshot("peak")), after_backward)


def _loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Return the mean of `Decoder.loss`, whose logits come from the model's forward, where FSDP gathers weights."""
    logits = model(batch[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2).float(), batch[:, 1:])


def _batch(spec: ModelSpec, tokens: int) -> torch.Tensor:
    """Return one sequence for which the model predicts `tokens` tokens."""
    return torch.randint(0, spec.vocab_size, (1, tokens + 1))


def _checkpoint(model: Decoder, wanted: bool) -> None:
    if wanted:
        for index, layer in enumerate(model.layers):
            model.layers[index] = checkpoint_wrapper(layer)


def _tensors(spec: ModelSpec) -> Any:
    return _one_thread() if spec.mixtures() else FakeTensorMode()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Real tensors are small here, and threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _by_category(snapshot: dict[torch.device, dict[Any, int]]) -> dict[str, int]:
    (device,) = [device for device in snapshot if device.type == "cpu"]
    return {str(getattr(name, "value", name)): size for name, size in snapshot[device].items()}


@contextmanager
def _process_group(ranks: int) -> Iterator[DeviceMesh]:
    """Run as rank 0 of a group whose collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        yield init_device_mesh("cpu", (ranks,))
    finally:
        dist.destroy_process_group()
