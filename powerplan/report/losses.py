"""What layers can do with the mixers that they have, and cannot with others."""

from __future__ import annotations

from fractions import Fraction

from powerplan.mixers import Mixer
from powerplan.spec import ModelSpec

RECALL = {
    "power": "our own small models recalled as well with p=2 as with attention (docs/icl.md)",
    "linear": "our own small models recalled little with it (docs/icl.md)",
}
"""What was measured of mixers of a fixed state: of no others."""


def losses(before: ModelSpec, after: ModelSpec, context: int) -> list[str]:
    """Return what layers lose at a context, in tokens, where the mixers of `before` become those of `after`."""
    reaches = [mixer.direct_reach(context) for mixer in before.mixers()]
    furthest = max((reach for reach in reaches if reach is not None), default=0)
    counts = after.mixer_counts()
    old, layers = set(before.mixers()), sum(count for _, count in counts)
    fixed = {mixer: count for mixer, count in counts if mixer.direct_reach(context) is None}
    parts: list[str] = []
    if furthest and set(fixed) - old:
        parts.append(f"exact lookup of tokens in {_of(fixed, layers)}: a state of fixed size keeps none as it was")
        kinds = dict.fromkeys("power" if mixer.degree == 2 else mixer.family for mixer in fixed if mixer not in old)
        odd = {mixer.family for mixer in fixed if (mixer.degree or 0) > 2}
        parts += [RECALL[kind] for kind in kinds if kind in RECALL and kind not in odd]
    windows = {
        mixer: count
        for mixer, count in counts
        if (reach := mixer.direct_reach(context)) and reach < min(context, furthest)
    }
    if set(windows) - old:
        parts.append(_of_windows(windows, layers, context))
    if shared := _shared(before, after):
        parts.append(shared)
    return parts


def _of(mixers: dict[Mixer, int], layers: int) -> str:
    count = sum(mixers.values())
    return f"all {layers} layers" if count == layers else f"{count} of {layers} layers"


def _of_windows(windows: dict[Mixer, int], layers: int, context: int) -> str:
    reaches = [(mixer.direct_reach(context) or 0, count) for mixer, count in windows.items()]
    longest = max(reach for reach, _ in reaches)
    text = f"direct sight of what is more than {longest:,} tokens back, in {_of(windows, layers)}"
    through = sum((reach - 1) * count for reach, count in reaches) + 1
    if sum(windows.values()) == layers and through < context:
        return f"{text}; what is more than {through:,} back is not seen at all"
    return text


def _shared(before: ModelSpec, after: ModelSpec) -> str:
    """Return how many query heads come to share a key/value head; "" where no more do than before."""

    def most(spec: ModelSpec) -> Fraction:
        shapes = [heads for mixer in spec.mixers() if (heads := mixer.own_heads()) is not None]
        return max((Fraction(heads.heads, heads.kv_heads) for heads in shapes), default=Fraction(1))

    if any(mixer.latent_heads for mixer in before.mixers()):
        return ""  # MLA has no keys and values of their own to lose.
    own, base = most(after), most(before)
    return f"keys and values of their own: {own} query heads share each, instead of {base}" if own > base else ""
