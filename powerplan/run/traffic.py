"""What devices send each other in one step, as seconds per micro-batch or per step, by what it is for.

Every time is alpha-beta: a latency for each message and its bytes over the rate of the link (links.py). Which traffic
hides behind compute is decided in step.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from powerplan.run.degrees import Degrees
from powerplan.run.links import (
    Cluster,
    Link,
    all_gather_s,
    all_reduce_s,
    all_to_all_s,
    link_for,
    reduce_scatter_s,
    routed_s,
    send_s,
)
from powerplan.run.loads import ModelLoad
from powerplan.run.stages import StageLoad


@dataclass(frozen=True)
class Links:
    """The link of each group of devices that talk: neighbours in tp, then cp, then fsdp, then pp, then replicas.

    experts: of those that hold different experts. alike: of those that share the same ones, out of the shards.
    """

    tp: Link | None
    cp: Link | None
    shards: Link | None
    experts: Link | None
    alike: Link | None
    pp: Link | None
    replicas: Link | None


def links_of(cluster: Cluster, degrees: Degrees) -> Links:
    """Return the link of each group. InputError where a group needs one that is not known."""

    def link(ranks: int, stride: int) -> Link | None:
        return link_for(cluster, ranks, stride) if ranks > 1 else None

    within = degrees.tp * degrees.cp
    group = within * degrees.fsdp
    return Links(
        tp=link(degrees.tp, 1),
        cp=link(degrees.cp, degrees.tp),
        shards=link(degrees.shards, degrees.tp),
        experts=link(degrees.ep, degrees.tp),
        alike=link(degrees.shards // degrees.ep, degrees.tp * degrees.ep),
        pp=link(degrees.pp, group),
        replicas=link(degrees.replicas, group * degrees.pp),
    )


@dataclass(frozen=True)
class Traffic:
    """Seconds that a stage's devices send and receive.

    gather_s: weights of all layers, once, each pass. reduce_s: gradients, once. update_s: weights after the optimizer
    (zero 1 and 2), once a step. replicas_s: gradients of replicas, once a step. tensor_s: tensor parallelism, each pass
    of a micro-batch. experts_s: tokens to experts and back, each pass of a micro-batch. stage_s: one micro-batch to the
    next stage.
    """

    gather_s: float
    reduce_s: float
    update_s: float
    replicas_s: float
    tensor_s: float
    experts_s: float
    stage_s: float


def traffic_of(model: ModelLoad, load: StageLoad, degrees: Degrees, links: Links) -> Traffic:
    """Return the traffic of one stage.

    Gradients are reduced to the device that updates their weights, and with zero 0 to all (ZeRO, arXiv 1910.02054,
    section 7). Replicas add up what each device has then.
    """
    recipe, tp = model.recipe, degrees.tp
    size, gradient = float(recipe.activation_bytes), float(recipe.gradient_bytes)
    tokens = recipe.micro_batch * model.context / degrees.cp
    stream = tokens * model.spec.hidden_size * size
    gather = _by_layers(load, degrees, links, size, all_gather_s)
    reduce = _by_layers(load, degrees, links, gradient, reduce_scatter_s if degrees.zero else all_reduce_s)
    replicas = 0.0
    if links.replicas is not None:
        shard = load.all_parameters / tp / degrees.shards
        replicas = all_reduce_s(links.replicas, degrees.replicas, shard * gradient)
    tensor = 0.0
    if links.tp is not None:
        both = all_gather_s(links.tp, tp, stream) + reduce_scatter_s(links.tp, tp, stream)
        tensor = load.parts * both
    experts = 0.0
    if links.experts is not None and load.expert_layers:
        to_experts = float(recipe.sent_to_experts)
        sent = load.dispatched_bytes / load.expert_layers * tokens / tp
        there, back = (_experts_s(load, links.experts, degrees.ep, size) for size in (sent * to_experts, sent))
        experts = load.expert_layers * (there + back)
    stage = 0.0 if links.pp is None else send_s(links.pp, stream / tp)
    return Traffic(
        gather_s=gather if degrees.zero == 3 else 0.0,
        reduce_s=reduce,
        update_s=gather if degrees.zero in (1, 2) else 0.0,
        replicas_s=replicas,
        tensor_s=tensor,
        experts_s=experts,
        stage_s=stage,
    )


def _experts_s(load: StageLoad, link: Link, ranks: int, sent: float) -> float:
    """Return the seconds until the tokens of a device are at the experts of one layer, of which they send `sent` bytes.

    Where a router limits the nodes of a token, each node gets a token once. Otherwise each expert gets its own copy.
    """
    picks = load.experts.picks if load.experts is not None else None
    if picks is not None and load.experts is not None and link.across is not None:
        nodes = load.experts.nodes_sent_to(-(-ranks // link.members))
        if nodes is not None:
            return routed_s(link, ranks, sent / picks.picked, picks.picked, nodes)
    return all_to_all_s(link, ranks, sent)


def _by_layers(
    load: StageLoad, degrees: Degrees, links: Links, size: float, collective: Callable[[Link, int, float], float]
) -> float:
    """Return the seconds of a collective for each layer, over `size` bytes of each of its parameters.

    Routed experts that are split are shared by fewer devices than all else, and have a collective of their own.
    """
    whole = load.stored_parameters(degrees.ep) / degrees.tp * size
    experts = load.expert_parameters / degrees.ep / degrees.tp * size if degrees.ep > 1 else 0.0
    seconds = 0.0
    if links.shards is not None:
        seconds += load.layers * collective(links.shards, degrees.shards, (whole - experts) / max(load.layers, 1))
    if links.alike is not None and experts:
        alike = degrees.shards // degrees.ep
        seconds += load.expert_layers * collective(links.alike, alike, experts / load.expert_layers)
    return seconds
