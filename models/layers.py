"""What stands around a mixer: norms, MLP, and the residual layer."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from powerplan.errors import InputError
from powerplan.ffn import MLP
from powerplan.models.cache import Slot
from powerplan.spec import Norm


def build_norm(norm: Norm, hidden: int, **settings: Any) -> nn.Module:
    """Return one norm over the hidden size; settings are device and dtype."""
    if norm.kind == "none":
        return nn.Identity()
    if norm.kind == "rmsnorm":
        return nn.RMSNorm(hidden, eps=1e-6, **settings)
    return nn.LayerNorm(hidden, bias=norm.bias, **settings)


class DenseMLP(nn.Module):
    """SwiGLU (gated: up, gate and down) or a plain GELU MLP (up and down). [B, T, m] -> [B, T, m]."""

    def __init__(self, ffn: MLP, hidden: int, **settings: Any) -> None:
        super().__init__()
        width = ffn.intermediate_size
        self.up = nn.Linear(hidden, width, bias=ffn.bias, **settings)
        self.gate = nn.Linear(hidden, width, bias=ffn.bias, **settings) if ffn.gated else None
        self.down = nn.Linear(width, hidden, bias=ffn.bias, **settings)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        out: Tensor = self.down(inner)
        return out


class ResidualLayer(nn.Module):
    """Parts (a mixer, an FFN, or both) on a residual stream [B, T, m], each with the norms that the spec counts.

    As many norms as parts stand before them; twice as many, before and after; one for two parts feeds both at once.
    Raises InputError for another number.
    """

    def __init__(
        self, mixer: nn.Module | None, ffn: nn.Module | None, norm: Norm, hidden: int, **settings: Any
    ) -> None:
        super().__init__()
        self.mixer, self.ffn = mixer, ffn
        parts = sum(part is not None for part in (mixer, ffn))
        allowed = {0, parts, 2 * parts} | ({1} if parts == 2 else set())
        if norm.per_layer not in allowed:
            numbers = ", ".join(map(str, sorted(allowed)))
            raise InputError(f"norm.per_layer: {norm.per_layer} norms in a layer are not built; allowed are {numbers}")
        self.parallel = parts == 2 and norm.per_layer == 1
        before = 1 if self.parallel else min(norm.per_layer, parts)
        self.before = nn.ModuleList(build_norm(norm, hidden, **settings) for _ in range(before))
        self.after = nn.ModuleList(build_norm(norm, hidden, **settings) for _ in range(norm.per_layer - before))

    def forward(self, x: Tensor, slot: Slot | None = None) -> Tensor:
        """Return the stream after this layer; with a slot, its mixer goes on from what the slot remembers."""
        mixer = None if self.mixer is None else partial(self.mixer, slot=slot)
        parts = [part for part in (mixer, self.ffn) if part is not None]
        if self.parallel:
            read = self.before[0](x)
            for part in parts:
                x = x + part(read)
            return x
        for index, part in enumerate(parts):
            change = part(self.before[index](x) if self.before else x)
            x = x + (self.after[index](change) if self.after else change)
        return x
