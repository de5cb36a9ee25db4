"""What `recommend` advises under labels: change, saves, costs, loses, next; and how many candidates it shows."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

import powerplan
from powerplan.answers.recommend import RecommendAnswer
from powerplan.cli import main
from powerplan.load import catalogue_spec, load_model
from powerplan.mixers.formulas import Convention
from powerplan.mixers.power import Power
from powerplan.profile import workload_of
from powerplan.report.advice import OVERTAKES, speed_of
from powerplan.report.losses import losses
from powerplan.report.reasons import change
from powerplan.swap import with_mixer

LABELS = ["Change", "Saves", "Costs", "Loses", "Next"]
ASKED = [
    "gpt2-small --ctx 64k",
    "gpt2-small --ctx 1k",
    "gpt2-small --ctx 64k --keep flops",
    "gpt2-small --ctx 64k --exclude lm-head --form chunked --causal full --dtype fp32",
    "llama-3-8b --ctx 8k,64k",
    "llama-3-8b --ctx 128k --gpu h100-sxm --devices 64 --price 2.5",
    "llama-3-8b --ctx 128k --target 3:1 --only window",
    "llama-3-8b --ctx 256k --max-state 512MiB --top 1",
    "llama-3-8b --ctx 256k --only kda,attention",
    "deepseek-v3 --ctx 128k --weights-vs-state state",
    "kimi-linear-48b-a3b --ctx 1M",
    "rwkv7-1.5b --ctx 64k",
]


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["recommend", *arguments, "--format", "json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize("asked", ASKED)
def test_the_labels_stand_before_the_table_and_their_commands_run(
    asked: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = said(capsys, *asked.split())
    assert main(["recommend", *asked.split()]) == 0
    out = capsys.readouterr().out
    heading = next(line for line in out.splitlines() if line.startswith("  #"))
    head = out.partition(heading)[0]
    assert [line.partition(":")[0] for line in head.splitlines() if line[:6].strip(" :") in LABELS] == LABELS
    text = " ".join(head.split())
    assert all(f"{label}: {result[label.lower()]}" in text for label in LABELS[:-1])
    for command in result["next"]:
        program, name, *arguments = shlex.split(command)
        assert program == "powerplan"
        if name == "profile":  # Measuring takes a minute; what it would measure is found at once.
            assert workload_of(load_model(*arguments).spec).subjects
        else:
            assert main([name, *arguments]) == 0, command
    wanted = [word for word in asked.split() if word not in ("--top", "1")]
    first = shlex.split(result["next"][0])
    if first[1] == "recommend":
        assert set(wanted) <= set(first)
        assert load_model("new.yaml").spec.layer_count


def test_what_gpt2_small_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    result = said(capsys, "gpt2-small", "--ctx", "64k")
    assert result["change"] == (
        "9 of 12 layers to power p=2 with 6 heads of 128 (layers 0-2, 4-6, 8-10); 3 to power p=2 with 12 heads of 64 "
        "(layers 3, 7, 11)"
    )
    base = powerplan.wsfr("gpt2-small", "64k").rows[0]
    own = powerplan.recommend("gpt2-small", "64k").recommended.row
    moved = [row.decode_weight_bytes_per_token + row.decode_state_bytes_per_token for row in (base, own)]
    assert result["saves"] == (
        f"{change(base.flops_per_token / own.flops_per_token, 'fewer', 'FLOPs per token')}, "
        f"{change(base.state_bytes / own.state_bytes, 'less', 'state')}, "
        f"{change(moved[0] / moved[1], 'fewer', 'bytes to decode at batch 1')}"
    )
    assert "docs/kernels.md" in result["costs"]
    assert "exact lookup of tokens in all 12 layers" in result["loses"]
    assert "docs/icl.md" in result["loses"]
    assert result["next"] == [
        "powerplan recommend gpt2-small --ctx 64k --write new.yaml",
        "powerplan profile new.yaml",
    ]
    text = " ".join(str(powerplan.recommend("gpt2-small", "64k")).split())
    assert text.count("1:1 is a hypothesis of arXiv 2507.04239") == 1


@pytest.mark.parametrize(
    ("asked", "said_of", "words"),
    [
        ("llama-3.1-8b --ctx 128k", 1, "20 of fixed state to 12 of full attention here, 1.7:1, are below that range."),
        (
            "llama-3-8b --ctx 256k --only kda,attention",
            1,
            "8 of full attention here, 3.0:1, are within that range.",
        ),
        ("gpt2-small --ctx 64k", 0, ""),  # No layer keeps full attention: the finding is of hybrids.
        ("gpt2-small --ctx 64k --keep flops", 1, "larger and sparser models beat smaller and dense ones at equal cost"),
        ("llama-3.1-8b --ctx 128k --only moba", 1, "without training, 7B to 72B parameters, 16k to 128k tokens"),
        ("llama-3-8b --ctx 64k", 0, ""),  # It stays as it is.
    ],
)
def test_what_the_field_found_is_cited_where_it_bears(
    asked: str, said_of: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = said(capsys, *asked.split())
    assert len(result["findings"]) == said_of
    assert words in "".join(result["findings"])
    assert main(["recommend", *asked.split()]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(text.count(found) == 1 for found in result["findings"])


def test_heads_without_a_gpu_kernel_are_a_cost(capsys: pytest.CaptureFixture[str]) -> None:
    result = said(capsys, "gemma-3-1b", "--ctx", "128k", "--only", "attention,power", "--exclude", "mix")
    problem = "no GPU kernel for power p=2 in heads of 256 (powerplan dims)"
    assert result["recommended"]["label"] == "power p=2"
    assert problem in result["costs"]
    assert "heads of 128 (powerplan dims)" not in result["costs"]
    reasons = {one["label"]: one["why"] for one in result["candidates"]}
    assert all((problem in why) == label.startswith("power p=2") for label, why in reasons.items())
    assert power_of(head_dim=128, v_head_dim=256).gpu_kernel_problem == (
        "no GPU kernel for power p=2 in heads of 128/256 (powerplan dims)"
    )
    assert power_of(head_dim=128).gpu_kernel_problem is None


@pytest.mark.parametrize("model", ["gemma-2-9b", "gemma-3-1b"])
def test_of_plans_as_near_to_the_target_those_with_a_gpu_kernel_come_first(model: str) -> None:
    candidates = powerplan.recommend(model, "64k", top=100).candidates
    near = [own.plan.choices for own in candidates if own.balanced]
    same_weights = [choices for choices in near if not any(choice.fewer_kv_heads for choice in choices)]
    orders = [max(choice.kernel_order for choice in choices) for choices in same_weights]
    assert orders == sorted(orders)
    assert set(orders) == {0, 1}


def test_speed_is_told_of_the_heads_that_a_plan_has(capsys: pytest.CaptureFixture[str]) -> None:
    both = "below about 14k tokens (heads of 64) or 23k (128) on an H100 (docs/kernels.md)"
    assert both in said(capsys, "gpt2-small", "--ctx", "64k")["costs"]
    costs = said(capsys, "llama-3.1-8b", "--ctx", "128k")["costs"]
    assert costs.endswith("attention below about 23k tokens (heads of 128) on an H100 (docs/kernels.md)")
    assert speed_of([power_of(head_dim=96)]) == (
        f"p=2 trains more slowly than attention {both}; heads of 96 were not timed"
    )
    assert speed_of([power_of(head_dim=96), power_of(head_dim=64)]) == (
        "p=2 trains more slowly than attention below about 14k tokens (heads of 64) on an H100 (docs/kernels.md)"
    )
    assert speed_of([power_of(head_dim=256)]) is None


def power_of(head_dim: int, v_head_dim: int | None = None) -> Power:
    return Power(p=2, heads=4, kv_heads=2, head_dim=head_dim, v_head_dim=v_head_dim or head_dim)


def test_the_contexts_are_those_that_were_measured() -> None:
    """From the crossovers of benchmarks/results/gpu.json, rounded to thousands."""
    root = Path(__file__).resolve().parent.parent.parent
    found = json.loads((root / "benchmarks" / "results" / "gpu.json").read_text(encoding="utf-8"))["crossovers"]
    assert {row["head_dim"]: f"{round(row['context'] / 1000)}k" for row in found} == OVERTAKES


def test_a_model_that_stays_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    near = said(capsys, "llama-3-8b", "--ctx", "64k")
    assert near["change"] == "nothing: the model stays as it is"
    assert near["saves"] == "nothing; 26 attention + 6 power p=2 would save 8% of the FLOPs"
    assert near["costs"] == "nothing; the ratio stays 1:1.14"
    assert near["next"] == ["powerplan recommend llama-3-8b --ctx 64k --pick 2 --write new.yaml"]
    light = said(capsys, "gpt2-small", "--ctx", "1k")
    assert light["next"] == ["powerplan wsfr gpt2-small --ctx 1k,13403"]
    balanced = said(capsys, "gpt2-small", "--ctx", "13403")
    assert (balanced["change"], balanced["costs"]) == ("nothing: the model stays as it is", "nothing")
    assert said(capsys, "rwkv7-1.5b", "--ctx", "64k")["next"] == ["powerplan wsfr rwkv7-1.5b --ctx 64k --by layer"]


def test_a_file_that_is_written_is_the_next_commands(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(tmp_path / "my plan.yaml")
    assert said(capsys, "gpt2-small", "--ctx", "64k", "--write", path)["next"] == [f"powerplan profile '{path}'"]
    picked = said(capsys, "gpt2-small", "--ctx", "64k", "--write", path, "--force", "--pick", "2")["next"]
    assert picked[0].endswith("--write new.yaml"), "the file has another candidate"


@pytest.mark.parametrize("top", [1, 2, 3, 5, 6, 9])
def test_top_is_how_many_are_shown(top: int) -> None:
    whole = powerplan.recommend("llama-3-8b", "128k", top=50)
    answer = powerplan.recommend("llama-3-8b", "128k", top=top)
    labels = [candidate.label for candidate in answer.candidates]
    assert len(labels) == top == len(answer.to_dict()["candidates"])
    assert labels[0] == whole.recommended.label
    assert ("as it is" in labels) == (top > 1)
    assert ("power p=2" in labels) == (top > 3)
    order = [candidate.label for candidate in whole.candidates]
    assert labels == sorted(labels, key=order.index)


def test_six_are_shown_by_default() -> None:
    assert len(powerplan.recommend("llama-3-8b", "128k").candidates) == 6
    assert len(powerplan.recommend("gpt2-small", "64k", keep="flops").candidates) == 6


def words(answer: RecommendAnswer) -> list[str]:
    return list(answer.command)


def test_a_call_from_python_has_the_same_command() -> None:
    head = ["powerplan", "recommend", "gpt2-small", "--ctx", "64k"]
    assert words(powerplan.recommend("gpt2-small")) == head
    for model in (load_model("gpt2-small"), catalogue_spec("gpt2-small")):
        assert words(powerplan.recommend(model, 65_536)) == head
    convention = Convention(causal="full", lm_head=False)
    answer = powerplan.recommend(
        "gpt2-small", [10_000, "1M"], target=2.0, only=["power", "window"], prefer="state", top=3, convention=convention
    )
    assert words(answer)[3:] == [
        *("--ctx", "10000,1M", "--target", "2.0:1", "--only", "power,window", "--weights-vs-state", "state"),
        *("--causal", "full", "--exclude", "lm-head"),
    ]


def test_what_layers_lose() -> None:
    spec = catalogue_spec("llama-3-8b")

    def lost(mixer: str, context: int = 65_536) -> list[str]:
        return losses(spec, with_mixer(spec, mixer)[0], context)

    assert lost("attention") == []
    assert lost("window:1024") == [
        "direct sight of what is more than 1,024 tokens back, in all 32 layers; what is more than 32,737 back is not "
        "seen at all"
    ]
    pattern = ["direct sight of most of what is more than 1,280 tokens back, in all 32 layers"]
    assert lost("exponential_sparse") == pattern, "blocks at powers of two pass on the rest"
    assert lost("window:4096") == ["direct sight of what is more than 4,096 tokens back, in all 32 layers"]
    assert lost("window:4096", 4096) == []
    assert len(lost("power:p=2")) == 2
    assert len(lost("power:p=3")) == 1, "no run of ours had p = 3"
    assert "recalled little" in lost("linear")[1]
    assert lost("power:p=2,kv_heads=4,heads=32,head_dim=128")[-1] == (
        "separate keys and values: 8 query heads share each, instead of 4"
    )
    power = with_mixer(spec, "power:p=2")[0]
    assert losses(power, with_mixer(spec, "power:p=3")[0], 65_536) == [], "a state stood there before"


def test_layers_that_had_no_tokens_lose_none() -> None:
    hybrid = catalogue_spec("qwen3-next-80b-a3b")
    plan = powerplan.recommend("qwen3-next-80b-a3b", "128k").recommended
    assert plan.label == "6 attention + 6 power p=2 32x128/4"
    assert losses(hybrid, plan.spec, 131_072)[0].startswith("exact lookup of tokens in 6 of 48 layers:")
    windows = catalogue_spec("gemma-3-1b")
    wider = with_mixer(windows, "window:1024")[0]
    assert losses(windows, wider, 65_536) == [
        "direct sight of what is more than 1,024 tokens back, in 4 of 26 layers; what is more than 26,599 back is not "
        "seen at all"
    ]


def test_the_next_run_is_the_one_that_was_planned(capsys: pytest.CaptureFixture[str]) -> None:
    run = ["--gpu", "h100-sxm", "--devices", "64", "--tokens", "100B", "--price", "2.5"]
    result = said(capsys, "llama-3.1-8b", "--ctx", "128k", *run)
    assert result["next"][-1] == f"powerplan train new.yaml --ctx 128k {' '.join(run)}"
    too_small = said(capsys, "llama-3.1-8b", "--ctx", "128k", "--gpu", "h100-sxm")
    assert not [command for command in too_small["next"] if command.startswith("powerplan train")], "it does not fit"


def test_on_target_is_not_balanced() -> None:
    text = " ".join(str(powerplan.recommend("gpt2-small", "64k", target="3:1")).split())
    assert " 1 on target; " in text
    assert "1 balanced" not in text
    assert "on target at 4,467 tokens" in text
    several = powerplan.recommend("gemma-3-1b", ["8k", "1M"])
    assert several.recommended.balanced
    assert several.recommended.rows[0].wsfr > 4
    text = " ".join(str(several).split())
    assert " 1 on target" in text
    assert "1 balanced" not in text
