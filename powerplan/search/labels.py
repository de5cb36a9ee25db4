"""Names of candidates that fit a table."""

from __future__ import annotations

from powerplan.search.choices import Choice
from powerplan.search.layer_plan import LayerPlan
from powerplan.spec import ModelSpec
from powerplan.swap.text import AS_IS


def choice_label(choice: Choice) -> str:
    """Return a choice in a few characters: "power p=2 6x128", "window 4,096", "linear"."""
    mixer = choice.mixers[0]
    if choice.swap is None:
        return mixer.describe()
    heads = mixer.own_heads()
    changed = heads is not None and (choice.reshaped or choice.fewer_kv_heads)
    return f"{mixer.label} {heads.label()}" if heads and changed else mixer.label


def plan_label(plan: LayerPlan) -> str:
    """Return a plan for a table: "9 power p=2 6x128 + 3 power p=2", "window 7,084"."""
    if plan.unchanged:
        return AS_IS
    if plan.other is None:
        return f"{choice_label(plan.main)}{_rest(plan)}"
    main, other = choice_label(plan.main), choice_label(plan.other)
    return f"{plan.layers - plan.count} {main} + {plan.count} {other}{_rest(plan)}"


def resized_label(plan: LayerPlan, spec: ModelSpec) -> str:
    """Return a plan in a resized model for a table, with the heads that it has there: "16 power p=2 9x128 + 5 mla"."""
    if plan.unchanged:
        return AS_IS
    chosen = {mixer.describe() for choice in plan.choices for mixer in choice.mixers}
    counts: dict[tuple[str, str], int] = {}
    for mixer, count in spec.mixer_counts():
        if mixer.describe() in chosen:
            shape = mixer.own_heads()
            part = (mixer.label, f" {shape.label()}" if shape else "")
            counts[part] = counts.get(part, 0) + count
    shapes = {shape for _, shape in counts}
    if len(counts) == 1:
        return "".join(next(iter(counts))) + _rest(plan)
    if len(shapes) == 1:
        names = " + ".join(f"{count} {name}" for (name, _), count in counts.items())
        return f"{names},{shapes.pop()}{_rest(plan)}"
    return " + ".join(f"{count} {name}{shape}" for (name, shape), count in counts.items()) + _rest(plan)


def _rest(plan: LayerPlan) -> str:
    return " (growing)" if plan.scope.marked else ""
