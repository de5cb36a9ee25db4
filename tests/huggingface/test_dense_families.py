"""Dense families beyond what the default configs of transformers show: windows by layer, key spellings, refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hf_decoders import mixers_by_layer
from hf_meta import on_meta

from powerplan.accounting import Accounting
from powerplan.errors import InputError
from powerplan.load import LoadedModel
from powerplan.mixers import Attention, Power

Settings = dict[str, Any]
Read = Callable[[Settings], LoadedModel]

SIZES: Settings = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
}
GPT: Settings = {"vocab_size": 97, "n_embd": 48, "n_layer": 4, "n_head": 6}
FULL, SLIDING = "full_attention", "sliding_attention"


def parameters(loaded: LoadedModel) -> int:
    return Accounting(loaded.spec).total_parameters.with_embeddings


def windows(loaded: LoadedModel) -> list[int | None]:
    found = []
    for mixer in mixers_by_layer(loaded.spec):
        assert isinstance(mixer, Attention)
        found.append(mixer.window)
    return found


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"model_type": "cohere2", "sliding_window": 8}, [8, 8, 8, None]),
        ({"model_type": "cohere2", "sliding_window": 8, "sliding_window_pattern": 2}, [8, None, 8, None]),
        ({"model_type": "cohere_compass_text", "sliding_window": 8}, [None] * 4),
        ({"model_type": "cwm", "sliding_window": 8}, [None, 8, 8, 8]),
        ({"model_type": "exaone4", "sliding_window": 8, "sliding_window_pattern": "LLG"}, [8, 8, None, 8]),
        ({"model_type": "exaone4", "sliding_window": 8, "sliding_window_pattern": 2}, [8, None, 8, None]),
        ({"model_type": "exaone4", "sliding_window": None}, [None] * 4),
        ({"model_type": "granite_swa"}, [None, 128, 128, 128]),
        ({"model_type": "ministral", "head_dim": 8}, [4096] * 4),
        ({"model_type": "ministral3", "head_dim": 8}, [None] * 4),
        ({"model_type": "modernbert-decoder", "num_key_value_heads": None}, [None, 64, 64, None]),
        ({"model_type": "olmo3", "sliding_window": 8}, [8, 8, 8, None]),
        ({"model_type": "phi3", "sliding_window": 2047}, [2047] * 4),
        ({"model_type": "qwen2_vl_text", "use_sliding_window": True, "max_window_layers": 3}, [None, None, None, 4096]),
        ({"model_type": "smollm3", "sliding_window": 8, "use_sliding_window": True}, [None, None, None, 8]),
        ({"model_type": "smollm3", "sliding_window": 8}, [None] * 4),
        (
            {"model_type": "smollm3", "sliding_window": 8, "use_sliding_window": True, "no_rope_layers": [0, 1, 0, 1]},
            [8, None, 8, None],
        ),
        ({"model_type": "vaultgemma", "sliding_window": 8}, [8, None, 8, None]),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_windows(read: Read, config: Settings, expected: list[int | None]) -> None:
    assert windows(read(SIZES | config)) == expected


def test_windows_of_gpt_neo(read: Read) -> None:
    config: Settings = {"model_type": "gpt_neo", "vocab_size": 97, "hidden_size": 48, "num_layers": 4, "num_heads": 6}
    assert windows(read(config | {"attention_types": [[["global", "local"], 2]]})) == [None, 256, None, 256]
    stated = {"attention_types": [[["global"], 1], [["local"], 3]], "window_size": 16}
    assert windows(read(config | stated)) == [None, 16, 16, 16]


PUBLISHED: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent.parent / "data" / "published_dense.json").read_text(encoding="utf-8")
)
"""Keys of the config.json of published models, and their parameters: published ones, or counted by hand."""

SUPER_49B = [
    *[(8, 2.625)] + [(8, 5.25)] * 5 + [(None, 2.625)] * 2 + [(8, 5.25)] * 3 + [(None, 3.28125)] + [(8, 5.25)] * 30,
    *[(None, width) for width in (1.3125, 2.625, 2.625, 1.3125, 5.25, 1.3125, 2.625, 1.3125, 1.3125, 1.3125)],
    *[(8, 5.25)] + [(None, width) for width in (1.3125, 1.0, 1.0, 1.3125, 1.0, 1.0, 1.0, 1.3125, 1.3125, 0.5, 0.5)],
    *[(None, width) for width in (1.0, 1.0, 0.5, 0.5, 1.0, 0.5, 0.5)] + [(8, 5.25)] * 9,
]
"""Heads to a key/value head, None where a layer has no attention, and ffn_mult of each layer of Nemotron-Super-49B."""


def nas(blocks: list[tuple[Settings, Settings]], **settings: Any) -> Settings:
    pairs = [{"attention": attention, "ffn": ffn} for attention, ffn in blocks]
    sizes = {"vocab_size": 97, "hidden_size": 48, "num_attention_heads": 6, "num_hidden_layers": len(blocks)}
    return {"model_type": "nemotron-nas"} | sizes | settings | {"block_configs": pairs}


def test_blocks_of_nemotron_super(read: Read) -> None:
    blocks = [
        (
            {"n_heads_in_group": group, "no_op": group is None, "window_length": None},
            {"ffn_mult": width, "no_op": False, "replace_with_linear": False},
        )
        for group, width in SUPER_49B
    ]
    loaded = read(nas(blocks, vocab_size=128_256, hidden_size=8192, num_attention_heads=64))
    assert parameters(loaded) == 49_867_145_216
    assert len(mixers_by_layer(loaded.spec)) == 49
    assert loaded.notes == ()


def test_blocks_that_are_projections_or_missing(read: Read) -> None:
    """hidden 48, 6 heads of 8; ffn_mult 8 makes 2 x 8 x 48 / 3 = 256 wide. Each norm has 48."""
    attention = 2 * 48 * 48 + 2 * 48 * 3 * 8 + 48
    mlp = 3 * 48 * 256 + 48
    whole: tuple[Settings, Settings] = ({"n_heads_in_group": 2}, {"ffn_mult": 8})
    blocks = [whole, ({"no_op": True}, {"no_op": True}), ({"replace_with_linear": True}, {"ffn_mult": 8})]
    loaded = read(nas(blocks))
    assert parameters(loaded) == 2 * 97 * 48 + 48 + 2 * mlp + attention + 48 * 48 + 48
    assert loaded.spec.layer_count == 2


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(read: Read, name: str) -> None:
    loaded = read(PUBLISHED[name]["config"])
    assert parameters(loaded) == PUBLISHED[name]["parameters"]
    assert not [note for note in loaded.notes if "not known" in note]


def test_brumby_has_power_attention(read: Read) -> None:
    loaded = read(PUBLISHED["Brumby-14B, as Qwen3-14B and 40 x 8 gates of 5120"]["config"])
    (mixer,) = loaded.spec.mixers()
    assert isinstance(mixer, Power)
    assert (mixer.p, mixer.gated, mixer.qk_norm, mixer.heads, mixer.kv_heads) == (2, True, "head", 40, 8)
    assert any("degree 2" in note for note in loaded.notes)


def test_wrappers_with_the_keys_of_their_text_decoder_at_the_top(read: Read) -> None:
    loaded = read(SIZES | {"model_type": "qwen2_vl", "vision_config": {"depth": 2}})
    assert parameters(loaded) == parameters(read(SIZES | {"model_type": "qwen2_vl_text"}))
    assert loaded.notes == ("qwen2_vl: the text decoder alone is counted, other towers and projectors are not",)
    inner = SIZES | {"model_type": "qwen2_vl_text"}
    assert parameters(read({"model_type": "qwen2_vl", "text_config": inner})) == parameters(loaded)
    with pytest.raises(InputError, match="vision_tower true is not known"):
        read(SIZES | {"model_type": "qwen2_5_vl", "vision_tower": True})


def test_multiquery_heads_of_gpt2(read: Read) -> None:
    (mixer,) = read(GPT | {"model_type": "gpt2", "attention_head_type": "multiquery"}).spec.mixers()
    assert isinstance(mixer, Attention)
    assert (mixer.heads, mixer.kv_heads) == (6, 1)
    assert parameters(read(GPT | {"model_type": "gpt2", "attention_head_type": "multihead"})) == parameters(
        read(GPT | {"model_type": "gpt2"})
    )


def test_passes_of_hrm_have_caches_of_their_own(read: Read) -> None:
    """L cycles of 2, H cycles of 3: the low stack runs 6 times, the high one 3 times; each has its weights once."""
    config: Settings = SIZES | {"model_type": "hrm_text", "head_dim": 8, "H_cycles": 3, "L_cycles": 2}
    loaded = read(config | {"num_key_value_heads": None})
    layers = [layer for group in loaded.spec.layers for _ in range(group.repeat) for layer in group.period]
    assert [layer.tied for layer in layers] == [False] * 4 + [True] * 4 + [False] * 4 + [True] * 24
    stated = {"num_layers_per_stack": 4, "num_hidden_layers": 36, "num_key_value_heads": None}
    assert read(config | stated).spec == loaded.spec


def test_apertus_whose_head_has_fewer_rows_than_its_embedding(read: Read) -> None:
    """Apertus 1.5 8B: 266,752 tokens, of which 131,072 are output, and 135,680 rows that are looked up alone."""
    text: Settings = SIZES | {"model_type": "apertus1p5_text", "vocab_size": 266_752, "output_vocab_size": 131_072}
    loaded = read({"model_type": "apertus1p5", "text_config": text})
    whole = read(text | {"output_vocab_size": None})
    assert read(text | {"output_vocab_size": 266_752}).spec == whole.spec
    assert (loaded.spec.vocab_size, whole.spec.vocab_size) == (131_072, 266_752)
    assert parameters(whole) - parameters(loaded) == 135_680 * 48
    flops = [Accounting(spec).weight_flops_per_token for spec in (whole.spec, loaded.spec)]
    assert flops[0] - flops[1] == 2 * 135_680 * 48 * Accounting(whole.spec).convention.lm_head
    assert "apertus1p5_text: 135,680 of 266,752 tokens are input alone" in loaded.notes


def test_differential_attention(read: Read) -> None:
    """Queries of 6 heads of 8 see keys of 8 and values of 16; the cache is that of plain heads."""
    loaded, plain = read(SIZES | {"model_type": "diffllama"}), read(SIZES | {"model_type": "llama"})
    counted, reference = Accounting(loaded.spec).row(2048), Accounting(plain.spec).row(2048)
    assert counted.state_flops_per_token * 2 == reference.state_flops_per_token * 3
    assert counted.state_elements == reference.state_elements
    assert parameters(loaded) == parameters(plain) + 4 * 4 * 8
    with pytest.raises(InputError, match="differential: needs pairs of key/value heads, and there are 3"):
        read(SIZES | {"model_type": "diffllama", "num_key_value_heads": 3})


def test_n_embed_stands_for_hidden_size(read: Read) -> None:
    older = {"model_type": "bloom", "vocab_size": 97, "n_embed": 48, "n_layer": 2, "n_head": 6}
    newer = {"model_type": "bloom", "vocab_size": 97, "hidden_size": 48, "n_layer": 2, "n_head": 6}
    assert parameters(read(older)) == parameters(read(newer)) == parameters(read(older | newer))


def test_two_names_of_a_key_must_agree(read: Read) -> None:
    bloom = {"model_type": "bloom", "vocab_size": 97, "hidden_size": 48, "n_layer": 2, "num_attention_heads": 6}
    assert parameters(read(bloom | {"n_head": 6})) == parameters(read(bloom))
    with pytest.raises(InputError, match="num_attention_heads is 6, and n_head, its other name, 8"):
        read(bloom | {"n_head": 8})


REFUSALS: list[tuple[Settings, str]] = [
    (
        SIZES | {"model_type": "helium"},
        "head_dim 128 times 6 heads is not hidden_size 48, as Helium's output projection",
    ),
    (
        SIZES | {"model_type": "exaone4", "sliding_window_pattern": "LX"},
        "sliding_window_pattern must be an integer or a word of L and G, and is 'LX'",
    ),
    (SIZES | {"model_type": "iquestcoder", "use_sliding_window": True}, "transformers' IQuest-Coder has no windows"),
    (SIZES | {"model_type": "hunyuan_v1_dense", "use_cla": True}, "keys and values shared between layers"),
    (SIZES | {"model_type": "hunyuan_v1_dense", "num_experts": 8}, "num_experts above 1 is not supported"),
    (SIZES | {"model_type": "apertus", "qk_norm": False}, "qk_norm false is not supported"),
    (
        SIZES | {"model_type": "apertus1p5_text", "output_vocab_size": 98},
        "output_vocab_size 98 is more than vocab_size 97",
    ),
    (
        SIZES | {"model_type": "apertus1p5_text", "output_vocab_size": 90, "tie_word_embeddings": True},
        "output_vocab_size 90 is not the embedding's 97, which tie_word_embeddings needs",
    ),
    (SIZES | {"model_type": "phi3", "lm_head_bias": True}, "transformers' Phi-3 has no biases"),
    (SIZES | {"model_type": "llama", "add_cross_attention": True}, "decoders without cross-attention"),
    (SIZES | {"model_type": "gemma", "use_bidirectional_attention": True}, "powerplan counts causal attention"),
    (
        SIZES | {"model_type": "smollm3", "no_rope_layers": [1, 1], "use_sliding_window": True, "sliding_window": 8},
        "no_rope_layers has 2 entries for 4 layers",
    ),
    (SIZES | {"model_type": "doge", "is_moe": True}, "Doge's cross-domain experts are not counted"),
    (
        SIZES | {"model_type": "hrm_text", "head_dim": 8, "num_layers_per_stack": 3},
        "num_hidden_layers 4 is not 3 layers in 8 passes",
    ),
    (
        {"model_type": "bloom", "vocab_size": 97, "hidden_size": 48, "n_embed": 64, "n_layer": 2, "n_head": 6},
        "n_embed is 64 and hidden_size 48",
    ),
    (
        SIZES | {"model_type": "opt", "ffn_dim": 80, "word_embed_proj_dim": 32},
        "word_embed_proj_dim 32 is not supported: embeddings are as wide as hidden_size 48",
    ),
    (GPT | {"model_type": "gpt2", "attention_head_type": "grouped"}, "attention_head_type 'grouped' is not supported"),
    (GPT | {"model_type": "gpt_bigcode", "add_cross_attention": True}, "decoders without cross-attention"),
    (GPT | {"model_type": "gptj", "n_head": 5}, "hidden_size 48 is not a multiple of num_attention_heads 5"),
    (
        {"model_type": "gpt_neo", "vocab_size": 97, "hidden_size": 48, "num_layers": 4, "num_heads": 6},
        "attention_types make 24 layers, and num_layers is 4",
    ),
    (
        {"model_type": "gpt_neo", "num_layers": 4, "attention_types": [[["sparse"], 4]]},
        "attention_types must be pairs of kinds (global, local) and times, and has [['sparse'], 4]",
    ),
    ({"model_type": "mpt", "d_model": 48, "no_bias": False}, "no_bias false is not supported"),
    ({"model_type": "mpt", "d_model": 48, "expansion_ratio": 8}, "expansion_ratio must be 4"),
    ({"model_type": "mpt", "d_model": 48, "attn_config": {"alibi": False}}, "alibi false is not supported"),
    (
        {"model_type": "mpt", "d_model": 48, "attn_config": {"attn_type": "multiquery_attention"}},
        "attn_type 'multiquery_attention' is not supported",
    ),
    (SIZES | {"model_type": "minicpm", "num_experts": 8}, "experts of MiniCPM-MoE are not read"),
    (SIZES | {"model_type": "minicpm", "sparse_config": {"topk": 64}}, "sparse attention is not read"),
    (SIZES | {"model_type": "qwen", "no_bias": False}, "no_bias false is not supported"),
    (SIZES | {"model_type": "qwen", "intermediate_size": 81}, "intermediate_size 81 is odd"),
    (
        SIZES | {"model_type": "deci", "num_key_value_heads_per_layer": [2, 2]},
        "num_key_value_heads_per_layer has 2 entries for 4 layers",
    ),
    (
        SIZES | {"model_type": "deci", "num_key_value_heads_per_layer": [2, 2, 4, 2]},
        "num_key_value_heads_per_layer[2] is 4, which does not divide 6 heads",
    ),
    (nas([({"no_op": True}, {"no_op": True})]), "neither attention nor an MLP in any layer"),
    (nas([({"n_heads_in_group": 4}, {"ffn_mult": 8})]), "n_heads_in_group 4 does not divide num_attention_heads 6"),
    (nas([({"n_heads_in_group": 2}, {"ffn_mult": "8"})]), "ffn_mult must be a number from 0 to 1,000, and is '8'"),
    (nas([({"n_heads_in_group": 2, "window_length": 8}, {"ffn_mult": 8})]), "window_length 8 is not supported"),
    (nas([({"no_op": True}, {"replace_with_linear": True})]), "block_configs[0] has plain projections alone"),
    (nas([({"no_op": True}, {"ffn_mult": 8})], num_hidden_layers=2), "block_configs must be a list of 2 blocks"),
    (nas([]) | {"num_hidden_layers": 1, "block_configs": [{"ffn": {}}]}, "block_configs[0] has no object attention"),
    (SIZES | {"model_type": "chatglm", "position_encoding_2d": True}, "ChatGLM 1 is a prefix model"),
    (
        PUBLISHED["ChatGLM3-6B"]["config"] | {"vocab_size": 64},
        "vocab_size is 64, and padded_vocab_size, its other name, 65024",
    ),
    (PUBLISHED["ChatGLM3-6B"]["config"] | {"rmsnorm": False}, "rmsnorm false is not supported"),
    (
        SIZES | {"model_type": "brumby", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0},
        "power attention keeps no window",
    ),
]


@pytest.mark.parametrize(("config", "message"), REFUSALS, ids=[message[:40] for _, message in REFUSALS])
def test_refusals(read: Read, config: Settings, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        read(config)


TEXTS: dict[str, tuple[str, Settings]] = {
    "mllama": ("MllamaForConditionalGeneration", {"cross_attention_layers": [1, 3]}),
    "glm4v": ("Glm4vForConditionalGeneration", {}),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", {}),
    "qwen2_5_vl": ("Qwen2_5_VLForConditionalGeneration", {}),
    "qwen3_vl": ("Qwen3VLForConditionalGeneration", {"attention_bias": True}),
    "emu3": ("Emu3ForCausalLM", {"attention_bias": True}),
    "paligemma": ("PaliGemmaForConditionalGeneration", {"head_dim": 16}),
}
"""Wrappers, their class in transformers, and settings of the text decoder beside SIZES."""


@pytest.mark.transformers
@pytest.mark.parametrize("family", TEXTS)
def test_text_decoders_of_wrappers(transformers: Any, torch: Any, read: Read, family: str) -> None:
    class_name, settings = TEXTS[family]
    config_class = transformers.CONFIG_MAPPING[family]
    text = config_class().text_config.__class__(**SIZES, **settings, pad_token_id=0)
    config = config_class(text_config=text.to_dict())
    with on_meta():
        model = getattr(transformers, class_name)(config.text_config if family == "emu3" else config)
    names = (
        "model.language_model.",
        "model.text_model.",
        "model.embed_tokens.",
        "model.layers.",
        "model.norm.",
        "lm_head.",
    )
    built = sum(tensor.numel() for name, tensor in model.named_parameters() if name.startswith(names))
    assert parameters(read(config.to_dict() | {"text_config": config.text_config.to_dict()})) == built
