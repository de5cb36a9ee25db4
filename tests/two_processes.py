"""Work for two processes of torch.distributed: gradients of DDP, a step of FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from powerplan.ffn import MLP
from powerplan.mixers import NSA, RWKV7, AnyMixer, Attention, Forgetting, Linear, Mamba1, Mamba2, Power
from powerplan.models import Decoder, build_model
from powerplan.spec import LayerGroup, ModelSpec

COUNT = 2
RATE = 0.1


HEADS: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 8}
MIXERS: dict[str, AnyMixer] = {
    "softmax": Attention(**HEADS),
    "window": Attention(**HEADS, window=8),
    "power": Power(**HEADS, p=2, gated=True),
    "linear": Linear(**HEADS),
    "mamba1": Mamba1(inner_size=48, dt_rank=4, state_dim=4),
    "mamba2": Mamba2(heads=4, head_dim=12, state_dim=8, groups=2, chunk_size=16),
    "rwkv7": RWKV7(heads=4, head_dim=8, decay_rank=8, rate_rank=8, gate_rank=8, chunk_size=16),
    "forgetting": Forgetting(**HEADS),
    "nsa": NSA(**HEADS, compress_size=8, compress_stride=4, select_size=8, select_count=3, window=8),
}


OVER_RANKS = ("softmax", "window", "power", "linear")
"""Those of them that make the hybrid model over ranks."""


def small_spec(*kinds: str) -> ModelSpec:
    """One layer of each of `kinds`, or of all where there are none."""
    ffn = MLP(intermediate_size=48, gated=True)
    groups = tuple(LayerGroup(mixer=MIXERS[kind], ffn=ffn) for kind in kinds or MIXERS)
    return ModelSpec(name="small", vocab_size=40, hidden_size=32, tie_embeddings=False, layers=groups)


def small_model(*kinds: str, **settings: Any) -> Decoder:
    """Return the model of that spec, the same each time, its weights large enough for attention to matter."""
    torch.manual_seed(0)
    model = build_model(small_spec(*kinds), **settings)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.ndim > 1 else 1)
    return model


def some_tokens(rows: int = 4, count: int = 33, seed: int = 0) -> Tensor:
    return torch.randint(0, 40, (rows, count), generator=torch.Generator().manual_seed(seed))


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    """Return the mean loss through the model's forward, where the wrappers of torch.distributed do their work."""
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def gradients(model: Any) -> dict[str, Tensor]:
    return {name: weight.grad.clone() for name, weight in model.named_parameters()}


def all_work(rank: int, folder: Path) -> None:
    data_parallel(rank, folder)
    sharded(rank, folder)


def data_parallel(rank: int, folder: Path) -> None:
    """Save the gradients of DDP: each process has half of the rows."""
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(small_model(dtype=torch.float64))
    loss_of(model, some_tokens().chunk(COUNT)[rank]).backward()
    torch.save(gradients(model.module), folder / f"ddp-{rank}.pt")


def sharded(rank: int, folder: Path) -> None:
    """Build on the meta device, shard, fill, take one training step, and save the whole weights by safetensors."""
    from safetensors.torch import save_file
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (COUNT,))
    model = build_model(small_spec(), device="meta", dtype=torch.float64)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model.to_empty(device="cpu")
    torch.manual_seed(rank)
    model.init_weights()
    drawn = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        save_file(drawn, folder / "drawn.safetensors")
    whole = small_model(dtype=torch.float64).state_dict() if rank == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole, options=options)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    loss_of(model, some_tokens().chunk(COUNT)[rank]).backward()
    optimizer.step()
    after = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        save_file(after, folder / "after.safetensors")
