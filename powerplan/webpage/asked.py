"""The answers that a page shows: each question of powerplan asked once, and a sentence where one has no answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from powerplan.answers import base
from powerplan.answers.base import Contexts, Model, Whole, optional
from powerplan.answers.decode import DecodeAnswer, decode
from powerplan.answers.recommend import RecommendAnswer, recommend
from powerplan.answers.train import TrainAnswer, train
from powerplan.answers.wsfr import WsfrAnswer, wsfr
from powerplan.errors import InfeasibleError, InputError, PowerplanError
from powerplan.hardware import Device, needs_device, peak_of
from powerplan.load import LoadedModel
from powerplan.measured import MeasuredTimes
from powerplan.mixers.formulas import Convention
from powerplan.search import Candidate
from powerplan.units import parse_count, parse_money

FEWEST, MOST = 64, 4096
"""The largest batch of the charts of decoding is between these, and beyond what fits."""


@dataclass(frozen=True)
class Asked:
    """What was asked about one model, and what was answered.

    contexts: in tokens, from the shortest to the longest, which the page is about.
    recommend: the candidates, or the sentence that says why there are none. remark: what else is to be said of them.
    decode: of the model, and of the recommended one where it is another; at the longest context.
    train: the training run, a sentence that says why there is none, or None where no device was named.
    measured: a saved profile. elsewhere: the device that is counted with, where the profile is of another one: its
    times are then shown and not counted with.
    notes: how the files were read, each once.
    """

    contexts: tuple[int, ...]
    wsfr: WsfrAnswer
    recommend: RecommendAnswer | str
    remark: str
    decode: DecodeAnswer
    train: TrainAnswer | str | None
    measured: MeasuredTimes | None
    elsewhere: str | None
    notes: tuple[str, ...]

    @property
    def context(self) -> int:
        return self.contexts[-1]


def ask(
    model: Model,
    context: Contexts,
    *,
    mixer: str | None,
    gpu: str | Device | None,
    devices: Whole,
    tokens: Whole | float | None,
    price: float | str | None,
    measured: str | Path | MeasuredTimes | None,
    target: str | float,
    top: Whole,
    convention: Convention | None,
    dtypes: dict[str, Any],
) -> Asked:
    """Return the answers about a model.

    dtypes: the keywords dtype, weights_dtype, cache_dtype and state_dtype.

    Raises:
        InputError: an argument cannot be used. What a model or its devices do not allow is a sentence of the answer.
    """
    contexts = tuple(sorted(base.read_contexts(context)))
    count, device, times = base.read_devices(devices), base.read_device(gpu), base.read_measured(measured)
    optional(parse_count, "tokens", tokens, "a count of tokens")
    optional(parse_money, "price", price)
    if device is None:
        given = {"devices": count > 1, "tokens": tokens is not None, "price": price is not None}
        for name in (name for name, is_given in given.items() if is_given):
            raise needs_device(name)
    else:
        peak_of(device)  # A device without the rates that times need is refused here.
    loaded = base.read_model(model, mixer)
    shared: dict[str, Any] = {"convention": convention, **dtypes}
    own = wsfr(loaded, contexts, **shared)
    run: dict[str, Any] = {} if device is None else {"gpu": device, "devices": count, "tokens": tokens, "price": price}
    here = times if times is None or device is None or times.elsewhere(device.name) is None else None
    asked: dict[str, Any] = {"target": target, "top": top, "measured": here, **shared}
    candidates, remark = _candidates(loaded, contexts, asked, run)
    models: list[Model] = [loaded]
    if isinstance(candidates, RecommendAnswer) and not candidates.recommended.plan.unchanged:
        models.append(candidates.recommended.spec)
    training: TrainAnswer | str | None = None
    if device is not None:
        try:
            training = train(loaded, contexts[-1], measured=here, convention=convention, **run)
        except PowerplanError as problem:
            training = str(problem)
    found = [own, candidates, training]
    notes = [note for answer in found if answer is not None and not isinstance(answer, str) for note in answer.notes]
    return Asked(
        contexts=contexts,
        wsfr=own,
        recommend=candidates,
        remark=remark,
        decode=_decode(models, contexts[-1], device, count, dtypes),
        train=training,
        measured=times,
        elsewhere=device.name if device is not None and here is not times else None,
        notes=tuple(dict.fromkeys(notes)),
    )


def _candidates(
    loaded: LoadedModel, contexts: Sequence[int], asked: dict[str, Any], run: dict[str, Any]
) -> tuple[RecommendAnswer | str, str]:
    """Return the candidates, or why there are none; and a remark where the devices of `run` allow none of them."""
    spec, remark = loaded.spec, ""
    changeable = spec.mixers() and not any(use.layer.tied for use in spec.layer_uses())
    try:
        try:
            return recommend(loaded, contexts, **asked, **run), remark
        except InfeasibleError as problem:
            if not run:
                raise
            remark = f"With the memory of these devices there is no candidate ({problem}). Without it:"
            return recommend(loaded, contexts, **asked), remark
    except InfeasibleError as problem:
        return str(problem), ""
    except InputError as problem:
        if changeable:
            raise
        return str(problem), ""


def _decode(
    models: Sequence[Model], context: int, device: Device | None, count: int, dtypes: dict[str, Any]
) -> DecodeAnswer:
    """Return what decoding takes at batches of powers of two, up to more than fit."""
    asked: dict[str, Any] = {"gpu": device, "devices": count, **dtypes}
    first = decode(models, context, batch=1, **asked)
    most = max((model.servings[0].largest_batch or 0 for model in first.models), default=0)
    highest = min(max(FEWEST, 2 ** (2 * most).bit_length()), MOST)
    batches = [2**exponent for exponent in range(highest.bit_length())]
    return decode(models, context, batch=batches, **asked)


def recommended(asked: Asked) -> Candidate | None:
    """Return the recommended candidate; None where there is none, or where it is the model as it is."""
    answer = asked.recommend
    if isinstance(answer, str) or answer.recommended.plan.unchanged:
        return None
    return answer.recommended
