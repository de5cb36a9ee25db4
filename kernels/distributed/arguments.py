"""What arguments a call on ranks takes beside what all calls take (checks.py)."""

from __future__ import annotations

from torch import Tensor

from powerplan.kernels import api, checks, eager
from powerplan.kernels.distributed.plan import ContextParallel
from powerplan.kernels.state import PowerState


def check_call(
    plan: ContextParallel,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    p: int,
    chunk_size: int | None,
    normalize: bool,
    initial_state: PowerState | None,
    impl: str,
) -> None:
    """Check the arguments of this rank, as far as they are those of its states."""
    checks.check_tensor("k", k)
    checks.check_tensor("v", v)
    checks.check_tensor("log_g", log_g, or_none=True)
    checks.check_settings(p, None, chunk_size)
    checks.check_flag("normalize", normalize)
    checks.check_impl(impl, api.IMPLEMENTATIONS)
    check_tokens(plan, k=k, v=v)
    some_k, some_v = _with_a_token(k, v)
    checks.check_keys_and_values(some_k, some_v, p)
    checks.check_normalizer(p, normalize)
    if log_g is not None:
        check_tokens(plan, log_g=log_g)
        checks.check_gate(_with_a_token(log_g)[0], some_k.shape[:3], k.device)
    if initial_state is not None:
        sequences = plan.layout.sequences if plan.packed else k.shape[0]
        checks.check_state(initial_state, k, k, v, p, sequences, normalize)


def check_queries(
    plan: ContextParallel, q: Tensor, k: Tensor, v: Tensor, p: int, scale: float | None, normalize: bool
) -> None:
    """Check the arguments that only the attention to states takes; those of `check_call` are fine."""
    checks.check_tensor("q", q)
    check_tokens(plan, q=q)
    some = _with_a_token(q, k, v)
    sizes = (some[0].shape, some[1].shape, some[2].shape)
    checks.check_sizes(*sizes, (q.dtype, k.dtype, v.dtype), (q.device, k.device, v.device), p, normalize)
    checks.check_settings(p, scale, None)
    checks.check_scale(scale, p, q.dtype)


def check_derivatives(*tensors: Tensor | None) -> None:
    """Refuse what an exchange has no derivatives for: tensors of transforms of torch.func cannot be sent at all."""
    if eager.has_tangent(*tensors) or eager.is_differentiated_by_func(*tensors):
        raise ValueError("context parallelism has gradients by torch.autograd alone: no forward mode, no torch.func")


def check_tokens(plan: ContextParallel, **tensors: Tensor | None) -> None:
    """Check that tensors [B, T, ...] have this rank's tokens, and one row where sequences are packed."""
    for name, x in tensors.items():
        if x is None:
            continue
        if x.ndim < 2 or x.shape[1] != plan.local_tokens:
            raise ValueError(
                f"{name} must be [batch, time, ...] with the {plan.local_tokens} tokens of rank {plan.rank} of "
                f"{plan.ranks} by the plan, and has shape {list(x.shape)}"
            )
        if plan.packed and x.shape[0] != 1:
            raise ValueError(f"the plan packs sequences in one batch row, and {name} has {x.shape[0]} rows")


def _with_a_token(*tensors: Tensor) -> list[Tensor]:
    """Return the tensors; those without tokens with one, of 0, for checks that know of no rank without tokens."""
    return [x if x.shape[1] else x.new_zeros(x.shape[0], 1, *x.shape[2:]) for x in tensors]
