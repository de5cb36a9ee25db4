"""The tiled power embedding, expanded by outer products of slices, so that no index is ever gathered.

Features are split into tiles of b. phi holds, for every multiset of p tiles, all b^p products of one feature from each.
A product of features from different tiles stands in phi once, where (q.k)^p counts it once for every order of these
tiles. That weight depends on the tiles alone. Pieces of the same weight therefore lie together in blocks, and the
product with a block is multiplied by the weight, once.

A piece of phi holds the products for p - 1 fixed tiles. The last factor runs over the last of these tiles, or over all
features behind it. Time is the last dim, so that a piece is one broadcast product, [leads, 1, M] * [1, width, M], which
is written to consecutive rows. Tensors are [BG, d, M]: all sequences and heads, features, and the tokens of a chunk.
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

TILE = 8
"""Features of a tile, b. At K = 64 and p = 2, phi takes 8 broadcast products into 2,304 rows; tiles of 1 would take 64
products into 2,080 rows."""

PHI_BLOCK_ROWS = 600
"""Rows of phi that are expanded at a time: 2.5 MB at 4 heads and chunks of 256 tokens.

300 rows were as fast and 900 slower (two cores with 1 MB of L2 cache each, K = V = 64, p = 2).
"""


@dataclass(frozen=True)
class Piece:
    """Rows of phi that one broadcast product fills: all products within `tiles`, times `width` features from `start`
    on.

    These are count x leads x width rows, from row `offset` of their block on. count > 1 joins as many pieces of one
    lead tile each: tiles[0] and the tiles behind it, each times itself. `start` and `width` are then those of the
    first.
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
    """Pieces of one weight, which are expanded and multiplied at a time: rows first : first + width of phi."""

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
    """Return the layout in blocks of at most `rows` rows of phi, or of one piece. d must be a multiple of tile."""
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
    """Yield the pieces of phi, without their offsets.

    There are two for each multiset of p - 1 tiles: times its last tile again, and times all features behind that tile.
    """
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
"""Two views to multiply, and the view that takes their product."""


class Expander:
    """Expands x, [BG, d, M] with time last, to blocks of phi in a flat `buffer`.

    It holds views only, so that x may be filled anew between two expansions.
    """

    def __init__(self, x: Tensor, layout: Tiling, buffer: Tensor) -> None:
        self.x, self.layout = x, layout
        count, _, size = x.shape
        self.products = [x.new_empty(count, layout.tile**power, size) for power in range(2, layout.p)]
        self.rows = [_block_rows(buffer, count, block, size) for block in layout.blocks]
        self.steps = [
            [step for piece in block.pieces for step in self._steps(piece, _part(rows, piece))]
            for block, rows in zip(layout.blocks, self.rows, strict=True)
        ]

    def expand(self, index: int) -> Tensor:
        """Return block `index` of phi(x), [BG, width, M], in the buffer."""
        _multiply(self.steps[index])
        return self.rows[index]

    def _steps(self, piece: Piece, out: Tensor) -> list[Step]:
        steps, leads = self.leads(piece)
        return [*steps, (leads, self.tail(piece), out)]

    def leads(self, piece: Piece) -> tuple[list[Step], Tensor]:
        """Return the products of all features but the last, [BG, count, leads, 1, M], and the steps that make them."""
        if piece.count > 1:
            return [], self.x.view(self.x.shape[0], piece.count, piece.leads, 1, -1)
        steps, leads = self.product(piece.tiles)
        return steps, leads[:, None, :, None]

    def tail(self, piece: Piece) -> Tensor:
        """Return the last features, [BG, count, 1, width, M]."""
        rows = self.x[:, piece.start : piece.start + piece.count * piece.width]
        return rows.view(rows.shape[0], piece.count, 1, piece.width, -1)

    def tile(self, index: int) -> Tensor:
        """Return the features of one tile, [BG, b, M]."""
        return self.x[:, index * self.layout.tile : (index + 1) * self.layout.tile]

    def product(self, tiles: tuple[int, ...]) -> tuple[list[Step], Tensor]:
        """Return all products of one feature from each tile, the last fastest, [BG, b^tiles, M], and their steps."""
        if not tiles:
            return [], self.x.new_ones(1, 1, 1)
        last = self.tile(tiles[-1])
        if len(tiles) == 1:
            return [], last
        steps, before = self.product(tiles[:-1])
        products = self.products[len(tiles) - 2]
        out = products.view(products.shape[0], -1, self.layout.tile, products.shape[2])
        return [*steps, (before[:, :, None], last[:, None], out)], products


class ExpanderBackward:
    """Turns gradients of phi's blocks into the gradient of an expander's x, which it adds to `grad_x`, [BG, d, M].

    The gradient of a block is put into `rows`, views of a flat `buffer`, before `add` is called. The expander's own
    buffer serves as scratch memory meanwhile: what it held is lost.
    """

    def __init__(self, expander: Expander, buffer: Tensor, grad_x: Tensor) -> None:
        count, _, size = grad_x.shape
        self.rows = [_block_rows(buffer, count, block, size) for block in expander.layout.blocks]
        self.pieces = [
            [
                PieceBackward(expander, piece, _part(rows, piece), _part(scratch, piece), grad_x)
                for piece in block.pieces
            ]
            for block, rows, scratch in zip(expander.layout.blocks, self.rows, expander.rows, strict=True)
        ]

    def add(self, index: int) -> None:
        """Add to grad_x what follows from the gradient of block `index`."""
        for piece in self.pieces[index]:
            piece.add()


class PieceBackward:
    """Turns the gradient of one piece of phi, `rows`, into that of x. Its views are made once, here."""

    def __init__(self, expander: Expander, piece: Piece, rows: Tensor, scratch: Tensor, grad_x: Tensor) -> None:
        self.expander, self.piece, self.rows, self.scratch, self.grad_x = expander, piece, rows, scratch, grad_x
        self.steps, self.leads = expander.leads(piece)
        self.tail = expander.tail(piece)
        count, number, leads, width, size = rows.shape
        last = grad_x[:, piece.start : piece.start + number * width]
        self.grad_tail = last.view(count, number, width, size)
        self.grad_leads = grad_x[:, :0]
        if len(piece.tiles) == 1:
            first = piece.tiles[0] * expander.layout.tile
            self.grad_leads = grad_x[:, first : first + number * leads].view(count, number, leads, size)

    def add(self) -> None:
        """Add to grad_x what follows from the gradient of the piece."""
        _multiply(self.steps)
        self.grad_tail.add_(torch.mul(self.rows, self.leads, out=self.scratch).sum(2))
        if self.piece.tiles:
            grad_leads = torch.mul(self.rows, self.tail, out=self.scratch).sum(3)
            if len(self.piece.tiles) == 1:
                self.grad_leads.add_(grad_leads)
            else:
                self._add_of_product(self.piece.tiles, grad_leads[:, 0])

    def _add_of_product(self, tiles: tuple[int, ...], grad: Tensor) -> None:
        """Add what follows from `grad`, [BG, b^tiles, M], that of all products of one feature from each tile."""
        b = self.expander.layout.tile
        grad_tile = self.grad_x[:, tiles[-1] * b : (tiles[-1] + 1) * b]
        if len(tiles) == 1:
            grad_tile.add_(grad)
            return
        by_last = grad.view(grad.shape[0], -1, b, grad.shape[2])
        steps, others = self.expander.product(tiles[:-1])
        _multiply(steps)
        grad_tile.add_((by_last * others[:, :, None]).sum(1))
        self._add_of_product(tiles[:-1], (by_last * self.expander.tile(tiles[-1])[:, None]).sum(2))


def _multiply(steps: list[Step]) -> None:
    for left, right, out in steps:
        torch.mul(left, right, out=out)


def _block_rows(buffer: Tensor, count: int, block: Block, size: int) -> Tensor:
    """Return the part of a flat `buffer` that holds one block, [BG, width, M]."""
    return buffer[: count * block.width * size].view(count, block.width, size)


def _part(rows: Tensor, piece: Piece) -> Tensor:
    """Return a piece of a block's rows, [BG, count, leads, width, M]."""
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
