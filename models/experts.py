"""Mixture of experts: a router sends each token to a few of the experts, whose weights are stacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from powerplan.ffn import MLP, MoE
from powerplan.models.layers import DenseMLP


class Experts(nn.Module):
    """E MLPs of width f, gated or plain as DenseMLP: up and gate [E, f, m], down [E, m, f], and biases likewise."""

    def __init__(self, ffn: MoE, hidden: int, **settings: Any) -> None:
        super().__init__()
        width = ffn.intermediate_size

        def weight(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(ffn.experts, *sizes, **settings))

        self.up = weight(width, hidden)
        self.gate = weight(width, hidden) if ffn.gated else None
        self.down = weight(hidden, width)
        self.up_bias = weight(width) if ffn.bias else None
        self.gate_bias = weight(width) if ffn.bias and ffn.gated else None
        self.down_bias = weight(hidden) if ffn.bias else None
        self.init_weights(0.02)

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """Return the outputs [N, m] of rows [N, m], of which the first counts[0] are the first expert's, and so on."""
        # Unbound once: the gradient of each index would be as large as the whole stack.
        up, gate, down = self.up.unbind(), _unbound(self.gate, counts), self.down.unbind()
        biases = [_unbound(bias, counts) for bias in (self.up_bias, self.gate_bias, self.down_bias)]
        outs = []
        for expert, own in enumerate(torch.split(x, counts)):
            if counts[expert]:
                up_bias, gate_bias, down_bias = (bias[expert] for bias in biases)
                inner, opened = F.linear(own, up[expert], up_bias), gate[expert]
                inner = F.gelu(inner) if opened is None else F.silu(F.linear(own, opened, gate_bias)) * inner
                outs.append(F.linear(inner, down[expert], down_bias))
        return torch.cat(outs)

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Draw the matrices normal with `std`; biases are 0."""
        for weight in (self.up, self.gate, self.down):
            if weight is not None:
                weight.normal_(std=std)
        for bias in (self.up_bias, self.gate_bias, self.down_bias):
            if bias is not None:
                bias.zero_()


def _unbound(stack: Tensor | None, counts: list[int]) -> Sequence[Tensor | None]:
    return [None] * len(counts) if stack is None else stack.unbind()


class MixtureOfExperts(nn.Module):
    """The sum of the `top_k` likeliest experts, weighted by the softmax over those alone, and of the shared experts.

    [B, T, m] -> [B, T, m]. One expert alone (top_k 1) is weighted by its share of the softmax over all. Each token
    costs `top_k` experts whatever the router says: none is dropped, none is padded. Shared experts are one MLP of their
    total width, times the sigmoid of `shared_gate` where the spec has one.
    """

    def __init__(self, ffn: MoE, hidden: int, **settings: Any) -> None:
        super().__init__()
        self.top_k = ffn.top_k
        self.router = nn.Linear(hidden, ffn.experts, bias=ffn.router_bias, **settings)
        self.experts = Experts(ffn, hidden, **settings)
        width = ffn.shared_intermediate_size
        shared = MLP(intermediate_size=width, gated=ffn.gated) if width else None
        self.shared = None if shared is None else DenseMLP(shared, hidden, **settings)
        self.shared_gate = nn.Linear(hidden, 1, bias=False, **settings) if ffn.shared_gate else None

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        logits = self.router(rows).to(torch.promote_types(x.dtype, torch.float32))
        scores, chosen = logits.topk(self.top_k, -1)
        # A softmax over one has no gradient: its share of all keeps the router learning (Switch Transformer).
        shares = scores.softmax(-1) if self.top_k > 1 else (scores - logits.logsumexp(-1, keepdim=True)).exp()
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=self.router.out_features).tolist()
        tokens = order // self.top_k
        out = self.experts(rows[tokens], counts) * shares.to(x.dtype).flatten()[order, None]
        mixed = torch.zeros_like(rows).index_add(0, tokens, out.to(rows.dtype)).view(x.shape)
        if self.shared is None:
            return mixed
        shared: Tensor = self.shared(x)
        return mixed + (shared if self.shared_gate is None else shared * self.shared_gate(x).sigmoid())
