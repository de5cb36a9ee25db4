"""One budget for several models and contexts: each row is what the command says of that model at that context alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_budget import POWER, profile_of

import powerplan
from powerplan.cli import main
from powerplan.errors import InputError
from powerplan.load import load_model

BUDGETS = [
    ["--flops", "1e21"],
    ["--tokens", "300B", "--batch-tokens", "512k"],
    ["--gpu-hours", "1000", "--gpu", "h100-sxm", "--devices", "8", "--mfu", "30%"],
    ["--mixer", "power:p=2", "--causal", "full", "--dtype", "fp8"],
]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], str]:
    assert main(["budget", *arguments, "--format", "json"]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


@pytest.mark.parametrize("budget", BUDGETS, ids=lambda words: words[0])
def test_each_row_is_that_model_alone(capsys: pytest.CaptureFixture[str], budget: list[str]) -> None:
    names = ["llama-3-8b", "gpt2-small"]
    result, _ = run(capsys, *names, "--ctx", "8k,64k", *budget)
    assert result["schema"] == "powerplan.budgets/1"
    places = [(row["name"].split(" with ")[0], row["context"]) for row in result["rows"]]
    assert places == [(name, context) for context in (8192, 65_536) for name in names]
    for row, (name, context) in zip(result["rows"], places, strict=True):
        alone, _ = run(capsys, name, "--ctx", str(context), *budget)
        assert alone["schema"] == "powerplan.budget/1"
        ours = row | result
        as_it_is = alone["alternatives"][0]
        assert (row["wsfr"], row["state_bytes"]) == (as_it_is["wsfr"], as_it_is["state_bytes"])
        weights_and_state = {"train_weight_flops_per_token", "train_state_flops_per_token"}
        for key in alone.keys() - weights_and_state - {"schema", "model", "context", "alternatives"}:
            assert ours[key] == alone[key], key
        models = {model["name"]: model for model in result["models"]}
        assert alone["model"].items() <= models[row["name"]].items()


def test_several_contexts_of_one_model_are_rows(capsys: pytest.CaptureFixture[str]) -> None:
    result, err = run(capsys, "gpt2-small", "--ctx", "8k, 64k,8k", "--flops", "1e21")
    assert [row["context"] for row in result["rows"]] == [8192, 65_536]
    assert [row["total_flops"] for row in result["rows"]] == [10**21, 10**21]
    assert err == ""
    assert "tokens per active parameter are many" in result["rows"][0]["warnings"][0]


def test_the_table_has_what_differs(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["budget", "llama-3-8b", "qwen3-4b", "--ctx", "8k,64k"]
    assert main([*command, "--gpu-hours", "10000", "--gpu", "h100-sxm", "--devices", "64", "--batch-tokens", "4M"]) == 0
    out = capsys.readouterr().out
    assert "llama-3-8b: 8.03B parameters; balanced at 57,255 tokens" in out
    assert "Device hours on h100-sxm at 40% of the bf16 peak, 395.6 TFLOP/s" in out
    assert "As many FLOPs in each row, 1.424e+22." in out
    assert "in all" not in out
    assert max(map(len, out.splitlines())) <= 100
    assert main([*command, "--tokens", "100B"]) == 0
    out = capsys.readouterr().out
    assert "FLOPs are each row's own." in out
    assert "in all" in out
    assert main([*command, "--flops", "1e21", "--format", "csv"]) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert heading.startswith("context,name,wsfr,train_flops_per_token,total_flops,tokens,sequences")
    assert len(rows) == 4


def test_measured_times_are_those_of_the_rows_that_have_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = profile_of(tmp_path / "p.json", [{**POWER, "context": 16_384, "ms_p50": 16.384}])
    budget = ["--gpu-hours", "10", "--gpu", "h100-sxm", "--mfu", "0.5", "--measured", path, "--ctx", "64k"]
    result, err = run(capsys, "gpt2-small", "power-paper-small", *budget)
    softmax, power = result["rows"]
    per_token = 12 * 1e-6 + 3 * 247_064_064 / (989e12 / 2)
    assert (softmax["time_source"], power["time_source"]) == ("mfu", "measured")
    assert power["tokens"] == pytest.approx(36_000 / per_token, rel=0.02)
    assert err.startswith(f"note: gpt2-small: {path} has no forward+backward time of attention")
    assert err.count("\n") == 1
    main(["budget", "gpt2-small", "power-paper-small", *budget])
    out = capsys.readouterr().out
    assert "Device hours state part of some as measured, the rest on h100-sxm at 50% of the bf16 peak" in out


def test_from_python() -> None:
    loaded = load_model("gpt2-small")
    for models in ("gpt2-small", loaded.spec, [loaded]):
        alone = powerplan.budget(models, "64k", flops=1e21, gpu="h100-sxm")
        assert alone.budget.tokens == alone.rows[0].budget.tokens == 229_088_454_035
        assert alone.time == alone.rows[0].time
        assert alone.alternatives[0].budget == alone.budget
        assert alone.to_dict()["schema"] == "powerplan.budget/1"
    assert powerplan.budget(loaded).budget.row.context == 65_536
    several = powerplan.budget([loaded, "llama-3-8b"], [8192, "64k"], flops=1e21, gpu="h100-sxm")
    per_token = [3 * (247_064_064 + 18_432 * 8193), 3 * (15_009_316_864 + 262_144 * 8193)]
    assert [row.budget.tokens for row in several.rows][:2] == [10**21 // flops for flops in per_token]
    assert {round(row.gpu_hours or 0) for row in several.rows} == {702}
    for name in ("budget", "alternatives", "time", "gpu_hours"):
        with pytest.raises(InputError, match=f"^{name}: is of one model at one context, and this answer has 4 rows$"):
            getattr(several, name)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ([], {}, "model: is an empty list; give one model or more, or None to ask which"),
        ("", {}, "model: is empty; give a file, a folder with a config.json, or a catalogue name"),
        (["gpt2-small", "gpt2"], {}, "model: gpt2-small is given twice; give each model once"),
        (["gpt2-small", "gpt3"], {}, "'gpt3' is neither a file nor a built-in model; .*"),
        ("gpt2-small", {"context": []}, "context: is empty; .*"),
        ("gpt2-small", {"context": 1.5}, "context: 1.5 is not a context; .*"),
        (
            ["gpt2-small", "gpt2-xl"],
            {"context": range(1, 502)},
            "context: 2 times 501 models and contexts are too many; 1,000 rows are the most",
        ),
        (["gpt2-small", "gpt2-xl"], {"flops": 1, "tokens": 1}, "flops and tokens are one budget twice; .*"),
        (None, {}, "model: is missing; give one, or a budget to ask which: flops='1e21', or gpu_hours='1000' gpu=.*"),
        (None, {"tokens": "1B"}, "tokens: needs a model; without one the budget is flops or gpu_hours"),
        (
            None,
            {"flops": 1e21, "measured": "benchmarks/results/profile-cpu.json"},
            "measured: needs a model: a profile has no times of other sizes",
        ),
        (None, {"gpu_hours": 10}, "gpu_hours: needs the device; such as gpu='h100-sxm'"),
        (None, {"flops": 1e21, "mixer": "kdb"}, "mixer: 'kdb' is not a mixer; .*"),
        (
            None,
            {"flops": 1e21, "context": range(1, 18)},
            "context: 17 contexts are too many to size models at; give 16 at most",
        ),
    ],
)
def test_an_error_names_the_parameter(
    model: Any, arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).resolve().parent.parent)
    with pytest.raises(InputError, match=f"^{message}$"):
        powerplan.budget(model, **arguments)
