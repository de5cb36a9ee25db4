"""Static sparse attention whose reach doubles with every layer: a window and blocks at distances of powers of two."""

from __future__ import annotations

from fractions import Fraction
from typing import ClassVar

from powerplan.choices import Causal
from powerplan.mixers.formulas import Convention, Rational
from powerplan.mixers.heads import GroupedHeads
from powerplan.part import Size, Window


class ExponentialSparse(GroupedHeads, frozen=True, kw_only=True, tag_field="kind", tag="exponential_sparse"):
    """Static sparse attention (PowerAttention): a window, the first block, and blocks 1, 2, 4, 8 ... blocks back.

    It is another thing than power attention, the kind `power`: softmax attention over a fixed pattern, with every key
    kept. A query sees the keys of its own block up to itself, the blocks that are fewer than `window_blocks` back,
    those whose distance is a power of two, and the first block. d layers reach 2^d blocks.
    parameters in matmuls: attention's      state: G(k + v)t, as later queries meet every block
    state FLOPs per token: 2H(k + v) seen, the mean keys of the pattern. One token looks up the blocks that it sees,
    its own counted whole.

    block_size: tokens of a block.
    window_blocks: blocks of the window, the query's own among them.
    """

    source = "Chen et al. 2025, arXiv 2503.03588, section 3.3 and algorithm 1; section 4.1 (sizes)"
    entry = "G*(k + v)"
    state = "G*(k + v)*t"
    flops = "2*H*(k + v)*seen"
    looked_up = "G*(k + v)*seen"
    sparse_reads = True
    not_shared: ClassVar[frozenset[str]] = GroupedHeads.not_shared | {"block_size"}

    block_size: Window = 256
    window_blocks: Size = 5

    def flops_values(self, context: int, convention: Convention) -> dict[str, Rational]:
        return {"seen": mean_keys_at_powers(context, convention.causal, self.block_size, self.window_blocks)}

    def direct_reach(self, context: int) -> int:
        """Return the tokens of the window, the last that a query meets without gaps."""
        return min(context, self.block_size * self.window_blocks)

    def describe(self) -> str:
        return f"exponential sparse, blocks of {self.block_size:,}"


def blocks_at_powers(block: int, window: int) -> int:
    """Return how many blocks before its own, block number `block` from 0, a query sees.

    window: blocks of the window, its own among them.
    """
    powers = max(0, block.bit_length() - (window - 1).bit_length())  # Powers of two from `window` to `block`.
    first = block >= window and block & (block - 1) > 0  # The first block, if it is at no power of two.
    return min(block, window - 1) + powers + first


def mean_keys_at_powers(context: int, causal: Causal, block_size: int, window: int) -> Fraction:
    """Return the mean keys that a query sees; "full" are those of the last query's blocks, its own whole.

    Exact for any context: sums over blocks are closed, and those over powers of two have up to 50 terms.
    """
    whole, rest = divmod(context, block_size)
    if causal == "full":
        last = (context - 1) // block_size
        return Fraction(min(context, block_size * (1 + blocks_at_powers(last, window))))
    near = min(whole, window)
    blocks = near * (near - 1) // 2 + (whole - near) * (window - 1)
    powers = [2**power for power in range((window - 1).bit_length(), whole.bit_length()) if 2**power < whole]
    blocks += sum(whole - power for power in powers) + whole - near - len(powers)
    keys = whole * block_size * (block_size + 1) // 2 + block_size**2 * blocks
    keys += rest * (rest + 1) // 2 + rest * block_size * blocks_at_powers(whole, window)
    return Fraction(keys, context)
