"""Constraints, and which of them binds where nothing meets them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from operator import attrgetter

from powerplan.accounting import Accounting
from powerplan.entries import host_bytes
from powerplan.errors import InfeasibleError, parameter
from powerplan.hardware import Device
from powerplan.search.costs import CostBasis
from powerplan.search.trials import Trial
from powerplan.training import TRAINING_PASSES
from powerplan.units import format_bytes, format_figure


@dataclass(frozen=True)
class Limits:
    """What a candidate must meet. None where there is no limit.

    max_state: bytes of state per sequence at the longest context.
    max_decode: bytes of weights and state moved to decode one token there, at batch 1.
    flops: FLOPs of the whole training, for `tokens` tokens, or for one sequence where they are not given.
    device, devices: whose memory must hold the weights and the state of one sequence.
    max_days, gpu_hours: of the whole training on these devices. price: money for an hour of one of them. Where any of
        the three is set, the training has to fit into their memory.
    """

    max_state: int | None = None
    max_decode: int | None = None
    flops: int | None = None
    tokens: int | None = None
    device: Device | None = None
    devices: int = 1
    max_days: Fraction | None = None
    gpu_hours: Fraction | None = None
    price: Fraction | None = None

    @property
    def on_training(self) -> bool:
        """Whether the training run itself has limits to meet, that of memory at least."""
        return (self.max_days, self.gpu_hours, self.price) != (None, None, None)


@dataclass(frozen=True)
class Demand:
    """What one candidate needs of one constraint. remedy: what else to try where none meets it."""

    option: str
    needed: Fraction
    allowed: Fraction
    unit: str = "bytes"
    remedy: str = ""

    @property
    def excess(self) -> Fraction:
        """How many times what is allowed is needed."""
        return self.needed / self.allowed

    @property
    def met(self) -> bool:
        return self.needed <= self.allowed

    def amounts(self) -> str:
        """Return "2.25 GiB, 4.5 times the 512 MiB allowed"."""
        times = f"{format_figure(self.excess)} times"
        if self.unit == "bytes":
            return f"{format_bytes(self.needed)}, {times} the {format_bytes(self.allowed)} allowed"
        return f"{_figure(self.needed)} {self.unit}, {times} the {_figure(self.allowed)} allowed"

    def spelt(self) -> str:
        """Return the option as messages name it: "--gpu in training", and "gpu in training" in Python."""
        option, space, rest = self.option.partition(" ")
        return f"{parameter(option.removeprefix('--').replace('-', '_'))}{space}{rest}"

    def limit(self) -> str:
        """Return "--max-state 512 MiB", or "--max-days 5"."""
        return f"{self.option} {format_bytes(self.allowed) if self.unit == 'bytes' else _figure(self.allowed)}"


def _figure(value: Fraction) -> str:
    """Return four figures, and whole numbers to a million in full: 7,000, 4.342e+13."""
    return f"{float(value):,.0f}" if 1000 <= value < 10**6 else f"{float(value):.4g}"


class Checker:
    """Holds the candidates of one model against the limits."""

    def __init__(self, limits: Limits, accounting: Accounting, basis: CostBasis) -> None:
        self.limits, self.basis = limits, basis
        self.host_bytes = host_bytes(accounting, basis.dtypes)
        self.idle_bytes = accounting.stored_bytes(basis.dtypes) - accounting.read_bytes(basis.dtypes)

    def decode_bytes(self, trial: Trial) -> Fraction:
        """Return the bytes that one token moves at batch 1: the weights it reads, and the state."""
        return trial.cost.weight_bytes - self.idle_bytes + trial.cost.decode_bytes

    def demands(self, trial: Trial) -> list[Demand]:
        """Return what a candidate needs of every constraint that is set."""
        limits, cost = self.limits, trial.cost
        demands = []
        if limits.max_state is not None:
            demands.append(Demand("--max-state", cost.state_bytes, Fraction(limits.max_state)))
        if limits.max_decode is not None:
            demands.append(Demand("--max-decode-bytes", self.decode_bytes(trial), Fraction(limits.max_decode)))
        if limits.flops is not None:
            flops = TRAINING_PASSES * self.basis.flops_per_token(cost) * (limits.tokens or self.basis.longest)
            demands.append(Demand("--flops", flops, Fraction(limits.flops), "FLOPs"))
        if limits.device is not None:
            memory = Fraction(limits.device.capacity_bytes * limits.devices)
            demands.append(Demand("--gpu", cost.weight_bytes - self.host_bytes + cost.state_bytes, memory))
        return demands

    def unmet(self, trial: Trial) -> tuple[Demand, ...]:
        """Return the demands of a candidate that are more than what is allowed."""
        return tuple(demand for demand in self.demands(trial) if not demand.met)

    def infeasible(self, trials: Sequence[Trial]) -> InfeasibleError:
        """Return the error that names the constraint that binds, and by how much, where no candidate is left."""
        return no_candidate(trials, self.demands)


def no_candidate(
    trials: Sequence[Trial], demands_of: Callable[[Trial], Sequence[Demand]], word: str = "candidates"
) -> InfeasibleError:
    """Return the error that names the constraint that binds, and by how much, where none of `trials` meets all.

    demands_of: what a candidate needs of every constraint, in one order. word: what the candidates are called.
    """
    checked, excess = [(trial, demands_of(trial)) for trial in trials], attrgetter("excess")
    by_limit = zip(*(demands for _, demands in checked), strict=True)
    worst = max((min(demands, key=excess) for demands in by_limit), key=excess)
    if not worst.met:
        least_text = f"even the least of {len(trials):,} {word}" if len(trials) > 1 else "the only candidate"
        remedy = f"; {worst.remedy}" if worst.remedy else ""
        return InfeasibleError(f"{worst.spelt()}: {least_text} needs {worst.amounts()}{remedy}")
    nearest, demands = min(checked, key=lambda pair: (max(map(excess, pair[1])), pair[0].plan.text()))
    worst = max(demands, key=excess)
    others = sum(all(demand.met for demand in row if demand.option != worst.option) for _, row in checked)
    return InfeasibleError(
        f"{worst.spelt()}: each constraint can be met, but not all at once; the nearest, {nearest.plan.text()}, "
        f"needs {worst.amounts()}; {others:,} of {len(checked):,} {word} would do without {worst.spelt()}"
    )
