"""Ranks compare what they were given, so that one that differs is an error on all of them and not a hang."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist

Said = tuple[str, dict[str, Any], str | None]
"""What a rank says to the others: what it is about, the values, and an error or None."""


@contextmanager
def explained(rank: int, ranks: int) -> Iterator[None]:
    """Say what a failed collective means: most often another rank has failed, and this one has waited for it.

    rank, ranks: this rank in the group, and how many that has.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # torch.distributed's own errors are RuntimeErrors, too.
        first = str(error).strip().split("\n")[0]
        raise RuntimeError(
            f"context parallelism: rank {rank} of {ranks} waited in vain for the others. "
            "A rank has failed (its own message says why), made another call than this one, or took longer than the "
            f"timeout of init_process_group. torch.distributed says: {first}"
        ) from error


class Agreement:
    """What the ranks of a group have agreed on so far. With `check` off they never ask."""

    def __init__(self, group: dist.ProcessGroup, rank: int, ranks: int, check: bool) -> None:
        self.group, self.rank, self.ranks, self.check = group, rank, ranks, check
        self._agreed: dict[str, set[str]] = defaultdict(set)

    def on(self, what: str, values: dict[str, Any]) -> None:
        """Raise ValueError on every rank where ranks have different values, or one has failed (`of_errors`).

        Each set of values is compared once. Every rank calls this with a new set at the same time.

        Args:
            what: What the values belong to, in the plural, as the message names it. Ranks that come to different ones
                at the same time hear of that.
            values: Their names, which are the same each time for the same `what`, and their values on this rank.
        """
        if not self.check or str(values) in self._agreed[what]:
            return
        each = self._gathered((what, values, None))
        for rank, (_, _, error) in enumerate(each):
            if error is not None:
                raise ValueError(f"context parallelism: rank {rank} of {self.ranks} failed: {error}")
        for rank, (other, _, _) in enumerate(each):
            if other != each[0][0]:
                raise ValueError(
                    f"context parallelism: the {self.ranks} ranks make different calls: they compare {each[0][0]} on "
                    f"rank 0, and {other} on rank {rank}"
                )
        for name in values:
            first = each[0][1][name]
            for rank, (_, others, _) in enumerate(each):
                if others[name] != first:
                    raise ValueError(
                        f"context parallelism: {what} of the {self.ranks} ranks differ in {name}: "
                        f"{_short(first)} on rank 0, and {_short(others[name])} on rank {rank}"
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
                with suppress(RuntimeError):  # Another rank has failed, too. Its message is not this one's.
                    self._gathered((what, {}, str(error)))
            raise

    def _gathered(self, own: Said) -> list[Said]:
        said: list[Any] = [None] * self.ranks
        with explained(self.rank, self.ranks):
            dist.all_gather_object(said, own, group=self.group)
        return said


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
