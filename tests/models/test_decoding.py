"""A model goes on from its cache as if it had met all tokens at once; the cache has the bytes of the accounting."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
from kinds import EXPERTS, MIXERS, spec_of

from powerplan.accounting import Accounting
from powerplan.errors import InputError
from powerplan.mixers import MLA, NSA, Attention, LogLinear, MoBA
from powerplan.models import Cache, build_model, generate
from powerplan.models.cache import GrowingBuffer

GROWS = [
    kind
    for kind, mixer in MIXERS.items()
    if isinstance(mixer, (Attention, MLA, LogLinear, MoBA, NSA)) and "window" not in kind
]
"""Log-linear attention has a state for each bit of the number of tokens, of which there are 13 and then 18."""
PIECES = {"prompt and tokens": [23, 1, 1, 1, 1], "all tokens": [1] * 27, "odd": [1, 9, 2, 14, 1], "no prompt": [0, 27]}


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("pieces", list(PIECES))
def test_pieces_equal_the_whole(kind: str, pieces: str) -> None:
    torch.manual_seed(0)
    model = build_model(spec_of(MIXERS[kind], EXPERTS, repeat=2), dtype=torch.float64)
    tokens = torch.randint(9, (2, 27))
    cache, outs, start = Cache(), [], 0
    for length in filter(None, PIECES[pieces]):
        outs.append(model(tokens[:, start : start + length], cache))
        start += length
    torch.testing.assert_close(torch.cat(outs, 1), model(tokens))
    assert cache.tokens == 27


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize(("dtype", "name"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
def test_the_cache_has_the_bytes_of_the_accounting(kind: str, dtype: torch.dtype, name: str) -> None:
    """Keys, values, latents and inputs of convolutions in the model's dtype, recurrent states in float32."""
    spec = spec_of(MIXERS[kind], repeat=2)
    model, cache = build_model(spec, dtype=dtype), Cache()
    for length in (1, 4, 15, 1):
        model(torch.zeros(3, length, dtype=torch.long), cache)
        assert Fraction(cache.nbytes) == 3 * Accounting(spec).row(cache.tokens, name).state_bytes


@pytest.mark.parametrize("kind", ["attention", "mla"])
def test_a_cache_belongs_to_its_sequences(kind: str) -> None:
    model, cache = build_model(spec_of(MIXERS[kind])), Cache()
    model(torch.zeros(3, 4, dtype=torch.long), cache)
    with pytest.raises(InputError, match="the cache remembers 3 sequences, and x has 1"):
        model(torch.zeros(1, 1, dtype=torch.long), cache)


@pytest.mark.parametrize(
    "kind", ["attention", "window", "mla", "power", "kda", "forgetting, window", "nsa", "moba", "dsa"]
)
def test_a_prompt_in_inference_mode(kind: str) -> None:
    model, cache = build_model(spec_of(MIXERS[kind])), Cache()
    prompt = torch.randint(9, (2, 8))
    with torch.inference_mode():
        model(prompt[:, :6], cache)
        model(prompt[:, 6:7], cache)
    assert torch.equal(generate(model, prompt[:, 7:], 4, cache=cache), generate(model, prompt, 4))


@pytest.mark.parametrize("kind", MIXERS)
def test_rows_of_a_cache_go_on_as_their_sequences(kind: str) -> None:
    """As beams do: sequences are reordered, repeated and dropped, and each goes on by itself."""
    torch.manual_seed(0)
    model, cache = build_model(spec_of(MIXERS[kind], EXPERTS, repeat=2), dtype=torch.float64), Cache()
    tokens, more, rows = torch.randint(9, (3, 9)), torch.randint(9, (4, 5)), torch.tensor([2, 0, 0, 1])
    with torch.no_grad():
        model(tokens, cache)
        before, selected = cache.nbytes, cache.select(rows)
        assert (selected.tokens, selected.nbytes * 3) == (9, before * 4)
        goes_on = torch.cat([model(more[:, :2], selected), model(more[:, 2:], selected)], 1)
        torch.testing.assert_close(goes_on, model(torch.cat((tokens[rows], more), 1))[:, 9:])
        assert (cache.tokens, cache.nbytes) == (9, before)
        torch.testing.assert_close(model(more[:3], cache), model(torch.cat((tokens, more[:3]), 1))[:, 9:])


@pytest.mark.parametrize("rows", [torch.tensor(1), torch.tensor([0.5]), torch.tensor([[0]]), [0]])
def test_rows_that_are_none(rows: Any) -> None:
    with pytest.raises(InputError, match=r"^rows must be a tensor \[N\] of int64, and is "):
        Cache().select(rows)


def test_a_cache_is_one_short_line_in_a_session() -> None:
    model, cache = build_model(spec_of(MIXERS["power"])), Cache()
    model(torch.zeros(2, 7, dtype=torch.long), cache)
    assert repr(cache) == f"<Cache of 7 tokens in 1 layers, {cache.nbytes:,} bytes>"
    assert repr(cache.slots[0]) == "<Slot of 7 tokens, PowerState>"


@pytest.mark.parametrize("kind", MIXERS)
def test_generate(kind: str) -> None:
    """Greedy tokens are those that the whole sequence makes likeliest; recurrent caches do not grow."""
    torch.manual_seed(1)
    model = build_model(spec_of(MIXERS[kind], repeat=2), dtype=torch.float64)
    prompt, cache = torch.randint(9, (2, 8)), Cache()
    answer = generate(model, prompt, 6, cache=cache)
    before = cache.nbytes
    whole = torch.cat((prompt, answer), 1)
    torch.testing.assert_close(model(whole[:, :-1])[:, 7:].argmax(-1), answer)
    generate(model, answer[:, -1:], 5, cache=cache)
    assert (cache.nbytes > before) == (kind in GROWS)


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("differentiable", [False, True])
def test_a_growing_buffer_holds_what_was_appended(window: int | None, differentiable: bool) -> None:
    """The last entries in order; without gradients a token is written behind the others, which stay where they are."""
    whole = torch.randn(2, 100, 3)
    with torch.set_grad_enabled(differentiable):
        buffer, start, addresses = GrowingBuffer(whole[:, :7].clone()), 7, set()
        buffer.keep_last(window)
        for length in (1, 1, 1, 4, 20, *[1] * 66):
            first = 0 if window is None else start - min(start, window)
            torch.testing.assert_close(
                buffer.append(whole[:, start : start + length]), whole[:, first : start + length]
            )
            buffer.keep_last(window)
            start += length
            addresses.add(buffer.buffer.data_ptr())
    torch.testing.assert_close(buffer.entries, whole if window is None else whole[:, -window:])
    if not differentiable:
        assert len(addresses) <= (5 if window is None else 16)
    if window is not None:
        assert buffer.buffer.shape[1] <= 50
