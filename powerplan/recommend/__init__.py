"""What to train at a context: candidates for the layers of a model, searched, ranked and explained. Pure functions."""

from __future__ import annotations

from powerplan.recommend.answer import WORDS, Answer, Candidate, Chunk, Request, recommend
from powerplan.recommend.limits import Limits
from powerplan.recommend.solve import Solution, solve

__all__ = ["WORDS", "Answer", "Candidate", "Chunk", "Limits", "Request", "Solution", "recommend", "solve"]
