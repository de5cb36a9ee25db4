"""`powerplan doctor` and `powerplan schema`."""

from __future__ import annotations

import json

from powerplan.cli import say
from powerplan.cli.options import FormatOption


def doctor(output: FormatOption = "table") -> None:
    """What this machine has: Python, processor, memory, torch, Triton and accelerators."""
    from powerplan.doctor import examine
    from powerplan.report.doctor import doctor_report

    say.show(doctor_report(examine()), output)


def schema() -> None:
    """The JSON schema of a powerplan YAML, for editors and validators."""
    from powerplan.schema import spec_schema

    say.text(json.dumps(spec_schema(), indent=2))
