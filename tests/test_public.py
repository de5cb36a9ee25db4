"""What others rely on, frozen: commands with their options, and the names that `import powerplan` gives.

A failure here means that a user's script may break: change the snapshot only with an entry in CHANGELOG.md.
"""

from __future__ import annotations

import typer.main

import powerplan
import powerplan.kernels
import powerplan.models
from powerplan.cli.app import application

COMMANDS = {
    "wsfr": [
        "model",
        "--ctx",
        "--like",
        "--mixer",
        "--by",
        "--explain",
        "--form",
        "--causal",
        "--exclude",
        "--dtype",
        "--weights-dtype",
        "--cache-dtype",
        "--state-dtype",
        "--plot",
        "--force",
        "--format",
    ],
    "report": [
        "model",
        "--ctx",
        "--gpu",
        "--devices",
        "--tokens",
        "--price",
        "--measured",
        "--target",
        "--top",
        "--like",
        "--mixer",
        "--output",
        "--force",
        "--form",
        "--causal",
        "--exclude",
        "--dtype",
        "--weights-dtype",
        "--cache-dtype",
        "--state-dtype",
    ],
    "compare": [
        "models",
        "--ctx",
        "--like",
        "--mixer",
        "--form",
        "--causal",
        "--exclude",
        "--dtype",
        "--weights-dtype",
        "--cache-dtype",
        "--state-dtype",
        "--plot",
        "--force",
        "--format",
    ],
    "budget": [
        "models",
        "--ctx",
        "--flops",
        "--tokens",
        "--gpu-hours",
        "--gpu",
        "--mfu",
        "--devices",
        "--batch-tokens",
        "--like",
        "--mixer",
        "--measured",
        "--form",
        "--causal",
        "--exclude",
        "--dtype",
        "--weights-dtype",
        "--cache-dtype",
        "--state-dtype",
        "--plot",
        "--force",
        "--format",
    ],
    "train": [
        "model",
        "--ctx",
        "--gpu",
        "--devices",
        "--tokens",
        "--stage",
        "--batch-tokens",
        "--micro-batch",
        "--parallel",
        "--zero",
        "--recompute",
        "--optimizer",
        "--master",
        "--loss",
        "--efficiency",
        "--price",
        "--node-devices",
        "--link-gbs",
        "--network-gbs",
        "--like",
        "--mixer",
        "--measured",
        "--form",
        "--causal",
        "--exclude",
        "--dtype",
        "--gradients-dtype",
        "--moments-dtype",
        "--export",
        "--write",
        "--force",
        "--format",
    ],
    "decode": [
        "models",
        "--ctx",
        "--batch",
        "--gpu",
        "--devices",
        "--twin",
        "--like",
        "--mixer",
        "--dtype",
        "--weights-dtype",
        "--cache-dtype",
        "--state-dtype",
        "--plot",
        "--force",
        "--format",
    ],
    "recommend": [
        "model",
        "--ctx",
        "--target",
        "--max-state",
        "--max-decode-bytes",
        "--flops",
        "--tokens",
        "--gpu",
        "--devices",
        "--max-days",
        "--gpu-hours",
        "--price",
        "--keep",
        "--only",
        "--exclude",
        "--weights-vs-state",
        "--solve",
        "--equal-state",
        "--like",
        "--mixer",
        "--measured",
        "--top",
        "--pick",
        "--write",
        "--name",
        "--plot",
        "--force",
        "--form",
        "--causal",
        "--dtype",
        "--weights-dtype",
        "--cache-dtype",
        "--state-dtype",
        "--format",
    ],
    "profile": [
        "model",
        "--p",
        "--ctx",
        "--pass",
        "--against",
        "--impl",
        "--device",
        "--dtype",
        "--batch",
        "--chunk-size",
        "--like",
        "--mixer",
        "--breakdown",
        "--time-limit",
        "--memory-limit",
        "--save",
        "--show",
        "--plot",
        "--force",
        "--format",
    ],
    "dims": ["--head-dim", "--p", "--tile", "--v-head-dim", "--kind", "--model", "--ctx", "--like", "--format"],
    "models": ["model", "--like", "--mixer", "--yaml", "--name", "--families", "--format"],
    "hardware": ["device", "--format"],
    "reproduce": ["name", "--format"],
    "doctor": ["--format"],
    "schema": [],
}

EXPORTS = [
    "Accounting",
    "Convention",
    "InputError",
    "LoadedModel",
    "ModelSpec",
    "Parameters",
    "PowerplanError",
    "Row",
    "__version__",
    "budget",
    "compare",
    "decode",
    "degrees",
    "flops_per_step",
    "load_model",
    "page",
    "recommend",
    "solve",
    "spow_dim",
    "tiled_spow_dim",
    "tpow_dim",
    "train",
    "wsfr",
]


def test_commands_and_options() -> None:
    group = typer.main.get_command(application())
    options = {
        name: {option for param in command.params for option in (param.opts[:1] if param.opts else [param.name])}
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }
    assert options == {
        name: {*own, *SHARED, *(["--json"] if "--format" in own else [])} for name, own in COMMANDS.items()
    }


SHARED = ("--output", "--force", "--quiet", "--no-color")
"""Options of every command."""

KERNELS = [
    "ContextParallel",
    "PowerState",
    "empty_state",
    "power_attention",
    "power_attention_step",
    "power_state",
    "spow",
    "tiled_spow",
]
MODELS = [
    "Cache",
    "Decoder",
    "PowerCache",
    "Slot",
    "build_layer",
    "build_model",
    "generate",
    "power_class",
    "register_power_attention",
    "use_power_attention",
]


def test_exports() -> None:
    assert sorted(powerplan.__all__) == EXPORTS
    assert all(hasattr(powerplan, name) for name in EXPORTS)
    assert set(EXPORTS) <= set(dir(powerplan))
    assert not hasattr(powerplan, "answer")
    assert sorted(powerplan.kernels.__all__) == KERNELS
    assert powerplan.models.__all__ == MODELS
