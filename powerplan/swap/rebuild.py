"""What becomes of a layer's mixer, and of a whole model, when another kind takes its place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from powerplan.errors import InputError, parameter
from powerplan.mixers import HEAD_FIELDS, MIXERS, AnyMixer, Inherited, Mixer
from powerplan.spec import MAX_NAME, ModelSpec
from powerplan.swap.value import Swap
from powerplan.validation import plain_problem, words_of


def swapped(spec: ModelSpec, swap: Swap) -> tuple[ModelSpec, list[str]]:
    """Return the model with `swap` in every layer, and remarks on what was assumed; the name stays.

    Layers that already have this kind keep their own fields. Every other layer is rebuilt: it keeps its heads and head
    dims if both kinds have them, and takes the remaining fields (gate, chunk size) from the first layer of this kind in
    the model. If the model has none, it takes the kind's published defaults.
    """
    relative = first_relative(spec, swap.kind)
    changed = {mixer: rebuilt(mixer, swap, spec.hidden_size, relative) for mixer in spec.mixers()}
    remarks = dict.fromkeys(remark for _, remarks in changed.values() for remark in remarks)
    return spec.map_mixers(lambda mixer: changed[mixer][0]), list(remarks)


def renamed(spec: ModelSpec, name: str, change: str) -> ModelSpec:
    """Return a variant of the model `name` under a name of its own, without what was published about the model."""
    label = f"{name} with {' '.join(change.split())}"
    return msgspec.structs.replace(spec, name=label[:MAX_NAME], aliases=(), published=None)


def first_relative(spec: ModelSpec, kind: str) -> Mixer | None:
    """Return the first mixer of `kind` in a model, else the first of a kind that shares its settings, else None."""
    target = MIXERS[kind]
    relatives = [mixer for mixer in spec.mixers() if isinstance(mixer, target.relatives())]
    return next((mixer for mixer in relatives if type(mixer) is target), relatives[0] if relatives else None)


def rebuilt(
    mixer: Mixer, swap: Swap, hidden: int = 0, relative: Mixer | None = None
) -> tuple[AnyMixer, tuple[str, ...]]:
    """Return the mixer that `swap` puts in place of `mixer`, and remarks on what was assumed.

    hidden: the model's hidden size, for kinds and mixers without heads. relative: its `first_relative` of the new kind.
    Raises InputError where the settings contradict each other, or a kind with heads replaces one without.
    """
    inherited = _inherited(mixer, swap, hidden, relative)
    try:
        # The class, and not AnyMixer: msgspec would find out what that is at each call, in 45 us.
        changed = msgspec.convert({"kind": swap.kind, **inherited.fields, **swap.fields}, MIXERS[swap.kind])
    except msgspec.ValidationError as error:
        raise InputError(_problem(str(error), swap), parameter("mixer")) from None
    assert isinstance(changed, AnyMixer)
    return changed, inherited.remarks


OWN_PROJECTIONS = frozenset({"shared_kv", "uncached", "keys_as_values", "differential"})
"""Fields that say what a layer's keys and values are: another layer with projections of its own does not take them."""


def _inherited(mixer: Mixer, swap: Swap, hidden: int, relative: Mixer | None) -> Inherited:
    target = MIXERS[swap.kind]
    if type(mixer) is target:
        return Inherited(_fields(mixer, target))
    # Heads are the layer's own, so that its weights stay. All other settings of a kind are the same in every layer.
    settings = {} if relative is None else _fields(relative, target, without=HEAD_FIELDS | OWN_PROJECTIONS)
    if same := target.from_same_heads(mixer):
        return Inherited(same.fields | settings, same.remarks)
    if type(relative) is target:
        return Inherited(_fields(relative, target))
    if derived := target.from_layer(mixer, hidden):
        return derived
    if swap.fields.keys() >= {"heads", "head_dim"}:
        return Inherited(settings, (f"{swap.kind} with other heads: the weights change too",))
    if heads := mixer.plain_heads(swap.kind):
        return target.from_heads(heads.fields, settings, *heads.remarks)
    if hidden % 64:
        raise InputError(f"{mixer.describe()} has no heads to take over; write heads and head_dim", parameter("mixer"))
    remark = f"{mixer.describe()} has no heads to take over: heads of 64 are assumed, the weights change too"
    return target.from_heads({"heads": hidden // 64, "head_dim": 64, "v_head_dim": 64}, settings, remark)


def _fields(mixer: Mixer, target: type[Mixer], without: Iterable[str] = ()) -> dict[str, Any]:
    """Return the fields of `mixer` that `target` has and inherits."""
    names = set(mixer.__struct_fields__) - target.not_inherited - set(without)
    return {field: getattr(mixer, field) for field in target.__struct_fields__ if field in names}


def _problem(message: str, swap: Swap) -> str:
    text, at_field, where = message.partition(" - at `$.")
    if not at_field:
        field, colon, problem = text.partition(": ")
        return f"{problem} (what is not set stays as the model has it)" if colon and field in problem else text
    field = where.rstrip("`")
    return f"{field}: {plain_problem(text, swap.fields.get(field), words_of(MIXERS[swap.kind], field))}"
