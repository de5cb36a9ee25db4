"""Serving: bytes of a decoding step, memory, the largest batch, prompts; against counts by hand and by enumeration."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from specs import contexts, specs, untied

import powerplan
from powerplan.accounting import Accounting
from powerplan.cli import main
from powerplan.dtypes import DTYPE_BYTES
from powerplan.entries import host_parameters, touched_experts
from powerplan.errors import InputError
from powerplan.hardware import find_device, peak_of
from powerplan.load import catalogue_names, catalogue_spec
from powerplan.mixers import Convention
from powerplan.mixers.formulas import total
from powerplan.serving import MAX_BATCH, Fleet, Serving, twin

KIMI = "kimi-linear-48b-a3b"
H100 = find_device("h100-sxm")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["decode", *arguments, "--format", "json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize(("experts", "top_k", "batch"), [(4, 2, 3), (5, 1, 4), (6, 3, 2), (3, 3, 2), (1, 1, 3)])
def test_touched_experts_by_enumeration(experts: int, top_k: int, batch: int) -> None:
    picks = list(combinations(range(experts), top_k))
    sizes = [len(set().union(*choice)) for choice in product(picks, repeat=batch)]
    assert touched_experts(experts, top_k, batch) == Fraction(sum(sizes), len(sizes))


@given(experts=st.integers(1, 300), data=st.data())
def test_touched_experts_grow_towards_all(experts: int, data: st.DataObject) -> None:
    top_k, batch = data.draw(st.integers(1, experts)), data.draw(st.integers(1, 200))
    touched = touched_experts(experts, top_k, batch)
    assert touched_experts(experts, top_k, 1) == top_k
    assert top_k <= touched <= min(experts, batch * top_k)
    assert touched <= touched_experts(experts, top_k, batch + 1)


@settings(max_examples=60)
@given(spec=specs, context=contexts, batch=st.integers(1, 50), dtype=st.sampled_from(sorted(DTYPE_BYTES)))
def test_a_step_is_the_sum_of_its_layers(spec: Any, context: int, batch: int, dtype: str) -> None:
    accounting, width = Accounting(spec), DTYPE_BYTES[dtype]
    serving = Serving(accounting, context, dtype)
    step = serving.step(batch)
    idle = state = host = fetched = Fraction(0)
    for group in spec.layers:
        for layer in group.period:
            if layer.ffn is not None and layer.ffn.picks is not None:
                entries, picked = layer.ffn.picks
                one = Fraction(total(layer.ffn.idle_terms(spec.hidden_size)), max(1, entries - picked))
                idle += group.repeat * one * (touched_experts(entries, picked, batch) - picked)
                on_host = Fraction(total(layer.ffn.host_terms(spec.hidden_size)))
                host += 0 if layer.tied else group.repeat * on_host
                fetched += group.repeat * on_host / entries * touched_experts(entries, picked, batch)
            if layer.mixer is not None:
                state += group.repeat * layer.mixer.decode_bytes(context, width)
    apart = Accounting(untied(spec))
    assert step.weight_bytes == (apart.active_parameters.without_input_embedding + idle) * width
    assert step.cache_bytes + step.recurrent_bytes == batch * state == batch * serving.row.decode_state_bytes_per_token
    assert step.recurrent_bytes >= 0
    assert serving.host_bytes == host * width == host_parameters(accounting) * width
    assert step.memory_bytes == serving.stored_bytes - host * width + batch * serving.row.state_bytes
    assert serving.fetched_bytes(batch) == fetched * width <= step.weight_bytes
    assert serving.cache_bytes + serving.recurrent_bytes == serving.row.state_bytes
    one = serving.step(1)
    assert one.weight_bytes == serving.row.decode_weight_bytes_per_token
    assert one.weight_bytes <= step.weight_bytes <= Serving(apart, context, dtype).stored_bytes
    assert step.moved_bytes / batch <= one.moved_bytes
    assert step.flops == batch * one.flops


@settings(max_examples=60)
@given(spec=specs, context=contexts, count=st.integers(1, 4))
def test_the_largest_batch_is_the_last_that_fits(spec: Any, context: int, count: int) -> None:
    fleet = Fleet(H100, count)
    serving = Serving(Accounting(spec), context, "bf16", fleet)
    most = serving.largest_batch
    if most is None:
        assert not serving.row.state_bytes
        return
    assert serving.device_bytes + most * serving.row.state_bytes <= fleet.memory
    assert serving.device_bytes + (most + 1) * serving.row.state_bytes > fleet.memory
    if 1 <= most < MAX_BATCH:
        assert serving.step(most).fits
        assert not serving.step(most + 1).fits


def test_weights_that_do_not_fit_leave_no_sequence() -> None:
    assert Serving(Accounting(catalogue_spec(KIMI)), 1024, "bf16", Fleet(H100)).largest_batch == 0


@pytest.mark.parametrize("name", catalogue_names())
def test_one_sequence_takes_the_time_that_recommend_says(name: str) -> None:
    from powerplan.roofline import Roofline

    accounting = Accounting(catalogue_spec(name))
    step = Serving(accounting, 65_536, "bf16", Fleet(H100)).step(1)
    assert step.seconds is not None
    assert float(step.seconds) == pytest.approx(
        Roofline(peak_of(H100)).times(accounting.spec, accounting.row(65_536)).decode
    )


@pytest.mark.parametrize(
    "name", ["gpt2-small", "llama-3-8b", "gemma-2-9b", "mixtral-8x7b", "mamba2-130m", "rwkv7-0.4b"]
)
@pytest.mark.parametrize("head", [True, False])
def test_a_prompt_costs_the_sum_of_its_tokens(name: str, head: bool) -> None:
    """Every token costs its weights, and its state at its own position; the head is asked once."""
    spec = catalogue_spec(name)
    body = Accounting(spec, Convention(lm_head=False)).weight_flops_per_token
    by_position = Fraction(0)
    for use in spec.layer_uses():
        if use.layer.mixer is not None:
            for position in range(1, 101):
                by_position += use.count * total(use.layer.mixer.decode_flops_terms(position))
    serving = Serving(Accounting(spec, Convention(lm_head=head)), 100)
    assert serving.prefill_flops == 100 * body + by_position + 2 * spec.vocab_size * spec.hidden_size
    assert serving.step(1).flops == Serving(Accounting(spec), 100).step(1).flops


def test_llama_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "llama-3-8b", "--ctx", "128k", "--batch", "1,64", "--hardware", "h100-sxm")
    assert result["schema"] == "powerplan.decode/1"
    assert (result["device"], result["devices"], result["memory_bytes"]) == ("h100-sxm", 1, 80_000_000_000)
    (context,) = result["models"][0]["contexts"]
    cache = 2 * 32 * 2 * 8 * 128 * 131_072
    assert (context["cache_bytes"], context["recurrent_bytes"]) == (cache, 0)
    assert context["cache_bytes_per_token"] == 131_072
    assert context["largest_batch"] == (80_000_000_000 - 2 * 8_030_261_248) // cache == 3
    first, last = context["steps"]
    weights = 2 * (8_030_261_248 - 128_256 * 4096)
    assert first["weight_bytes"] == last["weight_bytes"] == weights
    assert last["cache_bytes"] == 64 * (cache + 131_072)
    assert last["bytes_per_token"] == (weights + 64 * (cache + 131_072)) / 64
    assert first["step_s"] == pytest.approx((weights + cache + 131_072) / 3350e9)
    assert last["tokens_per_s"] == pytest.approx(64 / last["step_s"])
    assert (first["bound"], first["fits"], last["fits"]) == ("bytes", True, False)
    assert context["prefill_s"] == pytest.approx(context["prefill_flops"] / 989e12)


def test_a_large_batch_at_a_short_context_is_bound_by_flops(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "llama-3-8b", "--ctx", "16", "--batch", "512", "--hardware", "h100-sxm")
    (step,) = result["models"][0]["contexts"][0]["steps"]
    assert step["bound"] == "FLOPs"
    assert step["step_s"] == pytest.approx(512 * step["flops_per_token"] / 989e12)


def test_devices_share_memory_and_work(capsys: pytest.CaptureFixture[str]) -> None:
    one, four = (
        run(capsys, "llama-3-8b", "--hardware", "h100-sxm", "--devices", count)["models"][0]["contexts"][0]
        for count in ("1", "4")
    )
    assert four["steps"][0]["step_s"] == pytest.approx(one["steps"][0]["step_s"] / 4)
    assert four["largest_batch"] > 4 * one["largest_batch"]


def test_kimi_linear_against_its_twin(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, KIMI, "--ctx", "1M", "--batch", "1", "--twin", "mla")
    hybrid, full = (model["contexts"][0] for model in result["models"])
    assert result["models"][1]["twin_of"] == KIMI
    assert hybrid["cache_bytes"] == 7 * 576 * 2 * 2**20 == 8_455_716_864
    assert full["cache_bytes"] == 27 * 576 * 2 * 2**20 == 32_614_907_904
    assert hybrid["recurrent_bytes"] == 4 * 10_485_760 + 2 * 20 * 3 * 3 * 4096 == 43_417_600
    page = (Path(__file__).resolve().parent.parent / "docs" / "accounting.md").read_text(encoding="utf-8")
    assert "41.9 MB in fp32; `decode` reports 43.4 MB (43,417,600 bytes)" in page
    (against,) = result["twins"]
    assert against["state_times"] == pytest.approx(3.84, abs=0.005)
    assert against["cache_change"] == pytest.approx(-20 / 27)
    assert against["prefill_times"] == pytest.approx(3.66, abs=0.005)
    assert "time_times" in against["steps"][0]


def test_only_what_a_twin_differs_in_is_changed() -> None:
    for name, kind in ((KIMI, "mla"), ("qwen3-next-80b-a3b", "attention"), ("jamba-v0.1", "attention")):
        spec = catalogue_spec(name)
        other, _ = twin(Accounting(spec), kind)
        kinds = {use.layer.mixer.kind for use in other.uses if use.layer.mixer is not None}
        assert kinds == {kind}
        own = {use.layer.mixer for use in spec.layer_uses() if use.layer.mixer and use.layer.mixer.kind == kind}
        assert {use.layer.mixer for use in other.uses if use.layer.mixer is not None} == own


@pytest.mark.parametrize("name", ["gemma-3-1b", "gpt-oss-20b", "mistral-7b-v0.1"])
def test_the_twin_of_windows_keeps_every_key(name: str) -> None:
    accounting = Accounting(catalogue_spec(name))
    other, remarks = twin(accounting, "attention")
    assert remarks == []
    assert not any(getattr(mixer, "window", None) for mixer in other.spec.mixers())
    hybrid, full = (Serving(one, 65_536) for one in (accounting, other))
    assert full.cache_bytes > hybrid.cache_bytes
    with pytest.raises(InputError, match="has attention in every layer already"):
        twin(other, "attention")


@pytest.mark.parametrize(
    "arguments",
    [
        [KIMI, "--ctx", "1M", "--hardware", "h100-sxm", "--devices", "4", "--twin", "mla"],
        ["deepseek-v3", "qwen3-next-80b-a3b", "--ctx", "128k,1M", "--hardware", "h200-sxm", "--devices", "16"],
        ["mamba2-130m", "gpt2-small"],
        ["kimi-linear-48b-a3b", "--ctx", "128k,1M", "--hardware", "h100-sxm", "--devices", "4", "--twin", "mla"],
    ],
    ids=["twin", "contexts", "bare", "too much"],
)
def test_tables_fit_a_terminal(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert main(["decode", *arguments]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert "tokens at" not in out


def test_a_table_has_the_states_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    said = {}
    for model in ("llama-3-8b", "mamba2-130m", KIMI):
        assert main(["decode", model]) == 0
        said[model] = capsys.readouterr().out
    assert "cache" in said["llama-3-8b"]
    assert "recurrent" not in said["llama-3-8b"]
    assert "cache" not in said["mamba2-130m"]
    assert "weights, recurrent: bytes" in " ".join(said["mamba2-130m"].split())
    assert "weights, cache, recurrent: bytes" in " ".join(said[KIMI].split())
    assert [model for model, text in said.items() if "Experts" in text] == [KIMI]
    assert all("\n--gpu DEVICE adds times, and how many sequences fit.\n" in text for text in said.values())


def test_what_fits_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: str) -> str:
        assert main(["decode", *arguments, "--hardware", "h100-sxm"]) == 0
        return " ".join(capsys.readouterr().out.split())

    whole = "the weights do not fit in the 74.51 GiB of h100-sxm (--devices 2 holds them and a sequence)"
    assert whole in said(KIMI)
    assert "26 sequences fit on 4 h100-sxm" in said(KIMI, "--ctx", "1M", "--devices", "4")
    assert "1 sequence fits on 3 h100-sxm" in said("llama-3-8b", "--ctx", "1M", "--devices", "3")
    assert "not one sequence fits on h100-sxm (--devices 2 holds one)" in said("llama-3-8b", "--ctx", "1M")


@pytest.mark.parametrize("context", ["1k", "1M", "4M"])
def test_the_least_devices_hold_one_sequence_and_one_fewer_does_not(context: str) -> None:
    def fits(count: int) -> bool | None:
        (model,) = powerplan.decode("llama-3-8b", context, batch=1, gpu="h100-sxm", devices=count).models
        return model.servings[0].step(1).fits

    (model,) = powerplan.decode("llama-3-8b", context, gpu="h100-sxm").models
    least = model.servings[0].least_devices
    assert least is not None
    assert fits(least)
    assert least == 1 or not fits(least - 1)


def test_tokens_per_second_stand_in_every_table_with_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    for asked in ("128k", "8k,128k"):
        assert main(["decode", KIMI, "--ctx", asked, "--gpu", "h200-sxm", "--batch", "1"]) == 0
        out = capsys.readouterr().out
        assert "tokens" in out.split("Experts read")[1]
        assert KIMI not in out.split("Times are")[1], "one model is not named in every row"


def test_what_does_not_fit_is_marked(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["decode", "llama-3-8b", "--batch", "1,8,64", "--hardware", "h100-sxm"]
    assert main([*arguments, "--ctx", "128k"]) == 0
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if re.match(r" +\d+  ", line)]
    assert [row[0] for row in rows if row[-1] == "no"] == ["8", "64"]
    assert "fits: no where weights and state exceed the 74.51 GiB there are." in out
    assert main([*arguments, "--ctx", "1k"]) == 0
    assert "fits:" not in capsys.readouterr().out


def test_csv_has_the_same_columns_at_one_context_and_at_two(capsys: pytest.CaptureFixture[str]) -> None:
    tables = []
    for text in ("128k", "1k,128k"):
        assert main(["decode", "llama-3-8b", "--ctx", text, "--gpu", "h100-sxm", "--format", "csv"]) == 0
        tables.append(capsys.readouterr().out.splitlines())
    one, two = tables
    assert one[0] == two[0]
    assert one[0].endswith(",bytes_per_token,step_s,tokens_per_s,fits")
    assert one[1:] == two[4:]
    assert [line.split(",")[-1] for line in two[1:]] == ["True", "True", "True", "True", "False", "False"]


def test_csv_names_twins_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decode", KIMI, "--twin", "mla", "--batch", "1", "--format", "csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "name,context,batch,weight_bytes,cache_bytes,recurrent_bytes,bytes_per_token"
    assert [line.split(",")[0] for line in lines[1:]] == [KIMI, f"{KIMI} with mla"]


@pytest.mark.parametrize("batch", [0, MAX_BATCH + 1])
def test_a_batch_out_of_range(batch: int) -> None:
    with pytest.raises(InputError, match=f"a batch is 1 to 65,536 sequences, and is {batch}"):
        Serving(Accounting(catalogue_spec("gpt2-small")), 64).step(batch)
