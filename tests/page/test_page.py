"""What a page says: every figure is the answer's, every text is escaped, and the same question makes the same bytes."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import powerplan
from powerplan.accounting import Accounting
from powerplan.answers.recommend import RecommendAnswer
from powerplan.answers.train import TrainAnswer
from powerplan.errors import InputError
from powerplan.explanation import explain
from powerplan.report.parts import show_bytes, show_flops, show_ratio
from powerplan.report.train import MEMORY
from powerplan.units import format_duration
from powerplan.webpage.page import Page

pytest.importorskip("vl_convert")

Parse = Callable[[str], Any]

HOSTILE = """
name: '<script>alert(1)</script> & "tiny" {{ 7 * 7 }} </title>'
vocab_size: 256
hidden_size: 64
layers:
  - repeat: 2
    mixer: {kind: attention, heads: 4}
    ffn: {kind: mlp, intermediate_size: 128}
"""


def rows_of(parsed: Any, caption: str) -> list[list[str]]:
    (found,) = [rows for name, rows in parsed.tables.items() if name == caption]
    rows: list[list[str]] = found
    return rows


@pytest.fixture(scope="module")
def parsed(whole: Page, parse: Parse) -> Any:
    return parse(whole.html)


def test_the_html_is_whole(parsed: Any) -> None:
    assert parsed.open == []  # Every end tag has closed the element that was open last.
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = [attributes["href"] for tag, attributes in parsed.tags if tag == "a"]
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert [tag for tag, _ in parsed.tags].count("h1") == 1
    sections = [attributes["id"] for tag, attributes in parsed.tags if tag == "section"]
    assert sections == ["context", "flops", "candidates", "decode", "training", "measured", "counted"]


def test_nothing_is_fetched_from_elsewhere(parsed: Any) -> None:
    assert not {"link", "img", "iframe", "object"} & {tag for tag, _ in parsed.tags}
    assert not [attributes for _, attributes in parsed.tags if "src" in attributes]
    (policy,) = [own["content"] for _, own in parsed.tags if own.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    data, *scripts = parsed.scripts
    json.loads(data)
    for script in scripts:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_the_head_has_the_answers_figures(whole: Page, parsed: Any) -> None:
    row = whole.asked.wsfr.rows[-1]
    assert row.context == whole.asked.context == 131_072
    balanced = whole.asked.wsfr.balanced_context
    for figure in (
        f"WSFR {show_ratio(row.wsfr)}",
        f"Balanced context {balanced:,}",
        f"FLOPs per token {show_flops(row.flops_per_token)}",
        f"State per sequence {show_bytes(row.state_bytes)}",
        f"weights {show_flops(row.weight_flops_per_token)}, state {show_flops(row.state_flops_per_token)}",
    ):
        assert figure in parsed.text
    assert "state-heavy 2.3x as many state as weight FLOPs" in parsed.text


def test_candidates_are_those_of_recommend(whole: Page, parsed: Any) -> None:
    answer = whole.asked.recommend
    assert isinstance(answer, RecommendAnswer)
    rows = rows_of(parsed, "Candidates, the recommended one first")
    assert len(rows) == 2 * len(answer.candidates)
    for place, candidate in enumerate(answer.candidates):
        cells, (_, reason) = rows[2 * place], rows[2 * place + 1]
        assert cells[:2] == [str(place + 1), candidate.label]
        assert show_ratio(candidate.row.wsfr) in cells
        assert show_bytes(candidate.row.state_bytes) in cells
        assert reason == answer.why(place)


def test_curves_have_the_numbers_of_each_model(whole: Page, parsed: Any) -> None:
    answer = whole.asked.recommend
    assert isinstance(answer, RecommendAnswer)
    specs = json.loads(parsed.scripts[0])
    points = specs["chart-wsfr"]["datasets"]["points"]
    sizes = specs["chart-state"]["datasets"]["points"]
    names = specs["chart-wsfr"]["usermeta"]["names"]
    tables = rows_of(parsed, "Weight-state FLOP ratio"), rows_of(parsed, "State per sequence")
    for number, (key, name) in enumerate(names.items()):
        candidate = answer.candidates[int(name.split(".")[0]) - 1]
        accounting = Accounting(candidate.spec)
        assert name.endswith(candidate.label)
        found = {point["x"]: point["y"] for point in points if point["key"] == key}
        assert found == {context: float(accounting.wsfr(context) or 0) for context in found}
        states = {point["x"]: point["y"] for point in sizes if point["key"] == key}
        assert states == {context: float(accounting.row(context).state_bytes) for context in states}
        for row in tables[0]:
            assert row[number + 1] == show_ratio(accounting.wsfr(int(row[0].replace(",", ""))))
        for row in tables[1]:
            assert row[number + 1] == show_bytes(accounting.row(int(row[0].replace(",", ""))).state_bytes)


def test_components_and_layers_add_up(whole: Page, parsed: Any) -> None:
    accounting, context = whole.asked.wsfr.accounting, whole.asked.context
    total = accounting.row(context).flops_per_token
    rows = rows_of(parsed, "FLOPs per token by component at 131,072 tokens, as it is")
    for part, row in zip(accounting.components(context), rows, strict=True):
        flops = part.weight_flops_per_token + part.state_flops_per_token
        assert row[0] == part.name
        assert row[3] == f"{float(flops / total):.1%}"
    columns = json.loads(parsed.scripts[0])["chart-layers-0"]["data"]["values"]
    layers = accounting.spec.layer_count
    assert len(columns) == 2 * layers
    head = 2 * accounting.spec.vocab_size * accounting.spec.hidden_size
    assert sum(row["high"] - row["low"] for row in columns) + head == pytest.approx(float(total), rel=1e-12)


def test_strips_have_one_cell_for_each_layer(whole: Page) -> None:
    strips = re.findall(r'<div class="cells"[^>]*>(.*?)</div>', whole.html)
    assert [strip.count("<i ") for strip in strips] == [32, 32]
    answer = whole.asked.recommend
    assert isinstance(answer, RecommendAnswer)
    titles = re.findall(r'title="layer (\d+): ([^"+]*) \+', strips[1])
    spec = answer.recommended.spec
    for use in spec.layer_uses():
        assert use.layer.mixer is not None
        for place in (place for span in use.positions for place in span):
            assert titles[place] == (str(place), use.layer.mixer.describe())


def test_decoding_is_the_answers(whole: Page, parsed: Any) -> None:
    serving = whole.asked.decode.models[0].servings[0]
    assert f"Largest batch, as it is {serving.largest_batch:,}" in parsed.text
    rows = [row for row in rows_of(parsed, "Decoding at 131,072 tokens") if row[0] == "as it is"]
    assert [row[1] for row in rows] == ["1", "8", "64", f"{serving.largest_batch:,}"]
    for row in rows:
        step = serving.step(int(row[1].replace(",", "")))
        assert row[2] == show_bytes(step.memory_bytes)
        assert row[4] == format_duration(float(step.seconds or 0))
        assert row[6] == "yes"


def test_training_is_the_answers(whole: Page, parsed: Any) -> None:
    answer = whole.asked.train
    assert isinstance(answer, TrainAnswer)
    layout = answer.plan.layout
    assert f"Cost {answer.plan.cost:,.0f} at 2.50 an hour" in parsed.text
    assert f"Time of a step {format_duration(layout.step_s)}" in parsed.text
    for key, name in MEMORY.items():
        size = getattr(layout.memory, key)
        assert size < 5e6 or f"{name} {size / 1e9:,.2f} GB" in parsed.text
    rows = rows_of(parsed, "The same run with other mixers")
    assert [row[0] for row in rows] == ["as it is", *(other.name for other in answer.others)]
    assert rows[1][4] == f"{answer.others[0].plan.cost:,.0f}"


def test_measured_times_stand_beside_predicted_ones(whole: Page, parsed: Any) -> None:
    assert whole.asked.measured is not None
    alone = [row for row in whole.asked.measured.saved.results if row.part == "state"]
    rows = rows_of(parsed, "Measured and predicted times of mixers")
    assert len(rows) == len(alone)
    by_key = {(row.direction, f"{row.context:,}", row.name): row for row in alone}
    for row in rows:
        own = by_key[row[0], row[1], row[2]]
        assert own.predicted_ms is not None
        assert row[3:5] == [format_duration(own.ms_p50 / 1000), format_duration(own.predicted_ms / 1000)]
    # The profile is of a CPU: the plan for an H100 must not rest on it.
    assert "The other sections count with h100-sxm, and so without these times." in parsed.text


def test_times_of_the_same_device_are_counted_with(hostile_profile: Path, parse: Parse) -> None:
    page = powerplan.page("gpt2-small", "4k", gpu="h100-sxm", measured=hostile_profile)
    assert page.asked.elsewhere is None
    assert isinstance(page.asked.recommend, RecommendAnswer)
    assert page.asked.recommend.recommendation.request.profile is page.asked.measured
    parsed = parse(page.html)
    assert "without these times" not in parsed.text
    assert "<img src=x" in parsed.text  # As text.
    assert "img" not in [tag for tag, _ in parsed.tags]


def test_every_formula_is_there(plain: Page, parse: Parse) -> None:
    page = parse(plain.html)
    lines = explain(plain.asked.wsfr.model, 65_536, plain.asked.wsfr.accounting.convention)
    texts = [" ".join(row) for rows in page.tables.values() for row in rows]
    for line in lines:
        assert any(line.term.substituted() in text for text in texts), line.term.formula


def test_a_page_of_a_model_alone_has_no_sections_of_devices(plain: Page, parse: Parse) -> None:
    page = parse(plain.html)
    sections = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert sections == ["context", "flops", "candidates", "decode", "counted"]
    assert "trained up to 1k" in page.scripts[0]
    for label, said in plain.asked.recommend.report.block:
        assert label in page.text
        assert all(line in page.text for line in ([said] if isinstance(said, str) else said))


def test_texts_of_files_are_escaped(tmp_path: Path, parse: Parse) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(HOSTILE, encoding="utf-8")
    page = powerplan.page(path, "1k", command='powerplan report "</script><b>"')
    parsed = parse(page.html)
    name = '<script>alert(1)</script> & "tiny" {{ 7 * 7 }} </title>'
    assert page.html.count("<script>") == 2  # The library and the page's own.
    assert "<script>alert" not in page.html
    assert "</script><b>" not in page.html
    assert name in parsed.text
    assert "chart-wsfr" in json.loads(parsed.scripts[0])
    assert name in json.loads(parsed.scripts[0])["chart-wsfr"]["description"]


def test_the_same_question_makes_the_same_bytes(plain: Page) -> None:
    assert powerplan.page("gpt2-small", "64k").html == plain.html


@pytest.mark.parametrize("model", ["kimi-linear-48b-a3b", "mamba2-130m", "rwkv7-0.1b", "nemotron-h-8b", "gpt-oss-120b"])
def test_all_kinds_of_models_have_a_page(model: str, parse: Parse) -> None:
    page = powerplan.page(model, "32k")
    parsed = parse(page.html)
    assert parsed.open == []
    assert "None" not in parsed.text
    assert "nan" not in parsed.scripts[0].lower().replace("nano", "")


def test_extremes(tmp_path: Path, parse: Parse) -> None:
    deep = "name: deep\nvocab_size: 8\nhidden_size: 8\nlayers:\n  - {repeat: 900, mixer: {kind: attention, heads: 1}}\n"
    (tmp_path / "deep.yaml").write_text(deep, encoding="utf-8")
    parsed = parse(powerplan.page(tmp_path / "deep.yaml", 2**50).html)
    assert "There are too many layers to draw them one by one" in parsed.text
    assert parse(powerplan.page(tmp_path / "deep.yaml", 1).html).open == []


def test_a_model_without_state_says_so(tmp_path: Path, parse: Parse) -> None:
    text = "name: mlp\nvocab_size: 8\nhidden_size: 8\nlayers:\n  - ffn: {kind: mlp, intermediate_size: 8}\n"
    (tmp_path / "mlp.yaml").write_text(text, encoding="utf-8")
    parsed = parse(powerplan.page(tmp_path / "mlp.yaml", "1k").html)
    assert "mlp has no sequence mixers, and so no state to plan" in parsed.text
    assert "This model has no state, so there is nothing that changes with the context." in parsed.text


def test_what_devices_do_not_allow_is_a_sentence(parse: Parse) -> None:
    parsed = parse(powerplan.page("deepseek-v3", "64k", gpu="h100-sxm").html)
    assert "deepseek-v3 at 65,536 tokens does not fit 1 x h100-sxm" in parsed.text
    assert "With the memory of these devices there is no candidate" in parsed.text
    assert "Training no plan" in parsed.text
    few = parse(powerplan.page("gpt2-small", "64k", gpu="h100-sxm", devices=1000).html)
    assert "share" in few.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"devices": 8}, "devices: needs the device; such as gpu='h100-sxm'"),
        ({"tokens": "1B"}, "tokens: needs the device; such as gpu='h100-sxm'"),
        ({"price": 2.5}, "price: needs the device; such as gpu='h100-sxm'"),
        ({"target": "4"}, "target: '4' is not a ratio; write 1:1, 3:1 or 1:2.5 (weight to state)"),
        ({"gpu": "h100-sxm", "price": "cheap"}, "price: 'cheap' is not an amount of money; write 2.50"),
        ({"context": "64q"}, "context: '64q' is not a size in tokens; write 65536, 64k (=65536) or 1M (=1048576)"),
    ],
)
def test_bad_arguments_are_one_message(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as problem:
        powerplan.page("gpt2-small", **arguments)
    assert str(problem.value).startswith(message)
