"""Families whose layers run several times: parameters, FLOPs, caches and keys seen against transformers' models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hf_caches import CONTEXT, PROMPT, Kept, run
from hf_decoders import Settings, mixers_by_layer, require, stored_elements
from msgspec.structs import replace

from powerplan.accounting import Accounting
from powerplan.errors import InputError
from powerplan.load import LoadedModel
from powerplan.mixers import Attention, Convention
from powerplan.spec import ModelSpec
from powerplan.swap import with_mixer

Read = Callable[[Settings], LoadedModel]

FULL, SLIDING = "full_attention", "sliding_attention"
DORY: Settings = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 7,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 20,
    "sliding_window": 5,
    "n_input_layers": 2,
    "n_output_layers": 1,
    "n_recurrent_loops": 3,
}
TYPES = [SLIDING, SLIDING, SLIDING, FULL, SLIDING, SLIDING, SLIDING]
RUNS = [0, 1, *[2, 3, 4, 5] * 3, 6]
"""Which of the seven layers runs when: the four in the middle three times."""

CASES: dict[str, Settings] = {
    "per loop": {},
    "last loop": {"recurrent_kv_cache_mode": "last_loop"},
    "last loop, biases": {"recurrent_kv_cache_mode": "last_loop", "attention_bias": True, "mlp_bias": True},
    "one loop": {"recurrent_kv_cache_mode": "last_loop", "n_recurrent_loops": 1},
    "no loop, tied": {"n_input_layers": 3, "n_output_layers": 4, "tie_word_embeddings": True},
}


def built(transformers: Any, torch: Any, case: str) -> tuple[Any, Settings]:
    """Return a random Dory, and the file of its config."""
    require(transformers, "dory")
    config = transformers.DoryConfig(**DORY | CASES[case], attn_implementation="eager")
    torch.manual_seed(0)
    model = transformers.DoryForCausalLM(config).eval()
    return model, json.loads(config.to_json_string(use_diff=False))


@pytest.mark.transformers
@pytest.mark.parametrize("case", CASES)
def test_parameters_and_flops_of_dory(transformers: Any, torch: Any, read: Read, case: str) -> None:
    """FLOPs of the whole square of scores: a window costs eager attention nothing less."""
    from torch.utils.flop_counter import FlopCounterMode

    model, file = built(transformers, torch, case)
    spec = read(file).spec
    assert Accounting(spec).total_parameters.with_embeddings == stored_elements(model)
    accounting = Accounting(_opened(spec), Convention(causal="full", form="recurrent", lm_head=True))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.arange(PROMPT)[None], use_cache=False)
    flops = (accounting.weight_flops_per_token + accounting.state_flops_per_token(PROMPT)) * PROMPT
    assert counter.get_total_flops() == flops


def _opened(spec: ModelSpec) -> ModelSpec:
    def opened(mixer: Any) -> Any:
        assert isinstance(mixer, Attention)
        return replace(mixer, window=None)

    return spec.map_mixers(opened)


@pytest.mark.transformers
@pytest.mark.parametrize("case", ["per loop", "last loop"])
def test_caches_and_keys_of_dory(transformers: Any, torch: Any, read: Read, case: str) -> None:
    """transformers keeps the caches of further runs behind those of the seven layers."""
    model, file = built(transformers, torch, case)
    kept, weights = run(transformers, torch, model)
    mixers = mixers_by_layer(read(file).spec)
    assert len(mixers) == len(weights) == len(RUNS)
    at = [0, 1, 2, 3, 4, 5, *range(7, 15), 6] if case == "per loop" else [0, 1, *[None] * 8, 2, 3, 4, 5, 6]
    assert len(kept) == len(at) - at.count(None)
    for run_of, mixer, where, seen in zip(RUNS, mixers, at, weights, strict=True):
        assert isinstance(mixer, Attention)
        window = 5 if TYPES[run_of] == SLIDING else None
        assert mixer.window == window
        before = CONTEXT if window is None else window - 1  # The next token brings its own key.
        size = mixer.state_size(before)
        assert size.cache == (0 if where is None else kept[where].cached)
        assert size.looked_up in (None, 2 * 2 * 20 * before)
        if where is not None:
            assert kept[where] == Kept(cached=2 * 2 * 20 * before, window=window)
        counts = (seen > 0).any(dim=0).sum(dim=-1)
        assert counts.tolist() == [min(position + 1, window or PROMPT) for position in range(PROMPT)]


def test_bases_of_dory_are_those_of_its_kinds(read: Read) -> None:
    spec = read({"model_type": "dory"} | DORY).spec
    bases = [rope.theta if (rope := spec.rope_at(place)) else None for place in range(len(RUNS))]
    assert bases == [10_000.0 if TYPES[layer] == SLIDING else 10_000_000.0 for layer in RUNS]


def test_blocks_of_attention_and_mlp_are_one_layer(read: Read) -> None:
    layers = DORY | {"layer_types": TYPES, "n_recurrent_layers": 4}
    blocks = layers | {"layer_types": [word for kind in TYPES for word in (kind, "mlp")]}
    counts = ("num_hidden_layers", "n_input_layers", "n_recurrent_layers", "n_output_layers")
    doubled = blocks | {key: 2 * blocks[key] for key in counts}
    loaded = read({"model_type": "dory"} | doubled)
    assert loaded.spec == read({"model_type": "dory"} | layers).spec == read({"model_type": "dory"} | DORY).spec
    assert "dory: layers 3 to 6 run 3 times; each run is a layer here" in loaded.notes


def test_a_cache_of_the_last_loop_alone_is_a_third(read: Read) -> None:
    """Full layers of the loop keep once what they keep three times; FLOPs and parameters stay."""
    each = read({"model_type": "dory"} | DORY).spec
    loaded = read({"model_type": "dory", "recurrent_kv_cache_mode": "last_loop"} | DORY)
    last = loaded.spec
    rows = [Accounting(spec).row(4096) for spec in (each, last)]
    assert rows[0].state_elements - rows[1].state_elements == 2 * (4096 + 3 * 5) * 2 * 2 * 20
    assert rows[0].state_flops_per_token == rows[1].state_flops_per_token
    assert Accounting(each).total_parameters == Accounting(last).total_parameters
    assert Accounting(each).weight_flops_per_token == Accounting(last).weight_flops_per_token


@pytest.mark.parametrize("mixer", ["power:p=2", "linear", "mla:kv_lora_rank=8,qk_nope_head_dim=8,qk_rope_head_dim=4"])
def test_another_mixer_in_a_loop_keeps_no_projections_of_attention(read: Read, mixer: str) -> None:
    """What attention keeps of its earlier runs is no matter of another mixer: each run has a state of its own."""
    config = {"model_type": "dory", "attention_bias": True} | DORY
    each, last = (
        with_mixer(read(config | {"recurrent_kv_cache_mode": mode}).spec, mixer)[0]
        for mode in ("per_loop", "last_loop")
    )
    rows = [Accounting(spec, Convention(form="chunked")).row(4096) for spec in (each, last)]
    assert rows[0] == rows[1]
    assert mixers_by_layer(each) == mixers_by_layer(last)
    assert Accounting(each).total_parameters == Accounting(last).total_parameters


PAIRS = [word for kind in TYPES for word in (kind, "mlp")]
REFUSALS: list[tuple[Settings, str]] = [
    ({"n_recurrent_layers": 3}, "n_input_layers 2, n_recurrent_layers 3 and n_output_layers 1 do not make 7 layers"),
    ({"n_output_layers": 6}, "n_input_layers 2, n_recurrent_layers 0 and n_output_layers 6 do not make 7 layers"),
    ({"layer_types": PAIRS}, "layer_types must say attention and mlp in turn for each of 7 blocks"),
    (
        {"layer_types": ["mlp", *PAIRS[1:]], "num_hidden_layers": 14},
        "layer_types[0] 'mlp' is not supported for dory",
    ),
    (
        {"layer_types": PAIRS, "num_hidden_layers": 14, "n_input_layers": 3},
        "n_input_layers 3 parts an attention from its MLP: layer_types has both as layers",
    ),
    ({"layer_types": ["linear_attention"] * 7}, "layer_types[0] 'linear_attention' is not supported for dory"),
    ({"recurrent_kv_cache_mode": "no_loop"}, "recurrent_kv_cache_mode 'no_loop' is not supported; supported is per_"),
    ({"n_recurrent_loops": 0}, "n_recurrent_loops 0 is out of range; allowed are 1 to 10,000"),
    ({"n_recurrent_loops": 10_000, "n_output_layers": 9_000, "num_hidden_layers": 9_100}, "makes 989,002 layers in al"),
    ({"hybrid_layer_pattern": "S-*-"}, "hybrid_layer_pattern 'S-*-' is not supported: it is of Dory's first files"),
]


@pytest.mark.parametrize(("settings", "problem"), REFUSALS)
def test_refusals_of_dory(read: Read, settings: Settings, problem: str) -> None:
    with pytest.raises(InputError, match=re.escape(problem)):
        read({"model_type": "dory"} | DORY | settings)


def test_loops_of_hrm_make_no_more_layers_than_a_model_may_have(read: Read) -> None:
    config = DORY | {"model_type": "hrm_text", "H_cycles": 1000, "L_cycles": 1000, "num_hidden_layers": 10}
    with pytest.raises(InputError, match="H_cycles 1000 makes 10,010,000 layers in all; allowed are up to 100,000"):
        read({key: config[key] for key in config if not key.startswith("n_")})
