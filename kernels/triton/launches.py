"""The tensors of one call, flattened to tokens, and the kernels over blocks of its tokens."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from powerplan.kernels.call import Inputs
from powerplan.kernels.triton.config import Blocks
from powerplan.kernels.triton.gates import grad_log_g_kernel
from powerplan.kernels.triton.keys import keys_kernel
from powerplan.kernels.triton.launching import launch
from powerplan.kernels.triton.layout import power_of_two, step_count, step_rows, step_table
from powerplan.kernels.triton.output import output_kernel
from powerplan.kernels.triton.queries import queries_kernel
from powerplan.kernels.triton.shapes import LaunchShape, chunk_table, dense_chunk_table, tokens_first
from powerplan.kernels.triton.tuning import tuned

StatePair = tuple[Tensor, Tensor]
"""States [..., rows, columns], and their normalisers, which are a placeholder where there are none (LaunchShape)."""


class NormGrads(NamedTuple):
    """What the gradient of the output gives for the sums that it is the quotient of.

    inverse_norm: [tokens, H], 1 / norm; a placeholder without a normaliser, and where the kernels of hopper/ run.
    grad_norm: [tokens, H], the gradient of norm; likewise.
    y: [tokens, H, V], the gradient of the weighted sums where the kernels of hopper/ run, else that of the output.
    """

    inverse_norm: Tensor
    grad_norm: Tensor
    y: Tensor


@lru_cache(maxsize=16)
def _placeholder(device: torch.device) -> Tensor:
    """Return what stands where a kernel takes a tensor that a call has not got. It is neither read nor written."""
    return torch.empty(1, dtype=torch.float32, device=device)


class Launches:
    """The kernels over one call's tensors, which lie flattened to tokens.

    Attributes:
        log_g_cumsum: [tokens, G, 2], sums of gates within chunks, where there are any. `prepare` writes them, before
            anything else.
    """

    def __init__(self, shape: LaunchShape, inputs: Inputs) -> None:
        self.shape = shape
        self.q, self.k, self.v = tokens_first(inputs.q), tokens_first(inputs.k), tokens_first(inputs.v)
        self.device = inputs.q.device
        self.dense = inputs.cu_seqlens is None
        call, slots = shape.call, shape.chunk_slots
        if inputs.cu_seqlens is None:
            self.chunk_table = dense_chunk_table(call.batch, call.tokens, call.chunk_size, slots, self.device)
        else:
            self.chunk_table = chunk_table(inputs.cu_seqlens, call.chunk_size, slots)
        self.placeholder = _placeholder(self.device)
        self.gated = inputs.log_g is not None
        self.log_g = self.log_g_cumsum = self.placeholder
        if inputs.log_g is not None:
            self.log_g = inputs.log_g.flatten(0, 1).contiguous()
            self.log_g_cumsum = self.float((*self.log_g.shape, 2), True)
        self.step_table = step_table(shape.phi_width, call.p, shape.scan_steps, self.device)
        self.power_scale = call.scale**call.p

    def float(self, size: tuple[int, ...], wanted: bool) -> Tensor:
        """Return a new float32 tensor, or the placeholder where it is not wanted."""
        return torch.empty(size, dtype=torch.float32, device=self.device) if wanted else self.placeholder

    def no_carry(self) -> Tensor:
        """Return what stands for shares of later chunks where there are none, [slots, G, 1]; zeros."""
        size = (self.shape.chunk_slots, self.shape.call.kv_heads, 1)
        return torch.zeros(size, dtype=torch.float32, device=self.device) if self.gated else self.placeholder

    def grad_log_g(self, q_dot_dq: Tensor, k_dot_dk: Tensor, grad_gate_carry: Tensor) -> Tensor:
        """Return dL/dlog_g [tokens, G], in log_g's dtype, from what `gradients` and `scan` returned."""
        call = self.shape.call
        grad_log_g = torch.empty_like(self.log_g)
        parts = grad_gate_carry.shape[2]
        arguments = {
            "p_q_dot_dq": q_dot_dq,
            "p_k_dot_dk": k_dot_dk,
            "p_grad_gate_carry": grad_gate_carry,
            "p_log_g": self.log_g,
            "p_grad_log_g": grad_log_g,
            "p_chunks": self.chunk_table.chunks,
            "groups": call.kv_heads,
            "parts": parts,
            "P": call.p,
            "REPEATS": call.heads_per_kv_head,
            "BLOCK": min(power_of_two(call.chunk_size), 1024),
            "PARTS": min(power_of_two(parts), 1024),
        }
        launch(grad_log_g_kernel, self.shape.chunk_slots * call.kv_heads, arguments)
        return grad_log_g

    def _common(self, states: StatePair, has_start: bool) -> dict[str, Any]:
        """Return the arguments that the kernels over blocks of tokens share."""
        shape, call = self.shape, self.shape.call
        return {
            "p_q": self.q,
            "p_k": self.k,
            "p_v": self.v,
            "p_log_g_cumsum": self.log_g_cumsum,
            "p_state_kv": states[0],
            "p_state_key": states[1],
            "p_chunks": self.chunk_table.chunks,
            "p_steps": self.step_table,
            "s_qt": self.q.stride(0),
            "s_qh": self.q.stride(1),
            "s_kt": self.k.stride(0),
            "s_kh": self.k.stride(1),
            "s_vt": self.v.stride(0),
            "s_vh": self.v.stride(1),
            "groups": call.kv_heads,
            "steps": step_count(call.head_dim, call.p),
            "rows": shape.rows,
            "scale": call.scale,
            "GATED": self.gated,
            "HAS_START": has_start,
        } | shape.constants()

    def _over_blocks(
        self, name: str, kernel: Any, arguments: dict[str, Any], heads: int, rows_name: str, others_name: str
    ) -> None:
        """Launch a kernel over blocks of tokens of all chunks, for `heads` heads of each key/value head.

        rows_name, others_name: the kernel's names for the rows of its own block, and of the blocks it walks over.
        """
        call = self.shape.call

        def start_with(blocks: Blocks) -> None:
            count = -(-min(call.chunk_size, call.tokens) // blocks.rows)
            sizes = {"token_blocks": count, rows_name: blocks.rows, others_name: blocks.others}
            programs = self.shape.chunk_slots * call.kv_heads * heads * count
            launch(kernel, programs, arguments | sizes, blocks.warps, blocks.stages)

        start_with(tuned(name, self.shape, start_with))

    def output(self, states: StatePair, has_start: bool) -> tuple[Tensor, Tensor]:
        """Return out [tokens, H, V], and the sums of weights [tokens, H].

        Args:
            states: The states before all chunks.
            has_start: Whether there is a state before the first chunk of a sequence.
        """
        call = self.shape.call
        tokens, heads = self.q.shape[:2]
        out = self.v.new_empty(tokens, heads, call.v_head_dim)
        norm = self.float((tokens, heads), call.normalize)
        arguments = self._common(states, has_start) | {
            "p_out": out,
            "p_norm": norm,
            "power_scale": self.power_scale,
            "STEP_ROWS": step_rows(call.head_dim, call.p),
        }
        self._over_blocks("output", output_kernel, arguments, call.heads_per_kv_head, "BM", "BN")
        return out, norm

    def _gradient_arguments(self, grad: Tensor, norm_grads: NormGrads, states: StatePair, edge: bool) -> dict[str, Any]:
        return self._common(states, edge) | {
            "p_grad_out": grad,
            "p_inverse_norm": norm_grads.inverse_norm,
            "p_grad_norm": norm_grads.grad_norm,
            "s_gt": grad.stride(0),
            "s_gh": grad.stride(1),
        }

    def grad_queries(
        self, grad: Tensor, norm_grads: NormGrads, states: StatePair, has_start: bool
    ) -> tuple[Tensor, Tensor]:
        """Return dq [tokens, H, K], and q.dq [tokens, H] where there are gates.

        Args:
            grad: [tokens, H, V], the gradient of the output.
            norm_grads: What `prepare` returned.
            states: The states before all chunks.
            has_start: Whether there is a state before the first chunk of a sequence.
        """
        dq = self.q.new_empty(self.q.shape)
        q_dot_dq = self.float(tuple(self.q.shape[:2]), self.gated)
        arguments = self._gradient_arguments(grad, norm_grads, states, has_start)
        arguments |= {"p_dq": dq, "p_q_dot_dq": q_dot_dq, "power_scale": self.power_scale}
        self._over_blocks("queries", queries_kernel, arguments, self.shape.call.heads_per_kv_head, "BM", "BN")
        return dq, q_dot_dq

    def grad_keys(
        self, grad: Tensor, norm_grads: NormGrads, grad_states: StatePair, has_end: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dk [tokens, G, K], dv [tokens, G, V], and k.dk [tokens, G] where there are gates.

        Args:
            grad: [tokens, H, V], the gradient of the output.
            norm_grads: What `prepare` returned.
            grad_states: The gradients of the states after all chunks.
            has_end: Whether there is a gradient of the state after the last chunk of a sequence.
        """
        dk, dv = self.k.new_empty(self.k.shape), self.v.new_empty(self.v.shape)
        k_dot_dk = self.float(tuple(self.k.shape[:2]), self.gated)
        arguments = self._gradient_arguments(grad, norm_grads, grad_states, has_end)
        arguments |= {"p_dk": dk, "p_dv": dv, "p_k_dot_dk": k_dot_dk}
        self._over_blocks("keys", keys_kernel, arguments, 1, "BN", "BM")
        return dk, dv, k_dot_dk
