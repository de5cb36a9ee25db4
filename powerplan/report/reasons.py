"""Why each candidate of a recommendation stands where it does, in sentences."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal

from powerplan.balance import verdict_of
from powerplan.choices import Keep
from powerplan.errors import listed
from powerplan.search import Candidate, Recommendation
from powerplan.search.choices import NAMED_KINDS, Choice
from powerplan.search.layer_plan import LayerPlan
from powerplan.search.trials import Excess


def why(answer: Recommendation, place: int) -> str:
    """Return the sentence of the candidate at `place` (from 0), without a full stop."""
    candidate, keep = answer.candidates[place], answer.request.keep
    plan = candidate.plan
    parts = [f"over {demand.option}: {demand.amounts()}" for demand in candidate.unmet]
    if candidate.run is not None and not candidate.run.fits and not answer.request.limits.on_training:
        parts.append("its training does not fit the devices")
    parts.append(_balance(candidate, answer.request.target))
    if plan.unchanged:
        parts += _as_it_is(candidate, answer)
    else:
        for choice, excess in zip(plan.choices, candidate.excess, strict=True):
            parts += _choice(choice, excess, keep)
        ahead = answer.candidates[:place]
        if plan.families == {"window"} and any("power" in other.plan.families for other in ahead):
            parts.append("power learns more from the same state, says arXiv 2507.04239, 5.1")
        if plan.is_mix:
            parts.append(_pattern(plan, keep))
    if keep == "weights" and any(choice.fewer_kv_heads or choice.family in NAMED_KINDS for choice in plan.choices):
        weights = Fraction(candidate.row.weight_flops_per_token, answer.base.weight_flops_per_token) - 1
        parts.append(f"weight FLOPs {float(weights):+.1%}" if weights else "")
    return "; ".join(dict.fromkeys(part for part in parts if part))


def gain(answer: Recommendation) -> str:
    """Return what the winner saves against the model as it is; where that is the winner, what the next one would save.

    "" where nothing is to be said.
    """
    winner, base = answer.recommended, answer.base.row(answer.contexts[-1], answer.request.dtypes)
    off = answer.off_target
    following = [off.meets] if off and off.meets and off.meets.feasible else list(answer.candidates[1:2])
    following = [candidate for candidate in following if candidate.balanced]
    if answer.request.keep == "flops" or (winner.plan.unchanged and not following):
        return ""
    if winner.plan.unchanged:
        share = 1 - following[0].row.flops_per_token / winner.row.flops_per_token
        return f"{following[0].label} would {'save' if share > 0 else 'add'} {abs(float(share)):.0%} of the FLOPs"
    flops = base.flops_per_token / winner.row.flops_per_token
    state = base.state_bytes / (winner.row.state_bytes or Fraction(1, 2))
    changes = [change(flops, "fewer", "FLOPs per token"), change(state, "less", "state")]
    return f"{listed(changes, 'and')}, against the model as it is"


def _times(ratio: Fraction | float) -> str:
    value = float(ratio)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def change(ratio: Fraction, less: Literal["fewer", "less"], what: str) -> str:
    """Return "2.93x fewer FLOPs" or "1.2x the FLOPs", for how many times less there is of a thing."""
    return f"{_times(ratio)}x {less} {what}" if ratio >= 1 else f"{_times(1 / ratio)}x the {what}"


def _name(choice: Choice, keep: Keep) -> str:
    """Return a choice in a sentence; its number of heads is another one where the model is resized."""
    mixer, heads = choice.mixers[0], choice.mixers[0].own_heads()
    return choice.label if keep == "weights" or heads is None else f"{mixer.label} d={heads.head_dim}"


def _balance(candidate: Candidate, target: Fraction) -> str:
    ratio = candidate.row.wsfr
    if ratio is None:
        return "no state"
    if candidate.balanced:  # At a short context the aim may be another ratio than the target.
        sides = [verdict_of(row.wsfr).side for row in candidate.rows if row.wsfr is not None]
        return "balanced" if target == 1 and set(sides) == {"balanced"} else "on target"
    if candidate.near:
        return "near enough to the target to stay"
    # Over several contexts a candidate may be off target though it is balanced at the longest.
    relative = ratio / target
    side, other = ("weight", "state") if relative > 1 else ("state", "weight")
    than = f"as much {side} as {other}" if target == 1 else f"the {side} that the target asks"
    return f"{_times(verdict_of(ratio, target).times)}x {than}"


def _as_it_is(candidate: Candidate, answer: Recommendation) -> list[str]:
    at = answer.balanced_context
    word = "balanced" if answer.request.target == 1 else "on target"
    parts = [] if at is None else [f"{word} at {at:,} tokens"]
    ratio = candidate.row.wsfr
    every_key = all(mixer.keeps_every_key for mixer in candidate.plan.scope.distinct)
    if ratio is not None and ratio > answer.request.target and every_key:
        parts.append("it keeps every key, so no other mixer has a state to add: what is free is a longer context")
    if not answer.movable:
        parts.append("no layer can take another mixer at the same weights (--mixer asks what one would make of it)")
    if candidate.wasteful:
        parts.append("attention over every key takes fewer FLOPs, or bytes, at this context")
    return parts


def _choice(choice: Choice, excess: Excess, keep: Keep) -> list[str]:
    parts, mixer = [], choice.mixers[0]
    if excess.flops > 1:
        parts.append(f"{_name(choice, keep)} takes {_times(excess.flops)}x the FLOPs of attention here")
    elif excess.bytes > 1:
        parts.append(f"{_name(choice, keep)} takes {_times(excess.bytes)}x the bytes of keeping every key here")
    size = mixer.features_size()
    if size is not None and not excess.wasteful:
        parts.append(f"{_name(choice, keep)} holds as much as a window of {size.recurrent // size.entry:,} tokens")
    if mixer.kernel_problem is not None:
        parts.append(mixer.kernel_problem)
    elif mixer.gpu_kernel_problem is not None:
        parts.append(mixer.gpu_kernel_problem)
    if mixer.kernel_problem is None and choice.degree and choice.degree > 1 and choice.degree % 2:
        parts.append("odd degree, so normalize: false (weights of both signs)")
    return parts


def _pattern(plan: LayerPlan, keep: Keep) -> str:
    assert plan.other is not None
    layers, count = plan.layers, plan.count
    these = " of these" if plan.scope.partial else ""
    every, share = layers // count, Fraction(count, layers)
    if count == 1:
        place = f"the last{these} layer{'s' if these else ''}"
    elif layers // every == count:
        ending = "th" if 10 < every % 100 < 14 else {1: "st", 2: "nd", 3: "rd"}.get(every % 10, "th")
        place = f"every {every}{ending}{these} layer{'s' if these else ''} ({every - 1}:1)"
    elif plan.regular:
        place = f"{share.numerator} of every {share.denominator}{these} layers"
    elif keep == "flops":
        place = f"{count / layers:.0%} of {'these' if these else 'the'} layers, spread"
    else:
        place = f"{count} of {layers}{these} layers, spread"
    return f"{_name(plan.other, keep)} in {place}"
