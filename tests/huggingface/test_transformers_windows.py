"""Windows against the attention weights of transformers' models: how many keys each query really sees, by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from powerplan.load import LoadedModel
from powerplan.mixers import Attention

pytestmark = pytest.mark.transformers

Settings = dict[str, Any]
Read = Callable[[Settings], LoadedModel]

TOKENS = 13
GROUPED: Settings = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}
MIXED = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
CASES: list[tuple[str, Settings, list[int | None]]] = [
    ("llama", {"sliding_window": 5}, [None] * 4),
    ("mistral", {"sliding_window": 5}, [5] * 4),
    ("mistral", {"sliding_window": 1}, [1] * 4),
    ("mistral", {"sliding_window": None}, [None] * 4),
    ("mixtral", {"sliding_window": 5}, [5] * 4),
    ("mixtral", {}, [None] * 4),
    ("starcoder2", {"sliding_window": 5}, [5] * 4),
    ("starcoder2", {}, [None] * 4),
    ("qwen2", {"sliding_window": 5, "max_window_layers": 0}, [None] * 4),
    ("qwen2", {"sliding_window": 5, "max_window_layers": 3, "use_sliding_window": True}, [None] * 3 + [5]),
    ("qwen3", {"sliding_window": 5, "max_window_layers": 1, "use_sliding_window": True}, [None] + [5] * 3),
    ("qwen3", {"sliding_window": 5, "use_sliding_window": True, "layer_types": MIXED}, [None, 5, 5, None]),
    ("qwen3_moe", {"sliding_window": 5, "num_experts": 4, "num_experts_per_tok": 2}, [None] * 4),
    (
        "qwen3_moe",
        {"sliding_window": 5, "use_sliding_window": True, "num_experts": 4, "num_experts_per_tok": 2},
        [5] * 4,
    ),
    ("gemma2", {"sliding_window": 5, "head_dim": 20}, [5, None, 5, None]),
    ("gemma2", {"sliding_window": 5, "head_dim": 20, "layer_types": MIXED}, [None, 5, 5, None]),
    ("gemma3_text", {"sliding_window": 5, "head_dim": 20}, [5] * 4),
    ("gemma3_text", {"sliding_window": 5, "head_dim": 20, "sliding_window_pattern": 3}, [5, 5, None, 5]),
    ("gemma3_text", {"sliding_window": 5, "head_dim": 20, "_sliding_window_pattern": 3}, [5] * 4),
    ("gpt_oss", {"sliding_window": 5, "head_dim": 20, "num_local_experts": 4}, [5, None, 5, None]),
    ("olmo2", {}, [None] * 4),
]


@pytest.mark.parametrize(("family", "settings", "windows"), CASES)
def test_keys_that_each_query_sees(
    transformers: Any, torch: Any, read: Read, family: str, settings: Settings, windows: list[int | None]
) -> None:
    data = GROUPED | settings
    spec = read(data | {"model_type": family}).spec
    by_position: dict[int, int | None] = {}
    for use in spec.layer_uses():
        assert isinstance(use.layer.mixer, Attention)
        by_position.update((position, use.layer.mixer.window) for span in use.positions for position in span)
    assert [by_position[position] for position in range(4)] == windows

    config = transformers.AutoConfig.for_model(family, **data)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        seen = model(torch.arange(TOKENS)[None], output_attentions=True).attentions
    for weights, window in zip(seen, windows, strict=True):
        keys = (weights[0] > 0).sum(dim=-1)
        expected = [min(position + 1, window or TOKENS) for position in range(TOKENS)]
        assert keys.tolist() == [expected] * 6
