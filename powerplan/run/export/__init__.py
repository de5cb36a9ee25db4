"""A plan as another trainer reads it: the configuration file of torchtitan, the arguments of Megatron-Core.

What a trainer has no setting for is never dropped: a comment of the export says so, one line for each kind.
"""

from __future__ import annotations

from collections.abc import Callable

from powerplan.run.export.job import Job
from powerplan.run.export.megatron import megatron_arguments
from powerplan.run.export.torchtitan import torchtitan_toml

EXPORTS: dict[str, Callable[[Job], str]] = {"torchtitan": torchtitan_toml, "megatron": megatron_arguments}
"""The trainers that a plan can be exported to, and the functions that write the text of the file."""

__all__ = ["EXPORTS", "Job", "megatron_arguments", "torchtitan_toml"]
