"""Tokens before the fragments of ranks, over processes: those of whole tensors, their gradients and their bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from device import ON_GPU
from halos_on_ranks import CASES, all_work
from ranks import run_in
from shared_calls import COUNT, GROUPS

pytestmark = pytest.mark.skipif(
    ON_GPU and torch.cuda.device_count() < COUNT, reason=f"needs a GPU for each of {COUNT} processes"
)

Found = dict[str, Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What each of the processes found: one start of them serves all tests."""
    folder: Path = tmp_path_factory.mktemp("halos")
    run_in(COUNT, all_work, folder, "nccl" if ON_GPU else "gloo")
    return [json.loads((folder / f"found-{rank}.json").read_text(encoding="utf-8")) for rank in range(COUNT)]


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: " ".join(map(str, CASES[number])))
def test_tokens_and_gradients_are_those_of_whole_tensors(found: list[Found], number: int) -> None:
    for rank in GROUPS[CASES[number][0]]:
        assert found[rank]["cases"][str(number)] == []


def test_bytes_are_those_planned_and_independent_of_the_context(found: list[Found]) -> None:
    for rank, own in enumerate(found):
        for row in own["bytes"]:
            assert row["forward"] == row["planned forward"], row
            assert row["backward"] == row["planned backward"], row
        token = 2 * 3 * 4  # rows, features, bytes of a number
        sent = {(row["layout"], row["tokens"]): (row["forward"], row["backward"]) for row in own["bytes"]}
        for length in (41, 410):
            assert sent["contiguous", length] == (4 * token * (rank < 3), 4 * token * (rank > 0))
            # Two fragments a rank; the last rank holds the two in the middle, and needs no wire between them.
            assert sent["zigzag", length] == (4 * token * (1 if rank in (0, 3) else 2),) * 2
        # (7, 20) on rank 0, (0, 7) on rank 1, nothing on rank 2, and (20, 40), (40, 41) on rank 3.
        uneven = {0: (4, 4), 1: (4, 0), 2: (0, 0), 3: (0, 4)}
        assert sent["uneven", 41] == tuple(count * token for count in uneven[rank])


REFUSED = {
    "tokens": "tokens must be an integer of at least 0, and is -1",
    "nothing": "tensors: none are given",
    "dtype": "tensors must have one dtype, and have torch.float32 and torch.float64",
    "rows": "tensors must have as many rows, and have 1 and 2",
    "differ": "context parallelism: the halos of the 4 ranks differ in tokens before: 1 on rank 0, and 2 on rank 3",
    "features": "context parallelism: the halos of the 4 ranks differ in features: [(3,)] on rank 0, and [(2,)] on",
    "gradients": "context parallelism: the halos of the 4 ranks differ in gradients (recorded or not): True on rank 0",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_are_the_same_on_all_ranks(found: list[Found], name: str) -> None:
    for own in found:
        assert own["refusals"][name].startswith(REFUSED[name])


def test_what_one_rank_refuses_all_ranks_hear_of(found: list[Found]) -> None:
    words = "tensors[0] must be [batch, time, ...] with the 10 tokens of rank 3 of 4 by the plan, and has shape [1, 9"
    for rank, own in enumerate(found):
        start = "" if rank == 3 else "context parallelism: rank 3 of 4 failed: "
        assert own["refusals"]["local tokens"].startswith(start + words)
