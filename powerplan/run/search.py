"""The layouts that fit, fastest first, over all degrees that divide the devices, recomputation and micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import get_args

from powerplan.choices import Recompute, Schedule
from powerplan.run.degrees import Degrees, problems
from powerplan.run.layouts import Layout, Layouts
from powerplan.run.recipe import Recipe

MICRO_BATCHES = (1, 2, 4, 8)
"""Sequences that a device works on at once, of those that are tried."""

INTERLEAVED = (1, 4)
"""Parts of a pipeline stage that are tried."""

MAX_TRIED = 6000
"""The most layouts that are worked out; of more degrees those with the least communication are tried."""

SLOWER = 1.03
"""Layouts within this factor of the fastest count as equally fast: the one with the fewest degrees is taken."""


@dataclass(frozen=True)
class Found:
    """The layouts of a search. best: the fastest that fits, or the one nearest to fitting. others: the fastest of each
    other sort of degrees that fit. tried: how many were worked out."""

    best: Layout
    others: tuple[Layout, ...]
    tried: int


def find_layouts(
    layouts: Layouts,
    recipe: Recipe,
    recompute: Sequence[Recompute],
    micro_batches: Sequence[int],
    degrees: Sequence[Degrees],
) -> Found | None:
    """Return the best layouts over all choices; None where no choice can share the batch.

    micro_batches: from the smallest on; bigger ones take more memory.
    """
    kept: dict[Degrees, Layout] = {}
    recipes = {
        (again, micro_batch): replace(recipe, recompute=again, micro_batch=micro_batch)
        for again in recompute
        for micro_batch in micro_batches
    }
    tried = 0
    for way in degrees:
        for micro_batch in micro_batches:
            sequences = layouts.sequences_for(way, micro_batch)
            if sequences is None:
                continue
            for again in recompute:
                layout = layouts.layout(way, recipes[again, micro_batch], sequences)
                tried += 1
                if way not in kept or _order(layout) < _order(kept[way]):
                    kept[way] = layout
                if layout.fits:
                    break  # Recomputing more only takes longer.
            if not kept[way].fits:
                break
    if not kept:
        return None
    ranked = sorted(kept.values(), key=_order)
    best = ranked[0]
    if best.fits:
        best = simplest_of_fastest([layout for layout in ranked if layout.fits])
    others = [layout for layout in ranked if layout is not best and layout.fits]
    return Found(best, tuple(others), tried)


def simplest_of_fastest(layouts: Sequence[Layout]) -> Layout:
    """Return the layout with the fewest degrees, of those within SLOWER of the fastest."""
    fastest = max(layout.tokens_per_s for layout in layouts)
    close = [layout for layout in layouts if layout.tokens_per_s * SLOWER >= fastest]
    return min(close, key=lambda layout: (_complexity(layout.degrees), _order(layout)))


def _order(layout: Layout) -> tuple[bool, float]:
    """Return what layouts are sorted by: those that fit by their time per token, others by what they lack."""
    return (False, -layout.tokens_per_s) if layout.fits else (True, layout.memory.peak)


def _complexity(degrees: Degrees) -> int:
    """Return how many kinds of parallelism beside FSDP are used: each is one more thing to set up."""
    return sum(value > 1 for value in (degrees.tp, degrees.pp, degrees.cp, degrees.ep, degrees.replicas))


def all_degrees(layouts: Layouts, zero: int = 3, schedule: Schedule = "1f1b") -> list[Degrees]:
    """Return the ways to split a model over the devices of the cluster, simple ones first.

    Tensor parallelism stays within a node, as half of its traffic hides behind nothing. Replicas are whole nodes or
    more.
    """
    spec, cluster = layouts.accounting.spec, layouts.setting.cluster
    experts = [ffn.experts for ffn in spec.mixtures()]
    ways = (
        Degrees(groups // replicas, tp, pp, cp, ep, replicas, parts, zero, schedule)
        for tp, pp, cp, groups in _splits(cluster.devices, cluster.node_devices)
        for replicas in _replicas(groups, tp * cp, cluster.node_devices)
        for ep in _experts(groups // replicas * cp, experts)
        for parts in (INTERLEAVED if pp > 1 else (1,))
    )
    possible = [way for way in ways if not any(problems(way, spec, layouts.context))]
    return sorted(possible, key=lambda way: (_complexity(way), way.tp * way.pp * way.cp))


def _splits(devices: int, node: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield tp, pp and cp that divide the devices, and how many groups of tp * pp * cp devices there are then."""
    for tp in _divisors(devices):
        if tp <= node:
            for pp in _divisors(devices // tp):
                for cp in _divisors(devices // tp // pp):
                    yield tp, pp, cp, devices // tp // pp // cp


def _replicas(groups: int, within: int, node: int) -> Iterator[int]:
    """Yield numbers of replicas, powers of two, that leave at least one node to share weights."""
    replicas = 1
    while groups % replicas == 0 and (replicas == 1 or groups // replicas * within >= node):
        yield replicas
        replicas *= 2


def _experts(shards: int, experts: Sequence[int]) -> Iterator[int]:
    for ep in _divisors(shards) if experts else (1,):
        if all(count % ep == 0 for count in experts):
            yield ep


@cache
def _divisors(number: int) -> tuple[int, ...]:
    small = [size for size in range(1, int(number**0.5) + 1) if number % size == 0]
    return tuple(sorted({*small, *(number // size for size in small)}))


RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)
"""From keeping all to keeping least."""
