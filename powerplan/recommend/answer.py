"""`recommend`: the request, the search, and the answer with the model that each candidate stands for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from powerplan.accounting import Accounting, Row
from powerplan.budget import TRAINING, train_flops
from powerplan.dims import default_chunk_size
from powerplan.errors import InputError
from powerplan.hardware import peak_of
from powerplan.measured import Profile, Unmeasured
from powerplan.mixers import Convention, FeatureAttention, Mixer
from powerplan.mixers.base import total
from powerplan.recommend.choices import ASKED, KINDS
from powerplan.recommend.costs import WEIGHT, Costs, Rates
from powerplan.recommend.limits import Checker, Limits
from powerplan.recommend.plan import Plan
from powerplan.recommend.ranking import Keep, Ranking, Side, group
from powerplan.recommend.rescale import flops_per_token, rescaled, resized_alike
from powerplan.recommend.roofline import Roofline, Times
from powerplan.recommend.search import Search, Trial, families
from powerplan.recommend.words import Reasons, label, name_of, resized_label
from powerplan.spec import ModelSpec
from powerplan.swaps import sequence_mixers
from powerplan.whatif import renamed

MIX = "mix"
WORDS = (*KINDS, MIX, *ASKED)
"""What --only and --exclude take."""

SHOWN = 6
"""Groups of candidates in a table, besides those that are always there."""

RESIZED = 24
"""Best candidates that --keep flops rescales, besides the best of each group."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked. contexts: judged by the worst; the longest is what limits, windows and state refer to.

    only, exclude: words of WORDS. keep: "weights" leaves width, depth and FFN; "flops" resizes every candidate to the
    FLOPs per token of the model as it is. device: for roofline times; profile: measured times instead of them.
    """

    contexts: Sequence[int]
    target: Fraction = Fraction(1)
    limits: Limits = field(default_factory=Limits)
    only: Sequence[str] = ()
    exclude: Sequence[str] = ()
    prefer: Side | None = None
    keep: Keep = "weights"
    convention: Convention = field(default_factory=Convention)
    dtype: str = "bf16"
    profile: Profile | None = None
    top: int = SHOWN

    def admits(self, plan: Plan) -> bool:
        """Whether the kinds of a plan are asked for."""
        kinds = families(plan)
        wanted = {word for word in self.only if word != MIX} or set(KINDS) | kinds
        if MIX in self.exclude and plan.is_mix:
            return False
        if self.only and not {word for word in self.only if word != MIX} and not plan.is_mix:
            return False
        return kinds <= wanted and not kinds & set(self.exclude)

    def check(self) -> None:
        """Raise InputError where the request contradicts itself."""
        both = sorted(set(self.only) & set(self.exclude))
        if both:
            raise InputError(f"{', '.join(both)} is asked for and excluded", "--only, --exclude")
        if self.limits.tokens is not None and self.limits.flops is None:
            raise InputError("--tokens needs the budget that they must fit; add --flops")
        if self.limits.devices > 1 and self.limits.device is None:
            raise InputError("--devices needs the device; such as --hardware h100-sxm")


@dataclass(frozen=True)
class Candidate:
    """One plan with its model and its numbers; `rows` belong to the contexts of the answer, in their order."""

    plan: Plan
    label: str
    spec: ModelSpec
    rows: tuple[Row, ...]
    parameters: int
    feasible: bool
    why: str
    times: Times | None
    tokens: int | None

    @property
    def row(self) -> Row:
        """The numbers at the longest context."""
        return self.rows[-1]

    @property
    def mixer(self) -> str:
        """The plan in `--mixer` texts, for the model as it is (before it is resized)."""
        return self.plan.text()


@dataclass(frozen=True)
class Chunk:
    """The chunk size of a recurrent layer of the winner, and where it comes from."""

    mixer: str
    size: int
    source: str


@dataclass(frozen=True)
class BalancedWindow:
    """The window, in tokens, that balances a model: in every layer, or (`partial`) in those whose state grows."""

    tokens: int
    partial: bool


@dataclass(frozen=True)
class Answer:
    """Candidates in order, the recommended one first; searched: how many were compared; gain: what changes.

    movable: whether any layer can take another mixer.
    """

    base: Accounting
    request: Request
    contexts: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    searched: int
    balanced_context: int | None
    balanced_window: BalancedWindow | None
    chunks: tuple[Chunk, ...]
    gain: str
    movable: bool

    @property
    def recommended(self) -> Candidate:
        return self.candidates[0]


def recommend(spec: ModelSpec, request: Request) -> Answer:
    """Search the plans for `spec`, and return the best of each sort, ranked and explained.

    Raises InputError for a request that contradicts itself or admits nothing, InfeasibleError where no plan meets the
    limits.
    """
    request.check()
    if not sequence_mixers(spec):
        raise InputError(f"{spec.name} has no sequence mixers, and so no state to plan")
    contexts = tuple(sorted(set(request.contexts)))
    rates = Rates(contexts, request.convention, request.dtype)
    base = Accounting(spec, request.convention)
    search = Search(base, rates, request.target, request.admits, request.only)
    trials = search.trials()
    if not trials:
        words = [f"--only {','.join(sorted(request.only))}"] if request.only else []
        words += [f"--exclude {','.join(sorted(request.exclude))}"] if request.exclude else []
        raise InputError(f"no candidate is left of {spec.name}", " ".join(words) or None)
    roofline = _roofline(request)
    ranking = Ranking(search, request.prefer, request.keep, _clock(search, roofline))
    checker = Checker(request.limits, base, rates)
    if request.keep == "flops":
        shown, resized_models, search, ranking = _resized(search, ranking, trials, request)
        models = {trial: _named(trial.plan, resized_models[trial], spec, resized=True) for trial in shown}
        checkers = {
            trial: Checker(request.limits, Accounting(models[trial], request.convention), rates) for trial in shown
        }
    else:
        feasible = {id(trial) for trial in trials if checker.meets(trial)}
        if not feasible:
            raise checker.infeasible(trials)
        ordered = sorted(trials, key=lambda trial: (id(trial) not in feasible, ranking.key(trial)))
        shown = _selection(ordered, request.top, ranking)
        models = {trial: _named(trial.plan, trial.plan.build(spec), spec) for trial in shown}
        checkers = dict.fromkeys(shown, checker)
    balanced = base.balanced_context(request.target)
    reasons = Reasons(search, ranking, balanced)
    found = []
    for trial in shown:
        unmet = [demand for demand in checkers[trial].demands(trial) if not demand.met]
        found.append((unmet, trial))
    if all(unmet for unmet, _ in found):
        raise checkers[shown[0]].infeasible(shown)
    found.sort(key=lambda item: bool(item[0]))
    shown = [trial for _, trial in found]
    candidates = tuple(
        _candidate(
            trial, models[trial], reasons.why(trial, unmet, shown[:place]), not unmet, request, contexts, roofline
        )
        for place, (unmet, trial) in enumerate(found)
    )
    return Answer(
        base,
        request,
        contexts,
        candidates,
        len(trials),
        balanced,
        _window(search),
        _chunks(found[0][1].plan, request.profile),
        reasons.gain(found[0][1], found[min(1, len(found) - 1)][1]) if request.keep == "weights" else "",
        bool(search.scopes),
    )


def _window(search: Search) -> BalancedWindow | None:
    """Return the window that balances the model as it is, in as many of its layers as can have one."""
    if not search.scopes:
        return None
    tokens = search.window(search.scopes[0])
    return None if tokens is None else BalancedWindow(tokens, search.scopes[0].partial)


def _candidate(
    trial: Trial,
    spec: ModelSpec,
    why: str,
    feasible: bool,
    request: Request,
    contexts: tuple[int, ...],
    roofline: Roofline | None,
) -> Candidate:
    accounting = Accounting(spec, request.convention)
    rows = tuple(accounting.row(context, request.dtype) for context in contexts)
    budget = request.limits.flops
    return Candidate(
        trial.plan,
        label(trial.plan) if request.keep == "weights" else resized_label(trial.plan, spec),
        spec,
        rows,
        accounting.total_parameters.with_embeddings,
        feasible,
        why,
        roofline.times(spec, rows[-1]) if roofline else None,
        None if budget is None else int(budget // train_flops(rows[-1])),
    )


def _named(plan: Plan, built: ModelSpec, base: ModelSpec, resized: bool = False) -> ModelSpec:
    """Return the model under a name that says what it is: a `--mixer` text, or a mix in words."""
    if plan.unchanged:
        return built
    if resized:
        return renamed(built, base.name, f"{resized_label(plan, built)}, resized")
    return renamed(built, base.name, label(plan) if plan.is_mix or plan.scope.partial else plan.text())


def _always(trial: Trial, ranking: Ranking) -> bool:
    """Whether a candidate is shown however it ranks: what people ask about first."""
    plan = trial.plan
    if plan.unchanged:
        return True
    if plan.main.fewer and not plan.scope.partial:
        return ranking.balanced(trial)
    if plan.is_mix or plan.scope.partial or plan.main.reshaped:
        return False
    item = plan.main
    return item.family == "window" or (item.degree in (2, 3) and "normalize" not in item.text)


def _selection(ordered: list[Trial], top: int, ranking: Ranking) -> list[Trial]:
    """Return the best of each group, the first `top` of them and those that are always shown, in order."""
    best: dict[tuple[object, ...], Trial] = {}
    for trial in ordered:
        best.setdefault(group(trial), trial)
    firsts = list(best.values())
    return [trial for place, trial in enumerate(firsts) if place < top or _always(trial, ranking)]


def _resized(
    search: Search, ranking: Ranking, trials: list[Trial], request: Request
) -> tuple[list[Trial], dict[Trial, ModelSpec], Search, Ranking]:
    """Return the best candidates, each resized to the FLOPs of the model as it is, ranked by their new numbers.

    Twice: what balances a model of one size does not quite balance one of another, so the search is repeated at the
    size that the first winner has. Also returned are that search and its ranking.
    """
    goal = flops_per_token(search.spec, search.rates.contexts[-1], request.convention)
    models = _all_resized(search, ranking, trials, goal)
    if not models:
        raise InputError(f"{search.spec.name}: its heads do not allow another width", "--keep flops")
    alike = resized_alike(search.spec, models[min(models, key=ranking.key)])
    if alike is not None:
        again = Search(
            Accounting(alike, request.convention), search.rates, request.target, request.admits, request.only
        )
        order = replace(ranking, search=again)
        found = _all_resized(again, order, [trial for trial in again.trials() if not trial.plan.unchanged], goal)
        if found:
            search, ranking, models = again, order, found | {t: m for t, m in models.items() if t.plan.unchanged}
    return _selection(sorted(models, key=ranking.key), request.top, ranking), models, search, ranking


def _all_resized(search: Search, ranking: Ranking, trials: list[Trial], goal: Fraction) -> dict[Trial, ModelSpec]:
    """Return the best of `trials` and the best of each group, with their models of `goal` FLOPs per token."""
    rates = search.rates
    ordered = sorted(trials, key=ranking.key)
    models: dict[Trial, ModelSpec] = {}
    for trial in dict.fromkeys([*ordered[:RESIZED], *_selection(ordered, len(ordered), ranking)]):
        plan = trial.plan
        if plan.unchanged:
            models[trial] = search.spec
            continue
        sized = rescaled(search.spec, plan, goal, rates.contexts[-1], rates.convention)
        if sized is not None:
            cost = Costs(Accounting(sized, rates.convention), None, rates).rest
            models[trial._replace(cost=cost)] = sized
    return models


def _roofline(request: Request) -> Roofline | None:
    """Return what gives times: the device that is named, or the one that the profile was measured on."""
    if request.limits.device is not None:
        return Roofline(peak_of(request.limits.device), request.profile)
    if request.profile is None:
        return None
    peak = request.profile.peak()
    return None if peak is None else Roofline(peak, request.profile)


def _clock(search: Search, roofline: Roofline | None) -> Callable[[Trial], float] | None:
    """Return what tells the training time per token of a candidate where mixers were measured; else None."""
    if roofline is None or roofline.profile is None:
        return None
    profile, peak, context = roofline.profile, float(roofline.peak.flops_per_s), search.rates.contexts[-1]
    known: dict[Mixer, float] = {}

    def seconds(mixer: Mixer) -> float:
        if mixer not in known:
            timing = profile.training_time(mixer, context)
            flops = float(total(mixer.state_flops_terms(context, search.rates.convention)))
            known[mixer] = TRAINING * flops / peak if isinstance(timing, Unmeasured) else timing.seconds
        return known[mixer]

    def time(trial: Trial) -> float:
        plan, counts = trial.plan, search.split(trial.plan)
        return TRAINING * trial.cost[WEIGHT] / peak + sum(
            seconds(mixer) * count
            for item, layers in zip(plan.choices, counts, strict=True)
            for mixer, count in zip(item.mixers, layers, strict=True)
        )

    return time


def _chunks(plan: Plan, profile: Profile | None) -> tuple[Chunk, ...]:
    """Return the chunk size of each recurrent mixer of a plan: the fastest that was measured, else the default."""
    found = []
    for item in plan.choices:
        for mixer in item.mixers:
            if not isinstance(mixer, FeatureAttention):
                continue
            best = profile.best_chunk(mixer) if profile else None
            if profile and best:
                found.append(Chunk(name_of(item), best[0], f"the fastest of {best[1]} in {profile.path}"))
            elif mixer.chunk_size is not None:
                found.append(Chunk(name_of(item), mixer.chunk_size, "the model's own"))
            else:
                size = default_chunk_size(mixer.head_dim, mixer.degree)
                found.append(Chunk(name_of(item), size, "the kernels' default"))
    return tuple(dict.fromkeys(found))
