"""Tiny models of transformers, with and without power attention, and what they are given to read."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from powerplan.models import use_power_attention

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaModel.forward).parameters else "past_key_values"
"""What the installed transformers calls the cache among the arguments of its models."""


def build(kind: str = "Llama", dtype: torch.dtype = torch.float64, **fields: Any) -> Any:
    """Return a random model of transformers; wider weights than usual, so that attention matters."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SHAPE | {"initializer_range": 0.3} | fields))
    return getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval()


def powered(kind: str = "Llama", dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    """Return such a model with power attention; its gates vary."""
    model = use_power_attention(build(kind, dtype), **settings)
    for module in model.modules():
        if getattr(module, "g_proj", None) is not None:
            nn.init.normal_(module.g_proj.weight, std=0.5)
            nn.init.constant_(module.g_proj.bias, 1.0)
    return model


def tokens(rows: int = 2, count: int = 37, seed: int = 0) -> Tensor:
    return torch.randint(3, SHAPE["vocab_size"], (rows, count), generator=torch.Generator().manual_seed(seed))


def padding(side: str, rows: int = 2, count: int = 37, hidden: int = 11) -> Tensor:
    """A mask with `hidden` padded places in the last row, on that side; none where side is ""."""
    mask = torch.ones(rows, count, dtype=torch.long)
    if side:
        mask[-1, slice(hidden) if side == "left" else slice(-hidden, None)] = 0
    return mask
