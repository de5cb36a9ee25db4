"""The weight-state FLOP ratio of a model: which side is too heavy at a context, and where the two balance."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, get_args

from powerplan.accounting import Accounting, Row
from powerplan.answers.base import Contexts, DrawnAnswer, Model, check_choice, read_contexts, read_model
from powerplan.choices import By
from powerplan.dtypes import Dtypes
from powerplan.errors import InputError, parameter
from powerplan.mixers.formulas import Convention
from powerplan.report.render import Report
from powerplan.report.wsfr import verdict_text, wsfr_report
from powerplan.spec import ModelSpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from powerplan.lengths import Lengths, LengthsInput
    from powerplan.lengths.flops import DocumentRow


@dataclass(frozen=True, kw_only=True, repr=False)
class WsfrAnswer(DrawnAnswer):
    """The weight-state FLOP ratios of one model.

    accounting: the model's counts and the convention that they follow. rows: the numbers at each context, in the order
    of the contexts. dtypes: the number formats of weights, key/value cache and recurrent state.
    lengths: the documents, where there are documents of many lengths.
    """

    accounting: Accounting
    rows: tuple[Row, ...]
    dtypes: Dtypes
    by: By | None = None
    explain: bool = False
    lengths: Lengths | None = None

    @cached_property
    def documents(self) -> tuple[DocumentRow, ...]:
        """The numbers with masks between documents at each context; empty without `lengths`."""
        if self.lengths is None:
            return ()
        from powerplan.lengths.flops import DocumentRow  # Most questions are of whole sequences.

        return tuple(DocumentRow(self.accounting, self.lengths, row.context) for row in self.rows)

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

        if self.lengths is not None:
            raise InputError("are not drawn: a figure shows whole sequences", parameter("lengths"))
        return wsfr_figure(self.accounting, self.rows, self.by)

    def _report(self) -> Report:
        if self.documents:
            from powerplan.report.wsfr_documents import lengths_report  # As above.

            return lengths_report(self.accounting, self.rows, self.dtypes, self.documents)
        return wsfr_report(self.accounting, self.rows, self.dtypes, self.by, self.explain)


def wsfr(
    model: Model,
    context: Contexts = "1k,8k,64k,1M",
    *,
    lengths: LengthsInput | None = None,
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
        model: a catalogue name, a path to a YAML or a config.json, a spec, or a config (as load_model takes it).
        context: tokens, as 65536, "64k" or "1k,64k", or a list of them.
        lengths: documents of many lengths, packed into sequences of `context` tokens: a file, as a path, with one
            length a line; "lognormal:mean=4k,p99=64k"; shares, as "4k:0.9,64k:0.1"; numbers of documents by length, as
            a dict; or the tokens of every document.
        mixer: the mixer to put into every layer, such as "power:p=2"; the model's own where None.
        by: whether the report splits every context by "component" or by "layer".
        explain: whether the report prints every formula with the numbers put in.
        convention: how FLOPs are counted; Convention() where None.
        dtype: the number format of weights and key/value cache: fp32, bf16, fp16, fp8 or int4. Weights that the file of
            a model quantizes have their own.
        weights_dtype, cache_dtype, state_dtype: that of all weights, of the cache, of recurrent state (fp32) apart.

    Returns:
        The answer: FLOPs per token, state per sequence and bytes per decoded token in `rows`; with `lengths` also
        what documents take that attend to themselves alone, in `documents`.

    Raises:
        InputError: an argument cannot be used; the message begins with the argument's name.

    Examples:
        >>> answer = wsfr("gpt2-small", "64k")
        >>> answer.verdict
        'state-heavy: 4.9x as many state as weight FLOPs at 65,536 tokens; balanced at 13,403'
        >>> answer.balanced_context
        13403
        >>> wsfr("gpt2-small", "64k", lengths="1k:0.9,64k:0.1").documents[0].equal_context
        57582
    """
    contexts = read_contexts(context)
    check_choice(by, get_args(By), "by")
    for name, given in (("by", by is not None), ("explain", explain)):
        if lengths is not None and given:
            raise InputError(
                f"is of whole sequences, and not of documents; leave {parameter('lengths')} out", parameter(name)
            )
    documents = None
    if lengths is not None:
        from powerplan.lengths import read_lengths  # As above.

        documents = read_lengths(lengths)
    dtypes = Dtypes(dtype, weights_dtype, cache_dtype, state_dtype)
    loaded = read_model(model, mixer)
    accounting = Accounting(loaded.spec, convention)
    return WsfrAnswer(
        accounting=accounting,
        rows=tuple(accounting.row(tokens, dtypes) for tokens in contexts),
        dtypes=dtypes,
        by=by,
        explain=explain,
        lengths=documents,
        notes=loaded.notes,
    )
