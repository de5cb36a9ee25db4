"""Mixtures of experts: the definition expert by expert, gradients, and experts that nobody chose."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from kinds import EXPERTS, SHARED
from specs import moes
from torch import Tensor

from powerplan.ffn import MoE
from powerplan.models.experts import MixtureOfExperts


def by_definition(module: MixtureOfExperts, x: Tensor, top_k: int) -> Tensor:
    """Every expert on every token, weighted by the softmax over the chosen; over all where one is chosen."""
    logits = module.router(x)
    chosen = logits >= logits.topk(top_k, -1).values[..., -1:]
    competing = logits if top_k == 1 else logits.masked_fill(~chosen, -torch.inf)
    shares = competing.softmax(-1).masked_fill(~chosen, 0)
    own, zero, out = module.experts, torch.zeros(()).to(x), 0
    for expert in range(shares.shape[-1]):
        inner = x @ own.up[expert].mT + (zero if own.up_bias is None else own.up_bias[expert])
        if own.gate is None:
            inner = F.gelu(inner)
        else:
            inner = inner * F.silu(x @ own.gate[expert].mT + (zero if own.gate_bias is None else own.gate_bias[expert]))
        result = inner @ own.down[expert].mT + (zero if own.down_bias is None else own.down_bias[expert])
        out = out + shares[..., expert, None] * result
    if module.shared is not None:
        shared = module.shared(x)
        out = out + (shared if module.shared_gate is None else shared * module.shared_gate(x).sigmoid())
    return out


@settings(max_examples=40)
@given(moes())
def test_output_and_gradients_equal_the_definition(ffn: MoE) -> None:
    torch.manual_seed(ffn.experts)
    module = MixtureOfExperts(ffn, 7, dtype=torch.float64)
    for weight in module.parameters():
        torch.nn.init.normal_(weight)
    x = torch.randn(2, 9, 7, dtype=torch.float64, requires_grad=True)
    out, expected = module(x), by_definition(module, x, ffn.top_k)
    torch.testing.assert_close(out, expected)
    inputs, grad = [x, *module.parameters()], torch.randn_like(out)
    own, other = (torch.autograd.grad(result, inputs, grad, retain_graph=True) for result in (out, expected))
    torch.testing.assert_close(own, other)


def test_experts_that_nobody_chose() -> None:
    module = MixtureOfExperts(EXPERTS, 7)
    with torch.no_grad():
        module.router.weight.zero_()
    module(torch.randn(1, 1, 7)).sum().backward()
    touched = [bool(grad.any()) for grad in module.experts.down.grad]  # type: ignore[union-attr]
    assert sum(touched) == EXPERTS.top_k


def test_no_tokens_have_gradients_of_0() -> None:
    """A rank without tokens of a sequence has all gradients that others have."""
    module = MixtureOfExperts(MoE(experts=3, top_k=2, intermediate_size=5, bias=True), 7)
    x = torch.randn(2, 0, 7, requires_grad=True)
    module(x).sum().backward()
    assert all(weight.grad is not None and not weight.grad.any() for weight in (x, *module.parameters()))


@pytest.mark.parametrize("top_k", [1, 2])
def test_the_router_learns(top_k: int) -> None:
    module = MixtureOfExperts(MoE(experts=4, top_k=top_k, intermediate_size=8), 7)
    module(torch.randn(2, 5, 7)).square().sum().backward()
    assert module.router.weight.grad is not None
    assert module.router.weight.grad.abs().max() > 0


def test_half_precision() -> None:
    module = MixtureOfExperts(SHARED, 7, dtype=torch.bfloat16)
    out = module(torch.randn(2, 5, 7, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert MixtureOfExperts(SHARED, 7)(torch.randn(2, 5, 7)).isfinite().all()
