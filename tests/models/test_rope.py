"""Models of specs that are read from a config.json, with the weights of transformers' model: the same logits."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from kinds import MIXERS, spec_of
from msgspec.structs import replace
from torch import Tensor

from powerplan.documents import parse_json
from powerplan.errors import InputError
from powerplan.huggingface import read_config
from powerplan.models import Cache, build_layer, build_model
from powerplan.models.rope import frequencies, rope_cos_sin
from powerplan.rope import DynamicScaling, LongRopeScaling, Rope, YarnScaling
from powerplan.spec import LayerGroup

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.transformers

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"short_factor": [1.0 + i for i in range(8)], "long_factor": [9.0 + i for i in range(8)]}
LATENT: dict[str, Any] = {
    "kv_lora_rank": 24,
    "q_lora_rank": None,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "head_dim": 8,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "base": ("llama", {"rope_theta": 500_000.0}),
    "llama3": ("llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 32}}),
    "llama3, none mixed": (
        "llama",
        {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0, "original_max_position_embeddings": 32}},
    ),
    "linear": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "yarn": (
        "llama",
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}},
    ),
    "dynamic": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": 16}),
    "longrope": (
        "llama",
        {"rope_scaling": LONG | {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16}},
    ),
    "layers without": ("smollm3", {"no_rope_layers": [1, 0], "rope_theta": 77.0, "pad_token_id": 0}),
    "shares of a head": ("stablelm", {"partial_rotary_factor": 0.5, "rope_theta": 77.0, "layer_norm_eps": 1e-5}),
    "mscale": (
        "deepseek_v3",
        LATENT
        | {
            "rope_interleave": False,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 40.0,
                "original_max_position_embeddings": 16,
                "mscale": 0.7,
                "mscale_all_dim": 1.2,
            },
        },
    ),
}

NAMES = {
    "model.embed_tokens.": "embedding.",
    "model.norm.": "final_norm.",
    "model.layers.": "layers.",
    ".self_attn.kv_a_proj_with_mqa.": ".mixer.kv_down.",
    ".self_attn.kv_a_layernorm.": ".mixer.kv_norm.",
    ".self_attn.kv_b_proj.": ".mixer.kv_proj.",
    ".self_attn.": ".mixer.",
    ".input_layernorm.": ".before.0.",
    ".post_attention_layernorm.": ".before.1.",
    ".mlp.up_proj.": ".ffn.up.",
    ".mlp.gate_proj.": ".ffn.gate.",
    ".mlp.down_proj.": ".ffn.down.",
}
"""Where the weights of transformers' models stand in ours."""


def both(case: str) -> tuple[Any, Any]:
    """Return transformers' model of a case, and ours of its config.json with the same weights, in float64."""
    model_type, settings = MODELS[case]
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(model_type, **json.loads(json.dumps(SIZES | settings)))
    ).to(torch.float64)
    theirs.eval()
    file = json.dumps(SIZES | settings | {"model_type": model_type})
    spec, notes = read_config(parse_json(file, "config.json"), case)
    assert not notes
    ours = build_model(spec, dtype=torch.float64)
    weights: dict[str, Tensor] = {}
    for name, weight in theirs.state_dict().items():
        for old, new in NAMES.items():
            name = name.replace(old, new)
        weights[name] = weight
    ours.load_state_dict(weights)
    return theirs, ours


@pytest.mark.parametrize("case", MODELS)
def test_logits_are_those_of_transformers(case: str) -> None:
    theirs, ours = both(case)
    tokens = torch.randint(1, 61, (2, 64), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = theirs(tokens).logits, ours(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    plain = build_model(replace(ours.spec, rope=None), dtype=torch.float64)
    plain.load_state_dict(ours.state_dict())
    with torch.no_grad():
        assert (plain(tokens) - expected).abs().max() > 1e-2  # The check would notice.


@pytest.mark.parametrize("kind", ["attention", "power", "linear", "mla", "retnet"])
def test_decoding_rotates_as_a_whole_sequence_does(kind: str) -> None:
    spec = replace(spec_of(MIXERS[kind]), rope=Rope(theta=500, partial=0.5))
    torch.manual_seed(0)
    model = build_model(spec, dtype=torch.float64)
    tokens = torch.randint(spec.vocab_size, (1, 12))
    with torch.no_grad():
        whole, cache = model(tokens), Cache()
        parts = [model(tokens[:, :7], cache), *(model(tokens[:, at : at + 1], cache) for at in range(7, 12))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-6)


def test_layers_take_the_rope_of_their_position() -> None:
    one = spec_of(MIXERS["attention"])
    layers = (LayerGroup(repeat=3, mixer=MIXERS["attention"]),)  # type: ignore[arg-type]
    spec = replace(one, layers=layers, rope=(Rope(theta=77, in_layers=(1,)), Rope(theta=99, in_layers=(2,))))
    model: Any = build_model(spec, device="meta")
    assert [getattr(layer.mixer.rope, "theta", None) for layer in model.layers] == [None, 77, 99]
    assert build_layer(spec, 2, device="meta").mixer.rope.theta == 99  # type: ignore[union-attr]
    assert build_layer(spec, spec.layers[0].period[0], device="meta").mixer.rope is None  # type: ignore[union-attr]
    assert spec.rope_of(replace(spec.layers[0].period[0], norms=1)) == Rope(theta=99, in_layers=(2,))


def test_what_a_scaling_depends_on_the_context_for() -> None:
    cpu = torch.device("cpu")
    dynamic = Rope(scaling=DynamicScaling(factor=4, original_context=64))
    assert torch.equal(frequencies(dynamic, 16, 64, cpu), frequencies(Rope(), 16, 64, cpu))
    assert frequencies(dynamic, 16, 128, cpu)[-1] < frequencies(Rope(), 16, 128, cpu)[-1]
    long = LongRopeScaling(short_factor=(1,) * 4, long_factor=(2,) * 4, original_context=64, factor=2)
    assert torch.equal(frequencies(Rope(scaling=long), 8, 65, cpu), frequencies(Rope(), 8, 64, cpu) / 2)
    with pytest.raises(InputError, match="4 factors of LongRoPE for 8 pairs of features: heads of 16 with partial 1"):
        rope_cos_sin(0, 3, 16, cpu, Rope(scaling=long))


@pytest.mark.parametrize(
    "scaling",
    [
        YarnScaling(factor=4, original_context=16),
        DynamicScaling(factor=2, original_context=8),
        LongRopeScaling(short_factor=(1,) * 3, long_factor=(2,) * 3, original_context=8, factor=2),
    ],
)
def test_scaled_rope_compiles_as_one_graph(scaling: Any) -> None:
    layer = build_layer(replace(spec_of(MIXERS["attention"]), rope=Rope(scaling=scaling)))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for tokens in (4, 24):
        x = torch.randn(1, tokens, 16)
        torch.testing.assert_close(compiled(x), layer(x))
