"""flops_per_step: packed documents are separate sequences, to the FLOP; what cannot be a step is refused."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from specs import specs

from powerplan import Accounting, Convention, InputError, ModelSpec, flops_per_step, load_model
from powerplan.load import catalogue_text

conventions = st.builds(
    Convention,
    causal=st.sampled_from(["exact", "full"]),
    form=st.sampled_from(["recurrent", "chunked"]),
    lm_head=st.booleans(),
)
documents = st.lists(st.integers(1, 700), min_size=1, max_size=12)


@given(specs, documents, conventions)
def test_packed_documents_are_separate_sequences(spec: ModelSpec, lengths: list[int], convention: Convention) -> None:
    packed = flops_per_step(spec, 700, lengths=lengths, convention=convention)
    assert packed == sum(flops_per_step(spec, tokens, convention=convention) for tokens in lengths)
    row = Accounting(spec, convention).row
    assert packed == sum(3 * tokens * row(tokens).flops_per_token for tokens in lengths)
    assert isinstance(packed, int) or packed.denominator > 1


@given(specs, st.integers(1, 700), st.integers(1, 5), conventions)
def test_one_document_of_the_whole_context_is_a_sequence(
    spec: ModelSpec, context: int, sequences: int, convention: Convention
) -> None:
    step = flops_per_step(spec, context, sequences=sequences, convention=convention)
    assert flops_per_step(spec, context, lengths=[context] * sequences, convention=convention) == step
    assert step == sequences * flops_per_step(spec, context, convention=convention)


def test_a_worked_example() -> None:
    """gpt2-small, docs/accounting.md: weights take 247,064,064 FLOPs a token, attention 18,432 (t + 1)."""
    weights = 247_064_064 * 1024
    assert flops_per_step("gpt2-small", "1k", sequences=8) == 3 * 8 * (weights + 18_432 * 1025 * 1024)
    attention = sum(18_432 * (tokens + 1) * tokens for tokens in (600, 300, 124))
    assert flops_per_step("gpt2-small", 1024, lengths=[600, 300, 124]) == 3 * (weights + attention)
    recurrent = flops_per_step("gpt2-small", "1k", lengths=[600, 300, 124], mixer="power:p=2")
    assert recurrent == flops_per_step("gpt2-small", "1k", mixer="power:p=2") == 3 * (weights + 77_875_200 * 1024)


def test_models_and_lengths_of_every_kind(tmp_path: Path) -> None:
    numpy, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    path = tmp_path / "model.yaml"
    path.write_text(catalogue_text("gpt2-small"), encoding="utf-8")
    loaded, lengths = load_model("gpt2-small"), [5, 900, 5, 119]
    step = flops_per_step("gpt2-small", 1024, lengths=lengths)
    assert all(flops_per_step(model, 1024, lengths=lengths) == step for model in (path, str(path), loaded, loaded.spec))
    ends = torch.tensor([0, 5, 905, 910, 1029])
    several: list[Any] = [
        tuple(lengths),
        iter(lengths),
        numpy.array(lengths),
        list(numpy.array(lengths)),
        ends.diff(),
        list(ends.diff()),
    ]
    assert all(flops_per_step("gpt2-small", 1024, lengths=kind) == step for kind in several)


def test_a_length_is_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[int] = []
    original = Accounting.state_flops_per_token

    def watched(self: Accounting, context: int) -> Fraction:
        counted.append(context)
        return original(self, context)

    monkeypatch.setattr(Accounting, "state_flops_per_token", watched)
    spec = msgspec.structs.replace(load_model("llama-3-8b").spec, name="of this test alone")
    lengths = [1 + number % 400 for number in range(100_000)]
    step = flops_per_step(spec, 400, lengths=lengths)
    assert sorted(counted) == list(range(1, 401))
    assert flops_per_step(spec, 400, lengths=lengths) == step
    assert step == 250 * sum(flops_per_step(spec, tokens) for tokens in range(1, 401))
    assert len(counted) == 400


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ({"lengths": []}, r"^lengths: is empty; give the tokens of each document, as \[4096, 512\]$"),
        ({"lengths": [5, 0]}, "^lengths: a document has 1 token or more, and one has 0$"),
        ({"lengths": [-3, 5]}, "^lengths: a document has 1 token or more, and one has -3$"),
        ({"lengths": [9000]}, "^lengths: a document of 9,000 tokens does not fit the context of 8,192$"),
        ({"lengths": [5], "sequences": 1}, "^sequences and lengths are one step twice; give one of them$"),
        ({"lengths": "4k,8k"}, "^lengths: '4k,8k' is not a list of lengths; give the tokens of each document"),
        ({"lengths": 4096}, "^lengths: 4096 is not a list of lengths; give the tokens of each document"),
        ({"lengths": [5, 5.0]}, "^lengths: 5.0 is not a whole number of tokens$"),
        ({"lengths": [True]}, "^lengths: true is not a whole number of tokens$"),
        ({"lengths": [[5, 5]]}, r"^lengths: \[5, 5\] is not a whole number of tokens$"),
        ({"sequences": 0}, "^sequences: 0 is out of range; allowed are 1 to"),
        ({"sequences": 1.5}, "^sequences: '1.5' is not an integer; write one from 1 to"),
        ({"context": 0}, "^context: a context is 1 to .* tokens, and is 0$"),
        ({"context": "8q"}, "^context: '8q' is not a size in tokens"),
        ({"model": "gpt2-smal"}, "gpt2-small"),
        ({"mixer": "powr:p=2"}, "power"),
    ],
)
def test_what_is_no_step_is_refused(wrong: dict[str, Any], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        flops_per_step(**{"model": "gpt2-small", "context": 8192, **wrong})


def test_the_convention_decides() -> None:
    full = flops_per_step("gpt2-small", 4096, convention=Convention(causal="full"))
    assert full - flops_per_step("gpt2-small", 4096) == 3 * 18_432 * 4095 * 4096
