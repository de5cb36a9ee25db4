"""Work for four processes: models over ranks that share sequences, and over ranks that share weights too (FSDP2)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from two_processes import HEADS, MIXERS, loss_of, small_model, some_tokens

from powerplan.ffn import MLP
from powerplan.kernels import ContextParallel
from powerplan.mixers import Attention, Lightning, RetNet
from powerplan.models import Cache, Decoder, build_model
from powerplan.models.mixers.base import SequenceMixer
from powerplan.rope import DynamicScaling, Rope
from powerplan.spec import LayerGroup, ModelSpec

COUNT = 4
STEPS = 50
TOKENS = 33  # of a row, the last of which is only predicted

KINDS: dict[str, Any] = MIXERS | {
    "sinks": Attention(**HEADS, window=8, sinks=True),
    "retnet": RetNet(heads=4, head_dim=8),
    "lightning": Lightning(heads=4, head_dim=8),
}
LAYOUTS: dict[str, Any] = {
    "contiguous": "contiguous",
    "zigzag": "zigzag",
    "uneven": [[(0, 20)], [], [(20, 21)], [(21, TOKENS - 1)]],
}


RATE = 0.05


def model_of(*mixers: Any, **fields: Any) -> Decoder:
    """Return a model with these mixers, of weights large enough to matter, the same each time."""
    ffn = MLP(intermediate_size=48, gated=True)
    groups = tuple(LayerGroup(mixer=mixer, ffn=ffn) for mixer in mixers)
    spec = ModelSpec(name="small", vocab_size=40, hidden_size=32, tie_embeddings=False, layers=groups)
    torch.manual_seed(0)
    model = build_model(msgspec.structs.replace(spec, **fields), dtype=torch.float64)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.ndim > 1 else 1)
    return model


def all_work(rank: int, folder: Path) -> None:
    found: dict[str, Any] = {"differences": {}}
    for kind, mixer in KINDS.items():
        for name, layout in LAYOUTS.items():
            found["differences"][f"{kind} {name}"] = difference(model_of(mixer), layout)
    found["differences"]["learned positions"] = difference(model_of(KINDS["power"], position_embeddings=40), "zigzag")
    scaled = Rope(scaling=DynamicScaling(factor=4.0, original_context=8))
    for layout in ("contiguous", "zigzag"):
        found["differences"][f"scaled RoPE {layout}"] = difference(
            model_of(KINDS["power"], KINDS["retnet"], rope=scaled), layout
        )
    found["packed"] = packed()
    found["curve"] = curve(small_model(dtype=torch.float64), STEPS)
    found["refusals"] = refusals()
    (folder / f"found-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def difference(model: Decoder, layout: Any) -> float:
    """Return by how much logits and gradients differ from those of one process, over their largest values."""
    tokens, plan = some_tokens(2, TOKENS), ContextParallel(tokens=TOKENS - 1, layout=layout)
    # model.loss is in float32, whatever the logits are.
    torch.testing.assert_close(model.loss(tokens, plan), plan.shard(model.loss(tokens)))
    logits = model(plan.shard(tokens[:, :-1]), cp=plan)
    cross_entropy(logits.flatten(0, 1), plan.shard(tokens[:, 1:]).flatten(), reduction="sum").backward()
    shared = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    for grad in shared:
        dist.all_reduce(grad)
    model.zero_grad()
    whole = model(tokens[:, :-1])
    cross_entropy(whole.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    alone = [weight.grad for weight in model.parameters() if weight.grad is not None]
    pairs = [(plan.unshard(logits), whole.detach()), *zip(shared, alone, strict=True)]
    return max(((one - two).abs().max() / two.abs().max()).item() for one, two in pairs)


def packed() -> float:
    """Return by how much the logits of packed sequences differ from those of each alone."""
    model, tokens = model_of(KINDS["power"], KINDS["linear"]), some_tokens(1, 30)
    plan = ContextParallel(cu_seqlens=[0, 7, 30], layout="zigzag")
    logits = plan.unshard(model(plan.shard(tokens), cp=plan))
    alone = torch.cat([model(tokens[:, :7]), model(tokens[:, 7:])], 1)
    return (logits - alone).abs().max().item()


def curve(model: Any, steps: int) -> list[float]:
    """Return the losses of steps of a model: rows over two ranks, tokens over two, weights over all four."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "cp"))
    everyone = init_device_mesh("cpu", (COUNT,))
    for layer in model.layers:
        fully_shard(layer, mesh=everyone)
    fully_shard(model, mesh=everyone)
    plan = ContextParallel(mesh["cp"], tokens=TOKENS - 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for step in range(steps):
        tokens = some_tokens(4, TOKENS, step % 5)
        own = tokens.chunk(2)[mesh["rows"].get_local_rank()]
        logits, targets = model(plan.shard(own[:, :-1]), cp=plan), plan.shard(own[:, 1:])
        # FSDP2 takes the mean of the ranks' gradients, and the loss is the sum of their losses.
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        loss = loss * COUNT / tokens[:, 1:].numel()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach() / COUNT
        dist.all_reduce(mean)
        losses.append(mean.item())
    return losses


def curve_alone(model: Decoder, steps: int) -> list[float]:
    """Return the losses of the same steps on one process."""
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for step in range(steps):
        loss = loss_of(model, some_tokens(4, TOKENS, step % 5))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return losses


def refusals() -> dict[str, str]:
    plan, tokens = ContextParallel(tokens=32), some_tokens(2, 8)
    bundle = ContextParallel(cu_seqlens=[0, 20, 32])
    calls: dict[str, Callable[[], Tensor]] = {
        "kind": lambda: SequenceMixer()(tokens, cp=plan),
        "cache": lambda: model_of(KINDS["power"])(tokens, Cache(), cp=plan),
        "tokens": lambda: model_of(KINDS["power"])(tokens[:, 1:], cp=plan),
        "packed": lambda: model_of(KINDS["softmax"])(tokens[:1], cp=bundle),
        "heads": lambda: model_of(Attention(heads=6, kv_heads=2, head_dim=8))(tokens, cp=plan),
        "positions": lambda: model_of(KINDS["power"], position_embeddings=30)(tokens, cp=plan),
    }
    said = {}
    for name, call in calls.items():
        try:
            call()
            said[name] = "no error"
        except ValueError as error:
            said[name] = str(error)
    return said
