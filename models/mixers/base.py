"""What every mixer module does: a whole sequence at once, or the next tokens after those in a slot of a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from powerplan.errors import InputError
from powerplan.models.cache import Slot


class SequenceMixer(nn.Module):
    """[B, T, m] -> [B, T, m]. A subclass says in `run` how tokens are mixed, and what is kept of them."""

    def forward(self, x: Tensor, slot: Slot | None = None) -> Tensor:
        """Mix the tokens of x; with a slot, they follow those that it remembers, and it remembers them too.

        Raises InputError where activation checkpointing calls again with a slot: it holds these tokens by then.
        """
        if slot is None:
            return self.run(x, 0, None, keep=False)[0]
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise InputError("a cache cannot be filled again in a backward pass: checkpoint layers without a cache")
        out, slot.state = self.run(x, slot.tokens, slot.state, keep=True)
        slot.tokens += x.shape[1]
        return out

    def run(self, x: Tensor, seen: int, state: Any, *, keep: bool) -> tuple[Tensor, Any]:
        """Return the output [B, T, m], and the new state where `keep` is set.

        seen: tokens before x, of which `state` (None where there are none) is what an earlier call kept.
        """
        raise NotImplementedError
