"""Published training runs as data, from powerplan/training_runs.yaml: the model, the devices, what was measured."""

from __future__ import annotations

from fractions import Fraction
from functools import cache, cached_property
from typing import Literal

from powerplan.accounting import Accounting
from powerplan.choices import Recompute, Schedule
from powerplan.load import catalogue_spec
from powerplan.mixers import Convention
from powerplan.part import Part
from powerplan.spec import ModelSpec
from powerplan.typed import packaged_rows
from powerplan.units import parse_count


class TrainingRun(Part, frozen=True, kw_only=True, dict=True):
    """One published run.

    model: a model of the catalogue; spec: the model itself where the catalogue lacks it.
    device: a device of the catalogue. devices: how many. parallel: their degrees, as `--parallel` takes them.
    zero: what fsdp * cp devices share, as `Degrees` has it.
    sequences: of one step, over all devices. micro_batch: of one group of devices at once.
    recompute: what is nearest to what was recomputed. matmuls: the format that the matmuls of layers ran in.
    schedule: of the pipeline. any_node: whether a stand-in for the router sent tokens to any node.
    tokens_per_s: tokens per second and device. step_s: seconds of a step, where these are published instead.
    tokens, device_hours: of the whole run. tflops: TFLOP/s and device.
    source: where it was read. note: what powerplan does not model of it.
    """

    name: str
    model: str = ""
    spec: ModelSpec | None = None
    context: int
    device: str
    devices: int = 1
    parallel: str = ""
    zero: int = 3
    sequences: int = 0
    micro_batch: int = 1
    recompute: Recompute = "none"
    matmuls: Literal["bf16", "fp8"] = "bf16"
    schedule: Schedule = "1f1b"
    any_node: bool = False
    tokens_per_s: int = 0
    step_s: float = 0
    tokens: str = ""
    device_hours: int = 0
    tflops: int = 0
    source: str
    note: str | None = None

    @property
    def device_tokens_per_s(self) -> Fraction:
        """Tokens per second and device: as published, or of the published step time or hours; 0 where none is."""
        if self.step_s:
            return self.sequences * self.context / Fraction(str(self.step_s)) / self.devices
        if self.device_hours:
            return Fraction(self.token_count, self.device_hours * 3600)
        return Fraction(self.tokens_per_s)

    @property
    def token_count(self) -> int:
        """Tokens of the whole run."""
        return parse_count(self.tokens, f"{self.name}: tokens")

    @cached_property
    def model_spec(self) -> ModelSpec:
        return catalogue_spec(self.model) if self.spec is None else self.spec

    def accounting(self, causal: Literal["exact", "full"] = "exact") -> Accounting:
        """Return the accounting of the model, with a causal mask or with every key counted."""
        return Accounting(self.model_spec, Convention(causal=causal))


@cache
def training_runs() -> dict[str, TrainingRun]:
    """Return all runs by name, in the order of training_runs.yaml. Raises InputError for a wrong row."""
    return packaged_rows("training_runs.yaml", "runs", TrainingRun)
