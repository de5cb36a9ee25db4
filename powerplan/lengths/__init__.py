"""Documents of many lengths: their histogram, how they fill sequences of a context, and the FLOPs that they take."""

from __future__ import annotations

from powerplan.lengths.histogram import Lengths
from powerplan.lengths.reading import LengthsInput, counted, read_file, read_lengths

__all__ = ["Lengths", "LengthsInput", "counted", "read_file", "read_lengths"]
