"""The shares of a device's dense peak that training work reaches, where nothing is measured."""

from __future__ import annotations

from powerplan.run.step import Efficiency

DEFAULT = Efficiency(weights=0.55, attention=0.5, recurrent=0.35)
