"""What powerplan computes for figures of Kimi Linear (arXiv 2510.26692), and for sizes that other hybrids publish."""

from __future__ import annotations

from fractions import Fraction
from functools import cache

from powerplan.accounting import Accounting
from powerplan.load import catalogue_spec
from powerplan.mixers import Attention, Convention, Mixer
from powerplan.mixers.base import RECURRENT_BYTES
from powerplan.mixers.formulas import total
from powerplan.reproduce.figures import Figure
from powerplan.reproduce.power import Computed
from powerplan.serving import Serving, twin

BILLION = 10**9

MILLION_TOKENS = 2**20
"""The context of Kimi Linear's figures: 1M tokens."""

RECURRENT, CHUNKED = Convention(), Convention(form="chunked")


@cache
def _kimi_and_twin(convention: Convention = RECURRENT) -> tuple[Serving, Serving]:
    """Return Kimi Linear and its twin with MLA in every layer, at 1M tokens."""
    model = Accounting(catalogue_spec("kimi-linear-48b-a3b"), convention)
    return Serving(model, MILLION_TOKENS), Serving(twin(model, "mla")[0], MILLION_TOKENS)


def kimi_state() -> str:
    """Return a sentence with the cache and the recurrent state of one sequence; the paper prints no bytes."""
    hybrid, full = _kimi_and_twin()
    mixers = hybrid.accounting.spec.mixer_counts()
    elements = sum(mixer.state_size(MILLION_TOKENS).recurrent * count for mixer, count in mixers)
    caches = [float(serving.cache_bytes / BILLION) for serving in (hybrid, full)]
    return (
        f"Computed, not published: cache {caches[0]:.2f} GB, and {caches[1]:.2f} GB for the twin; recurrent state "
        f"{elements / 10**6:.2f}M elements in fp32, {elements * RECURRENT_BYTES / 10**6:.1f} MB at any context, and "
        f"{float(hybrid.recurrent_bytes) / 10**6:.1f} MB with the last inputs of its short convolutions in bf16."
    )


def _parameters(accounting: Accounting, figure: Figure) -> Computed:
    """Return billions of parameters, active ones or all: of the whole model, with the LM head only, of the body."""
    count = accounting.active_parameters if figure.quantity == "active" else accounting.total_parameters
    return {
        "all": Fraction(count.with_embeddings, BILLION),
        "head": Fraction(count.without_input_embedding, BILLION),
        "body": Fraction(count.without_embeddings, BILLION),
    }


def _cache() -> Computed:
    hybrid, full = _kimi_and_twin()
    return {
        "cache bytes": 100 * (hybrid.cache_bytes / full.cache_bytes - 1),
        "state bytes": 100 * (hybrid.row.state_bytes / full.row.state_bytes - 1),
    }


def _per_head(mixer: Mixer, convention: Convention) -> Fraction:
    """Return the state FLOPs of one head per token, at 1M tokens."""
    terms = mixer.state_flops_terms(MILLION_TOKENS, convention)
    return Fraction(total(terms)) / terms[0].symbols["H"]


def _equation_13() -> Computed:
    """Return the FLOPs of a head of KDA, the mixer that the twin does not have."""
    hybrid, full = (set(serving.accounting.spec.mixers()) for serving in _kimi_and_twin())
    (kda,) = hybrid - full
    return {"chunked": _per_head(kda, CHUNKED), "recurrent": _per_head(kda, RECURRENT)}


def _equation_14() -> Computed:
    """Return the FLOPs of a head of softmax attention and of MLA, the mixer of all layers of the twin."""
    (mla,) = _kimi_and_twin()[1].accounting.spec.mixers()
    attention = Attention(heads=1, head_dim=128)
    return {"attention": _per_head(attention, RECURRENT), "mla": _per_head(mla, RECURRENT)}


def _prefill() -> Computed:
    pairs = {"prompt FLOPs": _kimi_and_twin(), "chunked FLOPs": _kimi_and_twin(CHUNKED)}
    return {name: full.prefill_flops / hybrid.prefill_flops for name, (hybrid, full) in pairs.items()}


def _decode() -> Computed:
    hybrid, full = _kimi_and_twin()
    return {
        "cache bytes": full.cache_bytes / hybrid.cache_bytes,
        "state bytes": full.row.state_bytes / hybrid.row.state_bytes,
        "state bytes moved": full.row.decode_state_bytes_per_token / hybrid.row.decode_state_bytes_per_token,
        "bytes at batch 1": full.step(1).moved_bytes / hybrid.step(1).moved_bytes,
        "bytes at batch 64": full.step(64).moved_bytes / hybrid.step(64).moved_bytes,
    }


def kimi(figure: Figure) -> Computed:
    """Return what is computed for a figure of Kimi Linear, under each convention."""
    if figure.quantity in ("parameters", "active"):
        values = _parameters(_kimi_and_twin()[0].accounting, figure)
        return {"with embeddings": values["all"], "without embeddings": values["body"]}
    compute = {"cache": _cache, "eq13": _equation_13, "eq14": _equation_14, "prefill": _prefill, "decode": _decode}
    return compute[figure.quantity]()


def hybrids(figure: Figure) -> Computed:
    """Return the parameters of a model, or the cache of one sequence, under each convention."""
    accounting = Accounting(catalogue_spec(figure.model))
    if figure.quantity != "cache":
        return _parameters(accounting, figure)
    size = Serving(accounting, figure.context).cache_bytes
    return {"GiB": size / 2**30, "GB": size / BILLION}
