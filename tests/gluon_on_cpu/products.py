"""Asynchronous products of an emulated Hopper GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gluon_on_cpu.memory import Shared
from gluon_on_cpu.program import Made, Pending, running, site, written


@dataclass(eq=False)
class Product:
    left: Any
    right: Shared
    start: Any
    result: Pending
    line: int
    path: tuple[tuple[object, int], ...]
    made: Made | None
    remade: bool = False

    def compute(self, double: bool) -> None:
        # Float64 stays: rounding every product to float32 would be the error that it is to avoid.
        kind = torch.float64 if double else torch.float32
        left = self.left.load() if isinstance(self.left, Shared) else self.left
        found = left.to(kind) @ self.right.load().to(kind)
        if self.start is not None:
            start = self.start.value if isinstance(self.start, Pending) else self.start
            found = found + start
        self.result.value = found


def product(
    a: Any, b: Any, acc: Any, *, use_acc: Any = True, precision: Any = None, is_async: Any = False, **_: Any
) -> Any:
    here = running()
    left, right = list(a.shape), b.shape
    if len(left) != 2 or left[1] != right[0] or list(acc.shape) != [left[0], right[1]]:
        raise ValueError(f"product of {left} and {right} added to {list(acc.shape)}")
    if a.dtype != b.dtype:
        raise TypeError(f"product of {a.dtype} and {b.dtype}")
    if not isinstance(b, Shared):
        raise TypeError("the right operand of a product lies in shared memory")
    for part in (a, b):
        if isinstance(part, Shared):
            part.check_visible("product")
    place, line = site()
    made = None
    if isinstance(a, Tensor):
        made = getattr(a, "made", None) or Made(place, tuple(here.loops))
        if made.site == place:
            written(place, a)
    result = Pending((left[0], right[1]))
    start = (acc.use() if isinstance(acc, Pending) else acc) if use_acc else None
    if isinstance(acc, Pending):
        acc.taken = True
    here.products.append(Product(a, b, start, result, line, tuple(here.loops), made))
    return result if is_async else wait_for_products(0, [result])


def wait_for_products(num_outstanding: Any = 0, deps: Sequence[Any] | None = None) -> Any:
    if deps is None:
        raise ValueError("warpgroup_mma_wait deps must be given")
    here = running()
    while len(here.products) > int(num_outstanding):
        x = here.products[0]
        if x.remade and not any(dep is x.left for dep in deps):
            raise RuntimeError(
                f"the left operand of the product in line {x.line} is made again before this wait, whose deps do not "
                "name it: nothing keeps its registers until then"
            )
        # It reads its operands: of products, it is the one that may.
        here.products.pop(0)
        x.compute(here.double)
    found = tuple(x.use().value if isinstance(x, Pending) and x.value is not None else x for x in deps)
    return found[0] if len(found) == 1 else found
