"""Lists of modules in quantization_config: what stays wide, and what has a format of its own."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from quantized import ATTENTION, COLUMNS, ELEMENTS, EXPERTS, GROUPS, LLAMA, MOE, WIDE, compressed, int4, read, stored

from powerplan.accounting import Accounting
from powerplan.cli import main

LAYERS = [f"model.layers.{layer}" for layer in range(4)]
# Modules that stay wide, and how many layers have quantized mixers and quantized experts.
LEFT_OUT: dict[str, tuple[list[str], int, int]] = {
    "the head": (["lm_head"], 4, 4),
    "attention by a glob": (["*self_attn*"], 0, 4),
    "attention by a regex": (["re:.*self_attn.*"], 0, 4),
    "attention as transformers names it": (["model.layers.*.self_attn"], 0, 4),
    "attention by its matrices": (
        [f"{layer}.self_attn.{name}_proj" for layer in LAYERS for name in "qkvo"],
        0,
        4,
    ),
    "attention in wrappers": (["re:.*language_model.model.layers.*self_attn.*"], 0, 4),
    "whole layers": (["model.layers.0", "model.layers.3.*"], 2, 2),
    "layers by a regex": ([r"re:model\.layers\.(0|3)\..*"], 2, 2),
    "the MLP": (["re:.*mlp.*"], 4, 0),
    "routers": (["re:.*mlp.gate$", "mlp.gate", "model.layers.0.mlp.gate"], 4, 4),
    "experts": ([f"{LAYERS[1]}.mlp.experts"], 4, 3),
    "experts one by one": (
        [f"{LAYERS[2]}.mlp.experts.{e}.{name}_proj" for e in range(8) for name in ("gate", "up", "down")],
        4,
        3,
    ),
    "other layers": (["model.layers.11", "model.layers.10.self_attn"], 4, 4),
    "other towers": (["re:.*vision.*self_attn.*", "model.visual.layers.0.self_attn", "mtp.layers.0"], 4, 4),
    "globs for each layer, as modelopt writes them": ([f"{layer}.self_attn*" for layer in LAYERS[1:]], 1, 4),
    "a glob of layers": (["model.layers.1*"], 3, 3),
    "all but experts": (
        ["re:.*self_attn.*", r"re:.*mlp\.(gate|up|gate_up|down)_proj.*", "re:.*shared_experts.*"],
        0,
        4,
    ),
    "a regex with classes": ([r"re:^model\.layers\.\d+\.self_attn\.[^.]+$"], 0, 4),
}


@pytest.mark.parametrize("name", LEFT_OUT)
@pytest.mark.parametrize("wrapped", [False, True])
def test_modules_that_stay_wide(name: str, wrapped: bool) -> None:
    ignore, mixers, experts = LEFT_OUT[name]
    if wrapped:
        ignore = [re.sub(r"^(re:\^?|)model\b", r"\1language_model.model", module) for module in ignore]
    spec, notes = read(MOE, compressed(**int4() | {"ignore": [*ignore, "lm_head"]}))
    assert notes == ()
    saved = Fraction(2) - Fraction(1, 2) - Fraction(2, 128)
    all_wide = 2 * Accounting(spec).total_parameters.with_embeddings
    assert stored(spec) == all_wide - saved * (mixers * ATTENTION + experts * EXPERTS)


def test_a_head_that_no_list_leaves_out_is_quantized() -> None:
    spec, _ = read(LLAMA, compressed(**int4() | {"ignore": []}))
    assert stored(spec) == ELEMENTS / 2 + GROUPS * 2 + WIDE - 2 * 256_000 + 128_000 + 2 * 2000
    tied, _ = read(LLAMA | {"tie_word_embeddings": True}, compressed(**int4() | {"ignore": []}))
    assert stored(tied) == ELEMENTS / 2 + GROUPS * 2 + WIDE - 2 * 256_000
    gptq, _ = read(LLAMA, {"quant_method": "gptq", "bits": 4, "lm_head": True})
    head = 128_000 + 2000 * 2.5 + 4 * 256
    assert stored(gptq) == ELEMENTS / 2 + GROUPS * 2.5 + 4 * COLUMNS + WIDE - 2 * 256_000 + head


def test_formats_of_single_modules() -> None:
    extra: dict[str, Any] = {f"{LAYERS[0]}.self_attn.{name}_proj": {"bits": 8} for name in "qkvo"}
    extra |= {f"{LAYERS[1]}.self_attn.{name}_proj": {"bits": 16, "data_type": "fp"} for name in "qkvo"}
    extra |= {f"{LAYERS[2]}.self_attn.{name}_proj": {"bits": 4, "group_size": 128} for name in "qkvo"}
    extra["lm_head"] = {"bits": 8}
    base = {"quant_method": "auto-round", "bits": 4, "group_size": 128, "extra_config": extra}
    spec, notes = read(MOE | {"tie_word_embeddings": False}, base)
    assert notes == ()
    total = Accounting(spec).total_parameters.with_embeddings
    four, eight = Fraction(1, 2) + Fraction(5, 256), 1 + Fraction(3, 128)
    quantized = four * (2 * ATTENTION + 4 * EXPERTS) + eight * (ATTENTION + 256_000)
    wide = total - 3 * ATTENTION - 4 * EXPERTS - 256_000
    assert stored(spec) == quantized + 2 * wide


def test_groups_with_targets_of_their_own() -> None:
    fp8 = {"targets": ["re:.*self_attn.*"], "weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
    nvfp4 = {"targets": ["re:.*mlp.experts.*"], "weights": {"num_bits": 4, "type": "float", "group_size": 16}}
    spec, notes = read(MOE, compressed(config_groups={"group_0": fp8, "group_1": nvfp4}))
    assert notes == ()
    assert spec.quantization is not None
    assert spec.quantization.method == "compressed-tensors fp8 and nvfp4"
    rows = 4 * (256 + 128 + 128 + 256)
    quantized = 4 * ATTENTION + 2 * rows + 4 * EXPERTS * Fraction(9, 16) + 4 * (4 * 8 * 3)
    wide = Accounting(spec).total_parameters.with_embeddings - 4 * (ATTENTION + EXPERTS)
    assert stored(spec) == quantized + 2 * wide


def test_experts_in_a_format_of_their_own() -> None:
    spec, _ = read(MOE, {"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"})
    blocks = 4 * (4 + 2 + 2 + 4)
    wide = Accounting(spec).total_parameters.with_embeddings - 4 * (ATTENTION + EXPERTS)
    assert stored(spec) == 4 * ATTENTION + 4 * blocks + 4 * EXPERTS * Fraction(17, 32) + 2 * wide


def test_matrices_of_several_formats_are_said() -> None:
    note = "matrices of mixers have several formats in the file: a part of a layer counts in that of most"
    spec, notes = read(LLAMA, {"quant_method": "awq", "bits": 4, "modules_to_not_convert": ["self_attn.o_proj"]})
    assert notes == (note,)
    assert stored(spec) == ELEMENTS / 2 + GROUPS * 2.5 + WIDE


def test_modules_in_block_to_quantize() -> None:
    blocks = [["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj"], ["self_attn.o_proj"]]
    spec, notes = read(LLAMA, {"quant_method": "gptq", "bits": 4, "modules_in_block_to_quantize": blocks})
    assert notes == ()
    columns, attention = 2 * 4 * 256, 2 * ATTENTION
    quantized = attention / 2 + attention // 128 * 2.5 + 4 * columns
    assert stored(spec) == quantized + 2 * (ELEMENTS - attention) + WIDE


def test_dynamic_of_gptq() -> None:
    spec, notes = read(LLAMA, {"quant_method": "gptq", "bits": 4, "dynamic": {r"-:.*\.self_attn\..*": {}}})
    assert notes == ()
    assert spec.quantization is not None
    assert [rule.parts for rule in spec.quantization.rules] == [("mlp",)]


def test_a_list_of_megabytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One entry for each matrix of each expert, as auto-round writes them: 36,096 in 2.7 MB."""
    sizes = {"hidden_size": 4096, "intermediate_size": 12_288, "moe_intermediate_size": 1536, "vocab_size": 151_936}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "num_hidden_layers": 94}
    experts = [f"model.layers.{i}.mlp.experts.{e}" for i in range(94) for e in range(128)]
    names = [f"{expert}.{matrix}_proj" for expert in experts for matrix in ("gate", "up", "down")]
    settings = {"quant_method": "auto-round", "bits": 4}
    settings |= {"extra_config": {name: {"bits": 4, "group_size": 128} for name in names}}
    data = {"model_type": "qwen3_moe", "tie_word_embeddings": False, "quantization_config": settings}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(data | sizes | heads | {"num_experts": 128, "num_experts_per_tok": 8}))
    assert path.stat().st_size > 2**21
    assert main(["decode", str(path), "--ctx", "1k", "--format", "json"]) == 0
    captured = capsys.readouterr()
    (model,) = json.loads(captured.out)["models"]
    assert captured.err == ""
    assert model["params_total"] == 235_093_634_560
    quantized = 94 * (128 * 3 * 4096 * 1536 + 2 * 4096 * (8192 + 512))
    assert model["stored_bytes"] == quantized * Fraction(133, 256) + 2 * (235_093_634_560 - quantized)


def test_long_lists_are_read_in_time_in_proportion() -> None:
    """Three globs for each of 1,000 layers: those of a layer are asked of it alone."""
    layers = [f"model.layers.{layer}" for layer in range(1000)]
    ignore = [f"{layer}.{name}" for layer in layers[::2] for name in ("self_attn*", "mlp.gate*", "*norm*")]
    spec, notes = read(MOE | {"num_hidden_layers": 1000}, compressed(**int4() | {"ignore": [*ignore, "lm_head"]}))
    assert notes == ()
    assert spec.quantization is not None
    assert [(rule.parts, rule.in_layers) for rule in spec.quantization.rules] == [
        (("mixers",), tuple(range(1, 1000, 2))),
        (("experts",), None),
    ]


LFM2 = {"model_type": "lfm2", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
LFM2 |= {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention", "conv"]}


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        (["conv"], (1,)),
        (["re:.*conv.*"], (1,)),
        (["self_attn"], (0, 2)),
        (["model.layers.0.conv"], (1, 2)),
        (["model.layers.2.conv.in_proj", "model.layers.2.conv.out_proj"], (0, 1)),
    ],
)
def test_modules_of_a_hybrid_belong_to_its_layers(names: list[str], layers: tuple[int, ...]) -> None:
    spec, _ = read(LFM2, {"quant_method": "fp8", "modules_to_not_convert": names})
    assert spec.quantization is not None
    assert [rule.in_layers for rule in spec.quantization.rules if "mixers" in rule.parts] == [layers]


@pytest.mark.parametrize("names", [["lm_head"], ["model.layers.1.mlp.experts.0.gate_proj"]])
def test_latent_heads_beside_shared_experts(names: list[str]) -> None:
    """A list that names no projection of MLA says nothing of them."""
    latent = {"q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    sizes = {"model_type": "deepseek_v3", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 8}
    more = {"num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
    spec, _ = read(sizes | latent | more, {"quant_method": "fp8", "modules_to_not_convert": [*names, "lm_head"]})
    assert spec.quantization is not None
    (rule,) = spec.quantization.rules
    assert (set(rule.parts), rule.in_layers) == ({"mixers", "mlp", "experts", "shared_experts"}, None)
