"""Compare layers of powerplan.models with those of flash-linear-attention, weight by weight, on a CPU.

Usage: python scripts/fla_layers.py, where flash-linear-attention is installed. It is no dependency of the tests. What
its layers run in Triton is replaced by its own plain torch code, or by a line of torch where it has none.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from powerplan.mixers import GSA, NSA, RWKV7, Forgetting
from powerplan.models.mixers.fenwick import log_linear_scan
from powerplan.models.mixers.forgetting import ForgettingAttention
from powerplan.models.mixers.nsa import NativeSparseAttention
from powerplan.models.mixers.rwkv import RWKV7Mixer
from powerplan.models.mixers.slots import GatedSlotAttention
from powerplan.models.rope import apply_rope, rope_cos_sin
from powerplan.rope import Rope

TOKENS = 64


def difference(own: Tensor, theirs: Tensor) -> float:
    """Return the largest difference, as a share of the largest output."""
    return float((own - theirs).abs().max() / theirs.abs().max())


def drawn(module: Any) -> dict[str, Tensor]:
    """Draw all weights of a module anew, and return them by name."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(std=0.4)
    return {name: weight.detach() for name, weight in module.named_parameters()}


def log_linear() -> float:
    from fla.ops.log_linear_attn.naive import naive_log_linear_attn

    c, b = (torch.randn(2, TOKENS, 2, 5) for _ in range(2))
    x, log_g, weight = torch.randn(2, TOKENS, 4, 3), -torch.rand(2, TOKENS, 4), torch.rand(2, TOKENS, 4, 7)
    own, _ = log_linear_scan(c, b, x, log_g, weight, None, 0, 16)
    return difference(own, naive_log_linear_attn(c, b, x, log_g, weight))


def gsa() -> float:
    from fla.layers import gsa as layers
    from fla.ops.gsa.naive import naive_recurrent_gsa

    def recurrence(q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor, scale: float, **_: Any) -> Any:
        return naive_recurrent_gsa(q, k, v, s, g, scale)

    layers.chunk_gsa = layers.fused_recurrent_gsa = recurrence
    layers.rms_norm_linear = lambda x, w, _, out, __: F.linear(F.rms_norm(x, x.shape[-1:], w, 1e-6), out)
    theirs = layers.GatedSlotAttention(hidden_size=16, num_heads=2, num_slots=3, layer_idx=0).float()
    theirs.feature_map = nn.SiLU()
    own = GatedSlotAttention(GSA(heads=2, head_dim=8, slots=3, chunk_size=16), 16)
    names = {"f_proj.weight": "forget.weight", "g_norm.weight": "output_norm.weight"}
    own.load_state_dict({names.get(name, name): weight for name, weight in drawn(theirs).items()})
    x = torch.randn(2, TOKENS, 16)
    return difference(own(x), theirs(x)[0])


def rwkv7(position: int) -> float:
    from fla.layers import rwkv7 as layers
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence

    def recurrence(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, **_: Any) -> Any:
        # It scales queries by K^-0.5, and the layer wants no scale.
        parts = (x.transpose(1, 2) for x in (r * r.shape[-1] ** 0.5, k, v, a, b, w))
        return dplr_recurrence(*parts)[0].transpose(1, 2), None

    layers.chunk_rwkv7 = recurrence
    layers.token_shift = lambda x, *_, **__: (F.pad(x, (0, 0, 1, 0))[:, :-1] - x, x[:, -1])
    layers.fused_addcmul_rwkv7 = lambda x, delta, *shares: tuple(x + delta * share for share in shares)
    layers.fused_k_rwkv7 = lambda k, a, share: k * (1 + (a - 1) * share)
    layers.gate_output_correction = lambda o, r, k, bonus, v, g: (
        (o + ((r * k * bonus).sum(-1, keepdim=True) * v).flatten(-2)) * g
    )
    ranks = {"decay_low_rank_dim": 3, "gate_low_rank_dim": 4, "a_low_rank_dim": 2, "v_low_rank_dim": 3}
    theirs = layers.RWKV7Attention(hidden_size=16, head_dim=8, layer_idx=position, num_hidden_layers=3, **ranks)
    ours = RWKV7(heads=2, head_dim=8, decay_rank=3, rate_rank=2, gate_rank=4, value_rank=3 if position else None)
    own, weights = RWKV7Mixer(ours, 16), drawn(theirs.float())
    state = {"shift": torch.cat([weights[f"x_{letter}"] for letter in "rwkvag"], 1)[0]}
    state |= {f"{part}_proj.weight": weights[f"{part.replace('q', 'r')}_proj.weight"] for part in "qkvo"}
    state |= {f"output_norm.{part}": weights[f"g_norm.{part}"] for part in ("weight", "bias")}
    for name, theirs_name in (("removal", "k_k"), ("kept_key", "k_a"), ("bonus", "r_k")):
        state[name] = weights[theirs_name].view(2, 8)
    low_rank = {"decay": ("w", 2), "rate": ("a", 1), "output_gate": ("g", 2)}
    low_rank |= {"value_gate": ("v", 1)} if position else {}
    for name, (letter, last) in low_rank.items():
        for index, key in ((0, "0.weight"), (last, "2.weight"), (last, "2.bias")):
            if (weight := weights.get(f"{letter}_lora.lora.{key}")) is not None:
                state[f"{name}.{index}.{key[2:]}"] = weight
    own.load_state_dict(state)
    x, first_values = torch.randn(2, TOKENS, 16), torch.randn(2, TOKENS, 16)
    return difference(own(x, first_values=first_values if position else None), theirs(x, v_first=first_values)[0])


def forgetting() -> float:
    from fla.layers import forgetting_attn as layers
    from fla.ops.forgetting_attn.naive import naive_forgetting_attn

    layers.parallel_forgetting_attn = lambda q, k, v, g, **_: naive_forgetting_attn(q, k, v, g)
    theirs = layers.ForgettingAttention(hidden_size=32, num_heads=4, num_kv_heads=2, use_output_gate=True).float()
    own = ForgettingAttention(Forgetting(heads=4, kv_heads=2, head_dim=8, output_gate=True), 32)
    names = {"f_proj": "forget_gate", "g_proj": "output_gate"}
    weights = {tuple(name.split(".")): weight for name, weight in drawn(theirs).items()}
    own.load_state_dict({f"{names.get(module, module)}.{name}": weight for (module, name), weight in weights.items()})
    x = torch.randn(2, TOKENS, 32)
    return difference(own(x), theirs(x)[0])


def nsa() -> float:
    """Compressed blocks are those that are picked, as there."""
    from fla.layers import nsa as layers
    from fla.ops.nsa import naive

    class Rotary(nn.Module):
        def __init__(self, dim: int, base: float) -> None:
            super().__init__()
            self.dim, self.rope = dim, Rope(theta=base)

        def forward(self, q: Tensor, k: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
            cos_sin = rope_cos_sin(0, q.shape[1], self.dim, q.device, self.rope)
            return apply_rope(q, *cos_sin), apply_rope(k, *cos_sin)

    def window(q: Tensor, k: Tensor, v: Tensor, window_size: tuple[int, int], **_: Any) -> Tensor:
        seen = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).tril().triu(-window_size[0])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True).transpose(1, 2)

    layers.RotaryEmbedding, layers.parallel_nsa, naive.flash_attn_func = Rotary, naive.naive_nsa, window
    naive.mean_pooling = lambda x, size, _: torch.stack([part.mean(1) for part in x.split(size, 1)], 1)
    sizes = {"hidden_size": 32, "num_heads": 16, "num_kv_heads": 1, "head_dim": 8}
    theirs = layers.NativeSparseAttention(**sizes, block_size=4, block_counts=5, window_size=7).float()
    mixer = NSA(
        heads=16, kv_heads=1, head_dim=8, compress_size=4, compress_stride=4, select_size=4, select_count=5, window=7
    )
    own = NativeSparseAttention(mixer, 32, rope=Rope())
    own.load_state_dict({name.replace("g_proj", "branch_gates"): weight for name, weight in drawn(theirs).items()})
    x = torch.randn(2, TOKENS, 32)
    return difference(own(x), theirs(x)[0])


def main() -> None:
    """Print how far the outputs are apart. float32 alone makes some 1e-6."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    with torch.no_grad():
        cases = {"log_linear (recurrence)": log_linear(), "gsa": gsa()}
        cases |= {"rwkv7, first layer": rwkv7(0), "rwkv7, later layer": rwkv7(1)}
        cases |= {"forgetting": forgetting(), "nsa": nsa()}
    for name, found in cases.items():
        sys.stdout.write(f"{name}: {found:.1e}\n")


if __name__ == "__main__":
    main()
