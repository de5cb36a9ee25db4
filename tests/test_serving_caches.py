"""Budgets, prompts in chunks and checkpoints: against simulations token by token, by hand and against torch."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import model, served
from specs import contexts, specs

import powerplan
from powerplan.accounting import Accounting
from powerplan.caches.policy import Policy, prefill_state_flops
from powerplan.cli import main
from powerplan.dtypes import Dtypes
from powerplan.errors import InputError
from powerplan.ffn import MLP
from powerplan.hardware import find_device
from powerplan.load import catalogue_spec
from powerplan.mixers import RWKV7, Attention, ChunkedAttention, GatedDeltaNet
from powerplan.run.recipe import Recipe
from powerplan.run.saved import saved_block
from powerplan.serving import Fleet, Serving
from powerplan.spec import LayerGroup, ModelSpec, Norm

H100 = find_device("h100-sxm")
KIMI, QWEN = "kimi-linear-48b-a3b", "qwen3.5-35b-a3b"
sizes = st.integers(1, 800)


def evicted_pairs(context: int, budget: int, chunk: int, window: int | None) -> int:
    """Return how many keys the queries of a prompt meet in all, where a cache is cut to a budget behind every chunk."""
    kept, pairs = 0, 0
    for start in range(0, context, chunk):
        tokens = min(chunk, context - start)
        for place in range(tokens):
            pairs += min(kept + place + 1, window or context)
        kept = min(kept + tokens, budget)
    return pairs


@given(context=sizes, budget=sizes, chunk=sizes, window=st.none() | st.integers(1, 300))
def test_a_prompt_with_eviction_token_by_token(context: int, budget: int, chunk: int, window: int | None) -> None:
    if window is not None:
        budget = context  # A window loses nothing.
    accounting = Accounting(model((Attention(heads=2, kv_heads=1, head_dim=8, window=window), 3)))
    flops = prefill_state_flops(accounting, context, Policy(budget=budget, prefill_chunk=chunk))
    keys = evicted_pairs(context, budget if chunk < context else context, chunk, window)
    assert flops == 3 * 2 * 2 * (8 + 8) * keys


def is_smooth(spec: ModelSpec) -> bool:
    """Whether every cache and its FLOPs grow with every token.

    Tokens that wait to be compressed go when an entry is made of them. A chunk of attention begins with no keys, but
    so it does with a budget.
    """
    return all((mixer.steady or mixer.restarts_after) and mixer.kind != "compressed" for mixer in spec.mixers())


@settings(max_examples=50)
@given(spec=specs, context=contexts, less=sizes, more=sizes, chunk=sizes)
def test_a_smaller_budget_takes_no_more(spec: Any, context: int, less: int, more: int, chunk: int) -> None:
    less, more = sorted((less, more))
    few, many, every = (
        served(spec, context, budget=tokens, prefill_chunk=chunk) for tokens in (less, more, max(more, context))
    )
    without = served(spec, context, prefill_chunk=chunk)
    steps = [serving.step(3) for serving in (few, many, every, without)]
    assert steps[2] == steps[3]
    for name in ("cache_bytes", "state_bytes", "prefill_flops", "prefill_bytes"):
        assert getattr(every, name) == getattr(without, name)
        if is_smooth(spec):
            assert getattr(few, name) <= getattr(many, name) <= getattr(every, name)
    if is_smooth(spec):
        assert steps[0].flops <= steps[1].flops <= steps[2].flops
        assert steps[0].moved_bytes <= steps[1].moved_bytes <= steps[2].moved_bytes
    assert steps[0].memory_bytes == few.device_bytes + 3 * few.state_bytes
    assert few.recurrent_bytes == without.recurrent_bytes
    # Eviction behind the whole prompt saves none of its FLOPs.
    assert served(spec, context, budget=less).prefill_flops == without.prefill_flops


def test_a_budget_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["decode", "gemma-3-1b", "--ctx", "128k", "--batch", "2", "--cache-budget", "4k", "--json"]
    assert main(arguments) == 0
    place = json.loads(capsys.readouterr().out)["models"][0]["contexts"][0]
    kept = 4 * 4096 + 22 * 512  # 4 layers that keep every token, 22 with a window of 512 that stay as they are.
    assert place["cache_bytes"] == kept * 2 * 256 * 2 == place["state_bytes"]
    assert place["whole_cache_bytes"] == (4 * 131_072 + 22 * 512) * 2 * 256 * 2
    assert place["steps"][0]["cache_bytes"] == 2 * (kept + 26) * 2 * 256 * 2
    full = powerplan.decode("gemma-3-1b", "4k", batch=2).models[0].servings[0]
    assert place["steps"][0]["flops_per_token"] == full.step(2).flops / 2
    assert place["prefill_flops"] == powerplan.decode("gemma-3-1b", "128k").models[0].servings[0].prefill_flops


def test_the_memory_of_a_prompt_by_hand() -> None:
    """Llama 3 8B in chunks of 8,192: the residual stream, and an MLP's input, gate, up and their product."""
    spec = catalogue_spec("llama-3-8b")
    chunked = served(spec, 131_072, prefill_chunk=8192)
    memory = chunked.prefill_memory
    assert (memory.chunk, memory.chunks, memory.place) == (8192, 16, "mlp")
    assert memory.activation_bytes == 8192 * 2 * (4096 + 4096 + 3 * 14_336)
    assert memory.state_bytes == chunked.state_bytes == 32 * 2 * 8 * 128 * 2 * 131_072
    assert chunked.prefill_bytes == chunked.device_bytes + memory.state_bytes + memory.activation_bytes
    whole = chunked.unchunked().prefill_memory
    assert (whole.chunks, whole.activation_bytes) == (1, 16 * memory.activation_bytes)
    assert served(spec, 131_072, Dtypes("fp8"), prefill_chunk=8192).prefill_memory.activation_bytes == (
        memory.activation_bytes
    )
    one = served(spec, 131_072, prefill_chunk=1).prefill_memory
    assert (one.place, one.activation_bytes) == ("logits", 2 * 4096 + 4 * 128_256)
    evicting = served(spec, 131_072, budget=4096, prefill_chunk=8192)
    assert evicting.prefill_memory.state_bytes == 32 * 2 * 8 * 128 * 2 * (4096 + 8192)
    assert served(spec, 131_072, budget=4096).prefill_memory == whole


def test_states_before_chunks_are_there_while_a_prompt_is_read() -> None:
    """Qwen3.5's gated DeltaNet alone: 8,192 tokens have 127 states of 32 heads before chunks of 64 but the first."""
    delta = GatedDeltaNet(key_heads=16, heads=32, head_dim=128, chunk_size=64)
    spec = model((delta, 1))
    memory = served(spec, 8192).prefill_memory
    saved = saved_block(delta, spec, 8192, Recipe()).bytes
    assert memory.activation_bytes == 8192 * (2 * 256 + saved) + 127 * 32 * 128 * 128 * 2
    assert (memory.place, memory.is_estimate) == ("gated_deltanet", False)


def test_the_first_token_of_a_chunk_meets_itself_alone_and_the_last_all_of_it() -> None:
    chunked = ChunkedAttention(heads=2, head_dim=8, window=8)
    assert [Policy().position(chunked, context) for context in (1, 7, 8, 9, 15, 16, 17)] == [1, 7, 8, 1, 7, 8, 1]
    assert [Policy(budget=4).position(chunked, context) for context in (2, 8, 9, 16)] == [2, 4, 1, 4]


def test_a_prompt_that_is_all_in_a_checkpoint_reads_what_a_token_reads() -> None:
    accounting = Accounting(catalogue_spec(QWEN))  # Of its experts, 8 of 256.
    fleet = Fleet(H100, 8)
    serving = Serving(accounting, 8192, fleet=fleet, policy=Policy(checkpoint_every=4096))
    assert serving.resumed_flops == serving.head_flops
    moved = accounting.read_bytes(Dtypes()) + serving.state_bytes
    assert serving.resumed_seconds == fleet.seconds(Fraction(serving.head_flops), moved)


def test_states_that_training_keeps_too_count_once() -> None:
    rwkv = RWKV7(heads=4, head_dim=64, decay_rank=8, rate_rank=8, gate_rank=8)
    spec = model((rwkv, 1))
    saved = saved_block(rwkv, spec, 8192, Recipe())
    assert "states" in dict(saved.components)
    assert served(spec, 8192).prefill_memory.activation_bytes == 8192 * (2 * 256 + saved.bytes)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("gated", [True, False])
def test_the_memory_of_mlps_against_torch(gated: bool, dtype: str) -> None:
    from tracked import tracked_forward

    group = LayerGroup(repeat=3, ffn=MLP(intermediate_size=160, gated=gated))
    spec = ModelSpec(name="x", vocab_size=16, hidden_size=64, norm=Norm(per_layer=1), layers=(group,))
    memory = served(spec, 1000, dtype, prefill_chunk=512).prefill_memory
    found = tracked_forward(spec, 512, dtype)
    assert 0 <= found - memory.activation_bytes <= 512 * 4  # A norm in bf16 has a number in fp32 for each token.


@settings(max_examples=50)
@given(spec=specs, context=contexts, chunk=sizes, budget=st.none() | sizes)
def test_chunks_take_no_more_memory(spec: Any, context: int, chunk: int, budget: int | None) -> None:
    serving = served(spec, context, prefill_chunk=chunk, budget=budget)
    whole, memory = serving.unchunked().prefill_memory, serving.prefill_memory
    if is_smooth(spec) or budget is None:
        assert memory.bytes <= whole.bytes
        assert serving.state_bytes <= memory.state_bytes <= whole.state_bytes
    assert memory.chunks == len(range(0, context, chunk))
    if chunk >= context:
        assert memory == whole
        assert serving.prefill_flops == serving.unchunked().prefill_flops
    elif budget is None:
        assert serving.prefill_flops == serving.unchunked().prefill_flops
        assert memory.state_bytes == whole.state_bytes


def test_every_chunk_reads_the_weights() -> None:
    accounting = Accounting(catalogue_spec("llama-3-8b"))
    read = 2 * (8_030_261_248 - 128_256 * 4096)  # All but the input embedding, as a decoding step.
    for chunk, chunks in ((None, 1), (16, 64), (1, 1024), (1000, 2)):
        serving = Serving(accounting, 1024, "bf16", Fleet(H100), Policy(prefill_chunk=chunk))
        moved = (chunks * read + serving.state_bytes) / Fraction(3_350 * 10**9)
        assert serving.prefill_seconds == max(moved, serving.prefill_flops / Fraction(989 * 10**12))


def test_a_prompt_that_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["decode", "llama-3-8b", "--ctx", "1M", "--gpu", "h100-sxm", "--cache-budget", "4k"]
    assert main(arguments) == 0
    assert "beside the weights, more than there is (state 128 GiB" in " ".join(capsys.readouterr().out.split())
    assert main([*arguments, "--prefill-chunk", "8k"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "more than there is" not in said
    assert (
        "in 128 chunks of 8,192 tokens takes 2.281 GiB beside the weights (state 1.5 GiB, activations 800 MiB, "
        "most of them in mlp)" in said
    )
    assert "quality is not modelled" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("mamba2-2.7b --ctx 128M --gpu h200-sxm", "--prefill-chunk 8k takes less"),
        ("mamba2-2.7b --ctx 128M --gpu h200-sxm --prefill-chunk 64M", "whole it takes"),
        ("mamba2-2.7b --ctx 128M --gpu h200-sxm --prefill-chunk 128M", "reading a prompt whole takes"),
        ("mamba2-2.7b --ctx 8k --gpu h200-sxm", None),
        ("llama-3-8b --ctx 4M --gpu h200-sxm", None),
        ("mamba2-2.7b --ctx 128M", None),
    ],
)
def test_a_prompt_that_does_not_fit_is_said_without_a_budget_too(
    arguments: str, said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Not where it fits, where not one sequence fits anyway, and where there is no device."""
    assert main(["decode", *arguments.split(), "--batch", "1"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert ("beside the weights, more than there is" in text) == (said is not None) == ("reading a prompt" in text)
    assert said is None or said in text
    assert ("takes less" in text) == (said == "--prefill-chunk 8k takes less")


def test_checkpoints_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "decode",
        KIMI,
        "--ctx",
        "100000",
        "--checkpoint-every",
        "4k",
        "--gpu",
        "h200-sxm",
        "--batch",
        "1",
        "--json",
    ]
    assert main(arguments) == 0
    place = json.loads(capsys.readouterr().out)["models"][0]["contexts"][0]
    kept = place["checkpoints"]
    each = 43_417_600  # As docs/accounting.md says of the recurrent state.
    assert (kept["every"], kept["count"], kept["each_bytes"], kept["bytes"]) == (4096, 24, each, 24 * each)
    assert kept["resumed_tokens"] == 24 * 4096
    spec = catalogue_spec(KIMI)
    whole, prefix = (served(spec, tokens) for tokens in (100_000, 24 * 4096))
    assert kept["resumed_flops"] == whole.prefill_flops - (prefix.prefill_flops - prefix.head_flops)
    assert place["steps"][0]["memory_bytes"] == whole.stored_bytes + whole.state_bytes + 24 * each
    memory = Fleet(find_device("h200-sxm")).memory
    assert place["largest_batch"] == (memory - whole.stored_bytes) // (whole.state_bytes + 24 * each)


def test_a_checkpoint_holds_windows_and_no_token_twice() -> None:
    spec = model((Attention(heads=1, head_dim=8, window=100), 2), (Attention(heads=1, head_dim=8), 1))
    for every, tokens in ((30, 30), (100, 100), (250, 100)):
        checkpoints = served(spec, 1000, checkpoint_every=every).checkpoints
        assert checkpoints is not None
        assert checkpoints.bytes == 1000 // every * 2 * tokens * 16 * 2
    checkpoints = served(model((Attention(heads=1, head_dim=8), 1)), 1000, checkpoint_every=300).checkpoints
    assert checkpoints is not None
    assert (checkpoints.bytes, checkpoints.resumed) == (0, 1000)


@settings(max_examples=50)
@given(spec=specs, context=contexts, every=sizes, more=sizes)
def test_checkpoints_save_what_they_span(spec: Any, context: int, every: int, more: int) -> None:
    serving = served(spec, context, checkpoint_every=every)
    checkpoints, flops = serving.checkpoints, serving.resumed_flops
    assert checkpoints is not None
    assert flops is not None
    assert checkpoints.bytes == (context // every) * checkpoints.each
    assert 0 <= context - checkpoints.resumed < every
    assert serving.head_flops <= flops <= serving.prefill_flops
    if not checkpoints.resumed:
        assert flops == serving.prefill_flops
    recurrent = sum(mixer.state_size(context).recurrent * count for mixer, count in spec.mixer_counts())
    assert checkpoints.each >= 4 * recurrent
    multiple = served(spec, context, checkpoint_every=every * more).resumed_flops
    assert multiple is not None
    assert flops <= multiple


@pytest.mark.parametrize(
    ("arguments", "steps", "line"),
    [
        (
            ["gpt2-small", "--cache-budget", "4k", "--ctx", "2k,8k,64k,1M"],
            ["2,048", "2,048", "8,192", "8,192"],
            "The rows of 65,536 and 1,048,576 tokens are those of 8,192: the budget bounds every cache that grows.",
        ),
        (
            ["mamba2-130m", "--ctx", "2k,8k"],
            ["2,048", "2,048"],
            "The rows of 8,192 tokens are those of 2,048: no state grows there.",
        ),
        (["gpt2-small", "mamba2-130m", "--ctx", "2k,8k"], ["2,048"] * 4 + ["8,192"] * 4, None),
        (["gpt2-small", "--cache-budget", "4k", "--ctx", "64k"], [], None),
    ],
)
def test_equal_rows_stand_once(
    arguments: list[str], steps: list[str], line: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the table; CSV and JSON have the rows of every context."""
    command = ["decode", *arguments, "--batch", "1,8"]
    assert main([*command, "--gpu", "h100-sxm"]) == 0
    text = capsys.readouterr().out
    assert re.findall(r"^ *([0-9,]+) +(?:[a-z]\S+ +)?[18]  ", text, re.MULTILINE) == steps
    assert (line in " ".join(text.split())) if line else "The rows of" not in text
    assert main([*command, "--format", "csv"]) == 0
    models = sum(word in ("gpt2-small", "mamba2-130m") for word in arguments)
    contexts = len(arguments[-1].split(","))
    assert len(capsys.readouterr().out.splitlines()) == 1 + 2 * models * contexts


def test_a_budget_that_changes_nothing_is_said() -> None:
    for name, context in (("rwkv7-0.4b", "64k"), ("gpt2-small", "1k")):
        note = f"{name}: cache_budget changes nothing: no layer keeps more than 4,096 tokens"
        assert note in powerplan.decode(name, context, cache_budget="4k").notes
    assert not any("budget" in note for note in powerplan.decode("gpt2-small", "1k,8k", cache_budget="4k").notes)


def test_the_policy_in_json_and_in_python(capsys: pytest.CaptureFixture[str]) -> None:
    given = {"cache_budget": "4k", "prefill_chunk": 8192, "engine": "vllm", "page": 16}
    answer = powerplan.decode("gpt2-small", "64k", batch=1, **given)  # type: ignore[arg-type]
    options = "--cache-budget 4k --prefill-chunk 8k --engine vllm --page 16 --json"
    assert main(["decode", "gpt2-small", "--ctx", "64k", "--batch", "1", *options.split()]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data == answer.to_dict()
    assert data["policy"] == {
        "cache_budget": 4096,
        "prefill_chunk": 8192,
        "checkpoint_every": None,
        "engine": "vllm",
        "page": 16,
    }
    memory = data["models"][0]["contexts"][0]["prefill_memory"]
    assert memory["unchunked_peak_bytes"] > memory["peak_bytes"]
    with pytest.raises(InputError, match=r"cache_budget: 2\.5 is not a budget; write tokens, as 65536 or '64k'"):
        powerplan.decode("gpt2-small", cache_budget=2.5)  # type: ignore[arg-type]


def test_a_figure_says_the_policy() -> None:
    from drawn import below

    figure = powerplan.decode("llama-3-8b", "64k", cache_budget="4k").figure()
    assert below(figure).endswith("caches of 4,096 tokens at most")


PAGE = (Path(__file__).resolve().parent.parent / "docs" / "decode.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```console\n\$ powerplan (.*?)\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.parametrize(("command", "output"), EXAMPLES, ids=[command for command, _ in EXAMPLES])
def test_the_page_shows_what_is_printed(command: str, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 0
    printed = " ".join(capsys.readouterr().out.split())
    lines = [" ".join(line.split()) for line in output.splitlines() if line != "..."]
    assert lines
    assert all(line in printed for line in lines)


def test_the_page_names_every_key() -> None:
    place = powerplan.decode(KIMI, "8k", batch=1, engine="vllm", checkpoint_every="1k").to_dict()
    (context,) = place["models"][0]["contexts"]
    assert len(EXAMPLES) == 3
    for entry in (place["policy"], context["prefill_memory"], context["checkpoints"], context["allocated"]):
        for key in entry:
            assert f"`{key}`" in PAGE


@pytest.mark.parametrize("kind", [Attention, ChunkedAttention])
def test_windows_within_a_budget_lose_nothing(kind: type[Attention]) -> None:
    spec = model((kind(heads=2, head_dim=8, window=100), 1))
    without = served(spec, 1050, prefill_chunk=64)
    for budget in (100, 130, 5000):
        serving = served(spec, 1050, budget=budget, prefill_chunk=64)
        assert serving.step(1) == without.step(1)
        assert serving.prefill_flops == without.prefill_flops
    assert served(spec, 1050, budget=99).cache_bytes == 99 * 2 * 2 * 8 * 2
