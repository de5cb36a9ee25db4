"""`powerplan profile`: builds the layer that a plan is about and times it on this machine.

The one package of powerplan/ that uses torch, powerplan.models and powerplan.kernels, all within functions: importing
it loads none of them.
"""

from __future__ import annotations

from powerplan.profile.plan import Plan, plan_of
from powerplan.profile.result import Profile, read_whole, to_json
from powerplan.profile.session import Session

__all__ = ["Plan", "Profile", "Session", "plan_of", "read_whole", "to_json"]
