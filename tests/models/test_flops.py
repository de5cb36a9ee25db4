"""FLOPs that built models execute, as torch counts them, equal the accounting to the last one.

Torch's counter knows no triangular solve and no flash attention of the CPU: both are given to it here, each as what the
accounting counts for it, an inverse by forward substitution and full squares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import msgspec
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from kinds import EXPERTS, MIXERS, SHARED, spec_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from powerplan import flops_per_step
from powerplan.accounting import Accounting
from powerplan.ffn import MLP, MoE
from powerplan.load import catalogue_names, catalogue_spec
from powerplan.mixers import (
    DSA,
    GLA,
    GSA,
    NSA,
    RWKV7,
    Attention,
    Convention,
    FeatureAttention,
    Forgetting,
    Lightning,
    LogLinear,
    Mamba1,
    Mamba2,
    MoBA,
    RetNet,
    SparseStateExpansion,
)
from powerplan.mixers.base import Mixer
from powerplan.mixers.delta import DeltaRule
from powerplan.mixers.formulas import total
from powerplan.mixers.ssm import mean_levels
from powerplan.models import Cache, build_model
from powerplan.models.mixers import BUILT, pieces, unbuilt_field
from powerplan.spec import LayerGroup, ModelSpec

BATCH = 2


def solve_flops(matrix: Any, right: Any, *_: Any, **__: Any) -> int:
    """2 i^2 for row i of each inverse."""
    *batch, size, _ = matrix
    assert matrix == right, "only inverses are solved for"
    return int(torch.Size(batch).numel()) * size * (size - 1) * (2 * size - 1) // 3


def flash_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    batch, heads, tokens, head_dim = q
    return int(2 * batch * heads * tokens * k[2] * (head_dim + v[3]))


def convolution_flops(
    gradient: Any, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """Both gradients, as many as the forward pass each: torch counts a depthwise convolution as a dense one."""
    *_, channels, tokens = gradient
    return int(2 * 2 * gradient[0] * channels * tokens * weight[1] * weight[2])


MISSING: dict[Any, Callable[..., int]] = {
    torch.ops.aten.linalg_solve_triangular: solve_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flash_flops,
    torch.ops.aten.convolution_backward: convolution_flops,
}


def executed(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False, custom_mapping=MISSING) as counter:
        run()
    return int(counter.get_total_flops())


def in_blocks(spec: ModelSpec, tokens: int) -> int:
    """Return what windows execute beyond the accounting: they run as blocks that see two blocks each, but the first.

    Beyond w keys for each query, that is (2n - 1) w^2 pairs for n = ceil(T / w) blocks instead of T w.
    """
    more = 0
    for use in spec.layer_uses():
        mixer = use.layer.mixer
        if not isinstance(mixer, (Attention, NSA)) or isinstance(mixer, Forgetting):
            continue
        if mixer.window is not None and mixer.window < tokens:
            width = mixer.window
            pairs = (2 * -(-tokens // width) - 1) * width**2 - tokens * width
            more += use.count * 2 * mixer.heads * (mixer.head_dim + mixer.v_head_dim) * pairs
    return more


def padded(spec: ModelSpec, tokens: int) -> int:
    """Return what attention with sinks executes beyond the accounting: flash attention of equal K and V."""
    more = 0
    for use in spec.layer_uses():
        mixer = use.layer.mixer
        if isinstance(mixer, Attention) and mixer.sinks:
            width = tokens if mixer.window is None else min(mixer.window, tokens)
            pairs = tokens**2 if width == tokens else (2 * -(-tokens // width) - 1) * width**2
            more += use.count * 2 * mixer.heads * abs(mixer.head_dim - mixer.v_head_dim) * pairs
    return more


@dataclass(frozen=True)
class Sparse:
    """State FLOPs of one sequence: what the accounting counts, and what kinds that run in pieces of queries execute.

    attended: products of queries and keys, and of weights and values.
    again: those of queries and keys, which the backward pass computes again before it computes gradients.
    scored: products that pick keys, without gradients.
    """

    counted: int
    attended: int
    again: int
    scored: int = 0


def in_pieces(mixer: Mixer | None, tokens: int) -> Sparse | None:
    """Return what forgetting and sparse attention execute, windows of NSA aside; None for other kinds.

    Pieces of 256 queries meet the keys up to their last query, where the accounting counts all keys. DSA scores none
    where a piece ends within its picks. MoBA meets a query's own block so far, and its other picks whole.
    """
    if not isinstance(mixer, (Forgetting, MoBA, NSA, DSA)):
        return None
    terms = mixer.state_flops_terms(tokens, Convention(causal="full", form="chunked"))
    counted = int(tokens * total(term for term in terms if term.component != "nsa: window"))
    starts = range(0, tokens, pieces.MAX_QUERIES)
    spans = [(start, min(start + pieces.MAX_QUERIES, tokens)) for start in starts]
    if isinstance(mixer, DSA):
        key, value = (
            2 * mixer.heads * size for size in (mixer.kv_lora_rank + mixer.qk_rope_head_dim, mixer.kv_lora_rank)
        )
        met = sum((stop - start) * min(stop, mixer.top_k) for start, stop in spans)
        scored = sum((stop - start) * stop for start, stop in spans if stop > mixer.top_k)
        return Sparse(counted, (key + value) * met, key * met, 2 * mixer.index_heads * mixer.index_head_dim * scored)
    key, value = 2 * mixer.heads * mixer.head_dim, 2 * mixer.heads * mixer.v_head_dim
    if isinstance(mixer, Forgetting):
        firsts = [0 if mixer.window is None else max(0, start + 1 - mixer.window) for start, _ in spans]
        pairs = sum((stop - start) * (stop - first) for (start, stop), first in zip(spans, firsts, strict=True))
        return Sparse(counted, (key + value) * pairs, key * pairs)
    if isinstance(mixer, NSA):
        width, stride, most = mixer.compress_size, mixer.compress_stride, mixer.select_count * mixer.select_size
        pairs = sum((stop - start) * min(stop, most) for start, stop in spans)
        pairs += sum((stop - start) * max(0, (stop - width) // stride + 1) for start, stop in spans)
        return Sparse(counted, (key + value) * pairs, key * pairs)
    block, pairs = mixer.block_size, 0
    assert block <= pieces.MAX_QUERIES, "a block of queries is a piece"
    for index in range(-(-tokens // block)):
        queries = min(block, tokens - index * block)
        pairs += queries * (queries + block * min(index, mixer.top_k - 1))
    return Sparse(counted, (key + value) * pairs, key * pairs, key * tokens * ((tokens - 1) // block))


def sparse_parts(spec: ModelSpec, tokens: int) -> Sparse:
    """Return the sums of `in_pieces` over the layers of a model."""
    found = [(in_pieces(use.layer.mixer, tokens), use.count) for use in spec.layer_uses()]
    parts = [(part, count) for part, count in found if part is not None]
    names = ("counted", "attended", "again", "scored")
    return Sparse(*(sum(count * getattr(part, name) for part, count in parts) for name in names))


def unread(spec: ModelSpec, tokens: int, kinds: tuple[type[Mixer], ...] = (FeatureAttention, RetNet, Lightning)) -> int:
    """Return what kernels in chunks do not execute: the last chunk is not added to a state that nobody reads.

    The accounting counts the state after the last token, as what comes next would need it.
    """
    less = 0
    for use in spec.layer_uses():
        mixer = use.layer.mixer
        if isinstance(mixer, kinds):
            chunk = mixer.effective_chunk_size()  # type: ignore[union-attr]
            less += use.count * step_flops(mixer, tokens, "update state") * (tokens % chunk or min(chunk, tokens))
    return less


def step_flops(mixer: Mixer, tokens: int, step: str) -> int:
    """Return the FLOPs per token of one step of the chunked form."""
    terms = mixer.state_flops_terms(tokens, Convention(causal="full", form="chunked"))
    (found,) = [int(term.value) for term in terms if term.component.endswith(step)]
    return found


def unasked(spec: ModelSpec, tokens: int) -> Fraction:
    """Return the levels that chunks of log-linear attention do not read: the 0 bits of their indices."""
    less = Fraction(0)
    for use in spec.layer_uses():
        mixer = use.layer.mixer
        if isinstance(mixer, LogLinear):
            full, exact = (mean_levels(tokens, mixer.chunk_size, every) for every in (True, False))
            less += use.count * tokens * 2 * mixer.inner_size * mixer.state_dim * (full - exact)
    return less


def uncounted(spec: ModelSpec, tokens: int) -> int:
    """Return the elementwise decays of Mamba's scan, which torch does not count."""
    mixers = [(use.layer.mixer, use.count) for use in spec.layer_uses()]
    return sum(
        tokens * count * step_flops(mixer, tokens, "decay state")
        for mixer, count in mixers
        if isinstance(mixer, Mamba1)
    )


def routed(mixer: SparseStateExpansion, chosen: torch.Tensor) -> int:
    """Return what partitions execute beyond the accounting, for the choices [B, T, top_k] of the tokens.

    The accounting lets the tokens of every partition fill its chunks. They are as many as chose it.
    """
    size, chunk = 2 * mixer.heads * (mixer.head_dim + mixer.v_head_dim), mixer.chunk_size
    rows, tokens, _ = chosen.shape

    def pairs(length: int) -> int:
        return length // chunk * chunk**2 + (length % chunk) ** 2

    executed_pairs = sum(pairs(length) for row in chosen.flatten(1) for length in row.bincount().tolist())
    return size * (executed_pairs - rows * mixer.top_k * pairs(tokens))


def choices_of(model: Any) -> list[tuple[SparseStateExpansion, torch.Tensor]]:
    """Return a list to which every layer with partitions adds its mixer and the choices of each call."""
    found: list[tuple[SparseStateExpansion, torch.Tensor]] = []
    mixers = [use.layer.mixer for use in model.spec.layer_uses() for _ in range(use.count)]
    for mixer, layer in zip(mixers, model.layers, strict=True):
        if isinstance(mixer, SparseStateExpansion):
            layer.mixer.router.register_forward_hook(
                lambda *call, mixer=mixer: found.append((mixer, call[2].topk(mixer.top_k).indices))
            )
    return found


def check_flops(spec: ModelSpec, tokens: int, device: str) -> None:
    accounting = Accounting(spec, Convention(causal="full", form="chunked"))
    expected = tokens * (Fraction(accounting.weight_flops_per_token) + accounting.state_flops_per_token(tokens))
    model = build_model(spec, device=device)
    ids = (torch.arange(BATCH * tokens, device=device) % 9).view(BATCH, tokens)
    choices = choices_of(model)
    counted = executed(lambda: model(ids)) - sum(routed(*choice) for choice in choices)
    sparse = sparse_parts(spec, tokens)
    more = in_blocks(spec, tokens) + padded(spec, tokens) - unread(spec, tokens)
    more += sparse.attended + sparse.scored - sparse.counted
    assert counted == BATCH * (expected + more - uncounted(spec, tokens) - unasked(spec, tokens))


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize(("tokens", "device"), [(1, "meta"), (8, "meta"), (150, "meta"), (43, "cpu")])
def test_every_kind(kind: str, tokens: int, device: str) -> None:
    if isinstance(MIXERS[kind], (SparseStateExpansion, MoBA)):
        device = "cpu"  # A router needs values, and how many queries picked a block is one.
    check_flops(spec_of(MIXERS[kind], repeat=2), tokens, device)


def one_of_each(spec: ModelSpec) -> ModelSpec:
    """Return the model with each of its kinds of layers once, and MLPs for experts, whose router needs values, and for
    tables and memories, which are not built."""
    mlp = MLP(intermediate_size=64)
    groups = [
        LayerGroup(
            mixer=use.layer.mixer, ffn=use.layer.ffn if isinstance(use.layer.ffn, MLP) else use.layer.ffn and mlp
        )
        for use in spec.layer_uses()
    ]
    return msgspec.structs.replace(spec, layers=tuple(groups), rope=None)


CATALOGUE = [
    name
    for name in catalogue_names()
    if all(
        type(use.layer.mixer) in BUILT and unbuilt_field(use.layer.mixer) is None
        for use in catalogue_spec(name).layer_uses()
    )
]


@pytest.mark.parametrize("name", CATALOGUE)
def test_layers_of_the_catalogue_in_their_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, where pieces of 256 queries need no memory however many numbers they have."""
    monkeypatch.setattr(pieces, "MAX_NUMBERS", 2**60)
    check_flops(one_of_each(catalogue_spec(name)), 700, "meta")


@pytest.mark.parametrize("ffn", [EXPERTS, SHARED], ids=["experts", "shared, biases"])
@pytest.mark.parametrize("kind", ["attention", "mla", "kda"])
def test_experts_cost_top_k_of_them_per_token(kind: str, ffn: MoE) -> None:
    check_flops(spec_of(MIXERS[kind], ffn, repeat=2), 37, "cpu")


@pytest.mark.parametrize("kind", MIXERS)
def test_one_token_costs_what_decoding_counts(kind: str) -> None:
    """MLA in absorbed form. Torch counts no elementwise work: decays of states, and the outer product of a key and a
    value in the plain step of power attention."""
    mixer, seen = MIXERS[kind], 40
    spec = spec_of(mixer)
    model, cache = build_model(spec), Cache()
    ids = torch.zeros(BATCH, 1, dtype=torch.long)
    elementwise = ("decay", "update") if isinstance(mixer, (FeatureAttention, RetNet, Lightning)) else ("decay",)
    terms = mixer.decode_flops_terms(seen + 1)
    terms = tuple(term for term in terms if not any(name in term.component for name in elementwise))
    with torch.no_grad():
        model(ids.expand(-1, seen), cache)
        counted = executed(lambda: model(ids, cache))
    more = 0
    if isinstance(mixer, MoBA):  # The query's own block has as many keys as there are.
        met = min(seen // mixer.block_size, mixer.top_k - 1) * mixer.block_size + seen % mixer.block_size + 1
        counted_keys = min(seen + 1, mixer.top_k * mixer.block_size)
        more = 2 * mixer.heads * (mixer.head_dim + mixer.v_head_dim) * (met - counted_keys)
    if isinstance(mixer, DSA) and seen < mixer.top_k:  # Nothing is scored.
        more = -2 * mixer.index_heads * mixer.index_head_dim * (seen + 1)
    if isinstance(mixer, Attention) and mixer.sinks:
        more = 2 * mixer.heads * abs(mixer.head_dim - mixer.v_head_dim) * mixer.kept(seen + 1)
    assert counted == BATCH * (Accounting(spec).weight_flops_per_token + total(terms) + more)


ADDED_AT_LAST: tuple[type[Mixer], ...] = (GLA, GSA, Mamba2)
"""Kinds that add the last chunk to a state that nobody reads, which takes FLOPs forward and none backward."""

UNCOUNTED = (DeltaRule, RWKV7, SparseStateExpansion)
TRAINED = [kind for kind in MIXERS if "sinks" not in kind and not isinstance(MIXERS[kind], UNCOUNTED)]
"""Attention with sinks runs in a fused kernel that torch cannot count, and the inverses of delta rules have no count of
their gradient. How much of a partition nobody reads depends on the choices of the tokens."""


@pytest.mark.parametrize("ffn", [None, EXPERTS, SHARED], ids=["mlp", "experts", "shared, biases"])
@pytest.mark.parametrize("kind", TRAINED)
def test_a_training_step_is_what_flops_per_step_says(kind: str, ffn: MoE | None) -> None:
    """Attention by plain products: a fused backward pass computes scores again, which torch's counter counts too."""
    spec, tokens = spec_of(MIXERS[kind], ffn, repeat=2), 43
    model = build_model(spec)
    ids = torch.zeros(BATCH, tokens, dtype=torch.long)

    def step() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            F.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()  # type: ignore[no-untyped-call]

    expected = flops_per_step(spec, tokens, sequences=BATCH, convention=Convention(causal="full", form="chunked"))
    more = in_blocks(spec, tokens) - unread(spec, tokens) - uncounted(spec, tokens) - unasked(spec, tokens)
    sparse = sparse_parts(spec, tokens)
    # What is picked has no gradients, nor have the indexer's weights.
    more_sparse = 3 * sparse.attended + sparse.again + sparse.scored - 3 * sparse.counted
    indexers = [use.layer.mixer for use in spec.layer_uses() for _ in range(use.count)]
    untrained = sum(
        2 * tokens * total(term for term in mixer.matmul_terms(spec.hidden_size) if term.component == "indexer")
        for mixer in indexers
        if isinstance(mixer, DSA)
    )
    less = 2 * unread(spec, tokens, ADDED_AT_LAST) + 2 * untrained
    assert executed(step) == expected + BATCH * (3 * more + more_sparse - less)
