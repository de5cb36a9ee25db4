"""What `powerplan recommend` advises, under labels: what to change, what it saves, costs and loses, what is next."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from powerplan.accounting import positions_text
from powerplan.dims import kernels_for
from powerplan.errors import listed
from powerplan.mixers import Mixer
from powerplan.report.following import next_commands
from powerplan.report.losses import losses
from powerplan.report.parts import show_ratio
from powerplan.report.reasons import change, gain
from powerplan.search import Recommendation
from powerplan.spec import ModelSpec
from powerplan.units import format_parameters

HYPOTHESIS = (
    "1:1 is a hypothesis of arXiv 2507.04239, which our own runs of small models (docs/icl.md) do not show: power p=2 "
    "recalled what a window of equal state forgot, and on code it was no better."
)
OVERTAKES = {64: "14k", 128: "23k"}
"""Tokens from which p = 2 trained faster than attention on an H100, by head dim (docs/kernels.md)."""

Advice = list[tuple[str, str | list[str]]]
"""Labels, and what is said of each: a sentence, or commands."""


def advice(answer: Recommendation, command: Sequence[str], written: str | None) -> Advice:
    """Return the advice under its labels: Change, Saves, Costs, Loses, Next.

    command: the words of a command line that asks for this recommendation. written: the file with its model, if any.
    """
    before, after = answer.base.spec, answer.recommended.spec
    if answer.recommended.plan.unchanged:
        saved, ratio = gain(answer), show_ratio(answer.recommended.row.wsfr)
        texts = ["nothing: the model stays as it is", f"nothing; {saved}" if saved else "nothing"]
        texts += ["nothing" if answer.recommended.balanced else f"nothing; the ratio stays {ratio}", "nothing"]
    else:
        less, more = _amounts(answer)
        texts = [_resized(before, after) if answer.request.keep == "flops" else _changed(before, after)]
        texts.append(", ".join(less) or "nothing")
        texts.append("; ".join([*([", ".join(more)] if more else []), *_costs(answer)]))
        texts.append("; ".join(losses(before, after, answer.contexts[-1])) or "nothing that a layer can do now")
    return [
        *zip(("Change", "Saves", "Costs", "Loses"), texts, strict=True),
        ("Next", next_commands(answer, command, written)),
    ]


def advice_entry(advised: Advice) -> dict[str, str | list[str]]:
    """Return what JSON says of the advice."""
    return {label.lower(): text for label, text in advised}


def _changed(before: ModelSpec, after: ModelSpec) -> str:
    """Return which layers get which mixer, with its heads where they are not those that the layers have."""
    old, new = before.mixers_by_layer(), after.mixers_by_layer()
    places: dict[tuple[str, str], list[int]] = {}
    reshaped: set[str] = set()
    for position, mixer in new.items():
        if mixer != old[position]:
            name, heads = mixer.label, _heads(mixer)
            places.setdefault((name, heads), []).append(position)
            if heads != _heads(old[position]):
                reshaped.add(name)
    parts: list[str] = []
    for (name, heads), positions in places.items():
        count = len(positions)
        if count == len(old):
            parts.append(f"all {count} layers to {name}" if count > 1 else f"the layer to {name}")
        else:
            parts.append(f"{count} to {name}" if parts else f"{count} of {len(old)} layers to {name}")
        if name in reshaped and heads:
            parts[-1] += f" with {heads}"
        if count < len(old):
            places_text = positions_text([positions])
            parts[-1] += f" ({places_text.removesuffix(f' ({count})')})"
    stay = {mixer.label: None for position, mixer in old.items() if mixer == new[position]}
    if stay:
        count = len(old) - sum(map(len, places.values()))
        parts.append(f"{count} stay{'s' if count == 1 else ''} {listed(list(stay), 'and')}")
    return "; ".join(parts)


def _resized(before: ModelSpec, after: ModelSpec) -> str:
    """Return the new width and depth of a model, and the mixers of its layers."""
    sizes = [("width", before.hidden_size, after.hidden_size), ("depth", before.layer_count, after.layer_count)]
    texts = [
        f"{word} from {old:,} to {new:,}" if old != new else f"{word} {old:,} as it is" for word, old, new in sizes
    ]
    counts: dict[str, int] = {}
    for mixer, count in after.mixer_counts():
        text = f"{mixer.label} with {_heads(mixer)}" if _heads(mixer) else mixer.label
        counts[text] = counts.get(text, 0) + count
    layers = [f"{count} layers of {text}" for text, count in counts.items()]
    return f"{listed(texts, 'and')}; {listed(layers, 'and')}"


def _heads(mixer: Mixer) -> str:
    heads = mixer.own_heads()
    return heads.describe() if heads else ""


def _amounts(answer: Recommendation) -> tuple[list[str], list[str]]:
    """Return what the recommended model takes less of than the model as it is, and what it takes more of."""
    winner = answer.recommended
    own, base = winner.row, answer.base.row(answer.contexts[-1], answer.request.dtypes)
    moved, moved_before = (row.decode_weight_bytes_per_token + row.decode_state_bytes_per_token for row in (own, base))
    amounts: list[tuple[Literal["fewer", "less"], str, Fraction | int, Fraction | int]] = [
        ("fewer", "FLOPs per token", base.flops_per_token, own.flops_per_token),
        ("less", "state", base.state_bytes, own.state_bytes),
        ("fewer", "bytes to decode at batch 1", moved_before, moved),
    ]
    if answer.request.keep == "flops":
        del amounts[0]  # They are the same within 2 %.
    less: list[str] = []
    more: list[str] = []
    for word, what, before, after in amounts:
        ratio = Fraction(before) / (after or Fraction(1, 2))
        if abs(ratio - 1) >= Fraction(1, 200):
            (less if ratio > 1 else more).append(change(ratio, word, what))
    return less, more


def _costs(answer: Recommendation) -> list[str]:
    """Return what else it takes: other weights, training, speed."""
    winner, before = answer.recommended, answer.base.total_parameters.with_embeddings
    parts = []
    own, old = format_parameters(winner.parameters), format_parameters(before)
    if own != old:
        parts.append(f"{own} parameters instead of {old}")
    if answer.request.keep == "flops":
        parts.append("training anew, as all sizes are others")
    else:
        parts.append("training, as weights give another output with new mixers")
    new = [mixer for mixer in winner.spec.mixers() if mixer not in set(answer.base.spec.mixers())]
    parts += filter(None, [speed_of(new)])
    parts += dict.fromkeys(mixer.kernel_problem for mixer in new if mixer.kernel_problem)
    return [*parts, *dict.fromkeys(mixer.gpu_kernel_problem for mixer in new if mixer.gpu_kernel_problem)]


def speed_of(new: Sequence[Mixer]) -> str | None:
    """Return below which context p = 2 was slower than attention, in the heads that the new mixers have.

    None where no new mixer of degree 2 runs on a GPU.
    """
    shapes = [heads for mixer in new if mixer.degree == 2 and (heads := mixer.own_heads()) is not None]
    dims = {heads.head_dim for heads in shapes if "triton" in kernels_for(2, heads.head_dim, heads.v_head_dim)}
    if not dims:
        return None
    first, *rest = sorted(dims & OVERTAKES.keys()) or OVERTAKES
    below = " or ".join(
        [f"{OVERTAKES[first]} tokens (heads of {first})", *(f"{OVERTAKES[dim]} ({dim})" for dim in rest)]
    )
    text = f"p=2 trains more slowly than attention below about {below} on an H100 (docs/kernels.md)"
    return (
        text
        if dims & OVERTAKES.keys()
        else f"{text}; heads of {listed([str(dim) for dim in sorted(dims)], 'and')} were not timed"
    )
