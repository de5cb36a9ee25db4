"""What is to be measured, without measuring it: subjects and rivals, their names and their FLOPs."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from powerplan.load import catalogue_spec
from powerplan.mixers import MIXERS, AnyMixer, Attention, Forgetting, Linear, Power
from powerplan.profile.plan import plan_of
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
    plan = plan_of(model_of(MIXERS[kind](**HEADS)), against="softmax,window,linear")
    assert [type(item.mixer) for item in plan.contenders] == [Power, Attention, Attention, Linear]
    assert {(item.mixer.heads, item.mixer.head_dim) for item in plan.contenders} == {(4, 16)}


def test_a_window_with_forget_gates_is_no_rival() -> None:
    plan = plan_of(model_of(Forgetting(**HEADS, window=100), Attention(**HEADS, window=50)))
    assert [item.name for item in plan.rivals] == ["softmax", "window 68", "window 50"]
