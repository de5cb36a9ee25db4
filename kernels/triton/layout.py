"""How the Triton kernels lay out phi: steps of tile pairs, 8 x 8 rows each.

Features come in tiles of 8. For p >= 2 a step is a multiset of p tiles with one feature fixed in each of the first
p - 2: its 64 rows are all products of those with one feature of the lead tile and one of the last, so that a step of
phi is one outer product of two 8-wide slices, in registers. For p = 1 the only step is x itself. Weights (how many
orderings of the tiles there are) stand on the key side alone: phi(q) is plain, phi(k) carries them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations_with_replacement, product
from math import factorial, prod

import torch
from torch import Tensor

from powerplan.kernels.conversion import Conversion, conversion

TILE = 8
STEP_ROWS = TILE * TILE


def power_of_two(size: int) -> int:
    """Return the least power of two that is at least `size`, and at least 16, the least that a dot takes."""
    return max(16, 1 << (size - 1).bit_length())


def step_rows(d: int, p: int) -> int:
    """Return the rows of one step of phi for d features."""
    return power_of_two(d) if p == 1 else STEP_ROWS


@lru_cache(maxsize=32)
def steps(d: int, p: int) -> tuple[tuple[int, ...], ...]:
    """Return the steps of phi: p first features (single ones, the lead tile's, the last tile's) and the weight."""
    if p == 1:
        return ((0, 1),)
    found = []
    for tiles in combinations_with_replacement(range(-(-d // TILE)), p):
        weight = factorial(p) // prod(factorial(tiles.count(tile)) for tile in set(tiles))
        for within in product(range(TILE), repeat=p - 2):
            singles = tuple(tile * TILE + feature for tile, feature in zip(tiles, within, strict=False))
            if all(feature < d for feature in singles):
                found.append((*singles, tiles[-2] * TILE, tiles[-1] * TILE, weight))
    return tuple(found)


def step_count(d: int, p: int, group: int = 1) -> int:
    """Return the number of steps, padded to a multiple of `group`."""
    return -(-len(steps(d, p)) // group) * group


@lru_cache(maxsize=64)
def step_table(d: int, p: int, group: int, device: torch.device) -> Tensor:
    """Return the steps as int32 [steps, p + 1], padded to a multiple of `group` by steps of features beyond d."""
    table = list(steps(d, p))
    padding = ((2**20,) * p + (0,),) * (step_count(d, p, group) - len(table))
    return torch.tensor([*table, *padding], dtype=torch.int32, device=device)


@lru_cache(maxsize=16)
def step_conversion(d: int, p: int, group: int, device: torch.device) -> Conversion:
    """Return the conversion between the shared layout of states and rows of steps, padded to a multiple of `group`."""
    return conversion(_rows(d, p, group), d, p).to(device)


def _rows(d: int, p: int, group: int) -> Iterator[tuple[tuple[int, ...], int]]:
    if p == 1:
        yield from (((feature,), 1) for feature in range(step_rows(d, 1) * step_count(d, 1, group)))
        return
    for *singles, lead, last, weight in steps(d, p):
        for i, j in product(range(TILE), repeat=2):
            yield (*singles, lead + i, last + j), weight
    for _ in range((step_count(d, p, group) - len(steps(d, p))) * STEP_ROWS):
        yield (0,) * p, 0
