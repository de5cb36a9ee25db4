"""FLOPs of documents with masks between them: by hand, against whole sequences, and as wsfr and budget report them."""

from __future__ import annotations

import json
import re
from collections import Counter
from fractions import Fraction
from math import exp
from pathlib import Path
from statistics import NormalDist
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from specs import specs

import powerplan
from powerplan.accounting import Accounting
from powerplan.cli import main
from powerplan.errors import InputError
from powerplan.lengths import Lengths, read_lengths
from powerplan.lengths.flops import DocumentRow
from powerplan.load import catalogue_names, catalogue_spec
from powerplan.mixers import Attention, Convention
from powerplan.spec import LayerGroup, ModelSpec
from powerplan.training import alternatives, budget_of, document_flops, train_flops

ROOT = Path(__file__).resolve().parent.parent
documents = st.lists(st.integers(1, 300), min_size=1, max_size=6)
conventions = st.sampled_from([Convention(), Convention(causal="full"), Convention(form="chunked")])


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--format", "json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def row_of(accounting: Accounting, lengths: list[int], context: int) -> DocumentRow:
    return DocumentRow(accounting, Lengths.of(Counter(lengths)), context)


def layers(repeat: int, window: int | None) -> LayerGroup:
    return LayerGroup(repeat=repeat, mixer=Attention(heads=3, kv_heads=1, head_dim=8, window=window))


SMALL = ModelSpec(name="small", vocab_size=97, hidden_size=24, layers=(layers(2, None), layers(1, 5)))


@given(documents, st.integers(1, 400))
def test_masks_leave_the_pairs_that_they_leave(lengths: list[int], context: int) -> None:
    """Every query of every document counts its keys: behind it, in its document, in its sequence, in its window."""
    pairs = {None: 0, 5: 0}
    for length in lengths:
        for query in range(length):
            start = query - query % context
            for window in pairs:
                pairs[window] += query - max(start, query - window + 1 if window else 0) + 1
    by_hand = 2 * 3 * 16 * (2 * pairs[None] + pairs[5])
    row = row_of(Accounting(SMALL), lengths, context)
    assert row.state_flops_per_token * sum(lengths) == by_hand


@settings(deadline=None)
@given(specs, documents, st.integers(1, 300), conventions)
def test_flops_are_sums_over_documents(
    spec: ModelSpec, lengths: list[int], context: int, convention: Convention
) -> None:
    accounting = Accounting(spec, convention)
    row = row_of(accounting, lengths, context)
    pieces = [piece for length in lengths for piece in [context] * (length // context) + [length % context] if piece]
    assert row.pieces.documents == len(pieces)
    assert 3 * row.flops_per_token * sum(lengths) == sum(document_flops(accounting, piece) for piece in pieces)
    step = powerplan.flops_per_step(spec, context, lengths=pieces, convention=convention)
    assert 3 * row.flops_per_token * sum(lengths) == step
    half, rest = lengths[: len(lengths) // 2], lengths[len(lengths) // 2 :]
    parts = [row_of(accounting, part, context) for part in (half, rest) if part]
    added = sum(part.state_flops_per_token * part.lengths.tokens for part in parts)
    assert row.state_flops_per_token * row.lengths.tokens == added


@settings(deadline=None)
@given(specs, st.integers(1, 700), st.integers(1, 9), conventions)
def test_documents_of_one_length_are_sequences(
    spec: ModelSpec, context: int, count: int, convention: Convention
) -> None:
    accounting = Accounting(spec, convention)
    row = row_of(accounting, [context] * count, context)
    plain = accounting.row(context)
    assert (row.state_flops_per_token, row.wsfr) == (plain.state_flops_per_token, plain.wsfr)
    assert (row.saved, row.unmasked_flops_per_token) == (0, plain.flops_per_token)
    if row.equal_context is not None:
        equal = accounting.state_flops_per_token(row.equal_context)
        assert equal == plain.state_flops_per_token or not accounting.grows_with_context
        assert equal <= plain.state_flops_per_token
        assert row.equal_context >= context


@settings(deadline=None)
@given(specs, documents, st.integers(1, 300))
def test_masks_never_add_flops_where_these_grow_with_the_context(
    spec: ModelSpec, lengths: list[int], context: int
) -> None:
    accounting = Accounting(spec)
    row = row_of(accounting, lengths, context)
    if accounting.grows_with_context:
        assert row.state_flops_per_token <= row.unmasked_state_flops_per_token
    equal = row.equal_context
    if equal is not None:
        assert accounting.state_flops_per_token(equal) <= row.state_flops_per_token
        assert accounting.state_flops_per_token(equal + 1) > row.state_flops_per_token


@pytest.mark.parametrize("name", catalogue_names())
def test_every_model_of_the_catalogue_has_documents(name: str) -> None:
    accounting = Accounting(catalogue_spec(name))
    row = DocumentRow(accounting, read_lengths("500:0.9,50k:0.1"), 32_768)
    assert row.pieces.counts == ((500, 900_000), (51_200 - 32_768, 100_000), (32_768, 100_000))
    shortest, longest = (accounting.state_flops_per_token(length) for length in (500, 32_768))
    assert min(shortest, longest) <= row.state_flops_per_token <= max(shortest, longest)
    if row.equal_context is not None:
        assert 500 < row.equal_context < 32_768


def test_a_state_of_one_size_is_as_heavy_in_any_document() -> None:
    power = powerplan.wsfr("gpt2-small", "4k", mixer="power:p=2", lengths={1024: 3, 99: 7})
    assert power.documents[0].equal_context is None
    assert power.documents[0].saved == 0
    assert power.rows[0].wsfr == power.documents[0].wsfr


def test_wsfr_reports_both_sides(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("wsfr", "llama-3-8b", "--ctx", "8k,64k", "--lengths", "4k:3,96k:1")
    result, plain = run(capsys, *arguments), run(capsys, *arguments[:4])
    assert result["lengths"] == {
        "source": "4k:3,96k:1",
        "documents": 1_000_000,
        "tokens": 27_648 * 10**6,
        "mean": 27_648,
        "median": 4096,
        "p99": 98_304,
        "longest": 98_304,
        "token_median": 98_304,
    }
    accounting = Accounting(catalogue_spec("llama-3-8b"))
    for row, before, pieces in zip(
        result["rows"], plain["rows"], ({4096: 3, 8192: 12}, {4096: 3, 65_536: 1, 32_768: 1}), strict=True
    ):
        own = row.pop("documents")
        assert row == before
        tokens = sum(length * count for length, count in pieces.items())
        state = sum(length * count * accounting.state_flops_per_token(length) for length, count in pieces.items())
        assert own["state_flops_per_token"] == pytest.approx(float(state / tokens))
        assert own["wsfr"] == pytest.approx(float(accounting.weight_flops_per_token * tokens / state))
        assert own["masks_save"] == pytest.approx(
            1 - own["flops_per_token"] / float(accounting.row(row["context"]).flops_per_token)
        )
        assert own["cut_documents"] == 250_000
        assert own["pieces"] == 250_000 * sum(pieces.values())
        assert [way["way"] for way in own["packing"]] == ["padded", "packed", "stream"]
    packed = {row["context"]: row for row in result["rows"]}
    assert set(packed) == {8192, 65_536}
    assert plain.keys() | {"lengths", "documents_verdict"} == result.keys()


def test_the_csv_has_a_row_for_each_context(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["wsfr", "gpt2-small", "--ctx", "4k,8k", "--lengths", "4k", "--format", "csv"]) == 0
    header, first, second = capsys.readouterr().out.splitlines()
    cells = dict(zip(header.split(","), first.split(","), strict=True))
    assert cells["wsfr"] == cells["masked_wsfr"]
    assert (cells["equal_context"], cells["masks_save"]) == ("4096", "0.0")
    assert second.startswith("8192,")


def test_budgets_of_one_length_are_plain(capsys: pytest.CaptureFixture[str]) -> None:
    common = ("budget", "llama-3-8b", "--ctx", "16k", "--gpu", "h100-sxm", "--devices", "8", "--batch-tokens", "1M")
    for given_as in (("--tokens", "100B"), ("--flops", "1e21"), ("--gpu-hours", "500"), ()):
        result = run(capsys, *common, *given_as, "--lengths", "16k")
        plain = run(capsys, *common, *given_as)
        own = result.pop("documents")
        assert result.pop("lengths")["mean"] == 16_384
        for key in ("train_flops_per_token", "total_flops", "tokens", "steps", "gpu_hours", "days"):
            assert own[key] == result[key]
        for other in result["alternatives"]:
            masked = other.pop("documents")
            assert {key: other[key] for key in masked} == masked
        assert result == plain


def test_masks_buy_more_tokens_of_attention_and_no_more_of_power() -> None:
    answer = powerplan.budget("llama-3-8b", "64k", flops=1e22, lengths="lognormal:mean=4k,p99=64k")
    assert answer.masked is not None
    assert answer.masked.tokens == int(10**22 / train_flops(answer.masked.documents))
    assert answer.masked.tokens > 1.2 * answer.budget.tokens
    kinds = {other.swap.describe() if other.swap else "": other for other in answer.alternatives}
    power = kinds["power p=2"]
    assert power.masked is not None
    assert power.masked.tokens == power.budget.tokens
    assert power.masked.total_flops == answer.masked.total_flops


@settings(max_examples=30, deadline=None)
@given(specs, documents, st.integers(1, 300), st.integers(1, 10**20))
def test_tokens_over_documents_and_their_flops_are_inverse(
    spec: ModelSpec, lengths: list[int], context: int, tokens: int
) -> None:
    accounting, own = Accounting(spec), Lengths.of(Counter(lengths))
    there = budget_of(accounting, context, tokens=tokens, lengths=own)
    back = budget_of(accounting, context, flops=there.total_flops, lengths=own)
    assert there.tokens == back.tokens == tokens
    assert budget_of(accounting, context, flops=there.total_flops - 1, lengths=own).tokens == tokens - 1
    whole = budget_of(accounting, context, tokens=tokens)
    for other in alternatives(whole, masked=there):
        assert other.masked is not None
        assert other.masked.total_flops == there.total_flops


def test_several_budgets(capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--flops", "1e21", "--gpu", "h100-sxm", "--lengths", "4k:3,96k:1")
    arguments = ("budget", "llama-3-8b", "gpt2-small", "--ctx", "8k,64k", *common)
    result = run(capsys, *arguments)
    assert result["schema"] == "powerplan.budgets/1"
    for row in result["rows"]:
        single = run(capsys, "budget", row["name"], "--ctx", str(row["context"]), *common)
        assert single["documents"] == row["documents"]
    assert main(list(arguments)) == 0
    out = capsys.readouterr().out
    assert "masked" in out
    assert "1,000,000 documents (4k:3,96k:1)" in out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "wsfr gpt2-small --lengths 4k --by layer",
            "--by: is of whole sequences, and not of documents; leave --lengths out",
        ),
        (
            "wsfr gpt2-small --lengths 4k --explain",
            "--explain: is of whole sequences, and not of documents; leave --lengths out",
        ),
        (
            "wsfr gpt2-small --lengths 4k --plot a.png",
            "--lengths: are not drawn: a figure shows whole sequences; leave --plot out",
        ),
        (
            "budget gpt2-small --lengths 4k --plot a.png",
            "--lengths: are not drawn: a figure shows whole sequences; leave --plot out",
        ),
        ("budget --flops 1e21 --lengths 4k", "--lengths: needs a model"),
        (
            "budget gpt2-small --tokens 1B --lengths 4k --measured benchmarks/results/profile-cpu.json",
            "--lengths: have no measured times: --measured is of whole contexts",
        ),
        (
            "wsfr gpt2-small --lengths README.md -o README.md --force",
            "--output: README.md is the file that --lengths reads; give another",
        ),
    ],
)
def test_messages(
    command: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(command.split()) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"error: {message}\n")


def test_figures_are_refused_from_python() -> None:
    for answer in (powerplan.wsfr("gpt2-small", "4k", lengths="4k"), powerplan.budget("gpt2-small", lengths="4k")):
        with pytest.raises(InputError, match="lengths: are not drawn"):
            answer.figure()


def test_from_python_as_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "docs.csv"
    path.write_text("length,count\n300,5\n9000,2\n", encoding="utf-8")
    answer = powerplan.wsfr("gpt2-small", "4k", lengths=path)
    assert run(capsys, "wsfr", "gpt2-small", "--ctx", "4k", "--lengths", str(path)) == answer.to_dict()
    assert powerplan.wsfr("gpt2-small", "4k", lengths={300: 5, 9000: 2}).documents[0].wsfr == answer.documents[0].wsfr
    assert (
        answer.documents[0].state_flops_per_token
        == Fraction(
            5 * 300 * 18_432 * 301 + 4 * 4096 * 18_432 * 4097 + 2 * 808 * 18_432 * 809, 2 * (5 * 300 + 2 * 9000)
        )
        * 2
    )


PAGE = (ROOT / "docs" / "lengths.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("block", re.findall(r"```console\n\$ (.*?)\n```", PAGE, re.DOTALL), ids=lambda text: text[:20])
def test_the_page_shows_what_commands_print(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Where an output begins with "...", the lines between the dots stand in it as they are."""
    command, _, output = block.partition("\n")
    assert main(command.split()[1:]) == 0
    printed = capsys.readouterr().out.rstrip("\n")
    if not output.startswith("..."):
        assert printed == output
    for piece in re.split(r"^\.\.\.$", output, flags=re.MULTILINE):
        assert piece.strip("\n") in printed


def test_figures_of_the_page() -> None:
    mixed = powerplan.wsfr("llama-3-8b", "64k", lengths="lognormal:mean=4k,p99=64k").documents[0]
    squares = sum(length * length * count for length, count in mixed.pieces.counts)
    assert mixed.equal_context == squares // mixed.pieces.tokens
    z = NormalDist().inv_cdf(0.99)
    assert f"{exp(z * z / 2):.2f} times" in PAGE
    layout = {"gpu": "h100-sxm", "devices": 64, "tokens": "100B", "parallel": "fsdp=8,cp=8"}
    run = powerplan.train("llama-3-8b", "64k", lengths="lognormal:mean=4k,p99=64k", **layout)  # type: ignore[arg-type]
    assert f"a step of {run.plan.layout.step_s:.3g} s" in PAGE
    assert "power p=2          5.51:1    5.51:1      187.9B     187.9B       1.81x     1.38x" in PAGE
