"""What power attention does not do in models of transformers, and what it says then."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from powerplan.errors import InputError
from powerplan.models import PowerCache, use_power_attention

transformers = pytest.importorskip("transformers")
from hf_models import CACHE, SHAPE, build, powered, tokens  # noqa: E402

pytestmark = pytest.mark.transformers

REFUSED = {
    "dropout": ({"attention_dropout": 0.1}, {}, "dropout: config.attention_dropout is 0.1"),
    "window": ({"kind": "Mistral", "sliding_window": 8}, {}, "a sliding window: set config.sliding_window to None"),
    "hidden window": (
        {"kind": "Phimoe", "sliding_window": 8, "num_local_experts": 2},
        {},
        "a sliding window: set config.sliding_window to None",
    ),
    "4D": ({}, {"attention_mask": torch.zeros(2, 1, 37, 37)}, r"attention_mask must be \[batch, tokens\]"),
    "short": (
        {},
        {"attention_mask": torch.ones(2, 20)},
        "attention_mask covers 20 tokens of 37, the cached among them",
    ),
    "softcap": ({}, {"softcap": 30.0}, "soft-capped scores"),
    "sinks": ({}, {"s_aux": torch.zeros(4)}, "attention sinks"),
    "not causal": ({}, {"is_causal": False}, "power attention is causal"),
    "paged": ({}, {"read_index": []}, "does not do paged caches"),
    "weights": ({}, {"output_attentions": True}, "output_attentions"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_power_attention_does_not_do(case: str) -> None:
    fields, inputs, message = REFUSED[case]
    model = use_power_attention(build(**fields)).train()
    with pytest.raises(InputError, match=message):
        model(tokens(), **inputs)


def test_chunked_attention() -> None:
    kinds = ["chunked_attention", "full_attention", "chunked_attention"]
    experts = {"num_local_experts": 2, "intermediate_size_mlp": 32, "interleave_moe_layer_step": 5}
    config = transformers.Llama4TextConfig(
        **SHAPE | experts | {"attention_chunk_size": 6, "layer_types": kinds, "no_rope_layers": [1, 0, 1]}
    )
    model = transformers.Llama4ForCausalLM(config).eval()
    before = model(tokens()).logits
    use_power_attention(model, layers=[0])
    with pytest.raises(InputError, match="does not do chunked attention: leave the layer out"):
        model(tokens())
    use_power_attention(model, layers=[1])
    assert (model(tokens()).logits - before)[:, -1].abs().max() > 1e-4


def test_what_caches_do_not_do() -> None:
    gated, plain = powered(gated=True), powered()
    with pytest.raises(InputError, match=rf"use {CACHE}=PowerCache\(model\)"):
        gated.generate(tokens(), max_new_tokens=3)
    with pytest.raises(InputError, match="static cache"):
        plain.generate(tokens(), max_new_tokens=3, cache_implementation="static")
    with pytest.raises(ValueError, match=r"cannot forget|requires a cache that can be cropped"):
        plain.generate(
            tokens(1), max_new_tokens=6, prompt_lookup_num_tokens=2, **{CACHE: PowerCache(plain)}, use_cache=True
        )
    with pytest.raises(InputError, match="packed sequences do not go on from a cache"):
        plain(tokens(1), cu_seq_lens_q=torch.tensor([0, 5, 37]), **{CACHE: PowerCache(plain)})
    if CACHE == "past_key_values":
        with pytest.raises(InputError, match="calls all others past_key_values"):
            plain(tokens(), cache=PowerCache(plain))
    with pytest.raises(InputError, match="LlamaForCausalLM has no power attention"):
        PowerCache(build())
    with pytest.raises(InputError, match="keeps no keys and values"):
        build()(tokens(), **{CACHE: PowerCache(plain)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"p": 5}, "p must be 1, 2, 3 or 4, and is 5"),
        ({"impl": "flash"}, "impl must be auto, reference, recurrent, torch, triton, and is 'flash'"),
        ({"layers": [3]}, r"layers must be some of 0 to 2, and are \[3\]"),
        ({"layers": []}, "layers must be some of 0 to 2"),
        ({"layers": 1}, "layers must be some of 0 to 2, and are 1"),
        ({"layers": [None, 1]}, r"layers must be some of 0 to 2, and are \[null, 1\]"),
        ({"layers": [True]}, r"layers must be some of 0 to 2, and are \[true\]"),
        ({"p": 2.0}, "p must be 1, 2, 3 or 4, and is 2.0"),
        ({"p": "2"}, "p must be 1, 2, 3 or 4, and is '2'"),
        ({"chunk_size": 0}, "chunk_size must be an integer of at least 1 and below 2.31, and is 0"),
        ({"gated": "no"}, "gated must be True or False, and is 'no'"),
    ],
)
def test_settings_that_there_are_not(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        use_power_attention(build(), **settings)


def test_models_of_other_kinds() -> None:
    with pytest.raises(InputError, match="model must be a PreTrainedModel of transformers, and is a Linear"):
        use_power_attention(nn.Linear(2, 2))  # type: ignore[type-var]
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9))
    with pytest.raises(InputError, match="GPT2LMHeadModel has no attention of Llama's kind"):
        use_power_attention(gpt2)
    small = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2, "vocab_size": 9}
    encoder = transformers.T5ForConditionalGeneration(transformers.T5Config(**small, decoder_start_token_id=0))
    with pytest.raises(InputError, match="is no plain text decoder"):
        use_power_attention(encoder)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    import powerplan.models

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find_spec(name))
    with pytest.raises(ImportError, match=r"PowerCache needs transformers, .* pip install 'transformers>=5\.5'"):
        _ = powerplan.models.PowerCache
