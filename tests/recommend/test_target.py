"""An off-target plan is never first without saying so: what comes closest, and the price of meeting the target."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from specs import contexts, mixers

import powerplan
from powerplan.load import catalogue_spec
from powerplan.mixers import MLA, Attention, Compressed, Linear, Mixer, Power, ShortConvolution
from powerplan.search import Candidate, Limits, Recommendation, Request, recommend

FIVE_PERCENT = math.log(20 / 19)


def searched(name: str, context: int, limits: Limits | None = None, **options: object) -> Recommendation:
    return recommend(catalogue_spec(name), Request(contexts=[context], limits=limits or Limits(), **options))  # type: ignore[arg-type]


def distance(candidate: Candidate) -> float:
    assert candidate.row.wsfr is not None
    return abs(math.log(candidate.row.wsfr))


def smaller(candidate: Candidate) -> bool:
    return any(choice.fewer_kv_heads for choice in candidate.plan.choices)


def test_smaller_weights_are_the_price() -> None:
    """Llama 3 8B at 256k within 512 MiB: a plan of 7.04:1 comes first, and one of 1.02:1 has smaller weights."""
    answer = searched("llama-3-8b", 262_144, Limits(max_state=2**29))
    off = answer.off_target
    assert off is not None
    assert off.meets is not None
    assert not answer.target_met
    assert answer.recommended.label == "window 4,096"
    assert off.closest is None
    assert off.within == "--max-state 512 MiB"
    assert (off.meets.label, off.meets.feasible, off.meets.balanced) == ("power p=4 128x32/1", True, True)
    said = powerplan.recommend("llama-3-8b", "256k", max_state="512MiB")
    text = " ".join(str(said).split())
    assert "recommended: window 4,096, 7.04:1, misses the target target: " in text
    assert "Saves: 4.89x fewer FLOPs per token, 64x less state" in text
    assert (
        "target: no plan of the same weights within --max-state 512 MiB meets it; none comes closer; #4, power p=4 "
        "128x32/1, 1.02:1, meets it: weight FLOPs -3.5%, 1.68x the FLOPs per token, 2.43x less state" in text
    )
    entry = said.to_dict()["meets_target"]
    assert (entry["rank"], entry["label"], entry["feasible"]) == (4, "power p=4 128x32/1", True)
    first, other = answer.recommended, off.meets
    assert entry["params_change"] == pytest.approx(other.parameters / first.parameters - 1)
    assert entry["weight_flops_change"] == pytest.approx(-0.035, abs=5e-4)
    assert entry["flops_change"] == pytest.approx(float(other.row.flops_per_token / first.row.flops_per_token) - 1)
    assert entry["state_change"] == pytest.approx(float(other.row.state_bytes / first.row.state_bytes) - 1)


def test_a_limit_is_the_price() -> None:
    answer = searched("llama-3-8b", 262_144, Limits(max_state=100 * 2**20))
    off = answer.off_target
    assert off is not None
    assert off.meets is not None
    assert off.closest is not None
    assert not off.meets.feasible
    assert not smaller(off.meets)
    assert off.closest.feasible
    assert not smaller(off.closest)
    assert distance(off.closest) < distance(answer.recommended)
    assert all(distance(off.closest) <= distance(c) for c in answer.candidates if c.feasible and not smaller(c))
    allowed = [candidate for candidate in searched("llama-3-8b", 262_144, top=1000).candidates if candidate.balanced]
    assert all(
        candidate.row.state_bytes >= off.meets.row.state_bytes for candidate in allowed if not smaller(candidate)
    )
    said = str(powerplan.recommend("llama-3-8b", "256k", max_state="100MiB"))
    assert "1.05:1, would meet it, and needs 3.562 GiB, 36.5 times the 100 MiB allowed by --max-state:" in " ".join(
        said.split()
    )


def test_of_two_limits_the_one_that_is_missed_by_more_counts() -> None:
    context, state, flops = 262_144, 3 * 2**30, 12 * 10**15
    off = searched("llama-3-8b", context, Limits(max_state=state, flops=flops)).off_target
    assert off is not None
    assert off.meets is not None
    assert off.within == "--max-state 3 GiB and --flops 1.2e+16"

    def worst(candidate: Candidate) -> float:
        return max(float(candidate.row.state_bytes / state), float(3 * context * candidate.row.flops_per_token / flops))

    on_target = [one for one in searched("llama-3-8b", context, top=1000).candidates if one.balanced]
    same_weights = [one for one in on_target if not smaller(one)]
    assert len(same_weights) > 5
    assert worst(off.meets) <= min(map(worst, same_weights))
    assert off.meets.row.state_bytes > min(one.row.state_bytes for one in same_weights), "the other limit decides"


def test_what_is_named_is_among_the_candidates() -> None:
    for limit in (2**29, 100 * 2**20):
        alone = powerplan.recommend("llama-3-8b", "256k", max_state=limit, top=1)
        entries = [entry for key in ("closest", "meets_target") if (entry := alone.to_dict()[key])]
        text = " ".join(str(alone).split())
        assert entries
        assert all(entry["rank"] is None and entry["label"] in text for entry in entries)
        said = powerplan.recommend("llama-3-8b", "256k", max_state=limit, top=4).to_dict()
        for entry in filter(None, (said["closest"], said["meets_target"])):
            shown = said["candidates"][entry["rank"] - 1]
            assert {key: shown[key] for key in ("mixer", "label", "wsfr", "feasible")} == {
                key: entry[key] for key in ("mixer", "label", "wsfr", "feasible")
            }


def test_a_target_that_is_met() -> None:
    answer = powerplan.recommend("gpt2-small", "64k")
    said = answer.to_dict()
    assert answer.target_met
    assert (said["target_met"], said["closest"], said["meets_target"]) == (True, None, None)
    assert said["recommended"]["target_met"] is True
    assert "1:1.01, meets the target\n" in str(answer)
    assert "Saves:   2.93x fewer FLOPs" in str(answer)
    assert "\ntarget:" not in str(answer)
    for entry in said["candidates"]:
        assert entry["target_met"] == (abs(math.log(entry["wsfr"])) <= FIVE_PERCENT)


def test_a_model_near_the_target_stays_and_says_so() -> None:
    answer = powerplan.recommend("llama-3-8b", "64k")
    assert not answer.target_met
    assert "recommended: as it is, 1:1.14, near the target\n" in str(answer)
    assert "\n 1  near enough to the target to stay; balanced at 57,255 tokens\n" in str(answer)
    assert "\ntarget:" not in str(answer)
    assert answer.to_dict()["meets_target"]["label"] == "26 attention + 6 power p=2"


def test_a_light_model_has_nothing_that_comes_closer() -> None:
    light = powerplan.recommend("llama-3-8b", "8k")
    words = "target: no candidate meets it but by a state dearer than keeping every key; none comes closer"
    assert words in str(light)
    assert (light.to_dict()["closest"], light.to_dict()["meets_target"]) == (None, None)
    recurrent = powerplan.recommend("rwkv7-0.4b", "64k")
    assert "\ntarget: no candidate meets it\n" in str(recurrent)


def test_resized_plans_are_held_to_the_target_too() -> None:
    answer = powerplan.recommend("gpt2-small", "64k", keep="flops", only="linear")
    assert not answer.target_met
    assert "target: no candidate meets it\n" in str(answer)
    assert powerplan.recommend("gpt2-small", "64k", keep="flops").target_met


@pytest.mark.parametrize(
    ("mixer", "reach"),
    [
        (Attention(heads=2, head_dim=8), 1000),
        (Attention(heads=2, head_dim=8, window=300), 300),
        (Attention(heads=2, head_dim=8, window=2000), 1000),
        (MLA(heads=2, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8), 1000),
        (Power(heads=2, head_dim=8, p=2), None),
        (Linear(heads=2, head_dim=8), None),
        (ShortConvolution(inner_size=8, conv_size=3), 3),
        (Compressed(heads=2, head_dim=8, window=128, compress_rate=None), 128),
        (Compressed(heads=2, head_dim=8, window=128, compress_rate=4), 1000),
    ],
    ids=lambda value: value.describe() if not isinstance(value, int | None) else str(value),
)
def test_how_far_a_mixer_looks_back(mixer: Mixer, reach: int | None) -> None:
    assert mixer.direct_reach(1000) == reach


@given(mixers, contexts)
def test_what_keeps_every_key_looks_back_to_the_first(mixer: Mixer, context: int) -> None:
    reach = mixer.direct_reach(context)
    assert reach is None or 1 <= reach <= context
    assert not mixer.keeps_every_key or reach == context
    assert mixer.window_size is None or reach == min(context, mixer.window_size)


def test_a_mix_looks_back_as_far_as_its_best_layer() -> None:
    rows = {entry["label"]: entry for entry in powerplan.recommend("gpt2-small", "64k").to_dict()["candidates"]}
    assert rows["10 power p=2 16x48 + 2 attention"]["direct_reach_tokens"] == 65_536
    assert rows["8 window 8,192 + 4 window 4,096"]["direct_reach_tokens"] == 8192
    assert rows["window 7,084"]["direct_reach_tokens"] == 7084
    assert rows["power p=2"]["direct_reach_tokens"] is None
