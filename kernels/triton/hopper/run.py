"""Launches the kernels of this folder: the states of all chunks, and what they add to out, dq, dk and dv."""

from __future__ import annotations

from copy import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from powerplan.kernels.triton.hopper.blocks import Blocks, blocks, fixed_blocks
from powerplan.kernels.triton.hopper.contract import contract_kernel
from powerplan.kernels.triton.hopper.expand import expand_kernel
from powerplan.kernels.triton.hopper.fixed_contract import fixed_contract_kernel
from powerplan.kernels.triton.hopper.fixed_expand import fixed_expand_kernel
from powerplan.kernels.triton.hopper.fixed_states import fixed_states_kernel
from powerplan.kernels.triton.hopper.keys import keys_kernel
from powerplan.kernels.triton.hopper.layouts import tile_layout
from powerplan.kernels.triton.hopper.output import output_kernel
from powerplan.kernels.triton.hopper.queries import queries_kernel
from powerplan.kernels.triton.hopper.states import states_kernel
from powerplan.kernels.triton.hopper.sums import chunk_sums
from powerplan.kernels.triton.launches import Launches, NormGrads, StatePair
from powerplan.kernels.triton.launching import launch
from powerplan.kernels.triton.layout import TILE, padded_dim, step_table
from powerplan.kernels.triton.prepare import Prepared, make_copies
from powerplan.kernels.triton.running import Summands, running_sums

STEP = TILE * TILE
"""Rows of a step of phi."""


def _tiles(x: Tensor, rows: int) -> TensorDescriptor:
    """Return the descriptor of x [..., columns] as [all rows, columns], read in tiles of `rows` full rows."""
    return TensorDescriptor.from_tensor(x.flatten(0, -2), [rows, x.shape[-1]], tile_layout(x.shape[-1]))


def scan_chunks(
    calls: Launches,
    x: Tensor,
    v: Tensor,
    prepared: Prepared,
    start: StatePair | None,
    want_end: bool,
    forward_states: StatePair | None,
    squares: Summands | None,
) -> tuple[StatePair, StatePair, Tensor]:
    """Return what `states.scan` does: sums of single chunks, then running sums.

    squares: The normaliser's sums of single chunks for p = 2.
    """
    shape, backward = calls.shape, forward_states is not None
    starts = (None, None) if start is None else start
    forwards = (None, None) if forward_states is None else forward_states
    of = chunk_summands(calls, x, v, prepared.copies, starts[0], want_end, forwards[0], backward)
    if shape.lower is None:
        return running_sums(calls, of, squares, want_end, backward)
    # The normaliser is a state of one degree less, whose values are keys (normaliser.py).
    assert isinstance(calls, HopperLaunches)
    lower, y = calls.lower, prepared.norm_grads.grad_norm[..., None] * x if backward else x
    copied = make_copies(lower, x, y, backward)
    of_lower = chunk_summands(lower, x, y, copied, starts[1], want_end, forwards[1], backward)
    parts = of.blocks + of_lower.blocks
    carry = calls.float((shape.chunk_slots, shape.call.kv_heads, parts), backward and calls.gated)
    (states, _), (end, _), _ = running_sums(calls, of, None, want_end, backward, carry)
    (keys, _), (key_end, _), _ = running_sums(lower, of_lower, None, want_end, backward, carry, of.blocks)
    return (states, keys), (end, key_end), carry


def chunk_summands(
    calls: Launches,
    x: Tensor,
    v: Tensor,
    copied: tuple[Tensor, Tensor] | None,
    start: Tensor | None,
    want_end: bool,
    forward: Tensor | None,
    backward: bool,
) -> Summands:
    """Return the sums of phi(x) v^T over single chunks, to be added up; copied: `Prepared.copies`, for p > 1."""
    call, memory = calls.shape.call, None
    if copied is None:
        parts = chunk_sums(calls, x, v, backward)
    else:
        parts, memory = _states_memory(calls, want_end, backward)
        _phi_sums(calls, *copied, parts)
    return Summands(parts.unsqueeze(2), start, forward, call.v_head_dim, x.dtype, memory)


def _states_memory(calls: Launches, want_end: bool, backward: bool) -> tuple[Tensor, Tensor | None]:
    """Return memory for the sums of single chunks, and for the states that follow from them; None: new memory.

    For p > 2, where the state of one chunk and head takes 7.9 MB at K = V = 64, both lie in one memory, the sums a
    chunk further on (backward: the states). When running_kernel stores a state, it has read what lay there. Not where
    several sequences end in states that are wanted: there the sum over a sequence's last chunk lies in the place of the
    first state of the next one, which another program stores.
    """
    shape = calls.shape
    size = (shape.call.kv_heads, shape.rows, shape.stored_columns)
    if shape.call.p == 2 or (want_end and shape.sequences > 1):
        return calls.q.new_empty(shape.chunk_slots, *size), None
    both = calls.q.new_empty(shape.chunk_slots + 1, *size)
    return (both[:-1], both[1:]) if backward else (both[1:], both[:-1])


def _phi_sums(calls: Launches, xt: Tensor, y: Tensor, parts: Tensor) -> None:
    """Write the sums of phi(x) y^T over each chunk to parts [slots, G, rows, padded columns].

    Args:
        calls: The call's tensors.
        xt: [slots, heads, padded K, chunk], x with time last.
        y: [slots, heads, chunk, padded V], y times what multiplies a token.
        parts: See above.
    """
    shape, call = calls.shape, calls.shape.call
    repeats = xt.shape[1] // call.kv_heads
    width, columns = padded_dim(call.head_dim), shape.stored_columns
    # What a program's sums leave of its registers holds the left operands of up to four steps.
    share = min(4, 256 // columns) if call.p > 2 else min(width // TILE // 2, 256 // columns)
    own = blocks("states", shape)
    tile_rows = width if width <= 64 else TILE
    xt_tiles = TensorDescriptor.from_tensor(xt.flatten(0, -2), [tile_rows, own.rows], tile_layout(own.rows))
    arguments = {
        "xt_desc": xt_tiles,
        "y_desc": _tiles(y, own.rows),
        "p_chunks": calls.chunk_table.chunks,
        "p_parts": parts,
        "groups": call.kv_heads,
        "chunk": xt.shape[-1],
        "REPEATS": repeats,
        "TILES_X": width // TILE,
        "V": columns,
        "SHARE": share,
        "BT": own.rows,
        "STAGES": own.stages,
    }
    kernel = states_kernel
    if call.p > 2:
        kernel = fixed_states_kernel
        arguments |= {"p_xt": xt, "p_steps": calls.step_table, "P": call.p, "STEPS": shape.rows // STEP}
    launch(kernel, shape.chunk_slots * call.kv_heads * (shape.rows // STEP // share), arguments)


class HopperLaunches(Launches):
    """The kernels of this folder over one call's tensors."""

    @cached_property
    def lower(self) -> HopperLaunches:
        """The kernels over what the normaliser is a state of: keys and keys, of one degree less, by the same scale."""
        assert self.shape.lower is not None
        made = copy(self)
        made.shape, made.v = self.shape.lower, self.k
        made.step_table = step_table(made.shape.phi_width, made.shape.call.p, made.shape.scan_steps, self.device)
        return made

    def _lower_part(self, x: Tensor, keys: Tensor, of_keys: bool, has_edge: bool) -> Tensor:
        """Return phi(x) Z for the normaliser's state Z of one degree less, [tokens, heads, K] in float32."""
        return self.lower._through_states(expand_kernel, x, None, keys, of_keys, has_edge, fine=True)

    def _result(self, like: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return a new tensor for a result: float32 where operands are scaled, and the result is to be scaled back."""
        return like.new_empty(size, dtype=torch.float32 if self.shape.scaled else like.dtype)

    def _rows(self, x: Tensor, rows: int) -> TensorDescriptor:
        """Return the descriptor of x [tokens, heads, dim] as [tokens, heads dim], read in tiles of `rows` of a head.

        A copy stands for x where a tile is not 16-byte aligned or head dims are padded.
        """
        heads, dim = x.shape[1:]
        width = padded_dim(dim)
        if width != dim:
            x = torch.nn.functional.pad(x, (0, width - dim))
        elif x.stride(1) != dim or x.stride(0) % 8 or x.stride(0) < heads * dim or x.data_ptr() % 16:
            x = x.clone(memory_format=torch.contiguous_format)  # .contiguous() would return x where its base is off
        flat = x.as_strided((x.shape[0], heads * width), (x.stride(0), 1))
        return TensorDescriptor.from_tensor(flat, [rows, width], tile_layout(width))

    def _through_states(
        self,
        kernel: Any,
        x: Tensor,
        y: Tensor | None,
        states: Tensor,
        of_keys: bool,
        has_edge: bool,
        keys: Tensor | None = None,
        grad_norm: Tensor | None = None,
        fine: bool = False,
    ) -> Tensor:
        """Return the states' part of one result: phi(x) times a state, or the gradient of x from that product's, y.

        of_keys: Whether x are keys, which the state after the chunk acts on.
        has_edge: Whether the first chunk (of_keys: the last) of a sequence has such a state, too.
        keys, grad_norm: The normaliser's state, whose share of the gradient is added, and what multiplies the sum of
            weights in it, [tokens, heads]; where the normaliser is a state of one degree less.
        fine: Whether the result is float32 in any case.
        """
        shape, call = self.shape, self.shape.call
        dim = call.v_head_dim if y is None else call.head_dim
        # The gates' gradients are differences of q.dq and k.dk, which 16 bits would not keep apart.
        fine = fine or self.shape.scaled or (y is not None and self.gated)
        part = x.new_empty(*x.shape[:2], dim, dtype=torch.float32 if fine else x.dtype)
        name = "expand" if y is None else "contract"
        own = blocks(name, shape) if call.p == 2 else fixed_blocks(name, shape)
        token_blocks = -(-min(call.chunk_size, call.tokens) // own.rows)
        arguments: dict[str, Any] = {
            "state_desc": _tiles(states, STEP),
            "p_x": x,
            "p_log_g_cumsum": self.log_g_cumsum,
            "p_chunks": self.chunk_table.chunks,
            "p_part": part,
            "s_xt": x.stride(0),
            "s_xh": x.stride(1),
            "groups": call.kv_heads,
            "token_blocks": token_blocks,
            "power_scale": 1.0 if of_keys else self.power_scale,
            "K": call.head_dim,
            "TILES": shape.phi_width // TILE,
            "COLUMNS": shape.stored_columns,
            "REPEATS": x.shape[1] // call.kv_heads,
            "BM": own.rows,
            "STAGES": own.stages,
            "OF_KEYS": of_keys,
            "GATED": self.gated,
            "HAS_START": has_edge,
        }
        arguments |= {"V": dim} if y is None else {"y_desc": self._rows(y, own.rows)}
        if call.p > 2:
            kernel = fixed_expand_kernel if y is None else fixed_contract_kernel
            arguments |= {"P": call.p, "STEPS": shape.rows // STEP}
            if y is not None:
                more = self.placeholder if keys is None else self._lower_part(x, keys, of_keys, has_edge)
                factor = self.placeholder if grad_norm is None else grad_norm
                arguments |= {"p_more": more, "p_factor": factor, "NORMALIZE": keys is not None}
        programs = shape.chunk_slots * x.shape[1] * token_blocks
        launch(kernel, programs, arguments, own.warps, options=own.options)
        return part

    def _within(
        self, kernel: Any, arguments: dict[str, Any], states: StatePair, heads: int, own: Blocks, has_edge: bool
    ) -> None:
        """Launch a kernel of attention within chunks over `heads` heads.

        has_edge: Whether the first (for keys: the last) chunk of a sequence has a state before (after) it.
        """
        shape, call = self.shape, self.shape.call
        token_blocks = -(-min(call.chunk_size, call.tokens) // own.rows)
        width, has_states = padded_dim(call.head_dim), states[0].shape[0] > 0
        if call.p == 1 and has_states:
            state = states[0]
        elif call.p == 2 and has_states and call.normalize:
            state = states[1]
        else:
            state = self.q.new_empty(1, width)
        arguments |= {
            "state_desc": _tiles(state, width),
            "p_log_g_cumsum": self.log_g_cumsum,
            "p_chunks": self.chunk_table.chunks,
            "groups": call.kv_heads,
            "token_blocks": token_blocks,
            "power_scale": self.power_scale,
            "P": call.p,
            "K": width,
            "V": shape.stored_columns,
            "REPEATS": call.heads_per_kv_head,
            "GATED": self.gated,
            "NORMALIZE": call.normalize,
            "HAS_STATES": has_states,
            "HAS_START": has_edge,
            "STAGES": own.stages,
        }
        launch(kernel, shape.chunk_slots * heads * token_blocks, arguments, own.warps, options=own.options)

    def output(self, states: StatePair, has_start: bool) -> tuple[Tensor, Tensor]:
        call = self.shape.call
        tokens, heads = self.q.shape[:2]
        out = self._result(self.v, (tokens, heads, call.v_head_dim))
        norm = self.float((tokens, heads), call.normalize)
        part = norm_part = self.placeholder
        if states[0].shape[0] and call.p > 1:
            part = self._through_states(expand_kernel, self.q, None, states[0], False, has_start)
            if self.shape.lower is not None:
                norm_part = (self.q * self._lower_part(self.q, states[1], False, has_start)).sum(-1)
        own = blocks("output", self.shape)
        arguments = {
            "q_desc": self._rows(self.q, own.rows),
            "k_desc": self._rows(self.k, own.columns),
            "v_desc": self._rows(self.v, own.columns),
            "p_part": part,
            "p_out": out,
            "p_norm": norm,
            "p_norm_part": norm_part,
            "DIM": call.v_head_dim,
            "BM": own.rows,
            "BN": own.columns,
        }
        self._within(output_kernel, arguments, states, heads, own, has_start)
        return out, norm

    def grad_queries(
        self, grad: Tensor, norm_grads: NormGrads, states: StatePair, has_start: bool
    ) -> tuple[Tensor, Tensor]:
        call = self.shape.call
        dq = self._result(self.q, self.q.shape)
        q_dot_dq = self.float(tuple(self.q.shape[:2]), self.gated)
        part = self.placeholder
        if states[0].shape[0] and call.p > 1:
            keys, grad_norm = (None, None) if self.shape.lower is None else (states[1], norm_grads.grad_norm)
            part = self._through_states(
                contract_kernel, self.q, norm_grads.y, states[0], False, has_start, keys, grad_norm
            )
        own = blocks("queries", self.shape)
        arguments = {
            "q_desc": self._rows(self.q, own.rows),
            "y_desc": self._rows(norm_grads.y, own.rows),
            "k_desc": self._rows(self.k, own.columns),
            "v_desc": self._rows(self.v, own.columns),
            "p_grad_norm": norm_grads.grad_norm,
            "p_part": part,
            "p_dq": dq,
            "p_q_dot_dq": q_dot_dq,
            "DIM": call.head_dim,
            "BM": own.rows,
            "BN": own.columns,
        }
        self._within(queries_kernel, arguments, states, self.q.shape[1], own, has_start)
        return dq, q_dot_dq

    def grad_keys(
        self, grad: Tensor, norm_grads: NormGrads, grad_states: StatePair, has_end: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        call = self.shape.call
        dk, dv = self._result(self.k, self.k.shape), self._result(self.v, self.v.shape)
        k_dot_dk = self.float(tuple(self.k.shape[:2]), self.gated)
        part_k = part_v = self.placeholder
        if grad_states[0].shape[0] and call.p > 1:
            keys = None if self.shape.lower is None else grad_states[1]
            part_k = self._through_states(contract_kernel, self.k, self.v, grad_states[0], True, has_end, keys)
            part_v = self._through_states(expand_kernel, self.k, None, grad_states[0], True, has_end)
        own = blocks("keys", self.shape)
        arguments = {
            "k_desc": self._rows(self.k, own.rows),
            "v_desc": self._rows(self.v, own.rows),
            "q_desc": self._rows(self.q, own.columns),
            "y_desc": self._rows(norm_grads.y, own.columns),
            "p_grad_norm": norm_grads.grad_norm,
            "p_part_k": part_k,
            "p_part_v": part_v,
            "p_dk": dk,
            "p_dv": dv,
            "p_k_dot_dk": k_dot_dk,
            "DIM_K": call.head_dim,
            "DIM_V": call.v_head_dim,
            "BN": own.rows,
            "BM": own.columns,
        }
        self._within(keys_kernel, arguments, grad_states, call.kv_heads, own, has_end)
        return dk, dv, k_dot_dk
