"""What to train at a context: the window, degree, heads or layer mix that balances a model, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from powerplan.answers import base
from powerplan.answers.base import Contexts, DrawnAnswer, Model, Whole, optional
from powerplan.answers.command import command_of
from powerplan.choices import LM_HEAD, Keep, Side
from powerplan.dtypes import Dtypes
from powerplan.dump import check_name, short_name, spec_to_yaml
from powerplan.errors import parameter
from powerplan.hardware import Device
from powerplan.lists import parse_words
from powerplan.measured import MeasuredTimes
from powerplan.mixers.formulas import Convention, convention_of
from powerplan.report.reasons import why
from powerplan.report.recommend import recommend_report
from powerplan.report.render import Report
from powerplan.search import SELECTABLE, Candidate, Limits, Recommendation, Request
from powerplan.search import recommend as search
from powerplan.units import (
    parse_bytes,
    parse_count,
    parse_days,
    parse_hours,
    parse_integer,
    parse_money,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True, repr=False)
class RecommendAnswer(DrawnAnswer):
    """What to train, the recommended candidate first.

    recommendation: all that the search found, with the request that it respects.
    command: the words of the command line that asks for it. written: the file that its model has been written to.
    """

    recommendation: Recommendation
    command: tuple[str, ...]
    written: str | None = None

    @property
    def recommended(self) -> Candidate:
        """The first candidate: its `spec` is the model to train."""
        return self.recommendation.recommended

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """The best candidates of their sorts, as many as were asked for at most, in order."""
        return self.recommendation.candidates

    @property
    def target_met(self) -> bool:
        """Whether the recommended candidate is within 5 % of the target at every context.

        Where it is not, `recommendation.off_target` has the candidates that come closest and that meet it.
        """
        return self.recommendation.target_met

    def why(self, place: int = 0) -> str:
        """Return why the candidate at `place` (from 0) stands there."""
        return why(self.recommendation, place)

    def name(self, place: int = 0) -> str:
        """Return the name that the candidate at `place` (from 0) is written under: "gpt2-small-power-p2"."""
        candidate = self.candidates[place]
        return short_name(self.recommendation.base.spec.name, "" if candidate.plan.unchanged else candidate.label)

    def to_yaml(self, place: int = 0, name: str | None = None) -> str:
        """Return the model of the candidate at `place` (from 0) as a powerplan YAML.

        name: letters, digits and . _ -; `self.name(place)` where None. Raises InputError for another.
        """
        named = self.name(place) if name is None else check_name(name, parameter("name"))
        return spec_to_yaml(self.candidates[place].spec, named)

    def figure(self) -> Figure:
        """Return the ratios of all candidates over the context, above their state per sequence."""
        from powerplan.plots.recommend import recommend_figure

        return recommend_figure(self.recommendation)

    def _report(self) -> Report:
        return recommend_report(self.recommendation, self.command, self.written)


def recommend(
    model: Model,
    context: Contexts = "64k",
    *,
    target: str | float = "1:1",
    max_state: Whole | None = None,
    max_decode_bytes: Whole | None = None,
    flops: Whole | float | None = None,
    tokens: Whole | float | None = None,
    gpu: str | Device | None = None,
    devices: Whole = 1,
    max_days: Whole | float | None = None,
    gpu_hours: Whole | float | None = None,
    price: Whole | float | None = None,
    keep: Keep = "weights",
    only: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    prefer: Side | None = None,
    measured: str | Path | MeasuredTimes | None = None,
    top: Whole = 6,
    mixer: str | None = None,
    convention: Convention | None = None,
    dtype: str = "bf16",
    weights_dtype: str | None = None,
    cache_dtype: str | None = None,
    state_dtype: str | None = None,
) -> RecommendAnswer:
    """Return which mixers, windows, heads or layer mix balance a model, as `powerplan recommend` prints it.

    Args:
        model: a catalogue name, a path to a YAML or a config.json, a spec, or a config (as load_model takes it).
        context: tokens, as 65536, "64k" or a list of them; of several the worst decides.
        target: the weight-state FLOP ratio that is wanted, as "3:1" or 3.
        max_state: bytes of state per sequence at most, as "512MiB".
        max_decode_bytes: bytes moved per decoded token at most, weights and state, at batch 1.
        flops: training FLOPs that must suffice, for `tokens` tokens or for one sequence.
        tokens: training tokens that `flops` must pay for, and those of the training run; 20 per active parameter where
            neither is given.
        gpu: the exact name of a device, whose memory must hold weights and state; its rates give times.
        devices: how many devices hold them together, and train the model.
        max_days, gpu_hours: days on these devices, and hours of one device in all, that the training run may take.
        price: money for an hour of one device. With any of the three, the run must fit into the devices' memory.
        keep: "weights" keeps width, depth and FFN; "flops" resizes candidates to the FLOPs per token of the model.
        only: families or kinds to use, such as "power,window" or ["power", "mix"].
        exclude: families or kinds to leave out; "lm-head" does what Convention(lm_head=False) does.
        prefer: the side, "weights" or "state", that should be the heavier one where one must be.
        measured: a file of `powerplan profile --save`: measured times of mixers in place of estimates.
        top: how many candidates are returned at most, each the best of its sort.
        mixer: the mixer to put into every layer first, such as "power:p=2".
        convention: how FLOPs are counted; Convention() where None.
        dtype: the number format of weights and key/value cache: fp32, bf16, fp16, fp8 or int4. Weights that the file of
            a model quantizes have their own.
        weights_dtype, cache_dtype, state_dtype: that of all weights, of the cache, of recurrent state (fp32) apart.

    Returns:
        The answer: `recommended.spec` is the model to train, `recommended.row` its numbers.

    Raises:
        InputError: an argument cannot be used; the message begins with the argument's name.
        InfeasibleError: no candidate meets the limits; the message names the one that binds, and by how much.

    Examples:
        >>> answer = recommend("gpt2-small", "64k")
        >>> answer.recommended.label
        '9 power p=2 6x128 + 3 power p=2'
    """
    given = dict(locals())
    contexts, ratio = base.read_contexts(context), base.read_ratio(target)
    count, sorts = base.read_devices(devices), parse_integer(base.text_of(top), parameter("top"), 1, 1000)
    limits = Limits(
        max_state=optional(parse_bytes, "max_state", max_state),
        max_decode=optional(parse_bytes, "max_decode_bytes", max_decode_bytes),
        flops=optional(parse_count, "flops", flops, "a count of FLOPs"),
        tokens=optional(parse_count, "tokens", tokens, "a count of tokens"),
        device=base.read_device(gpu),
        devices=count,
        max_days=optional(parse_days, "max_days", max_days),
        gpu_hours=optional(parse_hours, "gpu_hours", gpu_hours),
        price=optional(parse_money, "price", price),
    )
    selected, excluded = _read_kinds(only, "only"), _read_kinds(exclude, "exclude", LM_HEAD)
    loaded = base.read_model(model, mixer, contexts)
    profile = base.read_measured(measured)
    convention = convention_of(convention)
    dtypes = Dtypes(dtype, weights_dtype, cache_dtype, state_dtype)
    request = Request(
        contexts=contexts,
        target=ratio,
        limits=limits,
        only=selected,
        exclude=[word for word in excluded if word != LM_HEAD],
        prefer=prefer,
        keep=keep,
        convention=replace(convention, lm_head=convention.lm_head and LM_HEAD not in excluded),
        dtypes=dtypes,
        profile=profile,
        top=sorts,
    )
    recommendation = search(loaded.spec, request)
    notes = list(loaded.notes)
    if profile is not None and recommendation.recommended.times is None:
        notes.append(
            f"{profile.label}: no device of the catalogue and no rates of it, so times need {parameter('gpu')}"
        )
    elif profile is not None and limits.device is not None and (remark := profile.elsewhere(limits.device.name)):
        notes.append(remark)
    if recommendation.unplanned is not None:
        notes.append(f"no hours of training: {recommendation.unplanned}")
    command = command_of(recommend, given, contexts)
    return RecommendAnswer(recommendation=recommendation, command=command, notes=tuple(notes))


def _read_kinds(kinds: str | Sequence[str], name: str, *more: str) -> list[str]:
    """Return the words of a list such as "power,window", sorted; raises InputError for one that is not known."""
    return sorted(parse_words(kinds, [*SELECTABLE, *more], parameter(name)))
