"""What this machine has: packages, processor, memory, accelerators. It imports torch, if that is installed."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from powerplan.defaults import OWN_FILE, PROJECT_FILE, TABLE, find_defaults
from powerplan.dims import HOPPER_HEAD_DIMS, UNTRIED_HOPPER_FP16_HEAD_DIMS, UNTRIED_HOPPER_HEAD_DIMS
from powerplan.errors import listed
from powerplan.units import format_bytes
from powerplan.version import __version__


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    what: what was looked for. found: what is there. ok: whether that suffices, None for a plain fact. remedy: how to
    get what is missing.
    """

    what: str
    found: str
    ok: bool | None = None
    remedy: str | None = None


def examine(commands: Sequence[str] = ()) -> list[Finding]:
    """Return what planning and running layers need, whether this machine has it, and how to get what is missing.

    commands: the names that tables of commands may have in a file of defaults, which is looked for.
    """
    findings = [
        Finding("powerplan", __version__),
        Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("processor", f"{cores()} cores, {_memory()} memory"),
        *(_package(name) for name in ("msgspec", "pyyaml", "rich", "typer")),
        Finding("planning commands", "ready", ok=True),
        *_defaults(commands),
    ]
    torch, triton = _package("torch", "pip install torch"), _package("triton")
    if not triton.ok:
        triton = Finding("triton", "not installed; it comes with torch for CUDA, for kernels on a GPU")
    findings += [
        torch,
        triton,
        _package("matplotlib", "pip install matplotlib, for --plot"),
        _package("vl-convert-python", "pip install vl-convert-python jinja2, for powerplan report"),
        _package("jinja2", "pip install jinja2, for powerplan report"),
    ]
    if not torch.ok:
        return [*findings, Finding("accelerator", "not looked for, as torch is not installed", ok=False)]
    return [*findings, *_accelerators()]


def _defaults(commands: Sequence[str]) -> list[Finding]:
    defaults = find_defaults(commands)
    if not defaults.file:
        return [Finding("defaults", f"none: no {OWN_FILE}, no [{TABLE}] in {PROJECT_FILE}")]
    return [
        Finding("defaults", defaults.file),
        *(Finding(f"default of {key}", value) for key, value in defaults.listed()),
    ]


def _package(name: str, remedy: str | None = None) -> Finding:
    try:
        return Finding(name, version(name), ok=True)
    except PackageNotFoundError:
        return Finding(name, "not installed", ok=False, remedy=remedy)


def _accelerators() -> list[Finding]:
    try:
        import torch

        if not torch.cuda.is_available():
            return [Finding("accelerator", "none; layers run on the processor", ok=None)]
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    except Exception as error:  # A broken driver or a torch built for another machine fails in many ways.
        reason = f"{type(error).__name__}: {error}".strip(": \n").splitlines()[0]
        return [Finding("torch", f"does not work: {reason}", ok=False, remedy="reinstall torch for this machine")]
    parts = (f"{one.name}, sm_{one.major}{one.minor}, {format_bytes(one.total_memory)}" for one in devices)
    found = [Finding(f"accelerator {index}", text, ok=True) for index, text in enumerate(parts)]
    return [*found, *_hopper([index for index, one in enumerate(devices) if (one.major, one.minor) == (9, 0)])]


def _hopper(indices: list[int]) -> list[Finding]:
    """Return whether power attention's engine for Hopper runs on these devices of capability 9.0."""
    if not indices:
        return []
    import torch

    from powerplan.kernels.triton.support import hopper_lacking, miscompiles, triton_version

    findings = []
    for index in indices:
        reason = hopper_lacking(torch.device("cuda", index))
        found = reason or f"can run {_degrees(HOPPER_HEAD_DIMS)} in bf16"
        findings.append(Finding(f"Hopper engine, {index}", found, ok=reason is None))
    findings.append(_untried())
    version = triton_version()
    if version is not None and miscompiles(version):
        text = f"triton {version} miscompiles products whose left operand stays in registers over a loop"
        remedy = "none needed for powerplan, which has no such product; for other kernels, a triton after 3.7.0"
        findings.append(Finding("Hopper compiler", text, remedy=remedy))
    return findings


def _untried() -> Finding:
    """Return whether that engine takes calls whose kernels no GPU has run, which is for the user to say."""
    from powerplan.kernels.triton.support import UNTRIED_VARIABLE, takes_untried

    degrees, in_fp16 = _degrees(UNTRIED_HOPPER_HEAD_DIMS), _degrees(UNTRIED_HOPPER_FP16_HEAD_DIMS)
    untried = f"{degrees} in bf16 and {in_fp16} in fp16, which no GPU has run"
    try:
        return Finding(UNTRIED_VARIABLE, f"all: also {untried}" if takes_untried() else f"not set; all adds {untried}")
    except ValueError as error:
        value, _, remedy = str(error).removeprefix(f"{UNTRIED_VARIABLE} is ").partition(": ")
        return Finding(UNTRIED_VARIABLE, f"{value} is not known", ok=False, remedy=remedy)


def _degrees(by_degree: Iterable[int]) -> str:
    """Return degrees as a sentence names them: "p = 2", or "p = 1, 3 and 4"."""
    return f"p = {listed([str(p) for p in sorted(by_degree)], 'and')}"


def cores() -> int:
    """Return the processor's cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> str:
    try:
        return format_bytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return "unknown"
