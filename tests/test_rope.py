"""RoPE and the trained context of a spec: kept by whatever changes it, and remarked on where a context goes beyond."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from powerplan import budget, compare, decode, recommend, train, wsfr
from powerplan.accounting import Accounting
from powerplan.cli import main
from powerplan.documents import parse_json, parse_yaml
from powerplan.dump import spec_to_yaml
from powerplan.errors import InputError
from powerplan.huggingface import read_config
from powerplan.load import catalogue_spec, load_model
from powerplan.mixers import Attention
from powerplan.rope import LinearScaling, Llama3Scaling, LongRopeScaling, Rope, YarnScaling
from powerplan.schema import spec_schema
from powerplan.search.resize import _deeper
from powerplan.spec import LayerGroup, ModelSpec
from powerplan.swap import with_mixer
from powerplan.validation import validate

LONGER = "longer ones need RoPE scaling and further training"


def model(**fields: Any) -> ModelSpec:
    layers = (LayerGroup(repeat=6, mixer=Attention(heads=4, head_dim=16)),)
    return ModelSpec(name="x", vocab_size=99, hidden_size=64, layers=layers, **fields)


def test_commands_remark_on_contexts_beyond_those_of_the_training() -> None:
    remark = f"trained for contexts up to 8,192 tokens: {LONGER}"
    for context, expected in (("8k", False), ("128k", True)):
        answer = wsfr("llama-3-8b", context)
        assert (remark in str(answer)) is expected
        assert (remark in recommend("llama-3-8b", context).notes) is expected
        assert (f"llama-3-8b: {remark}" in decode("llama-3-8b", context).notes) is expected
        assert (f"llama-3-8b: {remark}" in compare(["llama-3-8b", "gpt2-small"], context).notes) is expected
        made = "its RoPE was made for contexts up to 8,192 tokens: longer ones may need a larger base or scaling"
        assert (made in budget("llama-3-8b", context, tokens="1B").notes) is expected
        assert (made in train("llama-3-8b", context, gpu="h100-sxm", devices=64).notes) is expected
    assert json.loads(wsfr("llama-3-8b", "8k").to_json())["model"]["trained_context"] == 8192
    assert json.loads(wsfr("gpt2-small", "8k").to_json())["model"]["trained_context"] is None


@pytest.mark.parametrize(
    ("fields", "context", "limit"),
    [
        ({"rope": Rope(), "trained_context": 4096}, 4097, f"4,096 tokens: {LONGER}"),
        ({"rope": Rope(), "trained_context": 4096}, 4096, None),
        ({"rope": Rope()}, 2**40, None),
        ({"rope": (), "trained_context": 4096}, 4097, "4,096 tokens: longer ones need further training"),
        ({"trained_context": 4096}, 4097, "4,096 tokens: longer ones need further training"),
        (
            {"rope": Rope(scaling=Llama3Scaling(factor=8, original_context=512)), "trained_context": 4096},
            4097,
            f"4,096 tokens (512 before scaling): {LONGER}",
        ),
        (
            {"rope": Rope(scaling=LinearScaling(factor=2.5)), "trained_context": 4096},
            4097,
            f"4,096 tokens (RoPE scaled by 2.5): {LONGER}",
        ),
        ({"rope": Rope(scaling=YarnScaling(factor=4, original_context=4096)), "trained_context": 4096}, 16_384, None),
        (
            {"rope": Rope(scaling=YarnScaling(factor=4, original_context=4096)), "trained_context": 4096},
            16_385,
            f"4,096 tokens, and its RoPE scaled to 16,384: {LONGER}",
        ),
    ],
)
def test_remarks(fields: dict[str, Any], context: int, limit: str | None) -> None:
    notes = decode(model(**fields), context).notes
    trained = [note.removeprefix("x: trained for contexts up to ") for note in notes if "trained for" in note]
    assert trained == ([] if limit is None else [limit])


def test_a_model_that_is_trained_without_rope_gets_no_remark() -> None:
    assert not [note for note in budget(model(rope=(), trained_context=64), "64k", tokens="1B").notes if "RoPE" in note]


def test_swaps_and_written_specs_keep_it(tmp_path: Path) -> None:
    spec = catalogue_spec("gemma-3-4b")
    swapped, _ = with_mixer(spec, "power:p=2")
    assert (swapped.rope, swapped.trained_context) == (spec.rope, spec.trained_context)
    path = tmp_path / "out.yaml"
    assert main(["recommend", "llama-3.1-8b", "--ctx", "64k", "--write", str(path)]) == 0
    written = load_model(path).spec
    assert written.rope == Rope(theta=500_000, scaling=Llama3Scaling(factor=8, original_context=8192))
    assert written.trained_context == 131_072


@pytest.mark.parametrize(
    ("name", "facts", "settings"),
    [
        ("llama-3.1-8b", ["base 500,000, llama3 scaling by 8 (8,192 before scaling)", "131,072 tokens"], 1),
        (
            "gemma-3-4b",
            ["base 1,000,000, linear scaling by 8, in layers 5, 11, ... 29 (5)", "base 10,000, in the other layers"],
            2,
        ),
        ("qwen3-next-80b-a3b", ["base 10,000,000, 0.25 of each head", "262,144 tokens"], 1),
        ("kimi-linear-48b-a3b", ["none", "1,048,576 tokens"], 0),
        ("gpt2-small", [], None),
    ],
)
def test_models_shows_it(capsys: pytest.CaptureFixture[str], name: str, facts: list[str], settings: int | None) -> None:
    assert main(["models", name]) == 0
    table = capsys.readouterr().out
    assert all(fact in table for fact in facts)
    assert ("RoPE" in table) is bool(facts)
    assert main(["models", name, "--format", "json"]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert (None if entry["rope"] is None else len(entry["rope"])) == settings
    assert entry["trained_context"] == catalogue_spec(name).trained_context


def test_no_count_depends_on_it() -> None:
    spec = catalogue_spec("llama-3.1-8b")
    plain = replace(spec, rope=None, trained_context=None)
    assert Accounting(spec).row(65_536) == Accounting(plain).row(65_536)
    assert Accounting(spec).total_parameters == Accounting(plain).total_parameters
    assert len(replace(spec, rope=(Rope(in_layers=(3,)), Rope(theta=77))).layer_uses()) == 1


@pytest.mark.parametrize(
    ("rope", "deeper", "shallower"),
    [
        (Rope(theta=77), Rope(theta=77), Rope(theta=77)),
        ((), (), ()),
        (
            Rope(theta=77, in_layers=(2, 5)),
            Rope(theta=77, in_layers=(2, 5, 8, 11)),
            Rope(theta=77, in_layers=(2,)),
        ),
        (Rope(theta=77, in_layers=(3,)), Rope(theta=77, in_layers=(3, 6, 9)), ()),
        (
            (Rope(theta=77, in_layers=(2, 5)), Rope()),
            (Rope(theta=77, in_layers=(2, 5, 8, 11)), Rope()),
            (Rope(theta=77, in_layers=(2,)), Rope()),
        ),
        ((Rope(theta=77, in_layers=(3,)),), (Rope(theta=77, in_layers=(3, 6, 9)),), ()),
    ],
)
def test_resized_models_keep_the_rope_of_each_layer(rope: Any, deeper: Any, shallower: Any) -> None:
    from fractions import Fraction

    layer = LayerGroup(repeat=1, mixer=Attention(heads=4, head_dim=16)).period[0]
    spec = replace(model(), layers=(LayerGroup.of([layer, layer, replace(layer, norms=1)], 2),), rope=rope)
    assert _deeper(spec, Fraction(2)).rope == deeper
    assert _deeper(spec, Fraction(1, 2)).rope == shallower


def test_rope_of_each_layer() -> None:
    assert model().rope_at(3) == Rope()
    assert model(position_embeddings=64).rope_at(3) is None
    assert model(rope=()).rope_at(3) is None
    spec = model(rope=(Rope(theta=77, in_layers=(1, 3)), Rope(theta=99, in_layers=(3, 4))))
    assert [rope and rope.theta for rope in map(spec.rope_at, range(6))] == [None, 77, None, 77, 99, None]


def test_sizes_and_yaml() -> None:
    text = spec_to_yaml(model(rope=Rope(scaling=YarnScaling(factor=4, original_context=4096)), trained_context=8192))
    short = text.replace("original_context: 4096", "original_context: 4k").replace(
        "trained_context: 8192", "trained_context: 8k"
    )
    assert "4k" in short
    assert "8k" in short
    assert validate(parse_yaml(short, "x.yaml")) == validate(parse_yaml(text, "x.yaml"))
    assert "rope: {theta: 10000, scaling: {kind: yarn, factor: 4, original_context: 4096}}\n" in text


def test_a_longrope_has_as_many_factors_of_both_kinds() -> None:
    with pytest.raises(InputError, match="long_factor: has 2 entries, and short_factor 1"):
        LongRopeScaling(short_factor=(1,), long_factor=(1, 2), original_context=64, factor=8)


def test_schema() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(spec_schema())
    assert "rope" in spec_schema()["$defs"]["ModelSpec"]["properties"]
    data: dict[str, Any] = {
        "name": "x",
        "vocab_size": 9,
        "hidden_size": 8,
        "layers": [{"mixer": {"kind": "gla", "heads": 1}}],
    }
    for rope in ({}, [], [{"theta": 5e5, "in_layers": [0]}], {"scaling": {"kind": "linear", "factor": 2}}):
        check.validate(data | {"rope": rope, "trained_context": "8k"})
    scaling: dict[str, Any] = {"kind": "yarn", "factor": 2}
    check.validate(data | {"rope": {"scaling": scaling | {"original_context": "4k"}}})
    for wrong in ({"theta": 0}, {"scaling": {"kind": "linear"}}, {"scaling": scaling | {"original_context": -1}}, 5):
        assert not check.is_valid(data | {"rope": wrong})


SCOUT = {"factor": 16.0, "high_freq_factor": 1.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
KIMI = {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "yarn"}
HEADS = {"num_attention_heads": 64, "num_key_value_heads": 64}
PUBLISHED: dict[str, dict[str, object]] = {
    "llama-4-scout": {
        "model_type": "llama4_text",
        "vocab_size": 202_048,
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "num_local_experts": 16,
        "rope_theta": 500_000.0,
        "rope_scaling": SCOUT | {"original_max_position_embeddings": 8192},
    },
    "kimi-k2": {
        "model_type": "kimi_k2",
        "vocab_size": 163_840,
        "hidden_size": 7168,
        "intermediate_size": 18_432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        **HEADS,
        "n_routed_experts": 384,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "rope_theta": 50_000.0,
        "rope_scaling": KIMI | {"original_max_position_embeddings": 4096},
    },
    "minimax-text-01": {
        "model_type": "minimax_m1",
        "vocab_size": 200_064,
        "hidden_size": 6144,
        "intermediate_size": 9216,
        "num_hidden_layers": 80,
        **HEADS,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_local_experts": 32,
        "num_experts_per_tok": 2,
        "attn_type_list": [0, 0, 0, 0, 0, 0, 0, 1] * 10,
        "rope_theta": 10_000_000,
        "rotary_dim": 64,
    },
    "minimax-m2": {
        "model_type": "minimax_m2",
        "vocab_size": 200_064,
        "hidden_size": 3072,
        "intermediate_size": 1536,
        "num_hidden_layers": 62,
        "num_attention_heads": 48,
        "num_key_value_heads": 8,
        "num_local_experts": 256,
        "rope_theta": 5_000_000.0,
        "rotary_dim": 64,
    },
    "power-coder-3b": {
        "model_type": "powercoder",
        "vocab_size": 49_152,
        "hidden_size": 3072,
        "intermediate_size": 12_288,
        "num_hidden_layers": 30,
        "num_attention_heads": 24,
        "num_key_value_heads": 2,
        "rope_theta": 10_000.0,
    },
}
"""What the config.json of models says, as far as RoPE and layers go."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_catalogue_rotates_as_the_published_files_do(name: str) -> None:
    spec, _ = read_config(parse_json(json.dumps(PUBLISHED[name]), "config.json"), name)
    listed = catalogue_spec(name)
    for place in range(spec.layer_count):
        ours, theirs = listed.rope_at(place), spec.rope_at(place)
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:  # As a list or as one setting.
            assert replace(ours, in_layers=None) == replace(theirs, in_layers=None)
    assert spec.layers == listed.layers


def test_retnet_turns_by_the_angles_of_torchscale() -> None:
    """RetNetRelPos spreads the exponents of 10,000 evenly from 0 to 1, both included: a power higher as a base."""
    for name in ("retnet-base", "retnet-medium", "retnet-xl", "retnet-3b", "retnet-13b", "retnet-65b"):
        spec = catalogue_spec(name)
        rope = spec.rope_at(0)
        assert rope is not None
        assert rope.partial == 1
        pairs = 128
        assert {use.layer.mixer.head_dim for use in spec.layer_uses()} == {2 * pairs}  # type: ignore[union-attr]
        ours = [rope.theta ** (-pair / pairs) for pair in range(pairs)]
        assert ours == pytest.approx([10_000 ** (-pair / (pairs - 1)) for pair in range(pairs)], rel=1e-12)
