"""How devices that share a sequence pass on what each layer needs of other parts of it: ways, bytes and seconds.

Keys and values go around a ring (Liu et al. 2023, arXiv 2310.01889, section 3.1), which sends while it computes, or
heads are exchanged all to all (Ulysses, Jacobs et al. 2023, arXiv 2309.14509, section 3.1), which cannot hide; latents
are gathered where that is less than the heads. A window needs the last keys and values of the devices before, and a
short convolution their last inputs: a halo. A state is gathered from all devices (LASP-2, Sun et al. 2025, arXiv
2502.07563) or summed on the way in rounds that reach twice as far each (a scan, Hillis and Steele 1986), as
powerplan.kernels does both.

A ring needs even work behind a causal mask: each device then has a part from the front and one from the back (zigzag),
and all layers of the model with it. States and halos are passed on for each part.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache
from math import gcd, lcm

from powerplan.longest import first_that
from powerplan.run.exchanges import INPUTS, KEYS, STATE, Exchange
from powerplan.run.links import START_S, Link, all_gather_s, all_to_all_s, send_s

MOST_TOKENS = 2**60
"""Tokens per device up to which a crossover is looked for."""


@dataclass(frozen=True)
class Split:
    """A sequence on several devices. Numbers are of one micro-batch.

    ranks: devices that share it. link: what joins them. tp: devices that split the heads of each of them.
    tokens: of a sequence, on one device. sequences: of a micro-batch. element_bytes: of an activation.
    attention_flops_per_s: at which a device computes attention, behind which a ring hides.
    parts: ranges of tokens on each device, 1 or, in zigzag, 2.
    """

    ranks: int
    link: Link
    tp: int
    tokens: float
    sequences: int
    element_bytes: float
    attention_flops_per_s: float
    parts: int = 1


@dataclass(frozen=True)
class Passing:
    """How layers of one kind share a sequence, in the forward pass of one micro-batch.

    exchange: what they pass on. way: "ring", "all-to-all", "halo", "gather" or "scan".
    seconds: of all their layers. hidden_s: of those what their attention hides.
    bytes_sent: what one device hands over in one layer, the one that has most: in a gather its own states or latents
    once, however many devices get them. bytes_received: what it gets of others. buffer_bytes: what it holds of others
    at once.
    rounds: messages that wait for each other.
    """

    exchange: Exchange
    way: str
    seconds: float
    hidden_s: float
    bytes_sent: float
    bytes_received: float
    buffer_bytes: float
    rounds: int

    @property
    def layers(self) -> int:
        return self.exchange.layers

    @property
    def exposed_s(self) -> float:
        return max(0.0, self.seconds - self.hidden_s)

    @property
    def backward_passes(self) -> int:
        """How many forward passes send as much as the backward pass: a ring passes keys, values and gradients."""
        return 2 if self.way == "ring" else 1

    @property
    def passes_s(self) -> float:
        """Seconds of a forward and a backward pass, hidden or not."""
        return (1 + self.backward_passes) * self.seconds


def passings_of(exchanges: Iterable[Exchange], split: Split) -> tuple[Passing, ...]:
    """Return how each exchange is done: of several ways the one that is exposed for the least time."""
    return tuple(min(ways_of(exchange, split), key=lambda way: way.exposed_s) for exchange in exchanges)


def parts_of(exchanges: Iterable[Exchange], split: Split) -> int:
    """Return the ranges of tokens that each device has: two where a model's keys and values go around a ring."""
    attention = [exchange for exchange in exchanges if exchange.what == KEYS]
    return 2 if any(way.way == "ring" for way in passings_of(attention, split)) else 1


def ways_of(exchange: Exchange, split: Split) -> list[Passing]:
    """Return the ways that an exchange can be done, the simplest first."""
    if exchange.what == STATE:
        return [_gather(exchange, split), _scan(exchange, split)]
    if exchange.what == INPUTS:
        return [_halo(exchange, split)]
    swapped = _all_to_all(exchange, split)
    first = _ring(exchange, split) if exchange.what == KEYS else _halo(exchange, split)
    return [first, swapped] if swapped else [first]


def _gather(exchange: Exchange, split: Split) -> Passing:
    """Each device gets the states of all in one all-gather, and adds up those before its own parts."""
    own = exchange.device_bytes(split.tp) * split.sequences * split.parts
    seconds = exchange.layers * all_gather_s(split.link, split.ranks, split.ranks * own)
    others = (split.ranks - 1) * own
    return Passing(exchange, "gather", seconds, 0.0, own, others, split.ranks * own, 1)


def _scan(exchange: Exchange, split: Split) -> Passing:
    """Rounds of messages, each a state: in the first from the part before, then from 1, 2, 4 ... parts further."""
    message = exchange.device_bytes(split.tp) * split.sequences
    rounds = scan_rounds(split.ranks, split.parts)
    seconds = sum(_message_s(split.link, most * message) for most in rounds.messages if most)
    handed = rounds.most * message
    held = 3 * split.parts * message  # What is at hand, on its way to others and arriving.
    return Passing(
        exchange, "scan", exchange.layers * seconds, 0.0, handed, handed, held, sum(map(bool, rounds.messages))
    )


def _halo(exchange: Exchange, split: Split) -> Passing:
    """Each part of a sequence gets the last tokens before it, of as many devices as have them."""
    payload, ranks, parts = exchange.device_bytes(split.tp) * split.sequences, split.ranks, split.parts
    if exchange.what == INPUTS:
        sent = payload * halo_tokens(ranks, parts, 1, 1)
        hops = 1
    else:
        piece = max(1, int(split.tokens) // parts)
        sent = payload * halo_tokens(ranks, parts, piece, exchange.reach)
        hops = min(-(-exchange.reach // piece), ranks * parts - 1)
    seconds = _message_s(split.link, sent) + (hops - 1) * (split.link.across or split.link).latency_s
    return Passing(exchange, "halo", exchange.layers * seconds, 0.0, sent, sent, sent, 1)


def _ring(exchange: Exchange, split: Split) -> Passing:
    """Keys and values go from device to device until all have met them; gradients come back the same way."""
    message, turns = exchange.device_bytes(split.tp) * split.tokens * split.sequences, split.ranks - 1
    seconds = exchange.layers * turns * _message_s(split.link, message)
    hidden = exchange.flops * split.tokens * split.sequences / split.tp / split.attention_flops_per_s
    return Passing(exchange, "ring", seconds, hidden, turns * message, turns * message, 2 * message, turns)


def _all_to_all(exchange: Exchange, split: Split) -> Passing | None:
    """Devices exchange tokens for heads, and outputs back; None where the heads cannot be shared.

    As powerplan.models does it, key/value heads are repeated where they are fewer than devices, and latents are
    gathered, to be expanded to a device's own heads, where that is less to receive than keys and values.
    """
    shape, ranks, tp = exchange.heads, split.ranks, split.tp
    if shape is None or shape.heads % tp:
        return None
    heads = shape.heads // tp
    kv_heads = lcm(shape.kv_heads // gcd(tp, shape.kv_heads), ranks)
    if heads % kv_heads:
        return None
    row = split.element_bytes * split.tokens * split.sequences
    queries, outputs = heads * shape.head_dim * row, heads * shape.v_head_dim * row
    keys, gathered = kv_heads * (shape.head_dim + shape.v_head_dim) * row, 0.0
    keys += exchange.gate_bytes / tp * split.tokens * split.sequences
    if exchange.latent:
        own = exchange.device_bytes(tp) * split.tokens * split.sequences
        keys, gathered = (0.0, own) if ranks * own <= keys else (keys, 0.0)
    seconds = all_to_all_s(split.link, ranks, queries + keys) + all_to_all_s(split.link, ranks, outputs)
    if gathered:
        seconds += all_gather_s(split.link, ranks, ranks * gathered)
    swapped = (queries + keys + outputs) * (ranks - 1) / ranks
    return Passing(
        exchange,
        "all-to-all",
        exchange.layers * seconds,
        0.0,
        bytes_sent=swapped + gathered,
        bytes_received=swapped + (ranks - 1) * gathered,
        buffer_bytes=queries + keys + outputs + ranks * gathered,
        rounds=3 if gathered else 2,
    )


def _message_s(link: Link, sent: float) -> float:
    """Return the seconds of sends that begin together and that others wait for: each time, a call of NCCL starts."""
    return START_S + send_s(link, sent)


@dataclass(frozen=True)
class Rounds:
    """The messages of a scan. messages: of each round, the most that one device sends to others, or gets of them.

    most: the most that one device sends in all rounds.
    """

    messages: tuple[int, ...]
    most: int


@cache
def scan_rounds(ranks: int, parts: int) -> Rounds:
    """Return the messages of a scan over devices that have one part of a sequence each, or two in zigzag.

    In the first round each part gets the sum of the one before it, in each later one of twice as many. Within a device
    nothing is sent.
    """
    count, reach = ranks * parts, 0
    totals, messages = [0] * ranks, []
    while reach < count - 1:
        sent, got = [0] * ranks, [0] * ranks
        for part in range(reach + 1, count):
            source, target = _holder(part - max(1, reach), ranks), _holder(part, ranks)
            if source != target:
                sent[source] += 1
                got[target] += 1
        totals = [before + now for before, now in zip(totals, sent, strict=True)]
        messages.append(max(*sent, *got))
        reach = 2 * reach or 1
    return Rounds(tuple(messages), max(totals))


def _holder(part: int, ranks: int) -> int:
    """Return the device that has a part: the first half from the front, and in zigzag the others back again."""
    return part if part < ranks else 2 * ranks - 1 - part


@cache
def halo_tokens(ranks: int, parts: int, piece: int, reach: int) -> int:
    """Return the tokens that one device sends to others, at most, where each of its parts has `piece` tokens.

    Every part needs the `reach` tokens before it, which several parts may hold.
    """
    count, most = ranks * parts, 0
    for rank in range(ranks):
        sent = min(reach, (count - 1 - rank) * piece)
        if parts == 2:
            between = 2 * (ranks - rank - 1)  # Parts of others, up to the one that this device has from the back.
            sent += min(reach, rank * piece) - min(piece, max(0, reach - between * piece))
        most = max(most, sent)
    return most


@dataclass(frozen=True)
class Crossover:
    """From how many tokens per device it takes less time on the links to pass a state than keys and values.

    tokens: that many. against: how these would be passed there, "ring" or "all-to-all".
    """

    tokens: int
    against: str


def crossover(passing: Passing, split: Split) -> Crossover | None:
    """Return where passing a state begins to take less time than keys and values of the same heads.

    Both for a forward and a backward pass, whether compute hides them or not; keys and values in the faster of a ring
    and an all-to-all. The time of a state does not depend on the tokens, and that of keys and values grows with them:
    with fewer tokens per device they take less time, with as many or more the state does. None where the layers have no
    state or no heads.
    """
    shape = passing.exchange.heads
    if passing.exchange.what != STATE or shape is None:
        return None
    entry = shape.kv_heads * (shape.head_dim + shape.v_head_dim) * split.element_bytes
    keys = replace(passing.exchange, what=KEYS, payload_bytes=entry, kv_heads=shape.kv_heads, flops=0.0)

    def attention(tokens: int) -> Passing:
        return min(ways_of(keys, replace(split, tokens=tokens)), key=lambda way: way.passes_s)

    first = first_that(lambda tokens: tokens > MOST_TOKENS or attention(tokens).passes_s >= passing.passes_s)
    return None if first > MOST_TOKENS else Crossover(first, attention(first).way)


def break_even(exchange: Exchange, split: Split) -> int | None:
    """Return the tokens per device whose keys and values have as many bytes as its states; None without any or heads.

    Examples:
        >>> from powerplan.mixers.base import HeadShape
        >>> heads = HeadShape(32, 8, 128, 128)  # power attention, p = 2: D = 8,256, and one column for the normaliser
        >>> split = Split(8, Link(360e9, 3.4e-6, "NVLink"), 1, 16384, 1, 2.0, 3e14)
        >>> break_even(Exchange("power p=2", STATE, 1, 8 * 8256 * 129 * 4, heads=heads), split)
        8320
    """
    shape = exchange.heads
    if exchange.what != STATE or shape is None:
        return None
    entry = shape.kv_heads * (shape.head_dim + shape.v_head_dim) * split.element_bytes
    return int(split.parts * exchange.payload_bytes // entry)
