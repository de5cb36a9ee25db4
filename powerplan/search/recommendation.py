"""`recommend`: the request, the search, and the candidates with the models that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from typing import NamedTuple

from powerplan.accounting import Accounting
from powerplan.dims import default_chunk_size
from powerplan.errors import InputError, listed, parameter
from powerplan.measured import Unmeasured
from powerplan.mixers import Mixer
from powerplan.mixers.formulas import total
from powerplan.roofline import Roofline
from powerplan.search.costs import CostBasis
from powerplan.search.layer_plan import LayerPlan
from powerplan.search.limits import Checker, Demand, no_candidate
from powerplan.search.ranking import Ranking, sort_of
from powerplan.search.request import Request
from powerplan.search.resize import Resizer, Size, resized_alike
from powerplan.search.result import BalancedWindow, Candidate, Chunk, OffTarget, Recommendation
from powerplan.search.runs import Runs, runs_of, within_limits
from powerplan.search.target import Miss, miss_of
from powerplan.search.trials import Search, Trial
from powerplan.spec import ModelSpec
from powerplan.swap import renamed
from powerplan.training import TRAINING_PASSES, train_flops

RESIZED = 24
"""Best candidates that `--keep flops` resizes, besides the best of each sort."""


def recommend(spec: ModelSpec, request: Request) -> Recommendation:
    """Search the plans for a model, and return the best of each sort, ranked.

    Raises:
        InputError: the request contradicts itself or admits nothing, or the model has no state or shared weights.
        InfeasibleError: no plan meets the limits.
    """
    request.check()
    if not spec.mixers():
        raise InputError(f"{spec.name} has no sequence mixers, and so no state to plan")
    if any(use.layer.tied for use in spec.layer_uses()):
        raise InputError(f"{spec.name} has layers that share their weights, and recommend cannot change them")
    basis = CostBasis(tuple(sorted(set(request.contexts))), request.convention, request.dtypes)
    base = Accounting(spec, request.convention)
    search = Search(base, basis, request.target, request.admits, request.only)
    trials = search.trials()
    if not trials:
        words = {"only": request.only, "exclude": request.exclude}
        options = [f"{parameter(name)} {','.join(sorted(kinds))}" for name, kinds in words.items() if kinds]
        raise InputError(f"no candidate is left of {spec.name}", " ".join(options) or None)
    roofline = request.roofline()
    ranking = Ranking(search, request.prefer, request.keep, _training_time(search, roofline))
    runs, unplanned = runs_of(base, basis, request.limits)
    study = _Study(base, request, basis, roofline, runs)
    if request.keep == "flops":
        built, shown, miss, ranking = _of_same_flops(study, trials, ranking)
    else:
        built, shown, miss = _of_same_weights(study, trials, ranking)
    search, candidates = ranking.search, tuple(built[trial] for trial in shown)
    window = search.balanced_window(search.scopes[0]) if search.scopes else None
    return Recommendation(
        base=base,
        request=request,
        contexts=basis.contexts,
        candidates=candidates,
        searched=len(trials),
        balanced_context=base.balanced_context(request.target),
        balanced_window=BalancedWindow(window, search.scopes[0].partial) if window else None,
        chunks=_chunks(candidates[0].plan, request),
        movable=bool(search.scopes),
        off_target=None if miss is None else _off_target(miss, built),
        runs=runs,
        unplanned=unplanned,
    )


@dataclass(frozen=True)
class _Study:
    """What all candidates share. base: the model as it is. roofline, runs: None where no device is named."""

    base: Accounting
    request: Request
    basis: CostBasis
    roofline: Roofline | None
    runs: Runs | None

    def candidate(self, trial: Trial, model: ModelSpec, ranking: Ranking) -> Candidate:
        """Return the candidate that a trial becomes with its model, which gets a name."""
        plan, request, runs, own = trial.plan, self.request, self.runs, model
        search = ranking.search
        label = plan.label() if request.keep == "weights" else plan.resized_label(model)
        if not plan.unchanged:
            text = label if plan.is_mix or plan.scope.partial else plan.text()
            name = text if request.keep == "weights" else f"{label}, resized"
            model = renamed(model, self.base.spec.name, name)
        accounting = Accounting(model, request.convention)
        rows = tuple(accounting.row(context, request.dtypes) for context in self.basis.contexts)
        checker, flops = Checker(request.limits, accounting, self.basis), request.limits.flops
        return Candidate(
            plan=plan,
            label=label,
            spec=model,
            rows=rows,
            parameters=accounting.total_parameters.with_embeddings,
            unmet=(*checker.unmet(trial), *(runs.unmet(trial, own) if runs else ())),
            balanced=ranking.balanced(trial),
            near=ranking.near(trial),
            wasteful=trial.wasteful,
            excess=() if plan.unchanged else tuple(search.excess(plan.scope, choice) for choice in plan.choices),
            times=self.roofline.times(model, rows[-1]) if self.roofline else None,
            tokens=None if flops is None else int(flops // train_flops(rows[-1])),
            run=runs.plan_of(trial, own) if runs else None,
        )

    def demands(self, candidate: Candidate, trial: Trial) -> list[Demand]:
        """Return what a candidate needs of every constraint, by its own model."""
        accounting = Accounting(candidate.spec, self.request.convention)
        demands = Checker(self.request.limits, accounting, self.basis).demands(trial)
        return [*demands, *(self.runs.demands(candidate.run) if self.runs and candidate.run else ())]


def _of_same_weights(
    study: _Study, trials: list[Trial], ranking: Ranking
) -> tuple[dict[Trial, Candidate], list[Trial], Miss | None]:
    """Return candidates of the width, depth and FFN of the model as it is, and of their trials those that are shown.

    Only what is shown, or named where the first is off the target, is built. Last comes what there is besides then.
    """
    request, runs = study.request, study.runs
    checker = Checker(request.limits, study.base, study.basis)
    unmet = {id(trial): checker.unmet(trial) for trial in trials}
    if all(unmet.values()):
        raise checker.infeasible(trials)
    keys = {id(trial): ranking.key(trial) for trial in trials}

    def in_order(some: Iterable[Trial]) -> list[Trial]:
        return sorted(some, key=lambda trial: (bool(unmet[id(trial)]), keys[id(trial)]))

    ordered, build = in_order(trials), cache(lambda trial: trial.plan.build(study.base.spec))
    if runs is not None and request.limits.on_training:
        allowed = [trial for trial in ordered if not unmet[id(trial)]]
        within = within_limits(allowed, runs, ranking, build, request.top)
        for trial in _selection([*within, *ordered], request.top, ranking):
            runs.plan(trial, build(trial))
        unmet = {id(trial): (*unmet[id(trial)], *runs.unmet(trial)) for trial in trials}
        ordered = in_order(trial for trial in ordered if unmet[id(trial)] or runs.has(trial))
    miss = miss_of(ordered, ranking, lambda trial: unmet[id(trial)])
    named = {id(trial) for trial in (miss.closest, miss.meets) if trial} if miss else set()
    best = {id(trial) for trial in _selection(ordered, request.top, ranking)} | named
    shown = _shown([trial for trial in ordered if id(trial) in best], request.top, miss)
    kept = [trial for trial in ordered if id(trial) in named | set(map(id, shown))]
    return {trial: study.candidate(trial, build(trial), ranking) for trial in kept}, shown, miss


def _of_same_flops(
    study: _Study, trials: list[Trial], ranking: Ranking
) -> tuple[dict[Trial, Candidate], list[Trial], Miss | None, Ranking]:
    """Return the same of candidates resized to the FLOPs of the model as it is, and the ranking of their new sizes.

    Limits are those of each model, so only what is built is compared.
    """
    models, ranking = _resized(study.request, trials, ranking)
    built = {trial: study.candidate(trial, model, ranking) for trial, model in models.items()}
    order = sorted(built, key=lambda trial: not built[trial].feasible)
    if not built[order[0]].feasible:
        over = {id(trial): built[trial] for trial in order}
        raise no_candidate(order, lambda trial: study.demands(over[id(trial)], trial))
    miss = miss_of(order, ranking, lambda trial: built[trial].unmet)
    return built, _shown(order, study.request.top, miss), miss, ranking


def _off_target(miss: Miss, built: dict[Trial, Candidate]) -> OffTarget:
    return OffTarget(
        closest=built[miss.closest] if miss.closest else None,
        meets=built[miss.meets] if miss.meets else None,
        within=listed([demand.limit() for demand in miss.limits], "and"),
        wasteful=miss.wasteful,
    )


def _shown(ordered: Sequence[Trial], top: int, miss: Miss | None) -> list[Trial]:
    """Return `top` of some trials, in their order: the first one, then those that one wants to see most.

    These are the model as it is, what comes closest to the target, what meets it, the balanced window and power
    attention of degree 2 in the model's own heads; then the others in order.
    """
    plain = [trial for trial in ordered if _plain(trial)]
    windows = [trial for trial in plain if trial.plan.main.family == "window"]
    asked = [trial for trial in (miss.closest, miss.meets) if trial] if miss else []
    wanted = [
        *(ordered[0], *(trial for trial in ordered if trial.plan.unchanged), *asked, *windows[:1]),
        *(*(trial for trial in plain if trial.plan.main.degree == 2), *ordered),
    ]
    kept = list(dict.fromkeys(map(id, wanted)))[:top]
    return [trial for trial in ordered if id(trial) in kept]


def _plain(trial: Trial) -> bool:
    """Whether a plan has one mixer in the layers' own heads, in all layers."""
    return not trial.plan.is_mix and not trial.plan.scope.partial and trial.plan.main.plain


def _always_built(trial: Trial, ranking: Ranking) -> bool:
    """Whether a candidate may be shown however it ranks: the model as it is, windows, plain power of degree 2 and 3."""
    plan, main = trial.plan, trial.plan.main
    if plan.unchanged:
        return True
    if main.fewer_kv_heads and not plan.scope.partial:
        return ranking.balanced(trial)
    return _plain(trial) and (main.family == "window" or main.degree in (2, 3))


def _selection(ordered: list[Trial], top: int, ranking: Ranking) -> list[Trial]:
    """Return the best of each sort, the first `top` of them and those that may be shown however they rank, in order."""
    best: dict[tuple[object, ...], Trial] = {}
    for trial in ordered:
        best.setdefault(sort_of(trial), trial)
    return [trial for place, trial in enumerate(best.values()) if place < top or _always_built(trial, ranking)]


def _resized(request: Request, trials: list[Trial], ranking: Ranking) -> tuple[dict[Trial, ModelSpec], Ranking]:
    """Return the best candidates, each resized to the FLOPs of the model as it is, ranked by their new numbers.

    What balances a model of one size does not quite balance one of another. So the search is repeated at the size that
    the first winner has, and the ranking of that search is returned too.
    """
    search = ranking.search
    spec, goal = search.spec, search.accounting.row(search.basis.longest).flops_per_token
    sizes = _all_resized(ranking, trials, goal)
    if not sizes:
        raise InputError(f"{spec.name}: its heads do not allow another width", f"{parameter('keep')} flops")
    winner = sizes[min(sizes, key=ranking.key)]
    alike = winner and resized_alike(spec, winner.size)
    if alike is not None:
        accounting = Accounting(alike, request.convention)
        again = Search(accounting, search.basis, request.target, request.admits, request.only)
        order = replace(ranking, search=again)
        resized_again = _all_resized(order, [trial for trial in again.trials() if not trial.plan.unchanged], goal)
        if resized_again:
            unchanged = {trial: own for trial, own in sizes.items() if trial.plan.unchanged}
            ranking, sizes = order, resized_again | unchanged
    shown = _selection(sorted(sizes, key=ranking.key), request.top, ranking)
    return {trial: own.build(trial.plan) if (own := sizes[trial]) else spec for trial in shown}, ranking


class _Resized(NamedTuple):
    """The size of a candidate, and what builds it."""

    size: Size
    resizer: Resizer

    def build(self, plan: LayerPlan) -> ModelSpec:
        return self.resizer.build(plan, self.size)


def _all_resized(ranking: Ranking, trials: list[Trial], goal: Fraction) -> dict[Trial, _Resized | None]:
    """Return the best of `trials` and the best of each sort, with their sizes of `goal` FLOPs per token.

    The size of the model as it is stays: None.
    """
    search, ordered = ranking.search, sorted(trials, key=ranking.key)
    resizers = {scope: Resizer(search.spec, scope, search.basis, goal) for scope in search.scopes}
    sizes: dict[Trial, _Resized | None] = {}
    for trial in dict.fromkeys([*ordered[:RESIZED], *_selection(ordered, len(ordered), ranking)]):
        if trial.plan.unchanged:
            sizes[trial] = None
            continue
        resizer = resizers[trial.plan.scope]
        if size := resizer.resized(trial.plan):
            sizes[trial._replace(cost=resizer.cost(trial.plan, size))] = _Resized(size, resizer)
    return sizes


def _training_time(search: Search, given: Roofline | None) -> Callable[[Trial], float] | None:
    """Return what tells the training seconds per token of a trial where mixers were measured; else None."""
    if given is None or given.profile is None:
        return None
    profile, peak, basis = given.profile, float(given.peak.flops_per_s), search.basis

    @cache
    def mixer_time(mixer: Mixer) -> float:
        time = profile.training_time(mixer, basis.longest)
        if isinstance(time, Unmeasured):
            return TRAINING_PASSES * float(total(mixer.state_flops_terms(basis.longest, basis.convention))) / peak
        return time

    def time(trial: Trial) -> float:
        return TRAINING_PASSES * trial.cost.weight_flops_per_token / peak + sum(
            mixer_time(mixer) * count
            for choice, layers in zip(trial.plan.choices, search.split(trial.plan), strict=True)
            for mixer, count in zip(choice.mixers, layers, strict=True)
        )

    return time


def _chunks(plan: LayerPlan, request: Request) -> tuple[Chunk, ...]:
    """Return the chunk size of each mixer of a plan that has one: the fastest that was measured, the spec's, a default.

    The default is that of the kernels which will run: Triton's where a device of the catalogue is named, all of which
    are GPUs; else that of a CPU and that of a GPU.
    """
    profile, chunks = request.profile, []
    processors = {"torch": "CPU", "triton": "GPU"} if request.limits.device is None else {"triton": "GPU"}
    for label, mixer in [(choice.label, mixer) for choice in plan.choices for mixer in choice.mixers]:
        own, heads = getattr(mixer, "chunk_size", None), mixer.own_heads()
        best = profile.best_chunk(mixer) if profile else None
        if mixer.degree is None:
            continue
        if profile and best:
            chunks.append(Chunk(label, best[0], f"the fastest of {best[1]} in {profile.path}"))
        elif own is not None:
            chunks.append(Chunk(label, own, "the model's own"))
        elif heads is not None:
            for engine, processor in processors.items():
                size = default_chunk_size(heads.head_dim, mixer.degree, engine)
                chunks.append(Chunk(label, size, f"the kernels' default on a {processor}", default=True))
    return tuple(dict.fromkeys(chunks))
