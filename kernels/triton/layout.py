"""How the Triton kernels lay out phi: in steps, each 8 x 8 products of two tiles of features.

Features come in tiles of 8. For p >= 2, a step is a multiset of p tiles with one feature fixed in each of the first p -
2. Its 64 rows are the products of these fixed features with one feature of the tile before last (the lead tile) and one
of the last tile, so that a step of phi is one outer product of two slices of 8, in registers. For p = 1 the only step
is x itself.

The same product occurs in (q.k)^p once for each order of the tiles. That number is the step's weight. It stands on the
key side alone: phi(q) is plain, phi(k) carries the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations_with_replacement, product
from math import factorial, prod

import torch
from torch import Tensor

from powerplan.kernels.conversion import Conversion, conversion

TILE = 8
"""Features of a tile: at K = 64 and p = 2, phi has 2,304 rows of 8-wide tiles for its 2,080 distinct entries."""

STEP_ROWS = TILE * TILE
"""Rows of a step of phi for p >= 2."""


def settle(device: torch.device) -> None:
    """Wait until a table that is about to be cached is filled: its next reader may be on another stream.

    A CUDA graph's capture can not wait. A call of the same shape before it has made the tables.
    """
    if device.type == "cuda" and not torch.cuda.is_current_stream_capturing():
        torch.cuda.current_stream(device).synchronize()


def power_of_two(size: int) -> int:
    """Return the least power of two that is at least `size`, and at least 16, the least that a dot takes."""
    return max(16, 1 << (size - 1).bit_length())


def padded_dim(size: int) -> int:
    """Return the least of 32, 64 and 128 that is at least `size`: what the kernels of hopper/ take."""
    return max(32, power_of_two(size))


def step_rows(d: int, p: int) -> int:
    """Return the rows of one step of phi for d features."""
    return power_of_two(d) if p == 1 else STEP_ROWS


@lru_cache(maxsize=32)
def steps(d: int, p: int) -> tuple[tuple[int, ...], ...]:
    """Return the steps of phi, each p features and a weight.

    The features are the p - 2 fixed ones, then the first of the lead tile, then the first of the last tile. For p = 2
    the pairs go around the tiles, so that each lead tile has as many: with n tiles, (a, a + i) modulo n for i < n / 2,
    a lead tile at a time, and for even n the pairs (a, a + n / 2) of the first half last. For p > 2 the lead tile runs
    slowest, then the tile of the last fixed feature, from the first to the lead tile, then the last tile, from the lead
    tile on; for p = 4 then the first fixed feature; and fastest the features of the fixed tile.
    """
    if p == 1:
        return ((0, 1),)
    tiles = -(-d // TILE)
    if p == 2:
        return tuple(_pairs(tiles))
    return tuple(_with_fixed(tiles, d, p))


def _pairs(tiles: int) -> Iterator[tuple[int, int, int]]:
    """Yield the pairs of tiles: the first features of both, and 1 for a tile with itself, else 2."""
    for lead in range(tiles):
        for ahead in range((tiles + 1) // 2):
            yield lead * TILE, (lead + ahead) % tiles * TILE, 2 if ahead else 1
    if tiles % 2 == 0:
        for lead in range(tiles // 2):
            yield lead * TILE, (lead + tiles // 2) * TILE, 2


def _with_fixed(tiles: int, d: int, p: int) -> Iterator[tuple[int, ...]]:
    """Yield the steps for p = 3 and 4: the fixed features, the first features of both tiles, and the weight."""
    for lead in range(tiles):
        for inner in range(lead + 1):
            stop = min(inner * TILE + TILE, d)
            for last, *outer in product(range(lead, tiles), *[range(stop)] * (p - 3)):
                chosen = [feature // TILE for feature in outer] + [inner, lead, last]
                weight = factorial(p) // prod(factorial(chosen.count(tile)) for tile in set(chosen))
                for feature in range(inner * TILE, stop):
                    yield (*outer, feature, lead * TILE, last * TILE, weight)


def step_count(d: int, p: int, group: int = 1) -> int:
    """Return the number of steps, padded to a multiple of `group`."""
    return -(-len(steps(d, p)) // group) * group


@lru_cache(maxsize=64)
def step_table(d: int, p: int, group: int, device: torch.device) -> Tensor:
    """Return the steps as int32 [steps, p + 1], padded to a multiple of `group` by steps of features beyond d."""
    table = list(steps(d, p))
    padding = ((2**20,) * p + (0,),) * (step_count(d, p, group) - len(table))
    made = torch.tensor([*table, *padding], dtype=torch.int32, device=device)
    settle(device)
    return made


@lru_cache(maxsize=16)
def step_conversion(d: int, p: int, width: int, group: int, device: torch.device) -> Conversion:
    """Return the conversion between the shared layout of states and rows of steps.

    width: features that the steps are of, d and padding. group: the steps are padded to a multiple of it.
    """
    made = conversion(_rows(width, p, group), d, p).to(device)
    settle(device)
    return made


def _rows(d: int, p: int, group: int) -> Iterator[tuple[tuple[int, ...], int]]:
    if p == 1:
        yield from (((feature,), 1) for feature in range(step_rows(d, 1) * step_count(d, 1, group)))
        return
    for *singles, lead, last, weight in steps(d, p):
        for i, j in product(range(TILE), repeat=2):
            yield (*singles, lead + i, last + j), weight
    for _ in range((step_count(d, p, group) - len(steps(d, p))) * STEP_ROWS):
        yield (0,) * p, 0


@dataclass(frozen=True)
class Squares:
    """Between the key part of PowerState for p = 2, [D], and Z = sum k k^T, [width, width], which is symmetric.

    An entry for features i < j holds sqrt(2) Z[i, j], one for i = j holds Z[i, i]: phi(q).phi(k) counts it so. Both
    conversions are their own adjoints for symmetric gradients, whose entry (i, j) is that of Z[i, j] with Z[j, i] held.
    """

    width: int
    entry: Tensor
    inverse_root: Tensor
    place: Tensor
    root: Tensor

    def to_square(self, key: Tensor) -> Tensor:
        """[..., D] -> [..., width, width]."""
        square = key.index_select(-1, self.entry) * self.inverse_root
        return square.view(*square.shape[:-1], self.width, self.width)

    def from_square(self, square: Tensor) -> Tensor:
        """[..., width, width] -> [..., D]."""
        return square.flatten(-2).index_select(-1, self.place) * self.root


@lru_cache(maxsize=16)
def squares(d: int, width: int, device: torch.device) -> Squares:
    """Return the conversion for d features, padded to `width`."""
    pairs = list(combinations_with_replacement(range(d), 2))
    number = {pair: index for index, pair in enumerate(pairs)}
    grid = [(min(i, j), max(i, j)) for i in range(width) for j in range(width)]
    entry = torch.tensor([number.get(pair, 0) for pair in grid])
    roots = [1.0 if i == j else 0.5**0.5 for i, j in grid]
    inverse_root = torch.tensor([root if pair in number else 0.0 for pair, root in zip(grid, roots, strict=True)])
    place = torch.tensor([i * width + j for i, j in pairs])
    root = torch.tensor([1.0 if i == j else 2.0**0.5 for i, j in pairs])
    made = Squares(width, *(x.to(device) for x in (entry, inverse_root, place, root)))
    settle(device)
    return made
