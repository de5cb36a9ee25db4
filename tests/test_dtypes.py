"""Weights, cache and recurrent state each in a dtype: options, JSON, tables; a quantization in a spec."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import pytest

import powerplan
from powerplan.accounting import Accounting
from powerplan.cli import main
from powerplan.documents import parse_yaml
from powerplan.dtypes import Dtypes
from powerplan.dump import spec_to_yaml
from powerplan.errors import InputError
from powerplan.load import catalogue_spec
from powerplan.quantization import Quantization, Rule
from powerplan.schema import spec_schema
from powerplan.search import Limits, Request, recommend
from powerplan.validation import validate

KIMI = "kimi-linear-48b-a3b"
SPEC = """\
name: small
vocab_size: 1000
hidden_size: 256
quantization:
  method: int4
  rules:
  - {parts: [mlp], bits: 4, block: 32, scale_bits: 16, in_layers: [1]}
layers:
- {repeat: 2, mixer: {kind: attention, heads: 4, head_dim: 64}, ffn: {kind: mlp, intermediate_size: 512}}
"""
MLP = 3 * 256 * 512


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--format", "json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def table(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments]) == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", ["wsfr", "decode", "recommend"])
def test_each_option_changes_its_own_bytes(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """20 KDA layers with a recurrent state of 32 x 128 x 128, and 7 of MLA with a cache of 576 a token."""
    recurrent, recent = 20 * 32 * 128 * 128, 20 * 3 * 3 * 4096
    cache, weights = 7 * 576 * 1024, Accounting(catalogue_spec(KIMI)).active_parameters.without_input_embedding

    def state_and_weights(*options: str) -> tuple[float, float]:
        data = run(capsys, command, KIMI, "--ctx", "1k", *options)
        if command == "decode":
            (place,) = data["models"][0]["contexts"]
            return place["state_bytes"], place["steps"][0]["weight_bytes"]
        row = data["rows"][0] if command == "wsfr" else data["candidates"][-1]["rows"][0]
        if command == "recommend":
            row = next(one for one in data["candidates"] if one["label"] == "as it is")["rows"][0]
        return row["state_bytes"], row["decode_weight_bytes_per_token"]

    assert state_and_weights() == (4 * recurrent + 2 * (recent + cache), 2 * weights)
    assert state_and_weights("--dtype", "fp8") == (4 * recurrent + recent + cache, weights)
    assert state_and_weights("--weights-dtype", "int4") == (4 * recurrent + 2 * (recent + cache), weights / 2)
    assert state_and_weights("--cache-dtype", "fp8") == (4 * recurrent + recent + cache, 2 * weights)
    assert state_and_weights("--state-dtype", "bf16") == (2 * (recurrent + recent + cache), 2 * weights)
    alone = state_and_weights(
        "--dtype", "fp32", "--weights-dtype", "fp8", "--cache-dtype", "int4", "--state-dtype", "fp16"
    )
    assert alone == (2 * recurrent + (recent + cache) / 2, weights)


def test_compare_and_budget_take_them_too(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--ctx", "1k", "--cache-dtype", "fp8", "--weights-dtype", "fp32"]
    compared = run(capsys, "compare", "gpt2-small", "gpt2-medium", *options)
    row = compared["models"][0]["rows"][0]
    assert row["state_bytes"] == 12 * 2 * 768 * 1024
    assert row["decode_weight_bytes_per_token"] == 4 * (124_439_808 - 1024 * 768)
    assert compared["convention"] | {"form": None} == {
        "causal": "exact",
        "lm_head": True,
        "form": None,
        "dtype": "bf16",
        "weights_dtype": "fp32",
        "cache_dtype": "fp8",
        "recurrent_state_dtype": "fp32",
    }
    budget = run(capsys, "budget", "gpt2-small", "--flops", "1e20", *options, "--state-dtype", "bf16")
    states = {entry["mixer"]: entry["state_bytes"] for entry in budget["alternatives"]}
    assert states["as it is"] == 12 * 2 * 768 * 1024
    assert states["power:p=2"] == 2 * 12 * 12 * 2080 * 65


def test_tables_name_the_formats(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text(SPEC)
    name = str(path)
    assert "LM head included; weights and cache in bf16 " in table(capsys, "wsfr", "gpt2-small")
    assert "LM head included; weights in int4 and bf16, cache in bf16 " in table(capsys, "wsfr", name)
    assert "included; weights and cache in fp8 " in table(
        capsys, "wsfr", name, "--weights-dtype", "fp8", "--dtype", "fp8"
    )
    text = table(capsys, "wsfr", KIMI, "--cache-dtype", "fp8", "--state-dtype", "bf16")
    assert "weights in bf16, cache in fp8, recurrent state in bf16, read and written " in text
    text = table(capsys, "compare", "gpt2-small", name)
    assert "batch 1; weights and cache in bf16, weights of small in int4 and bf16." in text
    text = table(capsys, "decode", "gpt2-small", name, "--cache-dtype", "fp8")
    assert "weights 2.94 MiB in int4 and bf16" in text
    assert "weights as above, cache in fp8." in text


WRONG = {
    ("wsfr", "--weights-dtype", "int2"): "--weights-dtype: 'int2' is not known; did you mean int4? allowed are ...",
    ("decode", "--cache-dtype", "fp6"): "--cache-dtype: 'fp6' is not known; did you mean ...",
    ("wsfr", "--cache-dtype", "int5"): "--cache-dtype: 'int5' is not known; did you mean int8? allowed are fp32, ...",
    ("decode", "--cache-dtype", "int4:64"): "--cache-dtype: '64' is not a setting; write int4:group=64,scale=...",
    (
        "decode",
        "--cache-dtype",
        "int4:group=x",
    ): "--cache-dtype group: 'x' is not an integer; write one from 1 ...",
    ("decode", "--cache-dtype", "int4:group=0"): "--cache-dtype group: 0 is out of range; allowed are 1 to 65,536",
    (
        "wsfr",
        "--cache-dtype",
        "int4:grp=8",
    ): "--cache-dtype: 'grp' is not a setting; did you mean group? ...",
    ("wsfr", "--cache-dtype", "bf16:group=8"): "--cache-dtype: bf16 has no scales; groups are for fp8, int8, ...",
    ("wsfr", "--cache-dtype", "int4:group=8,group=9"): "--cache-dtype: group is given twice",
    ("wsfr", "--cache-dtype", "int4:scale=fp16"): "--cache-dtype: 'int4:scale=fp16' has no group; write int4:...",
    ("wsfr", "--cache-dtype", "int4:group=8,scale=no"): "--cache-dtype scale: 'no' is not known; allowed are fp32...",
    ("wsfr", "--cache-dtype", "int4:group=8,zero=nil"): "--cache-dtype zero: 'nil' is not known; allowed are fp32...",
    ("budget", "--state-dtype", ""): "--state-dtype: '' is not known; allowed are fp32, bf16, fp16, fp8, int4",
}


@pytest.mark.parametrize(("command", "option", "value"), WRONG)
def test_words_that_are_no_dtype(command: str, option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "gpt2-small", option, value]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {WRONG[command, option, value].removesuffix('...')}")
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("name", ["dtype", "weights_dtype", "cache_dtype", "state_dtype"])
def test_from_python(name: str) -> None:
    allowed = "fp8, int8, int4, fp4" if name == "cache_dtype" else "fp8, int4$"
    problem = rf"^{name}: 'bf61' is not known; did you mean bf16\? allowed are fp32, bf16, fp16, {allowed}"
    for answer in (powerplan.wsfr, powerplan.decode, powerplan.budget, powerplan.recommend):
        with pytest.raises(InputError, match=problem):
            answer("gpt2-small", "1k", **{name: "bf61"})  # type: ignore[operator]
    with pytest.raises(InputError, match=problem):
        powerplan.compare(["gpt2-small", "gpt2-medium"], "1k", **{name: "bf61"})  # type: ignore[arg-type]
    answer = powerplan.decode("gpt2-small", "1k", cache_dtype="fp8")
    assert answer.dtypes == Dtypes(cache_dtype="fp8")
    assert answer.models[0].servings[0].cache_bytes == 12 * 2 * 768 * 1024


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("int8", 8),
        ("fp8", 8),
        ("int4:group=64", 4 + Fraction(32, 64)),
        ("int2:group=32", 2 + Fraction(32, 32)),
        ("int4:group=128,zero=none", 4 + Fraction(16, 128)),
        ("int4:group=128,scale=fp32,zero=int4", 4 + Fraction(36, 128)),
        ("int4: zero = none , group = 3", 4 + Fraction(16, 3)),
        ("fp8:group=128", 8 + Fraction(32, 128)),
        ("fp4:group=16", 4 + Fraction(8, 16)),
    ],
)
def test_scales_of_groups(text: str, bits: Fraction) -> None:
    assert 8 * Dtypes(cache_dtype=text).cache_bytes == bits


def test_groups_as_engines_store_them() -> None:
    """Bytes of a page of 16 tokens, 8 key/value heads of 128: of keys and of values, elements and then scales."""
    serving = powerplan.decode("llama-3-8b", "16", cache_dtype="fp8:group=128").models[0].servings[0]
    assert serving.cache_bytes == 32 * 2 * (16 * 8 * 128 + 16 * 8 * 4)  # vLLM's fp8_per_token_head.
    serving = powerplan.decode("llama-3-8b", "16", cache_dtype="fp4:group=16").models[0].servings[0]
    assert serving.cache_bytes == 32 * 2 * 16 * 8 * (128 // 2 + 128 // 16)  # vLLM's nvfp4.
    serving = powerplan.decode("llama-3-8b", "64", cache_dtype="int2:group=32").models[0].servings[0]
    keys = 8 * 128 * (64 * 2 // 8 + 64 // 32 * 2 * 2)  # KIVI: groups of 32 tokens of a channel.
    values = 8 * 64 * (128 * 2 // 8 + 128 // 32 * 2 * 2)  # And of 32 channels of a token.
    assert serving.cache_bytes == 32 * (keys + values)


def test_a_table_says_the_bits_of_groups(capsys: pytest.CaptureFixture[str]) -> None:
    text = table(capsys, "decode", "gpt2-small", "--cache-dtype", "int4:group=64")
    assert "cache in int4:group=64 (4.5 bits an element, with scales)." in text
    assert "bits an element" not in table(capsys, "decode", "gpt2-small", "--cache-dtype", "int4")
    assert run(capsys, "decode", "gpt2-small", "--cache-dtype", "int4:group=64")["cache_bits"] == 4.5


def test_a_spec_keeps_its_quantization() -> None:
    spec = validate(parse_yaml(SPEC, "small.yaml"))
    assert spec.quantization == Quantization(
        method="int4", rules=(Rule(parts=("mlp",), bits=4, block=32, scale_bits=16, in_layers=(1,)),)
    )
    text = spec_to_yaml(spec)
    assert "- {parts: [mlp], bits: 4, block: 32, scale_bits: 16, in_layers: [1]}" in text
    assert validate(parse_yaml(text, "again.yaml")) == spec
    accounting = Accounting(spec)
    (mlp,) = {use.layer.ffn for use in accounting.uses}
    assert mlp is not None
    assert accounting.block_bytes(mlp, Dtypes()) == MLP * (2 - Fraction(23, 32)), (
        "the mean of a wide and a narrow layer"
    )
    assert accounting.stored_bytes(Dtypes()) == 2 * accounting.total_parameters.with_embeddings - MLP * Fraction(23, 16)
    assert "quantization" in spec_schema()["$defs"]["ModelSpec"]["properties"]


def test_recommend_writes_it(tmp_path: Path) -> None:
    spec = validate(parse_yaml(SPEC, "small.yaml"))
    written = validate(parse_yaml(powerplan.recommend(spec, "4k").to_yaml(), "written.yaml"))
    assert written.quantization == spec.quantization


PLACES = {
    "  method: int4": (
        "  methd: int4",
        ":5:3: quantization.methd: unknown key; did you mean method? allowed are method, rules",
    ),
    "[mlp]": ("[ffn]", ":7:14: quantization.rules[0].parts[0]: 'ffn' is not known"),
    "bits: 4": ("bits: 0", ":7:26: quantization.rules[0].bits: 0 is out of range; allowed is at least 1"),
    "block: 32": ("blok: 32", ":7:29: quantization.rules[0].blok: unknown key; did you mean block"),
    "in_layers: [1]": (
        "in_layers: [1, 0]",
        ":7:67: quantization.rules[0].in_layers: lists layers in rising order, each once",
    ),
    "parts: [mlp]": (
        "parts: [lm_head]",
        ":7:71: quantization.rules[0].in_layers: lm_head and embedding are in no layer",
    ),
    "method: int4": ('method: "a\\eb"', ":5:11: quantization.method: ..."),
}


@pytest.mark.parametrize("old", PLACES)
def test_mistakes_in_a_quantization_have_places(old: str) -> None:
    new, message = PLACES[old]
    with pytest.raises(InputError) as caught:
        validate(parse_yaml(SPEC.replace(old, new), "small.yaml"))
    assert str(caught.value).startswith(f"small.yaml{message.removesuffix('...')}")


@pytest.mark.parametrize("in_layers", [None, tuple(range(0, 12, 3))])
@pytest.mark.parametrize("parts", [("mlp",), ("mixers", "mlp", "embedding")])
def test_limits_count_quantized_weights(parts: tuple[Any, ...], in_layers: tuple[int, ...] | None) -> None:
    """What a search allows of memory and of bytes per token is what the models it returns take."""
    rules = (Rule(parts=parts, bits=4, block=64, scale_bits=16),)
    if in_layers is not None:
        rules = (Rule(parts=tuple({*parts} - {"embedding"}), bits=4, block=64, scale_bits=16, in_layers=in_layers),)
    spec = msgspec.structs.replace(catalogue_spec("gpt2-small"), quantization=Quantization(method="test", rules=rules))
    limits = Limits(max_decode=10**9, max_state=10**12)
    found = recommend(spec, Request(contexts=[65_536], limits=limits))
    for candidate in found.candidates:
        row = candidate.row
        needed = row.decode_weight_bytes_per_token + row.decode_state_bytes_per_token
        assert candidate.feasible == (needed <= 10**9)
        for demand in candidate.unmet:
            assert demand.needed == needed


def test_large_json_is_read_and_large_yaml_is_not(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sizes = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50_257}
    names = [f"model.layers.{i}.mlp.experts.{j}.down_proj" for i in range(300) for j in range(300)]
    text = json.dumps(sizes | {"quantization_config": {"quant_method": "fp8", "modules_to_not_convert": names}})
    assert 2**22 - 2**19 < len(text) < 2**22 + 2**19
    path = tmp_path / "config.json"
    path.write_text(text)
    assert main(["models", str(path), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out)["params_total"] == 124_439_808
    refused = {
        text.replace(
            '"n_layer": 12', '"n_layer": 12, "n_layer": 12'
        ): ":1:54: key 'n_layer' is given twice; first at line 1",
        text.replace('"n_layer": 12', '"n_layer": "many"'): ":1:50: n_layer must be an integer, and is 'many'",
        text[:-1]: f":1:{len(text)}: is not valid JSON: Expecting ',' delimiter",
        text[:-1]
        + ', "a": '
        + "[" * 100
        + "]" * 100
        + "}": f":1:{len(text) + 6 + 60}: is nested more than 60 levels deep",
        text[:-1]
        + ', "a": '
        + "9" * 5000
        + "}": f":1:{len(text) + 7}: a number of thousands of digits is out of range",
        text + " " * 2**24: ": is larger than 16 MiB; a config.json has some megabytes at most",
    }
    for content, problem in refused.items():
        path.write_text(content)
        assert main(["models", str(path)]) == 2
        assert capsys.readouterr().err == f"error: {path}{problem}\n"
    yaml = tmp_path / "spec.yaml"
    yaml.write_text(text)
    assert main(["models", str(yaml)]) == 2
    assert capsys.readouterr().err == f"error: {yaml}: is larger than 1 MiB; a model spec is a few kilobytes\n"
