"""What a recommendation is made of: candidates with their models and numbers, and what is said of the first one."""

from __future__ import annotations

from dataclasses import dataclass

from powerplan.accounting import Accounting, Row
from powerplan.roofline import TokenTimes
from powerplan.run.plan import TrainingPlan
from powerplan.search.layer_plan import LayerPlan
from powerplan.search.limits import Demand
from powerplan.search.request import Request
from powerplan.search.runs import Runs
from powerplan.search.trials import Excess
from powerplan.spec import ModelSpec


@dataclass(frozen=True)
class Candidate:
    """One plan with its model and its numbers.

    label: its name in a table. rows: the numbers at the contexts of the request, in their order.
    parameters: of the model, all experts included. unmet: the limits that it does not meet.
    balanced, near: whether it is on target, and whether the model as it is would best be left so.
    wasteful, excess: whether a mixer costs more than keeping every key, and by how many times each choice does.
    times: seconds per token on one device, None without a device. tokens: what the FLOPs of the limits buy, if any.
    run: the training run on the devices of the limits; None where there are none, or nothing is known of their links.
    """

    plan: LayerPlan
    label: str
    spec: ModelSpec
    rows: tuple[Row, ...]
    parameters: int
    unmet: tuple[Demand, ...]
    balanced: bool
    near: bool
    wasteful: bool
    excess: tuple[Excess, ...]
    times: TokenTimes | None
    tokens: int | None
    run: TrainingPlan | None

    @property
    def feasible(self) -> bool:
        return not self.unmet

    @property
    def row(self) -> Row:
        """The numbers at the longest context."""
        return self.rows[-1]

    @property
    def direct_reach_tokens(self) -> int | None:
        """How many tokens back a layer can look at the longest context, the furthest of all layers.

        None where no layer meets a token but through a state.
        """
        reaches = (mixer.direct_reach(self.row.context) for mixer in self.spec.mixers())
        return max((reach for reach in reaches if reach is not None), default=None)

    @property
    def mixer(self) -> str:
        """The plan in `--mixer` texts, for the model as it is (before it is resized)."""
        return self.plan.text()


@dataclass(frozen=True)
class Chunk:
    """The chunk size, in tokens, of a recurrent layer of the winner, where it comes from, and whether kernels take it
    anyway."""

    mixer: str
    size: int
    source: str
    default: bool = False


@dataclass(frozen=True)
class BalancedWindow:
    """The window, in tokens, that balances a model: in every layer, or (`partial`) in those whose state grows."""

    tokens: int
    partial: bool


@dataclass(frozen=True)
class OffTarget:
    """What there is besides a recommended candidate that is off the target; see `Miss`.

    closest, meets: the candidates that come closest to the target and that meet it, None where there are none.
    within: the limits that keep plans of the same weights from the target, as "--max-state 512 MiB"; else "".
    """

    closest: Candidate | None
    meets: Candidate | None
    within: str
    wasteful: bool


@dataclass(frozen=True)
class Recommendation:
    """Candidates in order, as many as were asked for at most, the recommended one first.

    base: the model as it is. searched: how many candidates were compared.
    balanced_context, balanced_window: where the model as it is balances, in tokens.
    chunks: chunk sizes of the recommended model. movable: whether any layer can take another mixer.
    off_target: what there is besides where the recommended candidate is off the target; None where it is on target.
    runs: what plans the training of candidates, with its setting; None without a device, and where `unplanned` says
        why it cannot.
    """

    base: Accounting
    request: Request
    contexts: tuple[int, ...]
    candidates: tuple[Candidate, ...]
    searched: int
    balanced_context: int | None
    balanced_window: BalancedWindow | None
    chunks: tuple[Chunk, ...]
    movable: bool
    off_target: OffTarget | None
    runs: Runs | None
    unplanned: str | None

    @property
    def recommended(self) -> Candidate:
        return self.candidates[0]

    @property
    def target_met(self) -> bool:
        """Whether weight and state FLOPs of the recommended candidate are within 5 % of the target at every context."""
        return self.off_target is None

    def place(self, candidate: Candidate) -> int | None:
        """Return the place of a candidate among those that are shown, from 0; None where it is not among them."""
        return next((place for place, other in enumerate(self.candidates) if other is candidate), None)
