"""What every mixer module does: process a whole sequence, or the next tokens after those in a slot of a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from powerplan.errors import InputError
from powerplan.kernels.api import IMPLEMENTATIONS
from powerplan.kernels.checks import check_impl, check_settings
from powerplan.models.cache import Slot

if TYPE_CHECKING:
    from powerplan.kernels import ContextParallel


class SequenceMixer(nn.Module):
    """[B, T, m] -> [B, T, m]. A subclass defines `run`: how tokens are mixed, and what state is kept of them."""

    def forward(self, x: Tensor, slot: Slot | None = None, cp: ContextParallel | None = None, **more: Any) -> Any:
        """Mix the tokens of x [B, T, m]. With a slot, they follow the tokens in it and are added to it.

        With a plan, x has this rank's tokens of sequences that lie on several ranks. A slot, which must be empty then,
        holds all their tokens afterwards, on every rank. Raises InputError where the mixer cannot do that, and where
        activation checkpointing calls again with a slot, which holds these tokens by then.
        more: what `run` and `run_shared` of this kind take besides.
        """
        if slot is None:
            if cp is not None:
                return self.run_shared(x, cp, return_state=False, **more)[0]
            return self.run(x, 0, None, return_state=False, **more)[0]
        if not torch.compiler.is_compiling() and _in_backward_pass():
            raise InputError("a cache cannot be filled again in a backward pass: checkpoint layers without a cache")
        if cp is None:
            out, slot.state = self.run(x, slot.tokens, slot.state, return_state=True, **more)
            slot.tokens += x.shape[1]
            return out
        if slot.tokens:
            raise InputError(
                f"cp: the cache must be empty, and has {slot.tokens:,} tokens: what follows them runs without cp"
            )
        if cp.packed:
            raise InputError("cp: a cache takes no packed sequences: plan with tokens")
        out, slot.state = self.run_shared(x, cp, return_state=True, **more)
        slot.tokens = cp.layout.tokens
        return out

    def run(self, x: Tensor, past_tokens: int, state: Any, *, return_state: bool) -> tuple[Tensor, Any]:
        """Return the output [B, T, m], and the state after these tokens (or anything, if not `return_state`).

        past_tokens: how many tokens came before x. state: what an earlier call returned for them; None if there are
        none.
        """
        raise NotImplementedError

    def run_shared(self, x: Tensor, cp: ContextParallel, *, return_state: bool) -> tuple[Tensor, Any]:
        """Return the output [B, t, m] of this rank's tokens x [B, t, m] of sequences that lie on several ranks, and the
        state after all tokens of all ranks (or anything, if not `return_state`): what `run` would return for them, the
        same on every rank.
        """
        raise not_shared(self)


def not_shared(module: nn.Module) -> InputError:
    """Return the error of a mixer that does not run over several ranks."""
    return InputError(
        f"cp: {type(module).__name__} does not run over several ranks: it does not say what they exchange (run_shared)"
    )


def check_kernel_settings(impl: str, chunk_size: int | None = None, p: int = 1) -> None:
    """Raise InputError for settings that `power_attention` would refuse when the module runs."""
    try:
        check_impl(impl, IMPLEMENTATIONS)
        check_settings(p, None, chunk_size)
    except ValueError as error:
        raise InputError(str(error)) from None


def check_plan(cp: object) -> None:
    """Raise InputError unless cp is a ContextParallel, or None. What `ContextParallel.start` returns is of one call."""
    from powerplan.kernels import ContextParallel

    if cp is not None and not isinstance(cp, ContextParallel):
        raise InputError(f"cp must be a ContextParallel or None, and is {type(cp).__name__}")


def _in_backward_pass() -> bool:
    """Return whether autograd is running a backward pass. torch 2.13 has no public function that tells."""
    return bool(torch._C._current_graph_task_id() != -1)
