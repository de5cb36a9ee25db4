"""The FLOPs of a state that tokens leave behind, as torch counts them, are those that a plan counts twice."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from kinds import MIXERS
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from powerplan.mixers.formulas import total
from powerplan.models.mixers import build_mixer
from powerplan.models.mixers.fenwick import log_linear_state
from powerplan.models.mixers.partitions import PartitionedAttention
from powerplan.models.mixers.recurrence import gated_linear_state
from powerplan.models.mixers.scans import grouped_state
from powerplan.models.mixers.slots import slots_left_behind

TOKENS = 24


def drawn(*features: int) -> Tensor:
    return torch.randn(2, TOKENS, *features)


def decays(*features: int) -> Tensor:
    return -torch.rand(2, TOKENS, *features)


def of_partitions(name: str) -> Callable[[], Any]:
    """Return the call for tokens that are projected and routed: neither is a part of it."""
    mixer: Any = MIXERS[name]
    module = build_mixer(mixer, 16, rope=None)
    assert isinstance(module, PartitionedAttention)
    given = module.prepare(drawn(16), drawn(2, 6), drawn(2, 6), drawn(2, 5))
    return partial(module.states_left_behind, *given)


CALLS: dict[str, Callable[[], Callable[[], Any]]] = {
    "gla": lambda: partial(gated_linear_state, drawn(2, 6), drawn(2, 5), decays(2, 6), 8),
    "mamba2": lambda: partial(grouped_state, drawn(1, 5), drawn(2, 6), decays(2)),
    "mamba2, groups, biases": lambda: partial(grouped_state, drawn(3, 5), drawn(6, 2), decays(6)),
    "log_linear": lambda: partial(log_linear_state, drawn(1, 5), drawn(2, 6), decays(2), 37, 9),
    "gsa": lambda: partial(slots_left_behind, drawn(2, 6), drawn(2, 5), decays(2, 3), 8),
    "sse": lambda: of_partitions("sse"),
    "sse, convolution": lambda: of_partitions("sse, convolution"),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_state_alone_takes_what_is_planned(name: str) -> None:
    torch.manual_seed(0)
    call, mixer = CALLS[name](), MIXERS[name]
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == 2 * TOKENS * total(mixer.terms((("state again", mixer.state_again),)))
