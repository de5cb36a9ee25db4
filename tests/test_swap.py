"""`--mixer`: what a new mixer takes over from the old one, and what it says about the rest."""

from __future__ import annotations

import pytest

from powerplan.accounting import Accounting
from powerplan.errors import InputError
from powerplan.load import catalogue_names, catalogue_spec
from powerplan.mixers import (
    DSA,
    KDA,
    MLA,
    RWKV7,
    Attention,
    Convention,
    FeatureAttention,
    Forgetting,
    GatedDeltaNet,
    GroupedHeads,
    Linear,
    Mamba1,
    Mamba2,
    Mixer,
    MoBA,
    Power,
)
from powerplan.spec import LayerGroup, ModelSpec
from powerplan.swap import with_mixer
from powerplan.swap.value import KINDS


def test_the_same_mixer_changes_nothing() -> None:
    spec = catalogue_spec("power-coder-3b")
    same, notes = with_mixer(spec, "power:p=2")
    assert Accounting(same).total_parameters == Accounting(spec).total_parameters
    assert notes == []
    more, _ = with_mixer(spec, "power:p=3")
    assert Accounting(more).weight_flops_per_token == Accounting(spec).weight_flops_per_token


def test_what_gets_lost_is_said() -> None:
    linear, notes = with_mixer(catalogue_spec("gpt-oss-20b"), "linear")
    assert notes == ["sinks is left out, linear has none"]
    assert Accounting(linear).wsfr(1) is not None
    _, notes = with_mixer(catalogue_spec("power-coder-3b"), "attention")
    assert notes == ["gated is left out, attention has none"]


def test_sinks_stay_and_windows_go() -> None:
    full, notes = with_mixer(catalogue_spec("gpt-oss-20b"), "attention")
    (use,) = full.layer_uses()
    assert isinstance(use.layer.mixer, Attention)
    assert use.layer.mixer.sinks
    assert use.layer.mixer.window is None
    assert notes == []


def test_settings_go_before_what_the_model_has() -> None:
    spec, _ = with_mixer(catalogue_spec("llama-3-8b"), "power:p=2,gated=true,chunk_size=1k,kv_heads=4")
    (use,) = spec.layer_uses()
    assert use.layer.mixer == Power(heads=32, kv_heads=4, head_dim=128, p=2, gated=True, chunk_size=1024)


@pytest.mark.parametrize("name", catalogue_names())
def test_every_model_takes_every_mixer(name: str) -> None:
    for kind in KINDS:
        spec, _ = with_mixer(catalogue_spec(name), "power:p=2" if kind == "power" else kind)
        assert {use.layer.mixer.kind for use in spec.layer_uses() if use.layer.mixer} == {kind}
        assert (Accounting(spec).state_flops_per_token(8192) > 0) == (kind != "short_conv")


def the_mixer(name: str, text: str) -> tuple[Mixer, list[str]]:
    spec, notes = with_mixer(catalogue_spec(name), text)
    (mixer,) = {use.layer.mixer for use in spec.layer_uses() if use.layer.mixer}
    return mixer, notes


def test_a_hybrid_takes_its_own_layers_first() -> None:
    spec = catalogue_spec("kimi-linear-48b-a3b")
    kda, mla = (
        next(use.layer.mixer for use in spec.layer_uses() if type(use.layer.mixer) is kind) for kind in (KDA, MLA)
    )
    assert the_mixer("kimi-linear-48b-a3b", "mla") == (mla, [])
    assert the_mixer("kimi-linear-48b-a3b", "kda") == (kda, [])
    attention, _ = the_mixer("nemotron-h-8b", "attention")
    assert attention == Attention(heads=32, kv_heads=8, head_dim=128)


@pytest.mark.parametrize(
    ("name", "text", "mixer", "note"),
    [
        (
            "llama-3-8b",
            "gated_deltanet:conv_size=3",
            GatedDeltaNet(heads=32, head_dim=128, conv_size=3),
            "gated_deltanet has projections of its own for the same heads: the weights change too",
        ),
        (
            "llama-3-8b",
            "moba:block_size=1k,top_k=2",
            MoBA(heads=32, kv_heads=8, head_dim=128, block_size=1024, top_k=2),
            None,
        ),
        ("llama-3-8b", "forgetting", Forgetting(heads=32, kv_heads=8, head_dim=128), None),
        (
            "llama-3-8b",
            "mamba2:groups=8",
            Mamba2(heads=128, groups=8),
            "twice the width inside in heads of 64, and a state of 128, as Mamba-2 has: the weights change too",
        ),
        (
            "gpt2-small",
            "mamba1",
            Mamba1(inner_size=1536, dt_rank=48),
            "mamba1 with twice the width inside and a state of 16: the weights change too",
        ),
        (
            "llama-3-8b",
            "rwkv7",
            RWKV7(heads=64, decay_rank=160, rate_rank=160, gate_rank=320, value_rank=96, channel_mix=False),
            "rwkv7 with heads of 64 and the usual ranks: the weights change too",
        ),
        (
            "llama-3-8b",
            "mla",
            MLA(heads=32, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128),
            "mla with DeepSeek-V3's latents and a RoPE key of 64: the weights change too",
        ),
        (
            "kimi-linear-48b-a3b",
            "dsa",
            DSA(
                heads=32,
                q_lora_rank=1536,
                kv_lora_rank=512,
                qk_nope_head_dim=128,
                qk_rope_head_dim=64,
                v_head_dim=128,
            ),
            "the indexer needs a query latent: 1,536 as in DeepSeek-V3",
        ),
        (
            "deepseek-v3.2-exp",
            "mla",
            MLA(
                heads=128,
                q_lora_rank=1536,
                kv_lora_rank=512,
                qk_nope_head_dim=128,
                qk_rope_head_dim=64,
                v_head_dim=128,
            ),
            "the indexer is left out, mla has none",
        ),
        (
            "mamba2-130m",
            "attention",
            Attention(heads=12, head_dim=64),
            "mamba2 has no heads to take over: heads of 64 are assumed, the weights change too",
        ),
        (
            "rwkv7-0.1b",
            "attention",
            Attention(heads=12, head_dim=64),
            "attention has projections of its own for the same heads: the weights change too",
        ),
    ],
)
def test_what_a_kind_takes_over(name: str, text: str, mixer: Mixer, note: str | None) -> None:
    changed, notes = the_mixer(name, text)
    assert changed == mixer
    assert note in notes if note else not notes


def test_no_heads_to_take_over() -> None:
    layer = LayerGroup(mixer=Mamba1(inner_size=96, dt_rank=3))
    spec = ModelSpec(name="odd", vocab_size=9, hidden_size=50, layers=(layer,))
    with pytest.raises(InputError, match=r"^mixer: mamba1 has no heads to take over; write heads and head_dim"):
        with_mixer(spec, "attention")
    changed, notes = with_mixer(spec, "attention:heads=5,head_dim=10")
    (use,) = changed.layer_uses()
    assert use.layer.mixer == Attention(heads=5, head_dim=10)
    assert notes == ["attention with other heads: the weights change too"]


def test_the_library_refuses_what_the_command_line_cannot_ask() -> None:
    with pytest.raises(InputError, match="form must be recurrent or chunked, and is 'recurent'"):
        Convention(form="recurent")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="causal must be exact or full, and is 'exakt'"):
        Convention(causal="exakt")  # type: ignore[arg-type]
    accounting = Accounting(catalogue_spec("gpt2-small"))
    with pytest.raises(InputError, match=r"a context is 1 to [0-9,]+ tokens, and is 0"):
        accounting.row(0)
    with pytest.raises(InputError, match="dtype: 'bf61' is not known; did you mean bf16"):
        accounting.row(5, "bf61")


def unlike() -> ModelSpec:
    """Return a model whose layers have different heads, one of them gated linear attention, one gated power."""
    mixers = (
        Linear(heads=8, head_dim=256, gated=True, chunk_size=128),
        Attention(heads=16, head_dim=64, kv_heads=4),
        Attention(heads=32, head_dim=64, kv_heads=8, window=4096),
        Power(heads=32, head_dim=64, kv_heads=8, p=2, gated=True, tile=16),
    )
    layers = tuple(LayerGroup(repeat=2, mixer=mixer) for mixer in mixers)
    return ModelSpec(name="unlike", vocab_size=32_000, hidden_size=2048, layers=layers)


@pytest.mark.parametrize("text", ["attention", "window:512", "power:p=2", "linear"])
def test_layers_keep_their_heads_and_are_one_kind(text: str) -> None:
    spec, _ = with_mixer(unlike(), text)
    mixers = [use.layer.mixer for use in spec.layer_uses()]
    assert [(m.heads, m.kv_heads, m.head_dim) for m in mixers if isinstance(m, GroupedHeads)] == [
        (8, 8, 256),
        (16, 4, 64),
        (32, 8, 64),
    ]
    for mixer in mixers:
        if isinstance(mixer, FeatureAttention):
            assert mixer.gated
        if isinstance(mixer, Power):
            assert (mixer.tile, mixer.chunk_size) == (16, None)
        if isinstance(mixer, Linear):
            assert mixer.chunk_size == 128


def test_linear_beside_power_is_gated_in_every_layer() -> None:
    layers = (
        LayerGroup(mixer=Attention(heads=4, head_dim=8)),
        LayerGroup(mixer=Power(heads=4, head_dim=8, p=2, gated=True)),
    )
    spec, _ = with_mixer(ModelSpec(name="beside", vocab_size=9, hidden_size=32, layers=layers), "linear")
    assert [use.layer.mixer for use in spec.layer_uses()] == [Linear(heads=4, head_dim=8, gated=True)]


@pytest.mark.parametrize("field", ["shared_kv", "uncached", "keys_as_values", "differential"])
def test_layers_with_keys_of_their_own_keep_them(field: str) -> None:
    """A linear layer in a model whose attention shares keys has its own projections, of other dims."""
    attention = Attention(heads=4, kv_heads=4, head_dim=16, **{field: True})
    linear = Linear(heads=3, head_dim=16, v_head_dim=32)
    groups = (LayerGroup(mixer=attention), LayerGroup(mixer=linear))
    spec = ModelSpec(name="x", vocab_size=9, hidden_size=64, layers=groups)
    assert with_mixer(spec, "attention")[0].mixers() == [attention, Attention(heads=3, head_dim=16, v_head_dim=32)]


def test_the_normaliser_of_an_odd_degree_is_said() -> None:
    """A spec may have one and counts it; recommend, budget, train and dims count odd degrees as kernels run them."""
    spec = catalogue_spec("gpt2-small")
    same, remarks = with_mixer(spec, "power:p=3,gated=true")
    assert remarks == [
        "power p=3 counts a normaliser, which kernels of odd degrees do not have; power:p=3,gated=true,normalize=false "
        "counts none, as recommend and budget do"
    ]
    other, without = with_mixer(spec, "power:p=3,gated=true,normalize=false")
    assert without == []
    assert Accounting(same).state_flops_per_token(1) * 64 == Accounting(other).state_flops_per_token(1) * 65
    for text in ("power:p=2", "power:p=3,normalize=true", "attention"):
        assert with_mixer(spec, text)[1] == []
