"""Models with a few mixers, and what serving them takes under a policy of caches."""

from __future__ import annotations

from typing import Any

from powerplan.accounting import Accounting
from powerplan.caches.policy import Policy
from powerplan.dtypes import Dtypes
from powerplan.mixers import Mixer
from powerplan.serving import Serving
from powerplan.spec import LayerGroup, ModelSpec


def model(*layers: tuple[Mixer, int]) -> ModelSpec:
    """Return a model with so many layers of each mixer, and no FFN."""
    return ModelSpec(
        name="small",
        vocab_size=1000,
        hidden_size=256,
        layers=tuple(LayerGroup(repeat=count, mixer=mixer) for mixer, count in layers),  # type: ignore[arg-type]
    )


def served(spec: ModelSpec, context: int, dtypes: Dtypes | str = "bf16", **policy: Any) -> Serving:
    """Return a model served at one context, with the fields of a Policy as keywords."""
    return Serving(Accounting(spec), context, dtypes, policy=Policy(**policy))
