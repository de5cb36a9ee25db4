"""Pieces of queries: what they have in common, and that no tensor of all queries and keys exists."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from powerplan.mixers import DSA, NSA, Forgetting, MoBA
from powerplan.mixers.base import Mixer
from powerplan.models.cache import Slot
from powerplan.models.mixers import build_mixer, pieces
from powerplan.rope import Rope


class Largest(TorchDispatchMode):
    """Has the number of elements of the largest tensor that an operator made, views aside."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(value.alias_info is not None for value in func._schema.returns):
            return out
        self.numbers = max([self.numbers, *(x.numel() for x in tree_leaves(out) if isinstance(x, Tensor))])
        return out


HEADS: dict[str, Any] = {"heads": 2, "kv_heads": 1, "head_dim": 8}
LONG: dict[str, Mixer] = {
    "forgetting": Forgetting(**HEADS),
    "forgetting, window": Forgetting(**HEADS, window=6000),
    "nsa": NSA(**HEADS, window=64),
    "dsa": DSA(
        heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
        index_heads=2,
        index_head_dim=4,
        top_k=1024,
    ),
}


@pytest.mark.parametrize("kind", LONG)
def test_no_tensor_has_all_queries_and_keys(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 k tokens, forward and backward: 2^28 pairs a head, of which a tensor has a share of 1/64 of one head's."""
    tokens = 2**14
    monkeypatch.setattr(pieces, "MAX_NUMBERS", 2**22)
    layer = build_mixer(LONG[kind], 16, rope=Rope(), device="meta")
    x = torch.empty(1, tokens, 16, device="meta", requires_grad=True)
    with Largest() as largest:
        layer(x).sum().backward()
    assert largest.numbers <= 2**22 <= tokens**2 / 64


@pytest.mark.parametrize("kind", ["nsa", "dsa", "moba"])
def test_one_more_token_copies_no_cache(kind: str) -> None:
    """Two sequences of 2,000 tokens in buffers with free space: what a token makes is less than a fifth of its keys."""
    blocks = {"compress_size": 32, "compress_stride": 32, "select_size": 16, "select_count": 3, "window": 64}
    kinds: dict[str, Mixer] = {"nsa": NSA(**HEADS, **blocks), "moba": MoBA(**HEADS, block_size=50, top_k=3)}
    kinds["dsa"] = msgspec.structs.replace(LONG["dsa"], top_k=100, index_heads=1, kv_lora_rank=40)
    layer, slot = build_mixer(kinds[kind], 16, rope=Rope()), Slot()
    with torch.no_grad():
        layer(torch.randn(2, 2000, 16), slot)
        layer(torch.randn(2, 1, 16), slot)
        with Largest() as largest:
            layer(torch.randn(2, 1, 16), slot)
    assert 5 * largest.numbers < slot.state[0].entries.numel()


@given(st.integers(1, 3000), st.integers(0, 2**26), st.none() | st.integers(1, 500))
def test_pieces_are_all_queries_in_order(queries: int, numbers: int, longest: int | None) -> None:
    found = pieces.pieces(queries, numbers, longest)
    assert [at for start, stop in found for at in range(start, stop)] == list(range(queries))
    size = max(stop - start for start, stop in found)
    assert size <= (longest or pieces.MAX_QUERIES)
    assert size == 1 or size * numbers <= pieces.MAX_NUMBERS


@given(st.lists(st.sampled_from([-1.0, 0.0, 2.0, 3.0]), min_size=1, max_size=40), st.integers(1, 50))
def test_of_equal_scores_the_first_are_largest(scores: list[float], count: int) -> None:
    expected = sorted(range(len(scores)), key=lambda at: (-scores[at], at))[:count]
    assert pieces.largest(torch.tensor(scores), count).tolist() == expected


@pytest.mark.parametrize("groups", [(), (3,)])
def test_rows_are_gathered_from_their_own_part(groups: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, *groups, 7, 5, dtype=torch.float64, requires_grad=True)
    index = torch.randint(7, (2, *groups, 4, 6))
    found = pieces.gathered(x, index)
    expected = torch.stack([x.flatten(0, -3)[at][rows] for at, rows in enumerate(index.flatten(0, -3))])
    torch.testing.assert_close(found.flatten(0, -4), expected)
    grad = torch.randn_like(found)
    own, theirs = (torch.autograd.grad(out, x, grad.view_as(out)) for out in (found, expected))
    torch.testing.assert_close(own, theirs)


def test_queries_that_see_nothing_give_0_and_no_nan() -> None:
    q, k, v = (torch.randn(2, 5, 4, requires_grad=True) for _ in range(3))
    seen = torch.ones(5, 5, dtype=torch.bool).tril(-1)
    out, weights = pieces.attend(q, k, v, seen, 0.5)
    assert not out[:, 0].any()
    torch.testing.assert_close(weights[:, 1:].sum(-1), torch.ones(2, 4))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), (q, k, v)))


def test_what_is_computed_again_is_not_kept() -> None:
    q, k, v = (torch.randn(50, 4, requires_grad=True) for _ in range(3))
    run = partial(pieces.attend, seen=torch.ones(50, 50, dtype=torch.bool), scale=0.5)
    kept: list[int] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        run(q, k, v)[0].sum()
        assert max(kept) == 50 * 50
        kept.clear()
        again = pieces.recomputed(run, q, k, v)[0]
    assert max(kept, default=0) < 50 * 50
    torch.testing.assert_close(
        torch.autograd.grad(again.sum(), (q, k, v)), torch.autograd.grad(run(q, k, v)[0].sum(), (q, k, v))
    )
    with torch.no_grad():
        assert not pieces.recomputed(run, q, k, v)[0].requires_grad
