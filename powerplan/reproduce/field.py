"""What powerplan computes for claims of other long-context systems: bytes and FLOPs, also where they claim times."""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from math import log2
from typing import Any

import msgspec

from powerplan.accounting import Accounting
from powerplan.caches.policy import Policy
from powerplan.ffn import MLP, MoE
from powerplan.hardware import find_device, si_value
from powerplan.load import catalogue_spec
from powerplan.mixers import Attention, Convention, ExponentialSparse, MemorySparse, Mixer, SpanSearch
from powerplan.mixers.formulas import total
from powerplan.reproduce.figures import Figure
from powerplan.reproduce.power import Computed
from powerplan.serving import Fleet, Serving
from powerplan.spec import LayerGroup, ModelSpec

BILLION = 10**9
APRIEL_CONTEXT, HYENA_CONTEXT, SPARSE_CONTEXT = 2**14, 10**6, 2**17
"""Tokens of the claims: Apriel-H1 writes 16k, HyenaDNA reads 1M, PowerAttention 128k."""

SHARED_BATCH = 64
"""Sequences that share the weights where a claim names no batch."""

MSA_TOKENS, A800_BYTES = 10**8, 80 * 10**9


def _heads_of(mixer: Mixer) -> dict[str, Any]:
    assert isinstance(mixer, Attention)
    fields = ("heads", "kv_heads", "head_dim", "v_head_dim")
    return {field: getattr(mixer, field) for field in fields}


@cache
def _with_attention(name: str, heads: int, kv_heads: int, head_dim: int) -> ModelSpec:
    """Return a model of the catalogue with attention in the layers that have another mixer."""
    attention = Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    return catalogue_spec(name).map_mixers(lambda mixer: attention)


def _sizes(figure: Figure) -> Computed:
    accounting = Accounting(catalogue_spec(figure.model))
    count = accounting.active_parameters if figure.quantity == "active" else accounting.total_parameters
    unit = BILLION if figure.unit == "B" else 10**6
    return {
        "all": Fraction(count.with_embeddings, unit),
        "head": Fraction(count.without_input_embedding, unit),
        "body": Fraction(count.without_embeddings, unit),
    }


def _apriel() -> Computed:
    """Return by how many times a model with attention in all layers takes more than Apriel-H1, at 16k tokens."""
    fleet = Fleet(find_device("h100-sxm"))
    hybrid = Serving(Accounting(catalogue_spec("apriel-h1-15b")), APRIEL_CONTEXT, "bf16", fleet)
    teacher = Serving(Accounting(_with_attention("apriel-h1-15b", 32, 8, 128)), APRIEL_CONTEXT, "bf16", fleet)
    assert hybrid.largest_batch
    assert teacher.largest_batch
    return {
        "state bytes": teacher.row.state_bytes / hybrid.row.state_bytes,
        "bytes at batch 1": teacher.step(1).moved_bytes / hybrid.step(1).moved_bytes,
        "bytes at batch 64": teacher.step(SHARED_BATCH).moved_bytes / hybrid.step(SHARED_BATCH).moved_bytes,
        "largest batch": Fraction(hybrid.largest_batch, teacher.largest_batch),
    }


def _hyena() -> Computed:
    """Return how many times the FLOPs of a prompt of 1M tokens are with attention, FFTs as they are executed."""
    convention = Convention(form="chunked")
    own = Serving(Accounting(catalogue_spec("hyenadna-large-1m"), convention), HYENA_CONTEXT)
    full = Serving(Accounting(_with_attention("hyenadna-large-1m", 4, 4, 64), convention), HYENA_CONTEXT)
    return {"prompt FLOPs": full.prefill_flops / own.prefill_flops, "state FLOPs": _state(full) / _state(own)}


def _state(serving: Serving) -> Fraction:
    return serving.row.state_flops_per_token


def _sparse() -> Computed:
    """Return how many times the FLOPs and bytes of attention are those of PowerAttention, in Qwen2.5 7B."""
    full = catalogue_spec("qwen2.5-7b")
    own = full.map_mixers(lambda mixer: ExponentialSparse(bias="qkv", **_heads_of(mixer)))
    dense, sparse = (Serving(Accounting(spec), SPARSE_CONTEXT) for spec in (full, own))
    return {
        "state FLOPs": _state(dense) / _state(sparse),
        "prompt FLOPs": dense.prefill_flops / sparse.prefill_flops,
        "bytes at batch 1": dense.step(1).moved_bytes / sparse.step(1).moved_bytes,
    }


def _exponent() -> Computed:
    """Return with which power of the context the state FLOPs of a sequence grow, from 1M to 4M tokens."""
    mixer = SpanSearch(heads=32, kv_heads=8, head_dim=128)
    short, long = (tokens * total(mixer.state_flops_terms(tokens, Convention())) for tokens in (2**20, 2**22))
    return {"exponent": Fraction(log2(Fraction(long) / Fraction(short)) / 2)}


def _stem() -> Computed:
    """Return the share of an FFN's weight FLOPs that is gone in a layer with a table."""
    spec = catalogue_spec("stem-1b")
    ffns = [use.layer.ffn for use in spec.layer_uses()]
    flops = {ffn.kind: Fraction(total(ffn.matmul_terms(spec.hidden_size))) for ffn in ffns if ffn is not None}
    return {"FFN FLOPs": 100 * (1 - flops["stem"] / flops["mlp"])}


def _budget(figure: Figure) -> Computed:
    """Return how many times the cache of 128k tokens is that of a budget of so many tokens (figure.context)."""
    accounting = Accounting(catalogue_spec("llama-3.1-8b"))
    whole, kept = (Serving(accounting, 2**17, policy=policy) for policy in (Policy(), Policy(budget=figure.context)))
    return {"cache bytes": whole.cache_bytes / kept.cache_bytes}


def _peak() -> Computed:
    rate = Fraction(si_value(find_device("b200-sxm"), "bf16_tflops") or 0)
    return {"bf16 peak": 100 * Fraction(1613 * 10**12) / rate}


def _documents() -> Computed:
    """Return how many A800s hold Qwen3 4B and the memory of 100M tokens in the upper half of its layers."""
    spec = catalogue_spec("qwen3-4b")
    (attention,) = spec.mixers()
    layers = spec.layer_count // 2
    mixer = MemorySparse(qk_norm="head", document_size=2**14, question_size=2**10, **_heads_of(attention))
    means = MSA_TOKENS // mixer.pool_size * layers * mixer.kv_heads * 2
    weights = Serving(Accounting(spec), 1).stored_bytes
    routing, values = means * mixer.head_dim, means * (mixer.head_dim + mixer.v_head_dim)
    return {
        "all means": (weights + routing + values) / A800_BYTES,
        "routing keys": (weights + routing) / A800_BYTES,
    }


def memory_remark() -> str:
    """Return a sentence with the bytes that UltraMemV2 reads beside its mixture of experts; the paper has no table."""
    spec = catalogue_spec("ultramemv2-1.2b")
    experts = MoE(experts=64, top_k=8, intermediate_size=384)
    blocks = [layer for group in spec.layers for layer in group.period if isinstance(layer.ffn, MLP)]
    group = LayerGroup(repeat=spec.layer_count // 2, mixer=blocks[0].mixer, ffn=experts)
    mixture = msgspec.structs.replace(spec, layers=(group,))
    ratios = []
    for batch in (1, SHARED_BATCH):
        own, other = (Serving(Accounting(one), 4096).step(batch).weight_bytes for one in (spec, mixture))
        ratios.append(f"{float(other / own):.2f}x at batch {batch}")
    return (
        f"Computed, not published: OLMoE of the same size (64 experts of 384, 8 active) reads {' and '.join(ratios)} "
        "the weight bytes of UltraMemV2, all matrices included."
    )


def field(figure: Figure) -> Computed:
    """Return what is computed for a claim, under each convention."""
    if figure.quantity in ("parameters", "active"):
        return _sizes(figure)
    if figure.quantity == "budget":
        return _budget(figure)
    compute = {
        "apriel": _apriel,
        "hyena": _hyena,
        "sparse": _sparse,
        "exponent": _exponent,
        "stem": _stem,
        "peak": _peak,
        "documents": _documents,
    }
    return compute[figure.quantity]()
