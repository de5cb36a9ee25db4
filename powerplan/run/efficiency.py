"""The shares of a device's dense peak that training work reaches: by default, as given, or as measured."""

from __future__ import annotations

from dataclasses import replace

from powerplan.errors import parameter
from powerplan.lists import parse_settings
from powerplan.run.step import Efficiency, Overlap
from powerplan.units import parse_share

DEFAULT = Efficiency(weights=0.58, attention=0.35, recurrent=0.3)
"""Shares of the dense bf16 peak, all elementwise work around the products included.

weights, attention: those that bring published runs on H100s near their plans (`powerplan reproduce training-time`):
single runs give 0.36 to 0.65 for weights and 0.18 to 0.4 for attention, counted with a causal mask.
recurrent: power attention of degree 2 by powerplan.kernels trains at 0.18 of the peak of an H100 at head dim 64 and at
0.39 at head dim 128 (benchmarks/results/gpu.json, 64k tokens, 8 heads, recurrent FLOPs).
"""

PARTS = ("weights", "attention", "recurrent", "experts", "fp8")
"""What `efficiency` may name."""

HIDDEN = ("tensor", "experts")
"""What `overlap` may name."""


def parse_efficiency(text: str) -> Efficiency:
    """Return the shares that a text such as "0.5" or "weights=0.6,attention=0.5" says; others are the default.

    Raises:
        InputError: for a part that is none, a part twice, or a share that is not more than 0 and at most 1.
    """
    where = parameter("efficiency")
    if "=" not in text:
        share = float(parse_share(text.strip(), where))
        return Efficiency(share, share, share, share)
    return replace(DEFAULT, **_shares(text, PARTS, where, or_none=False))


def parse_overlap(text: str) -> Overlap:
    """Return which shares of traffic hide behind compute, as "experts=0.9,tensor=0.5" says; others are the default.

    Raises:
        InputError: for traffic that is none, traffic twice, or a share that is not from 0 to 1.
    """
    return Overlap(**_shares(text, HIDDEN, parameter("overlap"), or_none=True))


def _shares(text: str, names: tuple[str, ...], where: str, *, or_none: bool) -> dict[str, float]:
    texts = parse_settings(text, names, where, f"{names[0]}=0.5", of="a share")
    return {name: float(parse_share(value, where, or_none=or_none)) for name, value in texts.items()}
