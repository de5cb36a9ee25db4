"""Sparse attention, softmax over the part of the cache that a query picks: NSA, MoBA, DeepSeek sparse attention."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, ClassVar

from powerplan.choices import Causal
from powerplan.mixers.base import Mixer, Size, StateSize, Window, problem
from powerplan.mixers.formulas import Convention, Rational, Term, mean_keys, term
from powerplan.mixers.heads import GroupedHeads
from powerplan.mixers.mla import MLA
from powerplan.mixers.shape import Inherited


def whole_blocks(context: int, block: int, stride: int) -> int:
    """Return how many blocks of `block` tokens, one every `stride` tokens, lie within `context` tokens."""
    return (context - block) // stride + 1 if context >= block else 0


def mean_blocks(context: int, causal: Causal, block: int, stride: int) -> Fraction:
    """Return the mean number of whole blocks that end at or before a query; "full" counts all blocks."""
    count = whole_blocks(context, block, stride)
    if causal == "full":
        return Fraction(count)
    return Fraction(count * (context - block + 1) - stride * count * (count - 1) // 2, context)


class NSA(GroupedHeads, frozen=True, kw_only=True, tag_field="kind", tag="nsa"):
    """Native sparse attention: attention to compressed blocks, to picked blocks and to a window, mixed by three gates.

    Each block of `compress_size` tokens, one every `compress_stride`, is compressed to one key and value. Their scores
    pick `select_count` blocks of `select_size` tokens. The window is the last `window` keys.
    parameters in matmuls: attention's, and 3mH for the gates      state: G(k + v)(t + blocks)
    state FLOPs per token: 2H(k + v)(blocks + picked + near): mean compressed blocks, min(i, select_count x select_size)
    and the keys in the window. Picking blocks adds no FLOPs, as the scores are there. One token looks up these keys.
    As in flash-linear-attention, against which parameters are checked, compression is a mean, and the branches share
    keys and values. The paper learns the compression and has keys and values for each branch; there is no public code
    of its authors, and this is not counted.
    """

    source: ClassVar[str] = "Yuan et al. 2025, arXiv 2502.11089, section 3; flash-linear-attention, layers/nsa.py"

    sparse_reads: ClassVar[bool] = True

    compress_size: Window = 32
    compress_stride: Window = 16
    select_size: Window = 64
    select_count: Size = 16
    window: Window = 512

    def matmul_terms(self, hidden: int) -> tuple[Term, ...]:
        return (*super().matmul_terms(hidden), term("branch gates", "3*m*H", self.head_symbols(hidden)))

    def compressed(self, context: int) -> int:
        """Return the number of compressed blocks in a context."""
        return whole_blocks(context, self.compress_size, self.compress_stride)

    def state_terms(self, context: int) -> tuple[Term, ...]:
        symbols = {"G": self.kv_heads, "k": self.head_dim, "v": self.v_head_dim, "t": context}
        return (term("nsa", "G*(k + v)*(t + blocks)", symbols | {"blocks": self.compressed(context)}),)

    def state_size(self, context: int) -> StateSize:
        entry = self.kv_heads * (self.head_dim + self.v_head_dim)
        blocks = self.compressed(context)
        picked = min(context, self.select_count * self.select_size)
        looked_up = entry * (blocks + picked + min(context, self.window))
        return StateSize(cache=entry * (context + blocks), entry=entry, looked_up=looked_up)

    def state_flops_terms(self, context: int, convention: Convention) -> tuple[Term, ...]:
        causal = convention.causal
        symbols: dict[str, Rational] = {"H": self.heads, "k": self.head_dim, "v": self.v_head_dim}
        symbols["blocks"] = mean_blocks(context, causal, self.compress_size, self.compress_stride)
        symbols["picked"] = mean_keys(context, causal, self.select_count * self.select_size)
        symbols["near"] = mean_keys(context, causal, self.window)
        return (
            term("nsa: compressed", "2*H*(k + v)*blocks", symbols),
            term("nsa: picked blocks", "2*H*(k + v)*picked", symbols),
            term("nsa: window", "2*H*(k + v)*near", symbols),
        )

    def describe(self) -> str:
        return f"nsa, {self.select_count:,} x {self.select_size:,} and window {self.window:,}"


class MoBA(GroupedHeads, frozen=True, kw_only=True, tag_field="kind", tag="moba"):
    """Mixture of block attention: a query scores the mean key of each earlier block, and attends to the best blocks.

    It attends to `top_k` blocks, its own block among them.
    parameters in matmuls: attention's      state: G(k + v)t, and Gk for the mean key of each whole block
    state FLOPs per token: 2Hk blocks to score, 2H(k + v) picked to attend: mean earlier blocks, and
    min(i, top_k x block_size); the query's own block counts whole once top_k blocks exist.
    output_norm: an RMSNorm of v weights (flash-linear-attention, checked for parameters; not in the paper).
    """

    source: ClassVar[str] = (
        "Lu et al. 2025, arXiv 2502.13189, section 2.2; flash-linear-attention, ops/moba/parallel.py"
    )

    sparse_reads: ClassVar[bool] = True

    block_size: Window = 4096
    top_k: Size = 12
    output_norm: bool = False

    def other_terms(self, hidden: int) -> tuple[Term, ...]:
        terms = super().other_terms(hidden)
        return (*terms, term("output norm", "v", self.head_symbols(hidden))) if self.output_norm else terms

    def state_terms(self, context: int) -> tuple[Term, ...]:
        symbols = {"G": self.kv_heads, "k": self.head_dim, "v": self.v_head_dim, "t": context}
        return (term("moba", "G*(k + v)*t + G*k*blocks", symbols | {"blocks": context // self.block_size}),)

    def state_size(self, context: int) -> StateSize:
        entry = self.kv_heads * (self.head_dim + self.v_head_dim)
        means = self.kv_heads * self.head_dim * (context // self.block_size)
        picked = min(context, self.top_k * self.block_size)
        return StateSize(cache=entry * context + means, entry=entry, looked_up=entry * picked + means)

    def state_flops_terms(self, context: int, convention: Convention) -> tuple[Term, ...]:
        causal, block = convention.causal, self.block_size
        symbols: dict[str, Rational] = {"H": self.heads, "k": self.head_dim, "v": self.v_head_dim}
        symbols["blocks"] = mean_earlier_blocks(context, causal, block)
        symbols["picked"] = mean_keys(context, causal, self.top_k * block)
        return (
            term("moba: score blocks", "2*H*k*blocks", symbols),
            term("moba: picked blocks", "2*H*(k + v)*picked", symbols),
        )

    def describe(self) -> str:
        return f"moba, {self.top_k:,} x {self.block_size:,}"


def mean_earlier_blocks(context: int, causal: Causal, block: int) -> Fraction:
    """Return the mean number of blocks before a query's own; "full" counts all blocks but the last."""
    whole, rest = divmod(context, block)
    if causal == "full":
        return Fraction((context - 1) // block)
    return Fraction(block * whole * (whole - 1) // 2 + whole * rest, context)


class DSA(MLA, frozen=True, kw_only=True, tag_field="kind", tag="dsa"):
    """DeepSeek sparse attention: MLA over the `top_k` keys that a lightning indexer of X heads of x features picks.

    parameters in matmuls: MLA's, and qXx + mx + mX of the indexer; its key norm has 2x
    state: (L + r)t, and xt of the indexer's keys
    state FLOPs per token: 2Xx keys to score every key, 2H(2L + r) top for MLA in absorbed form over min(i, top_k) keys;
    the weighted sum over the indexer's heads is not counted. One token looks up all indexer keys and top_k latents.
    Checked against transformers' DeepSeek-V3.2. Its indexer runs in fp8, which halves the bytes of the indexer.
    """

    source: ClassVar[str] = "DeepSeek-V3.2-Exp report, section 2 (equation 1); DeepSeek-V2, arXiv 2405.04434 (MLA)"

    index_heads: Size = 64
    index_head_dim: Size = 128
    top_k: Window = 2048

    @property
    def keeps_every_key(self) -> bool:
        return False

    def check(self) -> None:
        if self.q_lora_rank is None:
            raise problem("q_lora_rank", "q_lora_rank is missing: the indexer's queries come from the query latent")

    def mla_symbols(self, hidden: int) -> dict[str, int]:
        return super().mla_symbols(hidden) | {"X": self.index_heads, "x": self.index_head_dim}

    def matmul_terms(self, hidden: int) -> tuple[Term, ...]:
        return (*super().matmul_terms(hidden), term("indexer", "q*X*x + m*x + m*X", self.mla_symbols(hidden)))

    def other_terms(self, hidden: int) -> tuple[Term, ...]:
        return (*super().other_terms(hidden), term("indexer norm", "2*x", self.mla_symbols(hidden)))

    def state_terms(self, context: int) -> tuple[Term, ...]:
        symbols = {"L": self.kv_lora_rank, "r": self.qk_rope_head_dim, "x": self.index_head_dim, "t": context}
        return (term("dsa: latents", "(L + r)*t", symbols), term("dsa: indexer keys", "x*t", symbols))

    def state_size(self, context: int) -> StateSize:
        latent = self.kv_lora_rank + self.qk_rope_head_dim
        entry = latent + self.index_head_dim
        looked_up = self.index_head_dim * context + latent * min(context, self.top_k)
        return StateSize(cache=entry * context, entry=entry, looked_up=looked_up)

    def state_flops_terms(self, context: int, convention: Convention) -> tuple[Term, ...]:
        causal = convention.causal
        means = {"keys": mean_keys(context, causal), "top": mean_keys(context, causal, self.top_k)}
        symbols: dict[str, Rational] = {**self.mla_symbols(0), **means}
        return (term("dsa: indexer", "2*X*x*keys", symbols), term("dsa: attention", "2*H*(2*L + r)*top", symbols))

    def decode_flops_terms(self, context: int) -> tuple[Term, ...]:
        return self.state_flops_terms(context, Convention(causal="full"))

    def describe(self) -> str:
        return f"dsa, top {self.top_k:,}"

    @classmethod
    def from_relative(cls, mixer: Mixer) -> Inherited | None:
        """Return MLA's fields, with DeepSeek-V3's query latent where the layer has none."""
        inherited = super().from_relative(mixer)
        if inherited is None or inherited.fields["q_lora_rank"] is not None:
            return inherited and Inherited(inherited.fields)
        remark = f"the indexer needs a query latent: {QUERY_LATENT:,} as in DeepSeek-V3"
        return Inherited(inherited.fields | {"q_lora_rank": QUERY_LATENT}, (remark,))

    @classmethod
    def from_heads(cls, heads: dict[str, Any], settings: dict[str, Any], remark: str) -> Inherited:
        inherited = super().from_heads(heads, settings, remark)
        return Inherited(inherited.fields | {"q_lora_rank": QUERY_LATENT}, inherited.remarks)


QUERY_LATENT = 1536
"""Rank of the query latent of DeepSeek-V3 (arXiv 2412.19437, section 4.2), which an indexer needs."""
