"""What layers can do with the mixers that they have, and cannot with others."""

from __future__ import annotations

from collections.abc import Sequence
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
    old, new = list(before.mixers_by_layer().values()), list(after.mixers_by_layer().values())
    pairs = [(old[place * len(old) // len(new)], mixer) for place, mixer in enumerate(new)]  # The depth may be another.
    fixed: list[Mixer] = []
    windows: list[int] = []
    parted = False
    for was, mixer in pairs:
        before_it, reach = was.direct_reach(context), mixer.direct_reach(context)
        if before_it and reach is None:
            fixed.append(mixer)
        elif before_it and reach and reach < min(context, before_it):
            windows.append(reach)
            parted |= mixer.sparse_reads
    parts: list[str] = []
    if fixed:
        parts.append(
            f"exact lookup of tokens in {_of(len(fixed), len(new))}: a state of fixed size keeps none as it was"
        )
        kinds = dict.fromkeys("power" if mixer.degree == 2 else mixer.family for mixer in fixed)
        odd = {mixer.family for mixer in fixed if (mixer.degree or 0) > 2}
        parts += [RECALL[kind] for kind in kinds if kind in RECALL and kind not in odd]
    if windows:
        what = "most of what" if parted else "what"
        text = f"direct sight of {what} is more than {max(windows):,} tokens back, in {_of(len(windows), len(new))}"
        through = _seen(new, context)
        parts.append(text if through is None else f"{text}; what is more than {through:,} back is not seen at all")
    if shared := _shared(before, after):
        parts.append(shared)
    return parts


def _of(count: int, layers: int) -> str:
    return f"all {layers} layers" if count == layers else f"{count} of {layers} layers"


def _seen(mixers: Sequence[Mixer], context: int) -> int | None:
    """Return how many tokens back windows see through all layers together; None where that is all, or not known.

    A fixed pattern meets far blocks besides, from which layer after layer every token is reached.
    """
    through = 1
    for mixer in mixers:
        reach = mixer.direct_reach(context)
        if reach is None or reach >= context or mixer.sparse_reads:
            return None
        through += reach - 1
    return through if through < context else None


def _shared(before: ModelSpec, after: ModelSpec) -> str:
    """Return how many query heads come to share a key/value head; "" where no more do than before."""

    def most(spec: ModelSpec) -> Fraction:
        shapes = [heads for mixer in spec.mixers() if (heads := mixer.own_heads()) is not None]
        return max((Fraction(heads.heads, heads.kv_heads) for heads in shapes), default=Fraction(1))

    if any(mixer.latent_heads for mixer in before.mixers()):
        return ""  # MLA has no keys and values of their own to lose.
    own, base = most(after), most(before)
    return f"separate keys and values: {own} query heads share each, instead of {base}" if own > base else ""
