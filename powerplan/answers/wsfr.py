"""The weight-state FLOP ratio of a model: which side is too heavy at a context, and where the two balance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from powerplan.accounting import Accounting, Row
from powerplan.answers.base import Contexts, DrawnAnswer, Model, check_choice, read_contexts, read_model
from powerplan.choices import By
from powerplan.dtypes import Dtypes
from powerplan.mixers.formulas import Convention
from powerplan.report.render import Report
from powerplan.report.wsfr import verdict_text, wsfr_report
from powerplan.spec import ModelSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class WsfrAnswer(DrawnAnswer):
    """The weight-state FLOP ratios of one model.

    accounting: the model's counts and the convention that they follow. rows: the numbers at each context, in the order
    of the contexts. dtypes: the number formats of weights, key/value cache and recurrent state.
    """

    accounting: Accounting
    rows: tuple[Row, ...]
    dtypes: Dtypes
    by: By | None = None
    explain: bool = False

    @property
    def model(self) -> ModelSpec:
        """The spec of the model, with the mixer that was put into it."""
        return self.accounting.spec

    @property
    def balanced_context(self) -> int | None:
        """The longest context, in tokens, at which the weight FLOPs are no less than the state FLOPs, or None."""
        return self.accounting.balanced_context()

    @property
    def verdict(self) -> str:
        """What the ratio at the last context means, in one sentence."""
        return verdict_text(self.accounting, self.rows[-1])

    def figure(self) -> Figure:
        """Return the ratio over the context, above weight and state FLOPs; with `by`, shares as bars."""
        from powerplan.plots.wsfr import wsfr_figure

        return wsfr_figure(self.accounting, self.rows, self.by)

    def _report(self) -> Report:
        return wsfr_report(self.accounting, self.rows, self.dtypes, self.by, self.explain)


def wsfr(
    model: Model,
    context: Contexts = "1k,8k,64k,1M",
    *,
    mixer: str | None = None,
    by: By | None = None,
    explain: bool = False,
    convention: Convention | None = None,
    dtype: str = "bf16",
    weights_dtype: str | None = None,
    cache_dtype: str | None = None,
    state_dtype: str | None = None,
) -> WsfrAnswer:
    """Return the weight-state FLOP ratio of a model at each context, as `powerplan wsfr` prints it.

    Args:
        model: a catalogue name, a path to a YAML or a config.json, or a spec.
        context: tokens, as 65536, "64k" or "1k,64k", or a list of them.
        mixer: the mixer to put into every layer, such as "power:p=2"; the model's own where None.
        by: whether the report splits every context by "component" or by "layer".
        explain: whether the report prints every formula with the numbers put in.
        convention: how FLOPs are counted; Convention() where None.
        dtype: the number format of weights and key/value cache: fp32, bf16, fp16, fp8 or int4. Weights that the file of
            a model quantizes have their own.
        weights_dtype, cache_dtype, state_dtype: that of all weights, of the cache, of recurrent state (fp32) apart.

    Returns:
        The answer: FLOPs per token, state per sequence and bytes per decoded token in `rows`.

    Raises:
        InputError: an argument cannot be used; the message begins with the argument's name.

    Examples:
        >>> answer = wsfr("gpt2-small", "64k")
        >>> answer.verdict
        'state-heavy: 4.9x more state than weight FLOPs at 65,536 tokens; balanced at 13,403'
        >>> answer.balanced_context
        13403
    """
    contexts = read_contexts(context)
    check_choice(by, get_args(By), "by")
    dtypes = Dtypes(dtype, weights_dtype, cache_dtype, state_dtype)
    loaded = read_model(model, mixer)
    accounting = Accounting(loaded.spec, convention)
    return WsfrAnswer(
        accounting=accounting,
        rows=tuple(accounting.row(tokens, dtypes) for tokens in contexts),
        dtypes=dtypes,
        by=by,
        explain=explain,
        notes=loaded.notes,
    )
