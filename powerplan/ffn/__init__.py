"""Feed-forward networks, which have weights and no state: one class for each kind."""

from __future__ import annotations

from powerplan.ffn.base import FFN, Picks, multiplied_terms
from powerplan.ffn.memory import Memory
from powerplan.ffn.mlp import MLP
from powerplan.ffn.moe import MoE
from powerplan.ffn.stem import Stem

AnyFFN = MLP | MoE | Stem | Memory
FFNS: dict[str, type[FFN]] = {"mlp": MLP, "moe": MoE, "stem": Stem, "memory": Memory}
"""Every FFN class by its `kind`."""

__all__ = ["FFN", "FFNS", "MLP", "AnyFFN", "Memory", "MoE", "Picks", "Stem", "multiplied_terms"]
