"""Plan compute-optimal long-context models: weight-state FLOP ratios, budgets, power attention.

wsfr, compare, budget, decode and recommend answer as the commands of the same names do (docs/api.md).
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from powerplan.accounting import Accounting, Parameters, Row
from powerplan.dims import spow_dim, tiled_spow_dim, tpow_dim
from powerplan.errors import InputError, PowerplanError
from powerplan.load import LoadedModel, load_model
from powerplan.mixers.formulas import Convention
from powerplan.spec import ModelSpec
from powerplan.version import __version__

if TYPE_CHECKING:
    from powerplan.answers.budget import budget
    from powerplan.answers.compare import compare
    from powerplan.answers.decode import decode
    from powerplan.answers.recommend import recommend
    from powerplan.answers.wsfr import wsfr

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
    "budget",
    "compare",
    "decode",
    "load_model",
    "recommend",
    "spow_dim",
    "tiled_spow_dim",
    "tpow_dim",
    "wsfr",
]

_ANSWERS = ("budget", "compare", "decode", "recommend", "wsfr")
"""Functions that are imported when they are first used, as their reports take time to import."""


def __getattr__(name: str) -> Any:
    if name not in _ANSWERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"powerplan.answers.{name}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
