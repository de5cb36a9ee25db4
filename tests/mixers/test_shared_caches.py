"""Layers that read the cache of another one: Gemma 3n, cross-layer attention, YOCO, Dory's loops."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kinds import spec_of
from mixer_fields import head_fields
from torch.utils.flop_counter import FlopCounterMode

from powerplan.accounting import Accounting
from powerplan.errors import InputError
from powerplan.load import load_model
from powerplan.mixers import Attention, ChunkedAttention, Convention, Forgetting
from powerplan.mixers.formulas import total
from powerplan.spec import LayerGroup, ModelSpec

HEADS: dict[str, Any] = {"heads": 4, "kv_heads": 2, "head_dim": 5, "v_head_dim": 3}
OWN, SHARED = Attention(**HEADS), Attention(**HEADS, shared_kv=True)
WINDOW = Attention(**HEADS, window=7)


def model(*mixers: Attention) -> ModelSpec:
    layers = tuple(LayerGroup(mixer=mixer) for mixer in mixers)
    return ModelSpec(name="x", vocab_size=9, hidden_size=16, layers=layers)


def decoded(mixers: list[Attention], tokens: int) -> tuple[int, int, int]:
    """Decode token by token; return FLOPs in all, elements that stay, and elements that the last token reads."""
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    read = 0
    with FlopCounterMode(display=False) as counter:
        for _ in range(tokens):
            layer, read = -1, 0
            for mixer in mixers:
                if not mixer.shared_kv:
                    layer += 1
                    if layer == len(keys):
                        keys.append(torch.zeros(2, 0, 5))
                        values.append(torch.zeros(2, 0, 3))
                    kept = mixer.window or tokens
                    keys[layer] = torch.cat([keys[layer], torch.ones(2, 1, 5)], 1)[:, -kept:]
                    values[layer] = torch.cat([values[layer], torch.ones(2, 1, 3)], 1)[:, -kept:]
                (torch.ones(2, 2, 5) @ keys[layer].transpose(1, 2)).softmax(-1) @ values[layer]
                read += keys[layer].numel() + values[layer].numel()
    return counter.get_total_flops(), sum(part.numel() for part in [*keys, *values]), read


@pytest.mark.parametrize(
    "mixers",
    [
        pytest.param([OWN, SHARED] * 3, id="cross-layer attention"),
        pytest.param([WINDOW] * 3 + [OWN] + [SHARED] * 2, id="YOCO"),
        pytest.param([OWN, WINDOW, OWN, WINDOW], id="none shared"),
    ],
)
def test_a_shared_cache_is_kept_once_and_read_in_every_layer(mixers: list[Attention]) -> None:
    flops, kept, read = decoded(mixers, 23)
    accounting = Accounting(model(*mixers))
    assert accounting.state_flops_per_token(23) * 23 == flops
    row = accounting.row(23)
    assert row.state_elements == kept
    appended = sum(not mixer.shared_kv for mixer in mixers) * 2 * (5 + 3)
    assert row.decode_state_bytes_per_token == 2 * (read + appended)


def test_caches_as_published() -> None:
    """Cross-layer attention halves the cache (CLA2); YOCO keeps that of one layer in place of all, windows aside."""
    whole, halved, once = (
        Accounting(model(*mixers)).row(100_000).state_elements
        for mixers in ([OWN] * 8, [OWN, SHARED] * 4, [WINDOW] * 4 + [OWN] + [SHARED] * 3)
    )
    assert whole == 2 * halved == 8 * (once - 4 * 7 * 2 * (5 + 3))


def test_a_layer_without_keys_has_no_projections_of_them() -> None:
    own, shared = (Accounting(spec_of(mixer)).total_parameters.with_embeddings for mixer in (OWN, SHARED))
    assert own - shared == 16 * 2 * (5 + 3)


@given(head_fields(), st.none() | st.integers(1, 300), st.integers(1, 400))
def test_every_kind_of_attention_can_share(heads: dict[str, Any], window: int | None, context: int) -> None:
    """Forgetting attention keeps the gates of its own layer; what is read and computed stays."""
    for kind in (Attention, ChunkedAttention, Forgetting):
        fields = heads | ({"window": window} if window else {})
        own, shared = kind(**fields), kind(**fields, shared_kv=True)
        gates = own.heads * own.kept(context) if kind is Forgetting else 0
        size = shared.state_size(context)
        read = own.state_size(context).cache
        if kind is ChunkedAttention:
            read = own.kv_heads * (own.head_dim + own.v_head_dim) * own.keys_at(context)
        assert (size.cache, size.looked_up) == (gates, read)
        assert total(shared.state_terms(context)) == gates
        flops = [total(mixer.state_flops_terms(context, Convention())) for mixer in (own, shared)]
        assert flops[0] == flops[1]
        entry = own.heads if kind is Forgetting else 0
        assert shared.decode_bytes(context, Fraction(2)) == 2 * (read + entry)
        made = kind(**fields, uncached=True)
        assert made.state_size(context) == size
        assert made.matmul_formulas() == own.matmul_formulas()
        assert made.matrix_formulas(idle=False) == own.matrix_formulas(idle=False)
        assert made.other_formulas() == own.other_formulas()
        assert total(made.state_flops_terms(context, Convention())) == flops[0]
        assert made.mix_kept(context, "fused") == own.mix_kept(context, "fused"), "training keeps its own keys"


def test_keys_are_not_both_of_another_layer_and_made(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    mixer = "{kind: attention, heads: 2, head_dim: 8, shared_kv: true, uncached: true}"
    path.write_text(f"name: x\nvocab_size: 9\nhidden_size: 16\nlayers:\n  - mixer: {mixer}\n", encoding="utf-8")
    problem = "uncached: is of keys and values that this layer makes, and with shared_kv it makes none"
    with pytest.raises(InputError, match=problem) as caught:
        load_model(path)
    assert str(caught.value).startswith(f"{path}:5:")
