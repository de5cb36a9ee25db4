"""Text decoders that transformers has within wrappers alone: to the digit, those of their default and of odd sizes."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
from hf_decoders import Settings, mixers_by_layer, odd_settings, require, stored_elements, written
from hf_meta import on_meta

from powerplan.accounting import Accounting
from powerplan.errors import InputError
from powerplan.ffn import MoE
from powerplan.huggingface.towers import FAMILIES
from powerplan.load import LoadedModel
from powerplan.mixers import Attention

Read = Callable[[Settings], LoadedModel]

FULL, SLIDING = "full_attention", "sliding_attention"
NEEDED: dict[str, Settings] = {
    "chameleon": {"vocabulary_map": {}},
    "deepseek_ocr2_text": {"num_experts_per_tok": 3, "mlp_layer_types": ["dense", "sparse", "sparse", "dense"]},
    "hunyuan_vl_text": {"head_dim": 8},
    "qwen3_omni_moe_text": {"head_dim": 128},
    "step3p5": {
        "layer_types": [FULL, SLIDING, SLIDING, FULL],
        "num_sliding_attention_heads": 8,
        "sliding_window": 9,
        "mlp_layer_types": ["dense", "sparse", "sparse", "dense"],
    },
}
"""What a decoder cannot be built without, or what tells it from others; lists are cut to its layers."""


def text_model(config: Any) -> Any:
    """Return the text model of a config of transformers, without weights and without an LM head."""
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    name = type(config).__name__.replace("Config", "Model")
    found = [
        value for key, value in vars(module).items() if key in (name, name.replace("TextModel", "ThinkerTextModel"))
    ]
    with on_meta():
        return found[0](config)


def stored(model: Any, config: Any) -> int:
    """Return the elements of a text model and of the LM head that it would have."""
    images = sum(weight.numel() for name, weight in model.named_parameters() if name.startswith("vqmodel."))
    head = 0 if getattr(config, "tie_word_embeddings", False) else config.vocab_size * config.hidden_size
    return stored_elements(model) - images + head


@pytest.mark.transformers
@pytest.mark.parametrize("kind", ["default", "odd", "odd, flags"])
@pytest.mark.parametrize("model_type", [*sorted(FAMILIES), "mistral4"])
def test_parameters(transformers: Any, torch: Any, read: Read, model_type: str, kind: str) -> None:
    require(transformers, model_type)
    if (model_type, kind) == ("deepseek_ocr2_text", "default"):
        pytest.skip("transformers builds no model of its defaults")
    config_class = transformers.CONFIG_MAPPING[model_type]
    settings = {} if kind == "default" else odd_settings(config_class, model_type, flip=kind == "odd, flags")
    needed = NEEDED.get(model_type, {})
    if kind == "default":
        needed = {key: value for key, value in needed.items() if not isinstance(value, list)}
    count = settings.get("num_hidden_layers")
    needed = {key: value[:count] if isinstance(value, list) else value for key, value in needed.items()}
    config = config_class(**(settings | needed))
    built = stored(text_model(config), config)
    for form in ("whole", "diff"):
        loaded = read(written(config, form) | {"model_type": model_type})
        assert Accounting(loaded.spec).total_parameters.with_embeddings == built, form
        assert not [note for note in loaded.notes if "not known" in note]


KINDS = [FULL if index % 4 == 0 else SLIDING for index in range(48)]
STEP: Settings = {
    "architectures": ["Step3p5ForCausalLM"],
    "model_type": "step3p5",
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 2.0,
        "original_max_position_embeddings": 131_072,
        "low_freq_factor": 1.0,
        "high_freq_factor": 32.0,
    },
    "yarn_only_types": [FULL],
    "hidden_size": 4096,
    "intermediate_size": 11_264,
    "num_hidden_layers": 45,
    "max_position_embeddings": 262_144,
    "vocab_size": 128_896,
    "use_qk_norm": True,
    "moe_layers_enum": ",".join(map(str, range(3, 45))),
    "num_attention_heads": 64,
    "num_attention_groups": 8,
    "head_dim": 128,
    "use_moe": True,
    "moe_num_experts": 288,
    "moe_top_k": 8,
    "moe_intermediate_size": 1280,
    "share_expert_dim": 1280,
    "use_moe_router_bias": True,
    "layer_types": KINDS,
    "use_head_wise_attn_gate": True,
    "sliding_window": 512,
    "attention_other_setting": {
        "attention_type": SLIDING,
        "num_attention_heads": 96,
        "num_attention_groups": 8,
        "head_dim": 128,
        "true_head_dim": 128,
    },
    "swiglu_limits": [0.0] * 48,
    "num_nextn_predict_layers": 3,
    "partial_rotary_factors": [0.5 if kind == FULL else 1.0 for kind in KINDS],
    "rope_theta": [5_000_000.0 if kind == FULL else 10_000.0 for kind in KINDS],
    "zero_centered": True,
    "sink": False,
}


def test_step_3_5_flash_as_published(read: Read) -> None:
    """197 billion parameters, as mlx-lm's model has to the digit; full attention in every fourth layer."""
    loaded = read(STEP)
    assert Accounting(loaded.spec).total_parameters.with_embeddings == 196_956_130_368
    full = Attention(heads=64, kv_heads=8, head_dim=128, qk_norm="head", output_gate="head")
    sliding = Attention(heads=96, kv_heads=8, head_dim=128, qk_norm="head", output_gate="head", window=512)
    assert mixers_by_layer(loaded.spec) == [full if index % 4 == 0 else sliding for index in range(45)]
    assert loaded.notes == ("multi-token-prediction layers (num_nextn_predict_layers) are not counted",)


def test_rope_of_step_is_that_of_each_layer(read: Read) -> None:
    spec = read(STEP).spec
    full, sliding = spec.rope_at(4), spec.rope_at(5)
    assert full is not None
    assert sliding is not None
    assert (full.theta, full.partial, sliding.theta, sliding.partial) == (5e6, 0.5, 1e4, 1)
    assert full.scaling is not None
    assert sliding.scaling is None


def test_layers_of_step_with_experts(read: Read) -> None:
    def sparse(settings: Settings) -> list[int]:
        spec = read(STEP | settings).spec
        layers = [layer for group in spec.layers for layer in group.period * group.repeat]
        return [index for index, layer in enumerate(layers) if isinstance(layer.ffn, MoE)]

    assert sparse({}) == list(range(3, 45))
    assert sparse({"moe_layers_enum": [1, 2]}) == [1, 2]
    assert sparse({"moe_layers_enum": None}) == list(range(3, 45))
    assert sparse({"mlp_layer_types": ["dense"] * 44 + ["sparse"]}) == [44]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_types": KINDS[:44]}, "layer_types has 44 entries for 45 layers"),
        ({"layer_types": [FULL] * 44 + ["linear"]}, "layer_types[44] 'linear' is not supported for step3p5"),
        ({"sliding_window": None}, "layer 1 is sliding_attention, and there is no sliding_window"),
        ({"moe_layers_enum": "3,x"}, "moe_layers_enum must have numbers of layers with commas between them"),
        ({"mlp_layer_types": ["dense"]}, "mlp_layer_types must say dense or sparse for each of 45 layers"),
        ({"use_qk_norm": False}, "use_qk_norm false is not supported: no published Step has it"),
        (
            {"attention_other_setting": {"head_dim": 64}},
            "head_dim 64 is not the head_dim 128 of the other layers",
        ),
        ({"rope_theta": [1e4]}, "rope_theta must be a list with a number for each layer"),
        ({"partial_rotary_factors": [0.5]}, "partial_rotary_factors must be a list with a number for each layer"),
    ],
)
def test_refusals_of_step(read: Read, settings: Settings, message: str) -> None:
    with pytest.raises(InputError) as error:
        read(STEP | settings)
    assert message in str(error.value)


def test_tokens_of_molmo_that_are_input_alone(read: Read) -> None:
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 97}
    config = {"model_type": "molmo2_text", "num_hidden_layers": 2, "intermediate_size": 80} | sizes
    counts = [Accounting(read(config | {"additional_vocab_size": more}).spec).total_parameters for more in (0, 128)]
    assert counts[1].with_embeddings - counts[0].with_embeddings == 128 * 48
    assert counts[1].without_input_embedding == counts[0].without_input_embedding
