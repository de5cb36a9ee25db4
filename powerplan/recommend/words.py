"""Candidates in words: a name that fits a table, and why each stands where it does."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction

from powerplan.dims import spow_dim
from powerplan.mixers import Attention, FeatureAttention, GroupedHeads, Mixer, Power
from powerplan.recommend.choices import ASKED, Choice
from powerplan.recommend.costs import STATE, WEIGHT
from powerplan.recommend.limits import Demand
from powerplan.recommend.plan import Plan
from powerplan.recommend.ranking import NEAR, Ranking
from powerplan.recommend.search import Search, Trial, families
from powerplan.spec import ModelSpec
from powerplan.swaps import AS_IS, is_softmax

LEGEND = "6x128: 6 heads of 128, else the model's own; /8: 8 key/value heads."


def name_of(item: Choice) -> str:
    """Return a choice in a few characters: "power p=2 6x128", "window 4,096", "linear"."""
    mixer = item.mixers[0]
    if item.text == AS_IS:
        return mixer.describe()
    if type(mixer) is Attention:
        name = "attention" if mixer.window is None else f"window {mixer.window:,}"
    else:
        name = mixer.describe()
    if not isinstance(mixer, GroupedHeads) or not (item.reshaped or item.fewer):
        return name
    groups = f"/{mixer.kv_heads}" if mixer.kv_heads != mixer.heads else ""
    return f"{name} {mixer.heads}x{mixer.head_dim}{groups}"


def label(plan: Plan) -> str:
    """Return a plan for a table: "9 power p=2 6x128 + 3 power p=2", "window 7,084"."""
    rest = " (growing)" if plan.scope.marked else ""
    if plan.unchanged:
        return AS_IS
    if plan.other is None:
        return f"{name_of(plan.main)}{rest}"
    layers = len(plan.scope.positions)
    return f"{layers - plan.count} {name_of(plan.main)} + {plan.count} {name_of(plan.other)}{rest}"


def resized_label(plan: Plan, spec: ModelSpec) -> str:
    """Return a plan in a resized model for a table, with the heads that it has there: "16 power p=2 9x128 + 5 mla"."""
    if plan.unchanged:
        return AS_IS
    rest = " (growing)" if plan.scope.marked else ""
    chosen = {mixer.describe() for item in plan.choices for mixer in item.mixers}
    counts: dict[tuple[str, str], int] = {}
    for use in spec.layer_uses():
        mixer = use.layer.mixer
        if mixer is not None and mixer.describe() in chosen:
            heads = ""
            if isinstance(mixer, GroupedHeads):
                shared = f"/{mixer.kv_heads}" if mixer.kv_heads != mixer.heads else ""
                heads = f" {mixer.heads}x{mixer.head_dim}{shared}"
            part = (mixer.describe().removeprefix("attention, "), heads)
            counts[part] = counts.get(part, 0) + use.count
    common = {heads for _, heads in counts}
    if len(counts) == 1:
        return "".join(next(iter(counts))) + rest
    if len(common) == 1:
        return " + ".join(f"{count} {name}" for (name, _), count in counts.items()) + f",{common.pop()}{rest}"
    return " + ".join(f"{count} {name}{heads}" for (name, heads), count in counts.items()) + rest


def _times(ratio: Fraction | float) -> str:
    value = float(ratio)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _change(ratio: Fraction) -> str:
    """Return "2.93x less" or "1.2x more", for how many times less a thing has become."""
    return f"{_times(ratio)}x less" if ratio >= 1 else f"{_times(1 / ratio)}x more"


class Reasons:
    """The sentences of one search's candidates."""

    def __init__(self, search: Search, ranking: Ranking, balanced_context: int | None) -> None:
        self.search, self.ranking, self.balanced_context = search, ranking, balanced_context

    def why(self, trial: Trial, unmet: list[Demand], ahead: Iterable[Trial] = ()) -> str:
        """Return the sentence of a candidate, without a full stop. ahead: the candidates that rank before it."""
        plan = trial.plan
        parts = [demand.describe() for demand in unmet]
        parts.append(self._balance(trial))
        if plan.unchanged:
            parts += self._as_it_is(trial)
        else:
            for item in plan.choices:
                parts += self._choice(trial, item)
            if families(plan) == {"window"} and any("power" in families(other.plan) for other in ahead):
                parts.append("power learns more from the same state (arXiv 2507.04239, 5.1)")
            if plan.is_mix:
                parts.append(self._pattern(plan))
        if self.ranking.keep == "weights" and any(item.fewer or item.family in ASKED for item in plan.choices):
            share = Fraction(trial.cost[WEIGHT], self.search.as_is.cost[WEIGHT]) - 1
            parts.append(f"weight FLOPs {float(share):+.1%}" if share else "")
        return "; ".join(dict.fromkeys(part for part in parts if part))

    def _name(self, item: Choice) -> str:
        """Return a choice in a sentence; its number of heads is another one where the model is resized."""
        mixer = item.mixers[0]
        if self.ranking.keep == "weights" or not isinstance(mixer, GroupedHeads):
            return name_of(item)
        return f"{mixer.describe()} d={mixer.head_dim}"

    def gain(self, trial: Trial, other: Trial) -> str:
        """Return what the first candidate saves against the model as it is; or, being that, what `other` would save."""
        base = self.search.as_is
        if trial.plan.unchanged:
            if other is trial or not self.ranking.balanced(other):
                return ""
            share = 1 - self._flops(other) / self._flops(trial)
            change = "save" if share > 0 else "add"
            return f"{label(other.plan)} would {change} {abs(float(share)):.0%} of the FLOPs"
        flops, state = self._flops(base) / self._flops(trial), Fraction(base.cost[STATE], trial.cost[STATE] or 1)
        fewer = _change(flops).replace("less", "fewer")
        return f"{fewer} FLOPs per token and {_change(state)} state than as it is"

    def _flops(self, trial: Trial) -> Fraction:
        return trial.cost[WEIGHT] + Fraction(trial.cost[-1], 2 * self.search.rates.contexts[-1])

    def _balance(self, trial: Trial) -> str:
        ratio = self.search.wsfr(trial.cost)
        if ratio is None:
            return "no state"
        if self.ranking.balanced(trial):
            return "balanced"
        if trial.plan.unchanged and self.ranking.distance(trial) <= NEAR:
            return "near enough to the target to stay"
        relative = ratio / self.search.target
        side, other = ("weight", "state") if relative > 1 else ("state", "weight")
        than = "" if self.search.target == 1 else " than the target asks"
        times = _times(max(relative, 1 / relative))
        return f"{times}x more {side}{than}" if than else f"{times}x more {side} than {other}"

    def _as_it_is(self, trial: Trial) -> list[str]:
        found = []
        if self.balanced_context is not None:
            found.append(f"on target at {self.balanced_context:,} tokens")
        ratio = self.search.wsfr(trial.cost)
        if ratio is not None and ratio > self.search.target and all(is_softmax(m) for m in trial.plan.scope.classes):
            found.append("it keeps every key, so no other mixer has a state to add: what is free is a longer context")
        if not self.search.scopes:
            found.append("no layer can take another mixer at the same weights (--mixer asks what one would make of it)")
        if trial.wasteful:
            found.append("softmax attention takes fewer FLOPs, or bytes, at this context")
        return found

    def _choice(self, trial: Trial, item: Choice) -> list[str]:
        found = []
        mixer = item.mixers[0]
        waste = self.search.waste(trial.plan.scope, item)
        if waste.flops > 1:
            found.append(f"{self._name(item)} takes {_times(waste.flops)}x the FLOPs of softmax attention here")
        elif waste.bytes > 1:
            found.append(f"{self._name(item)} takes {_times(waste.bytes)}x the bytes of keeping every key here")
        if isinstance(mixer, FeatureAttention):
            window = same_state(mixer)
            if not waste.any:
                found.append(f"{self._name(item)} holds as much as a window of {window:,} tokens")
        if isinstance(mixer, Power):
            found += _kernel(mixer)
        return found

    def _pattern(self, plan: Plan) -> str:
        assert plan.other is not None
        layers, count = len(plan.scope.positions), plan.count
        every = layers // count
        if count == 1:
            place = "the last layer"
        elif layers // every == count:
            place = f"every {_ordinal(every)} layer ({every - 1}:1)"
        elif plan.regular:
            place = f"{Fraction(count, layers).numerator} of every {Fraction(count, layers).denominator} layers"
        elif self.ranking.keep == "flops":
            place = f"{count / layers:.0%} of the layers, spread"
        else:
            place = f"{count} of {layers} layers, spread"
        return f"{self._name(plan.other)} in {place}"


def same_state(mixer: FeatureAttention) -> int:
    """Return the window, in tokens, whose keys and values have as many elements as this state, as `dims` has it."""
    features = spow_dim(mixer.head_dim, mixer.degree)
    return features * mixer.v_head_dim // (mixer.head_dim + mixer.v_head_dim)


def _kernel(mixer: Mixer) -> list[str]:
    assert isinstance(mixer, Power)
    if mixer.p > 4:
        return ["p > 4 has no kernel here"]
    if mixer.p % 2 and mixer.normalize:
        return ["odd degree: kernels need normalize: false (weights of both signs)"]
    return ["odd degree, so normalize: false (weights of both signs)"] if mixer.p % 2 and mixer.p > 1 else []


def _ordinal(number: int) -> str:
    endings = {1: "st", 2: "nd", 3: "rd"}
    return f"{number}{'th' if 10 < number % 100 < 14 else endings.get(number % 10, 'th')}"
