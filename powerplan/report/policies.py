"""What the report of `decode` says of budgets, of prompts in chunks, of checkpoints and of pages."""

from __future__ import annotations

from typing import Any

from powerplan.caches.policy import Policy
from powerplan.report.parts import json_float
from powerplan.report.width import wrapped
from powerplan.serving import Serving
from powerplan.units import format_bytes, format_items, format_quantity, json_number

CHUNK = 8_192
"""Tokens of the chunks that are proposed for a prompt that does not fit whole."""

DECIMALS = 2
"""Decimals of how many times as much is allocated as is filled."""


def policy_entry(policy: Policy) -> dict[str, Any]:
    """Return what JSON says of a policy: its tokens and its engine, null where one is not asked for."""
    return {
        "cache_budget": policy.budget,
        "prefill_chunk": policy.prefill_chunk,
        "checkpoint_every": policy.checkpoint_every,
        "engine": policy.engine,
        "page": policy.page,
    }


def serving_entry(serving: Serving) -> dict[str, Any]:
    """Return what JSON says at one context: of a prompt's memory, of checkpoints, of what is allocated."""
    memory = serving.prefill_memory
    return {
        "prefill_memory": {
            "chunk": memory.chunk,
            "chunks": memory.chunks,
            "state_bytes": json_number(memory.state_bytes),
            "activation_bytes": json_number(memory.activation_bytes),
            "largest_at": memory.place,
            "is_estimate": memory.is_estimate,
            "peak_bytes": json_number(serving.prefill_bytes),
            "fits": serving.prompt_fits,
            "unchunked_peak_bytes": json_number(serving.unchunked().prefill_bytes),
        },
        "checkpoints": _checkpoints_entry(serving),
        "allocated": _allocated_entry(serving),
        "whole_cache_bytes": json_number(serving.whole_cache_bytes),
    }


def _checkpoints_entry(serving: Serving) -> dict[str, Any] | None:
    checkpoints, flops = serving.checkpoints, serving.resumed_flops
    if checkpoints is None or flops is None:
        return None
    return {
        "every": checkpoints.every,
        "count": checkpoints.count,
        "each_bytes": json_number(checkpoints.each),
        "bytes": json_number(checkpoints.bytes),
        "resumed_tokens": checkpoints.resumed,
        "resumed_flops": json_number(flops),
        "resumed_s": json_float(serving.resumed_seconds),
    }


def _allocated_entry(serving: Serving) -> dict[str, Any] | None:
    given = serving.allocation
    if given is None:
        return None
    return {
        "bytes": json_number(given.bytes),
        "page": given.page,
        "page_bytes": None if given.page_bytes is None else json_number(given.page_bytes),
        "padding_layers": given.padding_layers,
        "largest_batch": serving.largest_allocated_batch,
    }


def policy_lines(serving: Serving, indent: str) -> list[str]:
    """Return the lines on what was asked for, each beside what it would be without."""
    texts = [_prompt(serving), _allocated(serving), _checkpoints(serving)]
    return [line for text in texts if text for line in wrapped(text, indent)]


def _prompt(serving: Serving) -> str:
    policy, memory = serving.policy, serving.prefill_memory
    refused = serving.prompt_fits is False
    asked = policy.prefill_chunk is not None or policy.budget is not None
    # Where not one sequence fits, the line above has said so.
    if not asked and (not refused or serving.largest_batch == 0):
        return ""
    place = memory.place.replace("_", " ") + (", an estimate" if memory.is_estimate else "")
    takes = f"takes {format_bytes(memory.bytes)} beside the weights{', more than there is' if refused else ''}"
    parts = (
        f"state {format_bytes(memory.state_bytes)}, activations {format_bytes(memory.activation_bytes)}, "
        f"most of them in {place}"
    )
    if memory.chunks == 1:
        divisible = policy.prefill_chunk is None and serving.context > CHUNK
        smaller = f"; --prefill-chunk {CHUNK // 1024}k takes less" if refused and divisible else ""
        return f"reading a prompt whole {takes} ({parts}){smaller}"
    whole = format_bytes(serving.unchunked().prefill_memory.bytes)
    chunks = f"{memory.chunks:,} chunks of {memory.chunk:,} tokens"
    return f"reading a prompt in {chunks} {takes} ({parts}); whole it takes {whole}"


def _allocated(serving: Serving) -> str:
    given = serving.allocation
    if given is None:
        return ""
    times = f", {float(given.bytes / serving.state_bytes):,.{DECIMALS}f}x its state" if serving.state_bytes else ""
    pages = f"in pages of {given.page:,} token{'' if given.page == 1 else 's'}" if given.page else ""
    size = format_bytes(given.bytes)
    if serving.policy.engine:
        text = f"{serving.policy.engine} allocates {size} per sequence{times}{f', {pages}' if pages else ''}"
    else:
        text = f"{pages or 'without a cache in pages,'} a sequence takes {size}{times}"
    if given.padding_layers:
        text += f", with {given.padding_layers:,} padding layer{'' if given.padding_layers == 1 else 's'}"
    most = serving.largest_allocated_batch
    return text if most is None else f"{text}; {fitting(most)}"


def fitting(most: int) -> str:
    """Return how many sequences fit, as a clause without a place."""
    if not most:
        return "not one sequence fits"
    return f"{most:,} sequence{' fits' if most == 1 else 's fit'}"


def _checkpoints(serving: Serving) -> str:
    checkpoints, flops = serving.checkpoints, serving.resumed_flops
    if checkpoints is None or flops is None:
        return ""
    if not checkpoints.each:
        start = "no state of fixed size: checkpoints take nothing, and a prefix of any length can be resumed"
    else:
        count = format_items(checkpoints.count, "checkpoint")
        sizes = f"{format_bytes(checkpoints.each)} = {format_bytes(checkpoints.bytes)} per sequence"
        take = "takes" if checkpoints.count == 1 else "take"
        start = f"{count}, one every {checkpoints.every:,} tokens, {take} {checkpoints.count:,} x {sizes}"
    cost = f"{format_quantity(flops, 'FLOPs')} in place of {format_quantity(serving.prefill_flops, 'FLOPs')}"
    return f"{start}; a prompt that begins with all of it continues at token {checkpoints.resumed:,}, for {cost}"


def policy_remarks(policy: Policy) -> list[str]:
    """Return what a reader must know of the numbers under a policy, a sentence each."""
    remarks = []
    if policy.budget is not None:
        remarks.append(
            f"Budget: of a cache that grows, a layer keeps at most {policy.budget:,} tokens of a sequence. What "
            "eviction costs in quality is not modelled, and the scores that choose tokens are not counted."
        )
    if policy.engine is not None:
        remarks.append(
            f"{policy.engine}: only sequences that run are counted. Memory that it leaves free counts as usable."
        )
    return remarks


def policy_text(policy: Policy) -> str:
    """Return what a policy changes in steps and memory, for a figure; "" where that is nothing."""
    parts = []
    if policy.budget is not None:
        parts.append(f"caches of {policy.budget:,} tokens at most")
    if policy.checkpoint_every is not None:
        parts.append(f"with a checkpoint every {policy.checkpoint_every:,} tokens")
    return ", ".join(parts)
