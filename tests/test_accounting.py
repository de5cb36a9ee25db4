"""Weight and state FLOPs against figures computed independently, and against brute-force counts."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from specs import contexts, head_fields, layers, mixers, powers, specs, windows

from powerplan.accounting import Accounting, positions_text
from powerplan.balance import Verdict, verdict_of
from powerplan.dims import spow_dim, tiled_spow_dim
from powerplan.explanation import explain
from powerplan.ffn import MLP, multiplied_terms
from powerplan.load import catalogue_spec
from powerplan.mixers import (
    MLA,
    Attention,
    ChunkedAttention,
    Compressed,
    Convention,
    Linear,
    Power,
    SparseStateExpansion,
)
from powerplan.mixers.formulas import SYMBOLS, mean_keys, mean_keys_in_chunks, total
from powerplan.spec import Layer, LayerGroup, ModelSpec, Norm, group_layers
from powerplan.swap import with_mixer
from powerplan.units import MAX_CONTEXT

FORMS: tuple[Any, Any] = ("recurrent", "chunked")
FIGURES = [
    ("gpt2-small", None, 1024, 247_064_064, 18_892_800, 13.0772),
    ("gpt2-small", None, 65_536, 247_064_064, 1_207_977_984, 0.204527),
    ("gpt2-small", "window:8192", 65_536, 247_064_064, 283_117_824, 0.872655),
    ("gpt2-small", "power:p=2", 65_536, 247_064_064, 77_875_200, 3.17256),
    ("gpt2-small", "power:p=3", 1, 247_064_064, 1_713_254_400, 0.144207),
    ("llama-3-8b", None, 65_536, 15_009_316_864, 17_180_131_328, 0.873644),
    ("llama-3-8b", "power:p=2", 1_048_576, 15_009_316_864, 2_726_461_440, 5.50505),
    ("gemma-2-9b", None, 8_192, 18_482_200_576, 2_466_508_800, 7.49326),
    ("gpt-oss-20b", None, 131_072, 7_214_284_800, 12_910_153_824, 0.558807),
    ("deepseek-v3", None, 131_072, 73_249_193_984, 327_493_754_880, 0.223666),
    ("kimi-linear-48b-a3b", None, 1_048_576, 6_213_500_928, 75_235_399_680, 0.0825875),
]


@pytest.mark.parametrize(("name", "mixer", "context", "weight", "state", "ratio"), FIGURES)
def test_figures_that_must_come_out(
    name: str, mixer: str | None, context: int, weight: int, state: int, ratio: float
) -> None:
    spec = catalogue_spec(name)
    if mixer:
        spec, _ = with_mixer(spec, mixer)
    accounting = Accounting(spec)
    assert accounting.weight_flops_per_token == weight
    assert accounting.state_flops_per_token(context) == state
    wsfr = accounting.wsfr(context)
    assert wsfr is not None
    assert float(f"{float(wsfr):.6g}") == ratio


@pytest.mark.parametrize(("lm_head", "context"), [(True, 13_403), (False, 9_215)])
def test_gpt2_small_balances_where_published(lm_head: bool, context: int) -> None:
    accounting = Accounting(catalogue_spec("gpt2-small"), Convention(lm_head=lm_head))
    assert accounting.balanced_context() == context
    assert (
        accounting.state_flops_per_token(context)
        <= accounting.weight_flops_per_token
        < accounting.state_flops_per_token(context + 1)
    )


def test_balanced_means_within_5_percent_of_the_target() -> None:
    assert all(verdict_of(ratio).side == "balanced" for ratio in (Fraction(19, 20), Fraction(1), Fraction(20, 19)))
    assert not any(verdict_of(ratio).side == "balanced" for ratio in (Fraction(94, 100), Fraction(106, 100)))
    assert verdict_of(Fraction(3), target=Fraction(3)) == Verdict("balanced", Fraction(1))
    assert verdict_of(Fraction(3)) == Verdict("weight", Fraction(3))
    assert verdict_of(Fraction(3), target=Fraction(6)) == Verdict("state", Fraction(2))


def test_models_that_never_balance() -> None:
    window, _ = with_mixer(catalogue_spec("gpt2-small"), "window:4096")
    assert Accounting(window).balanced_context() is None
    heavy, _ = with_mixer(catalogue_spec("gpt2-small"), "power:p=3")
    assert Accounting(heavy).balanced_context() is None


def keys_of_mask(context: int, window: int | None, causal: str) -> Fraction:
    """Count the ones of an explicit attention mask."""
    seen = 0
    for query in range(context):
        for key in range(context):
            in_past = key <= query and (window is None or key > query - window)
            seen += in_past
    if causal == "full":
        return Fraction(context if window is None else min(context, window))
    return Fraction(seen, context)


@given(st.integers(1, 60), st.none() | st.integers(1, 80), st.sampled_from(["exact", "full"]))
def test_mean_keys_equal_an_explicit_mask(context: int, window: int | None, causal: Any) -> None:
    assert mean_keys(context, causal, window) == keys_of_mask(context, window, causal)


@given(st.integers(1, 60), st.integers(1, 80))
def test_keys_in_chunks_equal_an_explicit_mask(context: int, chunk: int) -> None:
    pairs = [(q, k) for q in range(context) for k in range(context) if q // chunk == k // chunk]
    assert mean_keys_in_chunks(context, "full", chunk) == Fraction(len(pairs), context)
    assert mean_keys_in_chunks(context, "exact", chunk) == Fraction(sum(k <= q for q, k in pairs), context)


@given(powers, st.integers(1, 80), st.sampled_from(["exact", "full"]))
def test_chunked_power_equals_a_token_by_token_count(mixer: Power, context: int, causal: Any) -> None:
    chunk = mixer.effective_chunk_size()
    dim = mixer.head_dim if mixer.p == 1 else tiled_spow_dim(mixer.head_dim, mixer.p, min(mixer.tile, mixer.head_dim))
    columns = mixer.v_head_dim + mixer.normalize
    flops = 0
    for token in range(context):
        first = token // chunk * chunk
        if first > 0:
            flops += 2 * mixer.heads * dim * columns
        flops += 2 * mixer.kv_heads * dim * columns
        last = min(first + chunk, context)
        keys = token - first + 1 if causal == "exact" else last - first
        flops += 2 * mixer.heads * (mixer.head_dim + mixer.v_head_dim) * keys
    counted = total(mixer.state_flops_terms(context, Convention(causal, "chunked")))
    assert counted * context == flops


@given(specs, contexts, st.sampled_from(["exact", "full"]), st.sampled_from(["recurrent", "chunked"]), st.booleans())
def test_parts_sum_to_the_total(spec: ModelSpec, context: int, causal: Any, form: Any, lm_head: bool) -> None:
    accounting = Accounting(spec, Convention(causal, form, lm_head))
    for parts in (accounting.components(context), accounting.layers(context)):
        assert sum(part.weight_flops_per_token for part in parts) == accounting.weight_flops_per_token
        assert sum((part.state_flops_per_token for part in parts), Fraction(0)) == accounting.state_flops_per_token(
            context
        )


@given(specs, contexts)
def test_explanation_sums_to_the_total(spec: ModelSpec, context: int) -> None:
    accounting = Accounting(spec)
    lines = explain(spec, context, accounting.convention)
    sums: dict[str, Fraction] = {}
    for line in lines:
        sums[line.quantity] = sums.get(line.quantity, Fraction(0)) + line.value * line.count
    assert sums["weight FLOPs per token"] == accounting.weight_flops_per_token
    assert sums.get("state FLOPs per token", 0) == accounting.state_flops_per_token(context)
    assert sums.get("state elements", 0) == accounting.row(context).state_elements
    stored = sums["weight FLOPs per token"] / 2 + sums["parameters outside matmuls"]
    stored += sums.get("parameters not touched", 0)
    for use in accounting.uses:  # Weights that a token multiplies twice are stored once.
        for block in use.layer.blocks:
            twice = total(multiplied_terms(block, spec.hidden_size)) - total(block.matmul_terms(spec.hidden_size))
            stored -= use.count * twice
    again = spec.vocab_size * spec.hidden_size if spec.tie_embeddings else 0
    for use in accounting.uses:
        if use.layer.tied:  # Its weights take FLOPs, and are stored with an earlier layer.
            again += use.count * sum(total(block.matmul_terms(spec.hidden_size)) for block in use.layer.blocks)
    assert stored - again == accounting.total_parameters.with_embeddings


@given(specs)
def test_active_parameters_are_part_of_the_total(spec: ModelSpec) -> None:
    accounting = Accounting(spec)
    for name in ("with_embeddings", "without_input_embedding", "without_embeddings"):
        assert getattr(accounting.active_parameters, name) <= getattr(accounting.total_parameters, name)


@given(specs, contexts, contexts, st.sampled_from(["exact", "full"]))
def test_flops_and_state_never_fall_with_context(spec: ModelSpec, first: int, second: int, causal: Any) -> None:
    """Two kinds restart: keys that wait for their compression are gone with it, and a chunk begins with no keys."""
    accounting = Accounting(spec, Convention(causal))
    short, long = accounting.row(min(first, second)), accounting.row(max(first, second))
    assert short.weight_flops_per_token == long.weight_flops_per_token
    assert short.state_flops_per_token <= long.state_flops_per_token or not accounting.grows_with_context
    restarts = {type(mixer) for mixer in spec.mixers()} & {ChunkedAttention, Compressed}
    assert short.state_elements <= long.state_elements or Compressed in restarts
    assert short.decode_state_bytes_per_token <= long.decode_state_bytes_per_token or restarts


@given(head_fields(), contexts, st.integers(0, 300), st.sampled_from(["exact", "full"]))
def test_a_window_of_at_least_the_context_is_full_attention(
    heads: dict[str, Any], context: int, more: int, causal: Any
) -> None:
    convention = Convention(causal)
    windowed, full = Attention(**heads, window=context + more), Attention(**heads)
    assert total(windowed.state_flops_terms(context, convention)) == total(full.state_flops_terms(context, convention))
    assert windowed.state_size(context) == full.state_size(context)


@given(head_fields(), windows, contexts, st.integers(1, 64))
def test_as_many_groups_as_heads_is_multi_head(
    heads: dict[str, Any], window: int | None, context: int, hidden: int
) -> None:
    grouped = Attention(**heads | {"kv_heads": heads["heads"]}, window=window)
    plain = Attention(**{key: value for key, value in heads.items() if key != "kv_heads"}, window=window)
    assert grouped == plain
    k, v, h = heads["head_dim"], heads["v_head_dim"], heads["heads"]
    gate = {False: 0, True: hidden * h * v, "head": hidden * h}[heads["output_gate"]]
    assert total(grouped.matmul_terms(hidden)) == 2 * hidden * h * (k + v) + gate
    assert total(grouped.state_flops_terms(context, Convention())) == 2 * h * (k + v) * mean_keys(
        context, "exact", window
    )


@given(head_fields(), windows, st.booleans(), contexts, st.sampled_from(["recurrent", "chunked"]))
def test_power_of_degree_one_without_normaliser_is_linear(
    heads: dict[str, Any], chunk: int | None, gated: bool, context: int, form: Any
) -> None:
    power = Power(**heads, p=1, normalize=False, gated=gated, chunk_size=chunk)
    linear = Linear(**heads, gated=gated, chunk_size=chunk)
    convention = Convention(form=form)
    assert power.state_size(context) == linear.state_size(context)
    assert total(power.matmul_terms(16)) == total(linear.matmul_terms(16))
    assert total(power.other_terms(16)) == total(linear.other_terms(16))
    power_flops = total(power.state_flops_terms(context, convention))
    assert power_flops == total(linear.state_flops_terms(context, convention))


@given(mixers, contexts)
def test_state_terms_equal_the_state(mixer: Any, context: int) -> None:
    assert total(mixer.state_terms(context)) == mixer.state_size(context).elements


@given(specs)
def test_a_balanced_context_is_the_last_one_in_balance(spec: ModelSpec) -> None:
    accounting = Accounting(spec)
    context = accounting.balanced_context()
    if not accounting.longest_is_found:
        assert context is None
    elif context is None:
        lightest, heaviest = accounting.state_flops_per_token(1), accounting.state_flops_per_token(MAX_CONTEXT)
        assert lightest > accounting.weight_flops_per_token or heaviest <= accounting.weight_flops_per_token
    else:
        assert (
            accounting.state_flops_per_token(context)
            <= accounting.weight_flops_per_token
            < accounting.state_flops_per_token(context + 1)
        )


def test_state_of_power_and_of_a_window_in_the_paper() -> None:
    """arXiv 2507.04239: window 1024 has 131,072 elements per head, p = 2 at d = 64 has 133,120 (no normaliser)."""
    power = Power(heads=1, head_dim=64, p=2, normalize=False)
    window = Attention(heads=1, head_dim=64, window=1024)
    assert power.state_size(65_536).elements == 133_120 == spow_dim(64, 2) * 64
    assert window.state_size(65_536).elements == 131_072


def test_bytes_and_decode_traffic() -> None:
    spec = catalogue_spec("llama-3-8b")
    row = Accounting(spec).row(65_536)
    assert row.state_bytes == 65_536 * 131_072  # published: 128 KiB per token in bf16
    assert row.decode_state_bytes_per_token == 65_537 * 131_072  # the cache is read, one entry is appended
    assert row.decode_weight_bytes_per_token == 2 * (8_030_261_248 - 128_256 * 4096)
    assert Accounting(spec).row(65_536, "fp8").state_bytes == 65_536 * 65_536
    assert Accounting(spec).row(1, "int4").state_bytes == 32_768
    power, _ = with_mixer(spec, "power:p=2")
    power_row = Accounting(power).row(65_536, "fp8")
    assert power_row.state_bytes == 4 * 32 * 8 * 8256 * 129  # fp32 whatever the cache's dtype
    assert power_row.decode_state_bytes_per_token == 2 * power_row.state_bytes


def test_bytes_of_a_hybrid_and_of_its_latent_twin() -> None:
    """Kimi Linear at 1M tokens, bf16: 8.46 GB of cache where MLA in all 27 layers has 32.6 GB; its state is fp32."""
    context, state, convolutions = 1_048_576, 10_485_760, 737_280
    row = Accounting(catalogue_spec("kimi-linear-48b-a3b")).row(context)
    cache = 7 * 1152 * context
    assert f"{cache / 1e9:.2f}" == "8.46"
    assert row.state_bytes == cache + 4 * state + 2 * convolutions
    assert row.state_elements == cache // 2 + state + convolutions
    assert row.decode_state_bytes_per_token == cache + 7 * 1152 + 2 * (4 * state + 2 * convolutions)
    twin, _ = with_mixer(catalogue_spec("kimi-linear-48b-a3b"), "mla")
    assert Accounting(twin).row(context).state_bytes == 27 * 1152 * context
    assert f"{27 * 1152 * context / 1e9:.1f}" == "32.6"


def test_bytes_of_partitions_that_are_not_chosen_are_not_moved() -> None:
    mixer = SparseStateExpansion(heads=2, head_dim=8, partitions=7, top_k=2)
    assert mixer.state_bytes(99, Fraction(2)) == 4 * 8 * 2 * 8 * 8
    assert mixer.decode_bytes(99, Fraction(2)) == 2 * 4 * 3 * 2 * 8 * 8


def test_mla_caches_the_latent_and_multiplies_the_heads() -> None:
    mixer = MLA(heads=4, q_lora_rank=None, kv_lora_rank=32, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6)
    assert total(mixer.matmul_terms(64)) == 64 * 4 * 12 + 64 * 36 + 32 * 4 * 14 + 4 * 6 * 64
    assert mixer.state_size(10).elements == 360
    assert total(mixer.state_flops_terms(9, Convention())) == 2 * 4 * 18 * 5


def test_excluding_the_lm_head_drops_its_flops_and_no_parameters() -> None:
    spec = catalogue_spec("gpt2-small")
    with_head, without = Accounting(spec), Accounting(spec, Convention(lm_head=False))
    assert with_head.weight_flops_per_token - without.weight_flops_per_token == 2 * 50_257 * 768
    assert with_head.total_parameters == without.total_parameters


def test_a_model_without_mixers_has_no_ratio() -> None:
    spec = ModelSpec(name="mlp", vocab_size=10, hidden_size=8, layers=(LayerGroup(ffn=MLP(intermediate_size=4)),))
    assert Accounting(spec).wsfr(100) is None
    assert Accounting(spec).row(100).wsfr is None
    assert Accounting(spec).balanced_context() is None


def test_norms_are_counted_per_layer_and_once_at_the_end() -> None:
    def parameters(**norm: Any) -> int:
        layer = LayerGroup(repeat=3, ffn=MLP(intermediate_size=4, gated=False))
        spec = ModelSpec(name="n", vocab_size=10, hidden_size=8, layers=(layer,), norm=Norm(**norm))
        return Accounting(spec).total_parameters.without_embeddings - 3 * 2 * 4 * 8

    assert parameters(kind="rmsnorm", per_layer=2) == 8 * (3 * 2 + 1)
    assert parameters(kind="layernorm", per_layer=2) == 16 * (3 * 2 + 1)
    assert parameters(kind="layernorm", per_layer=4, bias=False, final=False) == 8 * 3 * 4
    assert parameters(kind="none", per_layer=2) == 0


@given(st.lists(layers, min_size=1, max_size=4), st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_grouping_layers_keeps_their_order(kinds: list[Layer], choice: list[int]) -> None:
    sequence = [kinds[index % len(kinds)] for index in choice]
    spelled = [layer for group in group_layers(sequence) for _ in range(group.repeat) for layer in group.period]
    assert spelled == sequence


def test_patterns_are_found() -> None:
    a, b = (Layer(ffn=MLP(intermediate_size=width)) for width in (1, 2))
    (group,) = group_layers([a, a, b] * 5)
    assert (group.repeat, group.pattern) == (5, (a, a, b))
    first, second = group_layers([a] * 3 + [b] * 58)
    assert (first.repeat, second.repeat) == (3, 58)


@pytest.mark.parametrize(
    ("spans", "text"),
    [
        ((range(3, 4),), "layer 3"),
        ((range(12),), "layers 0-11"),
        ((range(0, 42, 2),), "layers 0, 2, ... 40 (21)"),
        ((range(2), range(5, 9)), "layers 0-1, 5-8 (6)"),
        ((range(0, 20, 4),), "layers 0, 4, ... 16 (5)"),
        ((range(0, 16, 4), range(1, 16, 4), range(2, 16, 4)), "layers 0-2, 4-6, 8-10, 12-14 (12)"),
        ((range(0, 24, 4), range(1, 24, 4), range(2, 24, 4)), "layers 0-2, 4-6, ... 20-22 (18)"),
    ],
)
def test_positions_in_words(spans: tuple[range, ...], text: str) -> None:
    assert positions_text(spans) == text


@given(mixers, contexts, st.sampled_from(["exact", "full"]))
def test_forms_differ_where_a_mixer_says_so(mixer: Any, context: int, causal: Any) -> None:
    if not mixer.chunked_differs:
        recurrent, chunked = (mixer.state_flops_terms(context, Convention(causal, form)) for form in FORMS)
        assert total(recurrent) == total(chunked)


@given(mixers, contexts, st.sampled_from(["recurrent", "chunked"]))
def test_every_letter_has_a_meaning(mixer: Any, context: int, form: Any) -> None:
    terms = (
        *mixer.matmul_terms(8),
        *mixer.other_terms(8),
        *mixer.state_terms(context),
        *mixer.state_flops_terms(context, Convention(form=form)),
    )
    for term in terms:
        assert set(re.findall(r"[A-Za-z_]+", term.formula)) <= set(SYMBOLS)
        numbers = term.substituted().replace("·", "*").replace(",", "")
        assert eval(re.sub(r"(?<![\w.])(\d+)/(\d+)", r"Fraction(\1, \2)", numbers)) == pytest.approx(
            term.value, rel=1e-9
        )
