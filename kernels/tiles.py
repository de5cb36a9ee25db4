"""The tiled power embedding, expanded by outer products of slices: phi never gathers.

Features are split in tiles of b. phi holds every multiset of p tiles in order, and all b^p products within it. A piece
of phi fixes p - 1 tiles and lets the last feature run from the last of them to the end, so that it is one broadcast
product, [b^(p-1), 1, M] * [1, width, M], into consecutive rows. Multinomial weights stand on the key side alone: phi(q)
is plain, phi(k) carries them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations_with_replacement, groupby, product
from math import factorial, prod

import torch
from torch import Tensor

from powerplan.dims import tiled_spow_dim
from powerplan.kernels.conversion import Conversion, conversion


@dataclass(frozen=True)
class Piece:
    """b^(p-1) x width rows of a block from `offset` on: products within `tiles`, times features start : d.

    same and later are the multinomial weights where the last feature lies in the last of the tiles, and beyond.
    """

    tiles: tuple[int, ...]
    start: int
    width: int
    leads: int
    offset: int
    same: int
    later: int

    @property
    def rows(self) -> slice:
        return slice(self.offset, self.offset + self.leads * self.width)


@dataclass(frozen=True)
class Block:
    """A run of pieces: rows first : first + width of phi, expanded and multiplied at a time."""

    first: int
    width: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Tiling:
    """How phi of d features and degree p is laid out in tiles of b, in `dim` rows."""

    d: int
    p: int
    tile: int
    dim: int
    blocks: tuple[Block, ...]


@lru_cache(maxsize=64)
def tiling(d: int, p: int, tile: int, rows: int) -> Tiling:
    """Return the layout, in blocks of at most `rows` rows of phi, or one piece. d must be a multiple of tile."""
    blocks: list[Block] = []
    pending: list[Piece] = []
    first = offset = 0
    for tiles, same, later in _tile_runs(d // tile, p):
        start = (tiles[-1] if tiles else 0) * tile
        leads, width = tile ** (p - 1), d - start
        if pending and offset + leads * width > rows:
            blocks.append(Block(first, offset, tuple(pending)))
            first, offset, pending = first + offset, 0, []
        pending.append(Piece(tiles, start, width, leads, offset, same, later))
        offset += leads * width
    blocks.append(Block(first, offset, tuple(pending)))
    assert first + offset == tiled_spow_dim(d, p, tile)
    return Tiling(d, p, tile, first + offset, tuple(blocks))


def _tile_runs(count: int, p: int) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Yield the multisets of p - 1 tiles, each with the weights of one more: the last tile again, or a later one."""
    for tiles in combinations_with_replacement(range(count), p - 1):
        runs = [len(list(run)) for _, run in groupby(tiles)]
        rest, last = prod(map(factorial, runs[:-1])), runs[-1] if runs else 0
        yield tiles, factorial(p) // (rest * factorial(last + 1)), factorial(p) // (rest * factorial(last))


class Expander:
    """Expands rows x, [N, d, M] with time last, to blocks of phi; keeps what its pieces share."""

    def __init__(self, x: Tensor, layout: Tiling, weighted: bool) -> None:
        self.x = x
        self.layout = layout
        self.weighted = weighted
        self.tails: dict[tuple[int, int, int], Tensor] = {}

    def tail(self, piece: Piece) -> Tensor:
        """Return features start : d, [N, 1, width, M], with the weights of the last feature where this side has any."""
        plain = self.x[:, None, piece.start :]
        if not self.weighted or piece.same == piece.later == 1:
            return plain
        key = (piece.start, piece.same, piece.later)
        if key not in self.tails:
            tile = self.layout.tile
            self.tails[key] = torch.cat((plain[:, :, :tile] * piece.same, plain[:, :, tile:] * piece.later), 2)
        return self.tails[key]

    def tile(self, index: int) -> Tensor:
        """Return the features of one tile, [N, b, M]."""
        return self.x[:, index * self.layout.tile : (index + 1) * self.layout.tile]

    def leads(self, tiles: tuple[int, ...]) -> Tensor:
        """Return all products of one feature from each of the tiles, [N, b^(p-1), 1, M]; the last varies fastest."""
        rows = self.tile(tiles[0]) if tiles else torch.ones_like(self.x[:, :1])
        for index in tiles[1:]:
            rows = (rows[:, :, None] * self.tile(index)[:, None]).flatten(1, 2)
        return rows[:, :, None]

    def expand(self, block: Block, out: Tensor) -> Tensor:
        """Write the rows of `block` into `out`, [N, width, M] and contiguous, and return it."""
        for piece in block.pieces:
            rows = out[:, piece.rows].view(-1, piece.leads, piece.width, out.shape[2])
            torch.mul(self.leads(piece.tiles), self.tail(piece), out=rows)
        return out

    def pull_back(self, block: Block, grad: Tensor, into: Tensor) -> None:
        """Add to `into`, [N, d, M], the gradient of x for the gradient of this block's rows, [N, width, M]."""
        tile = self.layout.tile
        for piece in block.pieces:
            rows = grad[:, piece.rows].view(-1, piece.leads, piece.width, grad.shape[2])
            tail = self.tail(piece)
            self._pull_leads(piece.tiles, (rows * tail).sum(2), into)
            share = rows.mul_(self.leads(piece.tiles)).sum(1)
            if self.weighted:
                share[:, :tile].mul_(piece.same)
                share[:, tile:].mul_(piece.later)
            into[:, piece.start :] += share

    def _pull_leads(self, tiles: tuple[int, ...], grad: Tensor, into: Tensor) -> None:
        """Add the gradient of x for that of the products of features from `tiles`, [N, b^(p-1), M]."""
        if not tiles:
            return
        b = self.layout.tile
        if len(tiles) == 1:
            into[:, tiles[0] * b : (tiles[0] + 1) * b] += grad
            return
        spread = grad.view(grad.shape[0], -1, b, grad.shape[2])
        others, last = self.leads(tiles[:-1]), self.tile(tiles[-1])
        into[:, tiles[-1] * b : (tiles[-1] + 1) * b] += (spread * others).sum(1)
        self._pull_leads(tiles[:-1], (spread * last[:, None]).sum(2), into)


@lru_cache(maxsize=16)
def tile_conversion(d: int, p: int, tile: int, padded: int, device: torch.device) -> Conversion:
    """Return the conversion between the shared layout for d features and the tiled one for `padded` of them."""
    return conversion(_rows(tiling(padded, p, tile, rows=2**40)), d, p).to(device)


def _rows(layout: Tiling) -> Iterator[tuple[tuple[int, ...], int]]:
    for block in layout.blocks:
        for piece in block.pieces:
            for within in product(range(layout.tile), repeat=layout.p - 1):
                lead = [index * layout.tile + feature for index, feature in zip(piece.tiles, within, strict=True)]
                for step in range(piece.width):
                    yield (*lead, piece.start + step), piece.same if step < layout.tile else piece.later
