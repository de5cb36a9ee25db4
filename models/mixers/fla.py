"""Recurrences and forgetting attention by the kernels of flash-linear-attention (fla), for half precision on CUDA.

Each function returns what its twin in plain torch returns. The kernels take [B, T, H, K] and [B, T, H, V], natural
logarithms of decays in float32, and states [B, H, K, V] in float32. They scale queries by K^-0.5 unless they are given
another scale: queries come scaled here, so the scale is 1. Their arguments are documented in fla/ops.

Shapes: B batch, T tokens, H heads, K key head dim, V value head dim, G groups, R = H / G heads of a group, M slots.
"""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

OLDEST_FLA = (0, 6)
"""The version whose signatures these calls fit (scripts/fla_signatures.py). Older ones count as not installed."""

SMALLEST_FLA_HEAD_DIM, LARGEST_FLA_HEAD_DIM = 16, 256
"""Key head dims of the kernels: Triton multiplies tiles of 16 at least, and several kernels take no more than 256."""

MAX_FORGETTING_TOKENS = 2**16
"""The kernel adds up log2 gates in float32. Gates of a half add up to -2^16 here, where neighbours in float32 are 2^-8
or 2^-7 apart: as bf16 resolves weights."""


def _is_installed() -> bool:
    if find_spec("fla") is None:
        return False
    try:
        found = re.match(r"(\d+)\.(\d+)", version("fla-core"))
    except PackageNotFoundError:
        return False
    return found is not None and (int(found[1]), int(found[2])) >= OLDEST_FLA


HAS_FLA = _is_installed()
"""Whether flash-linear-attention is installed. Looked up at import: torch.compile cannot trace it before torch 2.7."""


def fits_fla(head_dim: int, v_head_dim: int, *slots: int) -> bool:
    """Return whether the kernels take these sizes. In half precision some of them refuse odd ones."""
    sizes = (head_dim, v_head_dim, *slots)
    fits = all(size >= SMALLEST_FLA_HEAD_DIM and size % 2 == 0 for size in sizes)
    return fits and head_dim <= LARGEST_FLA_HEAD_DIM


def fla_supports(q: Tensor, v: Tensor, *sizes: int) -> bool:
    """Return whether flash-linear-attention is installed and its kernels take these tensors: CUDA, half precision.

    sizes: head dims of further tensors.
    """
    is_half = q.dtype in (torch.bfloat16, torch.float16) and v.dtype == q.dtype
    return q.is_cuda and is_half and fits_fla(q.shape[-1], v.shape[-1], *sizes) and HAS_FLA


def delta_rule_by_fla(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_g: Tensor | None, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return what `recurrence.delta_rule` returns."""
    tensors = {"q": q, "k": k, "v": v, "beta": beta.to(q.dtype), **_options(state)}
    if log_g is None:
        from fla.ops.delta_rule import chunk_delta_rule

        return _checked(chunk_delta_rule(**tensors))
    if log_g.ndim == 3:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        return _checked(chunk_gated_delta_rule(**tensors, g=log_g))
    from fla.ops.kda import chunk_kda

    return _checked(chunk_kda(**tensors, g=log_g))


def gated_linear_by_fla(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what `recurrence.gated_linear_attention` returns."""
    from fla.ops.gla import chunk_gla

    return _checked(chunk_gla(q=q, k=k.to(q.dtype), v=v, g=log_g, **_options(state)))


def grouped_scan_by_fla(c: Tensor, b: Tensor, x: Tensor, log_g: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what `scans.grouped_scan` returns: linear attention with a decay per head, q and k repeated."""
    from fla.ops.simple_gla import chunk_simple_gla

    groups = c.shape[2]
    repeats = x.shape[2] // groups
    q, k = (part.repeat_interleave(repeats, 2) for part in (c, b))
    by_head = None if state is None else state.transpose(2, 3).flatten(1, 2)  # [B, G, K, R, V] -> [B, H, K, V]
    out, last = _checked(chunk_simple_gla(q=q, k=k, v=x.to(c.dtype), g=log_g, **_options(by_head)))
    return out.to(x.dtype), torch.unflatten(last, 1, (groups, repeats)).transpose(2, 3)


def rank_one_by_fla(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_g: Tensor, state: Tensor | None, strongest: float
) -> tuple[Tensor, Tensor]:
    """Return what `rwkv.rank_one_rule` returns. Decays above `strongest` allow chunks of 64 tokens instead of 16."""
    from fla.ops.rwkv7 import chunk_rwkv7

    k, a, b = (part.to(q.dtype) for part in (k, a, b))  # Autocast leaves norms in float32.
    return _checked(chunk_rwkv7(r=q, w=log_g, k=k, v=v, a=a, b=b, lower_bound=strongest, **_options(state)))


def slots_by_fla(q: Tensor, k: Tensor, v: Tensor, log_f: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what `slots.slot_attention` returns. The kernel has keys [B, H, K, M] and values [B, H, M, V] of slots."""
    from fla.ops.gsa import chunk_gsa

    written = -log_f.expm1()
    slots = None if state is None else (state[..., : k.shape[-1]].mT, state[..., k.shape[-1] :])
    out, (keys, values) = chunk_gsa(q=q, k=k, v=v, s=written.to(q.dtype), g=log_f, **_options(slots))
    return out, torch.cat((keys.mT, values), -1)


def forgetting_by_fla(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor) -> Tensor:
    """Return what `forgetting.forgetting_attention` returns where the queries are those of all S keys."""
    from fla.ops.forgetting_attn import parallel_forgetting_attn

    out: Tensor = parallel_forgetting_attn(q=q, k=k, v=v, g=log_g, scale=q.shape[-1] ** -0.5)
    return out


def _options(state: Any) -> dict[str, Any]:
    return {"scale": 1.0, "initial_state": state, "output_final_state": True}


def _checked(result: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor]:
    out, state = result
    assert state is not None, "the final state was asked for"
    return out, state
