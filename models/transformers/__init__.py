"""Power attention in models of the transformers package: attention function, cache, and the calls that switch it on.

Every module here imports transformers. `powerplan.models` exports the same names and imports this package at first use,
so that powerplan itself works without transformers. docs/transformers.md shows how the pieces are used.
"""

from __future__ import annotations

from powerplan.models.transformers.attention import register_power_attention
from powerplan.models.transformers.cache import PowerCache
from powerplan.models.transformers.model import power_class, use_power_attention

__all__ = ["PowerCache", "power_class", "register_power_attention", "use_power_attention"]
