"""The tiled power embedding, expanded by outer products of slices: phi never gathers.

Features are split in tiles of b. phi holds every multiset of p tiles, and all b^p products within it, so that a product
of features of different tiles stands there once where (q.k)^p counts it several times. How often depends on the tiles
alone: pieces of one count are gathered in blocks, and the count multiplies what is asked of a block, once.

A piece fixes p - 1 tiles, all but the last feature, and lets that one run: over the last of these tiles again, or over
everything behind it. Time is the last dim, so a piece is one broadcast product, [leads, 1, M] * [1, width, M], into
consecutive rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations_with_replacement, groupby, product
from math import factorial, prod

import torch
from torch import Tensor

from powerplan.dims import tiled_spow_dim
from powerplan.kernels.conversion import Conversion, conversion


@dataclass(frozen=True)
class Piece:
    """count x leads x width rows of a block from `offset` on: all products within `tiles`, times features from `start`.

    count > 1 stands for as many pieces of one lead tile each, tiles[0] and those behind it, each times itself; `start`
    and `width` are those of the first.
    """

    tiles: tuple[int, ...]
    start: int
    width: int
    leads: int
    weight: int
    offset: int = 0
    count: int = 1

    @property
    def size(self) -> int:
        return self.count * self.leads * self.width

    @property
    def rows(self) -> slice:
        return slice(self.offset, self.offset + self.size)


@dataclass(frozen=True)
class Block:
    """A run of pieces of one weight: rows first : first + width of phi, expanded and multiplied at a time."""

    first: int
    width: int
    weight: int
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
    first = 0
    for weight, pieces in groupby(sorted(_pieces(d, p, tile), key=lambda piece: piece.weight), lambda x: x.weight):
        pending: list[Piece] = []
        for piece in pieces:
            offset = pending[-1].rows.stop if pending else 0
            if pending and offset + piece.size > rows:
                blocks.append(Block(first, offset, weight, tuple(pending)))
                first, offset, pending = first + offset, 0, []
            pending.append(replace(piece, offset=offset))
        blocks.append(Block(first, pending[-1].rows.stop, weight, tuple(pending)))
        first += blocks[-1].width
    assert first == tiled_spow_dim(d, p, tile)
    return Tiling(d, p, tile, first, tuple(blocks))


def _pieces(d: int, p: int, tile: int) -> Iterator[Piece]:
    """Yield the pieces without their places: for each multiset of p - 1 tiles the last tile again, and what follows."""
    count = d // tile
    if p == 1:
        yield Piece((), 0, d, 1, 1)
        return
    leads = tile ** (p - 1)
    if p == 2:
        yield Piece((0,), 0, tile, leads, 1, count=count)
    for tiles in combinations_with_replacement(range(count), p - 1):
        runs = [len(list(run)) for _, run in groupby(tiles)]
        rest, last = prod(map(factorial, runs[:-1])), runs[-1]
        start = tiles[-1] * tile
        if p > 2:
            yield Piece(tiles, start, tile, leads, factorial(p) // (rest * factorial(last + 1)))
        if start + tile < d:
            weight = factorial(p) // (rest * factorial(last))
            yield Piece(tiles, start + tile, d - start - tile, leads, weight)


Step = tuple[Tensor, Tensor, Tensor]
"""Two views to multiply, and where to write their product."""


class Expander:
    """Expands x, [N, d, M] with time last, to blocks of phi in `room`. Holds views only: x may be filled anew."""

    def __init__(self, x: Tensor, layout: Tiling, room: Tensor) -> None:
        self.x, self.layout = x, layout
        count, _, size = x.shape
        self.products = [x.new_empty(count, layout.tile**power, size) for power in range(2, layout.p)]
        self.rows = [_views(room, count, block, size) for block in layout.blocks]
        self.steps = [
            [step for piece in block.pieces for step in self._steps(piece, _part(rows, piece))]
            for block, rows in zip(layout.blocks, self.rows, strict=True)
        ]

    def expand(self, index: int) -> Tensor:
        """Return block `index` of phi(x), [N, width, M], in the room."""
        for left, right, out in self.steps[index]:
            torch.mul(left, right, out=out)
        return self.rows[index]

    def _steps(self, piece: Piece, out: Tensor) -> list[Step]:
        steps, leads = self.leads(piece)
        return [*steps, (leads, self.tail(piece), out)]

    def leads(self, piece: Piece) -> tuple[list[Step], Tensor]:
        """Return the products of all features but the last, [N, count, leads, 1, M], and the steps that make them."""
        if piece.count > 1:
            return [], self.x.view(self.x.shape[0], piece.count, piece.leads, 1, -1)
        steps, leads = self.product(piece.tiles)
        return steps, leads[:, None, :, None]

    def tail(self, piece: Piece) -> Tensor:
        """Return the last features, [N, count, 1, width, M]."""
        rows = self.x[:, piece.start : piece.start + piece.count * piece.width]
        return rows.view(rows.shape[0], piece.count, 1, piece.width, -1)

    def tile(self, index: int) -> Tensor:
        """Return the features of one tile, [N, b, M]."""
        return self.x[:, index * self.layout.tile : (index + 1) * self.layout.tile]

    def product(self, tiles: tuple[int, ...]) -> tuple[list[Step], Tensor]:
        """Return all products of one feature from each tile, the last fastest, [N, b^tiles, M], and their steps."""
        if not tiles:
            return [], self.x.new_ones(1, 1, 1)
        last = self.tile(tiles[-1])
        if len(tiles) == 1:
            return [], last
        steps, before = self.product(tiles[:-1])
        room = self.products[len(tiles) - 2]
        out = room.view(room.shape[0], -1, self.layout.tile, room.shape[2])
        return [*steps, (before[:, :, None], last[:, None], out)], room


class Puller:
    """Takes gradients of phi's blocks back to `into`, [N, d, M], the gradient of an expander's x.

    The gradients are put in `room`. The expander's own room is used meanwhile, and what it held is lost.
    """

    def __init__(self, expander: Expander, room: Tensor, into: Tensor) -> None:
        self.expander, self.into = expander, into
        count, _, size = into.shape
        self.rows = [_views(room, count, block, size) for block in expander.layout.blocks]
        self.pulls = [
            [Pull(expander, piece, _part(rows, piece), _part(spare, piece), into) for piece in block.pieces]
            for block, rows, spare in zip(expander.layout.blocks, self.rows, expander.rows, strict=True)
        ]

    def pull(self, index: int) -> None:
        """Add to `into` what follows from the gradient of block `index`, which stands in `rows`."""
        for pull in self.pulls[index]:
            pull.run()


class Pull:
    """Takes the gradient of one piece, `rows`, back to that of x. Views are made here, once."""

    def __init__(self, expander: Expander, piece: Piece, rows: Tensor, spare: Tensor, into: Tensor) -> None:
        self.expander, self.piece, self.rows, self.spare, self.into = expander, piece, rows, spare, into
        self.steps, self.leads = expander.leads(piece)
        self.tail = expander.tail(piece)
        count, number, leads, width, size = rows.shape
        last = into[:, piece.start : piece.start + number * width]
        self.into_tail = last.view(count, number, width, size)
        self.into_leads = into[:, :0]
        if len(piece.tiles) == 1:
            first = piece.tiles[0] * expander.layout.tile
            self.into_leads = into[:, first : first + number * leads].view(count, number, leads, size)

    def run(self) -> None:
        for left, right, out in self.steps:
            torch.mul(left, right, out=out)
        self.into_tail.add_(torch.mul(self.rows, self.leads, out=self.spare).sum(2))
        if self.piece.tiles:
            by_leads = torch.mul(self.rows, self.tail, out=self.spare).sum(3)
            if len(self.piece.tiles) == 1:
                self.into_leads.add_(by_leads)
            else:
                self._of_product(self.piece.tiles, by_leads[:, 0])

    def _of_product(self, tiles: tuple[int, ...], grad: Tensor) -> None:
        """Add the gradient of x for that of the products of features from `tiles`, [N, b^tiles, M]."""
        b = self.expander.layout.tile
        into = self.into[:, tiles[-1] * b : (tiles[-1] + 1) * b]
        if len(tiles) == 1:
            into.add_(grad)
            return
        spread = grad.view(grad.shape[0], -1, b, grad.shape[2])
        steps, others = self.expander.product(tiles[:-1])
        for left, right, out in steps:
            torch.mul(left, right, out=out)
        into.add_((spread * others[:, :, None]).sum(1))
        self._of_product(tiles[:-1], (spread * self.expander.tile(tiles[-1])[:, None]).sum(2))


def _views(room: Tensor, count: int, block: Block, size: int) -> Tensor:
    """Return the part of a flat `room` that holds one block, [N, width, M]."""
    return room[: count * block.width * size].view(count, block.width, size)


def _part(rows: Tensor, piece: Piece) -> Tensor:
    """Return a piece of a block's rows, [N, count, leads, width, M]."""
    part = rows[:, piece.rows]
    return part.view(part.shape[0], piece.count, piece.leads, piece.width, part.shape[2])


@lru_cache(maxsize=16)
def tile_conversion(d: int, p: int, tile: int, padded: int, device: torch.device) -> Conversion:
    """Return the conversion between the shared layout for d features and the tiled one for `padded` of them."""
    return conversion(_rows(tiling(padded, p, tile, rows=2**40)), d, p).to(device)


def _rows(layout: Tiling) -> Iterator[tuple[tuple[int, ...], int]]:
    for block in layout.blocks:
        for piece in block.pieces:
            for features in _features(piece, layout.p, layout.tile):
                yield features, 1


def _features(piece: Piece, p: int, tile: int) -> Iterator[tuple[int, ...]]:
    """Yield the features of each row of a piece."""
    for offset in range(piece.count):
        for within in product(range(tile), repeat=p - 1):
            lead = [(index + offset) * tile + feature for index, feature in zip(piece.tiles, within, strict=True)]
            start = piece.start + offset * tile
            for last in range(start, start + piece.width):
                yield (*lead, last)
