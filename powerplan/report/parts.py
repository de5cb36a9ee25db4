"""What several reports have in common: cells of tables, lines of text, and parts of the JSON."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from powerplan.accounting import Accounting, Row
from powerplan.dtypes import STATE_DTYPE, Dtypes
from powerplan.entries import host_parameters
from powerplan.report.colour import side_of
from powerplan.report.tables import Column, grouped
from powerplan.spec import ModelSpec
from powerplan.units import format_bytes, format_count, format_parameters, format_ratio, json_number


def balance_text(accounting: Accounting) -> str:
    """Return where a model is balanced, as a clause: at a context, at none, or that it is not computed."""
    balanced = accounting.balanced_context()
    if balanced is not None:
        return f"balanced at {balanced:,} tokens"
    return "balanced at no context" if accounting.longest_is_found else "where it balances is not computed"


def show_ratio(value: float | Fraction | None) -> str:
    """Show a weight-state FLOP ratio of a row."""
    return "no state" if value is None else format_ratio(Fraction(value))


def show_flops(value: int | float | Fraction) -> str:
    """Show FLOPs, a dash for none."""
    return format_count(Fraction(value)) if value else "-"


def show_bytes(value: int | float | Fraction) -> str:
    """Show bytes of a row."""
    return format_bytes(Fraction(value))


CONTEXT = Column("context", "context", grouped)
FLOPS = [
    Column("weight_flops_per_token", "weight\nFLOPs", show_flops),
    Column("state_flops_per_token", "state\nFLOPs", show_flops),
]
RATIOS = [
    *FLOPS,
    Column("wsfr", "WSFR", show_ratio, role=side_of),
    Column("state_bytes", "state per\nsequence", show_bytes),
    Column("decode_weight_bytes_per_token", "decode:\nweights", show_bytes),
    Column("decode_state_bytes_per_token", "decode:\nstate", show_bytes),
]
"""Columns of what `row_entry` says beside the context."""


def parameters_text(accounting: Accounting) -> str:
    """Return the size of a model in words: "671B parameters, 37.6B active"."""
    total, active = accounting.total_parameters.with_embeddings, accounting.active_parameters.with_embeddings
    size = f"{format_parameters(total)} parameters"
    if host_parameters(accounting):
        size += f", {format_parameters(host_parameters(accounting))} of them on the host"
    return size if active == total else f"{size}, {format_parameters(active)} active"


def model_entry(accounting: Accounting) -> dict[str, Any]:
    """Return what JSON says of a model: its name and its parameters."""
    total, active = accounting.total_parameters, accounting.active_parameters
    quantization = accounting.spec.quantization
    return {
        "name": accounting.spec.name,
        "params_total": total.with_embeddings,
        "params_active": active.with_embeddings,
        "params_on_host": host_parameters(accounting),
        "position_embeddings": accounting.spec.position_embeddings,
        "trained_context": accounting.spec.trained_context,
        "quantization": quantization.method if quantization else None,
        "params_by_convention": {
            name: {"total": getattr(total, name), "active": getattr(active, name)}
            for name in ("with_embeddings", "without_input_embedding", "without_embeddings")
        },
    }


def on_host(accounting: Accounting) -> str:
    """Return the sentence, led by a space, for a training run whose tables lie in the memory of the host; else ""."""
    held = host_parameters(accounting)
    if not held:
        return ""
    return (
        f" {format_parameters(held)} parameters stay on the host with their gradients and optimizer states; the way of "
        "their rows to the devices takes no time here."
    )


def json_float(value: Fraction | None) -> float | None:
    """Return a number as JSON has it: the nearest float, or null."""
    return None if value is None else float(value)


def convention_entry(accounting: Accounting, dtypes: Dtypes) -> dict[str, Any]:
    """Return what JSON says of the convention that the numbers follow."""
    convention = accounting.convention
    counted = {"causal": convention.causal, "lm_head": convention.lm_head, "form": convention.form}
    return counted | dtypes_entry(dtypes)


def dtypes_entry(dtypes: Dtypes) -> dict[str, str]:
    """Return what JSON says of the number formats that bytes are counted in."""
    return {
        "dtype": dtypes.dtype,
        "weights_dtype": dtypes.weights,
        "cache_dtype": dtypes.cache,
        "recurrent_state_dtype": dtypes.state,
    }


def weights_text(spec: ModelSpec, dtypes: Dtypes) -> str:
    """Return the formats of a model's weights in words: "bf16", or "mxfp4 and bf16" where some are quantized."""
    quantization = spec.quantization if dtypes.weights_dtype is None else None
    return f"{quantization.method} and {dtypes.weights}" if quantization else dtypes.weights


def dtypes_text(specs: Sequence[ModelSpec], dtypes: Dtypes) -> str:
    """Return the number formats in words: "weights and cache in bf16"; those of quantized weights model by model.

    Recurrent state is named where it is not in fp32.
    """
    quantized = [spec for spec in specs if weights_text(spec, dtypes) != dtypes.weights]
    if len(quantized) == len(specs) == 1:
        parts = [f"weights in {weights_text(specs[0], dtypes)}", f"cache in {dtypes.cache}"]
    elif dtypes.weights == dtypes.cache:
        parts = [f"weights and cache in {dtypes.cache}"]
    else:
        parts = [f"weights in {dtypes.weights}", f"cache in {dtypes.cache}"]
    if len(specs) > 1:
        parts += [f"weights of {spec.name} in {weights_text(spec, dtypes)}" for spec in quantized]
    return ", ".join([*parts, *([f"recurrent state in {dtypes.state}"] if dtypes.state != STATE_DTYPE else [])])


def moved_text(specs: Sequence[ModelSpec], dtypes: Dtypes) -> str:
    """Return `dtypes_text`, and that decoding a token reads and writes recurrent state, where there is any."""
    text = dtypes_text(specs, dtypes)
    if not any(mixer.state_size(1).recurrent for spec in specs for mixer in spec.mixers()):
        return text
    named = "" if dtypes.state != STATE_DTYPE else f", recurrent state in {dtypes.state}"
    return f"{text}{named}, read and written"


def context_remark(spec: ModelSpec, context: int, *, trained: bool = False) -> str | None:
    """Return a remark on a context in tokens that is longer than those that a model was trained for, None if it is not.

    trained: whether the model is to be trained at that context: then it is a remark on its RoPE.
    """
    reached = spec.reached_context
    if spec.trained_context is None or reached is None or context <= reached:
        return None
    rotated, limit = bool(spec.rope), f"contexts up to {spec.trained_context:,} tokens"
    if reached > spec.trained_context:
        limit += f", and its RoPE scaled to {reached:,}"
    elif scaling := next(iter(spec.rope_scalings), None):
        limit += f" ({scaling.describe()})"
    if trained:
        return f"its RoPE was made for {limit}: longer ones may need a larger base or scaling" if rotated else None
    return f"trained for {limit}: longer ones need {'RoPE scaling and ' if rotated else ''}further training"


def row_entry(row: Row) -> dict[str, Any]:
    """Return what JSON says at one context: numbers that are not rounded."""
    return {
        "context": row.context,
        "weight_flops_per_token": row.weight_flops_per_token,
        "state_flops_per_token": json_number(row.state_flops_per_token),
        "wsfr": json_float(row.wsfr),
        "state_elements": row.state_elements,
        "state_bytes": json_number(row.state_bytes),
        "decode_weight_bytes_per_token": json_number(row.decode_weight_bytes_per_token),
        "decode_state_bytes_per_token": json_number(row.decode_state_bytes_per_token),
    }
