"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): one latent per token is all that is kept.

Shapes: B batch, T tokens, S tokens so far, H heads; L latent, n and r key features without and with position, v values.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from powerplan.mixers import MLA
from powerplan.models.cache import Growing
from powerplan.models.mixers.attention import softmax_attention
from powerplan.models.mixers.base import SequenceMixer
from powerplan.models.rope import angles, rotate


class LatentAttention(SequenceMixer):
    """Softmax attention whose keys and values are expanded from a latent of L; r features of the keys carry positions.

    Its state is [B, S, L + r]: normed latents, then turned RoPE keys, which the heads share. One token at a time meets
    the latents as they are (absorbed form: 2H(2L + r) FLOPs per key); more tokens expand all of them.
    """

    def __init__(self, mixer: MLA, hidden: int, *, rope: bool, **settings: Any) -> None:
        super().__init__()
        self.heads, self.latent = mixer.heads, mixer.kv_lora_rank
        self.nope, self.turned, self.values = mixer.qk_nope_head_dim, mixer.qk_rope_head_dim, mixer.v_head_dim
        self.rope = rope
        queries, rank = self.heads * (self.nope + self.turned), mixer.q_lora_rank
        self.q_down = None
        if rank is not None:
            self.q_down = nn.Linear(hidden, rank, bias=mixer.bias, **settings)
            self.q_norm = nn.RMSNorm(rank, eps=1e-6, **settings)
        self.q_proj = nn.Linear(rank or hidden, queries, bias=False, **settings)
        self.kv_down = nn.Linear(hidden, self.latent + self.turned, bias=mixer.bias, **settings)
        self.kv_norm = nn.RMSNorm(self.latent, eps=1e-6, **settings)
        self.kv_proj = nn.Linear(self.latent, self.heads * (self.nope + self.values), bias=False, **settings)
        self.o_proj = nn.Linear(self.heads * self.values, hidden, bias=mixer.bias, **settings)

    def run(self, x: Tensor, seen: int, state: Any, *, keep: bool) -> tuple[Tensor, Any]:
        q = self.q_proj(x if self.q_down is None else self.q_norm(self.q_down(x)))
        nope, turned = torch.split(q.unflatten(-1, (self.heads, -1)), [self.nope, self.turned], -1)
        latent, key = torch.split(self.kv_down(x), [self.latent, self.turned], -1)
        if self.rope:
            turns = angles(seen, x.shape[1], self.turned, x.device)
            turned, key = rotate(turned, *turns), rotate(key[:, :, None], *turns)[:, :, 0]
        entries = torch.cat((self.kv_norm(latent), key), -1)
        absorbs = state is not None and x.shape[1] == 1
        if state is not None:
            entries = state.append(entries)
        elif keep:
            state = Growing(entries)
        out = self.absorbed(nope, turned, entries) if absorbs else self.expanded(nope, turned, entries)
        return self.o_proj(out.flatten(-2)), state

    def expanded(self, nope: Tensor, turned: Tensor, entries: Tensor) -> Tensor:
        """Return [B, T, H, v] for queries [B, T, H, n] and [B, T, H, r], the last T of the S entries [B, S, L + r]."""
        latent, key = torch.split(entries, [self.latent, self.turned], -1)
        expanded = self.kv_proj(latent).unflatten(-1, (self.heads, -1))
        keys, v = torch.split(expanded, [self.nope, self.values], -1)
        k = torch.cat((keys, key[:, :, None].expand(-1, -1, self.heads, -1)), -1)
        return softmax_attention(torch.cat((nope, turned), -1), k, v)

    def absorbed(self, nope: Tensor, turned: Tensor, entries: Tensor) -> Tensor:
        """The same for one token, T = 1: the expansion of the keys is moved to the query, that of values to the end."""
        expand = self.kv_proj.weight.view(self.heads, self.nope + self.values, self.latent)
        keys, values = torch.split(expand, [self.nope, self.values], 1)
        query = torch.einsum("bthn,hnl->bhtl", nope, keys)
        q = torch.cat((query, turned.transpose(1, 2)), -1).transpose(1, 2)  # [B, 1, H, L + r]: heads as queries
        scale = (self.nope + self.turned) ** -0.5
        k = entries[:, None]
        found = F.scaled_dot_product_attention(q, k, k[..., : self.latent], scale=scale)
        return torch.einsum("bthl,hvl->bthv", found, values)
