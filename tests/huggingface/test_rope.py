"""RoPE of config files: what every decoder of transformers rotates by, in every layer, and every way to write it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hf_decoders import Settings, odd_settings, require, written

from powerplan.errors import InputError
from powerplan.huggingface import FAMILIES
from powerplan.load import LoadedModel
from powerplan.rope import LinearScaling, Llama3Scaling, Rope, YarnScaling
from powerplan.spec import ModelSpec

pytestmark = pytest.mark.transformers

Read = Callable[[Settings], LoadedModel]
TOKENS = 8

auto = pytest.importorskip("transformers.models.auto.modeling_auto")
DECODERS = sorted(name for name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in FAMILIES)

EQUAL_HEADS: Settings = {"num_key_value_heads": 6}
MORE: dict[str, Settings] = {
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32"), EQUAL_HEADS),
    **dict.fromkeys(("glm_moe_dsa", "longcat_flash", "minicpm3", "sarvam_mla", "youtu"), EQUAL_HEADS),
    "codegen": {"n_embd": 64, "n_head": 4, "rotary_dim": 8},
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "gptj": {"rotary_dim": 4},
    # Its class has rotary_dim 64, as the published file has, and its code looks at partial_rotary_factor alone.
    "minimax_m3_vl_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5}
    },
    # Whole, the two take 15 s to draw.
    "phi4_multimodal": {"vision_config": {"num_hidden_layers": 2}, "audio_config": {"num_blocks": 1}},
}
"""What a family needs to run and not only to be built: as many keys as queries, heads of the rotated size, few layers
for pictures and sound."""

OTHER_LAYERS = ("dory", "falcon_h1", "hrm_text", "longcat_flash", "zamba2")
"""Families whose layers are several of ours."""


def run(transformers: Any, torch: Any, model_type: str, settings: Settings) -> tuple[Any, dict[int, list[Any]]]:
    """Return the config, and the cosines that each layer of the model of a family applied."""
    from hf_rope import Rotations

    require(transformers, model_type)
    config_class = transformers.CONFIG_MAPPING[model_type]
    odd = odd_settings(config_class, model_type, flip=False) | MORE.get(model_type, {})
    config = config_class(**(odd | settings))
    names = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    torch.manual_seed(0)
    model = getattr(transformers, names if isinstance(names, str) else names[0])(config).eval()
    rotations = Rotations(model)
    with torch.no_grad(), rotations:
        model(torch.randint(3, 90, (1, TOKENS)), use_cache=False)
    return config_class(**odd), rotations.by_layer


def compare(torch: Any, spec: ModelSpec, theirs: dict[int, list[Any]], *, by_order: bool = False) -> None:
    """Assert that the layers that transformers rotates are those of the spec, and turn by the same angles."""
    from hf_rope import sorted_cosines

    from powerplan.models.rope import rope_cos_sin

    layers = [layer for group in spec.layers for layer in group.period * group.repeat]
    ropes = {index: spec.rope_at(index) for index, layer in enumerate(layers) if layer.mixer and layer.mixer.entry}
    ours = {index: rope for index, rope in ropes.items() if rope is not None and spec.position_embeddings is None}
    if by_order:
        assert bool(ours) == bool(theirs)
        theirs = dict(zip(ours, theirs.values(), strict=False))
    else:
        assert set(ours) == set(theirs)
    for index in theirs:
        mixer: Any = layers[index].mixer
        dim = getattr(mixer, "qk_rope_head_dim", None) or mixer.head_dim
        cosines, _ = rope_cos_sin(0, TOKENS, dim, torch.device("cpu"), ours[index])
        # Compressed entries of DeepSeek V4 are fewer than tokens, and stand at positions of their own.
        whole = [applied for applied in theirs[index] if TOKENS in applied.shape[:-1]]
        assert whole
        for applied in whole:
            torch.testing.assert_close(
                sorted_cosines(applied, TOKENS).float(), cosines.sort(-1).values, rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("model_type", DECODERS)
def test_every_decoder(transformers: Any, torch: Any, read: Read, model_type: str) -> None:
    config, theirs = run(transformers, torch, model_type, {})
    specs = [read(written(config, form)).spec for form in ("whole", "diff")]
    assert specs[0].rope == specs[1].rope
    assert specs[0].trained_context == specs[1].trained_context
    compare(torch, specs[0], theirs, by_order=model_type in OTHER_LAYERS)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
BASE = {"rope_theta": 500_000.0}
FULL_AND_SLIDING = {"full_attention": LLAMA3 | BASE, "sliding_attention": {"rope_type": "default", "rope_theta": 77.0}}
LONG = {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 4.0, 6.0, 8.0]}

FILES: dict[str, tuple[str, Settings]] = {
    "base": ("llama", BASE),
    "rope_scaling": ("llama", BASE | {"rope_scaling": LLAMA3}),
    "rope_scaling, of old": ("llama", {"rope_scaling": {"type": "linear", "factor": 2.5}}),
    "rope_parameters": ("llama", {"rope_parameters": YARN | BASE}),
    "rope_parameters without a base": ("mixtral", {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    "both, of which rope_scaling holds": ("qwen2", {"rope_scaling": YARN, "rope_parameters": LLAMA3 | BASE}),
    "a base beside rope_parameters": ("qwen3", {"rope_theta": 77.0, "rope_parameters": YARN}),
    "yarn with all": ("llama", {"rope_scaling": YARN | {"beta_fast": 16, "beta_slow": 2, "attention_factor": 1.25}}),
    "yarn, untruncated": ("gpt_oss", {"rope_scaling": YARN | {"truncate": False}, "rope_theta": 150_000}),
    "yarn, mscale": ("llama", {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.1}}),
    "yarn without an original context": ("mistral", {"rope_scaling": {"type": "yarn", "factor": 4.0}}),
    "dynamic": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 4}),
    "dynamic with alpha": ("hunyuan_v1_dense", {"rope_scaling": {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}}),
    "longrope": ("phi3", {"rope_scaling": LONG, "original_max_position_embeddings": 16, "partial_rotary_factor": 1.0}),
    "longrope, long": ("phi3", {"rope_scaling": LONG, "original_max_position_embeddings": 4}),
    "partial": ("phi", {"partial_rotary_factor": 0.75}),
    "partial, within": ("stablelm", {"rope_parameters": BASE | {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 77}),
    "gpt_neox, scaled": ("gpt_neox", {"rotary_pct": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}}),
    "gemma3": ("gemma3_text", {"rope_theta": 77.0, "rope_local_base_freq": 33.0}),
    "gemma3, scaled": ("gemma3_text", {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}),
    "gemma3, by layer type": ("gemma3_text", {"rope_parameters": FULL_AND_SLIDING}),
    "gemma4": ("gemma4_text", {"rope_parameters": FULL_AND_SLIDING}),
    "modernbert": ("modernbert-decoder", {"global_rope_theta": 77.0, "local_rope_theta": 33.0}),
    "olmo3": ("olmo3", BASE | {"rope_scaling": YARN}),
    "nope": ("smollm3", {"no_rope_layers": [0, 1, 0]}),
    "nope, by interval": ("smollm3", {"no_rope_layer_interval": 2}),
    "layer_rope_theta": ("granite_swa", {"layer_rope_theta": [77.0, 0, 33.0]}),
    "alibi": ("falcon", {"alibi": True}),
    "position_embedding_type": ("granitemoehybrid", {"position_embedding_type": "rope"}),
    "use_mem_rope": ("zamba2", {"use_mem_rope": True}),
    "rotary_dim": ("gptj", {"rotary_dim": 6}),
    "rotary_dim of MiniMax": ("minimax_m2", {"rotary_dim": 4, "head_dim": 8}),
    "deepseek_v4": ("deepseek_v4", {"compress_rope_theta": 77.0, "rope_theta": 33.0}),
    "yarn by DeepSeek's name": ("sarvam_mla", {"rope_scaling": YARN | {"rope_type": None, "type": "deepseek_yarn"}}),
    "latent": ("deepseek_v3", {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
}


@pytest.mark.parametrize("case", FILES)
def test_files(transformers: Any, torch: Any, read: Read, case: str) -> None:
    model_type, settings = FILES[case]
    config, theirs = run(transformers, torch, model_type, settings)
    derived = ("rope_parameters", "no_rope_layers")
    plain = {key: value for key, value in written(config, "diff").items() if key not in derived}
    loaded = read(plain | settings)
    assert not [note for note in loaded.notes if "RoPE" in note]
    compare(torch, loaded.spec, theirs, by_order=model_type in OTHER_LAYERS)


SCALINGS: dict[str, Settings] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 3.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "yarn": {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 4096},
    "yarn, few pairs": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8},
    "yarn, mscale": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "longrope": {
        "rope_type": "longrope",
        "original_max_position_embeddings": 4096,
        "short_factor": [1 + i / 9 for i in range(32)],
        "long_factor": [2.0 + i for i in range(32)],
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    "proportional, factor": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "factor": 4.0},
}


@pytest.mark.parametrize("context", [512, 20_000, 300_000])
@pytest.mark.parametrize("case", SCALINGS)
def test_frequencies_are_those_of_transformers(
    transformers: Any, torch: Any, read: Read, case: str, context: int
) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    from powerplan.models.rope import frequencies

    sizes = {"vocab_size": 99, "hidden_size": 512, "intermediate_size": 99, "num_attention_heads": 8}
    settings = sizes | {"num_hidden_layers": 1, "head_dim": 64, "max_position_embeddings": 16_384}
    settings |= {"rope_parameters": SCALINGS[case] | {"rope_theta": 300_000.0}}
    config = transformers.LlamaConfig(**json.loads(json.dumps(settings)))
    plain = LlamaRotaryEmbedding.compute_default_rope_parameters
    function = ROPE_INIT_FUNCTIONS.get(SCALINGS[case]["rope_type"])
    expected, scale = plain(config) if function is None else function(config, torch.device("cpu"), seq_len=context)
    rope = read(settings | {"model_type": "llama"}).spec.rope
    assert isinstance(rope, Rope)
    torch.testing.assert_close(frequencies(rope, 64, context, torch.device("cpu")), expected, rtol=2e-6, atol=0)
    assert rope.attention_scale == pytest.approx(scale, rel=1e-12)


SIZES: Settings = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
}


DBRX: Settings = {"ffn_config": {"ffn_hidden_size": 24}, "intermediate_size": None}


@pytest.mark.parametrize(
    ("file", "rope", "context"),
    [
        ({"model_type": "llama", "max_position_embeddings": 4096}, Rope(), 4096),
        ({"model_type": "llama", "max_sequence_length": 2048, "rope_theta": 5e5}, Rope(theta=5e5), 2048),
        ({"model_type": "mistral"}, Rope(), 131_072),
        ({"model_type": "qwen", "seq_length": 8192, "max_position_embeddings": 32_768}, Rope(), 8192),
        ({"model_type": "qwen", "rotary_emb_base": 1_000_000}, Rope(theta=1e6), None),
        ({"model_type": "internlm2", "rope_theta": 1e6, "max_position_embeddings": 32_768}, Rope(theta=1e6), 32_768),
        ({"model_type": "internlm", "rotary": {"base": 5e4, "type": "dynamic"}}, Rope(theta=5e4), None),
        ({"model_type": "baichuan", "model_max_length": 4096}, (), 4096),
        ({"model_type": "baichuan", "hidden_size": 4096, "num_attention_heads": 32}, Rope(), None),
        (
            {"model_type": "chatglm", "num_layers": 4, "seq_length": 131_072, "rope_ratio": 500},
            Rope(theta=5e6, partial=0.5),
            131_072,
        ),
        ({"model_type": "llama", "max_position_embeddings": 10**30}, Rope(), None),
        ({"model_type": "llama", "max_position_embeddings": -1}, Rope(), None),
        ({"model_type": "llama", "max_position_embeddings": 4096.0}, Rope(), 4096),
        ({"model_type": "dbrx", "attn_config": {"rope_theta": 5e5, "kv_n_heads": 2}, **DBRX}, Rope(theta=5e5), 2048),
        ({"model_type": "bloom", "seq_length": 2048, "intermediate_size": None}, (), 2048),
        ({"model_type": "jamba", "num_hidden_layers": 8}, (), 262_144),
        ({"model_type": "gpt2", "max_position_embeddings": 64, "intermediate_size": None}, None, None),
        (
            {"model_type": "transformer", "num_attention_heads": None, "num_heads": 8, "rope_theta": 5e5},
            Rope(theta=5e5),
            None,
        ),
        ({"model_type": "forgetting_transformer", "num_attention_heads": None, "num_heads": 8}, (), None),
        ({"model_type": "retnet", "num_attention_heads": None, "num_heads": 8}, Rope(), None),
        (
            {
                "model_type": "gla",
                "num_attention_heads": None,
                "num_heads": 8,
                "attn": {"layers": [1], "num_heads": 8, "rope_theta": 5e4},
            },
            Rope(theta=5e4),
            None,
        ),
        (
            {"model_type": "llama", "rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}} | BASE,
            Rope(theta=5e5, scaling=Llama3Scaling(factor=8, original_context=8192)),
            2048,
        ),
        (
            {"model_type": "cohere2", "sliding_window": 16, "sliding_window_pattern": 4},
            (Rope(in_layers=(0, 1, 2)),),
            8192,
        ),
        (
            {"model_type": "gemma3_text", "sliding_window_pattern": 3, "sliding_window": 16},
            (Rope(theta=1_000_000, in_layers=(2,)), Rope()),
            131_072,
        ),
        (
            {"model_type": "qwen2_vl", "rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}},
            Rope(theta=1_000_000),
            32_768,
        ),
        ({"model_type": "olmo_hybrid", "rope_parameters": {"rope_theta": None, "rope_type": "default"}}, (), 65_536),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_what_a_file_says(read: Read, file: Settings, rope: Any, context: int | None) -> None:
    spec = read(SIZES | file).spec
    assert spec.rope == rope
    assert spec.trained_context == context


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"rope_theta": "10k"}, "rope_theta must be a number above 1, and is '10k'"),
        ({"rope_theta": -1}, "rope_theta must be a number above 1, and is -1"),
        ({"rope_theta": 1e300}, "rope_theta must be a number above 1, and is 1e+300"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be an object, and is 'yarn'"),
        (
            {"rope_scaling": {"type": "linear", "factor": 0.5}},
            "rope_scaling.factor must be a number of at least 1, and",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": True}},
            "rope_scaling.factor must be a number of at least 1, and",
        ),
        (
            {"rope_scaling": LLAMA3 | {"low_freq_factor": 8.0}},
            "rope_scaling.high_freq_factor: 4 is less than low_freq_factor 8",
        ),
        (
            {"rope_scaling": YARN | {"original_max_position_embeddings": "4k"}},
            "rope_scaling.original_max_position_embeddings must be a number above 0, and is '4k'",
        ),
        (
            {"rope_scaling": LONG | {"short_factor": [1, 0]}},
            "rope_scaling.short_factor must be a list of numbers above 0",
        ),
        ({"rope_parameters": {"full_attention": 5}}, "rope_parameters.full_attention must be an object, and is 5"),
        ({"rope_scaling": {"type": 5}}, "rope_scaling.type must be a word, and is 5"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor must be a share up to 1, and is 1.5"),
        ({"rotary_dim": "all"}, "rotary_dim must be a number of features, and is 'all'"),
        ({"rotary_dim": 10**400}, "rotary_dim must be a number of features, and is 1000"),
        ({"max_position_embeddings": 4096.5}, "max_position_embeddings must be a length in tokens, and is 4096.5"),
        ({"max_position_embeddings": "4k"}, "max_position_embeddings must be a length in tokens, and is '4k'"),
        ({"layer_rope_theta": [1e4]}, "layer_rope_theta must be a list with a number for each layer"),
        ({"layer_rope_theta": 5}, "layer_rope_theta must be a list with a number for each layer"),
    ],
)
def test_what_is_wrong_is_refused_with_its_place(read: Read, settings: Settings, problem: str) -> None:
    with pytest.raises(InputError) as error:
        read(SIZES | {"model_type": "llama"} | settings)
    assert str(error.value).partition("config.json:")[2].partition(": ")[2].startswith(problem)


@pytest.mark.parametrize(
    ("scaling", "note"),
    [
        ({"type": "spiral", "factor": 2}, "type 'spiral' is not known; known are default, dynamic, linear, llama3, "),
        ({"factor": 16.0}, "rope_scaling has a factor and no rope_type"),
        ({"type": "linear"}, "rope_scaling.rope_type needs factor, and there is none"),
        (LONG | {"short_factor": None}, "rope_scaling.rope_type needs short_factor, and there is none"),
    ],
)
def test_what_is_not_known_is_left_out_with_a_remark(read: Read, scaling: Settings, note: str) -> None:
    loaded = read(SIZES | {"model_type": "llama", "rope_scaling": scaling, "rope_theta": 5e5})
    assert loaded.spec.rope is None
    assert any(text.startswith(f"RoPE is left out: {note}") for text in loaded.notes)


PUBLISHED = json.loads((Path(__file__).parent.parent / "data" / "published_dense.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("name", "rope", "context"),
    [
        ("Phi-2", Rope(partial=0.4), 2048),
        ("GLM-4-9B", Rope(theta=5_000_000, partial=0.5), 131_072),
        ("Gemma-7B", Rope(), 8192),
        ("SmolLM3-3B", (Rope(theta=5_000_000, in_layers=tuple(i for i in range(36) if i % 4 != 3)),), 65_536),
        ("Command R7B", (Rope(theta=50_000, in_layers=tuple(i for i in range(32) if i % 4 != 3)),), 8192),
        ("OPT-1.3B", None, None),
    ],
)
def test_published_files(read: Read, name: str, rope: Any, context: int | None) -> None:
    spec = read(PUBLISHED[name]["config"]).spec
    assert (spec.rope, spec.trained_context) == (rope, context)


def test_the_context_that_a_scaling_is_made_for(read: Read) -> None:
    file = SIZES | {"model_type": "llama", "max_position_embeddings": 32_768}
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768}
    spec = read(file | {"rope_scaling": yarn}).spec
    assert spec.rope == Rope(scaling=YarnScaling(factor=4, original_context=32_768))
    assert (spec.trained_context, spec.reached_context) == (32_768, 131_072)
    spec = read(file | {"rope_scaling": {"type": "linear", "factor": 2.5}}).spec
    assert spec.rope == Rope(scaling=LinearScaling(factor=2.5))
    assert (spec.trained_context, spec.reached_context) == (32_768, 32_768)
    assert read(file).spec.reached_context == 32_768
