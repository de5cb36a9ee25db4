"""Power attention over several processes: the numbers of one process, the bytes that are planned, and clear errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attention_on_ranks import all_work
from device import ON_GPU
from ranks import run_in
from shared_calls import COUNT, GROUPS, JOBS

pytestmark = pytest.mark.skipif(
    ON_GPU and torch.cuda.device_count() < COUNT, reason=f"needs a GPU for each of {COUNT} processes"
)

Found = dict[str, Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What each of the processes found: one start of them serves all tests."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    run_in(COUNT, all_work, folder, "nccl" if ON_GPU else "gloo")
    return [json.loads((folder / f"found-{rank}.json").read_text(encoding="utf-8")) for rank in range(COUNT)]


@pytest.mark.parametrize("number", range(len(JOBS)), ids=lambda number: JOBS[number].name)
def test_outputs_states_and_gradients_are_those_of_one_process(found: list[Found], number: int) -> None:
    job = JOBS[number]
    assert found[GROUPS[job.ranks][0]][str(number)] == [{}] * len(job.cases)


def test_an_exchange_in_bfloat16_rounds_states(found: list[Found]) -> None:
    """bfloat16 rounds to 2^-9 of a number. States are sums of some that were rounded, which mostly cancels."""
    errors = found[0]["rounding"]
    for way in ("gather", "scan"):
        assert max(errors[f"{way} None"].values()) < 2.0**-18
        assert 2.0**-14 < max(errors[f"{way} bfloat16"].values()) < 2 * 2.0**-9


def test_bytes_on_the_wire_are_those_planned_whatever_the_length(found: list[Found]) -> None:
    for own in found:
        lengths: dict[str, set[int]] = {}
        for row in own["traffic"]:
            assert row["forward"] == row["planned forward"], row
            assert row["backward"] == row["planned backward"], row
            lengths.setdefault(row["what"], set()).add(row["forward"])
        assert all(len(found) == 1 for found in lengths.values())
        whole, half = (lengths[f"gather contiguous gated=True {wire}"].pop() for wire in ("None", "bfloat16"))
        state = 2 * 2 * 36 * 6  # B G D W
        assert whole == (state + 4) * 4 + state * 4  # and the final state
        assert half == state * 2 + 4 * 4 + state * 4


def test_work_between_start_and_call_overlaps_with_the_exchange_in_both_passes(found: list[Found]) -> None:
    for own in found:
        assert own["order"] == ["sent on", "queries", "received on", "sent back", "queries back", "received back"]


def test_a_dim_of_a_mesh_is_a_group(found: list[Found]) -> None:
    assert [own["mesh"] for own in found] == [[0, 2, 0], [1, 2, 0], [0, 2, 1], [1, 2, 1]]


def test_shards_of_packed_sequences_in_zigzag(found: list[Found]) -> None:
    ranks = [own["shards"] for own in found]
    assert [own["ids"] for own in ranks] == [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]
    assert [own["positions"] for own in ranks] == [[0, 1, 9, 10], [2, 3, 7, 8], [4, 0, 5, 6], [1, 2, 3, 4]]
    assert [own["cu_seqlens"] for own in ranks] == [[0, 2, 4], [0, 2, 4], [0, 1, 2, 4], [0, 2, 4]]
    for own in ranks:
        assert own["shard"] == [[float(16 * row + index) for index in own["ids"]] for row in range(2)]
        assert own["gradient"] == [[float(index in own["ids"]) for index in range(16)]] * 2
        assert own["unshard"]
    text = "ContextParallel(rank 2 of 4, 4 of 16 tokens of 2 packed sequences, exchange='gather')"
    assert ranks[2]["text"] == text


def test_a_compiled_function_breaks_its_graph_at_the_call(found: list[Found]) -> None:
    assert [own["compiled"] for own in found] == [[True, True]] * COUNT


def test_recomputation_makes_the_exchange_again(found: list[Found]) -> None:
    assert [own["checkpoint"] for own in found] == [0.0] * COUNT


REFUSED = {
    "no tokens": "ValueError: give tokens (of a row that is one sequence) or cu_seqlens (of packed sequences): none",
    "both": "ValueError: give tokens (of a row that is one sequence) or cu_seqlens (of packed sequences): both are",
    "tokens": "ValueError: tokens must be an integer of at least 1, and is 0",
    "falls": "ValueError: cu_seqlens must rise, and has 20 after 30 (entry 2)",
    "begins": "ValueError: cu_seqlens must rise from 0, and begins with 1",
    "not integers": "ValueError: cu_seqlens must be at least 2 integers in one dim, and is list",
    "layout": "ValueError: layout must be contiguous, zigzag, or the ranges of each rank, and is 'ring'",
    "layout type": "TypeError: layout must be a name, or for each rank a list of ranges (start, stop) of its tokens",
    "layout ranks": "ValueError: layout must have ranges for each of the 4 ranks, and has them for 3",
    "layout twice": "ValueError: layout: rank 3 has again the tokens 5 to 10",
    "layout hole": "ValueError: layout: no rank has the tokens 10 to 12",
    "layout end": "ValueError: layout: no rank has the tokens 30 to 40",
    "layout range": "ValueError: layout: rank 0 has the tokens 0 to 50, and there are 0 to 40",
    "exchange": "ValueError: exchange must be auto, gather, scan, and is 'ring'",
    "exchange dtype": "ValueError: exchange_dtype must be None or torch.bfloat16, and is torch.float16",
    "group": "TypeError: group must be a ProcessGroup, a DeviceMesh or None, and is list",
    "cp": "TypeError: cp must be a ContextParallel, or what its start returned, and is ProcessGroup",
    "cu_seqlens": "ValueError: cu_seqlens belongs to the plan where cp is given: ContextParallel(cu_seqlens=...)",
    "plans differ": "ValueError: context parallelism: the plans of the 4 ranks differ in tokens: 40 on rank 0, and",
    "layouts differ": "ValueError: context parallelism: the plans of the 4 ranks differ in layout: (((0, 10),), ",
    "head dims": "ValueError: context parallelism: the calls of the 4 ranks differ in head dims: (4, 4) on rank 0",
    "rows": "ValueError: context parallelism: the calls of the 4 ranks differ in rows: 1 on rank 0, and 2 on rank 1",
    "gates": "ValueError: context parallelism: the calls of the 4 ranks differ in log_g (given or not): False",
    "gradients": "ValueError: context parallelism: the calls of the 4 ranks differ in gradients (recorded or not):",
    "return_state": "ValueError: context parallelism: the queries of the 4 ranks differ in return_state: True",
    "degree": "ValueError: p=3 gives weights of both signs",
    "scale": "ValueError: the size of scale must be between",
    "packed rows": "ValueError: the plan packs sequences in one batch row, and k has 2 rows",
    "shard": "ValueError: x must have 40 tokens in dim 1, and has shape [1, 10, 1, 4]",
    "unshard": "ValueError: x must have 10 tokens in dim 1, and has shape [1, 9, 1, 4]",
    "used": "ValueError: cp was used before: start an exchange for each call",
    "check": "TypeError: check must be True or False, and is 1",
    "dim": "ValueError: x must have 40 tokens in dim 5, and has shape [1, 10, 1, 4]",
    "halo": "ValueError: tokens must be an integer of at least 0, and is 2.5",
    "features": "ValueError: features must be an integer of at least 1, and is 0",
    "planned head dim": "ValueError: head_dim must be an integer of at least 1, and is -4",
    "planned degree": "ValueError: p must be 1, 2, 3 or 4, and is 9",
    "another": "ValueError: cp was started with another k than that of this call: give it the same",
    "forward mode": "ValueError: context parallelism has gradients by torch.autograd alone",
    "torch.func": "ValueError: context parallelism has gradients by torch.autograd alone",
    "a whole graph": "Unsupported: Skip calling `torch.compiler.disable()`d function",
}

REFUSED_BY_ONE = {
    "one has no plan": (1, "layout must be contiguous, zigzag, or the ranges of each rank, and is 'ring'"),
    "local tokens": (1, "k must be [batch, time, ...] with the 10 tokens of rank 1 of 4 by the plan, and has shape ["),
    "query tokens": (3, "q must be [batch, time, ...] with the 10 tokens of rank 3 of 4 by the plan, and has shape ["),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_the_same_on_all_ranks(found: list[Found], name: str) -> None:
    for own in found:
        assert own["refusals"][name].startswith(REFUSED[name])


@pytest.mark.parametrize("name", REFUSED_BY_ONE)
def test_what_one_rank_refuses_all_ranks_hear_of(found: list[Found], name: str) -> None:
    culprit, words = REFUSED_BY_ONE[name]
    for rank, own in enumerate(found):
        start = "" if rank == culprit else f"context parallelism: rank {culprit} of 4 failed: "
        assert own["refusals"][name].startswith(f"ValueError: {start}{words}")


def test_every_refusal_is_expected(found: list[Found]) -> None:
    assert found[0]["refusals"].keys() == REFUSED.keys() | REFUSED_BY_ONE.keys()


WAITED = (
    "RuntimeError: context parallelism: rank {} of {} waited in vain for the others. A rank has failed (its "
    "own message says why), made another call than this one, or took longer than the timeout of init_process_group. "
    "torch.distributed says: "
)


@pytest.mark.skipif(ON_GPU, reason="NCCL ends a process that waits in vain by its watchdog")
def test_a_rank_that_never_calls_is_an_error_and_no_hang(found: list[Found]) -> None:
    for rank, own in enumerate(found):
        for backward, said in enumerate(own["failure"]):
            assert said == "silent" if rank % 2 == backward else said.startswith(WAITED.format(rank % 2, 2))


@pytest.mark.skipif(ON_GPU, reason="NCCL ends a process that waits in vain by its watchdog")
def test_a_rank_that_dies_is_an_error_on_all_others(found: list[Found]) -> None:
    for rank in range(COUNT - 1):
        assert all(said.startswith(WAITED.format(rank, COUNT)) for said in found[rank]["death"])


def test_without_a_process_group_it_says_what_to_do() -> None:
    from powerplan.kernels import ContextParallel

    with pytest.raises(RuntimeError, match="needs a process group: start the script with torchrun, and call torch"):
        ContextParallel(tokens=4)


@pytest.mark.parametrize(
    "given", [np.array([0, 3, 5]), [np.int64(0), np.int64(3), np.int64(5)], torch.tensor([0, 3, 5])]
)
def test_a_plan_takes_integers_of_numpy(given: Any) -> None:
    from powerplan.kernels.distributed.plan import _bounds

    for bounds in (_bounds(None, given), _bounds(np.int64(5), None)):
        assert set(map(type, bounds)) == {int}
    assert _bounds(None, given) == (0, 3, 5)
    for wrong in (np.float64(5), np.True_):
        with pytest.raises(ValueError, match="tokens must be an integer of at least 1"):
            _bounds(wrong, None)
