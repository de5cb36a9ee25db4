"""Token shifts: each token sees a share of the one before it, as in RWKV.

Shapes: B batch, T tokens, m hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from powerplan.models.cache import Slot


def shifted(x: Tensor, last_input: Tensor | None) -> Tensor:
    """Return the token before each token of x [B, T, m].

    last_input: the token [B, 1, m] before x; None stands for zeros.
    """
    first = torch.zeros_like(x[:, :1]) if last_input is None else last_input
    return torch.cat((first, x[:, :-1]), 1)


class ShiftedFFN(nn.Module):
    """An FFN whose input is mixed with the token before it, as RWKV-7's channel mix does. [B, T, m] -> [B, T, m].

    Args:
        ffn: Module [B, T, m] -> [B, T, m].
        hidden_size: m.
        **factory_kwargs: device and dtype of the shares.
    """

    def __init__(self, ffn: nn.Module, hidden_size: int, **factory_kwargs: Any) -> None:
        super().__init__()
        self.ffn = ffn
        self.shift = nn.Parameter(torch.empty(hidden_size, **factory_kwargs))
        self.init_weights(1.0)

    def forward(self, x: Tensor, slot: Slot | None = None) -> Tensor:
        """With a slot, the tokens of x follow those in it, and the last one stays in `slot.ffn`."""
        before = shifted(x, None if slot is None else slot.ffn)
        if slot is not None:
            slot.ffn = x[:, -1:].clone()
        out: Tensor = self.ffn(x + (before - x) * self.shift)
        return out

    @torch.no_grad()
    def init_weights(self, _std: float) -> None:
        """Draw the shares uniform in [0, 1]."""
        self.shift.uniform_(0, 1)
