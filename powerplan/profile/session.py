"""One profile: stages within a time limit, and what is kept of them when one is cut short."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from powerplan.errors import MachineError
from powerplan.measured import SCHEMA
from powerplan.profile.breakdown import breakdown
from powerplan.profile.checks import check_kernel, check_layer
from powerplan.profile.crossover import Pair, find_crossover
from powerplan.profile.machine import Machine, examine, settle_threads, slow_products, versions
from powerplan.profile.memory import SHARE, bytes_needed, capped, free_bytes, is_out_of_memory, peak_of
from powerplan.profile.plan import Contender, Plan
from powerplan.profile.result import PASSES, Breakdown, Checked, Crossover, Measurement, Missing, Profile
from powerplan.profile.rows import measurement, run_costs, splits
from powerplan.profile.runs import Place, prepare, words
from powerplan.profile.timing import Clock, Run, cold_cpu_clock, repeated, spread
from powerplan.units import format_bytes
from powerplan.version import __version__

WEIGHT_TOKENS = 2048
"""Most tokens at which projections and FFN are timed: their time per token does not depend on the context."""

SHARES = {"weights": 0.12, "state": 0.5, "crossover": 0.45, "chunks": 0.6, "layers": 0.9}
"""Share of the time left that each stage may take, in their order."""

SHORTEST, FIRST = 64, 0.06
"""Shortest context chosen without being asked for, and the share of the time left that a run of the first may take."""

GUESS = 4.0
"""Times the matrix product's time that a run is taken for before anything like it was measured."""

WARM_S = 1.0
"""A first run that takes this long is a sample too; a shorter one only warms up."""

MOST_WATCHED = 1000
"""Chunks, or tokens one by one, up to which a CPU run is watched for its memory: each step makes dozens of records."""

TOO_LONG = "too long for the time that was left"


class WrongResultError(MachineError):
    """An implementation is not within its error budget: nothing of it is timed."""


Say = Callable[[str, float], None]
"""Told what runs now, and the share of the time limit that has passed."""


@dataclass
class Session:
    """Measures a plan until `time_limit` seconds have passed, in `memory_limit` bytes."""

    plan: Plan
    time_limit: float = 60.0
    memory_limit: int | None = None
    say: Say = lambda text, share: None
    start: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.machine: Machine | None = None
        self.rows: list[Measurement] = []
        self.checks: list[Checked] = []
        self.refused: dict[Contender, str] = {}
        self.crossings: list[Crossover] = []
        self.parts: list[Breakdown] = []
        self.missing: list[Missing] = []
        self.slowdown: dict[tuple[str, str, str], float] = {}
        self.cold: Clock | None = None
        self.interrupted = False
        self.notes = self.plan.notes

    def run(self) -> Profile:
        """Return the profile. Raises MachineError where nothing was measured, WrongResultError where a check fails."""
        limit = self.memory_limit or int(SHARE * free_bytes(self.plan.device))
        self.memory = limit
        if "decode" in self.plan.passes and not self.plan.device.startswith("cuda"):
            self.cold = cold_cpu_clock()  # Before the limit holds: what it fills caches with is no part of a run.
        try:
            with capped(limit, self.plan.device):
                self._stages()
        except KeyboardInterrupt:
            self.interrupted = True
            self._miss("all that was to follow", "interrupted")
        if not self.rows or self.machine is None:
            raise MachineError(f"nothing was measured: {self._first_reason()}")
        return self._profile(self.machine)

    def _first_reason(self) -> str:
        if not self.missing:
            return "no time was left"
        first, *others = self.missing
        count = f"{len(others)} other runs" if len(others) > 1 else "one other run"
        return f"{first.describe()} (and {count})" if others else first.describe()

    def left(self) -> float:
        """Return the seconds that are left."""
        return self.time_limit - (time.monotonic() - self.start)

    def _stages(self) -> None:
        plan = self.plan
        self._tell("matrix product and copy")
        threads = settle_threads(plan.device)
        self.machine = examine(plan.device, plan.dtype)
        self.notes = (*plan.notes, *filter(None, (threads, slow_products(self.machine, plan.dtype))))
        self._check_all()
        self._weights()
        cells = [(kind, tokens) for tokens in self._contexts() for kind in plan.passes]
        cells.sort(key=lambda cell: cell[0] != "decode")  # Steps of milliseconds, before what may take all the time.
        self._cells("state", cells, self._able(plan.contenders), "state")
        for kind in plan.passes:
            self._crossover(kind)
        if plan.chunk_sizes:
            self._chunks()
        if plan.breakdown:
            self._breakdown()
        self._cells("layer", [cell for cell in cells if cell[0] != "decode"], self._able(plan.contenders), "layers")

    def _contexts(self) -> list[int]:
        """Return the contexts of the plan; those it chose itself divided by 4 until a run of the first one is cheap."""
        able, contexts = self._able(self.plan.subjects), list(self.plan.contexts)
        while self.plan.chosen and able and contexts[0] > SHORTEST:
            dearest = max(self.expected(able[0], ("state", kind, contexts[0])) for kind in self.plan.passes)
            if dearest < self.left() * FIRST:
                break
            contexts = [context // 4 for context in contexts]
        return contexts

    def _able(self, contenders: Sequence[Contender]) -> list[Contender]:
        return [item for item in contenders if item not in self.refused]

    def _tell(self, what: str) -> None:
        self.say(what, min(1.0, 1 - self.left() / self.time_limit))

    def _miss(self, what: str, reason: str) -> None:
        self.missing.append(Missing(what=what, reason=reason))

    def _miss_run(self, place: Place, name: str, reason: str, seconds: float | None = None) -> None:
        part, kind, tokens = place
        self.missing.append(
            Missing(reason=reason, part=part, direction=PASSES[kind], context=tokens, name=name, seconds=seconds)
        )

    def _check_all(self) -> None:
        """Check every contender once. In one thread: small products are slower in several, far so on a busy machine."""
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            self._check_each()
        finally:
            torch.set_num_threads(threads)

    def _check_each(self) -> None:
        for contender in self.plan.contenders:
            for check in (check_kernel, check_layer) if contender.is_power else (check_layer,):
                self._tell(f"checking {contender.name} ({contender.impl}) against the reference")
                try:
                    found = check(self.plan, contender)
                except (ValueError, NotImplementedError, ImportError, TypeError) as error:
                    self._refuse(contender, first_line(error))
                    break
                except (RuntimeError, MemoryError) as error:
                    reason = "out of memory in its check" if is_out_of_memory(error) else first_line(error)
                    self._refuse(contender, reason)
                    break
                if not found.share_of_budget <= 1:
                    raise WrongResultError(
                        f"{found.name} ({found.impl}) is wrong here, so nothing is timed: {found.share_of_budget:.3g} "
                        f"times the allowed error against {found.against}"
                    )
                self.checks.append(found)
            if not self._able(self.plan.subjects):
                raise MachineError("; ".join(f"{item.name} ({item.impl}): {why}" for item, why in self.refused.items()))

    def _refuse(self, contender: Contender, reason: str) -> None:
        self.refused[contender] = reason
        self._miss(f"{contender.name} ({contender.impl})", reason)

    def _weights(self) -> None:
        """Time the projections, once for contenders that share them, and the FFN."""
        able = self._able(self.plan.contenders)
        distinct = list({item.projection_key: item for item in reversed(able)}.values())[::-1]
        for kind in self.plan.passes:
            tokens = 1 if kind == "decode" else self._weight_tokens(kind)
            allowance = SHARES["weights"] * self.left() / len(self.plan.passes) / 2
            self._cell("projections", kind, tokens, distinct, allowance, most=self.left() / 4)
            if self.plan.ffn is not None:
                self._cell("ffn", kind, tokens, able[:1], allowance, most=self.left() / 4)

    def _weight_tokens(self, kind: str) -> int:
        """Return as many tokens as a few runs of the weight part fit in its time, at least 64."""
        assert self.machine is not None
        per_token = max((item.weight_flops(self.plan.spec.hidden_size) for item in self.plan.contenders), default=0)
        flops = (per_token + self.plan.ffn_flops()) * self.plan.batch * (3 if kind == "train" else 1)
        affordable = self.left() * SHARES["weights"] / 20 * self.machine.matmul_flops_per_s / flops
        tokens = WEIGHT_TOKENS
        while tokens > 64 and tokens > affordable:
            tokens //= 2
        return tokens

    def _cells(self, part: str, cells: list[tuple[str, int]], contenders: list[Contender], stage: str) -> None:
        ends = self.left() * (1 - SHARES[stage])
        for index, (kind, tokens) in enumerate(cells):
            budget = self.left() - ends
            self._cell(part, kind, tokens, contenders, budget / (len(cells) - index), most=budget)

    def _cell(
        self, part: str, kind: str, tokens: int, contenders: Sequence[Contender], allowance: float, most: float
    ) -> dict[Contender, float]:
        """Time the contenders at one place, in turns; return their medians. What cannot be is noted.

        allowance: seconds for all repeats. most: seconds that a single run may take.
        """
        place = (part, kind, tokens)
        runs: dict[Contender, Run] = {}
        samples: dict[Contender, list[float]] = {}
        peaks: dict[Contender, int] = {}
        medians: dict[Contender, float] = {}
        try:
            for contender in contenders:
                if self._fits(contender, place, most):
                    self._tell(f"{words(place)}: {contender.name}")
                    with self._surviving(place, contender.name):
                        runs[contender] = self._warm(contender, place, samples, peaks)
            names = ", ".join(item.name for item in runs)
            with self._surviving(place, names):
                self._tell(f"{words(place)}: {names}")
                repeated(runs, self._clock(kind), allowance - sum(map(sum, samples.values())), samples)
        finally:
            for contender in contenders:
                if times := samples.get(contender):
                    medians[contender] = self._keep(contender, place, times, peaks.get(contender))
        return medians

    def _clock(self, kind: str) -> Clock:
        assert self.machine is not None
        return self.cold if kind == "decode" and self.cold is not None else self.machine.clock

    @contextmanager
    def _surviving(self, place: Place, name: str) -> Iterator[None]:
        """Note an out-of-memory error and go on."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            self._miss_run(place, name, "out of memory")
            if self.plan.device.startswith("cuda"):
                import torch

                torch.cuda.empty_cache()

    def _fits(self, contender: Contender, place: Place, seconds: float) -> bool:
        """Whether a run fits in the memory and in `seconds`; what does not is noted."""
        needed = bytes_needed(self.plan, contender, place)
        if needed > self.memory:
            text = f"it would take about {format_bytes(needed)}, and the limit is {format_bytes(self.memory)}"
            self._miss_run(place, contender.name, text)
            return False
        expected = self.expected(contender, place)
        if (expected if expected >= WARM_S else 2 * expected) > seconds:
            self._miss_run(place, contender.name, TOO_LONG, expected)
            return False
        return True

    def expected(self, contender: Contender, place: Place) -> float:
        """Return the seconds that a run should take, by its FLOPs and by how slow its like was."""
        part, kind, _ = place
        like = [(part, contender.name, kind), (part, contender.name, "forward"), (part, "", kind)]
        if part == "layer":
            like += [("state", contender.name, kind)]
        factor = next((self.slowdown[key] for key in like if key in self.slowdown), GUESS)
        return self._ideal(contender, place) * factor

    def _ideal(self, contender: Contender, place: Place) -> float:
        assert self.machine is not None
        flops, moved = run_costs(self.plan, contender, place, executed=True)
        return self.machine.roofline(flops, moved)

    def _warm(
        self,
        contender: Contender,
        place: Place,
        samples: dict[Contender, list[float]],
        peaks: dict[Contender, int],
    ) -> Run:
        """Prepare a run and run it once, for its peak memory; a long one on a CPU counts as a sample."""
        assert self.machine is not None
        run, clock = prepare(self.plan, contender, place), self._clock(place[1])
        chunk = 1 if contender.impl == "recurrent" else contender.chunk_size
        if self.machine.threads and chunk and place[0] in ("state", "layer") and place[2] / chunk > MOST_WATCHED:
            run()
            return run
        times: list[float] = []
        peaks[contender] = peak_of(lambda: times.append(clock(run)), self.plan.device)
        if times[0] >= WARM_S and not self.plan.device.startswith("cuda"):
            samples[contender] = times
        return run

    def _keep(self, contender: Contender, place: Place, times: list[float], peak: int | None) -> float:
        assert self.machine is not None
        found = spread(times)
        part, kind, _ = place
        self.slowdown[part, contender.name, kind] = found.median / self._ideal(contender, place)
        self.slowdown[part, "", kind] = self.slowdown[part, contender.name, kind]
        self.rows.append(measurement(self.plan, self.machine, contender, place, found, peak))
        return found.median

    def _crossover(self, kind: str) -> None:
        """Look for the context from which the first subject takes less time than softmax attention."""
        subject, rival = next(iter(self._able(self.plan.subjects)), None), self.plan.softmax
        if subject is None or rival is None or rival in self.refused:
            return
        own, other = (self._medians(item, kind) for item in (subject, rival))
        known: dict[int, Pair] = {tokens: (own[tokens], other[tokens]) for tokens in own.keys() & other.keys()}
        ends = self.left() * (1 - SHARES["crossover"] / (len(self.plan.passes) - self.plan.passes.index(kind)))
        rows, missed = len(self.rows), len(self.missing)

        def measure(tokens: int) -> Pair | None:
            budget = self.left() - ends
            if sum(self.expected(item, ("state", kind, tokens)) for item in (subject, rival)) > budget:
                return None
            found = self._cell("state", kind, tokens, [subject, rival], min(budget, 3.0), most=budget)
            return (found[subject], found[rival]) if len(found) == 2 else None

        direction = PASSES[kind]
        found = None
        try:
            found = find_crossover(known, measure, name=subject.name, against=rival.name, direction=direction)
        finally:
            # They are part of the crossover, not of the table of contexts.
            del self.rows[rows:], self.missing[missed:]
        if found is not None:
            self.crossings.append(found)

    def _medians(self, contender: Contender, kind: str) -> dict[int, float]:
        rows = [row for row in self.rows if (row.part, row.direction) == ("state", PASSES[kind])]
        return {row.context: row.ms_p50 / 1000 for row in rows if row.name == contender.name}

    def _longest(self, kind: str, contender: Contender) -> int | None:
        return max(self._medians(contender, kind), default=None)

    def _chunks(self) -> None:
        """Time power attention in every chunk size asked for, at the longest context that was measured."""
        for kind in self.plan.passes:
            for subject in self._able(self.plan.subjects):
                tokens = self._longest(kind, subject)
                if kind == "decode" or tokens is None or subject.chunk_size is None:
                    continue
                sizes = [size for size in self.plan.chunk_sizes if size != subject.chunk_size]
                variants = [subject.with_chunk(size) for size in sizes]
                budget = SHARES["chunks"] * self.left() / len(self.plan.passes)
                for variant in variants:
                    key = ("state", subject.name, kind)
                    self.slowdown.setdefault(("state", variant.name, kind), self.slowdown.get(key, GUESS))
                self._cell("state", kind, tokens, variants, budget, most=budget)

    def _breakdown(self) -> None:
        for kind in self.plan.passes:
            subject = next(iter(self._able(self.plan.subjects)), None)
            tokens = None if subject is None else self._longest(kind, subject)
            if subject is None or tokens is None:
                continue
            self._tell(f"breakdown of {PASSES[kind]} at {tokens:,} tokens: {subject.name}")
            if 3 * self.expected(subject, ("state", kind, tokens)) > self.left():
                self._miss(f"breakdown of {PASSES[kind]}", "no time is left for it")
                continue
            parts = breakdown(prepare(self.plan, subject, ("state", kind, tokens)), self.plan.device)
            self.parts.append(
                Breakdown(
                    name=subject.name, impl=subject.impl, direction=PASSES[kind], context=tokens, parts=tuple(parts)
                )
            )

    def _profile(self, machine: Machine) -> Profile:
        import platform
        from datetime import UTC, datetime

        found = versions()
        return Profile(
            schema=SCHEMA,
            device=machine.name,
            torch=found["torch"],
            triton=found["triton"],
            date=datetime.now(UTC).date().isoformat(),
            powerplan=__version__,
            python=platform.python_version(),
            threads=machine.threads,
            layer=self.plan.shape(),
            dtype=self.plan.dtype,
            batch=self.plan.batch,
            seconds=round(time.monotonic() - self.start, 1),
            matmul_flops_per_s=machine.matmul_flops_per_s,
            copy_bytes_per_s=machine.copy_bytes_per_s,
            peak_flops_per_s=machine.peak_flops_per_s,
            bandwidth_bytes_per_s=machine.bandwidth_bytes_per_s,
            peak_of=machine.peak_of,
            results=self.rows,
            checks=tuple(self.checks),
            split=tuple(splits(self.plan, self.rows)),
            crossover=tuple(self.crossings),
            breakdown=tuple(self.parts),
            missing=tuple(self.missing),
            notes=self.notes,
            interrupted=self.interrupted,
        )


def first_line(error: BaseException) -> str:
    """Return the first line of an error, shortened."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0] if len(lines[0]) <= 200 else f"{lines[0][:197]}..."
