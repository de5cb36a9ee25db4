"""A config in memory is read as the config.json that it would be written to; a dict may be a powerplan spec too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import powerplan
from powerplan.errors import InputError
from powerplan.load import catalogue_text, load_model

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
}


class Written:
    """What writes itself as a config.json."""

    def __init__(self, data: Any = LLAMA) -> None:
        self.data = data

    def to_json_string(self) -> str:
        return json.dumps(self.data)


@pytest.mark.parametrize("config", [LLAMA, Written()], ids=["dict", "object"])
def test_it_is_what_the_file_is(config: Any, tmp_path: Path) -> None:
    file = tmp_path / "llama.json"
    file.write_text(json.dumps(LLAMA), encoding="utf-8")
    assert load_model(config).spec == load_model(file).spec
    assert load_model(config).notes == load_model(file).notes
    assert powerplan.wsfr(config, "8k").to_dict() == powerplan.wsfr(file, "8k").to_dict()
    assert [len(served.servings) for served in powerplan.decode(config, "8k").models] == [1]
    assert len(powerplan.compare([config, "gpt2-small"], "8k").accountings) == 2
    assert powerplan.budget(config, "8k", flops=1e18).budget.tokens > 0
    assert powerplan.recommend(config, "8k").command[:3] == ("powerplan", "recommend", "config.json")


def test_another_family_reads_it_on_demand() -> None:
    config = LLAMA | {"model_type": "unheard_of"}
    with pytest.raises(InputError, match=r"^model: model_type 'unheard_of' is not supported"):
        load_model(config)
    loaded = load_model(config, like="llama")
    assert (loaded.like, loaded.spec.layer_count) == ("llama", 3)


@pytest.mark.parametrize("name", ["gpt2-small", "kimi-linear-48b-a3b", "gpt-oss-20b"])
def test_a_spec_as_a_dict(name: str) -> None:
    assert load_model(yaml.safe_load(catalogue_text(name))).spec == load_model(name).spec


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "model: has no model_type"),
        (LLAMA | {"vocab_size": "many"}, "model: vocab_size must be"),
        (LLAMA | {"attention_dropout_kind": 7}, "model: attention_dropout_kind 7 is not known for llama"),
        ({"name": "a", "vocab_size": 8, "hidden_size": 8, "layers": 3}, "model: layers: "),
        ({"name": "a", "vocab_size": 8, "layers": [{"mixr": 3}]}, "model: "),
        (LLAMA | {"torch_dtype": object()}, "model: holds what JSON cannot: Object of type object is not JSON"),
        (LLAMA | {3: object}, "model: holds what JSON cannot"),
        (Written([LLAMA]), "model: a config.json is an object, and this is not one"),
        ({"peft_type": "LORA", "target_modules": []}, "model: is "),
    ],
)
def test_mistakes_are_named_without_a_place(data: dict[Any, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        load_model(data)
    assert str(raised.value).startswith(message), str(raised.value)
    assert "\n" not in str(raised.value)


def test_like_is_for_a_config() -> None:
    with pytest.raises(InputError, match=r"^like: is for a config\.json, and the model is a powerplan spec$"):
        load_model(yaml.safe_load(catalogue_text("gpt2-small")), like="llama")


def test_a_config_of_transformers() -> None:
    pytest.importorskip("transformers")
    from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = Qwen3Config(**sizes, head_dim=32, intermediate_size=96, vocab_size=99)
    spec = load_model(config).spec
    assert (spec.hidden_size, spec.layer_count, spec.vocab_size) == (64, 2, 99)
    assert load_model(json.loads(config.to_json_string())).spec == spec
    assert load_model(config.to_dict()).spec == spec
