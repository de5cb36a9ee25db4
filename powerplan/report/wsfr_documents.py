"""The report of `powerplan wsfr --lengths`: ratios with and without masks between documents, and what these fill."""

from __future__ import annotations

from collections.abc import Sequence

from powerplan.accounting import Accounting, Row
from powerplan.dtypes import Dtypes
from powerplan.lengths.flops import DocumentRow
from powerplan.report.documents import (
    MASK_COLUMNS,
    MASKS,
    PACKING,
    PACKING_COLUMNS,
    document_entry,
    lengths_entry,
    lengths_text,
    mask_cells,
    packing_rows,
    show_share,
)
from powerplan.report.render import Report
from powerplan.report.width import wrapped
from powerplan.report.wsfr import NO_STATE, convention_lines, sides_text, wsfr_report


def lengths_report(
    accounting: Accounting, rows: Sequence[Row], dtypes: Dtypes, documents: Sequence[DocumentRow]
) -> Report:
    """Return the report of a model's ratios over documents of many lengths; documents: the numbers at each context."""
    whole = wsfr_report(accounting, rows, dtypes, None, explain=False)
    lengths = documents[0].lengths
    verdict = _masked_verdict(documents)
    entries = [
        entry | {"documents": document_entry(own)} for entry, own in zip(whole.payload["rows"], documents, strict=True)
    ]
    payload = whole.payload | {"rows": entries, "lengths": lengths_entry(lengths), "documents_verdict": verdict}
    table = [entry | mask_cells(own) for entry, own in zip(whole.payload["rows"], documents, strict=True)]
    convention = convention_lines(accounting, max(row.context for row in rows))
    masks = Report(
        whole.schema,
        {},
        MASK_COLUMNS,
        table,
        title=whole.title,
        before=lengths_text(lengths),
        legend=[*convention, *wrapped(MASKS)],
    )
    packing = Report(whole.schema, {}, PACKING_COLUMNS, packing_rows(documents), legend=wrapped(PACKING))
    last = Report(whole.schema, {}, [], [], title=wrapped(verdict))
    return Report(whole.schema, payload, MASK_COLUMNS, table, sections=[masks, packing, last])


def _masked_verdict(documents: Sequence[DocumentRow]) -> str:
    """Return one sentence on all contexts, and what masks save at the last one."""
    last = documents[-1]
    ratios = sorted((row.context, row.wsfr) for row in documents if row.wsfr is not None)
    if len(ratios) < len(documents):
        return NO_STATE
    saved = f"masks save {show_share(float(last.saved))} of all FLOPs at {last.context:,} tokens"
    return f"with document masks: {sides_text(ratios)}; {saved}"
