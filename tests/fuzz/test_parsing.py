"""Whatever the input, an answer or one InputError of one line; and valid specs count and survive being written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from fuzzing import fuzz, hostile
from hypothesis import given
from hypothesis import strategies as st
from mutations import broken, mutated, nested, spots, words
from specs import contexts, specs

from powerplan.accounting import Accounting
from powerplan.choices import By, Format
from powerplan.documents import parse_json, parse_yaml
from powerplan.dtypes import Dtypes
from powerplan.dump import spec_to_yaml
from powerplan.errors import InputError, one_line
from powerplan.hardware import Device, find_device
from powerplan.huggingface import FAMILIES, read_config
from powerplan.load import catalogue_text, load_model
from powerplan.mixers.formulas import Convention
from powerplan.report.render import render
from powerplan.report.wsfr import wsfr_report
from powerplan.spec import ModelSpec
from powerplan.swap import parse_swap, with_mixer
from powerplan.swap.value import KINDS
from powerplan.units import MAX_CONTEXT, parse_context, parse_contexts, parse_integers
from powerplan.validation import validate

CATALOGUE = ["gpt2-small", "deepseek-v3", "gemma-3-1b", "gpt-oss-20b", "power-coder-3b"]
CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 4,
    "kv_lora_rank": 32,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}
CONFIG_KEYS = [
    *CONFIG,
    "head_dim",
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "text_config",
    "tie_word_embeddings",
    "attention_bias",
    "n_routed_experts",
    "num_local_experts",
    "n_shared_experts",
    "first_k_dense_replace",
    "q_lora_rank",
    "mlp_only_layers",
    "decoder_sparse_step",
    "architectures",
    "_name_or_path",
    "topk_method",
]
SPEC_KEYS = [
    *ModelSpec.__struct_fields__,
    *("kind", "heads", "kv_heads", "head_dim", "window", "chunk_size", "p", "bias", "experts", "top_k", "repeat"),
    *("pattern", "mixer", "ffn", "per_layer", "intermediate_size", "<<"),
]

spec_values = nested(words | st.sampled_from(SPEC_KEYS))
config_values = nested(words | st.sampled_from(CONFIG_KEYS))


def attempt(read: Callable[[], Any]) -> Any:
    """Return what `read` returns, or None after an InputError whose message is fit for a terminal."""
    try:
        return read()
    except InputError as error:
        text = str(error)
        assert text == one_line(text)
        assert 0 < len(text) < 2100
        return None


def check_spec_or_refusal(read: Callable[[], Any]) -> None:
    """Count the spec that `read` returns, if it returns one."""
    spec = attempt(read)
    if spec is not None:
        row = Accounting(spec).row(1024)
        assert row.weight_flops_per_token > 0
        assert row.state_elements >= 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@fuzz(200)
@given(
    raw=st.binary(max_size=200) | st.sampled_from(CATALOGUE).flatmap(lambda name: mutated(catalogue_text(name))),
)
def test_bytes_as_yaml(folder: Path, raw: bytes) -> None:
    path = folder / "model.yaml"
    path.write_bytes(raw)
    check_spec_or_refusal(lambda: load_model(path).spec)


@fuzz(200)
@given(raw=st.binary(max_size=200) | mutated(json.dumps(CONFIG, indent=1)), family=st.sampled_from(sorted(FAMILIES)))
def test_bytes_as_config_json(folder: Path, raw: bytes, family: str) -> None:
    path = folder / "config.json"
    path.write_bytes(raw.replace(b"llama", family.encode()))
    check_spec_or_refusal(lambda: load_model(path).spec)


@fuzz(200)
@given(
    data=spec_values
    | st.sampled_from(CATALOGUE).flatmap(
        lambda name: broken(yaml.safe_load(catalogue_text(name)), spec_values, SPEC_KEYS)
    ),
    flow=st.booleans(),
)
def test_data_as_yaml(data: Any, flow: bool) -> None:
    text = yaml.safe_dump(data, default_flow_style=flow, allow_unicode=True)
    check_spec_or_refusal(lambda: validate(parse_yaml(text, "model.yaml")))


@fuzz(200)
@given(
    data=config_values
    | st.sampled_from(sorted(FAMILIES)).flatmap(
        lambda family: broken(CONFIG | {"model_type": family}, config_values, CONFIG_KEYS)
    ),
    wrapped=st.booleans(),
)
def test_data_as_config_json(data: Any, wrapped: bool) -> None:
    text = json.dumps({"model_type": "gemma3", "text_config": data} if wrapped else data)
    check_spec_or_refusal(lambda: read_config(parse_json(text, "config.json"), "name")[0])


QUANTIZATION: list[dict[str, Any]] = [
    {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": [], "expert_dtype": "fp4"},
    {"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"-:.*o_proj": {}}, "lm_head": True},
    {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": ["self_attn"]},
    {"quant_method": "modelopt", "quantization": {"quant_algo": "FP8", "exclude_modules": ["*.0.*"]}},
    {"quant_method": "auto-round", "bits": 4, "extra_config": {"model.layers.0.mlp.up_proj": {"bits": 8}}},
    {
        "quant_method": "hqq",
        "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 64}},
        "skip_modules": [],
    },
    {"quant_method": "quark", "global_quant_config": {"weight": {"dtype": "int8", "qscheme": "per_tensor"}}},
    {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_data": {}}}},
    {
        "quant_method": "compressed-tensors",
        "config_groups": {"a": {"targets": ["re:.*mlp.*"], "weights": {"num_bits": 8, "strategy": "channel"}}},
        "ignore": ["re:model.layers.(0|1).*", "model.layers.*.self_attn"],
    },
]


@fuzz(200)
@given(
    data=st.sampled_from(QUANTIZATION).flatmap(
        lambda data: broken(data, config_values, sorted({key for one in QUANTIZATION for key in one}))
    )
)
def test_a_broken_quantization_is_a_note_or_a_refusal(data: Any) -> None:
    text = json.dumps(CONFIG | {"quantization_config": data})
    read = attempt(lambda: read_config(parse_json(text, "config.json"), "name"))
    if read is not None:
        spec, notes = read
        assert all(note == one_line(note) for note in notes)
        assert validate(parse_yaml(spec_to_yaml(spec), "model.yaml")) == spec
        plain = Accounting(spec).total_parameters.with_embeddings
        assert 0 < Accounting(spec).stored_bytes(Dtypes("fp32")) < 9 * plain + 1024


@fuzz(200)
@given(data=config_values)
def test_json_reads_as_python_reads_it(data: Any) -> None:
    text = json.dumps(data, indent=1)
    document = attempt(lambda: parse_json(text, "config.json"))
    if document is not None:
        assert json.dumps(document.data) == json.dumps(json.loads(text))
        for path in spots(document.data):
            place = document.where(path).split(":")[1:]
            line, column = (int(number) for number in place)
            assert text.split("\n")[line - 1][column - 1] not in " ,:]}"


@fuzz(200)
@given(spec=specs, context=contexts | st.just(MAX_CONTEXT), form=st.sampled_from(["recurrent", "chunked"]))
def test_every_valid_spec_counts_and_reads_back(spec: ModelSpec, context: int, form: Any) -> None:
    row = Accounting(spec, Convention(form=form)).row(context)
    assert row.weight_flops_per_token > 0
    assert math.isfinite(row.state_flops_per_token)
    assert validate(parse_yaml(spec_to_yaml(spec), "model.yaml")) == spec


@fuzz(200)
@given(
    spec=specs,
    context=contexts,
    by=st.sampled_from([None, *get_args(By)]),
    mixer=st.sampled_from([None, "power:p=16", "linear"]),
)
def test_every_valid_spec_has_a_report(spec: ModelSpec, context: int, by: By | None, mixer: str | None) -> None:
    if mixer is not None:
        changed = attempt(lambda: with_mixer(spec, mixer)[0])
        spec = changed or spec
    accounting = Accounting(spec)
    report = wsfr_report(accounting, [accounting.row(context)], Dtypes(), by, explain=True)
    for form in get_args(Format):
        assert f"{context:,}" in (text := render(report, form)) or str(context) in text


@fuzz(200)
@given(text=st.text(max_size=40) | st.from_regex(r"[0-9_,.]{0,8}(e\+?[0-9]{1,4})?[kKmMgG ]?", fullmatch=True) | hostile)
def test_any_text_as_a_context(text: str) -> None:
    size = attempt(lambda: parse_context(text, "--ctx"))
    assert size is None or 1 <= size <= MAX_CONTEXT
    sizes = attempt(lambda: parse_contexts(text, "--ctx"))
    assert sizes is None or len(sizes) == len(set(sizes)) > 0
    numbers = attempt(lambda: parse_integers(text, "--p", 1, 16))
    assert numbers is None or all(1 <= number <= 16 for number in numbers)


settings_text = st.lists(st.tuples(words | st.sampled_from(SPEC_KEYS), words | st.integers().map(str)), max_size=3).map(
    lambda pairs: ",".join(f"{key}={value}" for key, value in pairs)
)


@fuzz(200)
@given(
    text=st.text(max_size=40) | st.builds("{}:{}".format, st.sampled_from([*KINDS, "window"]) | words, settings_text)
)
def test_any_text_as_a_mixer(text: str) -> None:
    parsed = attempt(lambda: parse_swap(text))
    assert parsed is None or parsed.kind in KINDS
    check_spec_or_refusal(lambda: with_mixer(load_model("gpt2-small").spec, text)[0])


@fuzz(200)
@given(text=words | st.text(max_size=40))
def test_any_text_as_a_device_or_a_model(text: str) -> None:
    device = attempt(lambda: find_device(text))
    assert device is None or isinstance(device, Device)
    loaded = attempt(lambda: load_model(text))
    assert loaded is None or isinstance(loaded.spec, ModelSpec)
