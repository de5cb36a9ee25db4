"""Short causal convolutions over the last few tokens, each channel on its own."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from powerplan.kernels.distributed.gather import gather_tokens
from powerplan.kernels.distributed.halo import tokens_before

if TYPE_CHECKING:
    from powerplan.kernels import ContextParallel


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over `width` tokens, the current one included. [B, T, C] -> [B, T, C]."""

    def __init__(self, channels: int, width: int, bias: bool, **factory_kwargs: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width, **factory_kwargs))
        self.bias = nn.Parameter(torch.empty(channels, **factory_kwargs)) if bias else None
        self.init_weights(1.0)

    def forward(self, x: Tensor, past_inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the output [B, T, C], and the last width - 1 inputs [B, width - 1, C] for the next call.

        past_inputs: the inputs [B, width - 1, C] before x, as the last call returned them; None stands for zeros.
        """
        past = self.weight.shape[2] - 1
        x = F.pad(x, (0, 0, past, 0)) if past_inputs is None else torch.cat((past_inputs, x), 1)
        out = F.conv1d(x.mT, self.weight, self.bias, groups=x.shape[2])
        return out.mT, x[:, x.shape[1] - past :].clone()

    def run_shared(self, x: Tensor, cp: ContextParallel, *, return_state: bool) -> tuple[Tensor, Tensor | None]:
        """Return the output [B, t, C] of this rank's tokens x [B, t, C] of sequences that lie on several ranks, and the
        last width - 1 inputs of all of their tokens if `return_state`, the same on every rank.

        Ranks give each other the last width - 1 inputs of their fragments.
        """
        past = self.weight.shape[2] - 1
        halo, (x,), (before,) = tokens_before(cp, past, x)
        last = None
        if return_state:
            first = max(cp.layout.tokens - past, 0)
            last = F.pad(gather_tokens(cp, x, first), (0, 0, past - cp.layout.tokens + first, 0))
        outs, taken = [], 0
        for fragment, count in zip(cp.fragments, halo.lengths, strict=True):
            for piece in fragment.pieces:
                own = x[:, fragment.local(piece)]
                # A sequence that began within these inputs has zeros before them.
                given = None if piece.begins else F.pad(before[:, taken : taken + count], (0, 0, past - count, 0))
                outs.append(self(own, given)[0])
            taken += count
        if outs:
            return torch.cat(outs, 1), last
        out = x * self.weight[:, 0, 0]  # no token, with a graph to all that other ranks have gradients of
        return out if self.bias is None else out + self.bias, last

    @torch.no_grad()
    def init_weights(self, _std: float) -> None:
        """Draw the weights as torch does for convolutions, uniform within 1 / sqrt(width); biases are 0."""
        bound = 1 / math.sqrt(self.weight.shape[2])
        self.weight.uniform_(-bound, bound)
        if self.bias is not None:
            self.bias.zero_()
