"""Launches the kernels: forward and backward passes over sequences that lie end to end, those of a batch included."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from powerplan.kernels.call import Gradients, Inputs, Outputs
from powerplan.kernels.triton.config import Blocks, operand
from powerplan.kernels.triton.keys import keys_kernel
from powerplan.kernels.triton.launching import launch
from powerplan.kernels.triton.layout import power_of_two, step_conversion, step_count, step_rows, step_table
from powerplan.kernels.triton.output import output_kernel
from powerplan.kernels.triton.queries import queries_kernel
from powerplan.kernels.triton.scan import scan_kernel
from powerplan.kernels.triton.shapes import LaunchShape, chunk_table, dense_chunk_table, tokens_first
from powerplan.kernels.triton.small import grad_log_g_kernel, grad_norm_kernel, log_g_cumsum_kernel
from powerplan.kernels.triton.tuning import tuned

StatePair = tuple[Tensor, Tensor]
"""States [..., rows, V], and their keys [..., rows], which are a placeholder without a normaliser."""


@lru_cache(maxsize=16)
def _placeholder(device: torch.device) -> Tensor:
    """Return what stands where a kernel takes a tensor that a call has not got. It is neither read nor written."""
    return torch.empty(1, dtype=torch.float32, device=device)


class Kernels:
    """The kernels over one call's tensors, which lie flattened to tokens."""

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
            self.log_g_cumsum = self._sum_gates(self.log_g)
        self.step_table = step_table(call.head_dim, call.p, shape.scan_steps, self.device)
        self.power_scale = call.scale**call.p

    def _along_chunks(self, kernel: Any, arguments: dict[str, Any]) -> None:
        call = self.shape.call
        arguments = arguments | {
            "p_chunks": self.chunk_table.chunks,
            "groups": call.kv_heads,
            "BLOCK": min(power_of_two(call.chunk_size), 1024),
        }
        launch(kernel, self.shape.chunk_slots * call.kv_heads, arguments)

    def _sum_gates(self, log_g: Tensor) -> Tensor:
        log_g_cumsum = torch.empty(log_g.shape, dtype=torch.float32, device=self.device)
        self._along_chunks(log_g_cumsum_kernel, {"p_log_g": log_g, "p_log_g_cumsum": log_g_cumsum})
        return log_g_cumsum

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
            "parts": parts,
            "P": call.p,
            "REPEATS": call.heads_per_kv_head,
            "PARTS": min(power_of_two(parts), 1024),
        }
        self._along_chunks(grad_log_g_kernel, arguments)
        return grad_log_g

    def scan(
        self,
        x: Tensor,
        v: Tensor,
        start: StatePair | None,
        want_end: bool,
        norm_grads: tuple[Tensor, Tensor] | None = None,
        forward_states: StatePair | None = None,
    ) -> tuple[StatePair, StatePair, Tensor]:
        """Walk the chunks of each sequence: forward over keys and values, or backward over queries and gradients.

        Args:
            x: [tokens, heads, K], the keys, or for the backward scan the queries.
            v: [tokens, heads, V], the values, or for the backward scan the gradient of the output.
            start: The state that each sequence starts with, or the gradient of the one it ends with, [N, G, rows, V].
            want_end: Whether the state at the other end is wanted.
            norm_grads: What the method of this name returned, for the backward scan only.
            forward_states: The states that the forward scan returned, for the backward scan only.

        Returns:
            The states before all chunks, or the gradients of those after them, [slots, G, rows, V]; the state at the
            other end in float32, [N, G, rows, V]; and for the backward scan grad_gate_carry, [slots, G, parts]. The
            gates of a chunk act on later tokens only through the state S after it: for each chunk but the last,
            grad_gate_carry holds the parts of that share of their gradient, <dS, S>; for the last one it holds 0.
        """
        shape, call, absent = self.shape, self.shape.call, self.placeholder
        backward = norm_grads is not None
        inverse_norm, grad_norm = (absent, absent) if norm_grads is None else norm_grads
        _, _, stored = operand(shape.dtype)
        size = (shape.chunk_slots, call.kv_heads, shape.rows)
        # Packed sequences may leave slots unused, which are saved with the others and must not be garbage.
        new = torch.empty if self.dense else torch.zeros
        states = new(*size, call.v_head_dim, dtype=stored, device=self.device)
        keys = new(size if call.normalize else (1,), dtype=torch.float32, device=self.device)
        end_size = (shape.sequences, *states.shape[1:])
        end, end_key = self._float(end_size, want_end), self._float(end_size[:3], want_end and call.normalize)
        start_kv, start_key = (absent, absent) if start is None else start
        forward_kv, forward_key = (absent, absent) if forward_states is None else forward_states
        state_blocks = len(self.step_table) // shape.scan_steps
        grad_gate_carry = absent
        if backward and self.gated:
            grad_gate_carry = torch.zeros(*size[:2], state_blocks, dtype=torch.float32, device=self.device)
        arguments = {
            "p_x": x,
            "p_v": v,
            "p_log_g_cumsum": self.log_g_cumsum,
            "p_inverse_norm": inverse_norm,
            "p_grad_norm": grad_norm,
            "p_start_kv": start_kv,
            "p_start_key": start_key,
            "p_state_kv": states,
            "p_state_key": keys,
            "p_end_kv": end,
            "p_end_key": end_key,
            "p_forward_kv": forward_kv,
            "p_forward_key": forward_key,
            "p_grad_gate_carry": grad_gate_carry,
            "p_chunks": self.chunk_table.chunks,
            "p_first_chunk": self.chunk_table.first_chunk,
            "p_steps": self.step_table,
            "s_xt": x.stride(0),
            "s_xh": x.stride(1),
            "s_vt": v.stride(0),
            "s_vh": v.stride(1),
            "groups": call.kv_heads,
            "state_blocks": state_blocks,
            "rows": shape.rows,
            "power_scale": self.power_scale,
            "STEPS": shape.scan_steps,
            "STEP_ROWS": step_rows(call.head_dim, call.p),
            "GATED": self.gated,
            "HAS_START": start is not None,
            "WANT_END": want_end,
            "BACKWARD": backward,
        } | shape.constants()
        # Keys and values come one to a group; queries and gradients, one for each head of the group.
        arguments["REPEATS"] = call.heads_per_kv_head if backward else 1

        def start_with(blocks: Blocks) -> None:
            programs = state_blocks * shape.sequences * call.kv_heads
            launch(scan_kernel, programs, arguments | {"BLOCK": blocks.rows}, blocks.warps, blocks.stages)

        start_with(tuned("scan", shape, start_with))
        return (states, keys), (end, end_key), grad_gate_carry

    def _float(self, size: tuple[int, ...], wanted: bool) -> Tensor:
        return torch.empty(size, dtype=torch.float32, device=self.device) if wanted else self.placeholder

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
            count = -(-call.chunk_size // blocks.rows)
            sizes = {"token_blocks": count, rows_name: blocks.rows, others_name: blocks.others}
            programs = self.shape.chunk_slots * call.kv_heads * heads * count
            launch(kernel, programs, arguments | sizes, blocks.warps, blocks.stages)

        start_with(tuned(name, self.shape, start_with))

    def output(self, states: StatePair, has_start: bool) -> tuple[Tensor, Tensor]:
        """Return out [tokens, H, V], and the sums of weights [tokens, H], from the states before all chunks."""
        call = self.shape.call
        tokens, heads = self.q.shape[:2]
        out = self.v.new_empty(tokens, heads, call.v_head_dim)
        norm = self._float((tokens, heads), call.normalize)
        arguments = self._common(states, has_start) | {
            "p_out": out,
            "p_norm": norm,
            "power_scale": self.power_scale,
            "STEP_ROWS": step_rows(call.head_dim, call.p),
        }
        self._over_blocks("output", output_kernel, arguments, call.heads_per_kv_head, "BM", "BN")
        return out, norm

    def norm_grads(self, grad: Tensor, out: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 / norm, and the gradient of the sums of weights, [tokens, H]; placeholders without a normaliser."""
        if not self.shape.call.normalize:
            return self.placeholder, self.placeholder
        inverse_norm, grad_norm = torch.empty_like(norm), torch.empty_like(norm)
        v_head_dim = self.shape.call.v_head_dim
        block = 32  # 32 rows of up to 128 values are up to 32 registers for each of 128 threads
        arguments = {
            "p_out": out,
            "p_grad_out": grad,
            "p_norm": norm,
            "p_inverse_norm": inverse_norm,
            "p_grad_norm": grad_norm,
            "s_gt": grad.stride(0),
            "s_gh": grad.stride(1),
            "queries": norm.numel(),
            "heads": norm.shape[1],
            "V": v_head_dim,
            "BV": power_of_two(v_head_dim),
            "BLOCK": block,
        }
        launch(grad_norm_kernel, -(-norm.numel() // block), arguments)
        return inverse_norm, grad_norm

    def gradients(
        self,
        grad: Tensor,
        norm_grads: tuple[Tensor, Tensor],
        states: StatePair,
        grad_states: StatePair,
        has_start: bool,
        has_end: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return dq, dk, dv, and with gates q.dq [tokens, H] and k.dk [tokens, G]; else placeholders.

        Args:
            grad: [tokens, H, V], the gradient of the output.
            norm_grads: What the method of this name returned.
            states: The states before all chunks.
            grad_states: The gradients of the states after all chunks.
            has_start: Whether there is a state before the first chunk of a sequence.
            has_end: Whether there is a gradient of the state after the last one.
        """
        call = self.shape.call
        dq = self.q.new_empty(self.q.shape)
        dk, dv = self.k.new_empty(self.k.shape), self.v.new_empty(self.v.shape)
        q_dot_dq = self._float(tuple(self.q.shape[:2]), self.gated)
        k_dot_dk = self._float(tuple(self.k.shape[:2]), self.gated)
        shared = {
            "p_grad_out": grad,
            "p_inverse_norm": norm_grads[0],
            "p_grad_norm": norm_grads[1],
            "s_gt": grad.stride(0),
            "s_gh": grad.stride(1),
        }
        arguments = self._common(states, has_start) | shared
        arguments |= {"p_dq": dq, "p_q_dot_dq": q_dot_dq, "power_scale": self.power_scale}
        self._over_blocks("queries", queries_kernel, arguments, call.heads_per_kv_head, "BM", "BN")
        arguments = self._common(grad_states, has_end) | shared | {"p_dk": dk, "p_dv": dv, "p_k_dot_dk": k_dot_dk}
        self._over_blocks("keys", keys_kernel, arguments, 1, "BN", "BM")
        return dq, dk, dv, q_dot_dq, k_dot_dk


def _to_rows(state: Tensor, shape: LaunchShape, adjoint: bool = False) -> StatePair:
    """[N, G, D, W] in the layout of PowerState -> states [N, G, rows, V] and keys [N, G, rows] in the kernels'."""
    call = shape.call
    convert = step_conversion(call.head_dim, call.p, shape.scan_steps, state.device)
    flat = state.flatten(0, 1).float()
    rows = convert.from_rows_adjoint(flat) if adjoint else convert.to_rows(flat)
    rows = rows.view(*state.shape[:2], *rows.shape[1:])
    key = rows[..., -1] if call.normalize else rows[..., :1]
    return rows[..., : call.v_head_dim].contiguous(), key.contiguous()


def _from_rows(states: StatePair, shape: LaunchShape, adjoint: bool = False) -> Tensor:
    """States [N, G, rows, V] and keys [N, G, rows] in the kernels' layout -> [N, G, D, W] in that of PowerState."""
    call, (kv, key) = shape.call, states
    convert = step_conversion(call.head_dim, call.p, shape.scan_steps, kv.device)
    flat = (torch.cat((kv, key[..., None]), -1) if call.normalize else kv).flatten(0, 1)
    rows = convert.to_rows_adjoint(flat) if adjoint else convert.from_rows(flat)
    return rows.view(*kv.shape[:2], *rows.shape[1:])


def forward(inputs: Inputs, initial_state: Tensor | None, shape: LaunchShape, return_state: bool) -> Outputs:
    """Return the outputs of a call, with the states before all chunks as its saved ones.

    Args:
        inputs: The tensors of the call.
        initial_state: [N, G, D, W] in the layout of PowerState, or None for an empty one.
        shape: Shape and settings of the call, and what the kernels need beside them.
        return_state: Whether the final state is wanted.
    """
    kernels = Kernels(shape, inputs)
    start = None if initial_state is None else _to_rows(initial_state, shape)
    states, end, _ = kernels.scan(kernels.k, kernels.v, start, return_state)
    out, norm = kernels.output(states, start is not None)
    final_state = _from_rows(end, shape) if return_state else None
    rows = (shape.call.batch, shape.call.tokens)
    norm = norm.view(*rows, -1) if shape.call.normalize else norm.new_empty(*rows, 0)
    return Outputs(out.view(*rows, *out.shape[1:]), norm, final_state, *states)


def backward(
    grad_out: Tensor,
    grad_state: Tensor | None,
    inputs: Inputs,
    outputs: Outputs,
    shape: LaunchShape,
    has_initial_state: bool,
) -> Gradients:
    """Return the gradients of the inputs and of the initial state, [N, G, D, W].

    Args:
        grad_out: [B, T, H, V], the gradient of the output.
        grad_state: [N, G, D, W], that of the final state; None where there is none.
        inputs: The tensors of the call.
        outputs: What `forward` returned.
        shape: Shape and settings of the call, and what the kernels need beside them.
        has_initial_state: Whether the call had an initial state.
    """
    kernels = Kernels(shape, inputs)
    grad = tokens_first(grad_out)
    norm = outputs.norm.flatten(0, 1) if shape.call.normalize else outputs.norm
    norm_grads = kernels.norm_grads(grad, outputs.out.flatten(0, 1), norm)
    assert outputs.saved_keys is not None, "the forward pass of this engine saves keys, or a placeholder"
    states = (outputs.saved_states, outputs.saved_keys)
    end = None if grad_state is None else _to_rows(grad_state, shape, adjoint=True)
    grad_states, grad_start, grad_gate_carry = kernels.scan(kernels.q, grad, end, has_initial_state, norm_grads, states)
    dq, dk, dv, q_dot_dq, k_dot_dk = kernels.gradients(
        grad, norm_grads, states, grad_states, has_initial_state, end is not None
    )
    grad_initial_state = _from_rows(grad_start, shape, adjoint=True) if has_initial_state else None
    grad_log_g = None
    if inputs.log_g is not None:
        if grad_state is not None and outputs.final_state is not None:
            final_state_dot = (grad_state * outputs.final_state).sum((2, 3))
            grad_gate_carry[:, :, 0].index_add_(0, kernels.chunk_table.first_chunk[1:] - 1, final_state_dot)
        grad_log_g = kernels.grad_log_g(q_dot_dq, k_dot_dk, grad_gate_carry).view(inputs.log_g.shape)
    dq, dk, dv = dq.view(inputs.q.shape), dk.view(inputs.k.shape), dv.view(inputs.v.shape)
    return Gradients(dq, dk, dv, grad_log_g, grad_initial_state)
