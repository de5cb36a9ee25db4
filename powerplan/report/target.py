"""Whether the recommended candidate meets the target; if not, what comes closest, and the price of meeting it."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from powerplan.errors import listed
from powerplan.report.parts import json_float, show_ratio
from powerplan.report.reasons import change
from powerplan.search import Candidate, Recommendation


def verdict(answer: Recommendation) -> str:
    """Return "meets the target", "near the target" or "misses the target" of the recommended candidate."""
    if answer.target_met:
        return "meets the target"
    return "near the target" if answer.recommended.near else "misses the target"


def shortfall(answer: Recommendation) -> str:
    """Return what comes closest to the target and what meets it, in a sentence; "" where there is nothing to say.

    The model as it is, where it is near enough to stay, needs no such sentence: `gain` says what the next one saves.
    """
    off = answer.off_target
    if off is None or answer.recommended.near:
        return ""
    same = " of the same weights" if answer.request.keep == "weights" else ""
    if off.meets is not None:
        parts = [f"no plan{same}{f' within {off.within}' if off.within else ''} meets it"]
    else:
        parts = ["no candidate meets it" + (" but by a state dearer than keeping every key" if off.wasteful else "")]
    if off.closest is not None:
        parts.append(f"the closest is {_named(answer, off.closest)}")
    elif same and answer.searched > 1 and not any(choice.fewer_kv_heads for choice in answer.recommended.plan.choices):
        parts.append("none comes closer")
    if off.meets is not None:
        over = [f"needs {demand.amounts()} by {demand.option}" for demand in off.meets.unmet]
        meets = f"would meet it, and {listed(over, 'and')}" if over else "meets it"
        parts.append(f"{_named(answer, off.meets)}, {meets}: {_price(answer.recommended, off.meets)}")
    return "; ".join(parts)


def target_entry(answer: Recommendation) -> dict[str, Any]:
    """Return what JSON says of the target: whether it is met, and candidates that come closest and that meet it."""
    off = answer.off_target
    closest, meets = (off.closest, off.meets) if off else (None, None)
    return {
        "target_met": answer.target_met,
        "closest": closest and _entry(answer, closest),
        "meets_target": meets and _entry(answer, meets),
    }


def _entry(answer: Recommendation, candidate: Candidate) -> dict[str, Any]:
    """Return what JSON says of a candidate beside the recommended one: changes are shares of what that one has.

    rank: its place among the candidates that are shown; None where `--top` leaves it out.
    """
    place = answer.place(candidate)
    return {
        "rank": None if place is None else place + 1,
        "mixer": candidate.mixer,
        "label": candidate.label,
        "wsfr": json_float(candidate.row.wsfr),
        "feasible": candidate.feasible,
        **{f"{key}_change": json_float(share) for key, share in _changes(answer.recommended, candidate).items()},
    }


def _changes(first: Candidate, other: Candidate) -> dict[str, Fraction | None]:
    """Return by what share the parameters, FLOPs and state of `other` are more than those of `first`."""
    pairs: dict[str, tuple[int | Fraction, int | Fraction]] = {
        "params": (other.parameters, first.parameters),
        "weight_flops": (other.row.weight_flops_per_token, first.row.weight_flops_per_token),
        "flops": (other.row.flops_per_token, first.row.flops_per_token),
        "state": (other.row.state_bytes, first.row.state_bytes),
    }
    return {key: Fraction(after) / Fraction(before) - 1 if before else None for key, (after, before) in pairs.items()}


def _price(first: Candidate, other: Candidate) -> str:
    """Return what `other` takes more and less than `first`, in words."""
    weights = _changes(first, other)["weight_flops"]
    flops = change(first.row.flops_per_token / other.row.flops_per_token, "fewer", "FLOPs per token")
    state = change(first.row.state_bytes / (other.row.state_bytes or Fraction(1, 2)), "less", "state")
    same = f"weight FLOPs {float(weights):+.1%}, " if weights else ""
    return f"{same}{flops}, {state}"


def _named(answer: Recommendation, candidate: Candidate) -> str:
    place = answer.place(candidate)
    number = "" if place is None else f"#{place + 1}, "
    return f"{number}{candidate.label}, {show_ratio(candidate.row.wsfr)}"
