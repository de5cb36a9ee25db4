"""The table of docs/accounting.md that compares counters: their published formulas against powerplan's numbers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from powerplan.accounting import Accounting
from powerplan.ffn import MLP
from powerplan.load import catalogue_spec
from powerplan.mixers import Attention, Convention

DOC = (Path(__file__).parent.parent / "docs" / "accounting.md").read_text(encoding="utf-8")
CONTEXTS = (8_192, 131_072)
SPEC = catalogue_spec("llama-3-8b")
LAYERS, HIDDEN, VOCABULARY = SPEC.layer_count, SPEC.hidden_size, SPEC.vocab_size


def parts() -> tuple[Attention, MLP]:
    (use,) = SPEC.layer_uses()
    assert isinstance(use.layer.mixer, Attention)
    assert isinstance(use.layer.ffn, MLP)
    return use.layer.mixer, use.layer.ffn


def powerplan(context: int, causal: str) -> tuple[int, int]:
    accounting = Accounting(SPEC, Convention(causal))  # type: ignore[arg-type]
    state = accounting.state_flops_per_token(context)
    assert state.denominator == 1
    return accounting.weight_flops_per_token, int(state)


def megatron(context: int, halved: bool) -> tuple[int, int]:
    """num_floating_point_operations: 12 m^2 (1 + G/H + t/m [/2]) + 12 m f 3/2 per layer and 6 m V; a third is forward.

    The padded vocabulary is the vocabulary here: a multiple of 128.
    """
    mixer, ffn = parts()
    assert VOCABULARY % 128 == 0
    assert mixer.heads * mixer.head_dim == HIDDEN
    projections = 4 * HIDDEN * (HIDDEN + HIDDEN * mixer.kv_heads // mixer.heads)
    mlp = 4 * HIDDEN * ffn.intermediate_size * 3 // 2
    core = 4 * HIDDEN * context // (2 if halved else 1)
    return LAYERS * (projections + mlp) + 2 * HIDDEN * VOCABULARY, LAYERS * core


def torchtitan(context: int) -> tuple[int, int]:
    """get_num_flop_per_token: 6 (parameters - embedding) + 12 l h q t, over 3 for forward."""
    mixer, _ = parts()
    parameters = Accounting(SPEC).total_parameters.with_embeddings - VOCABULARY * HIDDEN
    return 2 * parameters, 4 * LAYERS * mixer.heads * mixer.head_dim * context


def deepspeed(context: int) -> tuple[int, int]:
    """_linear_flops_compute and _attn_flops_compute (unmasked) of every token, over the tokens."""
    mixer, ffn = parts()
    query, value = (context, mixer.head_dim), mixer.v_head_dim
    macs = mixer.heads * (query[0] * query[1] * context + query[0] * context * value)
    shapes = [
        (HIDDEN, mixer.heads * mixer.head_dim),
        (HIDDEN, mixer.kv_heads * mixer.head_dim),
        (HIDDEN, mixer.kv_heads * value),
        (mixer.heads * value, HIDDEN),
        *[(HIDDEN, ffn.intermediate_size)] * 3,
    ]
    linear = LAYERS * sum(2 * wide * high for wide, high in shapes) + 2 * HIDDEN * VOCABULARY
    assert 2 * macs % context == 0
    return linear, LAYERS * 2 * macs // context


COUNTERS = {
    "powerplan": lambda context: powerplan(context, "exact"),
    "powerplan `--causal full`": lambda context: powerplan(context, "full"),
    "Megatron-LM since 2025": lambda context: megatron(context, halved=True),
    "Megatron-LM before": lambda context: megatron(context, halved=False),
    "torchtitan": torchtitan,
    # The counter's own arithmetic is in tests/huggingface/test_transformers_flops.py, over models that are built.
    "FlopCounterMode": lambda context: powerplan(context, "full"),
    "DeepSpeed profiler": deepspeed,
}


@pytest.mark.parametrize("counter", COUNTERS)
def test_table_of_counters(counter: str) -> None:
    (row,) = re.findall(rf"^\| {re.escape(counter)} \|(.*)$", DOC, re.MULTILINE)
    weights, *attention = (int(cell.replace(",", "")) for cell in row.split("|")[:3])
    computed = [COUNTERS[counter](context) for context in CONTEXTS]
    assert {weight for weight, _ in computed} == {weights}
    assert [state for _, state in computed] == attention


def test_every_row_is_checked() -> None:
    table = DOC.split("| counter |")[1].split("\n\n")[0]
    assert table.count("\n| ") == len(COUNTERS)


def test_spread_over_the_whole_model() -> None:
    totals = [sum(COUNTERS[counter](131_072)) for counter in COUNTERS]
    assert f"{min(totals) / 1e9:.1f} GFLOPs against {max(totals) / 1e9:.1f}" in DOC
    assert f"is {max(totals) / min(totals):.1f}x" in DOC


@pytest.mark.parametrize(
    ("name", "gigaflops", "cache_bytes", "attention"),
    [("deepseek-v2", 155, None, 1.0), ("deepseek-v3", 250, 70_272, 1.0), ("llama-3.1-405b", 2448, 516_096, 0.5)],
)
def test_costs_of_a_token_are_those_that_deepseek_publishes(
    name: str, gigaflops: int, cache_bytes: int | None, attention: float
) -> None:
    """arXiv 2505.09343, tables 1 and 2: training at 4,096 tokens with a causal mask, and a cache in bf16.

    Its 2,448 GFLOPs of Llama 3.1 405B have half of the attention that such a mask leaves; all of it makes 2,473.
    """
    row = Accounting(catalogue_spec(name)).row(4096)
    assert round(3 * (row.weight_flops_per_token + attention * float(row.state_flops_per_token)) / 1e9) == gigaflops
    assert cache_bytes in (None, row.state_bytes / 4096)
