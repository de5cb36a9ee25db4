"""What layers pass on along a sequence whose parts lie on several devices, by kind of layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import gcd

from powerplan.mixers.base import HeadShape
from powerplan.run.loads import LayerLoad

KEYS, WINDOW, STATE, INPUTS = "keys and values", "window", "state", "convolution inputs"
"""What is passed on: keys and values of all tokens (or their latents); those of a window; a recurrent state; the last
inputs of short convolutions and token shifts."""


@dataclass(frozen=True)
class Exchange:
    """What some layers of a model pass on along the sequence, each of them by itself.

    mixer: what the layers have. what: KEYS, WINDOW, STATE or INPUTS. layers: how many.
    payload_bytes: of a token for KEYS and WINDOW, and of a sequence for the others.
    gate_bytes: of the payload of a token, gates of query heads: each device has those of its own heads.
    reach: for WINDOW, the tokens before its own that a query meets; 0 for others.
    flops: forward FLOPs per token of attention, of all these layers. again_flops: likewise of states that a device
    computes once more than one device alone would.
    kv_heads, heads, latent: as in LayerLoad.
    """

    mixer: str
    what: str
    layers: int
    payload_bytes: float
    gate_bytes: float = 0.0
    reach: int = 0
    flops: float = 0.0
    again_flops: float = 0.0
    kv_heads: int | None = None
    heads: HeadShape | None = None
    latent: bool = False

    def device_bytes(self, tp: int) -> float:
        """Return the payload of one of `tp` devices that share the heads: where heads are fewer, several have one."""
        shared = self.payload_bytes - self.gate_bytes
        return shared / (tp if self.kv_heads is None else gcd(tp, self.kv_heads)) + self.gate_bytes / tp


def exchanges_of(counted: Sequence[tuple[LayerLoad, int]], context: int) -> tuple[Exchange, ...]:
    """Return what layers pass on, of which there are so many of each kind; layers that pass on the same are one."""
    found: dict[Exchange, tuple[int, Fraction, Fraction]] = {}
    for load, count in counted:
        for one in _passed_on(load, context):
            layers, flops, again = found.get(one, (0, Fraction(0), Fraction(0)))
            busy, twice = (load.state_flops, load.again_flops) if one.what != INPUTS else (0, 0)
            found[one] = layers + count, flops + busy * count, again + twice * count
    return tuple(
        replace(one, layers=layers, flops=float(flops), again_flops=float(again))
        for one, (layers, flops, again) in found.items()
    )


def _passed_on(load: LayerLoad, context: int) -> list[Exchange]:
    """Return what one layer passes on, in the order in which it does."""
    mixer = load.use.layer.mixer
    if mixer is None:
        return []
    name, passed = mixer.describe(), []
    if load.recent_bytes:
        passed.append(Exchange(name, INPUTS, 0, float(load.recent_bytes)))
    if load.entry_bytes:
        entry = Exchange(
            name, KEYS, 0, float(load.entry_bytes), float(load.gate_bytes), kv_heads=load.kv_heads, heads=load.heads
        )
        if load.window is None or load.window >= context:
            passed.append(replace(entry, latent=load.latent))
        elif load.window > 1:
            passed.append(replace(entry, what=WINDOW, reach=load.window - 1))
    elif load.state_bytes:
        passed.append(Exchange(name, STATE, 0, float(load.state_bytes), kv_heads=load.kv_heads, heads=load.heads))
    return passed
