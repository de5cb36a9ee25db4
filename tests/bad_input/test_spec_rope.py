"""Mistakes in the RoPE of a spec, and in its trained context."""

from __future__ import annotations

from collections.abc import Callable

import pytest

SPEC = """\
name: tiny
vocab_size: 1000
hidden_size: 768
LINE
layers:
  - repeat: 4
    mixer: {kind: attention, heads: 12, kv_heads: 4}
"""

# The fourth line of SPEC, and the message after "model.yaml:".
LINES = """
rope: 5
    4:7: rope: 5 is not a mapping or a list
rope: [5]
    4:8: rope[0]: 5 is not a mapping
rope: {thta: 5}
    4:8: rope.thta: unknown key; did you mean theta? allowed are in_layers, partial, scaling, theta
rope: {theta: 1}
    4:15: rope.theta: 1 is out of range; allowed is more than 1
rope: {theta: .inf}
    4:15: rope.theta: inf is out of range; allowed is at most 1,000,000,000,000,000
rope: {theta: 10k}
    4:15: rope.theta: '10k' is not a number
rope: [{theta: 77, partial: 1.5}]
    4:29: rope[0].partial: 1.5 is out of range; allowed is at most 1
rope: [{in_layers: [1, 0]}]
    4:20: rope[0].in_layers: lists layers in rising order, each once
rope: {in_layers: [1, 4]}
    4:7: rope: in_layers has 4, and the last layer is 3
rope: {scaling: yarn}
    4:17: rope.scaling: 'yarn' is not a mapping; write scaling: {kind: yarn, ...}
rope: {scaling: {factor: 2}}
    4:17: rope.scaling: needs a kind; allowed are dynamic, linear, llama3, longrope, proportional, yarn
rope: {scaling: {kind: yarm, factor: 2}}
    4:24: rope.scaling.kind: 'yarm' is not known; did you mean yarn? allowed are ...
rope: {scaling: {kind: yarn, factor: 2}}
    4:17: rope.scaling.original_context: is missing
rope: {scaling: {kind: yarn, factor: 0.5, original_context: 4k}}
    4:38: rope.scaling.factor: 0.5 is out of range; allowed is at least 1
rope: {scaling: {kind: yarn, factor: 2, original_context: 4kk}}
    4:59: rope.scaling.original_context: '4kk' is not a size in tokens; write ...
rope: {scaling: {kind: yarn, factor: 2, original_context: 4k, beta_fast: 0.5}}
    4:74: rope.scaling.beta_fast: 0.5 is less than beta_slow 1
rope: {scaling: {kind: yarn, factor: 2, original_context: 4k, betafast: 2}}
    4:63: rope.scaling.betafast: unknown key; did you mean beta_fast? allowed are ...
rope: {scaling: {kind: llama3, factor: 8, original_context: 8k, high_freq_factor: 0.5}}
    4:83: rope.scaling.high_freq_factor: 0.5 is less than low_freq_factor 1
rope: {scaling: {kind: longrope, factor: 8, short_factor: [1], long_factor: []}}
    4:77: rope.scaling.long_factor: is empty; at least one is needed
trained_context: 8kk
    4:18: trained_context: '8kk' is not a size in tokens; write ...
trained_context: 0
    4:18: trained_context: 0 is out of range; allowed is at least 1
"""


def cases() -> list[tuple[str, str]]:
    lines = LINES.strip().splitlines()
    return [(line, message.strip()) for line, message in zip(lines[::2], lines[1::2], strict=True)]


@pytest.mark.parametrize(("line", "message"), cases())
def test_one_mistake(
    expect_refusal: Callable[[list[str], str], None], spec: Callable[[str], list[str]], line: str, message: str
) -> None:
    expect_refusal(spec(SPEC.replace("LINE", line)), f"model.yaml:{message}")
