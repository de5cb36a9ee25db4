"""`powerplan profile` on a tiny model: what it measures, saves, shows and plans with; what it keeps when it is cut."""

from __future__ import annotations

import csv
import io
import itertools
import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from children import interruptible
from profiled import QUICK, profiled

from powerplan.accounting import Accounting
from powerplan.cli import main
from powerplan.load import load_model
from powerplan.measured import read_profile
from powerplan.mixers import Attention, Convention, Power
from powerplan.mixers.formulas import total
from powerplan.profile.result import load_profile
from powerplan.swap import with_mixer

pytestmark = pytest.mark.usefixtures("little_work")


def test_the_contract(whole: Path) -> None:
    data = json.loads(whole.read_text(encoding="utf-8"))
    assert data["schema"] == "powerplan.profile/1"
    assert {"device", "torch", "triton", "date", "results"} <= data.keys()
    keys = {"name", "impl", "pass", "context", "ms_p20", "ms_p50", "ms_p80", "tokens_per_s", "tflops"}
    for row in data["results"]:
        assert keys <= row.keys()
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        tokens = row["batch"] * (1 if row["pass"] == "decode" else row["context"])
        assert row["tokens_per_s"] == pytest.approx(tokens / row["ms_p50"] * 1000)
        assert row["tflops"] == pytest.approx(row["flops"] / row["ms_p50"] / 1e9)
        assert row["share_of_matmul"] == pytest.approx(row["tflops"] * 1e12 / data["matmul_flops_per_s"])


def test_everything_was_measured(whole: Path) -> None:
    profile = load_profile(str(whole))
    assert profile.missing == ()
    names = {"power p=2", "power p=3", "attention", "window 18", "linear"}
    for direction in ("forward", "forward+backward", "decode"):
        places = {(row.name, row.context) for row in profile.part("state", direction)}
        assert places >= {(name, context) for name in names for context in (64, 256)}
    assert {(row.name, row.direction) for row in profile.part("layer")} == {
        (name, direction) for name in names for direction in ("forward", "forward+backward")
    }
    assert {row.direction for row in profile.part("ffn")} == {"forward", "forward+backward", "decode"}
    chunks = {row.chunk_size for row in profile.part("state", "forward") if row.p == 2}
    assert {32, 64} <= chunks
    assert [item.direction for item in profile.breakdown] == ["forward", "forward+backward", "decode"]
    assert all(item.parts for item in profile.breakdown)
    assert all(row.peak_bytes is not None and row.peak_bytes > 0 for row in profile.results)
    assert len(profile.checks) == 8
    assert all(check.share_of_budget <= 1 for check in profile.checks)
    assert [item.direction for item in profile.crossover] == ["forward", "forward+backward", "decode"]


def test_the_split_is_of_the_parts_and_of_the_planner(whole: Path) -> None:
    profile = load_profile(str(whole))
    assert len(profile.split) == 3 * 2 * 5
    spec, _ = with_mixer(load_model(whole.parent / "tiny.yaml").spec, "power:p=2")
    accounting = Accounting(spec, Convention(lm_head=False))
    for row in profile.split:
        assert row.wsfr_time == pytest.approx(row.weight_ms / row.state_ms)
        if (row.name, row.direction) == ("power p=2", "forward"):
            ratio = accounting.wsfr(row.context)
            assert ratio is not None
            assert row.wsfr_flops == pytest.approx(float(ratio))


def test_flops_are_the_planners(whole: Path) -> None:
    heads: dict[str, int] = {"heads": 4, "kv_heads": 2, "head_dim": 8}
    rows = {(row.name, row.direction, row.context): row.flops for row in load_profile(str(whole)).part("state")}
    exact = total(Attention(**heads).state_flops_terms(256, Convention()))
    assert rows["attention", "forward", 256] == exact * 256
    assert rows["attention", "forward+backward", 256] == 3 * exact * 256
    terms = Power(**heads, p=2).state_flops_terms(256, Convention(form="chunked"))
    (update,) = [item.value for item in terms if "update state" in item.component]
    # The second of two chunks of 128 is not added to a state that nobody reads.
    assert rows["power p=2", "forward", 256] == total(terms) * 256 - update * 128
    assert rows["attention", "decode", 256] == 2 * 4 * 16 * 256


def test_planning_reads_the_same_file(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile, saved = read_profile(str(whole)), load_profile(str(whole))
    heads: dict[str, int] = {"heads": 4, "kv_heads": 2, "head_dim": 8}
    for mixer, name in ((Attention(**heads), "attention"), (Attention(**heads, window=18), "window 18")):
        seconds = profile.training_time(mixer, 256)
        assert isinstance(seconds, float), seconds
        (row,) = [row for row in saved.part("state", "forward+backward") if (row.name, row.context) == (name, 256)]
        assert seconds == pytest.approx(row.ms_p50 / 1000 / 256)
    command = ["recommend", str(whole.parent / "tiny.yaml"), "--ctx", "256", "--hardware", "h100-sxm"]
    command += ["--format", "json"]
    capsys.readouterr()
    assert main(command) == 0
    before = json.loads(capsys.readouterr().out)["candidates"]
    assert main([*command, "--measured", str(whole)]) == 0
    after = json.loads(capsys.readouterr().out)["candidates"]
    assert {item["time_source"] for item in before} == {"roofline"}
    measured = {item["label"]: item for item in after if item["time_source"] == "measured"}
    assert {"as it is", "power p=2"} <= measured.keys()
    for item in before:
        if item["label"] in measured:
            assert measured[item["label"]]["train_s_per_token"] > 10 * item["train_s_per_token"]
    assert (
        main(["budget", str(whole.parent / "tiny.yaml"), "--ctx", "256", "--gpu", "h100-sxm", "--measured", str(whole)])
        == 0
    )


def test_show_prints_it_again(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "--show", str(whole)]) == 0
    text = capsys.readouterr().out
    # Columns are as wide as what was timed, and a tiny layer on a busy machine may take 1,000 times the ideal.
    prose = [line for line in text.split("\n") if "  " not in line.strip()]
    assert len(prose) > 5
    assert max(map(len, prose)) <= 100
    for words in ("tiny, layers 0-1: 4 (2 kv) heads of 8", "checked against float64", "WSFR", "power: within chunk"):
        assert words in text
    assert "is the fastest chunk of power p=2 at 256 tokens" in text
    assert main(["profile", "--show", str(whole), "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(whole.read_text(encoding="utf-8"))
    assert main(["profile", "--show", str(whole), "--format", "csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == len(load_profile(str(whole)).results)
    assert {row["part"] for row in rows} == {"state", "projections", "ffn", "layer"}
    assert main(["profile", "--show", str(whole), "--format", "markdown"]) == 0
    text = capsys.readouterr().out
    # For each of three passes the timings, the split and a breakdown; no line of dashes as plain tables have.
    rules = [line[:2] for line in text.split("\n") if set(line) <= set("|:-") and line]
    assert (rules.count("|-"), rules.count("|:")) == (6, 3)
    assert "decode, the mixer alone:" in text
    assert "\n--" not in text


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plot(whole: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"plot.{suffix}"
    assert main(["profile", "--show", str(whole), "--plot", str(path)]) == 0
    assert path.read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix])


def test_no_model_is_gpt2_small_or_model_yaml(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.rename("model.yaml")
    assert main(["profile", "--pass", "forward", *QUICK]) == 0
    captured = capsys.readouterr()
    assert "no MODEL given: model.yaml assumed" in captured.err
    assert "no --p given: power p=2 assumed" in captured.err
    assert captured.out.startswith("tiny, layers 0-1")


def test_a_models_own_mixers_are_measured(tiny: Path) -> None:
    text = tiny.read_text(encoding="utf-8")
    mixer = "{kind: power, p: 2, heads: 4, kv_heads: 2, head_dim: 8, gated: true, bias: true}"
    tiny.write_text(text.replace("{kind: attention, heads: 4, kv_heads: 2, head_dim: 8}", mixer), encoding="utf-8")
    profile = profiled(tiny, "--pass", "forward", "--dtype", "bf16", "--batch", "2")
    rows = [row for row in profile.part("state") if row.name == "power p=2"]
    assert {(row.gated, row.batch, row.dtype) for row in rows} == {(True, 2, "bf16")}
    # A gate makes other projections than softmax attention's.
    assert {row.name for row in profile.part("projections")} == {"power p=2", "attention"}


def test_mixers_of_one_degree_keep_their_times_apart(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = json.dumps({"kind": "power", "p": 2, "heads": 4, "kv_heads": 2, "head_dim": 8})
    text = tiny.read_text(encoding="utf-8").replace("{kind: attention, heads: 4, kv_heads: 2, head_dim: 8}", spec)
    group = text[text.index("  - repeat: 2") :]
    tiny.write_text(text + group.replace('"kv_heads": 2', '"kv_heads": 1'), encoding="utf-8")
    options = ["--pass", "forward", "--ctx", "256", "--against", "attention", "--chunk-size", "64"]
    profile = profiled(tiny, *options)
    flops = {row.name: row.flops for row in profile.part("state") if row.chunk_size == 128}
    # Half of the key/value heads have half of the updates; queries and chunks are the same.
    assert flops.keys() == {"power p=2 kv 2", "power p=2 kv 1"}
    assert flops["power p=2 kv 1"] < flops["power p=2 kv 2"]
    for row in profile.split:
        (state,) = [item for item in profile.part("state") if (item.name, item.context) == (row.name, row.context)]
        assert row.state_ms == state.ms_p50
    assert len({row.projections_ms for row in profile.split if row.name.startswith("power")}) == 2
    text = " ".join(capsys.readouterr().out.split())
    for name in flops:
        assert f"is the fastest chunk of {name} at 256 tokens" in text


def test_a_mixture_of_experts_is_timed(tiny: Path) -> None:
    text = tiny.read_text(encoding="utf-8")
    experts = (
        "{kind: moe, experts: 8, top_k: 2, intermediate_size: 64, shared_intermediate_size: 32, shared_gate: true}"
    )
    tiny.write_text(text.replace("{kind: mlp, intermediate_size: 64}", experts), encoding="utf-8")
    profile = profiled(tiny, "--pass", "forward,decode")
    assert profile.layer.ffn == "moe, 2 of 8 experts of 64, gated"
    flops = 2 * (32 * 8 + (2 * 64 + 32) * 3 * 32 + 32)
    for row in profile.part("ffn"):
        assert row.flops == flops * (1 if row.direction == "decode" else row.context)
    assert {row.direction for row in profile.split if row.ffn_ms} == {"forward", "decode"}


@pytest.mark.parametrize("impl", ["recurrent", "reference"])
def test_other_implementations(tiny: Path, impl: str) -> None:
    profile = profiled(tiny, "--pass", "forward", "--ctx", "64", "--impl", f"torch,{impl}", "--against", "none")
    assert {(row.name, row.impl) for row in profile.part("state")} == {
        ("power p=2 torch", "torch"),
        (f"power p=2 {impl}", impl),
    }
    assert profile.crossover == ()


def test_nothing_is_timed_that_is_wrong(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import powerplan.kernels

    right = powerplan.kernels.power_attention

    def wrong(*args: Any, **settings: Any) -> Any:
        out = right(*args, **settings)
        return (out[0] * 1.01, out[1]) if isinstance(out, tuple) else out * 1.01

    monkeypatch.setattr(powerplan.kernels, "power_attention", wrong, raising=False)
    assert main(["profile", str(tiny), *QUICK]) == 4
    error = capsys.readouterr().err
    assert "power p=2 (torch) is wrong here, so nothing is timed: " in error
    assert "times the allowed error against float64" in error


TOLD = """
import contextlib, sys
import powerplan.cli.progress
from powerplan.cli import run

@contextlib.contextmanager
def told(seconds):
    yield lambda text, share: print(text, file=sys.stderr, flush=True)

powerplan.cli.progress.progress_bar = told
run()
"""
"""Run the command line with each step of a profile told on stderr."""


def test_ctrl_c_in_the_middle_of_a_real_run(tiny: Path) -> None:
    command = [sys.executable, "-c", TOLD, "profile", str(tiny), "--ctx", "64,4M"]
    command += ["--pass", "forward", "--against", "none", "--time-limit", "24h"]
    with interruptible(command) as process:
        assert process.stderr is not None
        steps = list(itertools.takewhile(lambda step: "4,194,304 tokens" not in step, process.stderr))
        process.send_signal(signal.SIGINT)  # The longer context has just begun, and takes minutes.
        out, err = process.communicate()
    assert process.returncode == 130, [*steps, err]
    assert "interrupted: what was measured until then" in out
    assert "forward, the mixer alone:" in out
    assert "       64  power p=2" in out
