"""The rates and memory of known devices, read from hardware.yaml, where every row names its source."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Annotated, Literal, TypeVar

import msgspec

from powerplan.errors import InputError, did_you_mean, parameter, shown
from powerplan.part import Part
from powerplan.typed import packaged_rows

Rate = Annotated[float, msgspec.Meta(gt=0)]
LinkKind = Literal["NVLink", "PCIe", "xGMI", "ICI"]
Seconds = TypeVar("Seconds", Fraction, float)


def several(count: int, name: str) -> str:
    """Write how many devices of a name: "8 h100-sxm", and "h100-sxm" for one."""
    return f"{count:,} {name}" if count > 1 else name


class Device(Part, frozen=True, kw_only=True):
    """The published peak rates of one accelerator.

    Matrix rates are dense (no structured sparsity), in TFLOP/s; memory is in GB (10^9 bytes), bandwidths in GB/s, that
    of the link per direction. A rate is None where the device has no such unit or no source was found.
    memory_gb: as the datasheet has it. usable_mib: MiB (2^20 bytes) that a program is given, which plans are held to.
    link: what joins the devices of one node. link_gbs: what all links of a device carry to the others of its node.
    node_devices: devices of the usual node, all joined by `link`; 1 where there is none.
    network_gbs: GB/s per device and direction between nodes in the usual build; None where there is no usual one.
    tdp_w: the most power that the board draws, in watts.
    link_source: where the four come from. measured: what was seen on a real device.
    verify: whether the sources disagree or are second-hand.
    """

    name: str
    aliases: tuple[str, ...] = ()
    bf16_tflops: Rate | None = None
    fp16_tflops: Rate | None = None
    tf32_tflops: Rate | None = None
    fp32_tflops: Rate | None = None
    fp8_tflops: Rate | None = None
    memory_gb: Rate
    usable_mib: Annotated[int, msgspec.Meta(ge=1)] | None = None
    memory_gbs: Rate
    link: LinkKind | None = None
    link_gbs: Rate | None = None
    node_devices: Annotated[int, msgspec.Meta(ge=1)] = 1
    network_gbs: Rate | None = None
    tdp_w: Rate | None = None
    multiprocessors: int | None = None
    source: Annotated[str, msgspec.Meta(min_length=1)]
    link_source: str | None = None
    measured: str | None = None
    verify: bool = False

    @property
    def capacity_bytes(self) -> int:
        """Bytes that plans are held to: what a program is given, or the datasheet's memory where that is not known."""
        return int(si_value(self, "memory_gb" if self.usable_mib is None else "usable_mib") or 0)


QUANTITIES: dict[str, tuple[str, str, float]] = {
    "bf16_tflops": ("bf16 matrix rate", "FLOP/s", 1e12),
    "fp16_tflops": ("fp16 matrix rate", "FLOP/s", 1e12),
    "tf32_tflops": ("tf32 matrix rate", "FLOP/s", 1e12),
    "fp32_tflops": ("fp32 vector rate", "FLOP/s", 1e12),
    "fp8_tflops": ("fp8 matrix rate", "FLOP/s", 1e12),
    "memory_gb": ("memory", "B", 1e9),
    "usable_mib": ("memory that a program is given", "B", 2**20),
    "memory_gbs": ("memory bandwidth", "B/s", 1e9),
    "link_gbs": ("link, per direction", "B/s", 1e9),
    "node_devices": ("devices in a node", "1", 1),
    "network_gbs": ("network, per device and direction", "B/s", 1e9),
    "tdp_w": ("board power", "W", 1),
    "multiprocessors": ("multiprocessors", "1", 1),
}
"""For each quantity of a Device: its name in words, its SI unit, and the factor from the field to that unit."""


@dataclass(frozen=True)
class Peak:
    """The highest rates of a device: FLOP/s of matrix products, bytes/s of its memory. kind: which rates they are."""

    name: str
    flops_per_s: Fraction
    bytes_per_s: Fraction
    kind: str

    def roofline_s(self, flops: Seconds, moved_bytes: Seconds) -> Seconds:
        """Return the least seconds for work of `flops` FLOPs that moves `moved_bytes`; exact where these are."""
        return max(flops / self.flops_per_s, moved_bytes / self.bytes_per_s)


def peak_of(device: Device, kind: Literal["bf16", "fp32"] = "bf16") -> Peak:
    """Return the dense matrix rate and the memory bandwidth of a device; InputError where no rate is known."""
    rate, bandwidth = si_value(device, f"{kind}_tflops"), si_value(device, "memory_gbs")
    if rate is None or bandwidth is None:
        raise InputError(f"{device.name} has no {kind} matrix rate in the catalogue (powerplan hardware {device.name})")
    return Peak(device.name, Fraction(rate), Fraction(bandwidth), f"the {kind} peak")


@cache
def devices() -> dict[str, Device]:
    """Return all known devices by their names, in the order of hardware.yaml. Raises InputError for a wrong row."""
    known = packaged_rows("hardware.yaml", "devices", Device)
    by_any_name(known.values())
    return known


def by_any_name(known: Iterable[Device]) -> dict[str, Device]:
    """Return devices by their names and aliases, folded; InputError where two share one."""
    found: dict[str, Device] = {}
    for device in known:
        for name in (device.name, *device.aliases):
            other = found.setdefault(_folded(name), device)
            if other is not device:
                raise InputError(f"{shown(name)} is a name or alias of both {other.name} and {device.name}")
    return found


def find_device(name: str) -> Device:
    """Return a device by its name or alias, in any case, with spaces or dashes; parts of names are never guessed."""
    wanted = _folded(name)
    known = by_any_name(devices().values())
    if wanted in known:
        return known[wanted]
    hint = did_you_mean(wanted, known, count=3, cutoff=0.4)
    raise InputError(f"{shown(name)} is not a known device{hint} (powerplan hardware lists them)")


def needs_device(name: str) -> InputError:
    """Return the error of a parameter that says something of a device where none is named."""
    return InputError(f"needs the device; such as {parameter('gpu', 'h100-sxm')}", parameter(name))


def _folded(name: str) -> str:
    return "-".join(name.strip().lower().split())


def si_value(device: Device, field: str) -> int | float | None:
    """Return a quantity of QUANTITIES in its SI unit, as an integer where it is whole; None where it is unknown."""
    value: float | None = getattr(device, field)
    if value is None:
        return None
    scaled = value * QUANTITIES[field][2]
    return round(scaled) if abs(scaled - round(scaled)) < 1e-3 else scaled
