"""What `powerplan recommend` answers: the winner, its reasons, constraints, saved files, figures."""

from __future__ import annotations

import json
import math
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import pytest

import powerplan
from powerplan.accounting import Accounting
from powerplan.cli import main
from powerplan.dims import KERNEL_DEGREES
from powerplan.load import catalogue_spec, catalogue_text, load_model
from powerplan.measured import read_profile
from powerplan.mixers import DSA, MLA, Convention, Power
from powerplan.mixers.formulas import total

FIVE_PERCENT = math.log(20 / 19)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Run a recommendation that must succeed and return its JSON."""
    assert main(["recommend", *arguments, "--format", "json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def table(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["recommend", *arguments]) == 0
    return capsys.readouterr().out


def by_mixer(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {candidate["mixer"]: candidate for candidate in result["candidates"]}


def test_gpt2_small_at_64k(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "gpt2-small", "--ctx", "64k", "--top", "20")
    assert result["schema"] == "powerplan.recommend/1"
    assert (result["context"], result["target"]) == (65_536, 1)
    assert (result["balanced_context"], result["balanced_window"]) == (13_403, 7_084)
    rows = by_mixer(result)
    assert rows["power:p=2"]["wsfr"] == pytest.approx(3.17256, rel=1e-5)
    odd = rows["power:p=3,normalize=false"]
    assert odd["wsfr"] == pytest.approx(0.146461, rel=1e-5), "64 columns of state, as kernels need it, and not 65"
    assert rows["as it is"]["wsfr"] == pytest.approx(0.204527, rel=1e-5)
    assert abs(math.log(rows["window:7084"]["wsfr"])) < 1e-3
    winner = result["recommended"]
    assert " + " in winner["mixer"]
    assert abs(math.log(winner["wsfr"])) <= FIVE_PERCENT
    assert winner["weight_flops_per_token"] == 247_064_064
    assert winner["why"].startswith("balanced; ")
    assert "weights of both signs" in odd["why"]
    assert "1.4x the FLOPs of attention here" in odd["why"]
    assert "window of 1,040 tokens" in rows["power:p=2"]["why"]


def test_the_head_moves_the_balance(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "gpt2-small", "--exclude", "lm-head")["balanced_context"] == 9_215


def test_one_layer_of_degree_3_is_not_enough() -> None:
    spec = catalogue_spec("gpt2-small")
    flops = [Power(heads=12, head_dim=64, p=p).state_flops_terms(1, Convention()) for p in (2, 3)]
    two, three = (sum(term.value for term in terms) for terms in flops)
    assert float(Fraction(Accounting(spec).weight_flops_per_token) / (11 * two + three)) == pytest.approx(
        1.1537, rel=1e-4
    )


def test_llama_at_64k_stays_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "llama-3-8b", "--ctx", "64k")
    assert result["recommended"]["mixer"] == "as it is"
    assert result["gain"] == "26 attention + 6 power p=2 would save 8% of the FLOPs"
    assert run(capsys, "llama-3-8b", "--ctx", "128k")["recommended"]["mixer"] == "attention x12 + power:p=2 x20"


def test_deepseek_keeps_mla_in_some_layers(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "deepseek-v3", "--ctx", "128k")
    winner = result["recommended"]
    assert winner["mixer"].startswith("mla x12 + power:p=2,")
    assert abs(math.log(winner["wsfr"])) <= FIVE_PERCENT
    assert winner["state_bytes"] < by_mixer(result)["as it is"]["state_bytes"] / 2


def test_a_light_model_is_told_to_take_longer_contexts(capsys: pytest.CaptureFixture[str]) -> None:
    winner = run(capsys, "llama-3-8b", "--ctx", "8k")["recommended"]
    assert winner["mixer"] == "as it is"
    assert "no other mixer has a state to add: what is free is a longer context" in winner["why"]


def test_several_contexts_are_one_answer(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "llama-3-8b", "--ctx", "128k,8k")
    assert result["contexts"] == [8192, 131_072]
    assert result["context"] == 131_072
    assert [row["context"] for row in result["recommended"]["rows"]] == [8192, 131_072]
    assert result["recommended"]["wsfr"] == result["recommended"]["rows"][-1]["wsfr"]


@pytest.mark.parametrize("model", ["gpt2-small", "llama-3-8b", "deepseek-v3", "gemma-2-9b", "gpt-oss-20b"])
@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--hardware", "h100-sxm", "--devices", "64", "--flops", "1e25"],
        ["--ctx", "8k,256k"],
        ["--ctx", "128k", "--keep", "flops"],
    ],
    ids=["plain", "hardware", "contexts", "resized"],
)
def test_tables_fit_a_terminal(capsys: pytest.CaptureFixture[str], model: str, options: list[str]) -> None:
    lines = table(capsys, model, *options).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[1].startswith("recommended: ")


def test_alone_it_says_what_it_assumed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["recommend"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("gpt2-small at 65,536 tokens: 1:4.89 as it is, target 1:1\nrecommended: ")
    assert captured.err == "note: no MODEL given: gpt2-small assumed\nnote: no --ctx given: 64k assumed\n"
    Path("model.yaml").write_text(catalogue_text("llama-3-8b"))
    assert main(["recommend"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("llama-3-8b at 65,536 tokens")
    assert captured.err.startswith("note: no MODEL given: model.yaml assumed\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--max-state 1KiB",
            "--max-state: even the least of 3,473 candidates needs 36 KiB, 36 times the 1 KiB allowed",
        ),
        (
            "--max-state 300MiB --only attention",
            "--max-state: the only candidate needs 2.25 GiB, 7.68 times the 300 MiB allowed",
        ),
        (
            "--max-decode-bytes 1MB",
            "--max-decode-bytes: even the least of 3,473 candidates needs 210.6 MiB, 221 times the 976.6 KiB allowed",
        ),
        (
            "--flops 1e12",
            "--flops: even the least of 3,473 candidates needs 4.342e+13 FLOPs, 43.4 times the 1e+12 allowed",
        ),
        (
            "--flops 1e20 --tokens 1T",
            "--flops: even the least of 3,473 candidates needs 6.625e+20 FLOPs, 6.63 times the 1e+20 allowed",
        ),
    ],
)
def test_what_binds_and_by_how_much(capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    assert main(["recommend", "gpt2-small", "--ctx", "64k", *arguments.split()]) == 3
    captured = capsys.readouterr()
    assert captured.out == ""
    expected = f"error: {message}"
    assert captured.err.startswith(expected[:-3]) if message.endswith("...") else captured.err == f"{expected}\n"


def test_memory_binds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recommend", "deepseek-v3", "--ctx", "128k", "--hardware", "h100-sxm"]) == 3
    assert "--gpu: even the least of 14,023 candidates needs 1.2" in capsys.readouterr().err
    assert main(["recommend", "deepseek-v3", "--ctx", "128k", "--hardware", "h100-sxm", "--devices", "17"]) == 0


def test_constraints_are_met_by_the_winner(capsys: pytest.CaptureFixture[str]) -> None:
    limits = ["--max-state", "100MiB", "--max-decode-bytes", "300MB", "--flops", "1e20", "--tokens", "80B"]
    result = run(capsys, "gpt2-small", *limits)
    winner = result["recommended"]
    assert winner["feasible"] is True
    assert winner["state_bytes"] <= 100 * 2**20
    assert winner["decode_weight_bytes_per_token"] + winner["decode_state_bytes_per_token"] <= 300_000_000
    assert winner["tokens"] >= 80 * 10**9
    assert winner["tokens"] == int(Fraction(10**20) / Fraction(3 * winner["flops_per_token"]))
    refused = by_mixer(result)["as it is"]
    assert refused["feasible"] is False
    assert refused["why"].startswith("over --max-state: 2.25 GiB, 23 times the 100 MiB allowed; over --max-decode")


@pytest.mark.parametrize(("only", "family"), [("window", "window"), ("power", "power"), ("linear", "linear")])
def test_only_takes_one_kind(capsys: pytest.CaptureFixture[str], only: str, family: str) -> None:
    result = run(capsys, "gpt2-small", "--only", only)
    assert all(family in candidate["mixer"] for candidate in result["candidates"])


def test_exclude_leaves_kinds_out(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "gpt2-small", "--exclude", "power,mix")
    mixers = [candidate["mixer"] for candidate in result["candidates"]]
    assert not any("power" in mixer or " + " in mixer for mixer in mixers)
    mixes = run(capsys, "gpt2-small", "--only", "mix")
    assert all(" + " in candidate["mixer"] for candidate in mixes["candidates"])


@pytest.mark.parametrize(("side", "above"), [("weights", True), ("state", False)])
def test_the_side_that_should_be_heavier(capsys: pytest.CaptureFixture[str], side: str, above: bool) -> None:
    ratio = run(capsys, "gpt2-small", "--weights-vs-state", side)["recommended"]["wsfr"]
    assert (ratio >= 1) is above
    assert abs(math.log(ratio)) <= FIVE_PERCENT


def test_another_target(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "gpt2-small", "--target", "3:1")
    assert abs(math.log(result["recommended"]["wsfr"] / 3)) <= FIVE_PERCENT
    assert result["balanced_context"] == 4467
    assert by_mixer(result)["as it is"]["why"].startswith("14.7x the state that the target asks; ")


@pytest.mark.parametrize("model", ["gpt2-small", "llama-3.2-1b", "deepseek-v3"])
def test_the_same_flops(capsys: pytest.CaptureFixture[str], model: str) -> None:
    result = run(capsys, model, "--ctx", "128k", "--keep", "flops")
    base = by_mixer(result)["as it is"]
    winner = result["recommended"]
    assert winner["flops_per_token"] == pytest.approx(base["flops_per_token"], rel=0.02)
    assert winner["params_total"] > 1.5 * base["params_total"]
    assert abs(math.log(winner["wsfr"])) < math.log(1.1)
    shape = (winner["hidden_size"] / winner["layers"]) / (base["hidden_size"] / base["layers"])
    assert 0.5 < shape < 2


def test_what_is_written_is_what_was_recommended(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(tmp_path / "out.yaml")
    result = run(capsys, "gpt2-small", "--ctx", "64k", "--write", path)
    row = Accounting(load_model(path).spec).row(65_536)
    assert row.state_flops_per_token == result["recommended"]["state_flops_per_token"]
    assert row.state_bytes == result["recommended"]["state_bytes"]
    assert main(["recommend", "gpt2-small", "--write", path]) == 2
    assert f"--write: {path} exists; --force overwrites it" in capsys.readouterr().err
    third = run(capsys, "gpt2-small", "--ctx", "64k", "--write", path, "--force", "--pick", "3")["candidates"][2]
    assert Accounting(load_model(path).spec).state_flops_per_token(65_536) == third["state_flops_per_token"]
    assert [file.name for file in tmp_path.iterdir()] == ["out.yaml"]


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_plots(capsys: pytest.CaptureFixture[str], tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = tmp_path / f"out.{suffix}"
    run(capsys, "gpt2-small", "--ctx", "64k,1M", "--plot", str(path))
    assert path.read_bytes().startswith(magic)


def test_a_plot_without_matplotlib(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = tmp_path / "out.png"
    assert main(["recommend", "gpt2-small", "--plot", str(path)]) == 4
    assert capsys.readouterr().err.endswith(
        "error: --plot needs matplotlib, and it is not installed: pip install matplotlib\n"
    )
    assert not path.exists()


def test_roofline_times(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "llama-3-8b", "--ctx", "64k", "--hardware", "h100-sxm")
    base = by_mixer(result)["as it is"]
    assert base["train_s_per_token"] == pytest.approx(3 * 32_189_448_192 / 989e12, rel=1e-6)
    decode = (base["decode_weight_bytes_per_token"] + base["decode_state_bytes_per_token"]) / 3350e9
    assert base["decode_s_per_token"] == pytest.approx(decode)
    assert base["time_source"] == "roofline"


def test_decoding_with_mla_does_not_expand_the_latent() -> None:
    mixer = catalogue_spec("deepseek-v3").layers[0].mixer
    assert isinstance(mixer, MLA)
    assert total(mixer.decode_flops_terms(1000)) == 2 * 128 * (2 * 512 + 64) * 1000
    assert total(Power(heads=2, head_dim=4, p=2).decode_flops_terms(1000)) == 2 * 4 * 10 * 5
    sparse = catalogue_spec("deepseek-v3.2-exp").layers[0].mixer
    assert isinstance(sparse, DSA)
    assert total(sparse.decode_flops_terms(10_000)) == 2 * 64 * 128 * 10_000 + 2 * 128 * (2 * 512 + 64) * 2048


PROFILED = {"impl": "torch", "pass": "forward+backward", "part": "state", "heads": 12, "kv_heads": 12, "head_dim": 64}


def test_measured_times_and_chunks(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = [
        {**PROFILED, "name": "a", "mixer": "power", "p": 2, "context": 65_536, "ms_p50": ms, "chunk_size": chunk}
        for chunk, ms in ((256, 80.0), (512, 65.536))
    ]
    path = tmp_path / "p.json"
    path.write_text(json.dumps({"schema": "powerplan.profile/1", "device": "h100-sxm", "results": rows}))
    result = run(capsys, "gpt2-small", "--ctx", "64k", "--measured", str(path), "--only", "power", "--exclude", "mix")
    row = by_mixer(result)["power:p=2"]
    assert row["time_source"] == "measured"
    assert row["train_s_per_token"] == pytest.approx(12 * 1e-6 + 3 * 247_064_064 / 989e12, rel=1e-6)
    limits = ["--max-state", "80MiB", "--only", "power", "--exclude", "mix"]
    chosen = run(capsys, "gpt2-small", "--ctx", "64k", "--measured", str(path), *limits)["recommended"]
    assert chosen["mixer"] == "power:p=2"
    assert chosen["chunk_sizes"] == [
        {"mixer": "power p=2", "chunk_size": 512, "source": f"the fastest of 2 in {path}"},
    ]
    out = table(capsys, "gpt2-small", "--ctx", "64k", "--measured", str(path), *limits)
    assert "measured: the mixers' part of training, in" in out
    assert "roofline" in out
    without = run(capsys, "gpt2-small", "--ctx", "64k", "--measured", str(path), "--only", "window")
    assert {candidate["time_source"] for candidate in without["candidates"]} == {"roofline"}


def test_chunks_are_chosen_by_training_then_by_forward_passes(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    mixer = Power(heads=12, head_dim=64, p=2)

    def best(*timed: tuple[str, int, float]) -> tuple[int, int] | None:
        row = {**PROFILED, "name": "a", "mixer": "power", "p": 2, "context": 4096}
        rows = [row | {"pass": name, "chunk_size": chunk, "ms_p50": ms} for name, chunk, ms in timed]
        path.write_text(json.dumps({"schema": "powerplan.profile/1", "device": "x", "results": rows}))
        return read_profile(str(path)).best_chunk(mixer)

    forward = [("forward", 64, 20.0), ("forward", 256, 10.0), ("forward", 256, 30.0)]
    decoding = [("decode", 64, 0.001), ("decode", 256, 0.002)]
    training = [("forward+backward", 64, 30.0), ("forward+backward", 256, 60.0)]
    assert best(*forward, *decoding) == (256, 2)
    assert best(*forward, *decoding, *training) == (64, 2)
    assert best(*forward, training[0]) == (256, 2)
    assert best(*decoding) is None


def test_a_profile_of_an_unknown_device_gives_chunks_only(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    rows = [{**PROFILED, "name": "a", "mixer": "power", "p": 2, "context": 4096, "ms_p50": 1.0}]
    path.write_text(json.dumps({"schema": "powerplan.profile/1", "device": "cpu", "results": rows}))
    assert main(["recommend", "gpt2-small", "--ctx", "64k", "--measured", str(path), "--format", "json"]) == 0
    captured = capsys.readouterr()
    assert "train_s_per_token" not in json.loads(captured.out)["recommended"]
    assert captured.err == f"note: {path} (cpu): no device of the catalogue and no rates of it, so times need --gpu\n"


def test_a_profile_of_any_device_gives_its_times(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    rows = [{**PROFILED, "name": "a", "mixer": "power", "p": 2, "context": 65_536, "ms_p50": 65_536.0}]
    rates = {"peak_flops_per_s": 2e11, "bandwidth_bytes_per_s": 3e10}
    path.write_text(json.dumps({"schema": "powerplan.profile/1", "device": "2 cores", "results": rows, **rates}))
    result = run(capsys, "gpt2-small", "--ctx", "64k", "--measured", str(path))
    row, other = by_mixer(result)["power:p=2"], by_mixer(result)["window:7084"]
    assert (row["time_source"], other["time_source"]) == ("measured", "roofline")
    assert row["train_s_per_token"] == pytest.approx(12e-3 + 3 * 247_064_064 / 2e11, rel=1e-6)
    assert other["train_s_per_token"] == pytest.approx(3 * other["flops_per_token"] / 2e11)
    out = table(capsys, "gpt2-small", "--ctx", "64k", "--measured", str(path))
    assert f"Not in {path}, so a roofline: attention with 12 heads of 64" in " ".join(out.split())


def test_power_is_named_only_where_it_ranks_before_the_window(capsys: pytest.CaptureFixture[str]) -> None:
    said = "power learns more from the same state"
    kimi = run(capsys, "kimi-linear-48b-a3b", "--ctx", "1M", "--only", "window,kda")
    assert kimi["recommended"]["label"].startswith("window")
    assert kimi["recommended"]["why"] == "balanced"
    for arguments in (["--only", "window,attention"], []):
        candidates = run(capsys, "gpt2-small", *arguments)["candidates"]
        ahead = False
        for candidate in candidates:
            if candidate["mixer"].startswith("window") and " + " not in candidate["mixer"]:
                assert (said in candidate["why"]) == ahead
            ahead = ahead or "power" in candidate["mixer"]


def test_the_place_of_a_mixer_is_named_among_the_layers_that_change() -> None:
    """Of a hybrid 7 of 27 layers change: every second of these is no second layer of the model."""
    hybrid = powerplan.recommend("kimi-linear-48b-a3b", "1M")
    reasons = [hybrid.why(place) for place in range(len(hybrid.candidates))]
    assert any(reason.endswith("in every 2nd of these layers (1:1)") for reason in reasons)
    whole = powerplan.recommend("gpt2-small", "64k")
    assert whole.why().endswith("power p=2 in every 4th layer (3:1)")
    resized = powerplan.recommend("llama-3.1-8b", ["8k", "1M"], keep="flops", top=3)
    assert "window 524,288 d=128 in every 8th layer (7:1)" in resized.why()
    assert "attention, window" not in resized.why()


def test_csv_is_raw(capsys: pytest.CaptureFixture[str]) -> None:
    lines = table(capsys, "llama-3-8b", "--ctx", "8k,64k", "--hardware", "h100-sxm", "--format", "csv").splitlines()
    keys = (
        "rank,label,wsfr_8192,wsfr_65536,state_bytes,direct_reach_tokens,train_s_per_token,decode_s_per_token,gpu_hours"
    )
    assert lines[0] == keys
    assert float(lines[1].split(",")[-2]) == pytest.approx(0.007, rel=0.05)


@pytest.mark.parametrize("p", range(1, 7))
def test_the_planner_knows_what_the_kernels_have(p: int) -> None:
    import torch

    from powerplan.kernels import power_attention

    mixer = Power(p=p, heads=1, head_dim=4, normalize=False)
    x = torch.ones(1, 3, 1, 4)
    assert (mixer.kernel_problem is None) == (p in KERNEL_DEGREES)
    wide = msgspec.structs.replace(mixer, head_dim=256)  # For p = 4 its phi would have 183,181,376 entries.
    assert (wide.kernel_problem is None) == (p < 4)
    if p in KERNEL_DEGREES:
        # Scores are 4 / sqrt(4), and a token sees those before it too.
        assert torch.allclose(power_attention(x, x, x, p=p, normalize=False)[0, :, 0, 0], 2.0**p * torch.arange(1, 4))
    else:
        with pytest.raises(ValueError, match="p must be 1, 2, 3 or 4"):
            power_attention(x, x, x, p=p, normalize=False)
