"""Into how many parts a training run is split, and along what: data, matrices, layers, sequence, experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import get_args

from powerplan.choices import Schedule
from powerplan.errors import InputError, check_word, parameter
from powerplan.lists import parse_settings
from powerplan.spec import ModelSpec
from powerplan.units import format_items, parse_integer

MAX_PARALLEL = 10**6
"""The largest degree, node or micro-batch that is accepted: more than any cluster has devices."""


@dataclass(frozen=True)
class Degrees:
    """The degrees of parallelism, and what is sharded over the devices that see different tokens.

    fsdp: groups of devices that get different sequences and share weights by `zero`.
    replicas: groups of those that hold all weights and add up their gradients (HSDP).
    tp: devices that split every matrix and the heads (tensor parallel), and the sequence in between.
    pp: stages of layers (pipeline parallel, 1F1B). interleave: parts of a stage, spread over the model's depth.
    cp: devices that share one sequence (context parallel).
    ep: groups of experts (expert parallel), out of the fsdp * cp devices that share weights.
    zero: what fsdp * cp devices share: 0 nothing, 1 optimizer states, 2 gradients too, 3 weights too (FSDP).
    schedule: the order of a pipeline's micro-batches: "1f1b", or "dualpipe", which feeds them from both ends, so that a
    device holds two stages (DeepSeek-V3, arXiv 2412.19437, section 3.2.1).
    """

    fsdp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    replicas: int = 1
    interleave: int = 1
    zero: int = 3
    schedule: Schedule = "1f1b"

    @property
    def devices(self) -> int:
        """Devices in all; expert parallelism takes none of its own."""
        return self.replicas * self.fsdp * self.tp * self.pp * self.cp

    @property
    def shards(self) -> int:
        """Devices that share what `zero` shards."""
        return self.fsdp * self.cp

    @property
    def sequences_at_once(self) -> int:
        """Groups of devices that work on different sequences at once."""
        return self.replicas * self.fsdp

    @property
    def round(self) -> int:
        """Micro-batches that come together: pp for interleaved stages (arXiv 2104.04473, section 2.2).

        With fewer a stage would wait in each of its parts, not in one, and Megatron-Core refuses the run. DualPipe has
        one from each end.
        """
        if self.schedule == "dualpipe":
            return 2
        return self.pp if self.interleave > 1 else 1

    @property
    def fewest(self) -> int:
        """The least micro-batches: DualPipe fills its pipeline from both ends (2 pp in deepseek-ai/DualPipe)."""
        return 2 * self.pp if self.schedule == "dualpipe" else self.round

    def describe(self) -> str:
        """Return the degrees above 1 in words: "fsdp 8, cp 8"; "one device" where there are none."""
        words = [f"{name} {getattr(self, name)}" for name in PARALLEL if getattr(self, name) > 1]
        words += [self.schedule] if self.schedule != "1f1b" else []
        sharing = f", zero {self.zero}" if self.shards > 1 and self.zero < 3 else ""
        return ", ".join(words) + sharing if words else "one device"


PARALLEL = tuple(field.name for field in fields(Degrees) if field.name not in ("zero", "schedule"))
"""The words of --parallel, such as fsdp=8,cp=8."""


def parse_degrees(text: str, where: str, zero: int = 3, schedule: Schedule = "1f1b") -> Degrees:
    """Return what a text such as "fsdp=8,tp=4" says; raises InputError for one that says something else."""
    texts = parse_settings(text, PARALLEL, where, "fsdp=8,cp=8, or auto", of="a degree")
    values = {name: parse_integer(value, f"{where} {name}", 1, MAX_PARALLEL) for name, value in texts.items()}
    return Degrees(**values, zero=zero, schedule=schedule)


def problems(degrees: Degrees, spec: ModelSpec, context: int) -> Iterator[str]:
    """Yield what is impossible about these degrees for a model, in a clause each; nothing where all is possible."""
    if degrees.pp > spec.layer_count:
        yield f"pp {degrees.pp} is more stages than the {spec.layer_count} layers of {spec.name}"
    elif degrees.pp * degrees.interleave > spec.layer_count:
        parts = degrees.pp * degrees.interleave
        yield f"pp {degrees.pp} * interleave {degrees.interleave} is {parts} parts, more than {spec.layer_count} layers"
    if degrees.interleave > 1 and degrees.pp == 1:
        yield f"interleave {degrees.interleave} needs pipeline stages, and pp is 1"
    if degrees.schedule == "dualpipe":
        yield from _dualpipe_problems(degrees)
    for mixer in spec.mixers():
        heads = mixer.whole_sizes().get("heads")
        if heads is not None and heads % degrees.tp:
            yield f"tp {degrees.tp} does not divide the {heads} heads of {mixer.describe()}"
        shared = mixer.whole_sizes().get("kv_heads", 1)
        if shared % degrees.tp and degrees.tp % shared:
            yield f"tp {degrees.tp} is no divisor or multiple of the {shared} key/value heads of {mixer.describe()}"
    if degrees.tp > 1 and spec.hidden_size % degrees.tp:
        yield f"tp {degrees.tp} does not divide the hidden size {spec.hidden_size}"
    if context % degrees.cp:
        yield f"cp {degrees.cp} does not divide the context of {context:,} tokens"
    elif degrees.cp > 1 and context % (2 * degrees.cp):
        # Each device has one piece from the front and one from the back: behind a causal mask they are equal work.
        yield f"cp {degrees.cp} needs {2 * degrees.cp} pieces of one length, and the context is {context:,} tokens"
    experts = [ffn.experts for ffn in spec.mixtures()]
    if degrees.ep > 1 and not experts:
        yield f"ep {degrees.ep} needs experts, and {spec.name} has none"
    for count in sorted(set(experts)):
        if count % degrees.ep:
            yield f"ep {degrees.ep} does not divide the {count} experts"
    if degrees.shards % degrees.ep:
        yield f"ep {degrees.ep} does not divide fsdp * cp, {degrees.shards}"


def _dualpipe_problems(degrees: Degrees) -> Iterator[str]:
    """Yield what DualPipe does not go with: it is published with two stages on a device, and with zero 1."""
    if degrees.pp == 1 or degrees.pp % 2:
        yield f"dualpipe needs an even number of pipeline stages, and pp is {degrees.pp}"
    if degrees.interleave > 1:
        yield f"dualpipe has no parts of stages, and interleave is {degrees.interleave}"
    if degrees.cp > 1:
        yield f"dualpipe is planned with whole sequences, and cp is {degrees.cp}"
    if degrees.zero > 1:
        yield f"dualpipe keeps weights and gradients whole within a step, and zero is {degrees.zero}; give 0 or 1"


def check_degrees(degrees: Degrees, devices: int, spec: ModelSpec, context: int) -> None:
    """Raise InputError unless `degrees` are whole numbers in range, make up `devices` and suit the model."""
    where = parameter("parallel")
    check_word(degrees.schedule, get_args(Schedule), parameter("schedule"))
    for name in (*PARALLEL, "zero"):
        least, most = (0, 3) if name == "zero" else (1, MAX_PARALLEL)
        parse_integer(str(getattr(degrees, name)), f"{where} {name}", least, most)
    if degrees.devices != devices:
        apart = ("ep", "interleave")
        factors = " * ".join(f"{name} {getattr(degrees, name)}" for name in PARALLEL if name not in apart)
        raise InputError(f"{factors} is {format_items(degrees.devices, 'device')}, and there are {devices:,}", where)
    for problem in problems(degrees, spec, context):
        raise InputError(problem, where)
