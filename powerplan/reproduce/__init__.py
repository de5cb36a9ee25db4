"""Figures that papers publish, beside what powerplan computes for them under each named convention."""

from __future__ import annotations

from powerplan.reproduce.compare import ALL, Comparison, SetResult, reproduce
from powerplan.reproduce.figures import Figure, FigureSet, figure_sets

__all__ = ["ALL", "Comparison", "Figure", "FigureSet", "SetResult", "figure_sets", "reproduce"]
