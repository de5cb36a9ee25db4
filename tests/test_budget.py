"""Budgets: FLOPs to tokens and back, times, other mixers at equal FLOPs and at equal state."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from specs import specs

from powerplan.accounting import Accounting
from powerplan.cli import main
from powerplan.errors import InputError
from powerplan.hardware import find_device, peak_of
from powerplan.load import catalogue_spec
from powerplan.mixers import Convention
from powerplan.swap.windows import balanced_window
from powerplan.training import alternatives, budget_of, train_flops


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], str]:
    """Run a budget and return its JSON and its remarks."""
    assert main(["budget", *arguments, "--format", "json"]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def test_json_keeps_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    result, _ = run(capsys, "gpt2-small", "--ctx", "64k", "--flops", "1e21", "--batch-tokens", "512k")
    per_token = 3 * (247_064_064 + 1_207_977_984)
    assert result["schema"] == "powerplan.budget/1"
    assert result["context"] == 65_536
    assert result["train_flops_per_token"] == per_token
    assert result["total_flops"] == 10**21
    assert result["tokens"] == 10**21 // per_token
    assert result["sequences"] == 10**21 // per_token // 65_536
    assert result["steps"] == -(-result["tokens"] // 524_288)
    assert "gpu_hours" not in result


def test_gpu_hours_are_flops(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["gpt2-small", "--gpu-hours", "1000", "--gpu", "h100-sxm", "--mfu", "30%", "--devices", "8"]
    result, _ = run(capsys, *arguments)
    assert result["total_flops"] == pytest.approx(1.07e21, rel=0.002)
    assert result["gpu_hours"] == pytest.approx(1000)
    assert result["days"] == pytest.approx(1000 / 24 / 8)
    assert (result["device"], result["mfu"], result["devices"]) == ("h100-sxm", 0.3, 8)


def test_the_other_mixers_have_equal_flops_or_equal_state(capsys: pytest.CaptureFixture[str]) -> None:
    result, _ = run(capsys, "gpt2-small", "--flops", "1e21")
    rows = {row["mixer"]: row for row in result["alternatives"]}
    assert list(rows) == ["as it is", "window:7084", "power:p=2", "power:p=3,normalize=false", "linear"]
    for row in rows.values():
        assert row["tokens"] == int(Fraction(10**21) / Fraction(row["train_flops_per_token"]))
    assert rows["power:p=2"]["same_state_window"] == 1040
    assert rows["power:p=2"]["same_state_context"] == 1040
    assert rows["power:p=3,normalize=false"]["same_state_window"] == 22_880
    assert rows["as it is"]["same_state_window"] is None


@given(specs, st.integers(1, 700), st.integers(1, 10**25))
def test_tokens_and_flops_are_inverse(spec: Any, context: int, tokens: int) -> None:
    accounting = Accounting(spec)
    there = budget_of(accounting, context, tokens=tokens)
    back = budget_of(accounting, context, flops=there.total_flops)
    assert there.tokens == back.tokens == tokens
    assert budget_of(accounting, context, flops=there.total_flops - 1).tokens == tokens - 1
    assert there.sequences == tokens // context


def test_mla_keeps_its_weights_when_its_heads_become_ordinary() -> None:
    base = Accounting(catalogue_spec("deepseek-v3"))
    for other in alternatives(budget_of(base, 131_072, tokens=10**12)):
        assert abs(other.budget.row.weight_flops_per_token / base.weight_flops_per_token - 1) < 0.01


@pytest.mark.parametrize("name", ["gpt2-small", "llama-3-8b", "gemma-2-9b", "deepseek-v3"])
def test_the_balanced_window_is_the_last_that_is_light_enough(name: str) -> None:
    spec = catalogue_spec(name)
    window = balanced_window(spec, 2**20, Convention())
    assert window is not None
    from powerplan.swap import Swap, swapped
    from powerplan.swap.shapes import replacement_heads

    shape = replacement_heads(spec)
    rows = [Accounting(swapped(spec, Swap.attention(shape, size))[0]).row(2**20) for size in (window, window + 1)]
    assert rows[0].wsfr is not None
    assert rows[1].wsfr is not None
    assert rows[0].wsfr >= 1 > rows[1].wsfr


def test_a_window_that_is_not_needed_or_not_enough_is_none() -> None:
    spec = catalogue_spec("gpt2-small")
    assert balanced_window(spec, 1024, Convention()) is None
    assert balanced_window(spec, 1, Convention()) is None
    assert balanced_window(spec, 65_536, Convention(), Fraction(10**9)) is None


@pytest.mark.parametrize(
    ("tokens", "remark"),
    [
        ("20B", "161 tokens per active parameter are many: about 20 tokens per parameter are compute-optimal"),
        ("100M", "0.804 tokens per active parameter are few: about 20 tokens per parameter are compute-optimal"),
        ("2.4B", ""),
        ("1k", "the budget does not buy one sequence of 65,536 tokens"),
    ],
)
def test_a_budget_far_from_the_rule_is_said(capsys: pytest.CaptureFixture[str], tokens: str, remark: str) -> None:
    result, err = run(capsys, "gpt2-small", "--tokens", tokens)
    assert result["warnings"] == [line.removeprefix("note: ") for line in err.splitlines()]
    assert err.startswith(f"note: {remark}") if remark else err == ""


def test_no_budget_is_twenty_tokens_per_parameter(capsys: pytest.CaptureFixture[str]) -> None:
    result, err = run(capsys, "gpt2-small")
    assert result["tokens"] == 20 * 124_439_808
    assert err.startswith("note: no budget given: 20 tokens per active parameter assumed")


def test_a_device_without_the_rate_is_refused() -> None:
    device = find_device("h100-sxm")
    import msgspec

    bare = msgspec.structs.replace(device, bf16_tflops=None)
    with pytest.raises(InputError, match="h100-sxm has no bf16 matrix rate"):
        peak_of(bare)


def profile_of(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write a saved profile and return its path."""
    fields = {"name": "x", "impl": "torch", "pass": "forward+backward", "part": "state", "batch": 1, "dtype": "bf16"}
    data = {"schema": "powerplan.profile/1", "device": "h100-sxm", "results": [fields | row for row in rows]}
    path.write_text(json.dumps(data))
    return str(path)


POWER = {"mixer": "power", "p": 2, "heads": 12, "kv_heads": 12, "head_dim": 64, "chunk_size": 384}


def test_measured_times_replace_the_estimate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = profile_of(tmp_path / "p.json", [{**POWER, "context": 16_384, "ms_p50": 16.384}])
    arguments = ["gpt2-small", "--mixer", "power:p=2", "--tokens", "2.4B", "--gpu", "h100-sxm", "--mfu", "0.5"]
    result, err = run(capsys, *arguments, "--measured", path)
    per_token = 12 * 1e-6 + 3 * 247_064_064 / (989e12 / 2)
    assert err == ""
    assert result["time_source"] == "measured"
    assert result["gpu_hours"] == pytest.approx(2.4e9 * per_token / 3600)
    hours, _ = run(capsys, *arguments[:3], "--gpu-hours", "10", *arguments[5:], "--measured", path)
    assert hours["tokens"] == pytest.approx(36_000 / per_token)


def test_a_profile_brings_the_rates_of_its_own_device(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = profile_of(tmp_path / "p.json", [{**POWER, "context": 16_384, "ms_p50": 16_384}])
    rates = {
        "device": "2 cores",
        "peak_flops_per_s": 2e11,
        "bandwidth_bytes_per_s": 3e10,
        "peak_of": "the product seen",
    }
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | rates))
    arguments = ["gpt2-small", "--mixer", "power:p=2", "--tokens", "2.4B", "--mfu", "0.5", "--measured", path]
    result, err = run(capsys, *arguments)
    assert err == ""
    assert (result["device"], result["time_source"]) == ("2 cores", "measured")
    assert result["gpu_hours"] == pytest.approx(2.4e9 * (12e-3 + 3 * 247_064_064 / 1e11) / 3600)
    main(["budget", *arguments])
    assert "weights at 50% of the product seen" in " ".join(capsys.readouterr().out.split())


def test_times_of_two_machines_are_not_added_without_a_word(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = profile_of(tmp_path / "p.json", [{**POWER, "context": 65_536, "ms_p50": 65.536}])
    model = ["gpt2-small", "--measured", path]
    for device in ("h100-sxm", "2 cores"):
        Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | {"device": device}))
        for command in (["budget", "--mixer", "power:p=2", "--tokens", "2.4B"], ["recommend", "--ctx", "64k"]):
            for other in ("h100-sxm", "H100 SXM", "a100-80gb-sxm"):
                assert main([*command, *model, "--hardware", other]) == 0
                name = find_device(other).name
                remark = (
                    f"note: {path} was measured on {device}: times add the mixers' part there to the weights' part on "
                    f"{name}\n"
                )
                assert capsys.readouterr().err == ("" if name == device else remark)


def test_hours_of_a_device_that_has_a_description_for_a_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = profile_of(tmp_path / "p.json", [{**POWER, "context": 16_384, "ms_p50": 1}])
    rates = {"device": "2 cores, x86_64", "peak_flops_per_s": 2e11, "bandwidth_bytes_per_s": 3e10}
    Path(path).write_text(json.dumps(json.loads(Path(path).read_text()) | rates))
    assert main(["budget", "gpt2-small", "--flops", "1e18", "--measured", path]) == 0
    out = capsys.readouterr().out
    assert "3,472 device hours (2 cores, x86_64) at 40% of its peak, 80 GFLOP/s: 145 days on one device" in out
    assert main(["budget", "gpt2-small", "--flops", "1e18", "--gpu", "h100-sxm"]) == 0
    assert "0.702 h100-sxm hours at 40%" in capsys.readouterr().out


def test_what_a_profile_lacks_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = profile_of(tmp_path / "p.json", [{**POWER, "mixer": "attention", "p": None, "context": 4096, "ms_p50": 1}])
    result, err = run(capsys, "gpt2-small", "--tokens", "2.4B", "--gpu", "h100-sxm", "--measured", path)
    assert result["time_source"] == "mfu"
    assert err == (
        f"note: {path} has no forward+backward time of attention with 12 heads of 64 at 65,536 "
        "tokens, only at 4,096: time is counted at --mfu 0.4 instead\n"
    )


def test_training_takes_three_times_the_forward_flops() -> None:
    row = Accounting(catalogue_spec("llama-3-8b")).row(65_536)
    assert train_flops(row) == 3 * (15_009_316_864 + 17_180_131_328)


def test_compare_holds_what_wsfr_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "gpt2-small", "llama-3-8b", "--ctx", "1k,64k", "--format", "json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["schema"] == "powerplan.compare/1"
    assert [model["name"] for model in result["models"]] == ["gpt2-small", "llama-3-8b"]
    for model in result["models"]:
        assert main(["wsfr", model["name"], "--ctx", "1k,64k", "--format", "json"]) == 0
        alone = json.loads(capsys.readouterr().out)
        assert model["rows"] == [{k: v for k, v in row.items() if k != "verdict"} for row in alone["rows"]]
        assert model["balanced_context"] == alone["balanced_context"]


def test_compare_puts_a_model_beside_itself_with_a_mixer(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "gpt2-small", "--mixer", "hyena", "--ctx", "1M", "--json"]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert [model["name"] for model in models] == ["gpt2-small", "gpt2-small with hyena"]
    for model, more in zip(models, ([], ["--mixer", "hyena"]), strict=True):
        assert main(["wsfr", "gpt2-small", "--ctx", "1M", "--json", *more]) == 0
        alone = json.loads(capsys.readouterr().out)
        assert model["balanced_context"] == alone["balanced_context"]
    assert main(["compare", "gpt2-small", "llama-3-8b", "--mixer", "hyena", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["models"]) == 2


def test_a_balance_that_is_not_computed_is_not_called_none(capsys: pytest.CaptureFixture[str]) -> None:
    """Chunked, the state FLOPs of hyena can fall with the context; those of power attention never weigh as much."""
    for command in ("compare", "budget"):
        assert main([command, "gpt2-small", "llama-3-8b", "--mixer", "hyena", "--form", "chunked"]) == 0
        assert capsys.readouterr().out.count("; where it balances is not computed") == 2
        assert main([command, "gpt2-small", "llama-3-8b", "--mixer", "linear"]) == 0
        assert capsys.readouterr().out.count("balanced at no context") == 2


def test_compare_puts_models_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "gpt2-small", "deepseek-v3", "--ctx", "128k"]) == 0
    out = capsys.readouterr().out
    assert "deepseek-v3: 671B parameters, 37.55B active, 61 layers of 7,168; balanced at 29,315 tokens" in out
    assert max(map(len, out.splitlines())) <= 100


def test_the_weights_are_the_same_but_for_gates(capsys: pytest.CaptureFixture[str]) -> None:
    for name, said in (("gpt2-small", "the same weights, with"), ("power-coder-3b", "the same weights but for gates,")):
        assert main(["budget", name]) == 0
        assert said in capsys.readouterr().out
