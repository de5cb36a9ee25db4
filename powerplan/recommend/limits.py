"""Constraints, and which of them binds where nothing meets them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from powerplan.accounting import DTYPE_BYTES, Accounting
from powerplan.budget import TRAINING
from powerplan.errors import InfeasibleError
from powerplan.hardware import Device, si_value
from powerplan.recommend.costs import DECODE, HALF, PARAMETERS, STATE, WEIGHT, Rates
from powerplan.recommend.search import Trial
from powerplan.units import format_bytes


@dataclass(frozen=True)
class Limits:
    """What a candidate must meet; None where nothing is asked.

    max_state: bytes per sequence at the longest context. max_decode: bytes moved for one token there, at batch 1,
    weights and state. flops: of the whole training, for `tokens` tokens, or one sequence where they are not given.
    device, devices: whose memory holds the weights and the state of one sequence.
    """

    max_state: int | None = None
    max_decode: int | None = None
    flops: int | None = None
    tokens: int | None = None
    device: Device | None = None
    devices: int = 1


@dataclass(frozen=True)
class Demand:
    """What one candidate needs of one constraint."""

    option: str
    needed: Fraction
    allowed: Fraction
    unit: str

    @property
    def met(self) -> bool:
        return self.needed <= self.allowed

    @property
    def excess(self) -> Fraction:
        return self.needed / self.allowed

    def amounts(self) -> str:
        """Return "2.25 GiB, 4.5 times the 512 MiB allowed"."""
        times = f"{float(f'{float(self.excess):.3g}'):,.10g} times"
        if self.unit == "bytes":
            return f"{format_bytes(self.needed)}, {times} the {format_bytes(self.allowed)} allowed"
        return f"{float(self.needed):.4g} {self.unit}, {times} the {float(self.allowed):.4g} allowed"

    def describe(self) -> str:
        """Return "over --max-state: 2.25 GiB, 4.5 times the 512 MiB allowed"."""
        return f"over {self.option}: {self.amounts()}"


class Checker:
    """Holds the candidates of one model against the limits."""

    def __init__(self, limits: Limits, accounting: Accounting, rates: Rates) -> None:
        self.limits, self.rates = limits, rates
        self.width = DTYPE_BYTES[rates.dtype]
        self.stored = accounting.total_parameters.with_embeddings
        self.read = accounting.active_parameters.without_input_embedding

    def decode_bytes(self, trial: Trial) -> Fraction:
        """Return the bytes that one token moves at batch 1: the weights it reads, and the state."""
        weights = self.read + trial.cost[PARAMETERS] - self.stored
        return weights * self.width + Fraction(trial.cost[DECODE], HALF)

    def demands(self, trial: Trial) -> list[Demand]:
        """Return what a candidate needs of every constraint that is set."""
        limits, cost, context = self.limits, trial.cost, self.rates.contexts[-1]
        state = Fraction(cost[STATE], HALF)
        found = []
        if limits.max_state is not None:
            found.append(Demand("--max-state", state, Fraction(limits.max_state), "bytes"))
        if limits.max_decode is not None:
            found.append(Demand("--max-decode-bytes", self.decode_bytes(trial), Fraction(limits.max_decode), "bytes"))
        if limits.flops is not None:
            tokens = limits.tokens or context
            per_token = TRAINING * (cost[WEIGHT] + Fraction(cost[-1], 2 * context))
            found.append(Demand("--flops", per_token * tokens, Fraction(limits.flops), "FLOPs"))
        if limits.device is not None:
            memory = Fraction(si_value(limits.device, "memory_gb") or 0) * limits.devices
            found.append(Demand("--hardware", cost[PARAMETERS] * self.width + state, memory, "bytes"))
        return found

    def meets(self, trial: Trial) -> bool:
        return all(demand.met for demand in self.demands(trial))

    def infeasible(self, trials: Sequence[Trial]) -> InfeasibleError:
        """Return the error that names the constraint that binds, and by how much, where no candidate is left."""
        checked = [(trial, self.demands(trial)) for trial in trials]
        alone = []
        for place in range(len(checked[0][1])):
            best = min((demands[place] for _, demands in checked), key=lambda demand: demand.excess)
            if not best.met:
                alone.append(best)
        if alone:
            worst = max(alone, key=lambda demand: demand.excess)
            least = f"even the least of {len(trials):,} candidates" if len(trials) > 1 else "the only candidate"
            return InfeasibleError(f"{worst.option}: {least} needs {worst.amounts()}")
        trial, demands = min(checked, key=lambda item: (max(demand.excess for demand in item[1]), item[0].plan.text()))
        worst = max(demands, key=lambda demand: demand.excess)
        others = sum(all(demand.met for demand in row if demand.option != worst.option) for _, row in checked)
        return InfeasibleError(
            f"{worst.option}: each constraint can be met, but not all at once; the nearest, {trial.plan.text()}, needs "
            f"{worst.amounts()}; without {worst.option} there are {others:,} candidates"
        )
