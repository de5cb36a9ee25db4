"""What stays the same over a call of the Triton kernels: sizes, and where chunks begin."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from powerplan.dims import hopper_takes
from powerplan.kernels.call import CallShape, Inputs
from powerplan.kernels.triton.config import Blocks, blocks, family, operand
from powerplan.kernels.triton.layout import TILE, padded_dim, power_of_two, settle, step_count, step_rows
from powerplan.kernels.triton.support import hopper_lacking, overwrites, takes_untried, triton_version


@dataclass(frozen=True)
class LaunchShape:
    """The shape of a call, and what only the Triton kernels need beside it.

    Attributes:
        call: Shape and settings of the call.
        sequences: N, rows of the batch, or packed sequences in one row.
        dtype: That of q, k and v.
        arch: Family of GPUs, 80 or 90, as `config.family` returns it.
        hopper: Whether the kernels of hopper/ compute what has to do with states.
        scaled: Whether the operands are scaled already (hopper/float16.py).
    """

    call: CallShape
    sequences: int
    dtype: torch.dtype
    arch: int
    hopper: bool = False
    scaled: bool = False

    @property
    def phi_width(self) -> int:
        """Features that phi is made of: K, and padding where the kernels of hopper/ need it.

        For p > 2 they take any number of whole tiles: at p = 4 phi of 32 features has 7 times the rows of phi of 16.
        """
        head_dim = self.call.head_dim
        if self.hopper and self.call.p > 2:
            return -(-head_dim // TILE) * TILE
        return padded_dim(head_dim) if self.hopper else head_dim

    @property
    def stored_columns(self) -> int:
        """Columns of stored states: V, and padding where the kernels of hopper/ need it."""
        return padded_dim(self.call.v_head_dim) if self.hopper else self.call.v_head_dim

    @property
    def key_size(self) -> tuple[int, ...]:
        """Size of a state's normaliser; empty without one.

        For p = 2 that of Z = sum k k^T; for p = 4 in hopper/ that of a state of degree 3 whose values are keys
        (normaliser.py); else a value for each row.
        """
        if not self.call.normalize:
            return ()
        if self.lower is not None:
            return (self.lower.rows, self.lower.stored_columns)
        return (self.square_width,) * 2 if self.call.p == 2 else (self.rows,)

    @property
    def key_apart(self) -> bool:
        """Whether the normaliser is no column of the state, but a state of its own."""
        return self.call.normalize and (self.call.p == 2 or self.lower is not None)

    @cached_property
    def lower(self) -> LaunchShape | None:
        """The shape of what sums the normaliser as a state of one degree less whose values are keys; None otherwise."""
        if not (self.hopper and self.call.normalize and self.call.p > 2):
            return None
        call = replace(self.call, p=self.call.p - 1, v_head_dim=self.call.head_dim, normalize=False)
        return replace(self, call=call)

    @property
    def square_width(self) -> int:
        """Rows and columns of Z = sum k k^T, with padding."""
        return self.phi_width if self.hopper else power_of_two(self.call.head_dim)

    @property
    def key_dtype(self) -> torch.dtype:
        """Dtype of a state's normaliser: a right operand of the kernels of hopper/, else float32."""
        return self.dtype if self.hopper else torch.float32

    @property
    def state_dtype(self) -> torch.dtype:
        """Dtype of the states that are stored between kernels."""
        return self.dtype if self.hopper else operand(self.dtype)[2]

    @property
    def needs_scales(self) -> bool:
        """Whether operands have to be scaled: fp16 has not the range for powers of scores (hopper/float16.py)."""
        return self.hopper and self.dtype == torch.float16 and self.call.p == 2 and not self.scaled

    @cached_property
    def scale_exponent(self) -> int:
        """How many times the scale of scores is doubled for it to be from 0.5 to 1, where operands are scaled."""
        return -math.frexp(self.call.scale)[1]

    @cached_property
    def scaled_shape(self) -> LaunchShape:
        """The shape of the same call over scaled operands."""
        call = replace(self.call, scale=math.ldexp(self.call.scale, self.scale_exponent))
        return replace(self, call=call, scaled=True)

    @staticmethod
    def of(call: CallShape, inputs: Inputs) -> LaunchShape:
        """Return the shape of a call with what these kernels need beside it."""
        dtype, device = inputs.q.dtype, inputs.q.device
        return LaunchShape(call, inputs.sequences, dtype, family(device), uses_hopper(call, dtype, device))

    # Cached, and a call's shape with it (launch_shape): every launch reads some of them.
    @cached_property
    def chunk_slots(self) -> int:
        """Places for chunks: exact for rows of one length, enough for packed sequences of any lengths."""
        call = self.call
        if self.sequences == call.batch:
            return call.batch * -(-call.tokens // call.chunk_size)
        return call.tokens // call.chunk_size + self.sequences

    def blocks(self, kernel: str) -> Blocks:
        """Return the blocks of "scan", "output", "queries" or "keys", no longer than a chunk."""
        found = self._blocks.get(kernel)
        if found is None:
            call = self.call
            found = blocks(kernel, self.arch, call.p, call.head_dim, call.v_head_dim, self.dtype)
            if self.overwrites and kernel == "output" and self.dtype == torch.float16:
                found = replace(found, stages=1)
            found = self._blocks[kernel] = found.within(call.chunk_size)
        return found

    @cached_property
    def overwrites(self) -> bool:
        """Whether Triton may overwrite operands of products in loops whose loads are pipelined (support.py)."""
        return overwrites(triton_version() or "", self.arch)

    @cached_property
    def tapes(self) -> dict[Any, Any]:
        """What replay.py remembers of calls of this shape, on the one device that `launch_shape` made it for."""
        return {}

    @cached_property
    def _blocks(self) -> dict[str, Blocks]:
        return {}

    @cached_property
    def scan_steps(self) -> int:
        """Steps of phi that one program of the scan owns."""
        return 1 if self.call.p == 1 or self.hopper else self.blocks("scan").steps

    @cached_property
    def rows(self) -> int:
        """Rows of phi, padded to what one program of the scan owns."""
        width, p = self.phi_width, self.call.p
        return step_rows(width, p) * step_count(width, p, self.scan_steps)

    def has_states(self, has_start: bool, want_end: bool) -> bool:
        """Whether there is any state to compute or to query: not where each sequence is one chunk and starts empty."""
        dense = self.sequences == self.call.batch
        return has_start or want_end or not dense or self.call.tokens > self.call.chunk_size

    def constants(self) -> dict[str, Any]:
        """Return the constants that all kernels over chunks take. They are the same dict every time: not to change."""
        return self._constants

    @cached_property
    def _constants(self) -> dict[str, Any]:
        call = self.call
        operand_type, precision, _ = operand(self.dtype)
        return {
            "K": call.head_dim,
            "V": call.v_head_dim,
            "P": call.p,
            "BK": power_of_two(call.head_dim),
            "BV": power_of_two(call.v_head_dim),
            "REPEATS": call.heads_per_kv_head,
            "NORMALIZE": call.normalize,
            "OPERAND": operand_type,
            "PRECISION": precision,
        }


def uses_hopper(call: CallShape, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels of hopper/ take a call: its dtype, degree and head dims, on a GPU that runs them.

    Those that no GPU has run are taken under POWERPLAN_HOPPER=all only.
    """
    untried = takes_untried()
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "")
    fits = hopper_takes(call.p, call.head_dim, call.v_head_dim, untried, name)
    return fits and hopper_lacking(device) is None


def launch_shape(call: CallShape, inputs: Inputs) -> LaunchShape:
    """Return `LaunchShape.of`, the same one for every call of one shape. Sizes that are traced are no keys."""
    return _launch_shape(call, inputs.sequences, inputs.q.dtype, inputs.q.device)


@lru_cache(maxsize=1024)
def _launch_shape(call: CallShape, sequences: int, dtype: torch.dtype, device: torch.device) -> LaunchShape:
    return LaunchShape(call, sequences, dtype, family(device), uses_hopper(call, dtype, device))


@dataclass(frozen=True)
class ChunkTable:
    """Where chunks and sequences begin, when all sequences lie end to end.

    Attributes:
        chunks: [slots, 4] int64: the first token of a chunk, its last token + 1, and whether it is the first and the
            last chunk of its sequence. Slots beyond the last chunk have no tokens.
        first_chunk: [N + 1] int64: the first chunk of each sequence, and the number of chunks.
    """

    chunks: Tensor
    first_chunk: Tensor


def chunk_table(bounds: Tensor, chunk_size: int, slots: int) -> ChunkTable:
    """Return the chunks of sequences bounds[i] : bounds[i + 1]. No value is read back from the device."""
    bounds = bounds.long()
    counts = (bounds[1:] - bounds[:-1] + chunk_size - 1) // chunk_size
    first_chunk = torch.cat((counts.new_zeros(1), counts.cumsum(0)))
    index = torch.arange(slots, device=bounds.device)
    sequence = torch.searchsorted(first_chunk[1:].contiguous(), index, right=True).clamp(max=len(counts) - 1)
    within = index - first_chunk[sequence]
    start = bounds[sequence] + within * chunk_size
    stop = torch.minimum(start + chunk_size, bounds[sequence + 1])
    used = index < first_chunk[-1]
    table = torch.stack((start, stop, (within == 0).long(), (within == counts[sequence] - 1).long()), 1)
    return ChunkTable(torch.where(used[:, None], table, torch.zeros_like(table)), first_chunk)


@lru_cache(maxsize=64)
def each_chunk(slots: int, device: torch.device) -> Tensor:
    """Return `ChunkTable.first_chunk` as if every slot were a sequence of its own, [slots + 1] int64."""
    made = torch.arange(slots + 1, device=device)
    settle(device)
    return made


@lru_cache(maxsize=64)
def dense_chunk_table(batch: int, tokens: int, chunk_size: int, slots: int, device: torch.device) -> ChunkTable:
    """Return the chunks of rows of one length. Cached: making it takes a dozen small kernels."""
    made = chunk_table(torch.arange(batch + 1, device=device) * tokens, chunk_size, slots)
    settle(device)
    return made


def saved_states(
    shape: LaunchShape, save_states: bool, has_start: bool, want_end: bool, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Return tensors of the sizes of the states and keys saved for the backward pass; empty if they are not saved."""
    slots = shape.chunk_slots if shape.has_states(has_start, want_end) else 0
    size = (slots, shape.call.kv_heads)
    states = like.new_empty((*size, shape.rows, shape.stored_columns) if save_states else (0,), dtype=shape.state_dtype)
    keys = (*size, *shape.key_size) if save_states and shape.call.normalize else (0,)
    return states, like.new_empty(keys, dtype=shape.key_dtype)


def tokens_first(x: Tensor) -> Tensor:
    """[B, T, heads, dim] -> [tokens, heads, dim] with adjacent features; copies only where strides ask for it."""
    flat = x.flatten(0, 1)
    return flat if flat.stride(2) == 1 or flat.shape[2] == 1 else flat.contiguous()
