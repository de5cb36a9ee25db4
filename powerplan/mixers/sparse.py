"""Sparse attention: softmax over the part of the cache that a query picks (NSA, MoBA, DSA, MiniMax-M3)."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from powerplan.choices import Causal
from powerplan.mixers.base import Inherited, Mixer
from powerplan.mixers.formulas import Convention, Formulas, Rational, Term, mean_keys
from powerplan.mixers.heads import GroupedHeads
from powerplan.mixers.mla import MLA
from powerplan.part import Size, Window, problem


def mean_blocks(context: int, causal: Causal, block: int, stride: int) -> Fraction:
    """Return the mean number of whole blocks that end at or before a query; "full" counts all blocks.

    A block has `block` tokens, and one begins every `stride` tokens.
    """
    count = (context - block) // stride + 1 if context >= block else 0
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

    compress_size: tokens of a block that is compressed to one key and value.
    compress_stride: tokens from the start of one compressed block to the next.
    select_size: tokens of a block that is picked whole.
    select_count: blocks that a query picks.
    window: the last keys that a query always attends to, in tokens.
    """

    source = "Yuan et al. 2025, arXiv 2502.11089, section 3; flash-linear-attention, layers/nsa.py"
    entry = "G*(k + v)"
    looked_up = "G*(k + v)*(blocks + picked + near)"
    sparse_reads = True

    compress_size: Window = 32
    compress_stride: Window = 16
    select_size: Window = 64
    select_count: Size = 16
    window: Window = 512

    def matmul_formulas(self) -> Formulas:
        return (*super().matmul_formulas(), ("branch gates", "3*m*H"))

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        return (*super().matrix_formulas(idle), ("branch gates", "1", "3*H", "m"))

    def state_formulas(self) -> Formulas:
        return (("nsa", "G*(k + v)*(t + blocks)"),)

    def flops_formulas(self, chunked: bool) -> Formulas:
        return (
            ("nsa: compressed", "2*H*(k + v)*blocks"),
            ("nsa: picked blocks", "2*H*(k + v)*picked"),
            ("nsa: window", "2*H*(k + v)*near"),
        )

    def flops_values(self, context: int, convention: Convention) -> dict[str, Rational]:
        causal = convention.causal
        return {
            "blocks": mean_blocks(context, causal, self.compress_size, self.compress_stride),
            "picked": mean_keys(context, causal, self.select_count * self.select_size),
            "near": mean_keys(context, causal, self.window),
        }

    def describe(self) -> str:
        return f"nsa, {self.select_count:,} x {self.select_size:,} and window {self.window:,}"


class MoBA(GroupedHeads, frozen=True, kw_only=True, tag_field="kind", tag="moba"):
    """Mixture of block attention: a query scores the mean key of each earlier block, and attends to the best blocks.

    It attends to `top_k` blocks, its own block among them.
    parameters in matmuls: attention's      state: G(k + v)t, and Gk for the mean key of each whole block
    state FLOPs per token: 2Hk blocks to score, 2H(k + v) picked to attend: mean earlier blocks, and
    min(i, top_k x block_size); the query's own block counts whole once top_k blocks exist.

    block_size: tokens of a block.
    top_k: blocks that a query attends to, its own among them.
    output_norm: an RMSNorm of v weights (flash-linear-attention, checked for parameters; not in the paper).
    """

    source = "Lu et al. 2025, arXiv 2502.13189, section 2.2; flash-linear-attention, ops/moba/parallel.py"
    entry = "G*(k + v)"
    looked_up = "G*(k + v)*picked + G*k*blocks"
    sparse_reads = True

    block_size: Window = 4096
    top_k: Size = 12
    output_norm: bool = False

    def other_formulas(self) -> Formulas:
        return (*super().other_formulas(), ("output norm", "v" if self.output_norm else ""))

    def state_formulas(self) -> Formulas:
        return (("moba", "G*(k + v)*t + G*k*blocks"),)

    def state_values(self, context: int) -> dict[str, int]:
        return super().state_values(context) | {"blocks": context // self.block_size}

    def flops_formulas(self, chunked: bool) -> Formulas:
        return (("moba: score blocks", "2*H*k*blocks"), ("moba: picked blocks", "2*H*(k + v)*picked"))

    def flops_values(self, context: int, convention: Convention) -> dict[str, Rational]:
        causal = convention.causal
        return {
            "blocks": mean_earlier_blocks(context, causal, self.block_size),
            "picked": mean_keys(context, causal, self.top_k * self.block_size),
        }

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

    index_heads: heads of the indexer.
    index_head_dim: features of a query and of the key of the indexer, per head.
    top_k: keys that a query attends to, in tokens.
    shared_index: the keys are those that an earlier layer picked (GLM-5): no indexer, and no indexer's keys.
    """

    source = "DeepSeek-V3.2-Exp report, section 2 (equation 1); DeepSeek-V2, arXiv 2405.04434 (MLA)"
    letters = MLA.letters + " X=index_heads x=index_head_dim"
    entry = "L + r + x"
    looked_up = "x*t + (L + r)*top"

    index_heads: Size = 64
    index_head_dim: Size = 128
    top_k: Window = 2048
    shared_index: bool = False

    def check(self) -> None:
        if self.q_lora_rank is None:
            raise problem("q_lora_rank", "q_lora_rank is missing: the indexer's queries come from the query latent")

    def matmul_formulas(self) -> Formulas:
        return (*super().matmul_formulas(), ("indexer", "" if self.shared_index else "q*X*x + m*x + m*X"))

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        if self.shared_index:
            return super().matrix_formulas(idle)
        indexer = (("indexer", "1", "X*x", "q"), ("indexer", "1", "x", "m"), ("indexer", "1", "X", "m"))
        return (*super().matrix_formulas(idle), *indexer)

    def other_formulas(self) -> Formulas:
        return (*super().other_formulas(), ("indexer norm", "" if self.shared_index else "2*x"))

    def state_formulas(self) -> Formulas:
        return (("dsa: latents", "(L + r)*t"), ("dsa: indexer keys", "" if self.shared_index else "x*t"))

    def state_values(self, context: int) -> dict[str, int]:
        return super().state_values(context) | ({"x": 0} if self.shared_index else {})

    def flops_formulas(self, chunked: bool) -> Formulas:
        indexer = "" if self.shared_index else "2*X*x*keys"
        return (("dsa: indexer", indexer), ("dsa: attention", "2*H*(2*L + r)*top"))

    def flops_values(self, context: int, convention: Convention) -> dict[str, Rational]:
        top = mean_keys(context, convention.causal, self.top_k)
        return {"keys": mean_keys(context, convention.causal), "top": top}

    def decode_flops_terms(self, context: int) -> tuple[Term, ...]:
        return Mixer.decode_flops_terms(self, context)

    def describe(self) -> str:
        return f"dsa, top {self.top_k:,}{', of an earlier layer' if self.shared_index else ''}"

    @classmethod
    def from_layer(cls, mixer: Mixer, hidden: int) -> Inherited | None:
        """Return MLA's fields, with DeepSeek-V3's query latent where the layer has none."""
        inherited = super().from_layer(mixer, hidden)
        if inherited is None or inherited.fields["q_lora_rank"] is not None:
            return inherited and Inherited(inherited.fields)
        remark = f"the indexer needs a query latent: {QUERY_LATENT:,} as in DeepSeek-V3"
        return Inherited(inherited.fields | {"q_lora_rank": QUERY_LATENT}, (remark,))

    @classmethod
    def from_heads(cls, heads: dict[str, Any], settings: dict[str, Any], remark: str) -> Inherited:
        inherited = super().from_heads(heads, settings, remark)
        return Inherited(inherited.fields | {"q_lora_rank": QUERY_LATENT}, inherited.remarks)


class IndexedBlocks(GroupedHeads, frozen=True, kw_only=True, tag_field="kind", tag="indexed_blocks"):
    """Block-sparse attention of MiniMax-M3: an indexer of X heads of x features scores all keys, and picks blocks.

    The best score within a block counts, and each query attends to `top_k` blocks of `block_size` tokens, its own among
    them. Index heads share one key; each picks for its part of the key/value heads.
    parameters in matmuls: attention's, and mXx + mx of the indexer; norms of its queries and its key have 2x
    state: G(k + v)t, and xt of the indexer's keys
    state FLOPs per token: 2Xx keys to score every key, 2H(k + v) picked to attend: min(i, top_k x block_size); the
    query's own block counts whole once top_k blocks exist. One token looks up all indexer keys and the picked blocks.
    Parameters checked against transformers' MiniMax-M3.

    index_heads: heads of the indexer.
    index_head_dim: features of a query and of the key of the indexer, per head.
    block_size: tokens of a block.
    top_k: blocks that a query attends to, its own among them.
    """

    source = "MiniMax-M3, transformers 5.23, models/minimax_m3_vl, MiniMaxM3VLIndexer"
    letters = GroupedHeads.letters + " X=index_heads x=index_head_dim"
    entry = "G*(k + v) + x"
    looked_up = "x*t + G*(k + v)*picked"
    sparse_reads = True

    index_heads: Size = 4
    index_head_dim: Size = 128
    block_size: Window = 128
    top_k: Size = 16

    def matmul_formulas(self) -> Formulas:
        return (*super().matmul_formulas(), ("indexer", "m*X*x + m*x"))

    def matrix_formulas(self, idle: bool) -> tuple[tuple[str, str, str, str], ...]:
        return (*super().matrix_formulas(idle), ("indexer", "1", "X*x", "m"), ("indexer", "1", "x", "m"))

    def other_formulas(self) -> Formulas:
        return (*super().other_formulas(), ("indexer norms", "2*x"))

    def state_formulas(self) -> Formulas:
        return (("indexed blocks: keys and values", "G*(k + v)*t"), ("indexed blocks: indexer keys", "x*t"))

    def flops_formulas(self, chunked: bool) -> Formulas:
        return (("indexed blocks: indexer", "2*X*x*keys"), ("indexed blocks: picked", "2*H*(k + v)*picked"))

    def flops_values(self, context: int, convention: Convention) -> dict[str, Rational]:
        causal = convention.causal
        picked = mean_keys(context, causal, self.top_k * self.block_size)
        return {"keys": mean_keys(context, causal), "picked": picked}

    def describe(self) -> str:
        return f"indexed blocks, {self.top_k:,} x {self.block_size:,}"


QUERY_LATENT = 1536
"""Rank of the query latent of DeepSeek-V3 (arXiv 2412.19437, section 4.2), which an indexer needs."""
