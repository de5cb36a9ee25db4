"""Dimensions of the power embeddings: published figures, and brute-force counts of what they count."""

from __future__ import annotations

import json
from itertools import combinations_with_replacement
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kinds import variants

import powerplan
from powerplan.cli import main
from powerplan.dims import default_chunk_size, spow_dim, tiled_spow_dim, tpow_dim
from powerplan.errors import InputError
from powerplan.ffn import MLP
from powerplan.mixers import MIXERS, Attention
from powerplan.report.dims import KINDS, dims_report, states_report
from powerplan.spec import LayerGroup, ModelSpec


@pytest.mark.parametrize(
    ("p", "spow", "tpow", "savings"),
    [
        (2, 2_080, 4_096, 49),
        (3, 45_760, 262_144, 82),
        (4, 766_480, 16_777_216, 95),
        (5, 10_424_128, 1_073_741_824, 99),
        (6, 119_877_472, 68_719_476_736, 99.8),
    ],
)
def test_table_3_of_the_paper(p: int, spow: int, tpow: int, savings: float) -> None:
    """arXiv 2507.04239, Table 3, d = 64. The paper cuts its savings (82.5 is printed as 82) and does not round them."""
    assert (spow_dim(64, p), tpow_dim(64, p)) == (spow, tpow)
    (row,) = dims_report([64], [p], 8, None).rows
    digits = 10 if p == 6 else 1
    assert int(row["savings"] * 100 * digits) / digits == savings


@given(st.integers(1, 6), st.integers(1, 5))
def test_spow_counts_multisets(d: int, p: int) -> None:
    assert spow_dim(d, p) == len(list(combinations_with_replacement(range(d), p)))


@given(st.integers(1, 24), st.integers(1, 4), st.integers(1, 24))
def test_tiled_spow_counts_blocks_of_padded_tiles(d: int, p: int, tile: int) -> None:
    tiles = range((d + tile - 1) // tile)
    assert tiled_spow_dim(d, p, tile) == len(list(combinations_with_replacement(tiles, p))) * tile**p


@given(st.integers(1, 64), st.integers(1, 6))
def test_tiled_spow_lies_between_spow_and_tpow(d: int, p: int) -> None:
    assert tiled_spow_dim(d, p, 1) == spow_dim(d, p)
    assert tiled_spow_dim(d, p, d) == tpow_dim(d, p)
    for tile in range(1, d + 1):
        if d % tile == 0:
            assert spow_dim(d, p) <= tiled_spow_dim(d, p, tile) <= tpow_dim(d, p)


@pytest.mark.parametrize(
    ("d", "p", "chunk"),
    [(64, 1, 128), (8, 2, 128), (24, 2, 256), (64, 2, 256), (128, 2, 256), (64, 3, 1024), (64, 4, 256)],
)
def test_default_chunk_grows_with_the_dimension(d: int, p: int, chunk: int) -> None:
    assert default_chunk_size(d, p) == chunk


def test_window_of_the_same_state() -> None:
    """p = 2 at d = 64 keeps 133,120 elements of value state per head, as the cache of 1,040 tokens."""
    (row,) = dims_report([64], [2], 8, None).rows
    assert row["same_state_window"] == 1040
    assert row["state_elements"] == 133_120
    assert row["state_bytes"] == 4 * 2080 * 65
    (narrow,) = dims_report([64], [2], 8, 32).rows
    assert narrow["same_state_window"] == 2080 * 32 // (64 + 32)


def test_states_of_every_kind_of_fixed_size() -> None:
    """States of one head in elements; power attention of the given degrees is listed among the other kinds."""
    report = states_report([64], [2, 3], None, "all")
    states = {row["mixer"]: row["state_elements"] for row in report.rows}
    assert len(states) == len(KINDS) + 2
    known = {
        "mamba1": 64 * 16,
        **dict.fromkeys(
            ("linear", "retnet", "lightning", "gla", "deltanet", "gated deltanet", "kda", "rwkv7"), 64 * 64
        ),
        "gsa, 64 slots": 64 * 128,
        "mamba2": 64 * 128,
        "sse, 1 of 4": 5 * 64 * 64,
        "power p=2": 2080 * 65,
        "power p=3": 45_760 * 64,  # Odd degrees have no normaliser.
    }
    assert states | known == states
    assert list(states.values()) == sorted(states.values())
    for p in range(1, 7):
        power = next(row for row in states_report([64], [p], None, "kda").rows if row["kind"] == "power")
        (same,) = dims_report([64], [p], 8, None).rows
        assert (power["state_bytes"], power["same_state_window"]) == (same["state_bytes"], same["same_state_window"])
        assert power["state_elements"] == same["state_elements"] + same["normaliser_elements"]


def test_a_kind_is_listed_where_its_state_does_not_grow() -> None:
    first = {kind: next(variants(mixer)) for kind, mixer in MIXERS.items()}
    recurrent = {kind: mixer for kind, mixer in first.items() if mixer.state_size(1).recurrent}
    fixed = {kind for kind, mixer in recurrent.items() if mixer.state_size(1) == mixer.state_size(10_000)}
    sized_by_itself = {"hyena"}  # A distilled state has a size of its own, which no head dim decides.
    assert {*KINDS, "power"} == fixed - sized_by_itself
    assert not fixed & {"attention", "mla", "log_linear", "nsa", "moba", "dsa", "forgetting"}


def test_equal_states_are_listed_in_the_order_of_kinds() -> None:
    """Mamba's state dims are 16 and 128: at these head dims its state is as large as the others' k x v."""
    for head_dim in (16, 128):
        rows = states_report([head_dim], [2], None, "all").rows
        kinds = [row["kind"] for row in rows if row["state_elements"] == head_dim**2]
        assert kinds == sorted(kinds, key=KINDS.index)
        assert kinds[-2:] == (["rwkv7", "mamba1"] if head_dim == 16 else ["rwkv7", "mamba2"])


def test_states_of_some_kinds_at_some_dims() -> None:
    report = states_report([64, 128], [2], 32, "kda, mamba2,kda")
    assert [(row["head_dim"], row["kind"], row["state_elements"]) for row in report.rows] == [
        (64, "kda", 64 * 32),
        (64, "mamba2", 32 * 128),
        (64, "power", 2080 * 33),
        (128, "kda", 128 * 32),
        (128, "mamba2", 32 * 128),
        (128, "power", 8256 * 33),
    ]
    assert states_report([64], [2], None, "all,kda").rows == states_report([64], [2], None, "all").rows
    with pytest.raises(InputError, match=r"--kind: 'kad' is not a kind with a state of fixed size; did you mean kda\?"):
        states_report([64], [2], None, "kad")


def test_kernels_of_rows(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {(row["head_dim"], row["p"]): row for row in payload(capsys, "dims", "--head-dim", "64,128")["rows"]}
    assert rows[64, 2]["kernels"] == ["torch", "triton", "hopper"]
    assert rows[64, 3]["kernels"] == ["torch", "triton"]
    assert rows[128, 3]["kernels"] == rows[128, 4]["kernels"] == ["torch"]
    assert rows[64, 5]["kernels"] == []
    assert [rows[64, p]["kernels_normalize"] for p in (1, 2, 3)] == [False, True, False]
    assert main(["dims", "--p", "2,3,4,5"]) == 0
    out = capsys.readouterr().out
    for p, kernels in {2: "triton, Hopper engine", 3: "triton, no normaliser", 4: "torch", 5: "none"}.items():
        assert next(line for line in out.splitlines() if line.split()[1:2] == [str(p)]).endswith(f"  {kernels}")
    assert "kernels need normalize: false" in out
    assert main(["dims", "--p", "2"]) == 0
    assert "normalize" not in capsys.readouterr().out


def payload(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--format", "json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


@pytest.mark.parametrize("model", ["llama-3-8b", "gpt2-small", "gemma-2-9b", "deepseek-v3"])
def test_a_model_carries_what_it_does_with_that_mixer(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = payload(capsys, "dims", "--model", model, "--p", "1,2,3", "--ctx", "8k")
    assert (result["schema"], result["model"], result["context"]) == ("powerplan.dims/1", model, 8192)
    assert [row["p"] for row in result["totals"]] == [1, 2, 3]
    for row in result["totals"]:
        d, v, heads, layers = (row[key] for key in ("head_dim", "v_head_dim", "kv_heads", "layers"))
        columns = v + (1 if row["p"] % 2 == 0 else 0)
        assert row["spow"] == spow_dim(d, row["p"])
        assert row["normalize"] == (row["p"] % 2 == 0)
        assert row["state_bytes_per_head"] == 4 * row["spow"] * columns
        assert row["state_bytes_per_layer"] == heads * row["state_bytes_per_head"]
        assert row["state_bytes"] == layers * row["state_bytes_per_layer"]
        assert row["same_state_window"] == row["spow"] * v // (d + v)
        (same,) = powerplan.wsfr(model, "8k", mixer=row["mixer"]).rows
        assert row["wsfr"] == float(same.wsfr or 0)
        assert row["weight_flops_per_token"] == same.weight_flops_per_token
        assert row["state_flops_per_token"] == same.state_flops_per_token
    assert result["as_it_is"]["wsfr"] == float(powerplan.wsfr(model, "8k").rows[0].wsfr or 0)


def test_which_degree_for_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dims", "--model", "llama-3-8b"]) == 0
    out = capsys.readouterr().out
    assert "llama-3-8b at 65,536 tokens as it is: 1:1.14, state 8 GiB per sequence" in out
    assert "in all 32 layers of 32 (8 kv) heads of 128:" in out
    assert "largest p here at 1:1 or more: p=2, 5.51:1, state 1.016 GiB per sequence; p=3 has 1:7.81" in out
    answer = powerplan.degrees("llama-3-8b", "64k", p="1,2,3,4")
    assert str(answer) == out.removesuffix("\n")
    assert answer.largest is not None
    assert answer.largest.p == 2
    assert powerplan.degrees("llama-3-8b", p=4).largest is None
    heavy = str(powerplan.degrees("llama-3-8b", p=4))
    assert "no p here leaves the weight FLOPs at 1:1 or more: p=4 has 1:258" in heavy
    assert main(["dims", "--model", "llama-3-8b", "--format", "csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[0].startswith("p,layers,head_dim,kv_heads,spow,state_bytes_per_head,")


def test_layers_of_several_shapes_have_a_row_each() -> None:
    """Half of the layers with heads of 64, half with 128: the totals are those of the whole model."""
    wide, narrow = (Attention(heads=8, kv_heads=2, head_dim=d) for d in (128, 64))
    layers = (LayerGroup(repeat=3, mixer=wide), LayerGroup(repeat=2, mixer=narrow))
    spec = ModelSpec(name="two", vocab_size=100, hidden_size=512, layers=layers)
    rows = powerplan.degrees(spec, "8k", p=2).report.payload["totals"]
    assert [(row["head_dim"], row["layers"]) for row in rows] == [(128, 3), (64, 2)]
    assert sum(row["layers"] * row["state_bytes_per_layer"] for row in rows) == rows[0]["state_bytes"]
    assert rows[0]["same_state_window"] == (3 * 8256 * 128 + 2 * 2080 * 64) // (3 * 256 + 2 * 128)


def test_models_without_mixers_are_refused() -> None:
    spec = ModelSpec(name="mlps", vocab_size=100, hidden_size=64, layers=(LayerGroup(ffn=MLP(intermediate_size=128)),))
    with pytest.raises(InputError, match="model: mlps has no mixers that power attention could take the place of"):
        powerplan.degrees(spec)
    with pytest.raises(InputError, match="p: 17 is out of range"):
        powerplan.degrees("gpt2-small", p=[2, 17])
