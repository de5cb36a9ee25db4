"""How long devices wait for those whose documents are longer, in an order of documents that is simulated.

Sequences of packed documents have the same tokens and not the same work: a token of a long document attends to more.
How long devices wait depends on the order of the documents, so that an order is drawn: documents from their
distribution by a generator of fixed seed, packed whole, and the sequences shuffled by it. The same arguments give the
same numbers on every machine.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, cycle, islice, pairwise
from random import Random
from typing import TypeVar

from powerplan.accounting import Accounting
from powerplan.errors import InputError, parameter
from powerplan.lengths import Lengths
from powerplan.mixers.formulas import Convention, total
from powerplan.run.layouts import Layout
from powerplan.run.loads import has_keys
from powerplan.run.step import Efficiency, StepTime

MOST_DOCUMENTS, MOST_PARTS, MOST_STEPS = 100_000, 200_000, 64
"""Documents, parts of sequences and optimizer steps that are simulated at most, one step in any case.

With three quarters of the steps the waiting of 64 devices changes by less than 3 % of the work.
"""

MOST_SEQUENCES = 16_384
"""Sequences that are simulated at most. Each of some 60 layouts takes 10 to 40 ms for so many."""

MOST_AT_ONCE, FEWEST_SEQUENCES = 1_000_000, 8
"""Documents of one step that are simulated at most, 2 to 4 seconds of work, and sequences that have to hold them."""

SEED = 2502_21231
"""Of the generator that draws the order of documents: any fixed number."""

POINTS = 64
"""Lengths of an octave at which the work of a document is counted; between them it is interpolated."""


T = TypeVar("T")


@dataclass(frozen=True)
class Waiting:
    """The time of the slowest devices over the mean of all, where they meet; 1 where no device waits.

    data: sequences are worked on in the order in which they come, each shared evenly by its cp devices.
    context: devices that share a sequence have one part from its front and one from its back, whatever documents lie
    there; other sequences do not matter. come: both, as trainers do it that look at tokens alone.
    sorted: the sequences of a step are sorted by their work, and each document is shared evenly by the cp devices.
    come_longest, sorted_longest: the longest micro-batch of a step over the mean one, for which pipeline stages wait.
    steps, documents: how many were simulated.
    """

    data: float
    context: float
    come: float
    sorted: float
    come_longest: float
    sorted_longest: float
    steps: int
    documents: int


class DocumentOrder:
    """Sequences of packed documents in a simulated order, and what waiting for each other costs layouts of a run.

    Args:
        accounting: the model.
        lengths: the documents.
        context: tokens of a sequence.
        efficiency: the shares of the peak that attention and recurrent state reach.
    """

    def __init__(self, accounting: Accounting, lengths: Lengths, context: int, efficiency: Efficiency) -> None:
        self.lengths, self.context = lengths, context
        self.work = document_work(accounting, context, efficiency)
        self._own: dict[int, list[float]] = {}
        self._busiest: dict[tuple[int, int], list[float]] = {}
        self._found: dict[tuple[object, ...], Waiting] = {}

    def waiting(self, layout: Layout) -> Waiting:
        """Return how much longer the slowest devices of a layout work than the mean.

        Devices that see different sequences meet in every micro-batch where weights or gradients are sharded (zero 2
        and 3) or experts are split, else once a step. Those that share a sequence meet in every layer, and have unlike
        work where keys and values go around a ring: each has all heads of its own tokens. Sorted as by the
        balance scheduler of ByteScale (Ge et al. 2025, arXiv 2502.21231), sequences that are worked on at once have
        about the same work; with the per-document sharding of WLB-LLM (Wang et al. 2025, arXiv 2503.17924) all cp
        devices have the same part of each document.
        """
        degrees, recipe = layout.degrees, layout.recipe
        meets = degrees.zero >= 2 or degrees.ep > 1
        zigzag = layout.split is not None and layout.split.parts == 2
        fixed, state = _parts(layout.step, recipe.recompute == "full")
        share = round(state / (fixed + state), 6) if fixed + state else 0.0
        groups = degrees.sequences_at_once
        each, at_once = layout.sequences, groups * recipe.micro_batch
        if each > MOST_SEQUENCES:  # Short contexts: a part of each step.
            each = max(1, MOST_SEQUENCES // at_once) * at_once
        key = (each, groups, recipe.micro_batch, meets, degrees.cp if zigzag else 1, share)
        if key not in self._found:
            self._found[key] = self._waiting(*key)
        return self._found[key]

    def _waiting(self, each: int, groups: int, batch: int, meets: bool, cp: int, share: float) -> Waiting:
        """Return the waiting of steps of `each` sequences, in which state takes `share` of the work on average."""
        every = self._works(each)
        steps = max(1, len(every) // each)
        if cp > 1:
            steps = max(1, min(steps, MOST_PARTS // (2 * cp * each)))
        own = in_turn(every, steps * each)
        mean = sum(own) / len(own)
        scale = share / mean if mean else 0.0
        even = [1 - share + scale * amount for amount in own]
        slowest = even
        if cp > 1:
            slowest = [1 - share + scale * amount for amount in self._most(each, cp, len(own))]

        def paced(times: Sequence[float], ordered: bool) -> float:
            """Return the time of all steps, as the slowest devices set it."""
            starts = range(0, len(times), each)
            return sum(step_time(times[start : start + each], groups, batch, meets, ordered) for start in starts)

        def longest(times: Sequence[float]) -> float:
            """Return the longest micro-batch of a step over the mean, on average over the steps."""
            batches = [sum(times[start : start + batch]) for start in range(0, len(times), batch)]
            per_step = len(batches) // steps
            most = sum(max(batches[start : start + per_step]) for start in range(0, len(batches), per_step))
            return most / steps / (sum(even) / len(batches))

        whole = sum(even) / groups
        return Waiting(
            data=paced(even, ordered=False) / whole,
            context=sum(slowest) / sum(even),
            come=paced(slowest, ordered=False) / whole,
            sorted=paced(even, ordered=True) / whole,
            come_longest=longest(slowest),
            sorted_longest=longest(even),
            steps=steps,
            documents=sum(in_turn([len(sequence) for sequence in self._sequences(each)], len(own))),
        )

    def _sequences(self, each: int) -> tuple[tuple[int, ...], ...]:
        """Return the documents of each sequence, of as many steps of `each` sequences as are simulated.

        They are fewer than `each` where one step has more documents than are simulated: then they take turns.
        Raises InputError where they would be fewer than FEWEST_SEQUENCES.
        """
        of_one = self.context / float(self.lengths.cut(self.context).mean)
        documents = each * of_one
        if documents > MOST_AT_ONCE:
            fewer = int(MOST_AT_ONCE / of_one)
            if fewer < FEWEST_SEQUENCES:
                raise InputError(
                    f"sequences of {self.context:,} tokens hold about {of_one:,.0f} documents each, and "
                    f"{FEWEST_SEQUENCES} of them may have {MOST_AT_ONCE:,} at most, to simulate who waits; "
                    f"shorten {parameter('context')}",
                    parameter("lengths"),
                )
            return drawn_sequences(self.lengths, self.context, fewer)
        steps = max(1, min(MOST_STEPS, int(MOST_DOCUMENTS / documents), MOST_SEQUENCES // each))
        return drawn_sequences(self.lengths, self.context, steps * each)

    def _works(self, each: int) -> list[float]:
        """Return the state's work in each sequence."""
        if each not in self._own:
            self._own[each] = [sum(map(self.work, sequence)) for sequence in self._sequences(each)]
        return self._own[each]

    def _most(self, each: int, cp: int, count: int) -> list[float]:
        """Return cp times the state's work of the busiest device of each of the first `count` sequences."""
        if (each, cp) not in self._busiest:
            first = self._sequences(each)[:count]
            busiest = [cp * max(shares(own, self.context, cp, self.work)) for own in first]
            self._busiest[each, cp] = in_turn(busiest, count)
        return self._busiest[each, cp]


def in_turn(values: Sequence[T], count: int) -> list[T]:
    """Return `count` values: the first ones, again from the first where there are not so many."""
    return list(islice(cycle(values), count))


def _parts(step: StepTime, again: bool) -> tuple[float, float]:
    """Return the compute of a step that is the same for all sequences, and that of state."""
    state, weights = step.attention_s + step.recurrent_s, step.weights_s
    shared = step.recompute_s / (state + weights) if again and state + weights else 0.0
    return step.weights_s * (1 + shared) + step.head_s, state * (1 + shared)


def step_time(times: Sequence[float], at_once: int, batch: int, meets: bool, ordered: bool) -> float:
    """Return the time of one step: its sequences on `at_once` groups of devices, `batch` to each micro-batch.

    meets: whether groups wait for each other in every micro-batch. ordered: sequences are sorted by their time, and
    each goes to the group with the least work so far that has room (longest processing time first, Graham 1969).
    """
    if ordered:
        times = sorted(times, reverse=True)
    room = batch if meets else len(times) // at_once
    rounds = [times[start : start + at_once * room] for start in range(0, len(times), at_once * room)]
    return sum(max(_groups(own, at_once, room, ordered)) for own in rounds)


def _groups(times: Sequence[float], groups: int, room: int, ordered: bool) -> list[float]:
    """Return the time of each group of devices, of `room` sequences each."""
    if not ordered or room == 1:
        return [sum(times[place::groups]) for place in range(groups)]
    loads = [(0.0, 0, group) for group in range(groups)]
    done: list[float] = []
    for time in times:
        load, taken, group = loads.pop(0)
        if taken + 1 == room:
            done.append(load + time)
        else:
            insort(loads, (load + time, taken + 1, group))
    return done


@lru_cache(16)
def drawn_sequences(lengths: Lengths, context: int, count: int) -> tuple[tuple[int, ...], ...]:
    """Return the lengths of the documents in each of `count` sequences, in the order in which they are worked on.

    Documents are drawn until their tokens fill the sequences, packed whole (best-fit decreasing), and the sequences
    shuffled; those beyond the count are left out. Where one document may be longer than all of them, pieces are drawn:
    one long document in 10^9 would rarely be drawn, and the short ones in its place without end.
    """
    random = Random(SEED).random
    if lengths.longest > count * context:
        lengths = lengths.cut(context)
    held = list(accumulate(number for _, number in lengths.counts))
    pieces: list[int] = []
    tokens, wanted = 0, count * context
    while tokens < wanted:
        length = lengths.counts[bisect_right(held, random() * held[-1])][0]
        whole, rest = divmod(length, context)
        pieces += [context] * whole + ([rest] if rest else [])
        tokens += length
    packed = _packed(pieces, context)
    order = sorted((random(), number) for number in range(len(packed)))
    return tuple(tuple(packed[number]) for _, number in order[:count])


def _packed(pieces: Sequence[int], context: int) -> list[list[int]]:
    """Return the documents of each sequence that Best-fit Packing fills (Ding et al. 2024, arXiv 2404.10830)."""
    sequences: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    for length in sorted(pieces, reverse=True):
        place = bisect_left(rooms, (length, 0))
        if place < len(rooms):
            room, number = rooms.pop(place)
        else:
            room, number = context, len(sequences)
            sequences.append([])
        sequences[number].append(length)
        if room > length:
            insort(rooms, (room - length, number))
    return sequences


def document_work(accounting: Accounting, longest: int, efficiency: Efficiency) -> Callable[[int], float]:
    """Return a function that says what the state of the first tokens of a document takes, in any unit.

    It is their FLOPs as the default convention counts them, attention and recurrent state each over the share of the
    peak that it reaches. What one token takes on average is counted at POINTS lengths an octave and interpolated.
    """
    points: list[int] = [*range(1, min(POINTS, longest) + 1)]
    while points[-1] < longest:
        points.append(min(longest, max(points[-1] + 1, round(points[-1] * 2 ** (1 / POINTS)))))
    layers = [(use.layer.mixer, use.count) for use in accounting.uses if use.layer.mixer is not None]
    rates = [efficiency.attention if has_keys(mixer, longest) else efficiency.recurrent for mixer, _ in layers]
    convention = Convention()
    means: list[float] = [
        sum(
            count * float(total(mixer.state_flops_terms(point, convention))) / rate
            for (mixer, count), rate in zip(layers, rates, strict=True)
        )
        for point in points
    ]

    def work(tokens: int) -> float:
        place = bisect_left(points, tokens)
        if points[place] == tokens:
            return tokens * means[place]
        low, high = points[place - 1], points[place]
        share = (tokens - low) / (high - low)
        return tokens * (means[place - 1] * (1 - share) + means[place] * share)

    return work


def shares(sequence: Sequence[int], context: int, cp: int, work: Callable[[int], float]) -> list[float]:
    """Return the work of each of cp devices that share a sequence of documents in 2 cp equal parts.

    Device i has part i from the front and part i from the back, as for one document that fills the sequence: there all
    have about the same work. What remains behind the last document is padding.
    """
    part = context // (2 * cp)
    borders = list(accumulate(sequence, initial=0))
    parts = [0.0] * (2 * cp)
    for start, end in pairwise(borders):
        before, first = 0.0, start // part
        for number in range(first, (end - 1) // part + 1):
            after = work(min(end, (number + 1) * part) - start)
            parts[number] += after - before
            before = after
    return [parts[number] + parts[-1 - number] for number in range(cp)]
