"""What to train at a context: candidates for the layers of a model, searched and ranked. Pure functions."""

from __future__ import annotations

from powerplan.search.equal_state import EqualState, Held, equal_state
from powerplan.search.limits import Limits
from powerplan.search.recommendation import recommend
from powerplan.search.request import SELECTABLE, Request
from powerplan.search.result import Candidate, Chunk, OffTarget, Recommendation
from powerplan.search.solve import Solution, solve

__all__ = [
    "SELECTABLE",
    "Candidate",
    "Chunk",
    "EqualState",
    "Held",
    "Limits",
    "OffTarget",
    "Recommendation",
    "Request",
    "Solution",
    "equal_state",
    "recommend",
    "solve",
]
