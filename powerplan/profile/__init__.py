"""`powerplan profile`: builds one layer of a model, checks it, and times it on this machine.

Options become a Workload (what is timed), and that a Profile (what was measured): Session runs the stages, a Scheduler
divides the time, a Runner times one point, a Record keeps the results. This is the only package in powerplan/ that uses
torch, powerplan.models and powerplan.kernels: Session is imported when it is first used, and torch with it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from powerplan.errors import MachineError
from powerplan.profile.options import workload_of
from powerplan.profile.result import Profile, load_profile, to_json
from powerplan.profile.workload import Workload

if TYPE_CHECKING:
    from powerplan.profile.session import Session

__all__ = ["Profile", "Session", "Workload", "load_profile", "to_json", "workload_of"]


def __getattr__(name: str) -> Any:
    """Import Session when it is first used. Raises MachineError where torch is not installed or does not load."""
    if name != "Session":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        import torch  # noqa: F401
    except ImportError as error:
        absent = "needs torch, and it is not installed: pip install torch"
        reason = absent if error.name == "torch" else f"torch does not load: {error}"
        raise MachineError(f"profile: {reason}") from None
    from powerplan.profile.session import Session

    return Session
