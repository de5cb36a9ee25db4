"""What is timed, without timing it: subjects and baselines, their names and their FLOPs."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from powerplan.errors import InputError
from powerplan.load import catalogue_spec
from powerplan.mixers import MIXERS, AnyMixer, Attention, Forgetting, Linear, Power
from powerplan.profile.costs import state_flops
from powerplan.profile.options import parse_passes, workload_of
from powerplan.profile.workload import Point
from powerplan.spec import LayerGroup, ModelSpec

HEADS: dict[str, Any] = {"heads": 4, "head_dim": 16}


def model_of(*mixers: AnyMixer) -> ModelSpec:
    """Return gpt2-small with one layer of each of `mixers`."""
    spec = catalogue_spec("gpt2-small")
    groups = tuple(LayerGroup(mixer=mixer, ffn=spec.layers[0].ffn) for mixer in mixers)
    return msgspec.structs.replace(spec, layers=groups, published=None)


@pytest.mark.parametrize("kind", ["forgetting", "nsa", "moba"])
def test_a_models_own_mixers_of_other_kinds_only_give_their_heads(kind: str) -> None:
    """Softmax attention and windows are measured as such, never a kind that derives from them."""
    workload = workload_of(model_of(MIXERS[kind](**HEADS)), against="attention,window,linear")
    assert [type(timed.mixer) for timed in workload.mixers] == [Power, Attention, Attention, Linear]
    assert {(timed.mixer.heads, timed.mixer.head_dim) for timed in workload.mixers} == {(4, 16)}


def test_a_window_with_forget_gates_is_no_baseline() -> None:
    workload = workload_of(model_of(Forgetting(**HEADS, window=100), Attention(**HEADS, window=50)))
    assert [timed.name for timed in workload.baselines] == ["attention", "window 68", "window 50"]


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ([{}, {"heads": 8, "head_dim": 8}], ["power p=2 4x16", "power p=2 8x8"]),
        ([{}, {"kv_heads": 1}], ["power p=2 kv 4", "power p=2 kv 1"]),
        ([{}, {"v_head_dim": 8}], ["power p=2 v 16", "power p=2 v 8"]),
        ([{}, {"normalize": False}], ["power p=2", "power p=2 unnormalised"]),
        (
            [{}, {"gated": True}, {"gated": True, "kv_heads": 2}],
            ["power p=2 kv 4", "power p=2 kv 4 gated", "power p=2 kv 2"],
        ),
        ([{}, {"chunk_size": 64}, {"chunk_size": 32}], ["power p=2", "power p=2 chunk 64", "power p=2 chunk 32"]),
        ([{}, {"output_gate": True}], ["power p=2", "power p=2 output gate"]),
        ([{}, {"bias": "qkv"}, {"bias": True}], ["power p=2", "power p=2 qkv bias", "power p=2 bias"]),
        ([{}, {"qk_norm": "head"}], ["power p=2", "power p=2 head qk-norm"]),
        ([{}, {"tile": 4}], ["power p=2 tile 8", "power p=2 tile 4"]),
    ],
)
def test_names_say_what_differs(changes: list[dict[str, Any]], names: list[str]) -> None:
    """Times are kept by name: two mixers under one would get each other's."""
    workload = workload_of(
        model_of(*(Power(**HEADS | change, p=2) if change else Power(**HEADS, p=2) for change in changes))
    )
    assert [timed.name for timed in workload.subjects] == names
    assert len({timed.name for timed in workload.mixers}) == len(workload.mixers)


def test_a_gated_mixer_and_a_plain_baseline_have_two_names() -> None:
    workload = workload_of(model_of(Power(**HEADS, p=2), Linear(**HEADS, gated=True)), against="linear")
    assert [timed.name for timed in workload.mixers] == ["power p=2", "linear gated", "linear"]


def test_softmax_attention_has_one_implementation() -> None:
    workload = workload_of(catalogue_spec("gpt2-small"), mixer="attention", against="none", impl="torch,recurrent")
    assert [(timed.name, timed.impl) for timed in workload.subjects] == [("attention", "sdpa")]


def test_one_chunk_runs_no_state_work() -> None:
    """gpt2-small at 256 tokens, one chunk: QK^T and AV of the causal pairs, 2 (64 + 64) FLOPs each in 12 heads."""
    (power,) = workload_of(catalogue_spec("gpt2-small"), against="none").subjects
    pairs = 256 * 257 // 2
    assert state_flops(power, Point("state", "forward", 256), executed=True) == 12 * 2 * (64 + 64) * pairs
    assert state_flops(power, Point("state", "train", 256), executed=True) == 3 * 12 * 2 * (64 + 64) * pairs
    # Of 600 tokens, in chunks of 256, 256 and 88, the last 344 ask and the first 512 are added: 36 pairs of tiles of
    # 64 products each, and 64 values with the normaliser.
    pairs = 2 * pairs + 88 * 89 // 2
    state = 2 * 12 * 36 * 64 * 65 * (344 + 512)
    assert state_flops(power, Point("state", "forward", 600), executed=True) == 12 * 2 * (64 + 64) * pairs + state
    # What recommend counts is the recurrence for every token.
    assert state_flops(power, Point("state", "forward", 256), executed=False) == 256 * 2 * 2 * 12 * 2080 * 65


def test_passes_and_baselines_have_other_names() -> None:
    assert parse_passes("train,forward") == parse_passes("forward,forward+backward") == ("forward", "train")
    spec = model_of(Power(p=2, **HEADS))
    same = [workload_of(spec, against=against).baselines for against in ("softmax,window", "attention,window")]
    assert same[0] == same[1]


def test_a_name_is_no_spec() -> None:
    with pytest.raises(InputError, match=r"^spec: must be a ModelSpec, such as .*, and is str$"):
        workload_of("gpt2-small")  # type: ignore[arg-type]
