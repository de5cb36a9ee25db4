"""Figures of Kimi Linear (arXiv 2510.26692), and parameters and caches that hybrids publish."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from functools import cache

from powerplan.accounting import Accounting
from powerplan.load import catalogue_spec
from powerplan.mixers import KDA, MLA, Attention, Convention, Mixer
from powerplan.mixers.base import RECURRENT_BYTES, total
from powerplan.reproduce.figures import Figure
from powerplan.reproduce.power import Computed
from powerplan.serving import Serving, twin

BILLION = 10**9
MILLION_TOKENS = 2**20


@cache
def _pair(form: str = "recurrent") -> tuple[Serving, Serving]:
    """Return Kimi Linear and its twin with MLA in every layer, at 1M tokens."""
    convention = Convention(form="chunked") if form == "chunked" else Convention()
    model = Accounting(catalogue_spec("kimi-linear-48b-a3b"), convention)
    return Serving(model, MILLION_TOKENS), Serving(twin(model, "mla")[0], MILLION_TOKENS)


def kimi(figure: Figure) -> Computed:
    return _KIMI[figure.quantity]()


def kimi_state() -> str:
    """Return what is kept of one sequence, for which the paper prints no absolute figure."""
    hybrid, full = _pair()
    elements = sum(
        use.layer.mixer.state_size(MILLION_TOKENS).recurrent * use.count
        for use in hybrid.accounting.uses
        if use.layer.mixer is not None
    )
    caches = [float(serving.cache_bytes / BILLION) for serving in (hybrid, full)]
    return (
        f"Computed, not published: cache {caches[0]:.2f} GB, and {caches[1]:.2f} GB for the twin; recurrent state "
        f"{elements / 10**6:.2f}M elements in fp32, {elements * RECURRENT_BYTES / 10**6:.1f} MB at any context, and "
        f"{float(hybrid.recurrent_bytes) / 10**6:.1f} MB with the last inputs of its short convolutions in bf16."
    )


def _parameters(active: bool) -> Computed:
    accounting = _pair()[0].accounting
    count = accounting.active_parameters if active else accounting.total_parameters
    return {
        "with embeddings": Fraction(count.with_embeddings, BILLION),
        "without embeddings": Fraction(count.without_embeddings, BILLION),
    }


def _cache() -> Computed:
    hybrid, full = _pair()
    return {
        "cache bytes": 100 * (hybrid.cache_bytes / full.cache_bytes - 1),
        "state bytes": 100 * (hybrid.row.state_bytes / full.row.state_bytes - 1),
    }


def _per_head(mixer: Mixer, heads: int, convention: Convention) -> Fraction:
    return Fraction(total(mixer.state_flops_terms(MILLION_TOKENS, convention))) / heads


def _equation_13() -> Computed:
    (layer,) = (mixer for mixer in _pair()[0].accounting.spec.mixers() if isinstance(mixer, KDA))
    assert layer.chunk_size == 64
    forms = {"chunked": Convention(form="chunked"), "recurrent": Convention()}
    return {name: _per_head(layer, layer.heads, convention) for name, convention in forms.items()}


def _equation_14() -> Computed:
    (layer,) = (mixer for mixer in _pair()[0].accounting.spec.mixers() if isinstance(mixer, MLA))
    return {
        "attention": _per_head(Attention(heads=1, head_dim=128), 1, Convention()),
        "mla": _per_head(layer, layer.heads, Convention()),
    }


def _prefill() -> Computed:
    found = {}
    for name, form in (("prompt FLOPs", "recurrent"), ("chunked FLOPs", "chunked")):
        hybrid, full = _pair(form)
        found[name] = full.prefill_flops / hybrid.prefill_flops
    return found


def _decode() -> Computed:
    hybrid, full = _pair()
    found = {
        "cache bytes": full.cache_bytes / hybrid.cache_bytes,
        "state bytes": full.row.state_bytes / hybrid.row.state_bytes,
        "state bytes moved": full.row.decode_state_bytes / hybrid.row.decode_state_bytes,
    }
    for batch in (1, 64):
        found[f"bytes at batch {batch}"] = full.step(batch).moved_bytes / hybrid.step(batch).moved_bytes
    return found


_KIMI: dict[str, Callable[[], Computed]] = {
    "parameters": lambda: _parameters(active=False),
    "active": lambda: _parameters(active=True),
    "cache": _cache,
    "eq13": _equation_13,
    "eq14": _equation_14,
    "prefill": _prefill,
    "decode": _decode,
}


def hybrids(figure: Figure) -> Computed:
    accounting = Accounting(catalogue_spec(figure.model))
    if figure.quantity == "cache":
        size = Serving(accounting, figure.context).cache_bytes
        return {"GiB": size / 2**30, "GB": size / BILLION}
    count = accounting.active_parameters if figure.quantity == "active" else accounting.total_parameters
    return {
        "all": Fraction(count.with_embeddings, BILLION),
        "head": Fraction(count.without_input_embedding, BILLION),
        "body": Fraction(count.without_embeddings, BILLION),
    }
