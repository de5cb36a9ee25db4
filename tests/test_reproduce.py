"""Published figures: what is computed beside each, held by numbers that were found independently, and what is said."""

from __future__ import annotations

import json
import re
import time
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from powerplan.cli import main
from powerplan.dims import spow_dim
from powerplan.load import catalogue_spec
from powerplan.mixers import KDA
from powerplan.reproduce import Comparison, Figure, figure_sets, reproduce

NAMES = [
    "table2",
    "table3",
    "figure2",
    "table4",
    "power-speed",
    "kimi",
    "hybrids",
    "field",
    "training",
    "training-time",
]


def computed(name: str) -> dict[str, Comparison]:
    (result,) = reproduce(name)
    return {comparison.figure.key: comparison for comparison in result.comparisons}


def as_ratio(value: Fraction) -> float:
    """Return 7.7 for 7.7:1 and -8.3 for 1:8.3."""
    return float(value) if value >= 1 else -float(1 / value)


def test_all_sets_are_there() -> None:
    assert list(figure_sets()) == NAMES
    assert [result.figures.name for result in reproduce()] == NAMES


@pytest.mark.parametrize(
    ("convention", "ratios"),
    [
        ("default", [13.0772, 1.64, -4.88938, -74.6]),
        ("headless", [9.0, 1.12, -7.11, -108.5]),
        ("full", [6.54, -1.22, -9.78, -149.2]),
        ("paper", [7.73, -1.035, -8.28, -126.4]),
    ],
)
def test_table_2_softmax(convention: str, ratios: list[float]) -> None:
    comparisons = computed("table2")
    values = [comparisons[f"attention-{t}"].computed[convention] for t in (1024, 8192, 65_536, 1_000_000)]
    assert [as_ratio(value) for value in values] == pytest.approx(ratios, rel=6e-3)


def test_table_2_by_hand() -> None:
    """GPT-2: 12 layers of 768, vocabulary 50,257; the paper's accounting written out."""
    comparisons, width, layers, head = computed("table2"), 768, 12, 2 * 50_257 * 768
    for context in (1024, 8192, 65_536, 1_000_000):
        weights, keys = 20 * width**2 * layers + head, min(context, 8192)
        assert comparisons[f"attention-{context}"].computed["paper"] == Fraction(weights, 3 * context * width * layers)
        assert comparisons[f"window-{context}"].computed["paper"] == Fraction(weights, 3 * keys * width * layers)
        assert comparisons[f"linear-{context}"].computed["paper"] == Fraction(20 * width, 4 * 64 + 2 * 128) == 30
    assert "paper" in comparisons["attention-65536"].agrees
    assert comparisons["attention-1000000"].agrees == []
    assert comparisons["attention-1000000"].nearest[0] == "paper"
    assert [name for name in ("default", "headless", "full") if name in comparisons["linear-1024"].agrees] == []


def test_no_convention_gives_all_of_table_2() -> None:
    (result,) = reproduce("table2")
    hits = {name: result.agreeing(name) for name in result.figures.conventions}
    assert hits == {"default": (2, 12), "headless": (2, 12), "full": (4, 12), "paper": (11, 12)}
    assert "No correct convention gives them all" in result.figures.why


def test_table_3_is_exact() -> None:
    comparisons = computed("table3")
    assert all(comparison.agrees for comparison in comparisons.values())
    assert [comparisons[f"spow-{p}"].computed["exact"] for p in range(2, 7)] == [spow_dim(64, p) for p in range(2, 7)]
    assert [key for key, comparison in comparisons.items() if "exact" not in comparison.agrees] == ["savings-3"]


def test_figure_2_has_no_single_convention() -> None:
    (result,) = reproduce("figure2")
    assert all(result.agreeing(name)[0] < len(result.comparisons) for name in result.figures.conventions)
    comparisons = computed("figure2")
    assert as_ratio(comparisons["state-heavy"].computed["default"]) == pytest.approx(-4.126, rel=1e-3)
    assert as_ratio(comparisons["state-heavy"].computed["bare"]) == pytest.approx(-17.4545, rel=1e-4)
    assert comparisons["weight-heavy"].computed["bare"] == 120
    spread = comparisons["equal-flops"].computed
    assert float(spread["bare"]) == pytest.approx(1030.88128 / 851.443712)
    assert float(spread["default"]) == pytest.approx(1155.34592 / 500.25984)


def test_table_4_and_the_window_of_equal_state() -> None:
    comparisons = computed("table4")
    assert comparisons["batch"].computed["exact"] == 1
    assert comparisons["state"].computed == {
        "exact": Fraction(133_120, 131_072),
        "normalised": Fraction(2080 * 65, 131_072),
    }


def test_speeds_are_not_what_flops_promise() -> None:
    comparisons = computed("power-speed")
    softmax = 2 * 128 * Fraction(65_537, 2)
    assert comparisons["d64"].computed["recurrent"] == softmax / (4 * 2080 * 65)
    assert comparisons["d32"].computed["recurrent"] == (2 * 64 * Fraction(65_537, 2)) / (4 * 528 * 33)
    assert all(not comparison.agrees for comparison in comparisons.values())
    (result,) = reproduce("power-speed")
    assert result.remarks()[0].startswith("Measured over promised, 25% (head dim 64) and 21% (head dim 32)")


def test_kimi_linear() -> None:
    values = {key: comparison.computed for key, comparison in computed("kimi").items()}
    assert [round(float(value), 2) for value in values["total"].values()] == [49.12, 48.37]
    assert [round(float(value), 2) for value in values["active"].values()] == [3.48, 2.73]
    assert values["cache"]["cache bytes"] == Fraction(-2000, 27)
    assert figure_sets()["kimi"].figures[3].number == 6 * 128**2 + 3 * 64 * 128 + 64**2
    assert figure_sets()["kimi"].figures[4].number == 2 * 2**20 * 128
    layers = [use.layer.mixer for use in catalogue_spec("kimi-linear-48b-a3b").layer_uses()]
    (chunk_size,) = {mixer.chunk_size for mixer in layers if isinstance(mixer, KDA)}
    assert chunk_size == 64  # C of equation 13
    assert values["eq13"]["recurrent"] == 7 * 128**2
    assert values["eq14"] == {"attention": 2 * 128 * (2**20 + 1), "mla": 320 * (2**20 + 1)}
    assert float(values["prefill"]["prompt FLOPs"]) == pytest.approx(3.66, abs=0.005)
    assert values["decode"]["cache bytes"] == Fraction(27, 7)
    assert float(values["cache"]["state bytes"]) == pytest.approx(
        100 * (1 / float(values["decode"]["state bytes"]) - 1)
    )
    kept, moved = (round(float(values["decode"][name]), 2) for name in ("state bytes", "state bytes moved"))
    assert (kept, moved) == (3.84, 3.82)  # The former is what `decode --twin mla` prints.
    assert max(values["decode"].values()) < 4
    (result,) = reproduce("kimi")
    assert result.remarks() == [
        "Computed, not published: cache 8.46 GB, and 32.61 GB for the twin; recurrent state 10.49M elements in fp32, "
        "41.9 MB at any context, and 43.4 MB with the last inputs of its short convolutions in bf16."
    ]
    assert computed("kimi")["decode"].agrees == computed("kimi")["prefill"].agrees == []


def test_hybrids_agree_under_one_convention_or_another() -> None:
    comparisons = computed("hybrids")
    assert all(comparison.agrees for comparison in comparisons.values())
    assert comparisons["minimax-text-01-active"].agrees == ["body"]
    assert comparisons["gpt-oss-20b-active"].agrees == ["head"]
    assert comparisons["llama-2-7b-cache"].computed["GiB"] == 128
    assert comparisons["llama-2-7b-cache"].agrees == ["GiB"]


FIELD = {
    "apriel-throughput": {"state bytes": 2.483, "bytes at batch 1": 1.016, "bytes at batch 64": 2.084},
    "hyena-speed": {"prompt FLOPs": 314.0},
    "sparse-speed": {"prompt FLOPs": 2.787},
    "msa-devices": {"all means": 2.26, "routing keys": 0.82},
    "stem-share": {"FFN FLOPs": 100 / 3},
    "locret-llama": {"cache bytes": 8},
    "fa4-peak": {"bf16 peak": 1613 / 22.5},
}


def test_claims_of_the_field() -> None:
    comparisons = computed("field")
    for key, values in FIELD.items():
        for convention, value in values.items():
            assert float(comparisons[key].computed[convention]) == pytest.approx(value, rel=3e-3)


def test_claims_of_the_field_by_hand() -> None:
    """Apriel's cache and state at 16k tokens; PowerAttention's keys of the last of 128k tokens; HyenaDNA's FLOPs."""
    comparisons = computed("field")
    cache = 2 * 2 * 8 * 128 * 2**14
    hybrid = 20 * cache + 30 * (4 * 4096 * 16 + 2 * 3 * 4096)
    assert comparisons["apriel-throughput"].computed["state bytes"] == Fraction(50 * cache, hybrid)
    weights = 8 * (4 * 256**2 + 2 * 256 * 1024 + 3 * 3 * 256)
    attention = 8 * 2 * 256 * 2 * (10**6 + 1) // 2
    convolution = Fraction(8 * 256 * (5 * 2**21 * 21 + 3 * 2**21), 10**6)
    plain = 8 * (4 * 256**2 + 2 * 256 * 1024)
    head = Fraction(2 * 16 * 256, 10**6)
    ratio = (2 * plain + attention + head) / (2 * weights + convolution + head)
    assert comparisons["hyena-speed"].computed["prompt FLOPs"] == ratio
    blocks = range(512)  # Blocks of 256, and those that a query sees before its own.
    seen = sum(1 for b in blocks for a in range(b) if b - a < 5 or (b - a) & (b - a - 1) == 0 or a == 0)
    keys = Fraction(seen * 256, 512) + Fraction(257, 2)
    assert comparisons["sparse-speed"].computed["state FLOPs"] == Fraction(2**17 + 1, 2) / keys


def test_what_is_not_computed_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(figure_sets()["field"].not_computed) == 9
    said = " ".join(run(capsys, "field").split())
    assert "not computed: UltraMemV2: 2.5B active of 120B: no sizes of its layers are published" in said
    (result,) = json.loads(run(capsys, "field", "--format", "json"))["sets"]
    assert result["not_computed"] == figure_sets()["field"].not_computed


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_figure_agrees_with_itself_only_as_printed(numerator: int, denominator: int) -> None:
    value = Fraction(numerator, denominator)
    figure = Figure(key="x", what="x", value=round(float(value), 2), unit="x")
    if figure.number:
        assert figure.agrees(figure.number)
        assert figure.agrees(value) == (abs(figure.number - value) <= Fraction(5, 10 ** (figure.decimals + 1))) or (
            value * 10**figure.decimals % 1 == Fraction(1, 2)
        )
        assert not figure.agrees(figure.number + Fraction(1, 10**figure.decimals))


@pytest.mark.parametrize(
    ("value", "other", "agrees"),
    [
        ("8:1", Fraction(77, 10), True),
        ("8:1", Fraction(74, 10), False),
        ("1:8", Fraction(10, 83), True),
        ("1:1", Fraction(10, 14), True),
        ("1:1", Fraction(14, 10), True),
        ("1:1", Fraction(10, 16), False),
        ("1:8", Fraction(8), False),
    ],
)
def test_ratios_agree_as_they_are_printed(value: str, other: Fraction, agrees: bool) -> None:
    assert Figure(key="x", what="x", value=value, unit="ratio").agrees(other) == agrees


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["reproduce", *arguments]) == 0
    return capsys.readouterr().out


def test_json_has_every_figure_with_its_source(capsys: pytest.CaptureFixture[str]) -> None:
    result: dict[str, Any] = json.loads(run(capsys, "all", "--format", "json"))
    assert result["schema"] == "powerplan.reproduce/1"
    figures = [figure for one in result["sets"] for figure in one["figures"]]
    assert len(figures) == sum(len(one.figures) for one in figure_sets().values()) == 140
    for one in result["sets"]:
        assert one["why"]
        for figure in one["figures"]:
            assert figure["source"]
            assert set(figure["computed"]) <= set(one["conventions"])
            assert set(figure["agrees"]) <= set(figure["computed"])


def test_csv_is_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "table4", "--format", "csv").splitlines()
    assert lines[0] == "set,figure,unit,published,convention,computed,agrees"
    assert lines[1] == "table4,batch,x,1,exact,1,True"


def test_tables_fit_a_terminal_and_take_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    start = time.process_time()
    out = run(capsys)
    assert time.process_time() - start < 2
    assert max(map(len, out.splitlines())) <= 100
    assert "| " in run(capsys, "kimi", "--format", "markdown")


def test_an_unknown_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "tabel2"]) == 2
    message = "error: 'tabel2' is not known; did you mean table2? allowed are table2, table3, figure2, table4, "
    assert capsys.readouterr().err == f"{message}power-speed, kimi, hybrids, field, training, training-time, all\n"


def test_all_sets_begin_with_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce"]) == 0
    head = capsys.readouterr().out.partition("\ntable2: ")[0]
    told = {
        name: (int(agree), int(figures)) for name, agree, figures in re.findall(r"^(\S+) +(\d+) +(\d+) ", head, re.M)
    }
    assert main(["reproduce", "--json"]) == 0
    sets = json.loads(capsys.readouterr().out)["sets"]
    assert told == {
        own["name"]: (sum(bool(figure["agrees"]) for figure in own["figures"]), len(own["figures"])) for own in sets
    }
    assert told["table2"] == (11, 12)
    assert main(["reproduce", "table2"]) == 0
    assert capsys.readouterr().out.startswith("table2: ")
