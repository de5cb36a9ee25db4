"""The help of commands: the panels that their options stand in, and examples."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

MODEL = "Model"
CONVENTION = "What is counted"
FORMATS = "Number formats"
CACHES = "Caches and prompts"
DEVICES = "Devices and money"
OUTPUT = "Output"
ORDER = (None, MODEL, CONVENTION, FORMATS, CACHES, DEVICES, OUTPUT)

PANELS = {
    **dict.fromkeys(["like", "mixer", "measured"], MODEL),
    **dict.fromkeys(["form", "causal", "exclude"], CONVENTION),
    **dict.fromkeys(
        ["dtype", "weights_dtype", "cache_dtype", "state_dtype", "gradients_dtype", "moments_dtype", "matmuls_dtype"],
        FORMATS,
    ),
    **dict.fromkeys(["cache_budget", "prefill_chunk", "checkpoint_every", "engine", "page"], CACHES),
    **dict.fromkeys(
        ["gpu", "devices", "mfu", "price", "gpu_hours", "max_days", "node_devices", "link_gbs", "network_gbs"], DEVICES
    ),
    **dict.fromkeys(
        [
            *("top", "pick", "write", "name", "plot", "save", "show", "export", "yaml", "families"),
            *("output", "json_", "output_file", "file", "force", "quiet", "no_color"),
        ],
        OUTPUT,
    ),
}
"""The panel of an option by the name of its parameter; others stand in the first one, beside --help."""

PLAN, MEASURE, LOOK_UP = "Plan", "Measure", "Look up"

COMMAND_PANELS = {
    **dict.fromkeys(["wsfr", "compare", "budget", "train", "decode", "recommend", "report"], PLAN),
    **dict.fromkeys(["profile"], MEASURE),
    **dict.fromkeys(["dims", "models", "hardware", "reproduce", "doctor", "schema"], LOOK_UP),
}
"""The panel of a command in the list of all commands."""

EXAMPLES = {
    "": [
        "powerplan wsfr llama-3.1-8b --ctx 8k,128k",
        "powerplan recommend llama-3.1-8b --ctx 128k",
        "powerplan models gpt2-small --yaml",
    ],
    "wsfr": [
        "powerplan wsfr llama-3.1-8b --ctx 8k,128k",
        "powerplan wsfr config.json --ctx 64k --by layer",
        "powerplan wsfr gpt2-small --mixer power:p=2 --explain",
        "powerplan wsfr gpt2 --lengths lognormal:mean=4k,p99=64k",
    ],
    "compare": [
        "powerplan compare llama-3.1-8b gemma-2-9b --ctx 128k",
        "powerplan compare gpt2-small --ctx 1M --mixer hyena",
        "powerplan compare model.yaml gpt2-xl --json",
    ],
    "budget": [
        "powerplan budget llama-3-8b --ctx 64k --flops 1e22",
        "powerplan budget gpt2-xl --gpu h100-sxm --gpu-hours 500",
        "powerplan budget --flops 1e21",
    ],
    "train": [
        "powerplan train llama-3.1-8b --gpu h100-sxm --devices 64",
        "powerplan train model.yaml --ctx 8k --gpu h100-sxm",
        "powerplan train gpt2-xl --ctx 1k --gpu a100-80gb",
        "powerplan train gpt2 --gpu h100-sxm --lengths 1k,8k",
    ],
    "decode": [
        "powerplan decode llama-3.1-8b --ctx 128k --gpu h100-sxm",
        "powerplan decode deepseek-v3 --twin attention",
        "powerplan decode gpt2-xl --batch 1,64 --cache-budget 512",
        "powerplan decode qwen3.5-35b-a3b --engine vllm",
    ],
    "recommend": [
        "powerplan recommend llama-3.1-8b --ctx 128k",
        "powerplan recommend config.json --write new.yaml",
        "powerplan recommend gpt2-small --solve window",
        "powerplan recommend --solve window --equal-state kda",
    ],
    "report": [
        "powerplan report llama-3.1-8b --ctx 128k",
        "powerplan report config.json -o config.html",
    ],
    "profile": [
        "powerplan profile gpt2-small --p 2 --time-limit 60",
        "powerplan profile --ctx 4k,16k --save times.json",
        "powerplan profile --show times.json",
    ],
    "dims": [
        "powerplan dims --head-dim 64,128 --p 2,3",
        "powerplan dims --model llama-3-8b --p 2,3",
        "powerplan dims --kind kda,mamba2",
    ],
    "models": [
        "powerplan models",
        "powerplan models llama-3-8b --yaml -o mine.yaml",
        "powerplan models --families",
    ],
    "hardware": [
        "powerplan hardware",
        "powerplan hardware h100-sxm",
    ],
    "reproduce": [
        "powerplan reproduce table2",
        "powerplan reproduce all --format markdown",
    ],
    "doctor": [
        "powerplan doctor",
        "powerplan doctor --json",
    ],
    "schema": [
        "powerplan schema -o schema.json",
    ],
}
"""Examples by command, "" for those before any; short enough for a terminal of 60 columns."""

NARROWEST, WIDEST = 40, 1000
"""The fewest and the most columns that help is laid out in."""


def _print_examples(name: str) -> None:
    """Print the examples of a command below its help: versions of typer differ in the line breaks of an epilog."""
    lines = EXAMPLES.get(name, [])
    typer.echo("\n".join([" Examples:", *(f"   {line}" for line in lines), ""]) if lines else "", nl=False)


@contextmanager
def _bounded() -> Iterator[None]:
    """Hold COLUMNS to NARROWEST and WIDEST inside a `with` block: rich prints nothing in 0, and spaces up to 10^20."""
    given = os.environ.get("COLUMNS", "")
    if not given.isdecimal():
        yield
        return
    columns = int(given.lstrip("0")[:9] or 0)  # Python reads no integer of more than 4,300 digits.
    os.environ["COLUMNS"] = str(min(max(columns, NARROWEST), WIDEST))
    try:
        yield
    finally:
        os.environ["COLUMNS"] = given


class Command(TyperCommand):
    """A command with examples below its help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        with _bounded():
            super().format_help(ctx, formatter)
        _print_examples(self.name or "")


class Group(TyperGroup):
    """All commands, with examples below their help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        with _bounded():
            super().format_help(ctx, formatter)
        _print_examples("")
