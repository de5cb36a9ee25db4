"""What a model carries with power attention of several degrees in every layer, in its own heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from powerplan.accounting import Accounting, Row
from powerplan.errors import InputError, parameter
from powerplan.mixers import Convention, Power
from powerplan.spec import ModelSpec
from powerplan.swap.rebuild import swapped
from powerplan.swap.shapes import replacement_heads
from powerplan.swap.value import Swap
from powerplan.swap.windows import same_state_window


@dataclass(frozen=True)
class Degree:
    """A model with power attention of one degree in every layer.

    swap: the mixer, without the normaliser where the degree is odd, as kernels need it. spec: the changed model.
    mixers: its distinct mixers, and in how many layers each stands. row: its numbers at the context.
    same_state_window: the window, in tokens and in every layer, whose keys and values have as many elements.
    remarks: what was assumed of the heads.
    """

    swap: Swap
    spec: ModelSpec
    mixers: tuple[tuple[Power, int], ...]
    row: Row
    same_state_window: int
    remarks: tuple[str, ...]

    @property
    def p(self) -> int:
        return int(self.swap.fields["p"])


def with_degrees(spec: ModelSpec, degrees: Sequence[int], context: int, convention: Convention) -> list[Degree]:
    """Return what a model carries at `context` with each degree; raises InputError where it has no mixers."""
    if not spec.mixers():
        raise InputError(f"{spec.name} has no mixers that power attention could take the place of", parameter("model"))
    heads = replacement_heads(spec)
    results = []
    for p in degrees:
        swap = Swap.power(p, heads)
        changed, remarks = swapped(spec, swap)
        mixers = tuple((mixer, count) for mixer, count in changed.mixer_counts() if isinstance(mixer, Power))
        row, window = Accounting(changed, convention).row(context), same_state_window(changed)
        assert window is not None, "every layer has a state of features"
        results.append(Degree(swap, changed, mixers, row, window, tuple(remarks)))
    return results
