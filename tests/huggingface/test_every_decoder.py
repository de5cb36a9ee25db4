"""Every causal language model that the installed transformers builds: read to the digit, or refused with a reason."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hf_decoders import NEEDED, Settings, odd_settings, require, stored_elements, written
from hf_meta import on_meta

from powerplan.accounting import Accounting
from powerplan.errors import InputError
from powerplan.huggingface import FAMILIES, REFUSED, dense, gpt, looped, special
from powerplan.huggingface.families import wrapped_families
from powerplan.load import LoadedModel

pytestmark = pytest.mark.transformers

Read = Callable[[Settings], LoadedModel]

auto = pytest.importorskip("transformers.models.auto.modeling_auto")
DENSE = {**dense.FAMILIES, **gpt.FAMILIES, **looped.FAMILIES, **special.FAMILIES}
DECODERS = sorted(name for name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in FAMILIES)


def test_every_decoder_is_read_or_refused_with_a_reason() -> None:
    known = {*FAMILIES, *REFUSED, *wrapped_families()}
    assert set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - known == set()
    assert set(REFUSED) & set(FAMILIES) == set()


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_what_is_refused_is_so_with_a_text_config(read: Read, model_type: str) -> None:
    with pytest.raises(
        InputError, match=re.escape(f"model_type '{model_type}' is not supported: {REFUSED[model_type]}")
    ):
        read({"model_type": model_type, "text_config": {"model_type": "llama", "hidden_size": 64}})


def built(transformers: Any, torch: Any, model_type: str, kind: str) -> tuple[Any, Any]:
    config_class = transformers.CONFIG_MAPPING[model_type]
    settings = (
        NEEDED.get(model_type, {})
        if kind == "default"
        else odd_settings(config_class, model_type, flip=kind == "odd, flags")
    )
    config = config_class(**settings)
    names = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    model_class = getattr(transformers, names if isinstance(names, str) else names[0])
    with on_meta():
        return config, model_class(config)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors:UserWarning")
@pytest.mark.parametrize("kind", ["default", "odd", "odd, flags"])
@pytest.mark.parametrize("model_type", DECODERS)
def test_parameters(transformers: Any, torch: Any, read: Read, model_type: str, kind: str) -> None:
    config, model = built(transformers, torch, model_type, kind)
    for form in ("whole", "diff"):
        spec = read(written(config, form)).spec
        assert Accounting(spec).total_parameters.with_embeddings == stored_elements(model), form


WRAPPERS = sorted(name for name, text in wrapped_families().items() if text in DENSE)


@pytest.mark.parametrize("form", ["whole", "diff"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_default_configs_of_wrappers(transformers: Any, read: Read, wrapper: str, form: str) -> None:
    """Every key of the text_config that transformers writes is known, and none gets a remark."""
    require(transformers, wrapper)
    config = transformers.CONFIG_MAPPING[wrapper]()
    notes = read(json.loads(config.to_json_string(use_diff=form == "diff"))).notes
    assert not [note for note in notes if "not known" in note]


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_refusals(read: Read, model_type: str) -> None:
    with pytest.raises(InputError, match=f"model_type '{model_type}' is not supported: ") as refusal:
        read({"model_type": model_type})
    assert REFUSED[model_type] in str(refusal.value)
