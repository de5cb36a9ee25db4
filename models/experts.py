"""Mixture of experts: a router sends each token to a few of the experts, whose weights are stacked.

Shapes: B batch, T tokens, m hidden size, E experts, f width of an expert, N rows: one for each token and expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from powerplan.ffn import MLP, MoE
from powerplan.models.layers import DenseMLP


class Experts(nn.Module):
    """E MLPs, gated or plain as DenseMLP: up and gate [E, f, m], down [E, m, f], their biases [E, f] and [E, m]."""

    def __init__(self, ffn: MoE, hidden_size: int, **factory_kwargs: Any) -> None:
        super().__init__()
        width = ffn.intermediate_size

        def weight(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(ffn.experts, *sizes, **factory_kwargs))

        self.up = weight(width, hidden_size)
        self.gate = weight(width, hidden_size) if ffn.gated else None
        self.down = weight(hidden_size, width)
        self.up_bias = weight(width) if ffn.bias else None
        self.gate_bias = weight(width) if ffn.bias and ffn.gated else None
        self.down_bias = weight(hidden_size) if ffn.bias else None
        self.init_weights(0.02)

    def forward(self, x: Tensor, counts: list[int]) -> Tensor:
        """Return the outputs [N, m] of rows x [N, m], which are sorted by expert: counts[e] rows for expert e."""
        # Unbound once: the gradient of each index would be as large as the whole stack.
        up, gate, down = self.up.unbind(), _unbind(self.gate, counts), self.down.unbind()
        biases = [_unbind(bias, counts) for bias in (self.up_bias, self.gate_bias, self.down_bias)]
        outs = []
        for expert, rows in enumerate(torch.split(x, counts)):
            if counts[expert] or not len(x):  # Without tokens, as a rank may be, all have gradients of 0.
                up_bias, gate_bias, down_bias = (bias[expert] for bias in biases)
                inner, gate_weight = F.linear(rows, up[expert], up_bias), gate[expert]
                inner = F.gelu(inner) if gate_weight is None else F.silu(F.linear(rows, gate_weight, gate_bias)) * inner
                outs.append(F.linear(inner, down[expert], down_bias))
        return torch.cat(outs)

    @torch.no_grad()
    def init_weights(self, std: float) -> None:
        """Draw the matrices normal with standard deviation `std`; biases are 0."""
        for weight in (self.up, self.gate, self.down):
            if weight is not None:
                weight.normal_(std=std)
        for bias in (self.up_bias, self.gate_bias, self.down_bias):
            if bias is not None:
                bias.zero_()


def _unbind(stack: Tensor | None, counts: list[int]) -> Sequence[Tensor | None]:
    return [None] * len(counts) if stack is None else stack.unbind()


class MixtureOfExperts(nn.Module):
    """The weighted sum of the `top_k` likeliest experts of each token, plus the shared experts. [B, T, m] -> [B, T, m].

    The weights are the softmax over the logits of the chosen experts. With one expert per token (top_k 1) the weight is
    its share of the softmax over all experts. Each token runs through exactly `top_k` experts: none is dropped, none is
    padded. The shared experts are one MLP of their total width, times the sigmoid of `shared_gate` if the spec has one.
    """

    def __init__(self, ffn: MoE, hidden_size: int, **factory_kwargs: Any) -> None:
        super().__init__()
        self.top_k = ffn.top_k
        self.router = nn.Linear(hidden_size, ffn.experts, bias=ffn.router_bias, **factory_kwargs)
        self.experts = Experts(ffn, hidden_size, **factory_kwargs)
        width = ffn.shared_intermediate_size
        shared = MLP(intermediate_size=width, gated=ffn.gated) if width else None
        self.shared = None if shared is None else DenseMLP(shared, hidden_size, **factory_kwargs)
        self.shared_gate = nn.Linear(hidden_size, 1, bias=False, **factory_kwargs) if ffn.shared_gate else None

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        logits = self.router(tokens).to(torch.promote_types(x.dtype, torch.float32))
        top_logits, experts = logits.topk(self.top_k, -1)
        # A softmax over one logit has no gradient. With one expert per token, its share of the softmax over all experts
        # keeps the router learning (Switch Transformer, Fedus et al. 2021, arXiv 2101.03961, section 2.1).
        one_of_all = self.top_k == 1
        weights = (top_logits - logits.logsumexp(-1, keepdim=True)).exp() if one_of_all else top_logits.softmax(-1)
        order = experts.flatten().argsort(stable=True)
        counts = experts.flatten().bincount(minlength=self.router.out_features).tolist()
        token_of_row = order // self.top_k
        rows = self.experts(tokens[token_of_row], counts) * weights.to(x.dtype).flatten()[order, None]
        out = torch.zeros_like(tokens).index_add(0, token_of_row, rows.to(tokens.dtype)).view(x.shape)
        if self.shared is None:
            return out
        shared: Tensor = self.shared(x)
        return out + (shared if self.shared_gate is None else shared * self.shared_gate(x).sigmoid())
