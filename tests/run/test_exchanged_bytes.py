"""What is planned to be passed on along a sequence is what mixers hand to torch.distributed, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from exchanges_on_ranks import CASES, COUNT, ROWS, SETTINGS, all_work, cases  # noqa: E402
from kinds import spec_of  # noqa: E402
from ranks import run_in  # noqa: E402

from powerplan.accounting import Accounting  # noqa: E402
from powerplan.dims import spow_dim  # noqa: E402
from powerplan.kernels.distributed.exchange import Wire  # noqa: E402
from powerplan.kernels.distributed.layout import make_layout, named_ranges  # noqa: E402
from powerplan.mixers import DSA, MLA, Linear, Power  # noqa: E402
from powerplan.run.exchanges import STATE, exchanges_of  # noqa: E402
from powerplan.run.links import Link  # noqa: E402
from powerplan.run.loads import model_load  # noqa: E402
from powerplan.run.passing import Passing, Split, halo_tokens, ways_of  # noqa: E402
from powerplan.run.recipe import Recipe  # noqa: E402

Found = dict[str, Any]

ODD = {"mla", "mla, low-rank queries"}
"""Three heads, which four ranks cannot share: planned as a ring, which powerplan.models does not have."""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What each of the processes sent: one start of them serves all tests."""
    folder: Path = tmp_path_factory.mktemp("exchanges")
    run_in(COUNT, all_work, folder)
    return [json.loads((folder / f"found-{rank}.json").read_text(encoding="utf-8")) for rank in range(COUNT)]


def planned(name: str, exchange: str, layout: str, tokens: int) -> list[Passing]:
    """Return how the planner would have a layer pass on what it needs, in the ways that powerplan.models has."""
    model = model_load(Accounting(spec_of(CASES[name])), tokens, Recipe(dtype="fp32"))
    split = Split(
        ranks=COUNT,
        link=Link(1e9, 1e-6, "link"),
        tp=1,
        tokens=tokens / COUNT,
        sequences=ROWS,
        element_bytes=4.0,
        attention_flops_per_s=1e12,
        parts=2 if layout == "zigzag" else 1,
    )
    counted = [(load, load.use.count) for load in model.layers]
    ways = [{way.way: way for way in ways_of(one, split)} for one in exchanges_of(counted, tokens)]
    return [next(each[way] for way in (exchange, "halo", "all-to-all", "ring") if way in each) for each in ways]


@pytest.mark.parametrize("name", sorted(CASES.keys() - ODD))
def test_a_pass_sends_what_is_planned(found: list[Found], name: str) -> None:
    """The rank that sends most, forward and backward.

    Gradients of latents that were gathered go back to the ranks that have them: what was received is sent. The keys of
    an indexer have no gradients.
    """
    for case in cases():
        if case[0] != name:
            continue
        ways = planned(*case)
        for backward in (False, True):
            sent = sum(way.bytes_received if backward and way.exchange.latent else way.bytes_sent for way in ways)
            if backward and isinstance(kind := CASES[name], DSA):
                sent *= 1 - kind.index_head_dim / (kind.kv_lora_rank + kind.qk_rope_head_dim + kind.index_head_dim)
            each = [own["|".join(map(str, case))][backward] for own in found]
            most = {kind: max(own[kind] for own in each) for kind in each[0]}
            assert sum(most.values()) == pytest.approx(sent, rel=1e-12), (
                f"{case} {'backward' if backward else 'forward'}"
            )
            states = [way.way for way in ways if way.exchange.what == STATE]
            assert all(most[{"gather": "gather", "scan": "send"}[way]] for way in states)


def test_latents_go_to_later_ranks_where_heads_cannot_be_shared(found: list[Found]) -> None:
    """The rank that sends most sends as much as in the ring that is planned."""
    for case in cases():
        name, _, layout, tokens = case
        if name not in ODD:
            continue
        kind = CASES[name]
        assert isinstance(kind, MLA)
        parts = 2 if layout == "zigzag" else 1
        most = halo_tokens(COUNT, parts, tokens // COUNT // parts, tokens - 1)
        each = [own["|".join(map(str, case))] for own in found]
        expected = {"gather": 0, "all-to-all": ROWS * 4 * most * (kind.kv_lora_rank + kind.qk_rope_head_dim), "send": 0}
        for backward in (False, True):
            assert {way: max(own[backward][way] for own in each) for way in expected} == expected
        (ring,) = planned(*case)
        assert ring.way == "ring"
        assert ring.bytes_sent == expected["all-to-all"]


@pytest.mark.parametrize("name", ["power", "power p=3", "power, ungated", "linear"])
def test_the_plan_of_the_kernels_has_the_same_bytes(name: str) -> None:
    """ContextParallel.exchanged_bytes is wire.messages times wire.message_bytes: forward and backward, of any rank."""
    kind = CASES[name]
    assert isinstance(kind, (Power, Linear))
    size = (ROWS, kind.kv_heads, spow_dim(kind.head_dim, kind.degree), kind.v_head_dim + int(kind.has_normaliser))
    for exchange, layout, tokens in SETTINGS:
        (way,) = planned(name, exchange, layout, tokens)
        ranges = make_layout((0, tokens), named_ranges(layout, tokens, COUNT))
        nobody: Any = None
        for backward in (False, True):
            wires = [Wire(nobody, rank, ranges, exchange, None) for rank in range(COUNT)]
            message = wires[0].message_bytes(size, kind.gated, torch.float32)
            assert way.bytes_sent == max(wire.messages(backward) for wire in wires) * message
