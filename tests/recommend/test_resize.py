"""--keep flops: sizes are found from sums, which are those of the models that are built, and few models are built."""

from __future__ import annotations

from fractions import Fraction
from math import log
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from powerplan.accounting import Accounting
from powerplan.dtypes import Dtypes
from powerplan.errors import InputError
from powerplan.ffn import MLP
from powerplan.load import catalogue_names, catalogue_spec
from powerplan.longest import last_at_most
from powerplan.mixers import Attention, Convention
from powerplan.quantization import Quantization, Rule
from powerplan.search import Request, recommend
from powerplan.search.choices import scopes, whole_scope
from powerplan.search.costs import CostBasis
from powerplan.search.layer_plan import LayerPlan, exception_places, exceptions_by_mixer
from powerplan.search.resize import FLOPS_TOLERANCE, MOST_ASPECT_CHANGE, Resizer, Size
from powerplan.search.trials import Search
from powerplan.spec import Layer, LayerGroup, ModelSpec

CONVENTIONS = [Convention(), Convention(lm_head=False), Convention(form="chunked"), Convention(causal="full")]


def plans_of(spec: ModelSpec, basis: CostBasis) -> tuple[Search, list[LayerPlan]]:
    search = Search(Accounting(spec, basis.convention), basis, Fraction(1), lambda plan: True)
    return search, [trial.plan for trial in search.trials() if not trial.plan.unchanged]


def built_size(resizer: Resizer, plan: LayerPlan) -> ModelSpec | None:
    """The search of `Resizer.resized` with a model built for each size that it tries."""
    base, basis, goal = resizer.base, resizer.basis, resizer.goal
    first = resizer.build(plan, Size(Fraction(1), Fraction(1), base.layer_count, plan.count))
    widths = [mixer.width_divisor() for mixer in first.mixers()]
    parts = next((n for n in range(base.hidden_size, 1, -1) if not any(w % n for w in (base.hidden_size, *widths))), 1)
    if parts == 1:
        return None

    def flops_of(spec: ModelSpec) -> Fraction:
        return Accounting(spec, basis.convention).row(basis.longest).flops_per_token

    middle = round(parts * (float(goal) / float(flops_of(first))) ** (1 / 3))
    sizes = []
    for heads in range(max(1, middle - 2), middle + 3):
        depth = base.layer_count
        for _ in range(3):
            factor = Fraction(depth, base.layer_count)
            groups = tuple(
                msgspec.structs.replace(group, repeat=max(1, round(group.repeat * factor))) for group in base.layers
            )
            deep = msgspec.structs.replace(base, layers=groups, rope=None)  # Only its layers are counted.
            scope = next(scope for scope in scopes(deep) if scope.partial == plan.scope.partial)
            count = round(plan.count * Fraction(scope.layers, plan.layers))
            if plan.is_mix and not 0 < 2 * count <= scope.layers:
                break
            model = resizer.build(plan, Size(factor, Fraction(heads, parts), deep.layer_count, count))
            flops = flops_of(model)
            head = 2 * model.hidden_size * model.vocab_size if basis.convention.lm_head else 0
            miss = abs(float(flops / goal) - 1)
            aspect = (heads / parts) / (model.layer_count / base.layer_count)
            if 1 / MOST_ASPECT_CHANGE <= aspect <= MOST_ASPECT_CHANGE:
                far = miss > FLOPS_TOLERANCE
                sizes.append((far, miss if far else abs(log(aspect)), miss, model))
            if goal <= head:
                break
            depth = max(1, round((goal - head) / (flops - head) * model.layer_count))
    return min(sizes, key=lambda size: size[:3])[3] if sizes else None


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([name for name in catalogue_names() if scopes(catalogue_spec(name))]),
    st.sampled_from([(1024,), (65_536,), (8192, 100_000)]),
    st.sampled_from(CONVENTIONS),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_sizes_are_those_of_models_that_are_built(
    name: str, at: tuple[int, ...], convention: Convention, quantized: bool, random: Any
) -> None:
    spec, basis = catalogue_spec(name), CostBasis(at, convention, Dtypes("bf16"))
    if quantized:
        rule = Rule(parts=("mixers", "mlp", "experts", "embedding"), bits=4, block=32, scale_bits=8, matrix_bits=32)
        spec = msgspec.structs.replace(spec, quantization=Quantization(method="test", rules=(rule,)))
    search, plans = plans_of(spec, basis)
    goal = search.accounting.row(basis.longest).flops_per_token
    for plan in random.sample(plans, 2):
        resizer = Resizer(spec, plan.scope, basis, goal)
        size, built = resizer.resized(plan), built_size(resizer, plan)
        assert (size is None) == (built is None)
        if size is not None and built is not None:
            assert resizer.build(plan, size) == built
            assert built.layer_count == size.layers
            assert resizer.cost(plan, size) == basis.of_model(Accounting(built, convention))
            assert resizer.flops_per_token(plan, size) == Accounting(built, convention).row(at[-1]).flops_per_token


def test_only_candidates_that_may_be_shown_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[LayerPlan] = []
    build = LayerPlan.build

    def counted(plan: LayerPlan, spec: ModelSpec) -> ModelSpec:
        built.append(plan)
        return build(plan, spec)

    monkeypatch.setattr(LayerPlan, "build", counted)
    answer = recommend(catalogue_spec("llama-2-7b"), Request(contexts=[65_536], keep="flops"))
    assert len(built) <= len(answer.candidates) + 4  # 1,246 were, when each size was a model.


@given(
    st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 3), min_size=1, max_size=4)), min_size=1), st.data()
)
def test_exceptions_are_counted_without_their_places(groups: list[tuple[int, list[int]]], data: st.DataObject) -> None:
    period = [
        LayerGroup(repeat=n, pattern=tuple(Layer(mixer=Attention(heads=1, head_dim=d)) for d in dims))
        for n, dims in groups
    ]
    scope = whole_scope(ModelSpec(name="x", vocab_size=9, hidden_size=8, layers=tuple(period)))
    if scope.layers < 2:
        return
    count = data.draw(st.integers(1, scope.layers // 2))
    order = scope.order()
    exceptions = [order[place] for place in exception_places(scope.layers, count)]
    assert exceptions_by_mixer(scope, count) == tuple(map(exceptions.count, range(len(scope.distinct))))


def deep(layers: int) -> ModelSpec:
    layer = LayerGroup(repeat=layers, mixer=Attention(heads=32, head_dim=128), ffn=MLP(intermediate_size=11_008))
    return ModelSpec(name="deep", vocab_size=32_000, hidden_size=4096, layers=(layer,))


def test_no_model_gets_more_layers_than_a_model_may_have() -> None:
    """At a million tokens, a model of equal FLOPs has many more layers: those that are too deep are left out."""
    answer = recommend(deep(100_000), Request(contexts=[2**20], keep="flops"))
    assert all(candidate.spec.layer_count <= 100_000 for candidate in answer.candidates)


def test_distinct_layers_do_not_multiply_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of a mixer in a width is found once, however many plans and sizes have it."""
    calls = 0
    terms = Attention.matmul_terms

    def counted(mixer: Attention, hidden: int) -> Any:
        nonlocal calls
        calls += 1
        return terms(mixer, hidden)

    monkeypatch.setattr(Attention, "matmul_terms", counted)

    def work(layers: int) -> int:
        nonlocal calls
        calls = 0
        groups = tuple(LayerGroup(mixer=Attention(heads=32, head_dim=32 + i)) for i in range(layers))
        spec = ModelSpec(name="unlike", vocab_size=9, hidden_size=4096, layers=groups)
        recommend(spec, Request(contexts=[65_536], keep="flops", only=["window", "attention"]))
        return calls

    assert work(40) < 3 * work(20)


def test_the_largest_number_is_found_in_few_steps() -> None:
    calls: list[int] = []

    def value(at: int) -> Fraction:
        calls.append(at)
        return Fraction(3 * at + min(at, 4096), 7)

    limit = value(123_456_789)
    calls.clear()
    assert last_at_most(limit, value, 2**50) == 123_456_789
    assert len(calls) <= 20


@given(st.integers(2, 10**6), st.integers(0, 10**7), st.sampled_from([1, 2, 3]))
def test_the_largest_number_is_the_one_that_halving_finds(highest: int, limit: int, power: int) -> None:
    found = last_at_most(limit, lambda at: at**power, highest)
    within = 1 <= limit < highest**power
    assert (found is not None) == within
    if found is not None:
        assert found**power <= limit < (found + 1) ** power


def test_heads_that_forbid_another_width_are_said() -> None:
    layers = (LayerGroup(repeat=2, mixer=Attention(heads=1, head_dim=8)),)
    spec = ModelSpec(name="one", vocab_size=9, hidden_size=8, layers=layers)
    with pytest.raises(InputError, match="its heads do not allow another width"):
        recommend(spec, Request(contexts=[4096], keep="flops", only=["power"]))
