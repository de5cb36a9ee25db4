"""The reports of `powerplan models`, `hardware` and `doctor`: what is built in, and what this machine has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from fractions import Fraction
from typing import Any

import msgspec

from powerplan.accounting import Accounting, positions_text
from powerplan.doctor import Finding
from powerplan.hardware import QUANTITIES, Device, si_value
from powerplan.huggingface.listing import Listed
from powerplan.report.parts import model_entry
from powerplan.report.render import Report
from powerplan.report.tables import Column, grouped, plain
from powerplan.report.width import wrapped
from powerplan.spec import ModelSpec
from powerplan.units import format_count, format_parameters


def models_report(accountings: Sequence[Accounting]) -> Report:
    """Return the catalogue, a line each."""
    rows = [_model_row(accounting) for accounting in accountings]
    columns = [
        Column("name", "model", left=True),
        Column("params_total", "parameters", format_parameters),
        Column("params_active", "active", format_parameters),
        Column("layers", "layers", grouped),
        Column("hidden_size", "hidden", grouped),
        Column("mixers", "mixers", lambda value: " + ".join(value), left=True),
        Column("balanced_context", "balanced at", lambda value: grouped(value) or "-"),
    ]
    legend = [
        "balanced at: the context, in tokens, whose state FLOPs equal the weight FLOPs; - where none does.",
        "powerplan models NAME tells more, powerplan models NAME --yaml prints an editable spec.",
    ]
    return Report("powerplan.models/1", {"models": rows}, columns, rows, legend=legend)


def families_report(families: Sequence[Listed]) -> Report:
    """Return every model_type of a config.json that is known, a line each."""
    rows = [family._asdict() for family in families]
    columns = [
        Column("model_type", "model_type", left=True),
        Column("status", "status", left=True),
        Column("detail", "text_config, or why not", left=True),
    ]
    counts = {status: sum(row["status"] == status for row in rows) for status in ("read", "wrapper", "refused")}
    after = [
        f"{counts['read']} families are read, and the text decoders of {counts['wrapper']} wrappers; "
        f"{counts['refused']} are refused, and why.",
        "--like NAME reads a file of another model_type as one of these families.",
    ]
    return Report("powerplan.families/1", {"families": rows}, columns, rows, after=after)


def _model_row(accounting: Accounting) -> dict[str, Any]:
    spec = accounting.spec
    mixers = (use.layer.mixer.describe() for use in accounting.uses if use.layer.mixer is not None)
    return {
        "name": spec.name,
        "aliases": list(spec.aliases),
        "params_total": accounting.total_parameters.with_embeddings,
        "params_active": accounting.active_parameters.with_embeddings,
        "layers": spec.layer_count,
        "hidden_size": spec.hidden_size,
        "vocab_size": spec.vocab_size,
        "tie_embeddings": spec.tie_embeddings,
        "mixers": list(dict.fromkeys(mixers)),
        "balanced_context": accounting.balanced_context(),
        "published": spec.published,
        "source": spec.source,
        "note": spec.note,
    }


def model_report(accounting: Accounting) -> Report:
    """Return one model in detail."""
    spec = accounting.spec
    total, active = accounting.total_parameters, accounting.active_parameters
    payload = _model_row(accounting) | {
        "quantization": spec.quantization.method if spec.quantization else None,
        "rope": None if spec.rope is None else [msgspec.to_builtins(rope) for rope in spec.rope_settings],
        "trained_context": spec.trained_context,
        "params_by_convention": model_entry(accounting)["params_by_convention"],
        "layer_kinds": [
            {"layers": positions_text(use.positions), "count": use.count, "layer": use.layer.describe()}
            for use in accounting.uses
        ],
    }
    counts = {"parameters": total} | ({} if active == total else {"active parameters": active})
    none = "no context" if accounting.longest_is_found else "not computed"
    facts = []
    for label, count in counts.items():
        facts += [
            (label, f"{count.with_embeddings:,}"),
            ("  without input embedding", f"{count.without_input_embedding:,}"),
            ("  without embeddings", f"{count.without_embeddings:,}"),
        ]
    facts += [
        ("hidden size", f"{spec.hidden_size:,}"),
        ("vocabulary", f"{spec.vocab_size:,}{', tied' if spec.tie_embeddings else ''}"),
        *((kind["layers"], kind["layer"]) for kind in payload["layer_kinds"]),
        *_shapes(spec),
        *([("quantization", payload["quantization"])] if payload["quantization"] else []),
        *_positions(spec),
        ("balanced at", grouped(payload["balanced_context"]) or none),
        ("aliases", ", ".join(spec.aliases) or "-"),
        *((key, getattr(spec, key)) for key in ("published", "source", "note") if getattr(spec, key)),
    ]
    columns = [Column("key", spec.name, left=True), Column("value", "", left=True)]
    return Report("powerplan.model/1", payload, columns, [{"key": key, "value": value} for key, value in facts])


def _shapes(spec: ModelSpec) -> list[tuple[str, str]]:
    """Return the heads of the mixers that have any in the sense of softmax attention, of each shape once."""
    shapes: dict[str, list[str]] = {}
    for mixer in spec.mixers():
        if (heads := mixer.own_heads()) is not None:
            shapes.setdefault(heads.describe(), []).append(mixer.describe())
    only = len(spec.mixers()) == sum(map(len, shapes.values())) and len(shapes) == 1
    return [("heads" if only else f"heads of {' and '.join(names)}", shape) for shape, names in shapes.items()]


def _positions(spec: ModelSpec) -> list[tuple[str, str]]:
    """Return how queries and keys of a model are rotated, and the context that it was trained for, where known."""
    facts = [("RoPE", "none")] if spec.rope == () else []
    settings = spec.rope_settings
    for rope in settings:
        place = ", in the other layers" if len(settings) > 1 else ""
        if rope.in_layers is not None:
            place = f", in {positions_text([rope.in_layers])}"
        facts.append(("RoPE", f"{rope.describe()}{place}"))
    if spec.trained_context is not None:
        facts.append(("trained for", f"{spec.trained_context:,} tokens"))
    return facts


def devices_report(devices: Sequence[Device]) -> Report:
    """Return the device table, a line each, in SI units in JSON."""
    rows = [_device_row(device) for device in devices]

    def tera(value: Any) -> str:
        return "-" if value is None else f"{value / 1e12:,g}"

    def giga(value: Any) -> str:
        return "-" if value is None else f"{value / 1e9:,g}"

    columns = [
        Column("name", "device", left=True),
        *(Column(f"{dtype}_flops", f"{dtype} TFLOP/s", tera) for dtype in ("bf16", "fp8", "fp32")),
        Column("memory_bytes", "memory GB", lambda value: f"{value / 1e9:g}"),
        Column("usable_bytes", "usable GiB", lambda value: "-" if value is None else f"{value / 2**30:.1f}"),
        Column("memory_bytes_per_s", "GB/s", lambda value: f"{value / 1e9:,g}"),
        Column("link_bytes_per_s", "link GB/s", giga),
        Column("node_devices", "node", grouped),
        Column("network_bytes_per_s", "network GB/s", giga),
        Column("tdp_w", "W", lambda value: grouped(value) or "-"),
        Column("verify", "", lambda value: "verify" if value else "", left=True),
    ]
    after = [
        "dense rates, no structured sparsity; verify: sources disagree or are second-hand.",
        "memory: as datasheets have it, whose GB is nearly a GiB.",
        "usable: what a program is given of the memory, to which plans are held.",
        "link: within a node of so many devices; network: between nodes; per device and direction. W: board power.",
        "powerplan hardware NAME gives unit and source of every value.",
    ]
    return Report("powerplan.hardware/1", {"devices": rows}, columns, rows, after=after)


_JSON_NAMES = {
    "memory_gb": "memory_bytes",
    "usable_mib": "usable_bytes",
    "memory_gbs": "memory_bytes_per_s",
    "link_gbs": "link_bytes_per_s",
    "network_gbs": "network_bytes_per_s",
}

_LINKS = ("node_devices", "network_gbs", "tdp_w")
"""The quantities whose source is `link_source`."""


def _device_row(device: Device) -> dict[str, Any]:
    values = {_JSON_NAMES.get(name, name.replace("tflops", "flops")): si_value(device, name) for name in QUANTITIES}
    return {
        "name": device.name,
        "aliases": list(device.aliases),
        **values,
        "link": device.link,
        "source": device.source,
        "link_source": device.link_source,
        "measured": device.measured,
        "verify": device.verify,
    }


def device_report(device: Device) -> Report:
    """Return one device: quantity, value, unit and source."""
    rows = [
        {"quantity": label, "value": value, "unit": unit, "source": _source(device, field)}
        for field, (label, unit, _) in QUANTITIES.items()
        if (value := si_value(device, field)) is not None
    ]
    given = device.usable_mib is not None
    remarks = {
        "memory": "a datasheet's GB is nearly a GiB; plans are held to what a program is given" if given else "",
        "aliases": ", ".join(device.aliases),
        "link": device.link,
        "measured": device.measured,
        "verify": "the sources disagree or are second-hand" if device.verify else "",
    }
    after = [f"{name}: {remark}" for name, remark in remarks.items() if remark]
    columns = [
        Column("quantity", device.name, left=True),
        Column("value", "value", lambda value: format_count(Fraction(value))),
        Column("unit", "unit", lambda value: "" if value == "1" else plain(value), left=True),
        Column("source", "source", left=True),
    ]
    return Report("powerplan.hardware/1", {"devices": [_device_row(device)]}, columns, rows, after=after)


def _source(device: Device, field: str) -> str:
    if field == "usable_mib":
        return "the total that PyTorch prints when memory runs out, XLA's for TPUs (public logs)"
    return (device.link_source or device.source) if field in _LINKS else device.source


def doctor_report(findings: Sequence[Finding]) -> Report:
    """Return the examination of this machine; what is missing and how to get it stands below the table."""
    rows: list[dict[str, Any]] = [asdict(finding) for finding in findings]
    columns = [
        Column("what", "", left=True),
        # The default of an option may be a list, such as 8k,64k, and lines end at spaces only.
        Column("found", "found", lambda value: re.sub(r",(?! )", ", ", value), left=True),
        Column("ok", "", lambda value: {None: "", True: "ok", False: "missing"}[value], left=True),
        Column("remedy", "remedy", raw=True),
    ]
    remedies = [f"{finding.what}: {finding.remedy}" for finding in findings if finding.remedy]
    after = [line for remedy in remedies for line in wrapped(remedy, indent=2)]
    return Report("powerplan.doctor/1", {"findings": rows}, columns, rows, after=after)
