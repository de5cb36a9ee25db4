"""How layers share a sequence: bytes by hand, the faster of several ways, and from where passing states is faster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import lcm
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powerplan.accounting import Accounting
from powerplan.hardware import find_device, peak_of
from powerplan.load import catalogue_spec
from powerplan.mixers import Attention, Forgetting, Power
from powerplan.mixers.base import HeadShape
from powerplan.run.degrees import Degrees
from powerplan.run.exchanges import INPUTS, KEYS, STATE, WINDOW, Exchange
from powerplan.run.layouts import Batch, Layout, Layouts, Setting
from powerplan.run.links import START_S, Link, all_gather_s, all_to_all_s, cluster_of, send_s
from powerplan.run.loads import model_load
from powerplan.run.passing import (
    Passing,
    Split,
    break_even,
    crossover,
    halo_tokens,
    parts_of,
    passings_of,
    scan_rounds,
    ways_of,
)
from powerplan.run.recipe import Recipe
from powerplan.run.step import Efficiency
from powerplan.spec import Layer, LayerGroup, ModelSpec
from powerplan.swap import with_mixer

H100 = find_device("h100-sxm")
NVLINK = Link(360e9, 3.4e-6, "NVLink")


def layout_of(
    degrees: Degrees, mixer: str | None = None, name: str = "llama-3-8b", context: int = 131_072, **recipe: Any
) -> Layout:
    spec = catalogue_spec(name)
    accounting = Accounting(with_mixer(spec, mixer)[0] if mixer else spec)
    setting = Setting.of(cluster_of(H100, degrees.devices), peak_of(H100), Efficiency(0.5, 0.5, 0.5), Batch(2**22))
    return Layouts(accounting, context, setting).layout(degrees, Recipe(**recipe), 64)


def passings(degrees: Degrees, *arguments: Any, **settings: Any) -> tuple[Passing, ...]:
    return layout_of(degrees, *arguments, **settings).step.passings


def split_of(ranks: int, link: Link = NVLINK, **fields: Any) -> Split:
    return Split(ranks, link, **{"tp": 1, "tokens": 4096, "sequences": 1, "element_bytes": 2.0} | fields)


@pytest.mark.parametrize("mixer", ["power:p=2", "power:p=2,normalize=false", "linear"])
def test_recurrent_layers_pass_states_whatever_the_context(mixer: str) -> None:
    (short,), (long,) = (passings(Degrees(cp=2), mixer, context=context) for context in (65_536, 1_048_576))
    assert short.exchange.what == STATE
    assert short.bytes_sent == long.bytes_sent
    assert short.seconds == long.seconds
    columns = {"power:p=2": 129, "power:p=2,normalize=false": 128, "linear": 128}[mixer]
    width = 128 if mixer == "linear" else Power(heads=1, head_dim=128, p=2).feature_dim
    assert short.bytes_sent == 8 * width * columns * 4


def test_a_state_has_as_many_bytes_as_keys_and_values_of_8320_tokens() -> None:
    """d = 128, G = 8, p = 2: D = 128 * 129 / 2 = 8,256 and a normaliser, in fp32; keys and values in bf16."""
    layout = layout_of(Degrees(cp=8), "power:p=2")
    assert layout.split is not None
    (passing,) = layout.step.passings
    assert break_even(passing.exchange, layout.split) == 8 * 8256 * 129 * 4 // (8 * 256 * 2) == 8320
    assert (
        break_even(passing.exchange, replace(layout.split, parts=2))
        == 2 * 8 * 8256 * 129 * 4 // (8 * 256 * 2)
        == 16_641
    )
    assert break_even(replace(passing.exchange, heads=None), layout.split) is None


TRANSITIONS = {
    "power:p=2,gated=true": 8 * (8256 * 129 + 1),
    "power:p=2": 8 * 8256 * 129,
    "linear:gated=true": 8 * (128 * 128 + 1),
    "retnet": 32 * (128 * 128 + 1),
    "lightning": 32 * (128 * 128 + 1),
    "gla": 32 * (128 * 128 + 128),
    "deltanet": 32 * (128 * 128 + 128 * 128),
    "gated_deltanet": 32 * (128 * 128 + 128 * 128),
    "kda": 32 * (128 * 128 + 128 * 128),
    "rwkv7": 64 * (64 * 64 + 64 * 64),
    "mamba1": 8192 * (16 + 16),
    "mamba2": 128 * (64 * 128 + 1),
    "gsa": 32 * (64 * (128 + 128) + 64),
    "sse": 5 * 32 * (128 * 128 + 128),
    "log_linear": 128 * (18 * 64 * 128 + 18 * 18),
}


@pytest.mark.parametrize("mixer", TRANSITIONS)
def test_what_a_part_multiplies_the_state_by_is_passed_beside_it(mixer: str) -> None:
    """Decays of heads or key channels, and for delta rules a matrix for each head; numbers in fp32.

    131,072 has 18 bits, and log_linear a state for each.
    """
    (state,) = (way for way in passings(Degrees(cp=2), mixer) if way.exchange.what == STATE)
    assert state.bytes_sent == TRANSITIONS[mixer] * 4


def test_gates_go_with_the_heads_that_have_them() -> None:
    """Forgetting attention on llama-3-8b, cp 4, tp 2: 16 query heads, each with a gate, and 4 key/value heads."""
    (exchange,) = (way.exchange for way in passings(Degrees(cp=2), "forgetting"))
    split = split_of(4, tp=2, attention_flops_per_s=1.0)
    ring, swapped = ways_of(exchange, split)
    gates = 16 * 4 * 4096
    assert (ring.way, swapped.way) == ("ring", "all-to-all")
    assert ring.bytes_sent == 3 * (4 * 256 * 2 * 4096 + gates)
    assert swapped.bytes_sent == 3 / 4 * ((2 * 16 * 128 + 4 * 256) * 2 * 4096 + gates)


def test_keys_that_an_earlier_layer_made_are_passed_on_with_the_gates_of_each() -> None:
    """Forgetting attention that takes the keys and values of the layer before: its gates are its own."""
    first = Forgetting(heads=4, kv_heads=2, head_dim=8)
    layers = [LayerGroup(mixer=mixer) for mixer in (first, msgspec.structs.replace(first, shared_kv=True))]
    spec = ModelSpec(name="x", vocab_size=9, hidden_size=32, layers=tuple(layers))
    one, two = model_load(Accounting(spec), 4096, Recipe()).layers
    assert one.entry_bytes == two.entry_bytes == 2 * 16 * 2 + 4 * 4
    assert one.gate_bytes == two.gate_bytes == 4 * 4


def test_short_convolutions_pass_their_last_inputs() -> None:
    inputs, state, ring = passings(Degrees(cp=4), name="qwen3-next-80b-a3b")
    assert [way.exchange.what for way in (inputs, state, ring)] == [INPUTS, STATE, KEYS]
    assert [way.layers for way in (inputs, state, ring)] == [36, 36, 12]
    assert inputs.way == "halo"
    assert inputs.bytes_sent == 2 * 3 * (2 * 16 * 128 + 32 * 128) * 2, "two parts in zigzag, for the ring"


def test_attention_passes_keys_and_values_in_a_ring() -> None:
    (ring,) = passings(Degrees(cp=16))
    assert ring.way == "ring"
    assert ring.bytes_sent == ring.bytes_received == 15 * (131_072 // 16) * 8 * 256 * 2
    assert ring.buffer_bytes == 2 * (131_072 // 16) * 8 * 256 * 2
    assert ring.rounds == 15


def test_heads_are_exchanged_where_that_is_exposed_for_less_time() -> None:
    (ways,) = passings(Degrees(cp=8), name="llama-2-7b", context=2048)
    assert ways.way == "all-to-all"
    tokens, heads = 2048 // 8, 2 * (32 + 32) * 128
    assert ways.bytes_sent == tokens * heads * 2 * 7 / 8


@pytest.mark.parametrize(("ranks", "repeated"), [(8, 8), (16, 16), (32, 32), (3, None), (64, None)])
def test_key_value_heads_are_repeated_until_devices_can_share_them(ranks: int, repeated: int | None) -> None:
    """32 query heads over 8 key/value heads of 128: 16 devices have two query heads each and one that they share."""
    keys = Exchange("attention", KEYS, 1, 8 * 256 * 2, heads=HeadShape(32, 8, 128, 128))
    (way,) = passings_of([keys], split_of(ranks, tokens=16, attention_flops_per_s=1e30))
    if repeated is None:
        assert way.way == "ring"
    else:
        assert way.way == "all-to-all"
        assert way.bytes_sent == 16 * 2 * (32 + repeated) * 128 * 2 * (ranks - 1) / ranks


def test_windows_pass_the_keys_before_a_device_s_own() -> None:
    (near,), (far,) = (passings(Degrees(cp=8), "window:4096", context=context) for context in (65_536, 1_048_576))
    assert (near.way, near.exchange.what) == ("halo", WINDOW)
    assert near.bytes_sent == far.bytes_sent == near.buffer_bytes == 4095 * 8 * 256 * 2
    (two,) = passings(Degrees(cp=8), "window:4096", context=16_384)
    assert two.bytes_sent == near.bytes_sent
    assert two.seconds == pytest.approx(near.seconds + 32 * NVLINK.latency_s), "from two devices before"


def test_a_window_as_long_as_the_context_is_none() -> None:
    (ring,) = passings(Degrees(cp=16), "window:8192", context=8192)
    assert ring.exchange.what == KEYS
    assert ring.bytes_sent == passings(Degrees(cp=16), context=8192)[0].bytes_sent
    assert passings(Degrees(cp=16), "window:1", context=8192) == (), "a token that meets itself alone needs no other"


def test_devices_that_split_heads_pass_the_keys_of_their_own() -> None:
    one, eight, sixteen = (passings(Degrees(cp=4, tp=tp))[0].bytes_sent for tp in (1, 8, 16))
    assert one == 8 * eight == 8 * sixteen, "16 devices need one of 8 key/value heads each, two of them the same"
    alone, split = (passings(Degrees(cp=4, tp=tp), name="deepseek-v3", context=8192) for tp in (1, 8))
    assert alone[0].bytes_sent == split[0].bytes_sent == 3 * 2048 * (512 + 64) * 2


def test_layers_with_the_keys_of_others_pass_them_too() -> None:
    own, shared = (Attention(heads=8, kv_heads=2, head_dim=64, shared_kv=share) for share in (False, True))
    group = LayerGroup(pattern=(Layer(mixer=own), Layer(mixer=shared)))
    spec = ModelSpec(name="x", vocab_size=100, hidden_size=512, layers=(group,))
    setting = Setting.of(cluster_of(H100, 4), peak_of(H100), Efficiency(0.5, 0.5, 0.5), Batch(4096))
    (ring,) = Layouts(Accounting(spec), 4096, setting).layout(Degrees(cp=4), Recipe(), 1).step.passings
    assert ring.layers == 2
    assert ring.exchange.flops == 2 * 2 * 8 * 128 * 4097 / 2


def test_states_are_gathered_or_scanned_by_what_takes_less_time() -> None:
    state = 8 * 8256 * 129 * 4
    for ranks, way in ((2, "gather"), (4, "gather"), (8, "scan"), (64, "scan")):
        layout = layout_of(Degrees(cp=ranks), "power:p=2", context=65_536)
        assert layout.split is not None
        (passing,) = layout.step.passings
        rounds = {2: 1, 4: 3, 8: 4, 64: 7}[ranks]
        gather = all_gather_s(layout.split.link, ranks, ranks * state)
        scan = rounds * (START_S + send_s(layout.split.link, state))
        assert passing.seconds == pytest.approx(32 * min(gather, scan))
        assert passing.way == way
        assert passing.bytes_sent == state * (1 if way == "gather" else rounds)
        assert passing.bytes_received == state * (ranks - 1 if way == "gather" else rounds)
        assert passing.buffer_bytes == state * (ranks if way == "gather" else 3)
    small = Exchange("linear", STATE, 1, 1e3)
    (few,) = passings_of([small], split_of(64, attention_flops_per_s=1.0))
    assert few.way == "scan", "seven rounds of 11.8 us against 63 steps of 3.4 us"
    (near,) = passings_of([small], split_of(8, attention_flops_per_s=1.0))
    assert near.way == "gather", "four rounds of 11.8 us against 7 steps of 3.4 us"


def test_zigzag_for_a_ring_doubles_what_states_and_windows_pass() -> None:
    """qwen3-next on 16 devices: attention goes around a ring, so that every device has two parts."""
    layout = layout_of(Degrees(cp=16), name="qwen3-next-80b-a3b")
    assert layout.split is not None
    assert layout.split.parts == 2
    alone = layout_of(Degrees(cp=16), "kda", name="qwen3-next-80b-a3b")
    assert alone.split is not None
    assert alone.split.parts == 1
    inputs, state, _ = layout.step.passings
    single, one, _ = passings_of([way.exchange for way in layout.step.passings], replace(layout.split, parts=1))
    assert (state.way, one.way) == ("gather", "gather")
    assert state.bytes_sent == 2 * one.bytes_sent
    assert inputs.bytes_sent == 2 * single.bytes_sent


def test_stages_of_a_pipeline_lie_as_the_whole_model_does() -> None:
    """The first of six stages of jamba has no attention: its states are passed on for two parts as in the others."""
    layout = layout_of(Degrees(cp=8, pp=16), name="jamba-v0.1")
    assert layout.split is not None
    assert layout.split.parts == 2


def senders(ranks: int, parts: int) -> Iterator[list[int]]:
    """Yield the messages that each rank sends in each round, as powerplan.kernels makes them."""
    from powerplan.kernels.distributed.exchange import Wire
    from powerplan.kernels.distributed.layout import make_layout, named_ranges

    tokens = 2 * ranks
    layout = make_layout((0, tokens), named_ranges("zigzag" if parts == 2 else "contiguous", tokens, ranks))
    nobody: Any = None
    wire = Wire(nobody, 0, layout, "scan", None)
    holder = [fragment.rank for fragment in layout.fragments]
    for pairs in wire.rounds(False):
        owners = [(holder[source], holder[target]) for source, target in pairs]
        yield [sum(source == rank != target for source, target in owners) for rank in range(ranks)]


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("ranks", [2, 3, 4, 5, 8, 9, 33, 1024])
def test_rounds_of_a_scan_are_those_of_the_kernels(ranks: int, parts: int) -> None:
    pytest.importorskip("torch")
    rounds = list(senders(ranks, parts))
    found = scan_rounds(ranks, parts)
    assert found.most == max(map(sum, zip(*rounds, strict=True)))
    assert found.messages == tuple(max(sent) for sent in rounds)


@given(ranks=st.integers(2, 9), parts=st.sampled_from([1, 2]), piece=st.integers(1, 7), reach=st.integers(1, 40))
def test_tokens_of_a_halo_are_those_that_lie_elsewhere(ranks: int, parts: int, piece: int, reach: int) -> None:
    count = ranks * parts
    holder = [part if part < ranks else 2 * ranks - 1 - part for part in range(count)]
    sent = [0] * ranks
    for part in range(count):
        for token in range(max(0, part * piece - reach), part * piece):
            if holder[token // piece] != holder[part]:
                sent[holder[token // piece]] += 1
    assert halo_tokens(ranks, parts, piece, reach) == max(sent)


SHAPES = st.sampled_from(
    [
        HeadShape(heads, kv_heads, dim, other)
        for heads, kv_heads in ((32, 8), (32, 32), (8, 1), (12, 3))
        for dim, other in ((64, 64), (128, 128), (192, 128))
    ]
)


def keys_s(shape: HeadShape, split: Split, tokens: int) -> dict[str, float]:
    """Return the seconds of a forward and a backward pass over keys and values, from the links alone."""
    elements = tokens * split.sequences * split.element_bytes
    message = shape.kv_heads * (shape.head_dim + shape.v_head_dim) * elements
    found = {"ring": 3 * (split.ranks - 1) * (START_S + send_s(split.link, message))}
    shared = lcm(shape.kv_heads, split.ranks)
    if shape.heads % shared == 0:
        there = (shape.heads * shape.head_dim + shared * (shape.head_dim + shape.v_head_dim)) * elements
        back = shape.heads * shape.v_head_dim * elements
        there_s, back_s = (all_to_all_s(split.link, split.ranks, size) for size in (there, back))
        found["all-to-all"] = 2 * (there_s + back_s)
    return found


@settings(max_examples=300, deadline=None)
@given(
    shape=SHAPES,
    state=st.floats(1e3, 1e9),
    ranks=st.sampled_from([2, 3, 4, 8, 12, 32, 256]),
    size=st.sampled_from([1, 8]),
    parts=st.sampled_from([1, 2]),
    sequences=st.integers(1, 4),
    other=st.integers(1, 10**6),
)
def test_a_state_is_the_faster_exchange_from_so_many_tokens_on(
    shape: HeadShape, state: float, ranks: int, size: int, parts: int, sequences: int, other: int
) -> None:
    """With one token per device less, keys and values take less time; with as many or more, the state does."""
    from powerplan.run.links import link_for

    link = link_for(cluster_of(H100, ranks, node_devices=size), ranks)
    split = split_of(ranks, link, attention_flops_per_s=1e15, parts=parts, sequences=sequences)
    (passing,) = passings_of([Exchange("x", STATE, 1, state, kv_heads=shape.kv_heads, heads=shape)], split)
    found = crossover(passing, split)
    assert found is not None
    takes = 2 * passing.seconds
    assert takes <= min(keys_s(shape, split, found.tokens).values())
    assert found.against == min(keys_s(shape, split, found.tokens).items(), key=lambda way: way[1])[0]
    assert takes <= min(keys_s(shape, split, found.tokens + other).values())
    for fewer in {found.tokens - 1, found.tokens // 2, other % found.tokens}:
        if fewer:
            assert min(keys_s(shape, split, fewer).values()) < takes


def test_what_has_no_state_or_heads_has_no_crossover() -> None:
    layout = layout_of(Degrees(cp=8))
    assert layout.split is not None
    assert crossover(layout.step.passings[0], layout.split) is None
    layout = layout_of(Degrees(cp=8), "mamba2")
    assert layout.split is not None
    assert [crossover(way, layout.split) for way in layout.step.passings] == [None, None]


@given(
    shape=SHAPES,
    what=st.sampled_from([KEYS, WINDOW, STATE, INPUTS]),
    payload=st.floats(1, 1e8),
    ranks=st.integers(2, 64),
    tokens=st.integers(1, 10**5),
    parts=st.sampled_from([1, 2]),
)
def test_more_bytes_are_never_passed_on_faster(
    shape: HeadShape, what: str, payload: float, ranks: int, tokens: int, parts: int
) -> None:
    split = split_of(ranks, tokens=2 * tokens, attention_flops_per_s=1e15, parts=parts)
    one = Exchange("x", what, 3, payload, reach=5 if what == WINDOW else 0, kv_heads=shape.kv_heads, heads=shape)
    less, more = passings_of([one, replace(one, payload_bytes=2 * payload)], split)
    assert less.seconds <= more.seconds * (1 + 1e-12)
    assert 0 <= less.exposed_s <= less.seconds
    assert 0 < less.bytes_sent <= less.bytes_received * max(1, ranks - 1)
    assert parts_of([one], split) in ((1, 2) if what == KEYS else (1,))


@pytest.mark.parametrize(
    ("mixer", "again"),
    [
        ("power:p=2,gated=true", 2 * 8 * 8256 * 129),
        ("linear", 2 * 8 * 128 * 128),
        ("retnet", 2 * 32 * 128 * 128),
        ("gla", 2 * 32 * 128 * 128),
        ("kda", 4 * 32 * 128 * (128 + 128)),
        ("rwkv7", 4 * 64 * 64 * (64 + 64)),
        ("mamba1", 4 * 8192 * 16),
        ("mamba2", 2 * 8192 * 128),
        ("gsa", 2 * 32 * 64 * (128 + 128)),
        ("sse", 2 * 2 * 32 * 128 * 128),
    ],
)
def test_a_state_that_is_computed_once_more_takes_time(mixer: str, again: int) -> None:
    """The FLOPs of docs/distributed.md, forward and twice that back, at the share of recurrent state."""
    one, eight = (layout_of(Degrees(cp=cp), mixer, context=65_536) for cp in (1, 8))
    takes = 3 * 32 * again * 64 * 65_536 / (989e12 * 0.5)
    assert 8 * eight.step.recurrent_s == pytest.approx(one.step.recurrent_s + takes)
