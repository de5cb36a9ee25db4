"""What powerplan computes for published training runs: FLOPs under each convention, time and memory as planned.

Two functions for two sets of figures; each takes a figure and returns a value for each convention of its set.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache

from msgspec.structs import replace

from powerplan.accounting import Accounting
from powerplan.choices import MatmulsDtype
from powerplan.ffn import MoE
from powerplan.hardware import find_device, peak_of
from powerplan.reproduce.figures import Figure
from powerplan.reproduce.power import Computed
from powerplan.reproduce.training_runs import TrainingRun, training_runs
from powerplan.run.degrees import parse_degrees
from powerplan.run.efficiency import DEFAULT
from powerplan.run.layouts import Batch, Layout, Layouts, Setting
from powerplan.run.links import cluster_of
from powerplan.run.recipe import Recipe
from powerplan.spec import ModelSpec
from powerplan.training import TRAINING_PASSES, train_flops

BUDGET_MFU = Fraction(2, 5)
"""The share of the bf16 peak at which hours are computed: what `powerplan budget` assumes where no other is given."""

FLOPS_PER_PARAMETER = 6
"""Training FLOPs per parameter and token: 2 forward, 4 backward (Kaplan et al. 2020, arXiv 2001.08361, section 2.1)."""


def run_of(figure: Figure) -> TrainingRun:
    """Return the published run that a figure belongs to."""
    return training_runs()[figure.run]


@cache
def flops_per_token(run: TrainingRun) -> Computed:
    """Return the training FLOPs per token of a run's model at its context, by the name of the convention."""
    exact, full = (run.accounting(causal).row(run.context) for causal in ("exact", "full"))
    parameters = run.accounting().active_parameters.with_embeddings
    return {
        "exact": train_flops(exact),
        "full": train_flops(full),
        "palm": FLOPS_PER_PARAMETER * parameters + TRAINING_PASSES * full.state_flops_per_token,
        "again": (TRAINING_PASSES + 1) * full.flops_per_token,
    }


def training(figure: Figure) -> Computed:
    """Return a figure about the FLOPs of a run under each convention, in its unit.

    "tflops": TFLOP/s and device; "mfu": % of the bf16 peak; "sequence": 10^15 FLOPs of one sequence; "days": of the run
    at its published TFLOP/s; "hours": millions of device hours at BUDGET_MFU.
    """
    run = run_of(figure)
    return {name: _in_unit(figure.quantity, run, flops) for name, flops in flops_per_token(run).items()}


def _in_unit(quantity: str, run: TrainingRun, flops: Fraction) -> Fraction:
    """Return the quantity that `flops` per token make of a run."""
    rate = run.device_tokens_per_s * flops
    match quantity:
        case "tflops":
            return rate / 10**12
        case "mfu":
            return 100 * rate / _peak(run)
        case "sequence":
            return run.context * flops / 10**15
        case "days":
            return run.token_count * flops / (run.devices * run.tflops * 10**12) / 86400
        case "hours":
            return run.token_count * flops / (BUDGET_MFU * _peak(run)) / 3600 / 10**6
    raise AssertionError(f"{quantity} is no quantity of a training run")


def _peak(run: TrainingRun) -> Fraction:
    return peak_of(find_device(run.device)).flops_per_s


def efficiency(figure: Figure) -> Fraction | None:
    """Return the share of the bf16 peak that a figure's run reached, by exact FLOPs; None where no run is behind it."""
    if not figure.run:
        return None
    run = run_of(figure)
    rate = Fraction(run.tflops * 10**12) if run.tflops else run.device_tokens_per_s * flops_per_token(run)["exact"]
    return rate / _peak(run) if rate else None


@cache
def planned(run: TrainingRun) -> Layout:
    """Return the layout that a run was published with, as powerplan plans it at its default efficiencies."""
    device = find_device(run.device)
    batch = Batch(run.sequences * run.context, exact=True)
    setting = Setting.of(cluster_of(device, run.devices), peak_of(device), DEFAULT, batch)
    degrees = parse_degrees(run.parallel, f"{run.name}: parallel", run.zero, run.schedule)
    matmuls: MatmulsDtype | None = "fp8" if run.matmuls == "fp8" else None
    recipe = Recipe(recompute=run.recompute, micro_batch=run.micro_batch, matmuls_dtype=matmuls)
    accounting = run.accounting()
    if run.any_node:
        accounting = Accounting(to_any_node(run.model_spec))
    return Layouts(accounting, run.context, setting).layout(degrees, recipe, run.sequences)


def to_any_node(spec: ModelSpec) -> ModelSpec:
    """Return a model whose tokens may go to all groups of experts, where its groups of layers have no patterns."""
    groups = [
        replace(group, ffn=replace(group.ffn, top_groups=None)) if isinstance(group.ffn, MoE) else group
        for group in spec.layers
    ]
    return replace(spec, layers=tuple(groups))


def training_time(figure: Figure) -> Computed:
    """Return a figure about the time or the memory of a run as planned, in its unit.

    "tokens": tokens per second and device; "step": seconds; "tflops": TFLOP/s and device; "memory": GiB; "hours":
    millions of device hours of the whole run.
    """
    run = run_of(figure)
    layout = planned(run)
    value = {
        "tokens": layout.tokens_per_s / run.devices,
        "step": layout.step_s,
        "tflops": layout.tokens_per_s / run.devices * layout.flops_per_token / 1e12,
        "memory": layout.memory.peak / 2**30,
        "hours": run.devices / layout.tokens_per_s / 3600 / 1e6,
    }[figure.quantity]
    if figure.quantity == "hours":
        value *= run.token_count
    return {"planned": Fraction(value)}
