"""Integers of any type are integers to the library: numpy's, torch's, any with `__index__`; a bool is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import powerplan
from powerplan.answers.base import Answer
from powerplan.errors import InputError
from powerplan.models import build_layer
from powerplan.units import integer_of


class Own:
    """An integer of a type that nothing knows."""

    def __init__(self, value: int) -> None:
        self.value = value

    def __index__(self) -> int:
        return self.value


TYPES: list[Callable[[int], Any]] = [np.int64, np.uint32, lambda value: np.array(value), torch.tensor, Own]

DEVICES = {"gpu": "h100-sxm", "devices": 8}
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("wsfr", {"context": 65_536}),
    ("compare", {"model": ["gpt2-small"], "mixer": "power:p=2", "context": 65_536}),
    ("decode", {"context": 65_536, "batch": 4, "cache_budget": 4096, "prefill_chunk": 512, **DEVICES}),
    ("decode", {"context": 65_536, "checkpoint_every": 4096, "page": 32, "engine": "vllm"}),
    ("budget", {"context": 65_536, "tokens": 10**9, "batch_tokens": 2**19, **DEVICES}),
    ("budget", {"context": 65_536, "gpu_hours": 1000, **DEVICES}),
    ("train", {"context": 65_536, "tokens": 10**9, "batch_tokens": 2**20, "micro_batch": 1, "zero": 2, **DEVICES}),
    ("train", {"context": 65_536, "tokens": 10**9, "price": 2, "node_devices": 4, "network_gbs": 50, **DEVICES}),
    ("recommend", {"context": 65_536, "top": 3, "max_state": 2**29, "flops": 10**18, "target": 2}),
    ("recommend", {"context": 65_536, "top": 3, "max_days": 30, "tokens": 10**9, **DEVICES}),
    ("solve", {"unknown": "window", "context": 65_536, "target": 2}),
    ("degrees", {"context": 65_536, "p": 2, "tile": 4}),
    ("flops_per_step", {"context": 65_536, "sequences": 3}),
]


def asked(name: str, arguments: dict[str, Any]) -> Any:
    """Return what a function of the library answers, as JSON where it is an answer."""
    arguments = dict(arguments)
    answer = getattr(powerplan, name)(arguments.pop("model", "gpt2-small"), **arguments)
    return answer.to_json() if isinstance(answer, Answer) else answer


@pytest.mark.parametrize(("name", "arguments"), CALLS)
def test_an_integer_of_any_type_is_that_integer(name: str, arguments: dict[str, Any]) -> None:
    expected = asked(name, arguments)
    for make in TYPES:
        given = {
            key: make(value) if isinstance(value, int) and (make is not np.uint32 or value < 2**32) else value
            for key, value in arguments.items()
        }
        assert asked(name, given) == expected


@pytest.mark.parametrize(("name", "arguments"), CALLS)
def test_a_bool_is_none(name: str, arguments: dict[str, Any]) -> None:
    for key in (key for key, value in arguments.items() if isinstance(value, int)):
        for wrong in (True, np.True_, torch.tensor(True)):
            with pytest.raises(InputError, match=f"^{key}: .* is (not|out of range|no)"):
                asked(name, arguments | {key: wrong})


def test_arrays_are_lists() -> None:
    powers = 2 ** np.arange(10, 14)
    for contexts in (powers, torch.from_numpy(powers), tuple(powers), (int(power) for power in powers)):
        rows = powerplan.wsfr("gpt2-small", contexts).rows
        assert [row.context for row in rows] == [1024, 2048, 4096, 8192]
        assert all(type(row.context) is int for row in rows)
    expected = powerplan.decode("gpt2-small", [1024, 2048], batch=[1, 8]).to_json()
    assert powerplan.decode("gpt2-small", powers[:2], batch=np.array([1, 8])).to_json() == expected
    several = powerplan.degrees("gpt2-small", p=np.array([1, 2])).degrees
    assert [degree.p for degree in several] == [1, 2]
    documents = {np.int64(600): np.int64(2), 100: 1}
    assert (
        powerplan.wsfr("gpt2-small", 1024, lengths=documents).lengths
        == powerplan.wsfr("gpt2-small", 1024, lengths=np.array([600, 100, 600])).lengths
    )


@pytest.mark.parametrize(
    ("contexts", "problem"),
    [
        (np.array([1.5]), r"context: 1.5 is not a context; write tokens, as 65536 or '64k'"),
        (np.array([[1, 2]]), r"context: \[1, 2\] is not a context; .*"),
        (np.array([], dtype=int), r"context: is empty; .*"),
        (np.array([True]), r"context: true is not a context; .*"),
        (b"64k", r"context: b'64k' is not a context; .*"),
        (np.int64(0), r"context: a context is 1 to 1,125,899,906,842,624 tokens, and is 0"),
    ],
)
def test_what_is_no_context(contexts: Any, problem: str) -> None:
    with pytest.raises(InputError, match=f"^{problem}$"):
        powerplan.wsfr("gpt2-small", contexts)


@pytest.mark.parametrize(
    ("name", "arguments", "problem"),
    [
        ("decode", {"batch": None}, "batch: 'None' is not an integer; .*"),
        ("decode", {"batch": [1, 2.5]}, "batch: '2.5' is not an integer; .*"),
        ("decode", {"devices": 10**5000}, "devices: 'a number of thousands of digits' is not an integer; .*"),
        ("degrees", {"p": [True]}, "p: 'True' is not an integer; .*"),
        ("recommend", {"top": 10**90}, "top: 10+... is out of range; .*"),
    ],
)
def test_what_is_no_integer(name: str, arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=f"^{problem}$"):
        asked(name, arguments)


def test_counts_of_a_model_take_them() -> None:
    accounting = powerplan.Accounting(powerplan.load_model("gpt2-small").spec)
    assert accounting.row(np.int64(65_536)) == accounting.row("64k")
    assert accounting.wsfr(torch.tensor(1024)) == accounting.wsfr(1024)
    assert powerplan.tpow_dim(np.int64(128), np.int64(16)) == 128**16, "beyond 64 bits"
    assert powerplan.tiled_spow_dim(np.int64(256), np.int64(16), np.int64(64)) == powerplan.tiled_spow_dim(256, 16, 64)
    assert build_layer(accounting.spec, np.int64(0)).mixer is not None
    with pytest.raises(InputError, match="layer must be a Layer or the position of one, and is true"):
        build_layer(accounting.spec, True)


@pytest.mark.parametrize("value", [1.0, "1", None, [1], np.float64(1), np.array([1, 2]), torch.tensor(1.0), object()])
def test_nothing_else_is_an_integer(value: Any) -> None:
    assert integer_of(value) is None
