"""Attention of DeepSeek-V4: a window, and entries that each compress several tokens, of which an indexer may pick."""

from __future__ import annotations

from fractions import Fraction
from math import gcd
from typing import ClassVar

from powerplan.choices import Causal
from powerplan.mixers.base import HeadShape, Mixer
from powerplan.mixers.formulas import Convention, Formulas, Rational, mean_keys, total
from powerplan.mixers.sparse import mean_blocks
from powerplan.mixers.state_size import StateSize
from powerplan.part import Size, Window, problem


def mean_picked(context: int, causal: Causal, block: int, count: int) -> Fraction:
    """Return the mean number of whole blocks of `block` tokens that end at or before a query, but `count` at most."""
    if causal == "full":
        return Fraction(min(context // block, count))
    few = min(context, count * block - 1)
    below = few * mean_blocks(few, causal, block, block) if few else Fraction(0)
    return (below + count * (context - few)) / context


class Compressed(Mixer, frozen=True, kw_only=True, tag_field="kind", tag="compressed"):
    """Attention to the last `window` tokens and to entries that each compress `compress_rate` (c) tokens.

    All H heads share one key of k features, which is the value too. An entry is a mean of its tokens, weighted by a
    softmax for each feature. With index_heads (CSA), an entry reaches back over the tokens of the entry before, and an
    indexer of X heads of x features, compressed alike, picks `top_k` entries; without (HCA), all entries are attended
    to. compress_rate null: the window alone.
    parameters in matmuls: mq + qHk + mk, Hko + Pom for the output in P groups of rank o; 2mk to compress, or 4mk and
    4mx + qXx + mX with an indexer
    state: k min(t, w), k entries, x entries of the indexer; and the projections of tokens that are still to be read
    state FLOPs per token: 4Hk near, and 4Hk blocks, or 2Xx blocks + 4Hk top: mean entries, and min(entries, top_k)
    One token appends k, and a c-th of an entry (rounded up); it writes its projections, which each entry that they are
    in reads.
    Parameters checked against transformers' DeepSeek-V4.

    heads: query heads; all share one key, which is the value too.
    head_dim: features of a query and of a key, per head.
    q_lora_rank: features of the latent of a token's queries.
    output_groups: groups of heads that the output projection takes apart.
    output_rank: features that the output of a group is projected to first.
    window: the last keys that a query attends to, in tokens.
    compress_rate: tokens that one entry stands for; null for the window alone.
    index_heads: heads of the indexer that picks entries; without, every entry is attended to.
    index_head_dim: features of a query and of a key of the indexer, per head.
    top_k: entries that a query picks.
    sinks: one learned logit per query head, parameters outside matmuls.
    """

    source = "DeepSeek-V4, transformers 5.23, models/deepseek_v4; its report, sections 2.3.1 (CSA) and 2.3.2 (HCA)"
    letters = "m H=heads k=head_dim q=q_lora_rank P=output_groups o=output_rank c=compress_rate X=index_heads"
    letters += " x=index_head_dim"
    entry = "k"
    looked_up = "k*near"
    rounded_widths: ClassVar[tuple[str, ...]] = ("q_lora_rank", "output_rank")

    heads: Size
    head_dim: Size
    q_lora_rank: Size = 1024
    output_groups: Size = 1
    output_rank: Size = 1024
    window: Window = 128
    compress_rate: Size | None = 4
    index_heads: Size | None = None
    index_head_dim: Size = 128
    top_k: Size = 512
    sinks: bool = True

    def check(self) -> None:
        if self.heads % self.output_groups:
            raise problem("output_groups", f"output_groups {self.output_groups} does not divide heads {self.heads}")
        if self.index_heads and not self.compress_rate:
            raise problem("index_heads", "an indexer picks among compressed entries, and compress_rate is null")

    def width_divisor(self) -> int:
        return gcd(self.heads, self.heads // self.output_groups)

    def direct_reach(self, context: int) -> int:
        """Return the tokens that a query can meet: all of them where compressed entries stand for those before."""
        return context if self.compress_rate else min(context, self.window)

    def _by_form(self, window: str, every: str, picked: str) -> str:
        """Return the formula of a layer with a window alone, with every compressed entry, or with an indexer."""
        return picked if self.index_heads else every if self.compress_rate else window

    def matmul_formulas(self) -> Formulas:
        return (
            ("projections", "m*q + q*H*k + m*k"),
            ("output projections", "H*k*o + P*o*m"),
            ("compressor", self._by_form("", "2*m*k", "4*m*k")),
            ("indexer", self._by_form("", "", "4*m*x + q*X*x + m*X")),
        )

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        compressors = "2" if self.compress_rate else "0"
        indexers = "1" if self.index_heads else "0"
        return (
            ("projections", "1", "q", "m"),
            ("projections", "1", "H*k", "q"),
            ("projections", "1", "k", "m"),
            ("output projections", "P", "o", "H*k//P"),
            ("output projections", "1", "m", "P*o"),
            ("compressor", compressors, self._by_form("k", "k", "2*k"), "m"),
            ("indexer", f"2*{indexers}", "2*x", "m"),
            ("indexer", indexers, "X*x", "q"),
            ("indexer", indexers, "X", "m"),
        )

    def other_formulas(self) -> Formulas:
        return (
            ("latent norms", "q + k"),
            ("sinks", "H" if self.sinks else ""),
            ("compressor", self._by_form("", "c*k + k", "2*c*k + k")),
            ("indexer", self._by_form("", "", "2*c*x + x")),
        )

    def state_formulas(self) -> Formulas:
        return (
            ("compressed: window", "k*near"),
            ("compressed: entries", self._by_form("", "k*blocks", "(k + x)*blocks")),
            (
                "compressed: tokens to compress",
                self._by_form("", "2*k*rest", "(4*k + 4*x)*rest + (2*k + 2*x)*c*closed"),
            ),
        )

    def state_values(self, context: int) -> dict[str, int]:
        rate = self.compress_rate or 1
        return super().state_values(context) | {"rest": context % rate, "closed": int(context >= rate)}

    def state_size(self, context: int) -> StateSize:
        elements = int(total(self.state_terms(context)))
        entry = self._by_form("k", "k + (k + c - 1)//c", "k + (k + x + c - 1)//c")
        read = self._by_form("k*near", "k*(near + blocks)", "k*(near + top) + x*blocks")
        entry_term, read_term = self.terms((("entry", entry), ("read", read)), **self.state_values(context))
        waiting = total(self.terms((("tokens to compress", self._by_form("0", "2*2*k", "(2*4 + 2)*(k + x)")),)))
        sizes = {"entry": int(entry_term.value), "looked_up": int(read_term.value), "waiting": int(waiting)}
        return StateSize(cache=elements, **sizes)

    def flops_formulas(self, chunked: bool) -> Formulas:
        return (
            ("compressed: window", "4*H*k*near"),
            ("compressed: indexer", self._by_form("", "", "2*X*x*blocks")),
            ("compressed: entries", self._by_form("", "4*H*k*blocks", "4*H*k*top")),
        )

    def flops_values(self, context: int, convention: Convention) -> dict[str, Rational]:
        causal, rate = convention.causal, self.compress_rate
        near = mean_keys(context, causal, self.window)
        if rate is None:
            return {"near": near, "blocks": 0, "top": 0}
        blocks = mean_blocks(context, causal, rate, rate)
        return {"near": near, "blocks": blocks, "top": mean_picked(context, causal, rate, self.top_k)}

    def head_shape(self, hidden: int) -> HeadShape:
        """Return heads of one key/value head that take as many weights as this layer, as near as heads allow."""
        heads = Fraction(total(self.matmul_terms(hidden)), 2 * hidden * self.head_dim) - 1
        return HeadShape(max(1, round(heads)), 1, self.head_dim, self.head_dim)

    def describe(self) -> str:
        if self.compress_rate is None:
            return f"compressed, window {self.window:,} alone"
        picked = f", top {self.top_k:,}" if self.index_heads else ""
        return f"compressed {self.compress_rate:,} to 1{picked}, window {self.window:,}"
