"""The arguments for Megatron-Core: names as it has them, sizes that rebuild the model, and nothing dropped silently."""

from __future__ import annotations

import re
import shlex
import subprocess
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from kinds import EXPERTS, MIXERS, SHARED, spec_of
from specs import names, specs

from powerplan import Accounting, Convention, ModelSpec, load_model
from powerplan.errors import InputError
from powerplan.ffn import MLP, MoE
from powerplan.load import catalogue_names, catalogue_spec
from powerplan.mixers import Attention
from powerplan.run.degrees import Degrees
from powerplan.run.export import Job, megatron_arguments
from powerplan.run.export.megatron_model import SYMBOLS
from powerplan.run.recipe import Recipe
from powerplan.run.stages import stage_spans
from powerplan.spec import LayerGroup

# Read from the parser that add_megatron_arguments of megatron/training/arguments.py builds in core_v0.19.0, which
# also takes the fields of TransformerConfig and TrainingConfig. With values, switches apart.
WITH_VALUE = """
    --ckpt-format --context-parallel-size --data-parallel-sharding-strategy --dsa-indexer-head-dim --dsa-indexer-n-heads
    --dsa-indexer-topk --exp-avg-dtype --exp-avg-sq-dtype --experimental-attention-variant --expert-model-parallel-size
    --expert-tensor-parallel-size --ffn-hidden-size --global-batch-size --hidden-size --hybrid-layer-pattern
    --kv-channels --kv-lora-rank --linear-attention-freq --linear-conv-kernel-dim --linear-key-head-dim
    --linear-num-key-heads --linear-num-value-heads --linear-value-head-dim --mamba-head-dim --mamba-num-groups
    --mamba-num-heads --mamba-state-dim --max-position-embeddings --micro-batch-size --moe-ffn-hidden-size
    --moe-latent-size --moe-layer-freq --moe-router-group-topk --moe-router-num-groups --moe-router-score-function
    --moe-router-topk --fp8-format --fp8-recipe
    --moe-shared-expert-intermediate-size --normalization --num-attention-heads --num-distributed-optimizer-instances
    --num-experts --num-layers --num-query-groups --optimizer --pipeline-model-parallel-layout
    --pipeline-model-parallel-size --position-embedding-type --q-lora-rank --qk-head-dim --qk-pos-emb-head-dim
    --rope-scaling-factor --rotary-base --rotary-percent
    --recompute-granularity --recompute-method --recompute-modules --recompute-num-layers --seq-length --softmax-type
    --tensor-model-parallel-size --train-iters --v-head-dim --vocab-size --window-attn-skip-freq --window-size
"""
SWITCHES = """
    --add-qkv-bias --attention-output-gate --bf16 --disable-bias-linear --fp16 --group-query-attention
    --moe-grouped-gemm --moe-router-enable-expert-bias --moe-router-pre-softmax --moe-shared-expert-gate
    --multi-latent-attention --no-gradient-accumulation-fusion --no-rope-fusion --qk-layernorm --sequence-parallel
    --swiglu --untie-embeddings-and-output-weights --use-distributed-optimizer --use-megatron-fsdp
    --use-precision-aware-optimizer --use-rope-scaling
"""
VALUED, SWITCHED = set(WITH_VALUE.split()), set(SWITCHES.split())
CONTEXT = 4096
SEQUENCES = 48
DEGREES = [
    Degrees(),
    Degrees(fsdp=8, zero=0),
    Degrees(fsdp=4, replicas=2, zero=1),
    Degrees(fsdp=4, replicas=2, zero=2),
    Degrees(fsdp=8, ep=4),
    Degrees(fsdp=2, tp=2, cp=2, zero=1),
    Degrees(pp=5, fsdp=2, zero=1),
]
RECIPES = [
    Recipe(),
    Recipe(recompute="full", optimizer="muon", dtype="fp16"),
    Recipe(recompute="selective", optimizer="adamw-8bit", master="none", loss="chunked", micro_batch=2),
    Recipe(dtype="fp32"),
]


def job_of(spec: ModelSpec, degrees: Degrees | None = None, recipe: Recipe | None = None) -> Job:
    return Job(spec, CONTEXT, degrees or Degrees(), recipe or Recipe(), SEQUENCES * CONTEXT, 10**9)


def arguments_of(text: str) -> dict[str, str]:
    """Return the arguments of an export by their names, as bash would take them apart."""
    words = shlex.split(text.partition("MEGATRON_ARGS=(\n")[2].rpartition("\n)")[0])
    arguments: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            assert name not in arguments
            arguments[name] = value
        else:
            arguments[name] = f"{arguments[name]} {word}".strip()
    return arguments


def missing_of(text: str) -> list[str]:
    marked = "# not in Megatron-Core: "
    return [line.removeprefix(marked) for line in text.splitlines() if line.startswith(marked)]


def pattern(text: str) -> list[int]:
    """Return the list that a frequency such as "([1]*3+[0]*1)*12" stands for."""
    assert re.fullmatch(r"[\[\]()01*+2-9]+", text)
    result: list[int] = eval(text)
    return result


@pytest.mark.parametrize("name", catalogue_names())
def test_names_are_those_of_megatron_core(name: str) -> None:
    spec = catalogue_spec(name)
    for degrees in DEGREES:
        for recipe in RECIPES:
            text = megatron_arguments(job_of(spec, degrees, recipe))
            arguments = arguments_of(text)
            assert set(arguments) <= VALUED | SWITCHED
            assert all(bool(value) == (option in VALUED) for option, value in arguments.items())
            head = text.partition("MEGATRON_ARGS")[0].splitlines()
            assert all(line.startswith("# ") for line in head)


@pytest.mark.parametrize("name", catalogue_names())
def test_every_model_exports_or_says_what_is_missing(name: str) -> None:
    """Weight FLOPs by Megatron-LM's formula (megatron/training/training.py, num_floating_point_operations), from the
    arguments alone, equal powerplan's, but for the router, which that formula leaves out, where nothing is missing."""
    spec = catalogue_spec(name)
    text = megatron_arguments(job_of(spec))
    missing, arguments = missing_of(text), arguments_of(text)
    foreign = {type(block) for use in spec.layer_uses() for block in use.layer.blocks[:2]} - set(SYMBOLS)
    assert not foreign or missing
    mixers = spec.mixers()
    if missing or any(type(mixer) is not Attention for mixer in mixers) or "--hybrid-layer-pattern" in arguments:
        return
    counted = megatron_weights(arguments)
    router = sum(
        use.count * use.layer.ffn.experts * spec.hidden_size
        for use in spec.layer_uses()
        if isinstance(use.layer.ffn, MoE)
    )
    shared = sum(
        use.count * spec.hidden_size
        for use in spec.layer_uses()
        if isinstance(use.layer.ffn, MoE) and use.layer.ffn.shared_gate
    )
    assert Accounting(spec, Convention()).weight_flops_per_token == 2 * (counted + router + shared)


def megatron_weights(arguments: dict[str, str]) -> int:
    """Return the matmul parameters per token of a GPT that Megatron-LM builds from these arguments."""

    def of(name: str, default: int = 0) -> int:
        return int(arguments.get(f"--{name}", default))

    hidden, layers, heads, channels = (
        of(name) for name in ("hidden-size", "num-layers", "num-attention-heads", "kv-channels")
    )
    groups = of("num-query-groups", heads)
    gate = heads * channels if "--attention-output-gate" in arguments else 0
    attention = hidden * channels * (2 * heads + 2 * groups) + hidden * gate
    matrices = 3 if "--swiglu" in arguments else 2
    experts = pattern(arguments["--moe-layer-freq"]) if "--num-experts" in arguments else [0] * layers
    assert len(experts) == layers
    wide = of("moe-router-topk") * of("moe-ffn-hidden-size") + of("moe-shared-expert-intermediate-size")
    ffns = sum(matrices * hidden * (wide if expert else of("ffn-hidden-size")) for expert in experts)
    return layers * attention + ffns + hidden * of("vocab-size")


def test_a_dense_model() -> None:
    degrees = Degrees(fsdp=4, tp=2, cp=2, zero=1)
    text = megatron_arguments(job_of(catalogue_spec("llama-3-8b"), degrees, Recipe(recompute="full", micro_batch=2)))
    assert arguments_of(text) == {
        "--hidden-size": "4096",
        "--vocab-size": "128256",
        "--num-layers": "32",
        "--normalization": "RMSNorm",
        "--position-embedding-type": "rope",
        "--rotary-base": "500000",
        "--untie-embeddings-and-output-weights": "",
        "--num-attention-heads": "32",
        "--kv-channels": "128",
        "--group-query-attention": "",
        "--num-query-groups": "8",
        "--swiglu": "",
        "--ffn-hidden-size": "14336",
        "--disable-bias-linear": "",
        "--seq-length": "4096",
        "--max-position-embeddings": "4096",
        "--micro-batch-size": "2",
        "--global-batch-size": "48",
        "--train-iters": "5087",
        "--tensor-model-parallel-size": "2",
        "--pipeline-model-parallel-size": "1",
        "--context-parallel-size": "2",
        "--sequence-parallel": "",
        "--use-distributed-optimizer": "",
        "--optimizer": "adam",
        "--recompute-granularity": "full",
        "--recompute-method": "uniform",
        "--recompute-num-layers": "1",
        "--bf16": "",
    }
    assert missing_of(text) == []
    assert text.startswith(
        "# llama-3-8b: 1,000,000,000 tokens in sequences of 4,096 on 16 devices (fsdp 4, tp 2, cp 2, "
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2-small", {"--position-embedding-type": "learned_absolute", "--normalization": "LayerNorm"}),
        ("qwen2.5-7b", {"--add-qkv-bias": "", "--disable-bias-linear": ""}),
        ("qwen3-8b", {"--qk-layernorm": ""}),
        ("mixtral-8x7b", {"--num-experts": "8", "--moe-router-topk": "2", "--moe-ffn-hidden-size": "14336"}),
        ("deepseek-v3", {"--moe-layer-freq": "[0]*3+[1]*58", "--q-lora-rank": "1536", "--qk-pos-emb-head-dim": "64"}),
        ("gpt-oss-20b", {"--window-size": "127,0", "--window-attn-skip-freq": "([1]*1+[0]*1)*12"}),
        ("qwen3-next-80b-a3b", {"--linear-attention-freq": "([1]*3+[0]*1)*12", "--linear-num-value-heads": "32"}),
        ("nemotron-h-8b", {"--mamba-num-heads": "128", "--mamba-num-groups": "8"}),
        ("llama-4-scout", {"--moe-router-pre-softmax": ""}),
        ("llama-3.1-8b", {"--rotary-base": "500000", "--use-rope-scaling": "", "--rope-scaling-factor": "8"}),
        ("qwen3-next-80b-a3b", {"--rotary-base": "10000000", "--rotary-percent": "0.25"}),
        ("nemotron-h-8b", {"--position-embedding-type": "none"}),
    ],
)
def test_kinds_that_megatron_core_has(name: str, expected: dict[str, str]) -> None:
    arguments = arguments_of(megatron_arguments(job_of(catalogue_spec(name))))
    assert {option: arguments[option] for option in expected} == expected


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("ffn", [None, EXPERTS, SHARED], ids=["mlp", "experts", "shared"])
def test_kinds_that_it_does_not_have_are_named(kind: str, ffn: MoE | None) -> None:
    mixer = MIXERS[kind]
    missing = missing_of(megatron_arguments(job_of(spec_of(mixer, ffn, repeat=2))))
    assert (type(mixer) in SYMBOLS) or f"{mixer.describe()} (all layers)" in missing


def test_a_hybrid_names_its_layers() -> None:
    path = Path(__file__).resolve().parent.parent.parent / "examples" / "hybrid.yaml"
    text = megatron_arguments(job_of(load_model(path).spec))
    assert missing_of(text) == ["power p=2 (layers 3, 7, 11, 15, 4 of 16)"]
    assert "# these arguments alone do not build this model" in text


def two(first: dict[str, Any], second: dict[str, Any]) -> ModelSpec:
    """Return a model of one layer with each of two attentions."""
    shape = {"heads": 4, "head_dim": 8}
    mixers = [Attention(**shape | fields) for fields in (first, second)]
    layers = tuple(LayerGroup(repeat=2, mixer=mixer, ffn=MLP(intermediate_size=24)) for mixer in mixers)
    return ModelSpec(name="two", vocab_size=9, hidden_size=32, layers=layers)


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        (two({}, {"heads": 2}), "a second shape of attention, with heads 2, kv_heads 2 (layers 2-3, 2 of 4)"),
        (two({"window": 5}, {"window": 7}), "a second window, of 5 keys: it has one size"),
        (two({"v_head_dim": 4}, {"v_head_dim": 4}), "value heads of 4 beside key heads of 8 (all layers)"),
        (two({"qk_norm": "full"}, {"qk_norm": "full"}), "a norm over all heads of queries and keys (all layers)"),
        (two({"uncached": True}, {"uncached": True}), "keys and values that no cache keeps (all layers)"),
        (two({"shared_kv": True}, {"shared_kv": True}), "keys and values of an earlier layer (all layers)"),
        (catalogue_spec("gemma-2-2b"), "4 norms in a layer, which has 2: one before each part (all layers)"),
        (catalogue_spec("gpt2-small"), "1,024 learned positions for 4,096 tokens: it has one for each"),
        (catalogue_spec("rwkv7-0.1b"), "a norm after the embedding"),
        (catalogue_spec("deepseek-v3"), "RoPE with yarn scaling (all layers)"),
        (catalogue_spec("gemma-3-4b"), "RoPE that differs from layer to layer (all layers)"),
        (
            catalogue_spec("longcat-flash"),
            "256 choices of the router that compute nothing (layers 1, 4, ... 82, 28 of 84)",
        ),
    ],
)
def test_parts_that_it_does_not_have_are_named(spec: ModelSpec, line: str) -> None:
    assert line in missing_of(megatron_arguments(job_of(spec)))


@pytest.mark.parametrize(
    ("degrees", "expected"),
    [
        (Degrees(fsdp=8, zero=0), {}),
        (Degrees(fsdp=8, zero=1), {"--use-distributed-optimizer": ""}),
        (Degrees(fsdp=8, zero=2), {"--data-parallel-sharding-strategy": "optim_grads", "--use-megatron-fsdp": ""}),
        (Degrees(fsdp=8), {"--data-parallel-sharding-strategy": "optim_grads_params", "--ckpt-format": "fsdp_dtensor"}),
        (Degrees(fsdp=4, replicas=2), {"--num-distributed-optimizer-instances": "2"}),
    ],
)
def test_sharding(degrees: Degrees, expected: dict[str, str]) -> None:
    arguments = arguments_of(megatron_arguments(job_of(catalogue_spec("llama-3-8b"), degrees)))
    assert {option: arguments[option] for option in expected} == expected
    assert ("--use-distributed-optimizer" in arguments) == (degrees.zero > 0)


@pytest.mark.parametrize("stages", [1, 2, 5, 7])
@pytest.mark.parametrize("name", ["llama-3-8b", "nemotron-h-8b"])
def test_pipeline_stages_have_the_layers_that_were_planned(name: str, stages: int) -> None:
    spec = catalogue_spec(name)
    arguments = arguments_of(megatron_arguments(job_of(spec, Degrees(pp=stages))))
    counts = [len(span) for span in stage_spans(spec.layer_count, stages)]
    if name == "nemotron-h-8b":
        assert [len(part) for part in arguments["--hybrid-layer-pattern"].split("|")] == counts
    elif spec.layer_count % stages:
        layout = arguments["--pipeline-model-parallel-layout"]
        assert (layout[0], layout[-1]) == ("E", "L")
        assert [part.count("t") for part in layout.split("|")] == counts
    else:
        assert "--pipeline-model-parallel-layout" not in arguments
        assert len(set(counts)) == 1


def test_a_pattern_that_begins_with_an_mlp_is_no_option() -> None:
    spec = ModelSpec(
        name="mlps", vocab_size=9, hidden_size=32, layers=(LayerGroup(repeat=3, ffn=MLP(intermediate_size=8)),)
    )
    assert "  --hybrid-layer-pattern=---" in megatron_arguments(job_of(spec)).splitlines()


def test_recipes_that_it_does_not_have_are_named() -> None:
    spec = catalogue_spec("llama-3-8b")
    recipe = Recipe(optimizer="adamw-8bit", recompute="selective", master="none", loss="chunked")
    assert missing_of(megatron_arguments(job_of(spec, Degrees(fsdp=8), recipe))) == [
        "moments in 8 bits with a scale for each block of 256: its fp8 moments have one for each tensor",
        "recomputing the activation function of a dense MLP alone: it can compute all of the MLP again",
        "weights, gradients and moments in bf16 alone: it keeps copies in fp32",
        "a loss in chunks of tokens: the logits of a micro-batch exist at once",
    ]
    muon = missing_of(megatron_arguments(job_of(spec, Degrees(fsdp=8), Recipe(optimizer="muon"))))
    assert muon == ["zero 3 with Muon: its FSDP takes adam; zero 1 takes both"]
    biases = missing_of(megatron_arguments(job_of(catalogue_spec("gpt-oss-20b"), Degrees(tp=2))))
    biased = "tp 2 within experts that have biases: a device holds whole experts"
    assert biases == ["RoPE with yarn scaling (all layers)", biased]


@settings(max_examples=40)
@given(specs)
def test_any_spec_exports(spec: ModelSpec) -> None:
    arguments = arguments_of(megatron_arguments(job_of(spec, Degrees(fsdp=4))))
    assert set(arguments) <= VALUED | SWITCHED


HOSTILE = ["$(touch x) `touch x`; touch x # '\" ) \\", "a\u00a0b 'c' \U0001f600", ")", "--bf16"]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_cannot_leave_its_comment(name: str, tmp_path: Path) -> None:
    plain = catalogue_spec("llama-3-8b")
    path = tmp_path / "args.sh"
    path.write_text(megatron_arguments(job_of(msgspec.structs.replace(plain, name=name))), encoding="utf-8")
    script = f'source {shlex.quote(str(path))}; printf "%s\\n" "${{MEGATRON_ARGS[@]}}"'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    words = megatron_arguments(job_of(plain)).partition("MEGATRON_ARGS=(\n")[2].rpartition("\n)")[0]
    assert (done.stdout.splitlines(), done.stderr) == (shlex.split(words), "")
    assert list(tmp_path.iterdir()) == [path]


@given(names)
def test_any_name_stays_in_one_comment(name: str) -> None:
    spec = catalogue_spec("power-paper-small")
    lines = megatron_arguments(job_of(msgspec.structs.replace(spec, name=name))).splitlines()
    plain = megatron_arguments(job_of(spec)).splitlines()
    assert lines[1:] == plain[1:]


def test_batches_that_cannot_be_shared_are_refused() -> None:
    spec = catalogue_spec("llama-3-8b")
    with pytest.raises(InputError, match=r"^batch_tokens: 10,000 tokens are no whole number of sequences of 4,096$"):
        Job(spec, 4096, Degrees(), Recipe(), 10_000, 10**9)
    problem = "^batch_tokens: 12 sequences cannot be shared evenly by 8 groups of devices with 2 at once$"
    with pytest.raises(InputError, match=problem):
        Job(spec, 4096, Degrees(fsdp=8), Recipe(micro_batch=2), 12 * 4096, 10**9)


def test_the_last_step_may_be_short() -> None:
    job = Job(catalogue_spec("llama-3-8b"), 4096, Degrees(), Recipe(), 8 * 4096, 10**9)
    assert job.steps == -(-Fraction(10**9) // (8 * 4096))
