"""Figures of "Scaling Context Requires Rethinking Attention" (arXiv 2507.04239), under each convention."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from powerplan.accounting import Accounting
from powerplan.dims import spow_dim, tpow_dim
from powerplan.load import catalogue_spec
from powerplan.mixers import Attention, Convention, Power
from powerplan.mixers.base import total
from powerplan.reproduce.figures import Figure, figure_sets
from powerplan.spec import ModelSpec
from powerplan.swap import Swap, parse_swap, with_mixer

Computed = dict[str, Fraction]
"""Values in the unit of a figure, by the convention's name."""

CHUNK = 128
"""Chunk of linear attention in the paper's accounting."""

CONVENTIONS = {
    "default": Convention(),
    "headless": Convention(lm_head=False),
    "full": Convention(causal="full"),
    "bare": Convention(causal="full", lm_head=False),
}


def model_of(figure: Figure) -> ModelSpec:
    """Return the catalogue model of a figure, with its mixer in every layer."""
    spec = catalogue_spec(figure.model)
    return with_mixer(spec, figure.mixer)[0] if figure.mixer else spec


def paper_ratio(spec: ModelSpec, mixer: str, context: int) -> Fraction:
    """Return the ratio as the paper counts it, which is not how powerplan counts (see `published.yaml`).

    Weights: 20mm a layer, projections at 1 FLOP per parameter, plus the LM head. State: 3tm a layer, 1tm for causal
    scores and 2tm for values. Linear attention: 20mm over (4d + 2c)m, without the head.
    """
    swap = parse_swap(mixer) if mixer else Swap("attention")
    width, layers = spec.hidden_size, spec.layer_count
    weights = 20 * width**2 * layers
    if swap.kind == "linear":
        (dim,) = {heads.head_dim for mixer in spec.mixers() if (heads := mixer.own_heads()) is not None}
        return Fraction(weights, (4 * dim + 2 * CHUNK) * width * layers)
    keys = min(context, swap.fields.get("window", context))
    return Fraction(weights + 2 * spec.vocab_size * width, 3 * keys * width * layers)


def table2(figure: Figure) -> Computed:
    spec = model_of(figure)
    found = {name: _ratio(spec, figure.context, CONVENTIONS[name]) for name in ("default", "headless", "full")}
    return found | {"paper": paper_ratio(catalogue_spec(figure.model), figure.mixer, figure.context)}


def _ratio(spec: ModelSpec, context: int, convention: Convention) -> Fraction:
    ratio = Accounting(spec, convention).wsfr(context)
    assert ratio is not None
    return ratio


def table3(figure: Figure) -> Computed:
    symmetric, full = spow_dim(figure.head_dim, figure.p), tpow_dim(figure.head_dim, figure.p)
    values: dict[str, Callable[[], Fraction]] = {
        "spow": lambda: Fraction(symmetric),
        "tpow": lambda: Fraction(full),
        "savings": lambda: 100 * (1 - Fraction(symmetric, full)),
    }
    value = values[figure.quantity]()
    return {"exact": value, "cut": figure.cut(value)}


def figure2(figure: Figure) -> Computed:
    if figure.quantity == "spread":
        models = [one for one in figure_sets()["figure2"].figures if one.model]
        spreads = {}
        for name, convention in CONVENTIONS.items():
            flops = []
            for one in models:
                accounting = Accounting(model_of(one), convention)
                flops.append(accounting.weight_flops + accounting.state_flops(one.context))
            spreads[name] = max(flops) / min(flops)
        return spreads
    spec = model_of(figure)
    found = {name: _ratio(spec, figure.context, convention) for name, convention in CONVENTIONS.items()}
    return found | {"paper": paper_ratio(spec, "attention", figure.context)}


def table4(figure: Figure) -> Computed:
    if figure.quantity == "batch":
        return {"exact": Fraction(1920 * 4096, 7680 * 1024)}
    dim = figure.head_dim
    window = Attention(heads=1, head_dim=dim, window=figure.context).state_size(figure.context).elements
    found = {}
    for name, normalize in (("exact", False), ("normalised", True)):
        state = Power(heads=1, head_dim=dim, p=figure.p, normalize=normalize).state_size(figure.context)
        found[name] = Fraction(state.elements, window)
    return found


def power_speed(figure: Figure) -> Computed:
    attention = Attention(heads=1, head_dim=figure.head_dim)
    power = Power(heads=1, head_dim=figure.head_dim, p=figure.p)
    softmax = Fraction(total(attention.state_flops_terms(figure.context, Convention())))
    return {
        "recurrent": softmax / total(power.state_flops_terms(figure.context, Convention())),
        "chunked": softmax / total(power.state_flops_terms(figure.context, Convention(form="chunked"))),
    }
