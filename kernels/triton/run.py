"""Launches the kernels: forward and backward passes over sequences that lie end to end, dense ones included."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from powerplan.kernels.triton.config import Blocks, operand
from powerplan.kernels.triton.keys import keys_kernel
from powerplan.kernels.triton.layout import power_of_two, step_conversion, step_count, step_rows, step_table
from powerplan.kernels.triton.output import output_kernel
from powerplan.kernels.triton.queries import queries_kernel
from powerplan.kernels.triton.scan import scan_kernel
from powerplan.kernels.triton.shapes import Shapes, dense_pieces, launch, pieces, tokens_first
from powerplan.kernels.triton.small import grad_log_g_kernel, grad_norm_kernel, log_g_cumsum_kernel
from powerplan.kernels.triton.tuning import tuned


class Call:
    """One call's tensors, flattened to tokens, and the kernels over them."""

    def __init__(
        self, shapes: Shapes, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, cu_seqlens: Tensor | None
    ) -> None:
        self.shapes = shapes
        self.q, self.k, self.v = tokens_first(q), tokens_first(k), tokens_first(v)
        self.device = q.device
        self.dense = cu_seqlens is None
        if cu_seqlens is None:
            self.pieces = dense_pieces(shapes.batch, shapes.tokens, shapes.chunk, shapes.chunks, q.device)
        else:
            self.pieces = pieces(cu_seqlens, shapes.chunk, shapes.chunks)
        self.nothing = torch.empty(1, dtype=torch.float32, device=q.device)
        self.sums = self.nothing if log_g is None else self._sum_gates(log_g)
        self.gated = log_g is not None
        self.table = step_table(shapes.key_dim, shapes.p, shapes.scan_steps, q.device)
        self.power_scale = shapes.scale**shapes.p

    def _along_chunks(self, kernel: Any, given: dict[str, Tensor]) -> None:
        arguments = given | {
            "p_chunks": self.pieces.chunks,
            "groups": self.shapes.groups,
            "BLOCK": min(power_of_two(self.shapes.chunk), 1024),
        }
        launch(kernel, self.shapes.chunks * self.shapes.groups, arguments)

    def _sum_gates(self, log_g: Tensor) -> Tensor:
        gates = log_g.flatten(0, 1).contiguous()
        sums = torch.empty(gates.shape, dtype=torch.float32, device=self.device)
        self._along_chunks(log_g_cumsum_kernel, {"p_log_g": gates, "p_log_g_cumsum": sums})
        return sums

    def gate_slopes(self, towards: Tensor, reach: Tensor) -> Tensor:
        """Return dL/dlog_g from dL/da, both [tokens, G], and what the state after each chunk adds, [slots, G]."""
        slopes = torch.empty_like(towards)
        arguments = {"p_grad_log_g_cumsum": towards, "p_grad_gate_carry": reach, "p_grad_log_g": slopes}
        self._along_chunks(grad_log_g_kernel, arguments)
        return slopes

    def scan(
        self,
        x: Tensor,
        v: Tensor,
        start: tuple[Tensor, Tensor] | None,
        want_end: bool,
        gradients: tuple[Tensor, Tensor] | None = None,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]:
        """Return states at chunk borders, [slots, G, rows, V] and keys, the one at the end in float32, and reach.

        start, and the end: [N, G, rows, V] and keys [N, G, rows]. gradients, inverse and share, and past, the forward
        scan's states, are for the backward scan, whose reach [slots, G] is <dS, S> after each chunk but the last.
        """
        shapes = self.shapes
        backward = gradients is not None
        inverse, share = (self.nothing, self.nothing) if gradients is None else gradients
        _, _, stored = operand(shapes.dtype)
        slots = (shapes.chunks, shapes.groups, shapes.rows)
        # Packed sequences may leave slots unused, which are kept with the others and must not be garbage.
        new = torch.empty if self.dense else torch.zeros
        states = new(*slots, shapes.value_dim, dtype=stored, device=self.device)
        keys = new(slots if shapes.normalize else (1,), dtype=torch.float32, device=self.device)
        end_shape = (shapes.sequences, *states.shape[1:])
        end, end_key = self._float(end_shape, want_end), self._float(end_shape[:3], want_end and shapes.normalize)
        begin, begin_key = (self.nothing, self.nothing) if start is None else start
        before, before_keys = (self.nothing, self.nothing) if past is None else past
        step_groups = len(self.table) // shapes.scan_steps
        reach = torch.zeros(*states.shape[:2], step_groups, dtype=torch.float32, device=self.device)
        arguments = {
            "p_x": x,
            "p_v": v,
            "p_log_g_cumsum": self.sums,
            "p_inverse_norm": inverse,
            "p_grad_norm": share,
            "p_start_kv": begin,
            "p_start_key": begin_key,
            "p_state_kv": states,
            "p_state_key": keys,
            "p_end_kv": end,
            "p_end_key": end_key,
            "p_forward_kv": before,
            "p_forward_key": before_keys,
            "p_grad_gate_carry": reach,
            "p_chunks": self.pieces.chunks,
            "p_first_chunk": self.pieces.first_chunk,
            "p_steps": self.table,
            "s_xt": x.stride(0),
            "s_xh": x.stride(1),
            "s_vt": v.stride(0),
            "s_vh": v.stride(1),
            "groups": shapes.groups,
            "state_blocks": step_groups,
            "rows": shapes.rows,
            "power_scale": self.power_scale,
            "STEPS": shapes.scan_steps,
            "STEP_ROWS": step_rows(shapes.key_dim, shapes.p),
            "GATED": self.gated,
            "HAS_START": start is not None,
            "WANT_END": want_end,
            "BACKWARD": backward,
        } | shapes.constants()
        arguments["REPEATS"] = shapes.repeats if backward else 1

        def start_with(own: Blocks) -> None:
            programs = step_groups * shapes.sequences * shapes.groups
            launch(scan_kernel, programs, arguments | {"BLOCK": own.rows}, own.warps, own.stages)

        start_with(tuned("scan", shapes, start_with))
        return (states, keys), (end, end_key), reach.sum(-1)

    def _float(self, shape: tuple[int, ...], wanted: bool) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device) if wanted else self.nothing

    def _common(self, states: tuple[Tensor, Tensor], has_start: bool) -> dict[str, Any]:
        """Return the arguments that the kernels over blocks of tokens share."""
        shapes = self.shapes
        return {
            "p_q": self.q,
            "p_k": self.k,
            "p_v": self.v,
            "p_log_g_cumsum": self.sums,
            "p_state_kv": states[0],
            "p_state_key": states[1],
            "p_chunks": self.pieces.chunks,
            "p_steps": self.table,
            "s_qt": self.q.stride(0),
            "s_qh": self.q.stride(1),
            "s_kt": self.k.stride(0),
            "s_kh": self.k.stride(1),
            "s_vt": self.v.stride(0),
            "s_vh": self.v.stride(1),
            "groups": shapes.groups,
            "steps": step_count(shapes.key_dim, shapes.p),
            "rows": shapes.rows,
            "scale": shapes.scale,
            "GATED": self.gated,
            "HAS_START": has_start,
        } | shapes.constants()

    def _over_blocks(self, name: str, kernel: Any, arguments: dict[str, Any], heads: int, own: str, other: str) -> None:
        """Launch a kernel over blocks of tokens of all chunks, for `heads` heads of each group.

        own, other: the kernel's names for the rows of its block, and of those it walks over.
        """

        def start_with(blocks: Blocks) -> None:
            count = -(-self.shapes.chunk // blocks.rows)
            sizes = {"token_blocks": count, own: blocks.rows, other: blocks.others}
            programs = self.shapes.chunks * self.shapes.groups * heads * count
            launch(kernel, programs, arguments | sizes, blocks.warps, blocks.stages)

        start_with(tuned(name, self.shapes, start_with))

    def output(self, states: tuple[Tensor, Tensor], has_start: bool) -> tuple[Tensor, Tensor]:
        """Return out [tokens, H, V] and the sums of weights [tokens, H]."""
        shapes = self.shapes
        tokens, heads = self.q.shape[:2]
        out = self.v.new_empty(tokens, heads, shapes.value_dim)
        norm = self._float((tokens, heads), shapes.normalize)
        arguments = self._common(states, has_start) | {
            "p_out": out,
            "p_norm": norm,
            "power_scale": self.power_scale,
            "STEP_ROWS": step_rows(shapes.key_dim, shapes.p),
        }
        self._over_blocks("output", output_kernel, arguments, shapes.repeats, "BM", "BN")
        return out, norm

    def prepare(self, grad: Tensor, out: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 / norm and the gradient of the sums of weights, [tokens, H]; nothing without a normaliser."""
        if not self.shapes.normalize:
            return self.nothing, self.nothing
        inverse, share = torch.empty_like(norm), torch.empty_like(norm)
        block = 32
        arguments = {
            "p_out": out,
            "p_grad_out": grad,
            "p_norm": norm,
            "p_inverse_norm": inverse,
            "p_grad_norm": share,
            "s_gt": grad.stride(0),
            "s_gh": grad.stride(1),
            "queries": norm.numel(),
            "heads": norm.shape[1],
            "V": self.shapes.value_dim,
            "BV": power_of_two(self.shapes.value_dim),
            "BLOCK": block,
        }
        launch(grad_norm_kernel, -(-norm.numel() // block), arguments)
        return inverse, share

    def gradients(
        self,
        grad: Tensor,
        prepared: tuple[Tensor, Tensor],
        states: tuple[Tensor, Tensor],
        slopes: tuple[Tensor, Tensor],
        has_start: bool,
        has_end: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return dq, dk, dv, and dL/da, [tokens, G], without what states after a chunk add to it."""
        shapes = self.shapes
        dq = self.q.new_empty(self.q.shape)
        dk, dv = self.k.new_empty(self.k.shape), self.v.new_empty(self.v.shape)
        by_query = self._float(tuple(self.q.shape[:2]), self.gated)
        by_key = self._float(tuple(self.k.shape[:2]), self.gated)
        shared = {
            "p_grad_out": grad,
            "p_inverse_norm": prepared[0],
            "p_grad_norm": prepared[1],
            "s_gt": grad.stride(0),
            "s_gh": grad.stride(1),
        }
        arguments = self._common(states, has_start) | shared
        arguments |= {"p_dq": dq, "p_q_dot_dq": by_query, "power_scale": self.power_scale}
        self._over_blocks("queries", queries_kernel, arguments, shapes.repeats, "BM", "BN")
        arguments = self._common(slopes, has_end) | shared | {"p_dk": dk, "p_dv": dv, "p_k_dot_dk": by_key}
        self._over_blocks("keys", keys_kernel, arguments, 1, "BN", "BM")
        if not self.gated:
            return dq, dk, dv, self.nothing
        return dq, dk, dv, (by_query.view(-1, shapes.groups, shapes.repeats).sum(-1) - by_key) / shapes.p


def _tiled(state: Tensor, shapes: Shapes, adjoint: bool = False) -> tuple[Tensor, Tensor]:
    """[N, G, D, W] of the shared layout -> kv [N, G, rows, V] and key [N, G, rows] of the kernels'."""
    convert = step_conversion(shapes.key_dim, shapes.p, shapes.scan_steps, state.device)
    flat = state.flatten(0, 1).float()
    rows = convert.from_rows_adjoint(flat) if adjoint else convert.to_rows(flat)
    rows = rows.view(*state.shape[:2], *rows.shape[1:])
    key = rows[..., -1] if shapes.normalize else rows[..., :1]
    return rows[..., : shapes.value_dim].contiguous(), key.contiguous()


def _shared(kv: Tensor, key: Tensor, shapes: Shapes, adjoint: bool = False) -> Tensor:
    """kv [N, G, rows, V] and key [N, G, rows] of the kernels' layout -> [N, G, D, W] of the shared one."""
    convert = step_conversion(shapes.key_dim, shapes.p, shapes.scan_steps, kv.device)
    flat = (torch.cat((kv, key[..., None]), -1) if shapes.normalize else kv).flatten(0, 1)
    rows = convert.to_rows_adjoint(flat) if adjoint else convert.from_rows(flat)
    return rows.view(*kv.shape[:2], *rows.shape[1:])


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    shapes: Shapes,
    want_state: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Return out [B, T, H, V], the final state [N, G, D, W], sums of weights [B, T, H], states and keys of chunks.

    q [B, T, H, K], k [B, T, G, K], v [B, T, G, V], log_g [B, T, G], state [N, G, D, W] in the shared layout.
    """
    call = Call(shapes, q, k, v, log_g, cu_seqlens)
    start = None if state is None else _tiled(state, shapes)
    states, end, _ = call.scan(call.k, call.v, start, want_state)
    out, norm = call.output(states, start is not None)
    final = _shared(*end, shapes) if want_state else None
    rows = (shapes.batch, shapes.tokens)
    norm = norm.view(*rows, -1) if shapes.normalize else norm.new_empty(*rows, 0)
    return out.view(*rows, *out.shape[1:]), final, norm, *states


def backward(
    grad_out: Tensor,
    grad_state: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    cu_seqlens: Tensor | None,
    out: Tensor,
    norm: Tensor,
    states: Tensor,
    keys: Tensor,
    final: Tensor | None,
    shapes: Shapes,
    with_state: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return the gradients of q, k, v, log_g (None without gates) and of the initial state, [N, G, D, W]."""
    call = Call(shapes, q, k, v, log_g, cu_seqlens)
    grad = tokens_first(grad_out)
    prepared = call.prepare(grad, out.flatten(0, 1), norm.flatten(0, 1) if shapes.normalize else norm)
    last = None if grad_state is None else _tiled(grad_state, shapes, adjoint=True)
    slopes, first, reach = call.scan(call.q, grad, last, with_state, prepared, (states, keys))
    dq, dk, dv, towards = call.gradients(grad, prepared, (states, keys), slopes, with_state, last is not None)
    grad_start = _shared(*first, shapes, adjoint=True) if with_state else None
    grad_g = None
    if log_g is not None:
        if grad_state is not None and final is not None:
            reach.index_add_(0, call.pieces.first_chunk[1:] - 1, (grad_state * final).sum((2, 3)))
        grad_g = call.gate_slopes(towards, reach).view(log_g.shape)
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape), grad_g, grad_start
