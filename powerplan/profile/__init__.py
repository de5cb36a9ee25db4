"""`powerplan profile`: builds one layer of a model, checks it, and times it on this machine.

Options become a Workload (what is timed), and that a Profile (what was measured): Session runs the stages, a Scheduler
divides the time, a Runner times one point, a Record keeps the results. This is the only package in powerplan/ that uses
torch, powerplan.models and powerplan.kernels. It does so within functions: importing it loads none of them.
"""

from __future__ import annotations

from powerplan.profile.options import workload_of
from powerplan.profile.result import Profile, load_profile, to_json
from powerplan.profile.session import Session
from powerplan.profile.workload import Workload

__all__ = ["Profile", "Session", "Workload", "load_profile", "to_json", "workload_of"]
