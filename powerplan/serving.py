"""Serving: what one decoding step reads and writes, what memory holds, how many sequences fit, what a prompt costs.

Every time is a roofline, max(FLOPs / peak, bytes / bandwidth), at the device's dense bf16 rate; several devices share
work and memory evenly, and talk to each other for nothing. No engine reaches it.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from powerplan.accounting import Accounting
from powerplan.dtypes import Dtypes, dtypes_of
from powerplan.entries import fetched_bytes, host_bytes, touched_bytes, unread_bytes
from powerplan.errors import InputError, parameter
from powerplan.hardware import Device, peak_of, si_value
from powerplan.mixers.formulas import total
from powerplan.swap import with_mixer

MAX_BATCH = 65_536
"""Largest batch accepted: the expected number of experts is an exact fraction, whose digits grow with the batch."""


@dataclass(frozen=True)
class Step:
    """One decoding step: every sequence of the batch gets one token. Bytes and FLOPs of the whole batch.

    fetched_bytes: weights that come from the host, which are among weight_bytes too. cache_bytes: keys and values read,
    and one entry appended. recurrent_bytes: recurrent state and the inputs of short convolutions, read and written.
    memory_bytes: all weights but those on the host, and the state of the batch. seconds: the time of the step, and so
    of one token of each sequence, None without a device. fits: whether memory_bytes are there.
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
    def memory(self) -> int:
        """Bytes of all of them."""
        return self.count * int(si_value(self.device, "memory_gb") or 0)

    def seconds(self, flops: Fraction, moved: Fraction | int) -> Fraction:
        """Return the roofline time of work that is shared evenly."""
        return peak_of(self.device).roofline_s(flops, Fraction(moved)) / self.count


class Serving:
    """A model that is served at one context, in the convention of its accounting (the LM head always counts)."""

    def __init__(
        self, accounting: Accounting, context: int, dtypes: Dtypes | str = "bf16", fleet: Fleet | None = None
    ) -> None:
        self.accounting, self.context, self.dtypes, self.fleet = accounting, context, dtypes_of(dtypes), fleet
        self.row = accounting.row(context, self.dtypes)
        self.width = self.dtypes.cache_bytes
        self._mixers = accounting.spec.mixer_counts()

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
        return self.width * sum(mixer.state_size(self.context).cache * count for mixer, count in self._mixers)

    @property
    def recurrent_bytes(self) -> Fraction:
        """Bytes of one sequence's state of constant size: recurrent state, and inputs of short convolutions."""
        return self.row.state_bytes - self.cache_bytes

    @cached_property
    def cache_bytes_per_token(self) -> Fraction:
        """Bytes that one more token adds to the cache, while no window is full."""
        return self.width * sum(mixer.state_size(self.context).entry * count for mixer, count in self._mixers)

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
        return self.context * (self._body_flops + self.row.state_flops_per_token) + self.head_flops

    @property
    def prefill_seconds(self) -> Fraction | None:
        """Roofline time of that at batch 1, all weights read and the state written once; None without a device.

        Of tables and memories, the rows that the prompt has tokens for.
        """
        moved = self.stored_bytes - unread_bytes(self.accounting, self.dtypes, self.context) + self.row.state_bytes
        return self.fleet.seconds(self.prefill_flops, moved) if self.fleet else None

    @property
    def largest_batch(self) -> int | None:
        """Sequences whose state fits beside the weights, if any; None without a device, or without a state."""
        if self.fleet is None or not self.row.state_bytes:
            return None
        return max(0, int((self.fleet.memory - self.device_bytes) // self.row.state_bytes))

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
        at, fleet, mixers = self.context, self.fleet, self._mixers
        cache = sum((mixer.decode_cache_bytes(at, self.width) * count for mixer, count in mixers), Fraction(0))
        state = sum((total(mixer.decode_flops_terms(at)) * count for mixer, count in mixers), Fraction(0))
        flops = Fraction(batch * (self._body_flops + self.head_flops + state))
        weights = self.weight_bytes(batch)
        moved = weights + batch * self.row.decode_state_bytes_per_token
        memory = self.device_bytes + batch * self.row.state_bytes
        return Step(
            batch=batch,
            weight_bytes=weights,
            fetched_bytes=self.fetched_bytes(batch),
            cache_bytes=batch * cache,
            recurrent_bytes=batch * (self.row.decode_state_bytes_per_token - cache),
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
