"""The TOML file for torchtitan: keys as it has them, sizes that rebuild the model, and nothing dropped silently."""

from __future__ import annotations

import re
import tomllib
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import MIXERS, spec_of
from specs import names, specs

from powerplan import Accounting, ModelSpec
from powerplan.ffn import MLP
from powerplan.load import catalogue_names, catalogue_spec
from powerplan.mixers import MLA, Attention
from powerplan.run.degrees import Degrees
from powerplan.run.export import EXPORTS, Job, torchtitan_toml
from powerplan.run.export.torchtitan_model import FLAVORS, titan_model
from powerplan.run.recipe import Recipe
from powerplan.run.stages import stage_spans
from powerplan.spec import LayerGroup

# Read in torchtitan/config/job_config.py of v0.2.2.
KEYS: dict[str, set[str]] = {
    "job": {"description"},
    "model": {"name", "flavor"},
    "optimizer": {"name"},
    "training": {
        "local_batch_size",
        "global_batch_size",
        "seq_len",
        "steps",
        "dtype",
        "mixed_precision_param",
    },
    "parallelism": {
        "data_parallel_replicate_degree",
        "data_parallel_shard_degree",
        "fsdp_reshard_after_forward",
        "tensor_parallel_degree",
        "pipeline_parallel_degree",
        "pipeline_parallel_schedule",
        "pipeline_parallel_microbatch_size",
        "module_fqns_per_model_part",
        "context_parallel_degree",
        "expert_parallel_degree",
        "expert_tensor_parallel_degree",
    },
    "activation_checkpoint": {"mode", "selective_ac_option"},
}
WORDS = {
    "dtype": {"bfloat16", "float32"},
    "mixed_precision_param": {"bfloat16", "float32"},
    "fsdp_reshard_after_forward": {"default", "always", "never"},
    "mode": {"selective", "full", "none"},
}
CONTEXT = 4096
SEQUENCES = 48
LLAMA = catalogue_spec("llama-3-8b")


def job_of(spec: ModelSpec, degrees: Degrees | None = None, recipe: Recipe | None = None) -> Job:
    return Job(spec, CONTEXT, degrees or Degrees(), recipe or Recipe(), SEQUENCES * CONTEXT, 10**9)


def read(job: Job) -> tuple[dict[str, Any], list[str]]:
    """Return the tables of an export, and what it says that torchtitan lacks."""
    text = torchtitan_toml(job)
    tables = tomllib.loads(text)
    assert set(tables) == set(KEYS)
    for name, table in tables.items():
        assert set(table) <= KEYS[name]
        assert all(table[key] in words for key, words in WORDS.items() if key in table)
    marked = "# not in torchtitan: "
    return tables, [line.removeprefix(marked) for line in text.splitlines() if line.startswith(marked)]


def test_a_dense_model() -> None:
    tables, missing = read(job_of(LLAMA, Degrees(fsdp=4, replicas=2, tp=2, cp=2), Recipe(micro_batch=2)))
    assert missing == []
    assert tables["model"] == {"name": "llama3", "flavor": "8B"}
    assert tables["training"] == {
        "local_batch_size": 2,
        "global_batch_size": 48,
        "seq_len": 4096,
        "steps": 5087,
        "dtype": "float32",
        "mixed_precision_param": "bfloat16",
    }
    assert tables["parallelism"] == {
        "data_parallel_replicate_degree": 2,
        "data_parallel_shard_degree": 4,
        "fsdp_reshard_after_forward": "default",
        "tensor_parallel_degree": 2,
        "pipeline_parallel_degree": 1,
        "context_parallel_degree": 2,
        "expert_parallel_degree": 1,
    }
    assert tables["activation_checkpoint"] == {"mode": "none"}
    assert tables["job"]["description"].startswith(
        "llama-3-8b: 1,000,000,000 tokens in sequences of 4,096 on 32 devices"
    )


@pytest.mark.parametrize("degrees", [Degrees(fsdp=8, ep=4), Degrees(fsdp=2, pp=5), Degrees(fsdp=4, tp=2, zero=0)])
@pytest.mark.parametrize("name", catalogue_names())
def test_every_model_exports_or_says_what_is_missing(name: str, degrees: Degrees) -> None:
    spec = catalogue_spec(name)
    for recompute in ("none", "selective", "full"):
        tables, missing = read(job_of(spec, degrees, Recipe(recompute=recompute)))
        assert (tables["model"]["name"] == "powerplan") == bool(titan_model(spec).lacks.lines())
        assert tables["model"]["name"] != "powerplan" or missing


@pytest.mark.parametrize("name", FLAVORS)
def test_flavors_that_torchtitan_has(name: str) -> None:
    model = titan_model(catalogue_spec(name))
    assert (model.flavor, model.registry, model.lacks.lines()) == (FLAVORS[name], (), [])
    longer = msgspec.structs.replace(catalogue_spec(name), vocab_size=catalogue_spec(name).vocab_size + 1, name="other")
    changed = titan_model(longer)
    assert (changed.name, changed.flavor) == (model.name, "other")
    assert changed.registry[1].startswith('"other": ')


def arguments_of(spec: ModelSpec) -> dict[str, Any]:
    """Return the arguments in the line that is to be added to torchtitan's registry."""
    (line,) = (line for line in torchtitan_toml(job_of(spec)).splitlines() if "ModelArgs(" in line)
    inner = re.sub(r"MoEArgs\((.*?)\)", r"dict(\1)", line.partition("ModelArgs")[2].rstrip(","))
    result: dict[str, Any] = eval(f"dict{inner}", {"dict": dict})
    return result


def llama_width(dim: int, ffn_dim_multiplier: float, multiple_of: int) -> int:
    """Return the FFN's width by the rule of FeedForward in torchtitan/models/llama3/model/model.py."""
    width = int(ffn_dim_multiplier * int(2 * 4 * dim / 3))
    return multiple_of * -(-width // multiple_of)


@given(st.integers(1, 300), st.integers(1, 5000))
def test_any_width_of_an_ffn_comes_out(heads: int, width: int) -> None:
    mixer = Attention(heads=heads, head_dim=8)
    spec = spec_of(mixer, MLP(intermediate_size=width), hidden_size=8 * heads, repeat=3)
    arguments = arguments_of(spec)
    assert (arguments["dim"], arguments["n_layers"], arguments["n_kv_heads"]) == (8 * heads, 3, heads)
    assert llama_width(8 * heads, arguments["ffn_dim_multiplier"], arguments["multiple_of"]) == width


@pytest.mark.parametrize("name", ["llama-2-70b", "llama-3.2-1b", "mixtral-8x7b", "deepseek-v2", "kimi-k2"])
def test_arguments_rebuild_the_model(name: str) -> None:
    """Parameters by the shapes of torchtitan's modules, from the arguments alone. Router biases are buffers there."""
    spec = catalogue_spec(name)
    given = arguments_of(spec)
    dim, layers = given["dim"], given["n_layers"]
    experts = given.get("moe_args", {})
    if "kv_lora_rank" in given:
        queries, latent, rope = given["q_lora_rank"], given["kv_lora_rank"], given["qk_rope_head_dim"]
        key = given["qk_nope_head_dim"] + rope
        heads, value = given["n_heads"], given["v_head_dim"]
        attention = dim * queries + queries + queries * heads * key if queries else dim * heads * key
        attention += dim * (latent + rope) + latent + latent * heads * (key - rope + value) + heads * value * dim
    else:
        head_dim = given.get("head_dim", dim // given["n_heads"])
        attention = 2 * dim * head_dim * (given["n_heads"] + given["n_kv_heads"])
    wide = experts.get("num_experts", 0) + experts.get("num_shared_experts", 0)
    mixture = 3 * dim * given.get("moe_inter_dim", 0) * wide + dim * experts.get("num_experts", 0)
    if "multiple_of" in given:
        dense = llama_width(dim, given["ffn_dim_multiplier"], given["multiple_of"])
    else:
        dense = given.get("inter_dim", given.get("hidden_dim", 0))
    first = given.get("n_dense_layers", 0 if experts else layers)
    total = layers * (attention + 2 * dim) + first * 3 * dim * dense + (layers - first) * mixture + dim
    total += (1 if given.get("enable_weight_tying") else 2) * dim * given["vocab_size"]
    biases = sum(moe.experts for moe in spec.mixtures() if moe.router_bias) * (layers - first)
    assert Accounting(spec).total_parameters.with_embeddings == total + biases


@pytest.mark.parametrize("kind", MIXERS)
def test_kinds_that_torchtitan_does_not_have_are_named(kind: str) -> None:
    mixer = MIXERS[kind]
    tables, missing = read(job_of(spec_of(mixer, repeat=2)))
    if type(mixer) not in (Attention, MLA):
        assert f"{mixer.describe()} (all layers)" in missing
    assert tables["model"]["name"] == "powerplan" or type(mixer) in (Attention, MLA)


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("power-paper-small", ["power p=2 (all layers)", "mlp without gates (all layers)"]),
        ("qwen2.5-7b", ["attention with bias qkv (all layers)"]),
        ("mistral-7b-v0.1", ["attention with window 4096 (all layers)"]),
        ("solar-open-100b", ["in one model, attention + moe, 8 of 128"]),
        ("kimi-linear-48b-a3b", ["kda (layers 0-2, 4-6, ... 24-25, 20 of 27)"]),
        ("olmo-2-13b", ["attention with qk_norm full (all layers)"]),
        (
            "longcat-flash",
            [
                "a layer of one part (layers 1, 4, ... 82, 28 of 84)",
                "moe with zero_experts 256 (layers 1, 4, ... 82, 28 of 84)",
            ],
        ),
    ],
)
def test_reasons(name: str, lines: list[str]) -> None:
    job = job_of(catalogue_spec(name))
    assert read(job)[1] == lines
    assert "# none of its models builds these layers: register a TrainSpec" in torchtitan_toml(job)


@pytest.mark.parametrize(
    ("degrees", "expected", "missing"),
    [
        (Degrees(fsdp=8), (1, 8, "default"), []),
        (Degrees(fsdp=4, pp=2), (1, 4, "always"), []),
        (Degrees(fsdp=8, zero=0), (8, 1, "default"), []),
        (Degrees(fsdp=4, replicas=2, zero=0), (8, 1, "default"), []),
        (
            Degrees(fsdp=8, zero=1),
            (1, 8, "never"),
            ["zero 1: FSDP that gathers weights once a step stands for it, and shards more"],
        ),
        (
            Degrees(fsdp=2, cp=4, zero=0),
            (1, 2, "never"),
            ["zero 0: FSDP that gathers weights once a step stands for it, and shards more"],
        ),
    ],
)
def test_sharding(degrees: Degrees, expected: tuple[int, int, str], missing: list[str]) -> None:
    tables, found = read(job_of(LLAMA, degrees))
    table = tables["parallelism"]
    keys = ("data_parallel_replicate_degree", "data_parallel_shard_degree", "fsdp_reshard_after_forward")
    assert tuple(table[key] for key in keys) == expected
    assert found == missing
    product = table["data_parallel_replicate_degree"] * table["data_parallel_shard_degree"]
    for name in ("tensor", "pipeline", "context"):
        product *= table[f"{name}_parallel_degree"]
    assert product == degrees.devices


@pytest.mark.parametrize("stages", [2, 3, 5])
def test_pipelines_have_the_layers_and_micro_batches_that_were_planned(stages: int) -> None:
    tables, _ = read(job_of(LLAMA, Degrees(fsdp=2, pp=stages), Recipe(micro_batch=3)))
    parallelism = tables["parallelism"]
    parts = parallelism["module_fqns_per_model_part"]
    assert (parts[0][0], parts[-1][-2:]) == ("tok_embeddings", ["norm", "output"])
    layers = [[int(name[7:]) for name in part if name.startswith("layers.")] for part in parts]
    assert layers == [list(span) for span in stage_spans(32, stages)]
    assert (parallelism["pipeline_parallel_schedule"], parallelism["pipeline_parallel_microbatch_size"]) == ("1F1B", 3)
    assert tables["training"]["local_batch_size"] == SEQUENCES // 2


def test_experts_are_split_as_planned() -> None:
    tables, missing = read(job_of(catalogue_spec("deepseek-v3"), Degrees(fsdp=8, tp=2, ep=8)))
    assert missing == []
    assert tables["model"] == {"name": "deepseek_v3", "flavor": "671B"}
    parallelism = tables["parallelism"]
    assert (parallelism["expert_parallel_degree"], parallelism["expert_tensor_parallel_degree"]) == (8, 2)


def test_recipes_and_degrees_that_it_does_not_have_are_named() -> None:
    recipe = Recipe(optimizer="muon", dtype="fp16", recompute="selective", loss="chunked")
    assert read(job_of(LLAMA, Degrees(fsdp=8), recipe))[1] == [
        "the optimizer muon: it has Adam and AdamW",
        "fp16: it trains in bfloat16 or float32",
        "a loss in chunks of tokens: the logits of a micro-batch exist at once",
        "recomputing norms and activation functions alone: op keeps attention and every second product",
    ]
    assert read(job_of(catalogue_spec("qwen3-8b"), Degrees(pp=2)))[1] == ["pp 2 for its model qwen3"]
    assert read(job_of(catalogue_spec("gpt-oss-20b"), Degrees(cp=2)))[1] == ["cp 2 for its model gpt_oss"]
    whole, _ = read(job_of(LLAMA, None, Recipe(master="none")))
    assert (whole["training"]["dtype"], whole["training"]["mixed_precision_param"]) == ("bfloat16", "bfloat16")
    single, _ = read(job_of(LLAMA, None, Recipe(dtype="fp32")))
    assert (single["training"]["dtype"], single["training"]["mixed_precision_param"]) == ("float32", "float32")


@settings(max_examples=40)
@given(specs)
def test_any_spec_exports(spec: ModelSpec) -> None:
    tables, missing = read(job_of(spec))
    assert tables["model"]["name"] != "powerplan" or missing


@given(names)
def test_any_name_stays_in_its_string(name: str) -> None:
    spec = msgspec.structs.replace(catalogue_spec("llama-2-7b"), name=name)
    tables, missing = read(job_of(spec))
    assert tables["job"]["description"].startswith(f"{name}: 1,000,000,000 tokens")
    assert missing == []
    assert tables["model"]["name"] == "llama3"
    assert re.fullmatch(r"[A-Za-z0-9._-]+", tables["model"]["flavor"])


@pytest.mark.parametrize("name", ['"\n[training]\nsteps = 1', "\\", '"""', "\U0001f600 # x", "\x7f"])
def test_hostile_names(name: str) -> None:
    """Control characters are refused by the spec; the rest stays text."""
    try:
        spec = msgspec.structs.replace(LLAMA, name=name)
    except ValueError:
        assert not name.isprintable()
        return
    tables, _ = read(job_of(spec))
    assert tables["training"]["steps"] == 5087
    assert tables["job"]["description"].startswith(name)


def test_a_tied_head_is_a_reason_where_the_model_has_none() -> None:
    tied = msgspec.structs.replace(catalogue_spec("deepseek-v3"), tie_embeddings=True)
    assert read(job_of(tied))[1] == ["an LM head tied to the embedding, with mla"]


def test_a_mix_of_kinds_in_one_model_is_a_reason() -> None:
    shapes = [Attention(heads=4, head_dim=8), Attention(heads=2, head_dim=16)]
    layers = tuple(LayerGroup(mixer=mixer, ffn=MLP(intermediate_size=24)) for mixer in shapes)
    spec = ModelSpec(name="two", vocab_size=9, hidden_size=32, layers=layers)
    assert read(job_of(spec))[1] == ["in one model, attention + mlp; attention + mlp"]


def test_the_exports_by_name() -> None:
    assert sorted(EXPORTS) == ["megatron", "torchtitan"]
    assert EXPORTS["torchtitan"](job_of(LLAMA)) == torchtitan_toml(job_of(LLAMA))
