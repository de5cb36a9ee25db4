"""What `powerplan train` says of documents of many lengths: what masks save, and what waiting for long ones costs."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from powerplan.report.documents import MASKED, document_entry, lengths_text, show_share
from powerplan.report.render import Report
from powerplan.report.tables import Column
from powerplan.report.width import wrapped
from powerplan.run.degrees import Degrees
from powerplan.run.documents import DocumentPlan
from powerplan.run.plan import PhasePlan, TrainingPlan
from powerplan.units import format_duration

WAITING = (
    "waiting: time of a step in which devices wait for those with longer documents, simulated in one fixed order. "
    "Each row has the layout that is best for it. as they come: devices take sequences in any order, and cp devices "
    "divide a sequence as if it were one document; the plan counts this. sorted by work: sequences at work at once are "
    "alike (ByteScale, arXiv 2502.21231), and cp devices divide each document (WLB-LLM, arXiv 2503.17924). evenly: as "
    "if no device waited."
)

SPLITS = {
    "unmasked": "unmasked",
    "come": "masked, as they come",
    "sorted": "masked, sorted by work",
    "even": "masked, evenly",
}
"""How sequences of documents are split over devices, as the table names it."""


def run_documents_entry(phase: PhasePlan, plan: TrainingPlan) -> dict[str, Any]:
    """Return what JSON says of the documents of a phase; nothing where there are none."""
    if phase.documents is None:
        return {}
    waiting = phase.documents.waiting
    return {
        "documents": {
            **document_entry(phase.documents.row),
            "waiting": {
                "as_they_come": waiting.come,
                "as_they_come_data": waiting.data,
                "as_they_come_context": waiting.context,
                "sorted_by_work": waiting.sorted,
                "longest_micro_batch": waiting.come_longest,
                "simulated_steps": waiting.steps,
                "simulated_documents": waiting.documents,
            },
            "splits": _split_rows(phase, phase.documents, plan),
        }
    }


def _split_rows(phase: PhasePlan, documents: DocumentPlan, plan: TrainingPlan) -> list[dict[str, Any]]:
    """Return the time of each way to split documents over the devices, in its own best layout."""
    splits = {
        "unmasked": documents.unmasked,
        "come": documents.come,
        "sorted": documents.ordered,
        "even": documents.even,
    }
    rows = []
    for name, split in splits.items():
        seconds = phase.phase.tokens / split.layout.tokens_per_s
        row = {
            "split": name,
            "parallel": asdict(split.layout.degrees),
            "waiting_s": split.waiting_s,
            "step_s": split.layout.step_s,
            "seconds": seconds,
            "gpu_hours": seconds / 3600 * plan.setting.cluster.devices,
        }
        rows.append(row)
    return rows


def documents_sections(phase: PhasePlan, plan: TrainingPlan) -> list[Report]:
    """Return the section on the documents of a phase; none where there are none. The first explains its words."""
    documents = phase.documents
    if documents is None:
        return []
    row = documents.row
    padded, packed, _ = row.packings
    as_long = (
        "" if row.equal_context is None else f", as if each sequence had one document of {row.equal_context:,} tokens"
    )
    first = phase is plan.phases[0]
    lines = [
        *(lengths_text(row.lengths) if first else ()),
        *wrapped(f"{f'{MASKED}. ' if first else ''}Masks save {show_share(float(row.saved))} of all FLOPs{as_long}."),
        *wrapped(
            f"Documents are packed whole: {show_share(float(packed.padding))} padding, "
            f"{show_share(float(packed.cut / row.lengths.documents))} of them cut; one in each sequence would be "
            f"{show_share(float(padded.padding))} padding."
        ),
    ]
    columns = [
        Column("split", "documents", lambda name: SPLITS[name], left=True),
        Column("waiting_s", "waiting", lambda seconds: format_duration(seconds) if seconds > 1e-9 else "-"),
        Column("step_s", "step", format_duration),
        Column("gpu_hours", "device\nhours", lambda value: f"{value:,.0f}"),
        Column("layout", "layout", left=True),
    ]
    rows = [row | {"layout": Degrees(**row["parallel"]).describe()} for row in _split_rows(phase, documents, plan)]
    if not phase.layout.fits:
        columns = [column for column in columns if column.key != "gpu_hours"]
    return [Report("", {}, columns, rows, before=lines, legend=wrapped(WAITING) if first else ())]
