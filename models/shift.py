"""Token shifts: each token sees a share of the one before it, as in RWKV.

Shapes: B batch, T tokens, m hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from powerplan.kernels.distributed.gather import gather_tokens
from powerplan.kernels.distributed.halo import tokens_before
from powerplan.models.cache import Slot

if TYPE_CHECKING:
    from powerplan.kernels import ContextParallel


def shifted(x: Tensor, last_input: Tensor | None) -> Tensor:
    """Return the token before each token of x [B, T, m].

    last_input: the token [B, 1, m] before x; None stands for zeros.
    """
    first = torch.zeros_like(x[:, :1]) if last_input is None else last_input
    return torch.cat((first, x[:, :-1]), 1)


def shifted_over_ranks(x: Tensor, cp: ContextParallel, *, return_state: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return x again, by which the backward pass of every rank finds the exchange, and the token before each token.

    The third is the last token [B, 1, m] of all ranks if `return_state`, the same on every rank, else None.

    x: [B, t, m], this rank's tokens of sequences that lie on several ranks.
    """
    halo, (x,), (past,) = tokens_before(cp, 1, x)
    before = []
    for fragment, earlier in zip(cp.fragments, torch.split(past, halo.lengths, 1), strict=True):
        for piece in fragment.pieces:
            before.append(shifted(x[:, fragment.local(piece)], None if piece.begins else earlier))
    last = gather_tokens(cp, x, cp.layout.tokens - 1) if return_state else None
    return x, torch.cat(before, 1) if before else x, last


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

    def forward(self, x: Tensor, slot: Slot | None = None, cp: ContextParallel | None = None) -> Tensor:
        """With a slot, the tokens of x follow those in it, and the last one stays in `slot.ffn`.

        With a plan they are this rank's tokens of sequences that lie on several ranks, and the last one is that of all.
        """
        if cp is not None:
            x, before, last = shifted_over_ranks(x, cp, return_state=slot is not None)
        else:
            before, last = shifted(x, None if slot is None else slot.ffn), x[:, -1:]
        if slot is not None:
            assert last is not None, "it was asked for"
            slot.ffn = last.clone()
        out: Tensor = self.ffn(x + (before - x) * self.shift)
        return out

    @torch.no_grad()
    def init_weights(self, _std: float) -> None:
        """Draw the shares uniform in [0, 1]."""
        self.shift.uniform_(0, 1)
