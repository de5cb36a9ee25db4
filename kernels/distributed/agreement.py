"""Ranks compare what they were given, so that one that differs is an error on all of them and not a hang."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist


class Agreement:
    """What the ranks of a group have agreed on so far. With `check` off they never ask."""

    def __init__(self, group: dist.ProcessGroup, rank: int, ranks: int, check: bool) -> None:
        self.group, self.rank, self.ranks, self.check = group, rank, ranks, check
        self._agreed: dict[str, set[str]] = defaultdict(set)

    def on(self, what: str, values: dict[str, Any]) -> None:
        """Raise ValueError on every rank where ranks have different values, or one has failed (`of_errors`).

        Each set of values is compared once. Every rank calls this with a new set at the same time.

        Args:
            what: What the values belong to, in the plural, as the message names it.
            values: Their names, and their values on this rank.
        """
        if not self.check or str(values) in self._agreed[what]:
            return
        each, errors = self._gathered(values, None)
        for rank, error in enumerate(errors):
            if error is not None:
                raise ValueError(f"context parallelism: rank {rank} of {self.ranks} failed: {error}")
        for name in values:
            for rank, other in enumerate(each):
                if other[name] != each[0][name]:
                    raise ValueError(
                        f"context parallelism: {what} of the {self.ranks} ranks differ in {name}: "
                        f"{_short(each[0][name])} on rank 0, and {_short(other[name])} on rank {rank}"
                    )
        self._agreed[what].add(str(values))

    @contextmanager
    def of_errors(self, what: str) -> Iterator[None]:
        """Tell the other ranks of an error in this block, in place of the comparison of `what` that follows it.

        Only before the first of these: later ones are made by those ranks alone whose values are new.
        """
        try:
            yield
        except (ValueError, TypeError) as error:
            if self.check and not self._agreed[what]:
                self._gathered({}, str(error))
            raise

    def _gathered(self, values: dict[str, Any], error: str | None) -> tuple[list[dict[str, Any]], list[str | None]]:
        said: list[Any] = [None] * self.ranks
        dist.all_gather_object(said, (values, error), group=self.group)
        return [values for values, _ in said], [error for _, error in said]


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
