"""What stands around a mixer: norms, MLP, and the residual layer.

Shapes: B batch, T tokens, m hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from powerplan.errors import InputError
from powerplan.ffn import MLP
from powerplan.models.cache import Slot
from powerplan.models.shift import ShiftedFFN
from powerplan.spec import Norm

if TYPE_CHECKING:
    from powerplan.kernels import ContextParallel


def build_norm(norm: Norm, hidden_size: int, **factory_kwargs: Any) -> nn.Module:
    """Return one norm over the hidden size; factory_kwargs are device and dtype."""
    if norm.kind == "none":
        return nn.Identity()
    if norm.kind == "rmsnorm":
        return nn.RMSNorm(hidden_size, eps=1e-6, **factory_kwargs)
    return nn.LayerNorm(hidden_size, bias=norm.bias, **factory_kwargs)


class DenseMLP(nn.Module):
    """SwiGLU (gated: up, gate and down) or a plain GELU MLP (up and down). [B, T, m] -> [B, T, m]."""

    def __init__(self, ffn: MLP, hidden_size: int, **factory_kwargs: Any) -> None:
        super().__init__()
        width = ffn.intermediate_size
        self.up = nn.Linear(hidden_size, width, bias=ffn.bias, **factory_kwargs)
        self.gate = nn.Linear(hidden_size, width, bias=ffn.bias, **factory_kwargs) if ffn.gated else None
        self.down = nn.Linear(width, hidden_size, bias=ffn.bias, **factory_kwargs)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        out: Tensor = self.down(inner)
        return out


class ResidualLayer(nn.Module):
    """A mixer, an FFN, or both in a row, on a residual stream [B, T, m], with the number of norms that the spec has.

    With as many norms as parts, each part has one before it. With twice as many, each has one before and one after it.
    With one norm for two parts, both parts read its output and run in parallel.

    Args:
        mixer: Module [B, T, m] -> [B, T, m] with a `slot`, or None.
        ffn: Module [B, T, m] -> [B, T, m], or None.
        norm: The norms of the spec.
        hidden_size: m.
        **factory_kwargs: device and dtype of the norms.

    Raises:
        InputError: Another number of norms.
    """

    def __init__(
        self, mixer: nn.Module | None, ffn: nn.Module | None, norm: Norm, hidden_size: int, **factory_kwargs: Any
    ) -> None:
        super().__init__()
        self.mixer, self.ffn = mixer, ffn
        parts = sum(part is not None for part in (mixer, ffn))
        allowed = {0, parts, 2 * parts} | ({1} if parts == 2 else set())
        if norm.per_layer not in allowed:
            numbers = ", ".join(map(str, sorted(allowed)))
            raise InputError(f"norm.per_layer: {norm.per_layer} norms in a layer are not built; allowed are {numbers}")
        self.is_parallel = parts == 2 and norm.per_layer == 1
        before = 1 if self.is_parallel else min(norm.per_layer, parts)
        self.before = nn.ModuleList(build_norm(norm, hidden_size, **factory_kwargs) for _ in range(before))
        self.after = nn.ModuleList(
            build_norm(norm, hidden_size, **factory_kwargs) for _ in range(norm.per_layer - before)
        )

    def forward(self, x: Tensor, slot: Slot | None = None, cp: ContextParallel | None = None) -> Tensor:
        """Return the stream [B, T, m] after this layer.

        With a slot, the tokens of x follow those in it, and the mixer adds them to it. With a plan they are this rank's
        tokens of sequences that lie on several ranks.
        """
        mixer = None if self.mixer is None else partial(self.mixer, slot=slot, **({} if cp is None else {"cp": cp}))
        return self._add(x, mixer, slot, cp)

    def _add(
        self, x: Tensor, mixer: Callable[[Tensor], Tensor] | None, slot: Slot | None, cp: ContextParallel | None
    ) -> Tensor:
        """Return the stream after `mixer`, which stands for the layer's own, and the FFN."""
        ffn = partial(self.ffn, slot=slot, cp=cp) if isinstance(self.ffn, ShiftedFFN) else self.ffn
        parts = [part for part in (mixer, ffn) if part is not None]
        if self.is_parallel:
            normed = self.before[0](x)
            for part in parts:
                x = x + part(normed)
            return x
        for index, part in enumerate(parts):
            out = part(self.before[index](x) if self.before else x)
            x = x + (self.after[index](out) if self.after else out)
        return x


class ValueResidualLayer(ResidualLayer):
    """A layer of a model that hands the values of its first layer to the others, as RWKV-7 does."""

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        slot: Slot | None = None,
        cp: ContextParallel | None = None,
        first_values: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the stream [B, T, m] after this layer, and the first values [B, T, H V] for the layers after it.

        first_values: those that the layer before returned; None where there are none.
        """
        values: list[Tensor] = []

        def mixer(normed: Tensor) -> Tensor:
            assert self.mixer is not None
            out, found = self.mixer(normed, slot, cp, first_values=first_values, return_values=True)
            values.append(found)
            return out  # type: ignore[no-any-return]

        return self._add(x, mixer, slot, cp), values[0]
