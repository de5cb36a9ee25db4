"""Plan compute-optimal long-context models: weight-state FLOP ratios, budgets, power attention."""

from __future__ import annotations

from pathlib import Path

from powerplan.accounting import Accounting, Parameters, Row
from powerplan.dims import spow_dim, tiled_spow_dim, tpow_dim
from powerplan.errors import InputError, PowerplanError
from powerplan.load import LoadedModel, load_model
from powerplan.mixers.base import Convention
from powerplan.spec import ModelSpec
from powerplan.version import __version__

if not (Path(__file__).parent / "kernels").is_dir():
    # Imported from a checkout: kernels/ and models/ are beside this folder there, and inside it once installed.
    __path__.append(str(Path(__file__).parent.parent))

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
