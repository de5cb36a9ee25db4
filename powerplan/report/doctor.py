"""The report of `powerplan doctor`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from powerplan.doctor import Finding
from powerplan.report.render import Column, Report


def doctor_report(findings: Sequence[Finding]) -> Report:
    """Return the examination of this machine."""
    rows: list[dict[str, Any]] = [asdict(finding) for finding in findings]
    columns = [
        Column("what", "", left=True),
        Column("found", "found", left=True),
        Column("ok", "", lambda value: {None: "", True: "ok", False: "missing"}[value], left=True),
        Column("remedy", "remedy", left=True),
    ]
    return Report("powerplan.doctor/1", {"findings": rows}, columns, rows)
