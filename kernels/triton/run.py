"""Launches the kernels: forward and backward passes over sequences that lie end to end, dense ones included."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from powerplan.kernels.chunked import Plan
from powerplan.kernels.triton.backward import keys_kernel, queries_kernel
from powerplan.kernels.triton.config import Blocks, blocks, operand
from powerplan.kernels.triton.layout import power_of_two, step_conversion, step_count, step_rows, step_table
from powerplan.kernels.triton.output import output_kernel
from powerplan.kernels.triton.scan import scan_kernel
from powerplan.kernels.triton.small import gates_kernel, prepare_kernel


@dataclass(frozen=True)
class Shapes:
    """What stays the same over a call. B rows of T tokens, or N packed sequences in one row."""

    p: int
    scale: float
    chunk: int
    normalize: bool
    batch: int
    tokens: int
    groups: int
    repeats: int
    key_dim: int
    value_dim: int
    sequences: int
    dtype: torch.dtype

    @property
    def chunks(self) -> int:
        """Slots for chunks: exact for rows of one length, enough for packed sequences of any lengths."""
        if self.sequences == self.batch:
            return self.batch * -(-self.tokens // self.chunk)
        return self.tokens // self.chunk + self.sequences

    def blocks(self, kernel: str) -> Blocks:
        return blocks(kernel, self.p, self.key_dim, self.value_dim, self.dtype).within(self.chunk)

    @property
    def rows(self) -> int:
        """Rows of phi, padded to what one program of the scan owns."""
        return step_rows(self.key_dim, self.p) * step_count(self.key_dim, self.p, self.scan_steps)

    @property
    def scan_steps(self) -> int:
        return 1 if self.p == 1 else self.blocks("scan").steps

    def constants(self) -> dict[str, Any]:
        """Return the constants that all kernels over chunks take."""
        kind, precision, _ = operand(self.dtype)
        return {
            "K": self.key_dim,
            "V": self.value_dim,
            "P": self.p,
            "BK": power_of_two(self.key_dim),
            "BV": power_of_two(self.value_dim),
            "REPEATS": self.repeats,
            "NORMALIZE": self.normalize,
            "OPERAND": kind,
            "PRECISION": precision,
        }


@dataclass(frozen=True)
class Pieces:
    """Where chunks and sequences begin: chunks [slots, 4] of first token, last token + 1, whether it is the first and
    the last of its sequence; first_chunk [N + 1]. Slots beyond the last chunk have no tokens."""

    chunks: Tensor
    first_chunk: Tensor


def pieces(bounds: Tensor, chunk: int, slots: int) -> Pieces:
    """Return the chunks of sequences bounds[i] : bounds[i + 1]. No value is read back from the device."""
    bounds = bounds.long()
    counts = (bounds[1:] - bounds[:-1] + chunk - 1) // chunk
    first_chunk = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    index = torch.arange(slots, device=bounds.device)
    owner = torch.searchsorted(first_chunk[1:].contiguous(), index, right=True).clamp(max=len(counts) - 1)
    within = index - first_chunk[owner]
    start = bounds[owner] + within * chunk
    stop = torch.minimum(start + chunk, bounds[owner + 1])
    real = index < first_chunk[-1]
    table = torch.stack((start, stop, (within == 0).long(), (within == counts[owner] - 1).long()), 1)
    return Pieces(torch.where(real[:, None], table, torch.zeros_like(table)), first_chunk)


@lru_cache(maxsize=64)
def _dense_pieces(batch: int, tokens: int, chunk: int, slots: int, device: torch.device) -> Pieces:
    return pieces(torch.arange(batch + 1, device=device) * tokens, chunk, slots)


def launch(kernel: Any, programs: int, arguments: dict[str, Any], warps: int = 4, stages: int = 2) -> None:
    """Run `programs` programs of a kernel. The one place where kernels start: benchmarks/compiled.py listens here."""
    kernel[(programs,)](**arguments, num_warps=warps, num_stages=stages, enable_fp_fusion=True)


def shapes_of(plan: Plan, sequences: int, dtype: torch.dtype) -> Shapes:
    """Return the plan with what these kernels need beside it."""
    return Shapes(**vars(plan), sequences=sequences, dtype=dtype)


def kept(shapes: Shapes, keep: bool, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return empty tensors of the shapes in which states and keys are kept for the backward pass."""
    _, _, stored = operand(shapes.dtype)
    size = (shapes.chunks, shapes.groups, shapes.rows)
    states = like.new_empty((*size, shapes.value_dim) if keep else (0,), dtype=stored)
    return states, like.new_empty(size if keep and shapes.normalize else (0,), dtype=torch.float32)


def tokens_first(x: Tensor) -> Tensor:
    """[B, T, heads, dim] -> [tokens, heads, dim] with features side by side; copies only where strides ask for it."""
    flat = x.flatten(0, 1)
    return flat if flat.stride(2) == 1 or flat.shape[2] == 1 else flat.contiguous()


class Call:
    """One call's tensors, flattened to tokens, and the kernels over them."""

    def __init__(
        self, shapes: Shapes, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, cu_seqlens: Tensor | None
    ) -> None:
        self.shapes = shapes
        self.q, self.k, self.v = tokens_first(q), tokens_first(k), tokens_first(v)
        self.device = q.device
        if cu_seqlens is None:
            self.pieces = _dense_pieces(shapes.batch, shapes.tokens, shapes.chunk, shapes.chunks, q.device)
        else:
            self.pieces = pieces(cu_seqlens, shapes.chunk, shapes.chunks)
        self.nothing = torch.empty(1, dtype=torch.float32, device=q.device)
        self.sums = self.nothing if log_g is None else self._sum_gates(log_g)
        self.gated = log_g is not None
        self.table = step_table(shapes.key_dim, shapes.p, shapes.scan_steps, q.device)
        self.power_scale = shapes.scale**shapes.p

    def _sum_gates(self, log_g: Tensor) -> Tensor:
        gates = log_g.flatten(0, 1).contiguous()
        sums = torch.empty(gates.shape, dtype=torch.float32, device=self.device)
        given = {"p_log_g": gates, "p_sums": sums, "p_chunks": self.pieces.chunks, "groups": self.shapes.groups}
        block = min(power_of_two(self.shapes.chunk), 1024)
        launch(gates_kernel, self.shapes.chunks * self.shapes.groups, given | {"BLOCK": block})
        return sums

    def scan(
        self,
        x: Tensor,
        v: Tensor,
        start: tuple[Tensor, Tensor] | None,
        want_end: bool,
        gradients: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Return states at chunk borders, [slots, G, rows, V] and keys, and the one at the end, float32.

        start, and the end: [N, G, rows, V] and keys [N, G, rows]. gradients: inverse and share, for the backward scan.
        """
        shapes, own = self.shapes, self.shapes.blocks("scan")
        backward = gradients is not None
        inverse, share = (self.nothing, self.nothing) if gradients is None else gradients
        _, _, stored = operand(shapes.dtype)
        states = torch.empty(
            shapes.chunks, shapes.groups, shapes.rows, shapes.value_dim, dtype=stored, device=self.device
        )
        keys = self._float(states.shape[:3], shapes.normalize)
        end_shape = (shapes.sequences, *states.shape[1:])
        end, end_key = self._float(end_shape, want_end), self._float(end_shape[:3], want_end and shapes.normalize)
        begin, begin_key = (self.nothing, self.nothing) if start is None else start
        step_groups = len(self.table) // shapes.scan_steps
        arguments = {
            "p_x": x,
            "p_v": v,
            "p_sums": self.sums,
            "p_inverse": inverse,
            "p_share": share,
            "p_start": begin,
            "p_start_key": begin_key,
            "p_states": states,
            "p_keys": keys,
            "p_end": end,
            "p_end_key": end_key,
            "p_chunks": self.pieces.chunks,
            "p_first_chunk": self.pieces.first_chunk,
            "p_steps": self.table,
            "s_xt": x.stride(0),
            "s_xh": x.stride(1),
            "s_vt": v.stride(0),
            "s_vh": v.stride(1),
            "groups": shapes.groups,
            "step_groups": step_groups,
            "rows": shapes.rows,
            "power_scale": self.power_scale,
            "STEPS": shapes.scan_steps,
            "STEP_ROWS": step_rows(shapes.key_dim, shapes.p),
            "BLOCK": own.rows,
            "GATED": self.gated,
            "HAS_START": start is not None,
            "WANT_END": want_end,
            "BACKWARD": backward,
        } | shapes.constants()
        arguments["REPEATS"] = shapes.repeats if backward else 1
        launch(scan_kernel, step_groups * shapes.sequences * shapes.groups, arguments, own.warps, own.stages)
        return (states, keys), (end, end_key)

    def _float(self, shape: tuple[int, ...], wanted: bool) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device) if wanted else self.nothing

    def _common(self, states: tuple[Tensor, Tensor], own: Blocks, has_start: bool) -> dict[str, Any]:
        """Return the arguments that the kernels over blocks of tokens share; own.rows is the owned block's length."""
        shapes = self.shapes
        return {
            "p_q": self.q,
            "p_k": self.k,
            "p_v": self.v,
            "p_sums": self.sums,
            "p_states": states[0],
            "p_keys": states[1],
            "p_chunks": self.pieces.chunks,
            "p_steps": self.table,
            "s_qt": self.q.stride(0),
            "s_qh": self.q.stride(1),
            "s_kt": self.k.stride(0),
            "s_kh": self.k.stride(1),
            "s_vt": self.v.stride(0),
            "s_vh": self.v.stride(1),
            "groups": shapes.groups,
            "blocks": -(-shapes.chunk // own.rows),
            "steps": step_count(shapes.key_dim, shapes.p),
            "rows": shapes.rows,
            "scale": shapes.scale,
            "GATED": self.gated,
            "HAS_START": has_start,
        } | shapes.constants()

    def _programs(self, own: Blocks) -> int:
        return self.shapes.chunks * self.shapes.groups * -(-self.shapes.chunk // own.rows)

    def output(self, states: tuple[Tensor, Tensor], has_start: bool) -> tuple[Tensor, Tensor]:
        """Return out [tokens, H, V] and the sums of weights [tokens, H]."""
        shapes, own = self.shapes, self.shapes.blocks("output")
        tokens, heads = self.q.shape[:2]
        out = self.v.new_empty(tokens, heads, shapes.value_dim)
        norm = self._float((tokens, heads), shapes.normalize)
        arguments = self._common(states, own, has_start) | {
            "p_out": out,
            "p_norm": norm,
            "power_scale": self.power_scale,
            "STEP_ROWS": step_rows(shapes.key_dim, shapes.p),
            "BM": own.rows,
            "BN": own.others,
        }
        launch(output_kernel, self._programs(own) * shapes.repeats, arguments, own.warps, own.stages)
        return out, norm

    def prepare(self, grad: Tensor, out: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
        """Return 1 / norm and the gradient of the sums of weights, [tokens, H]; nothing where there is no normaliser."""
        if not self.shapes.normalize:
            return self.nothing, self.nothing
        inverse, share = torch.empty_like(norm), torch.empty_like(norm)
        block = 32
        arguments = {
            "p_out": out,
            "p_grad": grad,
            "p_norm": norm,
            "p_inverse": inverse,
            "p_share": share,
            "s_gt": grad.stride(0),
            "s_gh": grad.stride(1),
            "rows": norm.numel(),
            "heads": norm.shape[1],
            "V": self.shapes.value_dim,
            "BV": power_of_two(self.shapes.value_dim),
            "BLOCK": block,
        }
        launch(prepare_kernel, -(-norm.numel() // block), arguments)
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
        """Return dq, dk, dv, and dL/da, [tokens, G], without what the final state adds to it."""
        shapes = self.shapes
        dq = self.q.new_empty(self.q.shape)
        dk, dv = self.k.new_empty(self.k.shape), self.v.new_empty(self.v.shape)
        by_query = self._float(tuple(self.q.shape[:2]), self.gated)
        by_key = self._float(tuple(self.k.shape[:2]), self.gated)
        shared = {
            "p_grad": grad,
            "p_inverse": prepared[0],
            "p_share": prepared[1],
            "s_gt": grad.stride(0),
            "s_gh": grad.stride(1),
        }
        own = shapes.blocks("queries")
        arguments = self._common(states, own, has_start) | shared | {"BM": own.rows, "BN": own.others}
        arguments |= {"p_dq": dq, "p_dot": by_query, "power_scale": self.power_scale}
        launch(queries_kernel, self._programs(own) * shapes.repeats, arguments, own.warps, own.stages)
        own = shapes.blocks("keys")
        arguments = self._common(slopes, own, has_end) | shared | {"BM": own.others, "BN": own.rows}
        arguments |= {"p_dk": dk, "p_dv": dv, "p_dot": by_key}
        launch(keys_kernel, self._programs(own), arguments, own.warps, own.stages)
        if not self.gated:
            return dq, dk, dv, self.nothing
        return dq, dk, dv, (by_query.view(-1, shapes.groups, shapes.repeats).sum(-1) - by_key) / shapes.p


def _tiled(state: Tensor, shapes: Shapes, adjoint: bool = False) -> tuple[Tensor, Tensor]:
    """[N, G, D, W] of the shared layout -> kv [N, G, rows, V] and key [N, G, rows] of the kernels'."""
    convert = step_conversion(shapes.key_dim, shapes.p, shapes.scan_steps, state.device)
    flat = state.flatten(0, 1).float()
    rows = (convert.from_rows_adjoint if adjoint else convert.to_rows)(flat).unflatten(0, state.shape[:2])
    key = rows[..., -1] if shapes.normalize else rows[..., :1]
    return rows[..., : shapes.value_dim].contiguous(), key.contiguous()


def _shared(kv: Tensor, key: Tensor, shapes: Shapes, adjoint: bool = False) -> Tensor:
    """kv [N, G, rows, V] and key [N, G, rows] of the kernels' layout -> [N, G, D, W] of the shared one."""
    convert = step_conversion(shapes.key_dim, shapes.p, shapes.scan_steps, kv.device)
    whole = torch.cat((kv, key[..., None]), -1) if shapes.normalize else kv
    rows = (convert.to_rows_adjoint if adjoint else convert.from_rows)(whole.flatten(0, 1))
    return rows.unflatten(0, kv.shape[:2])


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
    states, end = call.scan(call.k, call.v, start, want_state)
    out, norm = call.output(states, start is not None)
    final = _shared(*end, shapes) if want_state else None
    rows = (shapes.batch, shapes.tokens)
    return out.unflatten(0, rows), final, norm.view(*rows, -1) if shapes.normalize else out.new_empty(*rows, 0, dtype=torch.float32), *states


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
    slopes, first = call.scan(call.q, grad, last, with_state, prepared)
    dq, dk, dv, towards = call.gradients(grad, prepared, (states, keys), slopes, with_state, last is not None)
    grad_start = _shared(*first, shapes, adjoint=True) if with_state else None
    grad_g = None
    if log_g is not None:
        reach = None if grad_state is None or final is None else (grad_state * final).sum((2, 3))
        grad_g = _since(towards, reach, call, cu_seqlens).view(log_g.shape)
    return dq.view(q.shape), dk.view(k.shape), dv.view(v.shape), grad_g, grad_start


def _since(towards: Tensor, reach: Tensor | None, call: Call, cu_seqlens: Tensor | None) -> Tensor:
    """Return dL/dlog_g [tokens, G], the sum of dL/da over a sequence from each token on, plus reach at its end."""
    shapes = call.shapes
    if cu_seqlens is None:
        by_row = towards.view(shapes.batch, shapes.tokens, shapes.groups)
        if reach is not None:
            by_row[:, -1] += reach
        return by_row.flip(1).cumsum(1).flip(1)
    ends = cu_seqlens[1:].long()
    if reach is not None:
        towards.index_add_(0, ends - 1, reach)
    # float64, as sums over all sequences after this one are taken away again.
    sums = torch.cat((towards.double().flip(0).cumsum(0).flip(0), towards.new_zeros(1, shapes.groups).double()))
    owner = torch.searchsorted(ends, torch.arange(len(towards), device=towards.device), right=True)
    return (sums[:-1] - sums[ends[owner]]).float()
