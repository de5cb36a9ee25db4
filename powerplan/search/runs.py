"""The training runs of candidates: whether they fit into the devices, what they take, and the limits on that.

A search over all layouts takes 0.1 s for 64 devices, so not every candidate gets one. Two do, the model as it is and
the first in order, and others take the best of the layouts that these found, unless it is a bad one: of 54 candidates
of six models on 8 to 2,048 H100, 51 came out as a search of their own has them, and three with the largest states, of
power attention of degrees 3 and 4, 13 to 24 % slower.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from heapq import nsmallest

from powerplan.accounting import Accounting
from powerplan.errors import InputError, parameter
from powerplan.hardware import peak_of
from powerplan.run.degrees import Degrees, problems
from powerplan.run.efficiency import DEFAULT
from powerplan.run.layouts import BATCH_TOKENS, Batch, Setting
from powerplan.run.links import cluster_of
from powerplan.run.plan import Choices, Phase, TrainingPlan, plan_training
from powerplan.run.recipe import Recipe
from powerplan.search.costs import CostBasis
from powerplan.search.limits import Demand, Limits, no_candidate
from powerplan.search.ranking import Ranking, sort_of
from powerplan.search.trials import Trial
from powerplan.spec import ModelSpec
from powerplan.training import TOKENS_PER_PARAMETER, TRAINING_PASSES

SEARCHES = 2
"""Searches over all layouts; candidates after them take the layouts that these found best."""

MORE_SEARCHES = 4
"""Searches that are repeated over all layouts, where none of those fits, or a step waits long in the best of them:
twice as long as in the best of all layouts of any other candidate, and a fifth of its compute."""

KEPT_LAYOUTS = 12
"""Layouts of a search that others may take."""

MOST_PLANS = 40
"""Candidates whose training is planned to find such as are within limits, 10 ms each."""

TRIES = 3
"""Candidates of one sort whose training is planned before the next sort has its turn."""

LAST_TRIES = 8
"""Candidates with the fewest FLOPs whose training is planned where no other was within the limits."""

PLANNED = "candidates that were planned"
"""What candidates are called in a message about limits on their training."""


class Runs:
    """Plans the training of candidates of one model at one context, each once, on the devices of the limits."""

    def __init__(self, base: Accounting, basis: CostBasis, limits: Limits) -> None:
        """Prepare the runs, and plan that of the model as it is.

        Raises:
            InputError: there is no device, no rate is known of a link that is needed, or no layout can share a batch.
        """
        assert limits.device is not None, "runs_of and Request.check see to it"
        self.base, self.basis, self.limits = base, basis, limits
        try:
            cluster = cluster_of(limits.device, limits.devices)
        except InputError:
            problem = f"the catalogue has no rates of links that join {limits.devices:,} {limits.device.name}"
            raise InputError(problem, parameter("devices")) from None
        self.setting = Setting.of(cluster, peak_of(limits.device), DEFAULT, Batch(BATCH_TOKENS))
        self.searches = 0
        self._short: dict[Degrees, None] = {}
        self._longest_wait = 0.0
        self._plans: dict[int, TrainingPlan] = {}
        self._planned: list[Trial] = []  # Their ids are keys, so they have to stay.
        self.as_is = self._plan(base)

    @property
    def planned(self) -> int:
        """How many candidates have a plan."""
        return len(self._plans)

    def tokens(self, flops_per_token: Fraction | float) -> int:
        """Return the tokens of a run: as given, else what the FLOPs buy, else 20 per active parameter as it is."""
        limits = self.limits
        if limits.tokens is not None:
            return limits.tokens
        if limits.flops is not None:
            return max(1, int(limits.flops // (TRAINING_PASSES * flops_per_token)))
        return TOKENS_PER_PARAMETER * self.base.active_parameters.with_embeddings

    def has(self, trial: Trial) -> bool:
        """Whether the training of a candidate was planned."""
        return id(trial) in self._plans

    def plan(self, trial: Trial, model: ModelSpec) -> TrainingPlan:
        """Return the training run of a candidate, whose model is given."""
        if id(trial) not in self._plans:
            accounting = Accounting(model, self.base.convention)
            self._plans[id(trial)] = self.as_is if trial.plan.unchanged else self._plan(accounting)
            self._planned.append(trial)
        return self._plans[id(trial)]

    def plan_of(self, trial: Trial, model: ModelSpec) -> TrainingPlan | None:
        """Return the training run of a candidate; None where no layout can share a batch and no limit needs the run."""
        try:
            return self.plan(trial, model)
        except InputError:
            if self.limits.on_training:
                raise
            return None

    def _plan(self, accounting: Accounting) -> TrainingPlan:
        plan = None
        if self.searches >= SEARCHES or (self.searches and self._too_big(self.as_is)):
            plan = self._among(accounting, [way for way in self._short if not any(self._problems(way, accounting))])
        if plan is None or (self._wants_more(plan) and self.searches < SEARCHES + MORE_SEARCHES):
            plan = self._among(accounting, None) or plan
            self.searches += 1
            if plan is not None:
                layouts = (plan.layout, *plan.phases[0].others[:KEPT_LAYOUTS])
                self._short |= dict.fromkeys(layout.degrees for layout in layouts)
                self._longest_wait = max(self._longest_wait, _waiting(plan))
        if plan is None:
            batch = f"{self.setting.batch.tokens:,} tokens in sequences of {self.basis.longest:,}"
            problem = f"no layout of {self.limits.devices:,} devices can share a batch of {batch} evenly"
            raise InputError(problem, parameter("devices"))
        return plan

    def _wants_more(self, plan: TrainingPlan) -> bool:
        """Whether another layout may do much better: none fits yet, or a step waits longer than in any best layout."""
        if not plan.fits:
            return not self._too_big(plan)
        return _waiting(plan) > max(2 * self._longest_wait, plan.layout.step.compute_s / 5)

    def _too_big(self, plan: TrainingPlan) -> bool:
        """Whether what all devices share is more than they hold, so that no other layout fits either."""
        memory, capacity = plan.layout.memory, self.setting.capacity_bytes
        return capacity is not None and memory.weights + memory.gradients + memory.optimizer > capacity

    def _problems(self, way: Degrees, accounting: Accounting) -> Iterator[str]:
        return problems(way, accounting.spec, self.basis.longest)

    def _among(self, accounting: Accounting, ways: Sequence[Degrees] | None) -> TrainingPlan | None:
        """Return the best run over some ways to split it, or over all; None where none of them can share the batch."""
        context = self.basis.longest
        phase = Phase(self.tokens(accounting.row(context).flops_per_token), context)
        choices = Choices(Recipe(), None if ways is None else tuple(ways))
        try:
            return plan_training(accounting, [phase], self.setting, choices, self.limits.price)
        except InputError:
            return None

    def demands(self, plan: TrainingPlan) -> list[Demand]:
        """Return what a run needs of a device's memory and of the limits on days and hours; [] where there are none."""
        if not self.limits.on_training:
            return []
        demands, capacity = [], self.setting.capacity_bytes
        if capacity is not None:
            peak = Fraction(plan.layout.memory.peak)
            demands.append(
                Demand("--gpu in training", peak, Fraction(capacity), remedy=f"more {parameter('devices')} share it")
            )
        return [*demands, *self._time_demands(plan.gpu_hours)]

    def _time_demands(self, gpu_hours: float) -> list[Demand]:
        limits, demands = self.limits, []
        if limits.max_days is not None:
            days = Fraction(gpu_hours) / 24 / limits.devices
            demands.append(Demand("--max-days", days, limits.max_days, "days"))
        if limits.gpu_hours is not None:
            demands.append(Demand("--gpu-hours", Fraction(gpu_hours), limits.gpu_hours, "hours"))
        return demands

    def _fewest_hours(self, trial: Trial) -> float:
        """Return device hours that training takes at least: those of its FLOPs alone, all state at the best rate.

        Runs take their time by the default convention. A mean over causal keys is half of all keys or more; of chunks
        no such bound is known, and state counts as nothing.
        """
        cost, context, efficiency = trial.cost, self.basis.longest, self.setting.efficiency
        convention = self.base.convention
        state = cost.scaled_state_flops[-1] / (2 * context)
        tokens = self.tokens(cost.weight_flops_per_token + state)
        if convention.form == "chunked":
            state = 0
        elif convention.causal == "full":
            state /= 2
        weights = cost.weight_flops_per_token / efficiency.weights
        at_peak = weights + state / max(efficiency.attention, efficiency.recurrent)
        return TRAINING_PASSES * at_peak * tokens / float(self.setting.peak.flops_per_s) / 3600

    def _hopeless(self, trial: Trial) -> list[Demand]:
        """Return the limits that a candidate would not meet if nothing but its FLOPs took time."""
        if self.limits.max_days is None and self.limits.gpu_hours is None:
            return []
        return [demand for demand in self._time_demands(self._fewest_hours(trial)) if not demand.met]

    def unmet(self, trial: Trial, model: ModelSpec | None = None) -> tuple[Demand, ...]:
        """Return the limits that the training of a candidate does not meet: by its plan, else as far as FLOPs tell.

        model: that of the candidate, whose training is planned then.
        """
        plan = self._plans.get(id(trial)) if model is None else self.plan_of(trial, model)
        demands = self._hopeless(trial) if plan is None else self.demands(plan)
        return tuple(demand for demand in demands if not demand.met)


def _waiting(plan: TrainingPlan) -> float:
    """Return the seconds of a step that are no compute: traffic that nothing hides, bubbles, the optimizer."""
    return plan.layout.step.seconds - plan.layout.step.compute_s


def runs_of(base: Accounting, basis: CostBasis, limits: Limits) -> tuple[Runs | None, str | None]:
    """Return what plans training runs, or why there is none; raises InputError where limits need it."""
    if limits.device is None:
        return None, None
    try:
        return Runs(base, basis, limits), None
    except InputError as error:
        if limits.on_training:
            raise
        return None, error.problem


def within_limits(
    ordered: Sequence[Trial], runs: Runs, ranking: Ranking, build: Callable[[Trial], ModelSpec], top: int
) -> list[Trial]:
    """Plan the training of candidates in their order until `top` sorts have one within the limits, and return those.

    Where none of these is on target, those on target with the fewest FLOPs are planned too: they tell what it costs.

    ordered: candidates from first to last, all within the other limits.

    Raises:
        InfeasibleError: of those that were planned none is within the limits, the ones with the fewest FLOPs included.
    """

    def within(trial: Trial) -> bool:
        runs.plan(trial, build(trial))
        return not runs.unmet(trial)

    def cheapest(trials: Sequence[Trial], count: int) -> list[Trial]:
        return nsmallest(count, trials, key=lambda trial: runs.basis.scaled_flops(trial.cost))

    found: dict[tuple[object, ...], Trial] = {}
    tries: Counter[tuple[object, ...]] = Counter()
    for trial in ordered:
        sort = sort_of(trial)
        if sort in found or tries[sort] == TRIES or runs.unmet(trial):
            continue
        tries[sort] += 1
        if within(trial):
            found[sort] = trial
        if len(found) == top or runs.planned >= MOST_PLANS:
            break
    fitting = list(found.values()) or [trial for trial in cheapest(ordered, LAST_TRIES) if within(trial)]
    if not fitting:
        planned = [trial for trial in ordered if runs.has(trial)]
        raise no_candidate(planned, lambda trial: runs.demands(runs.plan(trial, build(trial))), PLANNED)
    if not any(map(ranking.balanced, fitting)):
        on_target = [trial for trial in ordered if ranking.balanced(trial) and not trial.wasteful]
        for smaller in (False, True):
            alike = [trial for trial in on_target if ranking.smaller_weights(trial) == smaller]
            fitting += [trial for trial in cheapest(alike, TRIES) if within(trial)]
    return fitting
