"""ContextParallel: how sequences lie on the ranks of a process group, and how their states are handed over."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from powerplan.dims import spow_dim
from powerplan.kernels import checks
from powerplan.kernels.checks import is_integer, shown
from powerplan.kernels.distributed.agreement import Agreement
from powerplan.kernels.distributed.exchange import Wire
from powerplan.kernels.distributed.layout import LAYOUTS, Fragment, Layout, Range, make_layout, named_ranges
from powerplan.kernels.state import PowerState

if TYPE_CHECKING:
    from powerplan.kernels.distributed.attention import Started
    from powerplan.kernels.distributed.halo import Halo

EXCHANGES = ("auto", "gather", "scan")
"""The ways to hand states over."""

TRANSITIONS = ("head", "feature", "matrix")
"""What a part of a sequence multiplies a state by: one number a head, one for each feature of its keys, or a matrix."""

MOST_RANKS_OF_A_GATHER = 8
"""The most ranks for which "auto" gathers: those of one node.

A gather is one collective, and its memory and traffic are a state for each rank. A scan takes as many rounds as the
number of ranks has binary digits, one after another, and a state for each.
"""


class ContextParallel:
    """How sequences lie on the ranks of a process group: made once for a batch, the same on every rank.

    Each rank calls `power_attention(q, k, v, log_g, cp=plan)` with its own tokens, and gets their outputs. Every rank
    must make the call, and go backward through it, where it has no tokens too.

    Attributes:
        group: The process group.
        rank: This rank in the group.
        ranks: How many ranks the group has.
        layout: Which rank holds which tokens.
        exchange: "gather" or "scan".
        exchange_dtype: The dtype of states on the wire; None for their own.
        packed: Whether sequences lie end to end in one row (cu_seqlens).
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | None = None,
        *,
        tokens: int | None = None,
        cu_seqlens: Tensor | Sequence[int] | None = None,
        layout: str | Sequence[Sequence[Range]] = "contiguous",
        exchange: str = "auto",
        exchange_dtype: torch.dtype | None = None,
        check: bool = True,
    ) -> None:
        """Make a plan. Every rank of the group does so at the same time, as they compare their plans.

        Args:
            group: A process group, a DeviceMesh of one dim (`mesh["cp"]`), or None for all processes.
            tokens: Tokens of a row of the batch, where each row is one sequence.
            cu_seqlens: [N + 1] integers, rising from 0: where N sequences begin and end that lie end to end in the one
                row of the batch, over all ranks. Either `tokens` or `cu_seqlens` is given.
            layout: "contiguous": rank i has the i-th of equal parts. "zigzag": rank i has the i-th of twice as many
                from the front, and then the i-th from the back, as ring attention wants it for even work. Or for each
                rank the ranges of tokens that it has, in its order: [[(0, 5)], [], [(5, 12)]]. Parts need not be equal,
                nor end where sequences do, and a rank may have no tokens.
            exchange: "gather" (each rank gets the states of all, in one collective), "scan" (states are summed from
                rank to rank, in about log2(ranks) rounds), or "auto": gather for up to 8 ranks, else scan.
            exchange_dtype: torch.bfloat16 halves the bytes of float32 states, which are then rounded on the wire, and
                so are the matrices of delta rules. Sums stay in the state's dtype. None sends them as they are.
            check: Whether ranks compare their plans here, and their arguments at the first call of a kind: one small
                collective each. Without, ranks that differ wait for each other until the group's timeout; and for a
                scan over NCCL the group must have had another collective before.

        Raises:
            ValueError: An argument has a value that is not allowed, or ranks have made different plans. The message
                names the argument and, where ranks differ, which.
            TypeError: An argument has a type that is not allowed.
            RuntimeError: torch.distributed is not initialised.
        """
        self.group = _group_of(group)
        self.rank, self.ranks = dist.get_rank(self.group), dist.get_world_size(self.group)
        if self.rank < 0:
            raise ValueError("group does not have this process as a member")
        checks.check_flag("check", check)
        self.agreement = Agreement(self.group, self.rank, self.ranks, check)
        with self.agreement.of_errors("the plans"):
            self.packed = cu_seqlens is not None
            bounds = _bounds(tokens, cu_seqlens)
            self.layout = _layout(layout, bounds, self.ranks)
            if not isinstance(exchange, str) or exchange not in EXCHANGES:
                raise ValueError(f"exchange must be {', '.join(EXCHANGES)}, and is {shown(exchange)}")
            if exchange == "auto":
                exchange = "gather" if self.ranks <= MOST_RANKS_OF_A_GATHER else "scan"
            if exchange_dtype not in (None, torch.bfloat16):
                raise ValueError(f"exchange_dtype must be None or torch.bfloat16, and is {exchange_dtype}")
        self.exchange, self.exchange_dtype = exchange, exchange_dtype
        self.wire = Wire(self.group, self.rank, self.layout, exchange, exchange_dtype)
        self._halos: dict[int, Halo] = {}
        self.agreement.on(
            "the plans",
            {
                "cu_seqlens" if self.packed else "tokens": bounds if self.packed else bounds[-1],
                "layout": self.layout.ranges,
                "exchange": exchange,
                "exchange_dtype": str(exchange_dtype),
            },
        )

    def __repr__(self) -> str:
        kind = f"{self.layout.sequences} packed sequences" if self.packed else "sequences"
        return (
            f"ContextParallel(rank {self.rank} of {self.ranks}, {self.local_tokens:,} of {self.layout.tokens:,} tokens "
            f"of {kind}, exchange={self.exchange!r})"
        )

    @property
    def local_tokens(self) -> int:
        """Tokens of this rank, of each row of the batch."""
        return sum(stop - start for start, stop in self.layout.ranges[self.rank])

    @property
    def fragments(self) -> list[Fragment]:
        """The fragments of this rank, in the order of its tokens."""
        return [self.layout.fragments[index] for index in self.layout.of_rank(self.rank)]

    def parts(self) -> list[tuple[slice, int, int]]:
        """Return this rank's tokens by parts of sequences: which they are, the place of the first one in its sequence,
        and the tokens of that sequence."""
        found = []
        for fragment in self.fragments:
            for piece in fragment.pieces:
                start, stop = self.layout.bounds[piece.sequence : piece.sequence + 2]
                found.append((fragment.local(piece), piece.start - start, stop - start))
        return found

    def token_ids(self, device: torch.device | str | None = None) -> Tensor:
        """Return which tokens this rank has, [local tokens] int64: token i of its tensors is this one of the whole."""
        ranges = self.layout.ranges[self.rank] or ((0, 0),)
        return torch.cat([torch.arange(start, stop, device=device) for start, stop in ranges])

    def positions(self, device: torch.device | str | None = None) -> Tensor:
        """Return the places of this rank's tokens within their sequences, [local tokens] int64, from 0: for RoPE."""
        ids = self.token_ids(device)
        bounds = torch.tensor(self.layout.bounds, device=ids.device)
        return ids - bounds[torch.searchsorted(bounds, ids, right=True) - 1]

    def cu_seqlens(self, device: torch.device | str | None = None) -> Tensor:
        """Return where pieces of sequences begin and end in this rank's tokens, [pieces + 1] int32."""
        ends = [fragment.local(piece).stop for fragment in self.fragments for piece in fragment.pieces]
        return torch.tensor([0, *ends], dtype=torch.int32, device=device)

    def shard(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return this rank's tokens of a tensor that holds all, along `dim`; gradients go through.

        Raises:
            ValueError: The tensor has not as many tokens as the plan.
        """
        _check_dim(x, self.layout.tokens, dim)
        ranges = self.layout.ranges[self.rank] or ((0, 0),)
        return torch.cat([x.narrow(dim, start, stop - start) for start, stop in ranges], dim)

    def unshard(self, x: Tensor, dim: int = 1) -> Tensor:
        """Return all tokens, on every rank, of a tensor of which each rank has its own, along `dim`; no gradients.

        Every rank must call it. It is for outputs that are looked at: no call of `power_attention` needs it.

        Raises:
            ValueError: The tensor has not as many tokens as this rank has by the plan.
        """
        _check_dim(x, self.local_tokens, dim)
        from powerplan.kernels.distributed.gather import gathered

        return gathered(self, x.detach().movedim(dim, 0)).movedim(0, dim)

    def exchanged_bytes(
        self,
        kv_heads: int,
        head_dim: int,
        v_head_dim: int | None = None,
        *,
        p: int = 2,
        normalize: bool = True,
        gated: bool = True,
        transition: str = "head",
        batch: int = 1,
        return_state: bool = False,
        backward: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> int:
        """Return the bytes that this rank hands to torch.distributed in one call: they do not depend on the tokens.

        A gather delivers them to each of the other ranks, and a scan to one; `return_state` sums over all ranks. Mixers
        of `powerplan.models` with another state than power attention exchange that of p = 1 without a normaliser.

        Args:
            kv_heads: G, key/value heads.
            head_dim: K, dimension of a key.
            v_head_dim: V, dimension of a value; None for K.
            p: Degree.
            normalize: Whether the attention is normalised.
            gated: Whether there are gates, or other transitions.
            transition: What tokens multiply a state by: "head", one number a head (power attention); "feature", one for
                each feature of its keys (GLA); or "matrix", K x K numbers (delta rules). docs/distributed.md says what
                heads and features are those of other kinds.
            batch: B, rows of the batch.
            return_state: Whether final states are wanted, or in the backward pass have gradients.
            backward: Whether to count the backward pass instead of the forward pass.
            dtype: Of the states: torch.float32, or torch.float64 for inputs in float64.

        Raises:
            ValueError: A count is not an integer of at least 1, or there is no such degree or transition.
        """
        checks.check_count("kv_heads", kv_heads)
        checks.check_count("head_dim", head_dim)
        checks.check_count("v_head_dim", head_dim if v_head_dim is None else v_head_dim)
        checks.check_count("batch", batch)
        checks.check_settings(p, None, None)
        if transition not in TRANSITIONS:
            raise ValueError(f"transition must be {', '.join(TRANSITIONS)}, and is {shown(transition)}")
        columns = (head_dim if v_head_dim is None else v_head_dim) + int(normalize)
        size = (batch, kv_heads, spow_dim(head_dim, p), columns)
        beside = {"head": (1, 1), "feature": (size[2], 1), "matrix": (size[2], size[2])}[transition]
        sent = self.wire.messages(backward) * self.wire.message_bytes(size, gated, dtype, beside)
        if return_state:
            rows = self.layout.sequences if self.packed else batch
            sent += rows * kv_heads * size[2] * columns * dtype.itemsize
        return sent

    def halo(self, tokens: int) -> Halo:
        """Return which tokens stand before this rank's fragments in their sequences, up to `tokens` of each, and what
        it takes to bring them here: `halo(n).sent_bytes(features, itemsize)`.

        Raises:
            ValueError: `tokens` is not an integer of at least 0.
        """
        checks.check_count("tokens", tokens, 0)
        from powerplan.kernels.distributed.halo import Halo

        if tokens not in self._halos:
            self._halos[tokens] = Halo(self.layout, self.rank, tokens)
        return self._halos[tokens]

    def start(
        self,
        k: Tensor,
        v: Tensor,
        log_g: Tensor | None = None,
        *,
        p: int = 2,
        chunk_size: int | None = None,
        normalize: bool = True,
        initial_state: PowerState | None = None,
        impl: str = "auto",
    ) -> Started:
        """Compute this rank's states and send them, and return while they are under way.

        What it returns takes the plan's place: `power_attention(q, k, v, log_g, cp=started)`, with the same arguments.
        What happens between the two calls overlaps with the exchange, and its backward pass with that of the backward
        pass: queries, for example, are projected after the exchange of states was started.

        Args, raises: as `power_attention` with `cp`.
        """
        from powerplan.kernels.distributed.attention import start

        started: Started = start(self, k, v, log_g, p, chunk_size, normalize, initial_state, impl)
        return started


def _group_of(group: object) -> dist.ProcessGroup:
    if not dist.is_initialized():
        raise RuntimeError(
            "context parallelism needs a process group: start the script with torchrun, and call "
            "torch.distributed.init_process_group() first"
        )
    if group is None:
        group = dist.group.WORLD
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            names = ", ".join(group.mesh_dim_names or ()) or "without names"
            raise ValueError(
                f"a DeviceMesh must have one dim, as mesh['cp'] has, and this one has {group.ndim}: {names}"
            )
        group = group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group does not have this process as a member")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group must be a ProcessGroup, a DeviceMesh or None, and is {shown(group)}")
    return group


def _check_dim(x: Tensor, tokens: int, dim: int) -> None:
    checks.check_tensor("x", x)
    if not is_integer(dim) or not -x.ndim <= dim < x.ndim or x.shape[dim] != tokens:
        raise ValueError(f"x must have {tokens} tokens in dim {shown(dim)}, and has shape {list(x.shape)}")


def _plain(value: Any) -> Any:
    """Return what is a tensor, or an array or a number of numpy, as a list or a number of Python; all else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _bounds(tokens: int | None, cu_seqlens: Tensor | Sequence[int] | None) -> tuple[int, ...]:
    """Return where sequences begin and end, from what is given of the two."""
    tokens = _plain(tokens)
    if tokens is not None and cu_seqlens is None:
        checks.check_count("tokens", tokens)
        return 0, tokens
    if tokens is not None or cu_seqlens is None:
        fault = "none of the two is" if tokens is None else "both are"
        raise ValueError(
            f"give tokens (of a row that is one sequence) or cu_seqlens (of packed sequences): {fault} given"
        )
    given = _plain(cu_seqlens)
    given = list(map(_plain, given)) if isinstance(given, Sequence) else ()
    if len(given) < 2 or not all(map(is_integer, given)):
        raise ValueError(f"cu_seqlens must be at least 2 integers in one dim, and is {shown(cu_seqlens)}")
    if given[0] != 0:
        raise ValueError(f"cu_seqlens must rise from 0, and begins with {given[0]}")
    falls = next((index for index, (start, stop) in enumerate(pairwise(given)) if stop <= start), None)
    if falls is not None:
        raise ValueError(f"cu_seqlens must rise, and has {given[falls + 1]} after {given[falls]} (entry {falls + 1})")
    return tuple(given)


def _layout(layout: object, bounds: tuple[int, ...], ranks: int) -> Layout:
    if isinstance(layout, str):
        if layout not in LAYOUTS:
            raise ValueError(f"layout must be {', '.join(LAYOUTS)}, or the ranges of each rank, and is {shown(layout)}")
        return make_layout(bounds, named_ranges(layout, bounds[-1], ranks))
    if not isinstance(layout, Sequence) or not all(map(_are_ranges, layout)):
        raise TypeError("layout must be a name, or for each rank a list of ranges (start, stop) of its tokens")
    if len(layout) != ranks:
        raise ValueError(f"layout must have ranges for each of the {ranks} ranks, and has them for {len(layout)}")
    return make_layout(bounds, layout)


def _are_ranges(own: object) -> bool:
    return isinstance(own, Sequence) and all(
        isinstance(one, Sequence) and len(one) == 2 and all(map(is_integer, one)) for one in own
    )
