"""Several models side by side: parameters, ratios, state and bytes per decoded token at the same contexts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from powerplan.accounting import Accounting, Row
from powerplan.answers.base import Contexts, DrawnAnswer, Model, named_notes, read_contexts, read_model, several_models
from powerplan.dtypes import Dtypes
from powerplan.errors import InputError, parameter
from powerplan.mixers.formulas import Convention
from powerplan.report.compare import compare_report
from powerplan.report.render import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True, repr=False)
class CompareAnswer(DrawnAnswer):
    """Several models at the same contexts.

    accountings: the counts of each model, all in one convention. rows: for each model its numbers at each context.
    dtypes: the number formats of weights, key/value cache and recurrent state.
    """

    accountings: tuple[Accounting, ...]
    rows: tuple[tuple[Row, ...], ...]
    dtypes: Dtypes

    def figure(self) -> Figure:
        """Return the ratios of the models over the context, above their state per sequence."""
        from powerplan.plots.compare import compare_figure

        return compare_figure(self.accountings, [row.context for row in self.rows[0]], self.dtypes)

    def _report(self) -> Report:
        return compare_report(self.accountings, self.rows, self.dtypes)


def compare(
    models: Sequence[Model],
    context: Contexts = "8k,128k",
    *,
    mixer: str | None = None,
    convention: Convention | None = None,
    dtype: str = "bf16",
    weights_dtype: str | None = None,
    cache_dtype: str | None = None,
    state_dtype: str | None = None,
) -> CompareAnswer:
    """Return models side by side, or one beside itself with another mixer, as `powerplan compare` prints them.

    Args:
        models: catalogue names, paths or specs, as for wsfr. One is enough where there is a mixer.
        context: tokens, as 65536, "64k" or "1k,64k", or a list of them.
        mixer: the mixer to put into every layer of every model, such as "power:p=2". A single model is shown without
            it too.
        convention: how FLOPs are counted; Convention() where None.
        dtype: the number format of weights and key/value cache: fp32, bf16, fp16, fp8 or int4. Weights that the file of
            a model quantizes have their own.
        weights_dtype, cache_dtype, state_dtype: that of all weights, of the cache, of recurrent state (fp32) apart.

    Returns:
        The answer: FLOPs per token, state per sequence and bytes per decoded token in `rows`, model by model.

    Raises:
        InputError: an argument cannot be used; the message begins with the argument's name.

    Examples:
        >>> answer = compare(["gpt2-small", "llama-3-8b"], "128k")
        >>> [f"{float(row.wsfr):.3f}" for (row,) in answer.rows]
        ['0.102', '0.437']
    """
    contexts = read_contexts(context)
    listed = several_models(models) is models
    alone = mixer is not None and listed and len(models) == 1
    if not listed or (len(models) < 2 and not alone):
        raise InputError("compare needs a list of two models or more, or of one with a mixer", parameter("models"))
    dtypes = Dtypes(dtype, weights_dtype, cache_dtype, state_dtype)
    loaded = [read_model(model, None, contexts) for model in models] if alone else []
    loaded += [read_model(model, mixer, contexts) for model in models]
    accountings = tuple(Accounting(one.spec, convention) for one in loaded)
    return CompareAnswer(
        accountings=accountings,
        rows=tuple(tuple(accounting.row(tokens, dtypes) for tokens in contexts) for accounting in accountings),
        dtypes=dtypes,
        notes=tuple(note for one in loaded for note in named_notes(one.spec, one.notes)),
    )
