"""Pages: against simulations token by token, and what engines print."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from served import model, served
from specs import contexts, specs

import powerplan
from powerplan.caches.pages import PAGED_KINDS, allocation
from powerplan.caches.policy import Policy
from powerplan.cli import main
from powerplan.dtypes import Dtypes
from powerplan.errors import InputError
from powerplan.hardware import find_device
from powerplan.load import catalogue_names, catalogue_spec
from powerplan.mixers import Attention, GatedDeltaNet
from powerplan.serving import Fleet
from powerplan.spec import ModelSpec

KIMI, QWEN = "kimi-linear-48b-a3b", "qwen3.5-35b-a3b"
sizes = st.integers(1, 800)


def hybrid(value_heads: int, kv_heads: int) -> ModelSpec:
    """Return layers as Qwen3.5 has them: three of gated DeltaNet and one of attention with heads of 256."""
    delta = GatedDeltaNet(key_heads=16, heads=value_heads, head_dim=128)
    return model((delta, 3), (Attention(heads=16, kv_heads=kv_heads, head_dim=256), 1))


@pytest.mark.parametrize(
    ("value_heads", "kv_heads", "cache", "page", "padded"),
    [
        (32, 4, "bf16", 528, "0.76"),  # Qwen3.5-4B and 9B; vllm-project/vllm, pull request 37467 and issue 40696.
        (32, 4, "fp8", 1056, "0.76"),  # Qwen3.5-9B with an fp8 cache.
        (32, 2, "bf16", 1056, "0.76"),  # Qwen3.5-35B-A3B.
        (32, 2, "fp8", 2096, "0.00"),
        (48, 4, "bf16", 784, "0.13"),  # Qwen3.5-27B.
    ],
)
def test_blocks_of_hybrids_as_vllm_prints_them(
    value_heads: int, kv_heads: int, cache: str, page: int, padded: str
) -> None:
    """vLLM prints "Setting attention block size to 528 tokens" and "Padding mamba page size by 0.76%"."""
    dtypes = Dtypes(cache_dtype=cache)
    given = allocation(hybrid(value_heads, kv_heads), 10_000, dtypes, Policy(engine="vllm"))
    state = value_heads * 128 * 128 * 4 + 3 * (2 * 16 + value_heads) * 128 * 2
    size = page * 2 * kv_heads * 256 * dtypes.cache_bytes
    assert (given.page, given.page_bytes, given.padding_layers) == (page, size, 0)
    assert f"{float(100 * (size - state) / state):.2f}" == padded
    assert given.bytes == size * (3 + -(-10_000 // page))


def test_vllm_on_the_catalogue() -> None:
    """By hand: Qwen3.5 35B has 10 layers of attention and 30 of gated DeltaNet, Kimi Linear 7 of MLA and 20 of KDA."""
    page = 1056 * 2048
    given = allocation(catalogue_spec(QWEN), 131_072, Dtypes(), Policy(engine="vllm"))
    assert (given.bytes, given.page_bytes) == (10 * 125 * page + 30 * page, page)
    # A short prompt takes a page in every layer.
    assert allocation(catalogue_spec(QWEN), 12, Dtypes(), Policy(engine="vllm")).bytes == 40 * page
    cached = allocation(catalogue_spec(QWEN), 131_072, Dtypes(), Policy(engine="vllm", checkpoint_every=4096))
    assert cached.bytes == given.bytes + 30 * page
    given = allocation(catalogue_spec(KIMI), 131_072, Dtypes(), Policy(engine="vllm", page=64))
    # Groups have 7 layers: 3 of KDA, one layer of which is padding. A state fills 1,885 tokens of MLA, 30 blocks of 64.
    assert (given.page, given.padding_layers) == (1920, 1)
    assert given.bytes == 1920 * 1152 * (7 * 69 + 21)
    given = allocation(catalogue_spec("gpt-oss-20b"), 1000, Dtypes(), Policy(engine="vllm"))
    assert given.bytes == 16 * 2048 * 12 * (63 + 9)  # A window of 128 tokens has 8 blocks and one more.
    given = allocation(catalogue_spec("mistral-7b-v0.1"), 100_000, Dtypes(), Policy(engine="vllm"))
    assert given.bytes == 16 * 4096 * 32 * 257
    given = allocation(catalogue_spec("mamba2-130m"), 1000, Dtypes(), Policy(engine="vllm"))
    state = 24 * (1536 * 128 * 4 + 3 * (1536 + 2 * 128) * 2)
    assert (given.bytes, given.page) == (state, None)
    sglang = allocation(catalogue_spec("mamba2-130m"), 1000, Dtypes(), Policy(engine="sglang"))
    assert sglang.bytes == 5 * state


@pytest.mark.parametrize(("windows", "padding"), [(2, 0), (3, 1), (4, 0), (5, 1)])
def test_groups_of_vllm_are_the_larger_ones_only_where_they_are_not_half_as_large_again(
    windows: int, padding: int
) -> None:
    """_get_kv_cache_groups_uniform_page_size: max_num_layers < 1.5 min_num_layers; 12 and 13 layers take one more."""
    heads = {"heads": 4, "head_dim": 64}
    layers = (Attention(**heads, window=100), windows), (Attention(**heads), 2)
    assert allocation(model(*layers), 1000, Dtypes(), Policy(engine="vllm")).padding_layers == padding
    layers = (Attention(**heads, window=100), 12), (Attention(**heads), 13)
    assert allocation(model(*layers), 1000, Dtypes(), Policy(engine="vllm")).padding_layers == 1


def test_pages_of_different_sizes_in_vllm() -> None:
    """Smaller pages get more tokens, or are padded; layers that differ in heads alone have pages of their own."""
    window = Attention(heads=4, kv_heads=1, head_dim=64, window=100)
    full = Attention(heads=4, kv_heads=2, head_dim=64)
    given = allocation(model((window, 2), (full, 2)), 1000, Dtypes(), Policy(engine="vllm"))
    size = 16 * 2 * 2 * 64 * 2
    assert given.bytes == size * 2 * (63 + (4 + 1))  # Blocks of 16 tokens, and of 32 for windows.
    odd = Attention(heads=6, kv_heads=3, head_dim=64)
    given = allocation(model((window, 2), (full, 2), (odd, 2)), 1000, Dtypes(), Policy(engine="vllm"))
    size = 16 * 2 * 3 * 64 * 2
    assert given.page_bytes == size
    assert given.bytes == size * 2 * (63 + 63 + (-(-100 // 48) + 1))
    given = allocation(model((full, 2), (odd, 1)), 1000, Dtypes(), Policy(engine="vllm"))
    assert given.bytes == 63 * 16 * 2 * 64 * 2 * (2 * 2 + 3)
    assert given.page_bytes is None
    latent, full = catalogue_spec("deepseek-v2").mixers()[0], Attention(heads=8, head_dim=128)
    with pytest.raises(InputError, match="pages of MLA layers here do not divide those of other layers"):
        allocation(model((window, 1), (latent, 1), (full, 1)), 1000, Dtypes(), Policy(engine="vllm"))


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 33, 100])
@pytest.mark.parametrize("page", [1, 2, 16, 48])
def test_pages_of_a_window_at_the_worst_place(window: int, page: int) -> None:
    spec = model((Attention(heads=1, head_dim=8, window=window), 1))
    for context in (1, 10, 40, 500):
        held = [
            len({token // page for token in range(max(0, end - window), end)}) for end in range(context, context + page)
        ]
        given = allocation(spec, context, Dtypes(), Policy(page=page))
        pages = given.bytes / (page * 16 * 2)
        assert pages == min(max(held), -(-context // page))


@settings(max_examples=60)
@given(spec=specs, context=contexts, page=st.sampled_from([1, 2, 16, 64]), budget=st.none() | sizes)
def test_no_less_is_allocated_than_is_filled(spec: Any, context: int, page: int, budget: int | None) -> None:
    paged = served(spec, context, page=page, budget=budget)
    assert paged.allocation is not None
    assert paged.allocation.bytes >= paged.state_bytes
    if page == 1:
        assert paged.allocation.bytes == paged.state_bytes
    for engine in ("vllm", "sglang"):
        serving = served(spec, context, page=page, budget=budget, engine=engine)
        if any(mixer.entry and mixer.kind not in PAGED_KINDS for mixer in spec.mixers()):
            with pytest.raises(InputError, match="how it allocates"):
                _ = serving.allocation
            continue
        with suppress(InputError):  # Pages of MLA that do not divide those of other layers.
            assert serving.allocation is not None
            assert serving.allocation.bytes >= serving.state_bytes


@pytest.mark.parametrize("name", catalogue_names())
def test_every_model_is_allocated_or_refused(name: str) -> None:
    serving = served(catalogue_spec(name), 100_000, engine="vllm")
    if any(mixer.entry and mixer.kind not in PAGED_KINDS for mixer in serving.accounting.spec.mixers()):
        with pytest.raises(InputError, match="engine vllm: how it allocates"):
            _ = serving.allocation
        return
    assert serving.allocation is not None
    assert serving.state_bytes <= serving.allocation.bytes <= 2 * serving.state_bytes


def test_what_fits_as_it_is_allocated(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["decode", QWEN, "--ctx", "100", "--gpu", "h200-sxm", "--engine", "vllm"]
    assert main([*arguments, "--json"]) == 0
    place = json.loads(capsys.readouterr().out)["models"][0]["contexts"][0]
    given = place["allocated"]
    weights = served(catalogue_spec(QWEN), 100).stored_bytes
    memory = Fleet(find_device("h200-sxm")).memory
    assert given["bytes"] == 40 * 1056 * 2048
    assert given["largest_batch"] == (memory - weights) // given["bytes"] < place["largest_batch"]
    assert main(arguments) == 0
    said = " ".join(capsys.readouterr().out.split())
    told = "vllm allocates 82.5 MiB per sequence, 1.30x its state, in pages of 1,056 tokens; "
    assert f"{told}{given['largest_batch']:,} sequences fit" in said


def test_kinds_that_an_engine_does_not_have() -> None:
    answer = powerplan.decode("power-coder-3b", "8k", engine="vllm")
    assert "power-coder-3b: vllm has no layers of kind power: their state is counted as it counts that of Mamba" in (
        answer.notes
    )
    assert powerplan.decode(QWEN, "8k", engine="vllm").notes == ()
