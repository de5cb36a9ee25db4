"""Windows that balance a model, and windows and contexts that hold as much as its state."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import msgspec

from powerplan.accounting import Accounting
from powerplan.choices import Unknown
from powerplan.errors import InputError, parameter
from powerplan.longest import last_at_most
from powerplan.mixers import AnyMixer, Convention, Mixer
from powerplan.mixers.formulas import Rational, total
from powerplan.spec import ModelSpec
from powerplan.swap.rebuild import first_relative, rebuilt
from powerplan.swap.shapes import replacement_heads
from powerplan.swap.value import Swap
from powerplan.units import MAX_CONTEXT


def can_swap(spec: ModelSpec) -> bool:
    """Whether a model has mixers, and another kind can take the place of each of them at the same weights."""
    mixers = spec.mixers()
    return bool(mixers) and all(mixer.swappable for mixer in mixers)


def check_swappable(spec: ModelSpec, unknown: Unknown) -> None:
    """Raise InputError where a window or a degree is asked for and not every mixer of a model can be swapped."""
    if unknown != "context" and not can_swap(spec):
        problem = f"{spec.name} has mixers that no other can take the place of"
        raise InputError(problem, parameter("unknown", unknown))


def balanced_window(
    spec: ModelSpec, context: int, convention: Convention, target: Fraction = Fraction(1), only_growing: bool = False
) -> int | None:
    """Return the longest window, in tokens, that leaves the weights `target` times the state FLOPs.

    It stands in every layer, or only in those whose state grows with the context. Exact, below `context`. None where
    one key is too many, all keys are light enough, or a mixer cannot be swapped.
    """
    changed = [mixer for mixer in spec.mixers() if mixer.grows or not only_growing]
    if context < 2 or not changed or not all(mixer.swappable for mixer in changed):
        return None
    shape, relative, hidden = replacement_heads(spec), first_relative(spec, "attention"), spec.hidden_size
    weights, stays = Fraction(Accounting(spec, convention).weight_flops_per_token), Fraction(0)
    # Layers of one window with these heads: their weights are those of any other.
    counts: Counter[AnyMixer] = Counter()
    for old, count in spec.mixer_counts():
        if old.grows or not only_growing:
            new = rebuilt(old, Swap.attention(shape, 1), hidden, relative)[0]
            weights += 2 * count * (total(new.matmul_terms(hidden)) - total(old.matmul_terms(hidden)))
            counts[new] += count
        else:
            stays += count * total(old.state_flops_terms(context, convention))

    def state(window: int) -> Rational:
        windows = ((msgspec.structs.replace(mixer, window=window), count) for mixer, count in counts.items())
        return stays + sum(total(mixer.state_flops_terms(context, convention)) * count for mixer, count in windows)

    return last_at_most(weights / target, state, context)


def held_elements(mixer: Mixer, context: int) -> int:
    """Return the elements that a layer holds of one sequence: keys and values, or the state that stands for them.

    The normaliser of power attention and the last inputs of short convolutions are left out. This is what "the same
    state" compares in every command.
    """
    size = mixer.features_size() or mixer.state_size(context)
    return size.cache + size.recurrent


def same_state_window(spec: ModelSpec) -> int | None:
    """Return the window, in tokens, whose keys and values have as many elements as the recurrent state of a model.

    Rounded down. None unless every layer has a state of features (power, linear).
    """
    state = entry = 0
    for mixer, count in spec.mixer_counts():
        size = mixer.features_size()
        if size is None:
            return None
        state, entry = state + size.recurrent * count, entry + size.entry * count
    return state // entry if entry else None


def cache_context(spec: ModelSpec, elements: int) -> int | None:
    """Return the longest context at which a model holds at most `elements`; None where its state never passes them."""
    mixers = spec.mixer_counts()
    return last_at_most(
        elements, lambda context: sum(held_elements(mixer, context) * count for mixer, count in mixers), MAX_CONTEXT
    )
