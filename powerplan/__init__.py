"""Plan compute-optimal long-context models: weight-state FLOP ratios, budgets, power attention.

wsfr, compare, budget, decode, train and recommend answer as the commands of the same names do, solve as `recommend
--solve`, degrees as `dims --model` and page as `report`; flops_per_step is for training loops (docs/api.md).
"""

from __future__ import annotations

import os
from importlib import import_module

TYPE_CHECKING = False  # typing itself imports re and more, 10 ms in which Ctrl-C would give a traceback.
if TYPE_CHECKING:
    from typing import Any

    from powerplan.accounting import Accounting, Parameters, Row
    from powerplan.answers.budget import budget
    from powerplan.answers.compare import compare
    from powerplan.answers.decode import decode
    from powerplan.answers.degrees import degrees
    from powerplan.answers.flops import flops_per_step
    from powerplan.answers.recommend import recommend
    from powerplan.answers.solve import solve
    from powerplan.answers.train import train
    from powerplan.answers.wsfr import wsfr
    from powerplan.dims import spow_dim, tiled_spow_dim, tpow_dim
    from powerplan.errors import InfeasibleError, InputError, MachineError, PowerplanError
    from powerplan.load import LoadedModel, load_model
    from powerplan.mixers.formulas import Convention
    from powerplan.spec import ModelSpec
    from powerplan.version import __version__
    from powerplan.webpage.page import page

if not os.path.isdir(os.path.join(os.path.dirname(__file__), "kernels")):  # noqa: PTH112, PTH118, PTH120
    # Imported from a checkout: kernels/ and models/ are beside this folder there, and inside it once installed.
    __path__.append(os.path.dirname(os.path.dirname(__file__)))  # noqa: PTH120

__all__ = [
    "Accounting",
    "Convention",
    "InfeasibleError",
    "InputError",
    "LoadedModel",
    "MachineError",
    "ModelSpec",
    "Parameters",
    "PowerplanError",
    "Row",
    "__version__",
    "budget",
    "compare",
    "decode",
    "degrees",
    "flops_per_step",
    "load_model",
    "page",
    "recommend",
    "solve",
    "spow_dim",
    "tiled_spow_dim",
    "tpow_dim",
    "train",
    "wsfr",
]

_MODULES = {
    "accounting": ("Accounting", "Parameters", "Row"),
    "answers.budget": ("budget",),
    "answers.compare": ("compare",),
    "answers.decode": ("decode",),
    "answers.degrees": ("degrees",),
    "answers.flops": ("flops_per_step",),
    "answers.recommend": ("recommend",),
    "answers.solve": ("solve",),
    "answers.train": ("train",),
    "answers.wsfr": ("wsfr",),
    "dims": ("spow_dim", "tiled_spow_dim", "tpow_dim"),
    "errors": ("InfeasibleError", "InputError", "MachineError", "PowerplanError"),
    "load": ("LoadedModel", "load_model"),
    "mixers.formulas": ("Convention",),
    "spec": ("ModelSpec",),
    "version": ("__version__",),
    "webpage.page": ("page",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}
"""The module of each name. It is imported when the name is first used: the command line must see Ctrl-C before."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"powerplan.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
