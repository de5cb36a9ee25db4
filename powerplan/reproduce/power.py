"""What powerplan computes for the figures of "Scaling Context Requires Rethinking Attention" (arXiv 2507.04239).

One function for each set of figures: it takes a figure and returns a value for each convention of the set.
"""

from __future__ import annotations

from fractions import Fraction

from powerplan.accounting import Accounting
from powerplan.dims import spow_dim, tpow_dim
from powerplan.load import catalogue_spec
from powerplan.mixers import Attention, Convention, Power
from powerplan.mixers.formulas import total
from powerplan.reproduce.figures import Figure, figure_sets
from powerplan.spec import ModelSpec
from powerplan.swap import with_mixer

Computed = dict[str, Fraction]
"""The computed values, in the unit of the figure, by the name of the convention."""

PAPER_CHUNK_SIZE = 128
"""Tokens of a chunk of linear attention in the paper's accounting."""

CONVENTIONS = {
    "default": Convention(),
    "headless": Convention(lm_head=False),
    "full": Convention(causal="full"),
    "bare": Convention(causal="full", lm_head=False),
}
"""Conventions of table 2 and figure 2; published.yaml describes them."""


def model_of(figure: Figure) -> ModelSpec:
    """Return the catalogue model of a figure, with its mixer in every layer."""
    spec = catalogue_spec(figure.model)
    return with_mixer(spec, figure.mixer)[0] if figure.mixer else spec


def paper_ratio(spec: ModelSpec, context: int) -> Fraction:
    """Return the weight-state FLOP ratio as the paper counts it, for a model with one mixer in all layers.

    Softmax attention: weights are 20mm a layer (projections at 1 FLOP per parameter) and the LM head; state is 3m for
    each of t keys, or of the window's, a layer: 1 for causal scores and 2 for values.
    Linear attention: 20mm a layer over 4dm for the state and 2cm within chunks, without the LM head.
    This is not how powerplan counts; published.yaml says so beside the figures.
    """
    (mixer,) = spec.mixers()
    width, layers = spec.hidden_size, spec.layer_count
    weights = 20 * width**2 * layers
    state = mixer.state_size(context)
    if not state.entry:
        return weights / (Accounting(spec).state_flops_per_token(context) + 2 * PAPER_CHUNK_SIZE * width * layers)
    keys = state.cache // state.entry
    return Fraction(weights + 2 * spec.vocab_size * width, 3 * keys * width * layers)


def _ratios(figure: Figure, *conventions: str) -> Computed:
    """Return the ratio of a model at its context under each of `conventions`, and as the paper counts it."""
    spec, ratios = model_of(figure), Computed()
    for name in conventions:
        ratio = Accounting(spec, CONVENTIONS[name]).wsfr(figure.context)
        assert ratio is not None
        ratios[name] = ratio
    return ratios | {"paper": paper_ratio(spec, figure.context)}


def table2(figure: Figure) -> Computed:
    """Return the ratio of a model at one context, under each convention."""
    return _ratios(figure, "default", "headless", "full")


def table3(figure: Figure) -> Computed:
    """Return a dimension of the power embeddings, or the share that spow saves: exact, and cut off as it is printed."""
    symmetric, full = spow_dim(figure.head_dim, figure.p), tpow_dim(figure.head_dim, figure.p)
    savings = 100 * (1 - Fraction(symmetric, full))
    value = {"spow": Fraction(symmetric), "tpow": Fraction(full), "savings": savings}[figure.quantity]
    return {"exact": value, "cut": figure.cut(value)}


def figure2(figure: Figure) -> Computed:
    """Return the ratio of a model at its context; or the most FLOPs of the set's models over the least."""
    if figure.quantity != "spread":
        return _ratios(figure, *CONVENTIONS)
    models = [(model_of(other), other.context) for other in figure_sets()["figure2"].figures if other.model]
    spreads = {}
    for name, convention in CONVENTIONS.items():
        flops = [Accounting(spec, convention).row(context).flops_per_token for spec, context in models]
        spreads[name] = max(flops) / min(flops)
    return spreads


def table4(figure: Figure) -> Computed:
    """Return the tokens of one batch over those of the other; or the state of a head over that of a window."""
    if figure.quantity == "batch":
        return {"exact": Fraction(1920 * 4096, 7680 * 1024)}
    window = Attention(heads=1, head_dim=figure.head_dim, window=figure.context).state_size(figure.context).elements
    states = {
        name: Power(heads=1, head_dim=figure.head_dim, p=figure.p, normalize=normalize).state_size(figure.context)
        for name, normalize in (("exact", False), ("normalised", True))
    }
    return {name: Fraction(state.elements, window) for name, state in states.items()}


def power_speed(figure: Figure) -> Computed:
    """Return the state FLOPs of softmax attention over those of power attention, for one head."""
    attention = Attention(heads=1, head_dim=figure.head_dim)
    power = Power(heads=1, head_dim=figure.head_dim, p=figure.p)
    softmax = Fraction(total(attention.state_flops_terms(figure.context, Convention())))
    forms = {"recurrent": Convention(), "chunked": Convention(form="chunked")}
    return {name: softmax / total(power.state_flops_terms(figure.context, form)) for name, form in forms.items()}
