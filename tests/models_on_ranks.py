"""Work for four processes: models over ranks that share sequences, and over ranks that share weights too (FSDP2)."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from attention_on_ranks import CountBytes
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from two_processes import HEADS, MIXERS, OVER_RANKS, loss_of, small_model, some_tokens

from powerplan.ffn import MLP, AnyFFN, MoE
from powerplan.kernels import ContextParallel
from powerplan.mixers import DSA, MLA, NSA, Attention, Forgetting, GatedDeltaNet, Lightning, MoBA, RetNet
from powerplan.models import Cache, Decoder, build_model, generate
from powerplan.models.cache import _tensors
from powerplan.models.mixers.attention import by_halo
from powerplan.models.mixers.base import SequenceMixer
from powerplan.rope import DynamicScaling, Rope
from powerplan.spec import LayerGroup, ModelSpec

COUNT = 4
STEPS = 50
TOKENS = 33  # of a row, the last of which is only predicted

LATENT: dict[str, Any] = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
ATTENTION: dict[str, Any] = {
    "softmax": MIXERS["softmax"],
    "window": MIXERS["window"],
    "sinks": Attention(**HEADS, window=8, sinks=True),
    "all tokens and sinks": Attention(**HEADS, sinks=True),
    "long window": Attention(heads=4, kv_heads=4, head_dim=8, window=30),
    "odd heads": Attention(heads=5, kv_heads=1, head_dim=8),
    "odd heads and sinks": Attention(heads=6, kv_heads=2, head_dim=8, sinks=True),
    "window of odd heads": Attention(heads=5, kv_heads=1, head_dim=8, window=8),
    "forgetting": MIXERS["forgetting"],
    "forgetting window": Forgetting(**HEADS, window=8),
    "forgetting of odd heads": Forgetting(heads=5, kv_heads=1, head_dim=8),
    # Latents are gathered where they are small; else tokens are swapped for heads.
    "mla": MLA(heads=4, q_lora_rank=12, kv_lora_rank=10, **LATENT),
    "mla of large latents": MLA(heads=4, kv_lora_rank=40, **LATENT),
    "mla of odd heads": MLA(heads=5, q_lora_rank=12, kv_lora_rank=10, **LATENT),
}
LATENTS = ("mla", "mla of large latents", "mla of odd heads")
PICKED: dict[str, Any] = {
    "moba": MoBA(**HEADS, block_size=4, top_k=3),
    "nsa": NSA(**HEADS, compress_size=4, compress_stride=2, select_size=4, select_count=4, window=7),
    "dsa": DSA(heads=4, q_lora_rank=12, kv_lora_rank=10, index_heads=2, index_head_dim=6, top_k=9, **LATENT),
}
"""Kinds whose queries pick keys. Where these are rounded, a rank and one process may pick others."""
CACHED = ("softmax", "window", "forgetting", "forgetting window", *PICKED, "mla", "power", "retnet")
KINDS: dict[str, Any] = (
    ATTENTION
    | PICKED
    | {
        "power": MIXERS["power"],
        "linear": MIXERS["linear"],
        "retnet": RetNet(heads=4, head_dim=8),
        "lightning": Lightning(heads=4, head_dim=8),
    }
)
LAYOUTS: dict[str, Any] = {
    "contiguous": "contiguous",
    "zigzag": "zigzag",
    "uneven": [[(0, 20)], [], [(20, 21)], [(21, TOKENS - 1)]],
}


RATE = 0.05
FFN = MLP(intermediate_size=48, gated=True)


def model_of(*mixers: Any, ffn: AnyFFN = FFN, **fields: Any) -> Decoder:
    """Return a model with these mixers, of weights large enough to matter, the same each time."""
    groups = tuple(LayerGroup(mixer=mixer, ffn=ffn) for mixer in mixers)
    spec = ModelSpec(name="small", vocab_size=40, hidden_size=32, tie_embeddings=False, layers=groups)
    torch.manual_seed(0)
    model = build_model(msgspec.structs.replace(spec, **fields), dtype=torch.float64)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4 if weight.ndim > 1 else 1)
    return model


def all_work(rank: int, folder: Path) -> None:
    found: dict[str, Any] = {"differences": {}, "packed": {}, "errors": {}, "continued": {}}
    for kind, mixer in KINDS.items():
        for name, layout in LAYOUTS.items():
            found["differences"][f"{kind} {name}"] = difference(model_of(mixer), layout)
        found["packed"][kind] = packed(model_of(mixer))
        found["continued"][f"{kind} zigzag"] = continued(model_of(mixer), "zigzag")
    hybrid = [KINDS[kind] for kind in ("window", "power", "softmax", "mla", "retnet")]
    for name, layout in LAYOUTS.items():
        found["continued"][f"hybrid {name}"] = continued(model_of(*hybrid), layout)
    for ranks in (2, 3):
        group = dist.new_group(list(range(ranks)))
        for kind, mixer in ATTENTION.items():
            if rank < ranks:
                more = {"heads": 6, "kv_heads": 6} if kind == "long window" else {"heads": 6}
                own = msgspec.structs.replace(mixer, **more) if ranks == 3 and mixer.heads == 4 else mixer
                found["differences"][f"{kind} on {ranks}"] = difference(model_of(own), "zigzag", group)
    for kind, mixer in ATTENTION.items():
        for dtype in ("float32", "bfloat16"):
            found["errors"][f"{kind} {dtype}"] = errors(mixer, getattr(torch, dtype))
    found["by halo"] = ways()
    found["drawn"], found["drawn_alone"] = drawn(rank)
    found["through a cache"] = through_a_cache(*(KINDS[kind] for kind in CACHED))
    found["traffic"] = traffic()
    found["checkpointed"] = checkpointed()
    experts = MoE(experts=4, top_k=2, intermediate_size=16)
    found["differences"]["experts"] = difference(
        model_of(KINDS["window"], KINDS["mla"], ffn=experts), LAYOUTS["uneven"]
    )
    found["continued"]["learned positions"] = continued(model_of(KINDS["power"], position_embeddings=40), "zigzag")
    found["differences"]["learned positions"] = difference(model_of(KINDS["power"], position_embeddings=40), "zigzag")
    scaled = Rope(scaling=DynamicScaling(factor=4.0, original_context=8))
    for layout in ("contiguous", "zigzag"):
        found["differences"][f"scaled RoPE {layout}"] = difference(
            model_of(KINDS["power"], KINDS["retnet"], rope=scaled), layout
        )
    found["curve"] = curve(small_model(*OVER_RANKS, dtype=torch.float64), STEPS)
    found["refusals"] = refusals()
    (folder / f"found-{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def difference(model: Decoder, layout: Any, group: dist.ProcessGroup | None = None) -> float:
    """Return by how much logits and gradients differ from those of one process, over their largest values."""
    tokens, plan = some_tokens(2, TOKENS), ContextParallel(group, tokens=TOKENS - 1, layout=layout)
    # model.loss is in float32, whatever the logits are.
    torch.testing.assert_close(model.loss(tokens, plan), plan.shard(model.loss(tokens)))
    return largest(results(model, tokens, plan), results(model, tokens))


def results(model: Decoder, tokens: Tensor, plan: ContextParallel | None = None) -> list[Tensor]:
    """Return the logits of all tokens, and the gradients of all weights: sums over the ranks of a plan."""
    model.zero_grad()
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    if plan is not None:
        inputs, targets = plan.shard(inputs), plan.shard(targets)
    logits = model(inputs, cp=plan)
    cross_entropy(logits.flatten(0, 1).double(), targets.flatten(), reduction="sum").backward()
    grads = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
    if plan is None:
        return [logits.detach(), *grads]
    for grad in grads:
        dist.all_reduce(grad, group=plan.group)
    return [plan.unshard(logits), *grads]


def largest(actual: list[Tensor], exact: list[Tensor]) -> float:
    """Return the largest difference of the pairs, each over the largest value of the second one."""
    pairs = zip(actual, exact, strict=True)
    return max(((one.double() - two.double()).abs().max() / two.abs().max()).item() for one, two in pairs)


def errors(mixer: Any, dtype: torch.dtype) -> list[float]:
    """Return the errors of a model over ranks and of one process in a dtype, against float64, and one rounding."""
    tokens, plan = some_tokens(2, TOKENS), ContextParallel(tokens=TOKENS - 1, layout="zigzag")
    model = model_of(mixer).to(dtype)
    exact = results(copy.deepcopy(model).double(), tokens)
    return [
        largest(results(model, tokens, plan), exact),
        largest(results(model, tokens), exact),
        torch.finfo(dtype).eps,
    ]


def packed(model: Decoder) -> float:
    """Return by how much the results of packed sequences differ from those of each alone."""
    bounds = [0, 7, 8, 32]
    plan, tokens = ContextParallel(cu_seqlens=bounds, layout="zigzag"), some_tokens(1, TOKENS)
    whole = [tokens[:, start : stop + 1] for start, stop in pairwise(bounds)]
    alone = [results(model, own) for own in whole]
    expected = [
        torch.cat([logits for logits, *_ in alone], 1),
        *map(sum, zip(*(grads for _, *grads in alone), strict=True)),
    ]
    return largest(results(model, tokens, plan), expected)


def continued(model: Decoder, layout: Any) -> dict[str, Any]:
    """Return what follows a prompt over ranks and of one process, and what their caches differ by."""
    prompt, plan = some_tokens(2, TOKENS - 1), ContextParallel(tokens=TOKENS - 1, layout=layout)
    caches = {"": Cache(), " alone": Cache()}
    found: dict[str, Any] = {
        "tokens": generate(model, prompt, 5, cache=caches[""], cp=plan).tolist(),
        "alone": generate(model, prompt, 5, cache=caches[" alone"]).tolist(),
        # A model of one layer may repeat itself: what it remembers says more.
        "cache": largest(
            *([x for slot in cache.slots for x in _tensors((slot.state, slot.ffn))] for cache in caches.values())
        ),
    }
    return found | {f"bytes{name}": cache.nbytes for name, cache in caches.items()}


def drawn(rank: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return tokens that are drawn over ranks, each with a generator of its own, and by this rank alone."""
    model, prompt = model_of(KINDS["power"]), some_tokens(2, TOKENS - 1)
    found = []
    for plan in (ContextParallel(tokens=TOKENS - 1), None):
        generator = torch.Generator().manual_seed(rank)
        found.append(generate(model, prompt, 8, temperature=1.0, generator=generator, cp=plan).tolist())
    return found[0], found[1]


def through_a_cache(*mixers: Any) -> float:
    """Return the difference of the gradients of tokens after a prompt, of a model that was given its cache by ranks."""
    model = model_of(*mixers)
    prompt, more = some_tokens(2, TOKENS - 1), some_tokens(2, 3, seed=1)
    plan = ContextParallel(tokens=TOKENS - 1, layout="zigzag")
    found = []
    for cp in (plan, None):
        model.zero_grad()
        cache = Cache()
        first = model(prompt if cp is None else cp.shard(prompt), cache, cp)
        # Every rank computes the same from its cache, so that each has as large a part in the loss.
        share = 1 if cp is None else cp.ranks
        loss = model(more, cache).square().sum() / share + first.square().sum()
        loss.backward()
        grads = [weight.grad.clone() for weight in model.parameters() if weight.grad is not None]
        for grad in grads if cp else []:
            dist.all_reduce(grad)
        found.append(grads)
    return largest(*found)


def checkpointed() -> float:
    """Return the difference of results with and without recomputation of the layers, which makes exchanges again."""
    model = model_of(*(ATTENTION[kind] for kind in ("softmax", "sinks", "mla", "mla of large latents")))
    tokens, plan = some_tokens(2, TOKENS), ContextParallel(tokens=TOKENS - 1, layout="zigzag")
    expected = results(model, tokens, plan)
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    return largest(results(model, tokens, plan), expected)


def ways() -> dict[str, bool]:
    """Return whether windows are exchanged by a halo; a group of ranks that cannot share heads has no other way."""
    found = {}
    plans = {" zigzag": ContextParallel(tokens=TOKENS - 1, layout="zigzag"), "": ContextParallel(tokens=400)}
    for name, kinds in ((" zigzag", ("window", "long window", "window of odd heads")), ("", ("long window",))):
        for kind in kinds:
            mixer = ATTENTION[kind]
            features = mixer.heads, mixer.kv_heads, mixer.head_dim, mixer.v_head_dim
            found[kind + name] = by_halo(plans[name], mixer.window, *features)
    return found


def traffic() -> dict[str, dict[str, int]]:
    """Return the bytes that this rank hands to torch.distributed in a layer, forward and backward, and the formulas."""
    found = {}
    for kind in ("window", "softmax", "odd heads", "mla", "mla of large latents", "mla of odd heads"):
        for tokens in (32, 320):
            model = model_of(ATTENTION[kind])
            plan = ContextParallel(tokens=tokens)
            own = plan.shard(some_tokens(2, tokens))
            model(own, cp=plan).sum().backward()  # compares arguments, once
            with CountBytes() as count:
                loss = model(own, cp=plan).sum()
            sent = {"forward": count.bytes}
            with CountBytes() as count:
                loss.backward()
            sent["backward"] = count.bytes
            for way in sent:
                planned = sent_numbers(ATTENTION[kind], plan, way == "backward") * 2 * 8  # rows, bytes of a number
                found[f"{kind} {tokens} {way}"] = {"sent": sent[way], "planned": planned}
    return found


def sent_numbers(mixer: Any, plan: ContextParallel, backward: bool) -> int:
    """Return the numbers of one row that a rank of four hands over, as docs/distributed.md has them."""
    t, ranks = plan.local_tokens, plan.ranks
    if isinstance(mixer, MLA):
        entry, heads = mixer.kv_lora_rank + mixer.qk_rope_head_dim, mixer.heads
        keys = mixer.qk_nope_head_dim + mixer.qk_rope_head_dim
        swapped = heads * (keys + mixer.v_head_dim)  # queries and outputs
        if heads % ranks:
            return t * entry * (plan.rank if backward else ranks - 1 - plan.rank)
        if mixer.kv_lora_rank > 30:
            return 2 * t * swapped
        return t * (swapped + entry * (ranks if backward else 1))
    kv = mixer.kv_heads * (mixer.head_dim + mixer.v_head_dim)
    if mixer.window:
        return (mixer.window - 1) * kv * int(plan.rank > 0 if backward else plan.rank + 1 < ranks)
    if mixer.heads % ranks:
        return t * kv * (plan.rank if backward else ranks - 1 - plan.rank)
    return t * (mixer.heads * (mixer.head_dim + mixer.v_head_dim) + kv * (ranks // mixer.kv_heads))


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
    filled = Cache()
    model_of(KINDS["power"])(tokens, filled)
    rank, started = plan.rank, ContextParallel(tokens=32).start(*torch.ones(2, 1, 8, 1, 4))

    def of_rank(
        mixer: Any, rows: int, dtype: torch.dtype = torch.float64, plan: ContextParallel | None = None
    ) -> Tensor:
        plan = ContextParallel(tokens=32) if plan is None else plan
        result: Tensor = model_of(mixer).to(dtype)(some_tokens(rows, 8), cp=plan)
        return result

    calls: dict[str, Callable[[], Tensor]] = {
        "kind": lambda: SequenceMixer()(tokens, cp=plan),
        "cache": lambda: model_of(KINDS["power"])(tokens, filled, cp=plan),
        "packed cache": lambda: model_of(KINDS["power"])(bundle.shard(some_tokens(1, 32)), Cache(), cp=bundle),
        "prompt": lambda: generate(model_of(KINDS["power"]), tokens, 1, cp=plan),
        "tokens": lambda: model_of(KINDS["power"])(tokens[:, 1:], cp=plan),
        "no plan": lambda: model_of(KINDS["power"])(tokens, cp=32),
        "no plan of a prompt": lambda: generate(model_of(KINDS["power"]), tokens, 1, cp=started),
        **{f"rows of {kind}": partial(of_rank, KINDS[kind], 1 + rank % 2) for kind in (*LATENTS, "softmax", "window")},
        "dtypes": lambda: of_rank(KINDS["softmax"], 1, torch.float32 if rank == 1 else torch.float64),
        "mixers": lambda: of_rank(KINDS["power" if rank == 2 else "softmax"], 1),
        "calls": lambda: of_rank(KINDS["mla"] if rank else GatedDeltaNet(heads=4, head_dim=8), 1),
        "packed rows": lambda: of_rank(KINDS["softmax"], 2, plan=bundle),
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
