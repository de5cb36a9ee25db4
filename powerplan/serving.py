"""Serving: what one decoding step reads and writes, what memory holds, how many sequences fit, what a prompt costs.

Every time is a roofline, max(FLOPs / peak, bytes / bandwidth), at the device's dense bf16 rate; several devices share
work and memory evenly, and talk to each other for nothing. No engine reaches it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

from powerplan.accounting import Accounting
from powerplan.caches.checkpoints import Checkpoints, checkpoints_of
from powerplan.caches.pages import Allocation, allocation
from powerplan.caches.policy import Policy, prefill_state_flops
from powerplan.caches.prefill import PrefillMemory, prefill_memory
from powerplan.dtypes import Dtypes, dtypes_of
from powerplan.entries import fetched_bytes, host_bytes, touched_bytes, unread_bytes
from powerplan.errors import InputError, parameter
from powerplan.hardware import Device, peak_of, several, si_value
from powerplan.mixers.formulas import total
from powerplan.swap import with_mixer

MAX_BATCH = 65_536
"""Largest batch accepted: the expected number of experts is an exact fraction, whose digits grow with the batch."""


@dataclass(frozen=True)
class Step:
    """One decoding step: every sequence of the batch gets one token. Bytes and FLOPs of the whole batch.

    fetched_bytes: weights that come from the host, which are among weight_bytes too. cache_bytes: keys and values read,
    and one entry appended. recurrent_bytes: recurrent state and the inputs of short convolutions, read and written.
    memory_bytes: all weights but those on the host, and the state and the checkpoints of the batch. seconds: the time
    of the step, and so of one token of each sequence, None without a device. fits: whether memory_bytes are there.
    """

    batch: int
    weight_bytes: Fraction
    fetched_bytes: Fraction
    cache_bytes: Fraction
    recurrent_bytes: Fraction
    flops: Fraction
    memory_bytes: Fraction
    seconds: Fraction | None
    compute_bound: bool | None
    fits: bool | None

    @property
    def moved_bytes(self) -> Fraction:
        return self.weight_bytes + self.cache_bytes + self.recurrent_bytes

    @property
    def tokens_per_s(self) -> Fraction | None:
        return None if self.seconds is None else self.batch / self.seconds


@dataclass(frozen=True)
class Fleet:
    """Devices of one kind that serve a model together."""

    device: Device
    count: int = 1

    @property
    def name(self) -> str:
        """The device's name, and how many there are of it."""
        return several(self.count, self.device.name)

    @property
    def memory_of_one(self) -> int:
        """Bytes of one device."""
        return int(si_value(self.device, "memory_gb") or 0)

    @property
    def memory(self) -> int:
        """Bytes of all of them."""
        return self.count * self.memory_of_one

    def seconds(self, flops: Fraction, moved: Fraction | int) -> Fraction:
        """Return the roofline time of work that is shared evenly."""
        return peak_of(self.device).roofline_s(flops, Fraction(moved)) / self.count


class Serving:
    """A model that is served at one context, in the convention of its accounting (the LM head always counts).

    row: the numbers of the model at the context, as if its caches kept every token; what is served follows `policy`.
    """

    def __init__(
        self,
        accounting: Accounting,
        context: int,
        dtypes: Dtypes | str = "bf16",
        fleet: Fleet | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.accounting, self.context, self.dtypes, self.fleet = accounting, context, dtypes_of(dtypes), fleet
        self.policy = policy or Policy()
        self.row = accounting.row(context, self.dtypes)
        self.width = self.dtypes.cache_bytes
        # Mixers, how many tokens each keeps of the sequence, and in how many layers it stands.
        self._mixers = [
            (mixer, self.policy.tokens(mixer, context), count) for mixer, count in accounting.spec.mixer_counts()
        ]

    @cached_property
    def stored_bytes(self) -> Fraction:
        """Bytes of all weights, all experts among them, wherever they live."""
        return self.accounting.stored_bytes(self.dtypes)

    @cached_property
    def host_bytes(self) -> Fraction:
        """Bytes of those weights that live in the memory of the host."""
        return host_bytes(self.accounting, self.dtypes)

    @property
    def device_bytes(self) -> Fraction:
        """Bytes of all other weights: those that take memory of devices."""
        return self.stored_bytes - self.host_bytes

    @cached_property
    def cache_bytes(self) -> Fraction:
        """Bytes of one sequence's key/value cache at the context."""
        return self.width * sum(mixer.state_size(tokens).cache * count for mixer, tokens, count in self._mixers)

    @property
    def whole_cache_bytes(self) -> Fraction:
        """Bytes that the cache would take if nothing were evicted from it."""
        return self.row.state_bytes - self.recurrent_bytes

    @cached_property
    def state_bytes(self) -> Fraction:
        """Bytes of one sequence's cache and recurrent state."""
        widths = self.width, self.dtypes.state_bytes
        return sum((mixer.state_bytes(tokens, *widths) * count for mixer, tokens, count in self._mixers), Fraction(0))

    @property
    def recurrent_bytes(self) -> Fraction:
        """Bytes of one sequence's state of constant size: recurrent state, and inputs of short convolutions."""
        return self.state_bytes - self.cache_bytes

    @cached_property
    def checkpoints(self) -> Checkpoints | None:
        """The checkpoints of one sequence; None where none are asked for."""
        every = self.policy.checkpoint_every
        return None if every is None else checkpoints_of(self.accounting, self.context, self.dtypes, every)

    @property
    def sequence_bytes(self) -> Fraction:
        """Bytes of one sequence: cache, recurrent state and checkpoints."""
        return self.state_bytes + (self.checkpoints.bytes if self.checkpoints else 0)

    @cached_property
    def allocation(self) -> Allocation | None:
        """What one sequence is given of memory; None where no engine and no page was named.

        Raises InputError where it is not known how the engine pages a cache of the model.
        """
        if not self.policy.allocates:
            return None
        return allocation(self.accounting.spec, self.context, self.dtypes, self.policy)

    @cached_property
    def prefill_memory(self) -> PrefillMemory:
        """What one prompt of the context's length takes beside the weights while it is read."""
        return prefill_memory(self.accounting, self.context, self.dtypes, self.policy)

    def unchunked(self) -> Serving:
        """Return the same with prompts that are read whole."""
        return Serving(self.accounting, self.context, self.dtypes, self.fleet, replace(self.policy, prefill_chunk=None))

    @property
    def prefill_bytes(self) -> Fraction:
        """Bytes of the weights and of that."""
        return self.device_bytes + self.prefill_memory.bytes

    @cached_property
    def cache_bytes_per_token(self) -> Fraction:
        """Bytes that one more token adds to the cache, while no window and no budget is full."""
        return self.width * sum(mixer.state_size(tokens).entry * count for mixer, tokens, count in self._mixers)

    @property
    def head_flops(self) -> int:
        return 2 * int(total(self.accounting.spec.head_terms()))

    @property
    def _body_flops(self) -> int:
        """Weight FLOPs per token without the LM head."""
        return self.row.weight_flops_per_token - (self.head_flops if self.accounting.convention.lm_head else 0)

    @cached_property
    def prefill_flops(self) -> Fraction:
        """FLOPs to read a prompt of the context's length: the LM head for its last token only."""
        state = prefill_state_flops(self.accounting, self.context, self.policy)
        return self.context * self._body_flops + state + self.head_flops

    @property
    def prefill_seconds(self) -> Fraction | None:
        """Roofline time of that at batch 1; None without a device.

        All weights are read once for every chunk of the prompt, of tables and memories the rows that a chunk has tokens
        for, and the state is written once.
        """
        chunk = self.policy.prefill_tokens(self.context)
        weights = self.stored_bytes - unread_bytes(self.accounting, self.dtypes, chunk)
        moved = self.prefill_memory.chunks * weights + self.state_bytes
        return self.fleet.seconds(self.prefill_flops, moved) if self.fleet else None

    @property
    def prompt_fits(self) -> bool | None:
        """Whether the weights and one prompt fit while it is read, shared evenly by devices; None without a device."""
        return None if self.fleet is None else self.prefill_bytes <= self.fleet.memory

    @cached_property
    def resumed_flops(self) -> Fraction | None:
        """FLOPs to read a prompt that begins with the whole of an earlier one; None without checkpoints.

        The tokens behind the last checkpoint, and the LM head for the last of them.
        """
        if self.checkpoints is None:
            return None
        whole = Policy()
        done = self.checkpoints.resumed
        saved = done * self._body_flops + (prefill_state_flops(self.accounting, done, whole) if done else 0)
        return self.prefill_flops - saved

    @property
    def resumed_seconds(self) -> Fraction | None:
        """Roofline time of that, all weights and the state moved once; None without a device or without checkpoints."""
        if self.fleet is None or self.resumed_flops is None:
            return None
        behind = self.context - (self.checkpoints.resumed if self.checkpoints else 0)
        weights = self.stored_bytes - unread_bytes(self.accounting, self.dtypes, behind)
        return self.fleet.seconds(self.resumed_flops, weights + self.state_bytes)

    @property
    def largest_batch(self) -> int | None:
        """Sequences whose state fits beside the weights, if any; None without a device, or without a state."""
        return self._fitting(self.sequence_bytes)

    @property
    def least_devices(self) -> int | None:
        """Devices of the fleet's kind that hold the weights and one sequence together; None without a device."""
        if self.fleet is None:
            return None
        return -int(-(self.device_bytes + self.sequence_bytes) // self.fleet.memory_of_one)

    @property
    def largest_allocated_batch(self) -> int | None:
        """The same with what each sequence is allocated, and its checkpoints; None also where nothing is allocated."""
        if self.allocation is None:
            return None
        return self._fitting(self.allocation.bytes + self.sequence_bytes - self.state_bytes)

    def _fitting(self, each: Fraction) -> int | None:
        if self.fleet is None or not each:
            return None
        return max(0, int((self.fleet.memory - self.device_bytes) // each))

    def weight_bytes(self, batch: int) -> Fraction:
        """Return the bytes of weights that one step reads: all but the input embedding, of experts those touched."""
        return self.row.decode_weight_bytes_per_token + touched_bytes(self.accounting, self.dtypes, batch)

    def fetched_bytes(self, batch: int) -> Fraction:
        """Return the bytes of weights that one step fetches over the host link: those it touches of what is there.

        They are among `weight_bytes`, as a device reads them too once they came. No time counts for the link.
        """
        return fetched_bytes(self.accounting, self.dtypes, batch)

    def step(self, batch: int) -> Step:
        """Return what one decoding step of 1 to MAX_BATCH sequences takes, each at the context's last token."""
        if not 1 <= batch <= MAX_BATCH:
            raise InputError(f"a batch is 1 to {MAX_BATCH:,} sequences, and is {batch}")
        fleet, widths = self.fleet, (self.width, self.dtypes.state_bytes)
        mixers = [(mixer, self.policy.position(mixer, self.context), count) for mixer, _, count in self._mixers]
        cache = sum((mixer.decode_cache_bytes(at, self.width) * count for mixer, at, count in mixers), Fraction(0))
        read = sum((mixer.decode_bytes(at, *widths) * count for mixer, at, count in mixers), Fraction(0))
        state = sum((total(mixer.decode_flops_terms(at)) * count for mixer, at, count in mixers), Fraction(0))
        flops = Fraction(batch * (self._body_flops + self.head_flops + state))
        weights = self.weight_bytes(batch)
        moved = weights + batch * read
        memory = self.device_bytes + batch * self.sequence_bytes
        return Step(
            batch=batch,
            weight_bytes=weights,
            fetched_bytes=self.fetched_bytes(batch),
            cache_bytes=batch * cache,
            recurrent_bytes=batch * (read - cache),
            flops=flops,
            memory_bytes=memory,
            seconds=fleet.seconds(flops, moved) if fleet else None,
            compute_bound=fleet.seconds(flops, 0) > fleet.seconds(Fraction(0), moved) if fleet else None,
            fits=memory <= fleet.memory if fleet else None,
        )


def twin(accounting: Accounting, kind: str) -> tuple[Accounting, list[str]]:
    """Return the model with `kind`, mla or attention, in every layer, and remarks; like the layers of it that it has.

    Raises InputError for a model that is its own twin, or has no mixers.
    """
    spec, where = accounting.spec, f"{parameter('twin')} {kind}"
    if not spec.mixers():
        raise InputError(f"{spec.name} has no sequence mixers", where)
    other, remarks = with_mixer(spec, kind)
    if other.layers == spec.layers:  # Not so where they are all of that kind, but some have windows.
        raise InputError(f"{spec.name} has {kind} in every layer already", where)
    return Accounting(other, accounting.convention), remarks
