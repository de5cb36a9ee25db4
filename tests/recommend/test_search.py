"""The search: its whole numbers are those of the models it stands for, and its order is its own."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from specs import by_kind, contexts, untied_specs

from powerplan.accounting import Accounting
from powerplan.dims import kernels_for
from powerplan.documents import parse_yaml
from powerplan.dtypes import Dtypes
from powerplan.dump import spec_to_yaml
from powerplan.errors import InfeasibleError, InputError
from powerplan.load import catalogue_names, catalogue_spec
from powerplan.mixers import MLA, Attention, Convention, Linear, Mixer, Power
from powerplan.mixers.formulas import total
from powerplan.quantization import Quantization, Rule
from powerplan.report.reasons import why
from powerplan.search import Request, recommend
from powerplan.search.choices import NAMED_KINDS, scopes
from powerplan.search.costs import CostBasis
from powerplan.search.layer_plan import LayerPlan, exception_places, pattern_period
from powerplan.search.limits import Checker, Demand, Limits, no_candidate
from powerplan.search.ranking import Ranking
from powerplan.search.trials import Search, Trial
from powerplan.spec import LayerGroup, ModelSpec
from powerplan.swap import with_mixer
from powerplan.validation import validate


def search_of(
    spec: ModelSpec, at: tuple[int, ...], convention: Convention | None = None, dtype: str = "bf16"
) -> Search:
    convention = convention or Convention()
    return Search(
        Accounting(spec, convention), CostBasis(at, convention, Dtypes(dtype)), Fraction(1), lambda plan: True
    )


def check_trial(search: Search, trial: Trial) -> None:
    """The sums of a trial are the numbers of the model that its plan builds, to the digit."""
    basis, cost = search.basis, trial.cost
    built = Accounting(trial.plan.build(search.spec), basis.convention)
    rows = [built.row(context, basis.dtypes) for context in basis.contexts]
    assert cost.weight_flops_per_token == rows[-1].weight_flops_per_token
    assert cost.parameters == built.total_parameters.with_embeddings
    assert cost.state_elements == rows[-1].state_elements
    assert cost.state_bytes == rows[-1].state_bytes
    assert cost.decode_bytes == rows[-1].decode_state_bytes_per_token
    for index, row in enumerate(rows):
        assert search.basis.wsfr(cost, index) == row.wsfr
    whole = Checker(Limits(), search.accounting, basis).decode_bytes(trial)
    assert whole == rows[-1].decode_weight_bytes_per_token + rows[-1].decode_state_bytes_per_token


@settings(max_examples=30)
@given(
    st.sampled_from(catalogue_names()),
    st.sampled_from([(1024,), (65_536,), (8192, 100_000)]),
    st.sampled_from([Convention(), Convention(lm_head=False), Convention(form="chunked"), Convention(causal="full")]),
    st.sampled_from(["bf16", "int4"]),
    st.randoms(use_true_random=False),
)
def test_trials_are_the_models_they_stand_for(
    name: str, at: tuple[int, ...], convention: Convention, dtype: str, random: Any
) -> None:
    search = search_of(catalogue_spec(name), at, convention, dtype)
    trials = search.trials()
    for trial in random.sample(trials, min(8, len(trials))):
        check_trial(search, trial)


@settings(max_examples=60)
@given(untied_specs, contexts, st.booleans(), st.randoms(use_true_random=False))
def test_trials_of_odd_models(spec: ModelSpec, context: int, quantized: bool, random: Any) -> None:
    if quantized:
        rule = Rule(parts=("mixers", "experts", "embedding"), bits=4, block=16, scale_bits=8, matrix_bits=32)
        spec = msgspec.structs.replace(spec, quantization=Quantization(method="test", rules=(rule,)))
    search = search_of(spec, (context,))
    trials = search.trials()
    for trial in random.sample(trials, min(4, len(trials))):
        check_trial(search, trial)


@pytest.mark.parametrize("name", catalogue_names())
def test_candidates_are_what_wsfr_says_of_the_saved_file(name: str) -> None:
    """The round trip of --write: YAML, the reader's validation, and the accounting that wsfr prints."""
    answer = recommend(catalogue_spec(name), Request(contexts=[131_072]))
    for candidate in answer.candidates:
        read = validate(parse_yaml(spec_to_yaml(candidate.spec), "out.yaml"))
        assert read == candidate.spec
        assert Accounting(read).row(131_072) == candidate.row
        assert candidate.parameters == Accounting(read).total_parameters.with_embeddings


@pytest.mark.parametrize("name", ["gpt2-small", "llama-3-8b", "gemma-2-9b", "deepseek-v3", "power-coder-3b"])
def test_the_text_of_a_uniform_candidate_is_a_mixer_option(name: str) -> None:
    spec = catalogue_spec(name)
    for candidate in recommend(spec, Request(contexts=[65_536], top=100)).candidates:
        plan = candidate.plan
        if not (plan.is_mix or plan.scope.partial or plan.unchanged):
            same, _ = with_mixer(spec, candidate.mixer)
            assert Accounting(same).row(65_536) == candidate.row
            assert {use.layer for use in same.layer_uses()} == {use.layer for use in candidate.spec.layer_uses()}


@settings(max_examples=100)
@given(
    st.lists(st.sampled_from(["attention", "power", "linear"]).flatmap(by_kind.__getitem__), min_size=2, max_size=5),
    contexts,
    st.randoms(use_true_random=False),
)
def test_in_odd_models_too(mixers: list[Any], context: int, random: Any) -> None:
    """Layers of several kinds and heads, gated or not: the same swap is the same model in every command."""
    spec = ModelSpec(name="x", vocab_size=9, hidden_size=64, layers=tuple(LayerGroup(mixer=mixer) for mixer in mixers))
    plans = [trial.plan for trial in search_of(spec, (context,)).trials()]
    uniform = [plan for plan in plans if not (plan.is_mix or plan.scope.partial or plan.unchanged)]
    for plan in random.sample(uniform, min(6, len(uniform))):
        same, _ = with_mixer(spec, plan.text())
        assert same.layer_count == spec.layer_count
        assert {use.layer: use.count for use in same.layer_uses()} == {
            use.layer: use.count for use in plan.build(spec).layer_uses()
        }


def test_there_are_thousands_of_candidates() -> None:
    assert len(search_of(catalogue_spec("llama-3-8b"), (65_536,)).trials()) >= 5000


@settings(max_examples=8)
@given(st.permutations([4096, 65_536, 1_000_000]), st.permutations(["power", "attention", "mix", "window"]))
def test_the_order_of_the_input_changes_nothing(at: list[int], kinds: list[str]) -> None:
    spec = catalogue_spec("gpt2-small")
    in_order = recommend(spec, Request(contexts=sorted(at), only=sorted(kinds)))
    shuffled = recommend(spec, Request(contexts=at, only=kinds))
    assert [candidate.mixer for candidate in shuffled.candidates] == [one.mixer for one in in_order.candidates]
    assert shuffled.contexts == in_order.contexts


def test_the_order_of_the_trials_changes_nothing() -> None:
    search = search_of(catalogue_spec("gpt2-small"), (65_536,))
    ranking, trials = Ranking(search), search.trials()
    keys = [ranking.key(trial) for trial in trials]
    assert len(set(keys)) == len(keys)
    backwards = list(reversed(trials))
    assert sorted(trials, key=ranking.key) == sorted(backwards, key=ranking.key)


def criteria(ranking: Ranking, trial: Trial) -> tuple[object, ...]:
    """Return the first criteria of docs/recommend.md, "How they are ranked", of a plan for gpt2-small at 64k."""
    plan, times = trial.plan, math.exp(ranking.distance(trial))
    level = 0 if times <= 20 / 19 or (plan.unchanged and times <= 5 / 4) else 1
    if times > 5 / 4:
        level = 2 + int(2 * math.log2(times / (5 / 4)))
    mixers = [choice.mixers[0] for choice in plan.choices]
    families = [2 if mixer.degree == 1 else int(mixer.family == "window") for mixer in mixers]
    degrees = [mixer.degree or 0 for mixer in mixers if mixer.family == "power"]
    kernels = [kernels_for(degree, mixer.head_dim, mixer.v_head_dim) for mixer in mixers if (degree := mixer.degree)]  # type: ignore[attr-defined]
    return (
        trial.wasteful,
        any(choice.fewer_kv_heads for choice in plan.choices),
        level,
        not plan.unchanged,
        max((2 - len({"torch", "triton"} & set(own)) for own in kernels), default=0),
        max(families),
        max((2 if degree % 2 else int(degree > 2) for degree in degrees), default=0),
        any(not 32 <= mixer.head_dim <= 128 for mixer in mixers),  # type: ignore[attr-defined]
    )


def test_the_first_criteria_are_those_of_the_page() -> None:
    search = search_of(catalogue_spec("gpt2-small"), (65_536,))
    ranking = Ranking(search)
    ordered = [criteria(ranking, trial) for trial in sorted(search.trials(), key=ranking.key)]
    assert ordered == sorted(ordered)
    assert len(set(ordered)) > 50


@given(st.integers(2, 300), st.data())
def test_places_are_spread_evenly(layers: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, layers // 2))
    places = exception_places(layers, count)
    assert len(places) == len(set(places)) == count
    assert all(0 <= place < layers for place in places)
    gaps = {later - earlier for earlier, later in pairwise(places)}
    assert not gaps or max(gaps) - min(gaps) <= 1
    period = pattern_period(layers, count)
    assert all((place in places) == (place + period in places) for place in range(layers - period))


def test_patterns_as_people_write_them() -> None:
    assert exception_places(12, 3) == [3, 7, 11]
    assert exception_places(61, 12) == [4, 9, 14, 19, 24, 29, 34, 39, 44, 49, 54, 59]
    assert exception_places(12, 1) == [11]
    assert (pattern_period(12, 3), pattern_period(32, 12), pattern_period(32, 13)) == (4, 8, 32)
    mixes = [trial.plan for trial in search_of(catalogue_spec("llama-3-8b"), (65_536,)).trials() if trial.plan.is_mix]
    regular = {plan.count for plan in mixes if plan.regular}
    # Every 8th to every 2nd layer, and 3 of 8; every 9th and 10th are not regular.
    assert regular == {count for count in range(1, 17) if pattern_period(32, count) <= 8} == {4, 5, 6, 8, 10, 12, 16}


def test_a_hybrid_may_change_only_the_layers_whose_state_grows() -> None:
    whole, growing = scopes(catalogue_spec("gemma-3-1b"))
    assert not whole.partial
    assert growing.partial
    assert len(whole.positions) == 26
    assert growing.positions == (5, 11, 17, 23)
    assert [scope.partial for scope in scopes(catalogue_spec("llama-3-8b"))] == [False]


@pytest.mark.parametrize(
    ("name", "growing"),
    [
        ("kimi-linear-48b-a3b", 7),
        ("qwen3-next-80b-a3b", 12),
        ("jamba-v0.1", 4),
        ("minimax-text-01", 10),
        ("nemotron-h-8b", 4),
        ("mamba2-130m", 0),
        ("rwkv7-1.5b", 0),
    ],
)
def test_recurrent_layers_stay(name: str, growing: int) -> None:
    spec = catalogue_spec(name)
    mixers = [layer.mixer for group in spec.layers for _ in range(group.repeat) for layer in group.period]
    answer = recommend(spec, Request(contexts=[2**20], top=50))
    assert answer.movable == bool(growing)
    assert (len(answer.candidates) > 1) == bool(growing)
    for candidate in answer.candidates:
        groups = candidate.spec.layers
        changed = [layer.mixer for group in groups for _ in range(group.repeat) for layer in group.period]
        assert sum(old != new for old, new in zip(mixers, changed, strict=True)) <= growing
        for old, new in zip(mixers, changed, strict=True):
            assert old == new or isinstance(old, (Attention, MLA))


def test_a_recurrent_model_stays_and_says_why() -> None:
    for name in ("mamba2-130m", "rwkv7-1.5b", "retnet-3b"):
        answer = recommend(catalogue_spec(name), Request(contexts=[65_536]))
        assert answer.recommended.plan.unchanged
        assert "no layer can take another mixer at the same weights" in why(answer, 0)
        assert answer.balanced_window is None


def test_the_window_of_a_hybrid_is_that_of_its_growing_layers() -> None:
    spec = catalogue_spec("qwen3-next-80b-a3b")
    balanced = recommend(spec, Request(contexts=[262_144])).balanced_window
    assert balanced is not None
    assert balanced.partial

    def ratio(window: int) -> Fraction:
        def change(mixer: Mixer) -> Any:
            return msgspec.structs.replace(mixer, window=window) if isinstance(mixer, Attention) else mixer

        wsfr = Accounting(spec.map_mixers(change)).wsfr(262_144)
        assert wsfr is not None
        return wsfr

    assert ratio(balanced.tokens) >= 1 > ratio(balanced.tokens + 1)


@pytest.mark.parametrize("kind", NAMED_KINDS)
def test_named_kinds_are_what_mixer_makes_of_them(kind: str) -> None:
    spec = catalogue_spec("gpt2-small")
    uniform = {c.mixer: c for c in recommend(spec, Request(contexts=[65_536], only=[kind], top=50)).candidates}[kind]
    assert uniform.row == Accounting(with_mixer(spec, kind)[0]).row(65_536)
    mixed = recommend(spec, Request(contexts=[65_536], only=[kind, "attention"], top=50))
    assert {"attention", kind} in [
        {mixer.kind for choice in candidate.plan.choices for mixer in choice.mixers} for candidate in mixed.candidates
    ]
    by_default = recommend(spec, Request(contexts=[65_536], top=100))
    assert kind not in {choice.family for candidate in by_default.candidates for choice in candidate.plan.choices}


def test_kda_beside_attention_is_kimi_linears_mix() -> None:
    answer = recommend(catalogue_spec("llama-3-8b"), Request(contexts=[262_144], only=["kda", "attention"]))
    assert answer.recommended.label == "24 kda + 8 attention"
    assert "weight FLOPs +8.8%" in why(answer, 0)


@pytest.mark.parametrize("kind", sorted(by_kind))
@settings(max_examples=15)
@given(data=st.data())
def test_every_kind_can_be_made_wider(kind: str, data: st.DataObject) -> None:
    """Heads and hidden size grow together: every weight but those of low-rank factors and biases grows fourfold."""
    mixer = data.draw(by_kind[kind])
    wide = mixer.widened(Fraction(2))
    assert wide is not None
    narrow, doubled = (total(m.matmul_terms(hidden)) for m, hidden in ((mixer, 64), (wide, 128)))
    assert 2 * narrow <= doubled <= 4 * narrow
    flops = [total(m.state_flops_terms(100, Convention())) for m in (mixer, wide)]
    absorbed = kind == "dsa"  # its heads times its latents
    assert flops[0] <= flops[1] <= (4 if absorbed else 2) * flops[0]


def test_a_state_that_costs_more_than_every_key_is_wasteful() -> None:
    search = search_of(catalogue_spec("gpt2-small"), (65_536,))
    flags = {trial.plan.text(): trial.wasteful for trial in search.trials()}
    assert flags["power:p=3,normalize=false"]
    assert not flags["power:p=2"]
    assert not flags["as it is"]
    short = {trial.plan.text(): trial.wasteful for trial in search_of(catalogue_spec("gpt2-small"), (1024,)).trials()}
    assert short["power:p=2"]


def test_a_state_of_more_bytes_than_every_key_is_wasteful() -> None:
    """At 16k tokens p = 2 takes fewer FLOPs than attention; a state in fp32 has more bytes than keys in int4."""
    search = search_of(catalogue_spec("llama-3-8b"), (16_384,), dtype="int4")
    (trial,) = (trial for trial in search.trials() if trial.plan.text() == "power:p=2")
    excess = search.excess(trial.plan.scope, trial.plan.main)
    assert excess.flops < 1 < excess.bytes
    assert trial.wasteful


def test_families() -> None:
    assert Attention(heads=1, head_dim=1).family == "attention"
    assert Attention(heads=1, head_dim=1, window=8).family == "window"
    assert Linear(heads=1, head_dim=1).family == "linear"
    assert Power(heads=1, head_dim=1, p=2).family == "power"


def test_a_model_without_mixers_has_nothing_to_plan() -> None:
    spec = catalogue_spec("gpt2-small")
    ffn = spec.layers[0].ffn
    bare = msgspec.structs.replace(spec, layers=(LayerGroup(repeat=2, ffn=ffn),))
    with pytest.raises(InputError, match="gpt2-small has no sequence mixers, and so no state to plan"):
        recommend(bare, Request(contexts=[1024]))


def test_a_model_as_it_is_may_be_all_there_is() -> None:
    answer = recommend(catalogue_spec("gpt2-small"), Request(contexts=[65_536], only=["attention"]))
    assert [candidate.mixer for candidate in answer.candidates] == ["as it is"]
    assert isinstance(answer.recommended.plan, LayerPlan)


def test_constraints_that_hold_apart_and_not_together() -> None:
    # Sharing a large state among all heads is many FLOPs and few bytes; one layer of softmax is the other way round.
    search = search_of(catalogue_spec("gpt2-small"), (65_536,))
    texts = ("attention x1 + linear x11", "power:p=2,heads=4,kv_heads=1,head_dim=192,v_head_dim=192")
    trials = [trial for trial in search.trials() if trial.plan.text() in texts]
    assert len(trials) == 2
    limits = Limits(max_state=170 * 2**20, flops=3 * 65_536 * 400_000_000)
    error = Checker(limits, search.accounting, search.basis).infeasible(trials)
    assert isinstance(error, InfeasibleError)
    assert str(error) == (
        "max_state: each constraint can be met, but not all at once; the nearest, attention x1 + linear x11, needs "
        "194.1 MiB, 1.14 times the 170 MiB allowed; 1 of 2 candidates would do without max_state"
    )


def test_the_nearest_is_the_one_whose_worst_constraint_is_missed_by_least() -> None:
    trials = search_of(catalogue_spec("gpt2-small"), (65_536,)).trials()[:3]
    needed = {id(trial): own for trial, own in zip(trials, [(30, 5), (15, 14), (5, 40)], strict=True)}

    def demands(trial: Trial) -> list[Demand]:
        first, second = needed[id(trial)]
        return [
            Demand("x", Fraction(first), Fraction(10), "hours"),
            Demand("y", Fraction(second), Fraction(10), "hours"),
        ]

    error = str(no_candidate(trials, demands))
    assert f"the nearest, {trials[1].plan.text()}, needs 15 hours, 1.5 times the 10 allowed; " in error
    assert error.endswith("; 1 of 3 candidates would do without x")


def test_a_layer_without_keys_of_its_own_is_no_measure_of_state() -> None:
    """Layers that read the cache of earlier ones keep nothing: a state there has no softmax to compare with."""
    heads = {"heads": 8, "head_dim": 64}
    shared = (LayerGroup(mixer=Attention(**heads)), LayerGroup(mixer=Attention(**heads, shared_kv=True)))
    spec = ModelSpec(name="x", vocab_size=9, hidden_size=512, layers=shared)
    search = search_of(spec, (65_536,))
    sizes = {trial.plan.text(): search.excess(trial.plan.scope, trial.plan.main).bytes for trial in search.trials()}
    assert sizes["as it is"] == 1
    assert sizes["power:p=2"] == Fraction(8 * 2080 * 65 * 4, 8 * 128 * 65_536 * 2)
