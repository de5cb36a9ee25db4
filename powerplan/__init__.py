"""Plan compute-optimal long-context models: weight-state FLOP ratios, budgets, power attention."""

from __future__ import annotations

from powerplan.accounting import Accounting, Parameters, Row
from powerplan.dims import spow_dim, tiled_spow_dim, tpow_dim
from powerplan.errors import InputError, PowerplanError
from powerplan.load import LoadedModel, load_model
from powerplan.mixers.base import Convention
from powerplan.spec import ModelSpec
from powerplan.version import __version__

__all__ = [
    "Accounting",
    "Convention",
    "InputError",
    "LoadedModel",
    "ModelSpec",
    "Parameters",
    "PowerplanError",
    "Row",
    "__version__",
    "load_model",
    "spow_dim",
    "tiled_spow_dim",
    "tpow_dim",
]
