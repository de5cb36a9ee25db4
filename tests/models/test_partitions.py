"""Sparse state expansion against its equations, token by token; who touches which state."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from kinds import MIXERS
from msgspec.structs import replace
from torch import Tensor

from powerplan.models import Slot
from powerplan.models.mixers.partitions import PartitionedAttention


def drawn(kind: str, **changes: object) -> PartitionedAttention:
    torch.manual_seed(0)
    mixer = PartitionedAttention(replace(MIXERS[kind], **changes), 16, dtype=torch.float64)  # type: ignore[arg-type]
    with torch.no_grad():
        for weight in mixer.parameters():
            weight.normal_(std=0.6)
    return mixer


def by_tokens(mixer: PartitionedAttention, x: Tensor) -> Tensor:
    """The layer in loops over sequences, tokens and states, from the named weights."""
    w = {name: weight.detach() for name, weight in mixer.named_parameters()}
    heads, keys, top_k, parts = mixer.heads, mixer.head_dim, mixer.top_k, w["router.weight"].shape[0]
    rows = []
    for sequence in x:
        projected = torch.cat([sequence @ w[f"{name}_proj.weight"].T for name in "qkv"], 1)
        if mixer.convolution is not None:
            taps, bias = w["convolution.weight"][:, 0], w["convolution.bias"]
            padded = torch.cat((projected.new_zeros(taps.shape[1] - 1, projected.shape[1]), projected))
            rolled = [padded[at : at + taps.shape[1]] for at in range(len(sequence))]
            projected = torch.stack([(part * taps.T).sum(0) + bias for part in rolled])
        states = [torch.zeros(heads, keys, mixer.v_head_dim, dtype=x.dtype) for _ in range(1 + parts)]
        outs = []
        for at, token in enumerate(sequence):
            q, k, v = projected[at].split([heads * keys, heads * keys, heads * mixer.v_head_dim])
            v = F.silu(v).view(heads, -1)
            shares = (w["router.weight"] @ token).softmax(0)
            out = torch.zeros_like(v)
            for index, share in [(0, 1.0), *((int(p) + 1, shares[p]) for p in shares.argsort(descending=True)[:top_k])]:
                more_q = w["more_q.1.weight"] @ (w["more_q.0.weight"] @ token) if index else torch.zeros_like(q)
                more_k = w["more_k.1.weight"] @ (w["more_k.0.weight"] @ token) if index else torch.zeros_like(k)
                own_q = share * F.silu(q + more_q).view(heads, keys) / keys**0.5
                own_k = share * (k + more_k).view(heads, keys).softmax(-1)
                name = "decay" if index else "shared_decay"
                gate = w[f"{name}.1.weight"] @ (w[f"{name}.0.weight"] @ token) + w[f"{name}.1.bias"]
                decay = torch.sigmoid(gate).view(heads, keys, 1) ** (1 / 16)
                state = decay * states[index] + own_k[:, :, None] * v[:, None]
                states[index] = state
                out = out + torch.einsum("hk,hkv->hv", own_q, state)
            out = out / (out.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w["output_norm.weight"]
            gate = w["output_gate.1.weight"] @ (w["output_gate.0.weight"] @ token)
            outs.append(w["o_proj.weight"] @ (out.flatten() * F.silu(gate)))
        rows.append(torch.stack(outs))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["sse", "sse, convolution"])
@pytest.mark.parametrize("tokens", [1, 19, 50])
def test_the_layer_equals_its_equations(kind: str, tokens: int) -> None:
    mixer = drawn(kind)
    x = torch.randn(2, tokens, 16, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), by_tokens(mixer, x))


def test_gradients_equal_those_of_the_equations() -> None:
    mixer = drawn("sse, convolution")
    x = torch.randn(2, 30, 16, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(2, 30, 16, dtype=torch.float64)
    own, other = (torch.autograd.grad(run(x), x, grad) for run in (mixer, lambda x: by_tokens(mixer, x)))  # type: ignore[no-untyped-call]
    torch.testing.assert_close(own, other)


def test_partitions_that_are_not_chosen_stay_as_they_are() -> None:
    mixer, slot = drawn("sse", partitions=8, top_k=2), Slot()
    x = torch.randn(1, 30, 16, dtype=torch.float64)
    mixer(x[:, :20], slot)
    for at in range(20, 30):
        before = slot.state.heads
        mixer(x[:, at : at + 1], slot)
        changed = (slot.state.heads != before).flatten(2).any(-1)[0]
        chosen = mixer.router(x[:, at]).topk(2).indices[0] + 1
        assert set(changed.nonzero()[:, 0].tolist()) == {0, *chosen.tolist()}
