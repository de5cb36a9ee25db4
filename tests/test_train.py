"""Training runs: the contract of the JSON, what is found for a run, its stages, money, and every message."""

from __future__ import annotations

import json
import re
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from specs import specs

import powerplan
from powerplan.accounting import Accounting
from powerplan.cli import main
from powerplan.errors import InfeasibleError, InputError
from powerplan.hardware import find_device, peak_of
from powerplan.load import catalogue_names, catalogue_spec
from powerplan.run.degrees import Degrees, problems
from powerplan.run.efficiency import DEFAULT
from powerplan.run.layouts import Batch, Layouts, Setting
from powerplan.run.links import cluster_of
from powerplan.run.plan import Choices, Phase, plan_training
from powerplan.run.recipe import Recipe
from powerplan.run.search import MAX_TRIED, all_degrees

H100 = find_device("h100-sxm")
LLAMA = ("llama-3-8b", "--ctx", "128k", "--gpu", "h100-sxm", "--devices", "64", "--tokens", "100B")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["train", *arguments, "--format", "json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def setting(devices: int, batch: Batch | None = None) -> Setting:
    return Setting.of(cluster_of(H100, devices), peak_of(H100), DEFAULT, batch or Batch(2**22))


def test_json_keeps_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, *LLAMA, "--price", "2.50")
    assert result["schema"] == "powerplan.train/1"
    assert {"fsdp", "tp", "pp", "cp", "ep"} <= result["parallel"].keys()
    memory = result["memory_bytes"]
    assert {"weights", "gradients", "optimizer", "activations", "peak"} <= memory.keys()
    assert memory["peak"] == pytest.approx(sum(memory.values()) - memory["peak"], abs=4)
    assert result["fits"]
    assert memory["peak"] <= result["capacity_bytes"] == 81_080 * 2**20
    assert result["gpu_hours"] == pytest.approx(1e11 / result["tokens_per_s"] / 3600 * 64)
    assert result["cost"] == pytest.approx(2.5 * result["gpu_hours"])
    assert result["days"] == pytest.approx(result["gpu_hours"] / 64 / 24)
    assert result["energy_kwh"] == pytest.approx(0.7 * result["gpu_hours"])
    flops = 3 * Accounting(catalogue_spec("llama-3-8b")).row("128k").flops_per_token
    assert result["mfu"] == pytest.approx(float(flops) * result["tokens_per_s"] / 64 / 989e12)
    (stage,) = result["stages"]
    parts = [*stage["step_parts_s"].values(), *stage["exposed_communication_s"].values()]
    assert stage["step_s"] == result["step_s"] == pytest.approx(sum(parts))
    assert stage["batch_tokens"] == stage["micro_batches"] * 131_072 * (64 // result["parallel"]["cp"])
    assert result["alternatives"][0]["name"] == "20 power p=2 + 12 attention"
    assert all(other["fits"] for other in result["alternatives"])


def test_the_text_has_the_verdict_the_hours_and_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *LLAMA, "--price", "2.50"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("llama-3-8b at 131,072 tokens on 64 h100-sxm: fits, ")
    assert re.search(r"\n100B tokens: [0-9.]+ days, [0-9,]+ device hours, [0-9,]+ at 2\.50 an hour", out)
    assert "\none sequence over 16 devices, 8,192 tokens on each, a part from the front and one from the back\n" in out
    assert re.search(r"\n32 attention +keys, values: ring +503 +503 +[0-9.]+ +0\n", out)
    assert re.search(r", at most [0-9.]+ MWh at the board power ", " ".join(out.split()))
    assert re.search(r"\nchange: 20 power p=2 \+ 12 attention trains the same tokens in [0-9,]+ device hours", out)
    assert "\nmeasured: p=2 trains more slowly than attention below about 23k tokens (heads of 128)" in out
    assert len(out.splitlines()) <= 54


def test_what_layers_pass_on_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    common = ("qwen3-next-80b-a3b", "--ctx", "256k", "--gpu", "h100-sxm", "--devices", "128")
    (stage,) = run(capsys, *common, "--parallel", "fsdp=8,cp=16", "--micro-batch", "1")["stages"]
    inputs, state, ring = stage["sequence_exchange"]
    assert [entry["way"] for entry in (inputs, state, ring)] == ["halo", "state", "ring"]
    assert [entry["passed"] for entry in (inputs, state, ring)] == ["convolution inputs", "state", "keys and values"]
    assert [entry["mixer"] for entry in (inputs, state, ring)] == ["gated deltanet", "gated deltanet", "attention"]
    assert [entry["exchange"] for entry in (inputs, state, ring)] == [None, "gather", None]
    assert state["bytes_sent_per_layer"] == 2 * 32 * 128 * (128 + 128) * 4
    assert state["bytes_received_per_layer"] == 15 * state["bytes_sent_per_layer"]
    assert state["parts_per_device"] == 2
    assert state["tokens_per_device"] == 262_144 // 16
    assert state["break_even_tokens"] == 2 * 32 * 128 * (128 + 128) * 4 // (32 * 256 * 2)
    assert 0 < state["faster_from_tokens"] < state["tokens_per_device"]
    assert inputs["faster_from_tokens"] is ring["faster_from_tokens"] is ring["break_even_tokens"] is None
    assert state["seconds"] == state["exposed_s"] > 0
    alone = ("gpt2-small", "--ctx", "1k", "--gpu", "h100-sxm", "--devices", "8", "--parallel", "fsdp=8")
    assert run(capsys, *alone)["stages"][0]["sequence_exchange"] == []


def test_latents_are_passed_on_for_keys_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    common = ("deepseek-v3", "--ctx", "64k", "--gpu", "h100-sxm", "--devices", "512")
    (stage,) = run(capsys, *common, "--parallel", "fsdp=8,cp=8,pp=8,ep=64")["stages"]
    (entry,) = stage["sequence_exchange"]
    assert (entry["passed"], entry["way"], entry["exchange"]) == ("latents", "ring", None)
    assert entry["bytes_sent_per_layer"] == 7 * 8192 * (512 + 64) * 2


def test_too_few_tokens_for_a_state_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    common = ("llama-3-8b", "--mixer", "power:p=2", "--gpu", "h100-sxm", "--devices", "8", "--parallel", "cp=8")
    (stage,) = run(capsys, *common, "--ctx", "16k", "--micro-batch", "1")["stages"]
    (entry,) = stage["sequence_exchange"]
    assert entry["tokens_per_device"] == 2048 < entry["faster_from_tokens"]
    assert main(["train", *common, "--ctx", "16k", "--micro-batch", "1"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    less = f"would take less time than its state, as up to {entry['faster_from_tokens'] - 1:,}"
    assert f"power p=2: with 2,048 tokens on each device, keys and values of the same heads {less}" in out


def test_the_crossovers_of_the_page_are_those_that_are_planned() -> None:
    page = (Path(__file__).parent.parent / "docs" / "training.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (gather|scan) \| ([\d,]+) \| ([\d,]+) \|$", page, re.MULTILINE)
    assert len(rows) == 5
    for ranks, exchange, faster, fewer in rows:
        settings: dict[str, Any] = {
            "mixer": "power:p=2",
            "parallel": f"cp={ranks}",
            "micro_batch": 1,
            "loss": "chunked",
        }
        context = f"{16 * int(ranks)}k"
        answer = powerplan.train("llama-3-8b", context, gpu="h100-sxm", devices=int(ranks), **settings)
        (entry,) = answer.to_dict()["stages"][0]["sequence_exchange"]
        assert entry["exchange"] == exchange
        assert f"{entry['faster_from_tokens']:,}" == faster
        assert f"{entry['break_even_tokens']:,}" == fewer


def test_stages_are_summed(capsys: pytest.CaptureFixture[str]) -> None:
    common = ("llama-3-8b", "--gpu", "h100-sxm", "--devices", "64")
    both = run(capsys, *common, "--stage", "95B@8k", "--stage", "5B@128k")
    short = run(capsys, *common, "--tokens", "95B", "--ctx", "8k")
    long = run(capsys, *common, "--tokens", "5B", "--ctx", "128k")
    assert [stage["context"] for stage in both["stages"]] == [8192, 131_072]
    assert both["tokens"] == 10**11
    assert both["gpu_hours"] == pytest.approx(short["gpu_hours"] + long["gpu_hours"])
    assert both["parallel"] == short["parallel"], "the stage that takes longest stands for the run"
    assert main(["train", *common, "--stage", "95B@8k", "--stage", "5B@128k"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("llama-3-8b in 2 stages on 64 h100-sxm: ")
    assert out.count("allowance: libraries") == 1


def test_given_degrees_are_taken_and_may_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    common = ("llama-3.1-405b", "--gpu", "h100-sxm", "--devices", "8", "--ctx", "8k")
    result = run(capsys, *common, "--parallel", "fsdp=8", "--recompute", "full")
    assert result["parallel"]["fsdp"] == 8
    assert not result["fits"]
    assert main(["train", *common, "--parallel", "fsdp=8"]) == 0
    out = capsys.readouterr().out
    assert "does NOT fit" in out
    assert "no hours, as the run does not fit" in out
    assert result["gpu_hours"] is None


def test_mixers_whose_heads_allow_no_degrees_of_the_run_cost_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """GPT-2's 12 heads can be split among 4 devices, the 6 wider ones of what recommend puts first cannot."""
    common = ("gpt2-small", "--gpu", "h100-sxm", "--devices", "8")
    found = run(capsys, *common)
    assert any(other["recommended"] for other in found["alternatives"])
    given = run(capsys, *common, "--parallel", "tp=4,fsdp=2")
    assert given["parallel"]["tp"] == 4
    assert not any(other["recommended"] for other in given["alternatives"])
    assert {other["mixer"] for other in given["alternatives"]} >= {"power:p=2", "linear"}


def test_what_does_not_fit_says_on_how_many_devices_it_would() -> None:
    """405B parameters at 16 bytes are 6.5 TB: 82 devices hold them, and twice 64 hold the activations too."""
    with pytest.raises(
        InfeasibleError, match=r"does not fit 8 x h100-sxm: .* which has 85.02 GB .*; it fits 128 devices"
    ):
        powerplan.train("llama-3.1-405b", "8k", gpu="h100-sxm", devices=8)
    assert main(["train", "llama-3.1-405b", "--gpu", "h100-sxm", "--devices", "8"]) == 3


def test_more_devices_stand_in_nodes_as_given() -> None:
    """The same run in nodes of one card, without NVLink: the message is of devices that are joined as these are."""
    for node_devices, devices in ((1, 256), (8, 128)):
        with pytest.raises(InfeasibleError, match=rf"; it fits {devices} devices$"):
            powerplan.train("llama-3.1-405b", "64k", gpu="h100-sxm", devices=8, node_devices=node_devices)


def test_what_fits_with_a_chunked_loss_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "gpt2-small", "--gpu", "rtx-4090"]) == 3
    assert capsys.readouterr().err.splitlines()[-1].endswith("; it fits with --loss chunked")
    assert main(["train", "gpt2-small", "--gpu", "rtx-4090", "--loss", "chunked"]) == 0
    captured = capsys.readouterr()
    assert "learned positions end at 1,024: a context of 65,536 is a what-if" in captured.err
    assert ": fits, " in captured.out


def test_the_fastest_layout_that_fits_is_taken() -> None:
    accounting = Accounting(catalogue_spec("llama-3-8b"))
    plan = plan_training(accounting, [Phase(10**11, 131_072)], setting(64), Choices(Recipe()))
    layouts = Layouts(accounting, 131_072, setting(64))
    best = 0.0
    for degrees in all_degrees(layouts):
        for recompute in ("none", "selective", "full"):
            sequences = layouts.sequences_for(degrees, 1)
            if sequences:
                layout = layouts.layout(degrees, Recipe(recompute=recompute), sequences)  # type: ignore[arg-type]
                best = max(best, layout.tokens_per_s if layout.fits else 0.0)
    assert plan.layout.tokens_per_s == pytest.approx(best, rel=0.03)


@pytest.mark.parametrize(("name", "devices"), [("llama-3.1-405b", 16_384), ("deepseek-v3", 2048)])
def test_thousands_of_layouts_are_compared_within_two_seconds(name: str, devices: int) -> None:
    accounting = Accounting(catalogue_spec(name))
    started = time.process_time()
    plan = plan_training(accounting, [Phase(10**12, 8192)], setting(devices, Batch(2**24)), Choices(Recipe()))
    assert time.process_time() - started < 2
    assert 5000 < plan.phases[0].tried <= 3 * MAX_TRIED


@pytest.mark.parametrize("name", catalogue_names())
def test_every_model_of_the_catalogue_has_a_plan(name: str) -> None:
    accounting = Accounting(catalogue_spec(name))
    plan = plan_training(accounting, [Phase(10**9, 4096)], setting(64), Choices(Recipe()))
    layout = plan.layout
    assert not any(problems(layout.degrees, accounting.spec, 4096))
    assert layout.degrees.devices == 64
    assert 0 < layout.mfu < 0.6
    assert layout.memory.tensors > 0


@settings(max_examples=25, deadline=None)
@given(spec=specs, devices=st.sampled_from([1, 3, 8, 48]), context=st.sampled_from([1, 96, 8192]))
def test_random_models_have_plans(spec: powerplan.ModelSpec, devices: int, context: int) -> None:
    plan = plan_training(Accounting(spec), [Phase(1000, context)], setting(devices), Choices(Recipe()))
    layout = plan.layout
    assert layout.degrees.devices == devices
    assert layout.sequences % layout.degrees.sequences_at_once == 0
    assert layout.step_s > 0
    assert plan.phases[0].steps == -(-1000 // layout.batch_tokens)


def test_from_python_as_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    answer = powerplan.train("llama-3-8b", "128k", gpu="h100-sxm", devices=64, tokens="100B", parallel=Degrees(8, cp=8))
    assert run(capsys, *LLAMA, "--parallel", "fsdp=8,cp=8") == answer.to_dict()
    assert answer.fits


def test_exports_print_or_save(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", *LLAMA, "--export", "torchtitan"]) == 0
    printed = capsys.readouterr().out
    assert tomllib.loads(printed)["training"]["seq_len"] == 131_072
    target = tmp_path / "run.sh"
    assert main(["train", *LLAMA, "--export", "megatron", "--write", str(target)]) == 0
    captured = capsys.readouterr()
    assert "--seq-length 131072" in target.read_text(encoding="utf-8")
    assert captured.out.startswith("llama-3-8b at 131,072 tokens on 64 h100-sxm: fits, ")
    assert f"wrote {target}: megatron" in captured.err
    assert main(["train", *LLAMA, "--export", "megatron", "--write", str(target)]) == 2
    assert main(["train", *LLAMA, "--write", str(tmp_path / "other.sh")]) == 2
    assert "--write: needs the trainer; such as --export torchtitan" in capsys.readouterr().err


MESSAGES = {
    "": "--gpu: a training run needs a device, such as h100-sxm",
    "--gpu h100-sxm --devices 8 --parallel fsdp=8,tp=2": "--parallel: fsdp 8 * tp 2 * pp 1 * cp 1 * replicas 1 is 16",
    "--gpu h100-sxm --devices 8 --parallel fsdp=8,tq=2": "--parallel: 'tq' is not a degree; allowed are fsdp, tp, pp,",
    "--gpu h100-sxm --devices 8 --parallel fsdp=8,fsdp=8": "--parallel: fsdp is given twice",
    "--gpu h100-sxm --devices 8 --parallel fsdp": "--parallel: 'fsdp' is not a degree; write fsdp=8,cp=8, or auto",
    "--gpu h100-sxm --devices 8 --parallel fsdp=0": "--parallel fsdp: 0 is out of range",
    "--gpu h100-sxm --devices 24 --parallel tp=3,fsdp=8": "--parallel: tp 3 does not divide the 32 heads of attention",
    "--gpu h100-sxm --devices 24 --parallel cp=3,fsdp=8": "--parallel: cp 3 does not divide the context of 65,536",
    "--gpu h100-sxm --devices 8 --ctx 24 --parallel cp=8": "--parallel: cp 8 needs 16 pieces of one length, and the",
    "--gpu h100-sxm --devices 64 --parallel pp=64": "--parallel: pp 64 is more stages than the 32 layers",
    "--gpu h100-sxm --devices 64 --parallel pp=16,fsdp=4,interleave=4": "--parallel: pp 16 * interleave 4 is 64 parts",
    "--gpu h100-sxm --devices 8 --parallel fsdp=8,interleave=2": "--parallel: interleave 2 needs pipeline stages",
    "--gpu h100-sxm --devices 8 --batch-tokens 256k --parallel pp=8,interleave=2": "so that 8 are at work, which does",
    "--gpu h100-sxm --devices 8 --parallel ep=8": "replicas 1 is 1 device, and there are 8",
    "--gpu tpu-v5p --dtype fp32": "tpu-v5p has no fp32 matrix rate in the catalogue",
    "--gpu h100-sxm --devices 8 --parallel fsdp=8,ep=2": "--parallel: ep 2 needs experts, and llama-3-8b has none",
    "--gpu h100-pcie --devices 64": "--network-gbs: h100-pcie has no network rate in the catalogue, and 64 devices",
    "--gpu h100-sxm --price -1": "--price: '-1' is not an amount of money; write 2.50",
    "--gpu h100-sxm --network-gbs 0": "--network-gbs: '0' is out of range; a rate is more than 0",
    "--gpu h100-sxm --link-gbs fast": "--link-gbs: 'fast' is not a rate; write GB/s, as 50",
    "--gpu h100-sxm --node-devices 0": "--node-devices: 0 is out of range",
    "--gpu h100-sxm --zero 4": "--zero: 4 is out of range; allowed are 0 to 3",
    "--gpu h100-sxm --recompute al": "--recompute: 'al' is not known; allowed are none, selective, full, auto",
    "--gpu h100-sxm --micro-batch 0": "--micro-batch: 0 is out of range",
    "--gpu h100-sxm --efficiency 1.5": "--efficiency: '1.5' is out of range",
    "--gpu h100-sxm --optimizer adam": "--optimizer: 'adam' is not known; did you mean adamw?",
    "--gpu h100-sxm --stage 950B@8k --tokens 1B": "--stage: has tokens and contexts of its own: leave --tokens out",
    "--gpu h100-sxm --stage 950B@8k --ctx 8k": "--stage: has tokens and contexts of its own: leave --ctx out",
    "--gpu h100-sxm --devices 8 --stage 1B@8k --stage 1B@4k --export megatron": "--export: writes one stage, and",
    "--gpu h100-sxm --export deepspeed": "--export: 'deepspeed' is not known; allowed are torchtitan, megatron",
    "--gpu h100-sxm --stage 950B": "--stage: '950B' is not a stage; write tokens@context, as 950B@8k",
    "--gpu h100-sxm --stage x@8k": "--stage: 'x' is not a count of tokens",
    "--gpu h100-sxm --batch-tokens 100k": "--batch-tokens: 102,400 tokens are no whole number of sequences of 65,536",
    "--gpu h100-sxm --devices 64 --batch-tokens 128k --parallel fsdp=64": "fsdp and replicas work on 64 at once",
    "--gpu h100-sxm --devices 37 --batch-tokens 64k --ctx 8k": "no layout of 37 devices can share them evenly",
}


@pytest.mark.parametrize("arguments", MESSAGES)
def test_bad_input_has_one_message(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "llama-3-8b", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert MESSAGES[arguments] in line


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        (Degrees(fsdp=-8, tp=-1), "parallel fsdp: -8 is out of range; allowed are 1 to 1,000,000"),
        (Degrees(fsdp=8, ep=0), "parallel ep: 0 is out of range"),
        (Degrees(fsdp=8, interleave=0), "parallel interleave: 0 is out of range"),
        (Degrees(fsdp=8, zero=7), "parallel zero: 7 is out of range; allowed are 0 to 3"),
        (Degrees(fsdp=8.5), "parallel fsdp: '8.5' is not"),  # type: ignore[arg-type]
    ],
)
def test_degrees_of_python_are_checked(degrees: Degrees, message: str) -> None:
    with pytest.raises(InputError, match=message):
        powerplan.train("llama-3-8b", "8k", gpu="h100-sxm", devices=8, parallel=degrees)


def test_interleaved_stages_have_micro_batches_for_all() -> None:
    """A stage in several parts waits for (pp - 1) / interleave micro-batches only if there are pp of them or more."""
    plan = powerplan.train("llama-3-8b", "8k", gpu="h100-sxm", devices=4096, batch_tokens="4M").plan
    layouts = (plan.layout, *plan.phases[0].others)
    interleaved = [layout for layout in layouts if layout.degrees.interleave > 1]
    assert interleaved
    assert all(layout.step.micro_batches % layout.degrees.pp == 0 for layout in interleaved)
    given = powerplan.train("llama-3-8b", "8k", gpu="h100-sxm", devices=24, parallel="pp=24").plan.layout
    assert given.step.micro_batches == 512, "stages in one part take any number"


def test_fp32_has_the_fp32_rate() -> None:
    """Without TF32 an H100 has 67 TFLOP/s in fp32, and 989 in bf16."""
    half, full = (
        powerplan.train("gpt2-small", "1k", gpu="h100-sxm", dtype=dtype, parallel="fsdp=1", recompute="full")
        for dtype in ("bf16", "fp32")
    )
    assert full.plan.layout.step.weights_s == pytest.approx(half.plan.layout.step.weights_s * 989 / 67)
    assert "assumed of the fp32 peak" in " ".join(str(full).split())


def test_help_is_whole_at_80_columns(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["train", "--help"]) == 0
    assert "…" not in capsys.readouterr().out


def test_short_runs_and_long_steps_are_told_in_whole_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    common = ("train", "llama-3.1-405b", "--gpu", "h100-sxm", "--devices", "8", "--ctx", "8k", "--tokens", "4M")
    assert main([*common, "--parallel", "fsdp=8"]) == 0
    out = capsys.readouterr().out
    assert "\n1 step of 512 sequences" in out
    assert re.search(r"  step +3,\d\d0\n", out)


def test_key_value_heads_are_split_or_repeated_evenly() -> None:
    """qwen2.5-1.5b has 12 heads, which 3 devices share, and 2 key/value heads, which they do not."""
    spec = catalogue_spec("qwen2.5-1.5b")
    assert list(problems(Degrees(tp=3), spec, 8192)) == [
        "tp 3 is no divisor or multiple of the 2 key/value heads of attention"
    ]
    assert not [problem for tp in (2, 4, 6, 12) for problem in problems(Degrees(tp=tp), spec, 8192)]


def test_python_names_parameters() -> None:
    with pytest.raises(InputError, match="'8' is not a known device"):
        powerplan.train("gpt2-small", gpu=8)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="parallel: 'None' is not a degree; write fsdp=8,cp=8, or auto"):
        powerplan.train("gpt2-small", gpu="h100-sxm", parallel=None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="gpu: a training run needs a device"):
        powerplan.train("gpt2-small")
    with pytest.raises(InputError, match="optimizer: 'adam' is not known"):
        powerplan.train("gpt2-small", gpu="h100-sxm", optimizer="adam")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="gradients_dtype: 'int4' is not known; allowed are bf16, fp16, fp32"):
        powerplan.train("gpt2-small", gpu="h100-sxm", gradients_dtype="int4")  # type: ignore[arg-type]


def test_the_energy_of_a_short_run_is_in_kilowatt_hours(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "gpt2-small", "--ctx", "1k", "--tokens", "1B", "--gpu", "h100-sxm"]
    assert main([*command, "--format", "json"]) == 0
    energy = json.loads(capsys.readouterr().out)["energy_kwh"]
    assert energy < 1000
    assert main(command) == 0
    assert f"at most {energy:.3g} kWh at the board power" in " ".join(capsys.readouterr().out.split())
