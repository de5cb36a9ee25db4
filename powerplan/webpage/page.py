"""`powerplan.page`: where a model stands and what would balance it, as one HTML page to look at."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from powerplan.answers.base import Contexts, Model, Whole
from powerplan.answers.recommend import RecommendAnswer
from powerplan.answers.train import TrainAnswer
from powerplan.hardware import Device
from powerplan.measured import MeasuredTimes
from powerplan.mixers.formulas import Convention
from powerplan.output import check_targets, write_whole
from powerplan.report.advice import HYPOTHESIS
from powerplan.webpage import costs, counting, layers, measured, standing
from powerplan.webpage.asked import Asked, ask
from powerplan.webpage.render import render


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page about one model.

    asked: the answers that it shows. command: the command line that makes it again, "" where there is none.
    """

    asked: Asked
    command: str = ""

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on how the files were read; the command line prints them on stderr, and the page shows them."""
        return self.asked.notes

    @cached_property
    def html(self) -> str:
        """The page: a whole HTML document that asks for no other file. The same answers make the same text.

        Raises MachineError where jinja2 or vl-convert-python is missing.
        """
        return render(self._data())

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the page to a file, whole or not at all.

        Raises:
            InputError: the file cannot be written, or exists and `force` is not set.
            MachineError: a library is missing, or the disk is full.
        """
        check_targets({"path": str(path)}, force)
        write_whole(str(path), self.html.encode(), force, "path")

    def _repr_html_(self) -> str:
        """Return a frame with the page. Notebooks show it so."""
        from html import escape

        return f'<iframe srcdoc="{escape(self.html)}" style="width:100%;height:720px;border:0"></iframe>'

    def _data(self) -> dict[str, Any]:
        """Return what the template shows, as plain data."""
        asked = self.asked
        curves, context_charts = standing.context_charts(asked)
        decode_charts, layer_charts = costs.decode_charts(asked), layers.layer_charts(asked)
        strips, mixer_keys, layer_tables = layers.strips(asked)
        scopes, times = counting.scopes(asked), _measured(asked)
        charts = [*context_charts, *layer_charts, *decode_charts, *times["measured_charts"]]
        return {
            "name": asked.wsfr.model.name,
            "facts": standing.facts(asked),
            "context": asked.context,
            "badge": standing.side(asked),
            "verdict": standing.headline(asked),
            "splits": standing.split_bars(asked),
            "figures_head": standing.figures(asked),
            "notes": asked.notes,
            **_candidates(asked.recommend),
            "remark": asked.remark,
            "curves": curves,
            "context_charts": context_charts,
            "components": layers.component_bars(asked),
            "strips": strips,
            "mixer_keys": mixer_keys,
            "layer_charts": layer_charts,
            "layer_tables": layer_tables,
            "decode_figures": costs.decode_figures(asked),
            "decode_charts": decode_charts,
            "decode_keys": costs.decode_keys(asked),
            **_training(asked),
            **times,
            "convention": counting.convention_words(asked),
            "scopes": scopes,
            "letters": counting.letters(scopes),
            "specs": {chart.key: chart.spec for chart in charts},
            "command": self.command,
        }


def _candidates(answer: RecommendAnswer | str) -> dict[str, Any]:
    if isinstance(answer, str):
        return {"advice": [], "candidates": None, "no_advice": answer, "hypothesis": ""}
    return {
        "advice": standing.advice(answer),
        "candidates": standing.candidates_table(answer),
        "no_advice": "",
        "hypothesis": HYPOTHESIS,
    }


def _measured(asked: Asked) -> dict[str, Any]:
    times = asked.measured
    if times is None:
        return {"measured_words": [], "measured_table": None, "measured_keys": [], "measured_charts": []}
    keys, charts = measured.measured_charts(times)
    return {
        "measured_words": measured.measured_words(times, asked.elsewhere),
        "measured_table": measured.measured_table(times),
        "measured_keys": keys,
        "measured_charts": charts,
    }


def _training(asked: Asked) -> dict[str, Any]:
    answer = asked.train
    if not isinstance(answer, TrainAnswer):
        return {"training": None, "no_training": answer or ""}
    layout = answer.plan.layout
    training = {
        "figures": costs.training_figures(answer),
        "words": costs.training_words(answer),
        "bars": [costs.memory_bar(layout), costs.step_bar(layout)],
        "others": costs.others_table(answer),
    }
    return {"training": training, "no_training": ""}


def page(
    model: Model,
    context: Contexts = "128k",
    *,
    mixer: str | None = None,
    gpu: str | Device | None = None,
    devices: Whole = 1,
    tokens: Whole | float | None = None,
    price: float | str | None = None,
    measured: str | Path | MeasuredTimes | None = None,
    target: str | float = "1:1",
    top: Whole = 6,
    convention: Convention | None = None,
    dtype: str = "bf16",
    weights_dtype: str | None = None,
    cache_dtype: str | None = None,
    state_dtype: str | None = None,
    command: str = "",
) -> Page:
    """Return one HTML page about a model, as `powerplan report` writes it.

    Args:
        model: a catalogue name, a path to a YAML or a config.json, a spec, or a config (as load_model takes it).
        context: tokens of a sequence, as 131072, "128k" or a list of them; the page is about the longest, and the
            worst of them decides between candidates.
        mixer: the mixer to put into every layer first, such as "power:p=2".
        gpu: the exact name of a device, such as "h100-sxm": the page then has a training run, and decoding in seconds.
        devices: how many devices train the model, and serve it together.
        tokens: training tokens, as "300B"; 20 per active parameter where None.
        price: money for an hour of one device.
        measured: a file of `powerplan profile --save`, whose times the page shows beside predicted ones.
        target: the weight-state FLOP ratio that is wanted, as "3:1" or 3.
        top: how many sorts of candidates there are, besides those that always are.
        convention: how FLOPs are counted; Convention() where None.
        dtype: the number format of weights and key/value cache: fp32, bf16, fp16, fp8 or int4.
        weights_dtype, cache_dtype, state_dtype: that of all weights, of the cache, of recurrent state (fp32) apart.
        command: the command line that the page names as its origin; none where "".

    Returns:
        The page: `html` is its text, and `save(path)` writes it.

    Raises:
        InputError: an argument cannot be used; the message begins with the argument's name. What a model or its devices
            do not allow, such as a training run that does not fit, is a sentence of the page.

    Examples:
        >>> page("gpt2-small", "64k").asked.wsfr.verdict
        'state-heavy: 4.9x as many state as weight FLOPs at 65,536 tokens; balanced at 13,403'
    """
    dtypes = {
        "dtype": dtype,
        "weights_dtype": weights_dtype,
        "cache_dtype": cache_dtype,
        "state_dtype": state_dtype,
    }
    asked = ask(
        model,
        context,
        mixer=mixer,
        gpu=gpu,
        devices=devices,
        tokens=tokens,
        price=price,
        measured=measured,
        target=target,
        top=top,
        convention=convention,
        dtypes=dtypes,
    )
    return Page(asked=asked, command=command)
