"""Training over documents: how long devices wait for those with longer ones, and what `train` says of it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import powerplan
from powerplan.accounting import Accounting
from powerplan.answers.train import TrainAnswer
from powerplan.cli import main
from powerplan.hardware import find_device, peak_of
from powerplan.lengths import Lengths, read_lengths
from powerplan.load import catalogue_spec
from powerplan.mixers import Convention
from powerplan.run.degrees import Degrees
from powerplan.run.documents import LEAST_COMPARED, seconds_waited
from powerplan.run.efficiency import DEFAULT
from powerplan.run.layouts import Batch, Layout, Layouts, Setting
from powerplan.run.links import cluster_of
from powerplan.run.plan import Choices, Phase, plan_training
from powerplan.run.recipe import Recipe
from powerplan.run.search import SLOWER
from powerplan.run.step import Efficiency
from powerplan.run.waiting import DocumentOrder, Waiting, document_work, drawn_sequences, shares, step_time

ROOT = Path(__file__).resolve().parents[2]
LLAMA = Accounting(catalogue_spec("llama-3-8b"))
MIXED = "lognormal:mean=4k,p99=64k"
COMMON = ("train", "llama-3-8b", "--gpu", "h100-sxm", "--devices", "64", "--tokens", "100B")


def setting_of(devices: int) -> Setting:
    h100 = find_device("h100-sxm")
    return Setting.of(cluster_of(h100, devices), peak_of(h100), DEFAULT, Batch(2**22))


def layout_of(
    lengths: str | Lengths | None, degrees: Degrees, context: int = 65_536, sequences: int = 64, micro_batch: int = 1
) -> tuple[Layouts, Layout]:
    setting = setting_of(degrees.devices)
    if lengths is not None:
        setting = replace(setting, lengths=read_lengths(lengths))
    layouts = Layouts(LLAMA, context, setting)
    return layouts, layouts.layout(degrees, Recipe(micro_batch=micro_batch), sequences)


def waiting_of(layout: Layout) -> Waiting:
    lengths = layout.setting.lengths
    assert lengths is not None
    return DocumentOrder(LLAMA, lengths, layout.context, layout.setting.efficiency).waiting(layout)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*COMMON, *arguments, "--format", "json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize(
    "degrees", [Degrees(fsdp=64), Degrees(fsdp=8, cp=8), Degrees(fsdp=4, cp=4, tp=4), Degrees(fsdp=16, pp=4, zero=1)]
)
def test_documents_of_one_length_let_no_device_wait(degrees: Degrees) -> None:
    _, layout = layout_of("64k", degrees)
    waiting = waiting_of(layout)
    assert (waiting.data, waiting.context, waiting.come, waiting.sorted) == pytest.approx((1, 1, 1, 1), abs=1e-5)
    assert layout.step_s == pytest.approx(layout_of(None, degrees)[1].step_s, rel=1e-12)


@given(st.lists(st.integers(1, 50), min_size=8, max_size=8), st.sampled_from([(2, 1), (2, 2), (4, 1), (4, 2), (8, 1)]))
def test_a_step_takes_what_its_slowest_groups_take(times: list[int], split: tuple[int, int]) -> None:
    at_once, batch = split
    rounds = [times[start : start + at_once * batch] for start in range(0, 8, at_once * batch)]
    by_hand = sum(max(sum(own[group::at_once]) for group in range(at_once)) for own in rounds)
    assert step_time(times, at_once, batch, meets=True, ordered=False) == by_hand
    once = max(sum(times[group::at_once]) for group in range(at_once))
    assert step_time(times, at_once, batch, meets=False, ordered=False) == once
    even = sum(times) / at_once
    for meets in (False, True):
        for ordered in (False, True):
            assert step_time(times, at_once, batch, meets, ordered) >= even - 1e-9


@given(st.lists(st.integers(1, 50), min_size=6, max_size=6), st.sampled_from([2, 3]))
def test_sorting_is_the_best_order_of_single_sequences(times: list[int], at_once: int) -> None:
    best = min(step_time(order, at_once, 1, meets=True, ordered=False) for order in set(permutations(times)))
    assert step_time(times, at_once, 1, meets=True, ordered=True) == best


@given(st.lists(st.integers(1, 50), min_size=6, max_size=6))
def test_longest_first_is_within_its_bound(times: list[int]) -> None:
    """Three sequences for each of two groups: at most 7/6 of the best (Graham 1969), here found among all orders."""
    best = min(step_time(order, 2, 3, meets=False, ordered=False) for order in permutations(times))
    assert best <= step_time(times, 2, 3, meets=False, ordered=True) <= best * 7 / 6 + 1e-9


@pytest.mark.parametrize("name", ["llama-3-8b", "gemma-2-9b", "kimi-linear-48b-a3b", "gpt-oss-20b", "deepseek-v3"])
def test_the_work_of_a_document_is_that_of_its_state_flops(name: str) -> None:
    accounting = Accounting(catalogue_spec(name))
    work = document_work(accounting, 100_000, Efficiency(1, 1, 1))
    for tokens in (1, 2, 63, 64, 65, 100, 777, 4096, 4097, 50_001, 99_999, 100_000):
        exact = tokens * Accounting(accounting.spec, Convention()).state_flops_per_token(tokens)
        assert work(tokens) == pytest.approx(float(exact), rel=1e-4)


def test_attention_and_recurrent_state_take_their_own_shares() -> None:
    attention, power = LLAMA, Accounting(powerplan.wsfr("llama-3-8b", mixer="power:p=2").model)
    for accounting, rates in ((attention, Efficiency(1, 0.5, 0.1)), (power, Efficiency(1, 0.1, 0.5))):
        exact = 2 * 5000 * float(accounting.state_flops_per_token(5000))
        assert document_work(accounting, 5000, rates)(5000) == pytest.approx(exact)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.sampled_from([2, 3, 4]))
def test_devices_that_share_a_sequence_do_the_work_of_their_tokens(lengths: list[int], cp: int) -> None:
    part = -(-sum(lengths) // (2 * cp))
    context = 2 * cp * part

    def work(tokens: int) -> float:
        return tokens * (tokens + 1) / 2  # The keys of the first tokens of a document.

    by_hand = [0] * cp
    place = 0
    for length in lengths:
        for token in range(length):
            number = place // part
            by_hand[min(number, 2 * cp - 1 - number)] += token + 1
            place += 1
    assert shares(lengths, context, cp, work) == by_hand


def test_one_document_is_shared_evenly_from_the_front_and_the_back() -> None:
    work = document_work(LLAMA, 65_536, DEFAULT)
    own = shares((65_536,), 65_536, 8, work)
    assert max(own) == pytest.approx(min(own), rel=1e-4)
    assert sum(own) == pytest.approx(work(65_536))
    own = shares((49_152, 16_384), 65_536, 8, work)
    assert max(own) > 1.1 * sum(own) / 8


def test_what_is_drawn_is_the_distribution_and_always_the_same() -> None:
    lengths = read_lengths("100:3,700:1")
    drawn = drawn_sequences(lengths, 1000, 500)
    drawn_sequences.cache_clear()
    assert drawn_sequences(lengths, 1000, 500) == drawn
    assert len(drawn) == 500
    assert all(sum(sequence) <= 1000 for sequence in drawn)
    counts = Counter(length for sequence in drawn for length in sequence)
    assert counts[100] / counts[700] == pytest.approx(3, rel=0.1)
    long = drawn_sequences(read_lengths({2500: 1}), 1000, 40)
    assert Counter(length for sequence in long for length in sequence).keys() == {1000, 500}


def test_waiting_by_hand() -> None:
    """Half of the sequences have one document, half two of half the length: devices wait where both are at work."""
    lengths = read_lengths({65_536: 1, 32_768: 2})
    _, layout = layout_of(lengths, Degrees(fsdp=4), sequences=64)
    waiting = waiting_of(layout)
    work = document_work(LLAMA, 65_536, DEFAULT)
    fixed, state = layout.step.weights_s + layout.step.head_s, layout.step.attention_s
    packed = drawn_sequences(lengths, 65_536, waiting.steps * 64)
    own = [sum(map(work, sequence)) for sequence in packed]
    mean = sum(own) / len(own)
    times = [fixed + state * amount / mean for amount in own]
    slowest = sum(max(times[start : start + 4]) for start in range(0, len(times), 4))
    assert waiting.data == waiting.come == pytest.approx(slowest / (sum(times) / 4))
    assert waiting.context == 1
    assert 1 <= waiting.sorted < 1.03 < 1.1 < waiting.come
    assert 1.1 < waiting.come < max(times) / (sum(times) / len(times)) + 1e-9


@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(1, 5))
def test_a_pipeline_waits_for_its_longest_micro_batch(times: list[int], stages: int) -> None:
    """Micro-batches pass the stages one behind another; each takes the same time in all of them."""
    done = [0] * stages
    for own in times:
        for stage in range(stages):
            done[stage] = max(done[stage], done[stage - 1] if stage else 0) + own
    layout = layout_of(None, Degrees(pp=2))[1]
    step = replace(layout.step, micro_batches=len(times))
    layout = replace(layout, degrees=replace(layout.degrees, pp=stages), step=step)
    mean = sum(times) / len(times)
    even = sum(times) + (stages - 1) * mean  # What the compute of a step and its bubble count.
    waited = seconds_waited(layout, 1.0, max(times) / mean) / step.compute_s * sum(times)
    assert even + waited == pytest.approx(done[-1])


def test_a_layout_that_waits_less_is_taken() -> None:
    """Fewer sequences at work at once wait less for each other: more devices share each of them."""
    setting, phase, recipe = setting_of(64), Phase(10**11, 131_072), Recipe()
    mixed = replace(setting, lengths=read_lengths(MIXED))
    plain = plan_training(LLAMA, [phase], setting, Choices(recipe)).layout
    found = plan_training(LLAMA, [phase], mixed, Choices(recipe))
    best = found.layout
    assert best.degrees.sequences_at_once < plain.degrees.sequences_at_once
    same = plan_training(LLAMA, [phase], mixed, Choices(recipe, (plain.degrees,))).layout
    assert best.tokens_per_s > 1.2 * same.tokens_per_s
    others = [other.tokens_per_s for other in found.phases[0].others]
    assert others == sorted(others, reverse=True)
    assert best.tokens_per_s * SLOWER >= others[0]
    assert len(others) >= LEAST_COMPARED - 1


def test_devices_that_meet_once_a_step_wait_less() -> None:
    often, once = (waiting_of(layout_of(MIXED, Degrees(fsdp=8, zero=zero))[1]) for zero in (3, 1))
    assert once.come < often.come
    assert once.sorted <= often.sorted + 0.01


def test_recomputed_layers_wait_alike() -> None:
    """Recomputing all adds a pass of layers and none of the LM head: the share of state in the work rises a little."""
    layouts, layout = layout_of(MIXED, Degrees(fsdp=8))
    again = layouts.layout(Degrees(fsdp=8), Recipe(recompute="full"), 64)
    plain, full = waiting_of(layout), waiting_of(again)
    assert plain.come < full.come < plain.come * 1.05


def test_documents_of_one_length_train_like_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    plain = run(capsys, "--ctx", "64k", "--parallel", "fsdp=8,cp=8")
    result = run(capsys, "--ctx", "64k", "--parallel", "fsdp=8,cp=8", "--lengths", "64k")
    assert result["lengths"]["longest"] == 65_536
    (stage,), (before,) = result["stages"], plain["stages"]
    for key in ("step_s", "mfu", "tokens_per_s", "seconds"):
        assert stage[key] == pytest.approx(before[key], rel=1e-5)
    for key in ("steps", "parallel", "memory_bytes", "batch_tokens"):
        assert stage[key] == before[key]
    assert {split["split"]: split["step_s"] for split in stage["documents"]["splits"]} == pytest.approx(
        dict.fromkeys(("unmasked", "come", "sorted", "even"), before["step_s"]), rel=1e-5
    )


def test_the_plan_counts_what_waiting_costs(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--ctx", "64k", "--parallel", "fsdp=8,cp=8", "--lengths", MIXED)
    result = run(capsys, *arguments)
    (stage,) = result["stages"]
    own = stage["documents"]
    splits = {split["split"]: split for split in own["splits"]}
    parts = stage["step_parts_s"]
    assert parts["waiting"] > 1
    assert stage["step_s"] == pytest.approx(sum(parts.values()) + sum(stage["exposed_communication_s"].values()))
    assert splits["come"]["step_s"] == stage["step_s"]
    assert splits["even"]["step_s"] == pytest.approx(stage["step_s"] - parts["waiting"])
    assert splits["even"]["step_s"] < splits["sorted"]["step_s"] < splits["come"]["step_s"]
    assert splits["even"]["step_s"] < splits["unmasked"]["step_s"]
    assert splits["come"]["gpu_hours"] == pytest.approx(result["gpu_hours"])
    compute = sum(parts.values()) - parts["waiting"] - parts["bubble"] - parts["update"]
    assert own["waiting"]["as_they_come"] == pytest.approx(1 + parts["waiting"] / compute)
    row = powerplan.wsfr("llama-3-8b", "64k", lengths=MIXED).documents[0]
    assert own["wsfr"] == float(row.wsfr or 0)
    assert stage["mfu"] == pytest.approx(float(3 * row.flops_per_token) * stage["tokens_per_s"] / 64 / 989e12)
    assert not any(other["recommended"] for other in result["alternatives"])
    assert main([*COMMON, *arguments]) == 0
    out = capsys.readouterr().out
    assert "waiting for documents" in out
    assert "masked, sorted by work" in out
    assert "powerplan recommend says why" not in out


def test_padding_takes_time_and_trains_nothing() -> None:
    """Documents of 5,120 tokens fill five eighths of sequences of 8,192, as no two of them fit."""
    answer = powerplan.train(
        "llama-3-8b", "8k", gpu="h100-sxm", devices=8, tokens="1B", parallel="fsdp=8", lengths="5k"
    )
    (phase,) = answer.plan.phases
    layout = phase.layout
    assert layout.filled * 8 == 5
    assert phase.steps == -(-(10**9) // (layout.batch_tokens * 5 // 8))
    assert layout.tokens_per_s == pytest.approx(layout.batch_tokens * 5 / 8 / layout.step_s)
    state = float(LLAMA.state_flops_per_token(5120)) * 5 / 8
    peak = 989e12 * DEFAULT.attention
    assert layout.step.attention_s == pytest.approx(3 * state * layout.batch_tokens / 8 / peak)


def test_stages_cut_documents_each_to_its_context() -> None:
    answer = powerplan.train(
        "llama-3-8b",
        gpu="h100-sxm",
        devices=64,
        stages=["95B@8k", "5B@128k"],
        parallel="fsdp=8,cp=8",
        lengths=MIXED,
    )
    short, long = answer.to_dict()["stages"]
    assert short["documents"]["cut_documents"] > long["documents"]["cut_documents"] > 0
    assert short["documents"]["waiting"]["as_they_come"] < long["documents"]["waiting"]["as_they_come"]
    text = " ".join(str(answer).split())
    assert text.count("1,000,000 documents (") == text.count("as they come: devices take") == 1
    assert text.count("masked, evenly") == 2


def test_from_python_and_in_an_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "docs.txt"
    path.write_text("300\n90000\n", encoding="utf-8")
    common: dict[str, Any] = {"gpu": "h100-sxm", "devices": 64, "tokens": "100B", "parallel": "fsdp=64"}
    answer = powerplan.train("llama-3-8b", "32k", lengths=[300, 90_000], **common)
    assert isinstance(answer, TrainAnswer)
    arguments = ("--ctx", "32k", "--parallel", "fsdp=64", "--lengths", str(path))
    own = run(capsys, *arguments)
    theirs = answer.to_dict()
    assert own["lengths"].pop("source") == "docs.txt"
    assert theirs["lengths"].pop("source") == "documents"
    assert own == theirs
    assert main([*COMMON, *arguments, "--export", "torchtitan"]) == 0
    assert "note: what torchtitan reads says nothing of document masks" in capsys.readouterr().err


def test_measured_times_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    measured = ("--measured", "benchmarks/results/profile-cpu.json", "--lengths", "4k")
    assert main(["train", "gpt2-small", *measured]) == 2
    assert capsys.readouterr().err == "error: --lengths: have no measured times: --measured is of whole contexts\n"


def test_sequences_take_turns_where_a_step_has_more_documents_than_are_simulated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, layout = layout_of(MIXED, Degrees(fsdp=64))
    lengths = read_lengths(MIXED)
    of_one = 65_536 / float(lengths.cut(65_536).mean)
    monkeypatch.setattr("powerplan.run.waiting.MOST_AT_ONCE", int(33 * of_one))
    waiting = waiting_of(layout)
    few = drawn_sequences(lengths, 65_536, 32)
    assert (waiting.steps, waiting.documents) == (1, 2 * sum(map(len, few)))
    work = document_work(LLAMA, 65_536, layout.setting.efficiency)
    works = [sum(map(work, sequence)) for sequence in few]
    step = layout.step
    state = step.attention_s / (step.attention_s + step.weights_s + step.head_s)
    assert waiting.data == pytest.approx(1 + state * (32 * max(works) / sum(works) - 1), rel=1e-5)
    _, shared = layout_of(MIXED, Degrees(fsdp=8, cp=8))
    assert waiting_of(shared).documents == waiting.documents


def test_a_part_is_simulated_of_a_step_of_very_many_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("powerplan.run.waiting.MOST_SEQUENCES", 50)
    _, layout = layout_of(MIXED, Degrees(fsdp=8, cp=8), micro_batch=2)
    waiting = waiting_of(layout)
    drawn = drawn_sequences(read_lengths(MIXED), 65_536, 48)  # 3 micro-batches of 8 groups.
    assert (waiting.steps, waiting.documents) == (1, sum(map(len, drawn)))


def test_one_document_in_a_billion_that_is_longer_than_all_sequences_is_drawn_in_pieces() -> None:
    lengths = read_lengths(f"{2**50}:1,1:{10**9 - 1}")
    drawn = drawn_sequences(lengths, 2**17, 64)
    whole = sum(sequence == (2**17,) for sequence in drawn)
    assert len(drawn) == 64
    assert whole >= 60  # Of all tokens those of short documents are one in a million.


def test_sequences_of_more_documents_than_are_simulated_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMMON, "--ctx", "1000000000000", "--lengths", MIXED]) == 2
    assert capsys.readouterr().err == (
        "error: --lengths: sequences of 1,000,000,000,000 tokens hold about 244,148,919 documents each, and 8 of them "
        "may have 1,000,000 at most, to simulate who waits; shorten --ctx\n"
    )
