"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): one latent per token is all that is kept.

Shapes: B batch, T tokens, S tokens so far, H heads, L latent dim (kv_lora_rank), n key features without positions
(qk_nope_head_dim), r key features with RoPE (qk_rope_head_dim), v value features.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from powerplan.kernels.distributed.gather import gather_tokens
from powerplan.kernels.distributed.stretches import joined_outputs
from powerplan.mixers import MLA
from powerplan.models.cache import GrowingBuffer
from powerplan.models.mixers.attention import by_sequence, pieces_after_halo, softmax_attention
from powerplan.models.mixers.base import SequenceMixer
from powerplan.models.mixers.ranks import can_share, compare_calls, heads_for_tokens, rope_of_rank, tokens_for_heads
from powerplan.models.rope import apply_rope, rope_cos_sin
from powerplan.rope import Rope

if TYPE_CHECKING:
    from powerplan.kernels import ContextParallel


class LatentAttention(SequenceMixer):
    """Softmax attention whose keys and values are expanded from one latent per token. [B, T, m] -> [B, T, m].

    The state is [B, S, L + r]: the normalised latents, then the RoPE features of the keys, which all heads share. A
    single token after a cache attends to the latents themselves (the absorbed form, 2H(2L + r) FLOPs per key). Several
    tokens expand keys and values of all S tokens.
    """

    def __init__(self, mixer: MLA, hidden_size: int, *, rope: Rope | None, **factory_kwargs: Any) -> None:
        super().__init__()
        self.heads, self.latent_dim = mixer.heads, mixer.kv_lora_rank
        self.nope_dim, self.rope_dim, self.v_dim = mixer.qk_nope_head_dim, mixer.qk_rope_head_dim, mixer.v_head_dim
        self.rope = rope
        queries, rank = self.heads * (self.nope_dim + self.rope_dim), mixer.q_lora_rank
        self.q_down = None
        if rank is not None:
            self.q_down = nn.Linear(hidden_size, rank, bias=mixer.bias, **factory_kwargs)
            self.q_norm = nn.RMSNorm(rank, eps=1e-6, **factory_kwargs)
        self.q_proj = nn.Linear(rank or hidden_size, queries, bias=False, **factory_kwargs)
        self.kv_down = nn.Linear(hidden_size, self.latent_dim + self.rope_dim, bias=mixer.bias, **factory_kwargs)
        self.kv_norm = nn.RMSNorm(self.latent_dim, eps=1e-6, **factory_kwargs)
        expanded = self.heads * (self.nope_dim + self.v_dim)
        self.kv_proj = nn.Linear(self.latent_dim, expanded, bias=False, **factory_kwargs)
        self.o_proj = nn.Linear(self.heads * self.v_dim, hidden_size, bias=mixer.bias, **factory_kwargs)

    def run(self, x: Tensor, past_tokens: int, state: Any, *, return_state: bool) -> tuple[Tensor, Any]:
        cos_sin = None
        if self.rope is not None:
            cos_sin = rope_cos_sin(past_tokens, x.shape[1], self.rope_dim, x.device, self.rope)
        q_nope, q_rope, entries = self.project(x, cos_sin)
        attend = self.attend_absorbed if state is not None and x.shape[1] == 1 else self.attend_expanded
        if state is not None:
            entries = state.append(entries)
        elif return_state:
            state = GrowingBuffer(entries)
        return self.o_proj(attend(q_nope, q_rope, entries).flatten(-2)), state

    def run_shared(self, x: Tensor, cp: ContextParallel, *, return_state: bool) -> tuple[Tensor, Any]:
        cos_sin = None if self.rope is None else rope_of_rank(cp, self.rope_dim, x.device, self.rope)
        q_nope, q_rope, entries = self.project(x, cos_sin)
        q = torch.cat((q_nope, q_rope), -1)
        compare_calls(cp, "mla", return_state, q=q, latents=entries)
        if not can_share(self.heads, self.heads, cp.ranks):
            state = GrowingBuffer(gather_tokens(cp, entries)) if return_state else None
            return self.o_proj(self.attend_after_halo(q, entries, cp).flatten(-2)), state
        q = tokens_for_heads(q, cp)
        gathers = self.gathers(cp.ranks)
        whole = gather_tokens(cp, entries) if gathers or return_state else entries
        if gathers:
            weight = self.kv_proj.weight.chunk(cp.ranks)[cp.rank]
            k, v = self.expand(whole, partial(F.linear, weight=weight))
        else:
            k, v = (tokens_for_heads(part, cp) for part in self.expand(entries, self.kv_proj))
        out = heads_for_tokens(by_sequence(q, k, v, cp), cp)
        return self.o_proj(out.flatten(-2)), GrowingBuffer(whole) if return_state else None

    def attend_after_halo(self, q: Tensor, entries: Tensor, cp: ContextParallel) -> Tensor:
        """Return the heads' outputs [B, t, H, v] of this rank's tokens, with all heads of all latents before them.

        q: [B, t, H, n + r]; entries: [B, t, L + r]. A rank expands the latents before its tokens once more.
        """
        (entries,), pieces = pieces_after_halo(cp, None, entries)
        outs = [softmax_attention(q[:, own], *self.expand(seen, self.kv_proj)) for own, (seen,) in pieces]
        weight = self.kv_proj.weight
        return joined_outputs(outs, (q, entries, weight), (*q.shape[:3], self.v_dim), entries)

    def gathers(self, ranks: int) -> bool:
        """Return whether each of so many ranks gets all latents and expands its own heads, and not all tokens of its
        heads that others have expanded: where it receives fewer numbers that way. The FLOPs are the same."""
        return ranks * (self.latent_dim + self.rope_dim) <= self.heads * (self.nope_dim + self.rope_dim + self.v_dim)

    def query_input(self, x: Tensor) -> Tensor:
        """Return what the queries of x [B, T, m] are projected from: their normalised latents, or x without latents."""
        return x if self.q_down is None else self.q_norm(self.q_down(x))

    def project(
        self, x: Tensor, cos_sin: tuple[Tensor, Tensor] | None, query_input: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return q_nope [B, T, H, n], q_rope [B, T, H, r] and the entries [B, T, L + r] of x [B, T, m], rotated by the
        cosines and sines of its positions. query_input: `query_input` of x, where it is there already."""
        q = self.q_proj(self.query_input(x) if query_input is None else query_input)
        q_nope, q_rope = torch.split(q.unflatten(-1, (self.heads, -1)), [self.nope_dim, self.rope_dim], -1)
        latents, k_rope = torch.split(self.kv_down(x), [self.latent_dim, self.rope_dim], -1)
        if self.rope is not None and cos_sin is not None:
            q_rope, k_rope = apply_rope(q_rope, *cos_sin), apply_rope(k_rope[:, :, None], *cos_sin)[:, :, 0]
            if self.rope.latent_scale != 1:
                q_nope, q_rope = q_nope * self.rope.latent_scale, q_rope * self.rope.latent_scale
        return q_nope, q_rope, torch.cat((self.kv_norm(latents), k_rope), -1)

    def attend_expanded(self, q_nope: Tensor, q_rope: Tensor, entries: Tensor) -> Tensor:
        """Return the heads' outputs [B, T, H, v] with keys and values expanded from all latents.

        q_nope: [B, T, H, n]; q_rope: [B, T, H, r], of the last T of the S tokens; entries: [B, S, L + r].
        """
        return softmax_attention(torch.cat((q_nope, q_rope), -1), *self.expand(entries, self.kv_proj))

    def expand(self, entries: Tensor, project: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return keys [B, S, h, n + r] and values [B, S, h, v] of the heads that `project` expands latents to."""
        latents, k_rope = torch.split(entries, [self.latent_dim, self.rope_dim], -1)
        expanded = torch.unflatten(project(latents), -1, (-1, self.nope_dim + self.v_dim))
        k_nope, v = torch.split(expanded, [self.nope_dim, self.v_dim], -1)
        return torch.cat((k_nope, k_rope[:, :, None].expand(-1, -1, k_nope.shape[2], -1)), -1), v

    def attend_absorbed(self, q_nope: Tensor, q_rope: Tensor, entries: Tensor) -> Tensor:
        """Return the same for one token, T = 1, without expanding the latents.

        The expansion of the keys is applied to the query, and that of the values to the sum of latents at the end.
        """
        k_weight, v_weight = self.expansions()
        # All heads share the keys, so heads take the place of queries: [B, 1, H, L + r]
        q = torch.cat((torch.einsum("bthn,hnl->bthl", q_nope, k_weight), q_rope), -1)
        scale = (self.nope_dim + self.rope_dim) ** -0.5
        k = entries[:, None]
        summed_latents = F.scaled_dot_product_attention(q, k, k[..., : self.latent_dim], scale=scale)
        return torch.einsum("bthl,hvl->bthv", summed_latents, v_weight)

    def expansions(self) -> tuple[Tensor, Tensor]:
        """Return the matrices that expand a latent to keys [H, n, L] and to values [H, v, L]."""
        weight = self.kv_proj.weight.view(self.heads, self.nope_dim + self.v_dim, self.latent_dim)
        k_weight, v_weight = torch.split(weight, [self.nope_dim, self.v_dim], 1)
        return k_weight, v_weight
