"""DeepSeek sparse attention in pieces against MLA with a mask of what its indexer picks."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import LATENT, MIXERS, spec_of
from torch import Tensor
from transformers import DeepseekV32Config
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention

from powerplan.errors import InputError
from powerplan.mixers import DSA, MLA
from powerplan.models import build_layer, build_model
from powerplan.models.mixers import pieces
from powerplan.models.mixers.dsa import sparse_latents
from powerplan.models.rope import apply_rope, rope_cos_sin

TENSORS = ("q", "entries", "index_q", "index_k", "index_weights")


def picked_keys(q: Tensor, k: Tensor, weights: Tensor, top_k: int) -> Tensor:
    """Return the mask [B, T, S] of the best keys of each query: sums over heads of weights times ReLU(q . k)."""
    tokens, keys = q.shape[1], k.shape[1]
    seen = torch.zeros(q.shape[0], tokens, keys, dtype=torch.bool)
    for row in range(tokens):
        end = keys - tokens + row + 1
        scores = torch.einsum("bx,bxs->bs", weights[:, row], torch.einsum("bxf,bsf->bxs", q[:, row], k[:, :end]).relu())
        best = scores.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
        seen[:, row].scatter_(1, best, True)
    return seen


def inputs(tokens: int, keys: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Queries of 3 heads over entries of 6 + 2 features; an indexer of 2 heads of 4."""
    torch.manual_seed(tokens)
    shapes = [(2, tokens, 3, 8), (2, keys, 8), (2, tokens, 2, 4), (2, keys, 4), (2, tokens, 2)]
    return [torch.randn(shape, dtype=dtype, requires_grad=index < 2) for index, shape in enumerate(shapes)]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(0, 30), st.integers(1, 50), st.sampled_from([(1, 1), (7, 2**25), (256, 2**25)]))
def test_pieces_equal_the_definition(tokens: int, before: int, top_k: int, sizes: tuple[int, int]) -> None:
    q, entries, *index = inputs(tokens, before + tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "MAX_QUERIES", sizes[0])
        patch.setattr(pieces, "MAX_NUMBERS", sizes[1])
        out = sparse_latents(q, entries, 6, (index[0], index[1], index[2]), top_k, 0.3)
    scores = torch.einsum("bthd,bsd->bhts", q, entries) * 0.3
    seen = picked_keys(index[0], index[1], index[2], top_k)[:, None]
    expected = torch.einsum("bhts,bsl->bthl", scores.masked_fill(~seen, -torch.inf).softmax(-1), entries[..., :6])
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    torch.testing.assert_close(*(torch.autograd.grad(result, (q, entries), grad) for result in (out, expected)))


def test_of_equal_scores_the_first_are_picked_at_any_length() -> None:
    """ReLU makes many scores 0. A cache, or pieces of another length, must not change which of them are taken."""
    q, entries, *_ = inputs(60, 60)
    nothing = torch.zeros(2, 60, 2, 4, dtype=torch.float64), torch.zeros(2, 60, 4, dtype=torch.float64)
    weights = torch.ones(2, 60, 2, dtype=torch.float64)
    whole = sparse_latents(q, entries, 6, (*nothing, weights), 5, 0.3)
    first = entries[:, :5]
    expected = (torch.einsum("bthd,bsd->bths", q[:, 5:], first) * 0.3).softmax(-1) @ first[:, None, :, :6]
    torch.testing.assert_close(whole[:, 5:], expected)


def test_all_keys_are_mla() -> None:
    """With as many picks as tokens the layer is MLA with the same weights, whose keys and values are expanded."""
    torch.manual_seed(0)
    mixer = DSA(**LATENT, q_lora_rank=8, index_heads=2, index_head_dim=6, top_k=40)
    sparse: Any = build_layer(spec_of(mixer), dtype=torch.float64).mixer
    dense: Any = build_layer(spec_of(MLA(**LATENT, q_lora_rank=8)), dtype=torch.float64).mixer
    missing, unexpected = dense.load_state_dict(sparse.state_dict(), strict=False)
    assert not missing
    assert all(name.startswith("indexer.") for name in unexpected)
    x = torch.randn(2, 40, 16, dtype=torch.float64)
    torch.testing.assert_close(sparse(x), dense(x))
    assert not torch.allclose(build_few(sparse, mixer)(x), dense(x))


def build_few(layer: Any, mixer: DSA) -> Any:
    """Return a layer of the same weights that picks 4 keys."""
    few: Any = build_layer(spec_of(msgspec.structs.replace(mixer, top_k=4)), dtype=torch.float64).mixer
    few.load_state_dict(layer.state_dict())
    return few


def test_the_layer_equals_its_equations() -> None:
    """The first features of the indexer's queries and key are rotated; its key goes through a layer norm."""
    torch.manual_seed(0)
    mixer = DSA(**LATENT, q_lora_rank=8, index_heads=2, index_head_dim=6, top_k=5)
    layer: Any = build_layer(spec_of(mixer), dtype=torch.float64).mixer
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_(std=0.5)
    x = torch.randn(2, 19, 16, dtype=torch.float64)
    cos_sin = rope_cos_sin(0, 19, 4, x.device)
    latents = layer.q_norm(layer.q_down(x))
    q_nope, q_rope, entries = layer.project(x, cos_sin)
    k, v = layer.expand(entries, layer.kv_proj)
    index_q = apply_rope((latents @ layer.indexer.q_proj.weight.T).unflatten(-1, (2, 6)), *cos_sin)
    index_k = x @ layer.indexer.k_proj.weight.T
    index_k = (index_k - index_k.mean(-1, keepdim=True)) / (index_k.var(-1, correction=0, keepdim=True) + 1e-6).sqrt()
    index_k = index_k * layer.indexer.k_norm.weight + layer.indexer.k_norm.bias
    index_k = apply_rope(index_k[:, :, None], *cos_sin)[:, :, 0]
    seen = picked_keys(index_q, index_k, x @ layer.indexer.head_weights.weight.T, 5)
    scores = torch.einsum("bthk,bshk->bhts", torch.cat((q_nope, q_rope), -1), k) / math.sqrt(10)
    out = torch.einsum("bhts,bshv->bthv", scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1), v)
    torch.testing.assert_close(layer(x), out.flatten(-2) @ layer.o_proj.weight.T)


def in_halves(weight: Tensor, rows: int, rotated: int) -> Tensor:
    """Return the weight with the last `rotated` of every `rows` rows in two halves, where there are pairs."""
    heads = weight.unflatten(0, (-1, rows))
    return torch.cat((heads[:, : rows - rotated], heads[:, -rotated::2], heads[:, 1 - rotated :: 2]), 1).flatten(0, 1)


def test_the_layer_of_transformers_with_these_weights_gives_these_outputs() -> None:
    """It expands all keys and values and masks what is not picked; it rotates pairs in MLA, halves in the indexer."""
    torch.manual_seed(0)
    config = DeepseekV32Config(
        hidden_size=32, num_attention_heads=3, num_key_value_heads=3, q_lora_rank=8, kv_lora_rank=10,
        qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, index_n_heads=16, index_head_dim=12, index_topk=7,
        attention_bias=False, attn_implementation="eager", rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    theirs = DeepseekV32Attention(config, 0).double()
    mixer = DSA(**LATENT, q_lora_rank=8, index_heads=16, index_head_dim=12, top_k=7)
    own: Any = build_layer(spec_of(mixer, hidden_size=32), dtype=torch.float64).mixer
    with torch.no_grad():
        for weight in theirs.parameters():
            weight.normal_(std=0.5)
    names = {
        "q_a_proj": "q_down", "q_a_layernorm": "q_norm", "q_b_proj": "q_proj", "kv_a_proj_with_mqa": "kv_down",
        "kv_a_layernorm": "kv_norm", "kv_b_proj": "kv_proj", "o_proj": "o_proj", "indexer.wq_b": "indexer.q_proj",
        "indexer.wk": "indexer.k_proj", "indexer.k_norm": "indexer.k_norm",
        "indexer.weights_proj": "indexer.head_weights",
    }  # fmt: skip
    weights = dict(theirs.state_dict())
    weights["q_b_proj.weight"] = in_halves(weights["q_b_proj.weight"], 10, 4)
    weights["kv_a_proj_with_mqa.weight"] = in_halves(weights["kv_a_proj_with_mqa.weight"], 14, 4)
    own.load_state_dict(
        {names[name.rpartition(".")[0]] + "." + name.rpartition(".")[2]: weights[name] for name in weights}
    )
    x = torch.randn(2, 30, 32, dtype=torch.float64)
    cos, sin = (torch.cat((part, part), -1)[None].double() for part in rope_cos_sin(0, 30, 4, x.device))
    mask = torch.ones(30, 30, dtype=torch.bool).tril()
    added = torch.zeros(2, 1, 30, 30, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    expected = theirs(x, (cos, sin), added)[0]
    # Their norms, their softmax and their indexer run in float32.
    torch.testing.assert_close(own(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_the_indexer_has_no_gradient_from_the_loss() -> None:
    model = build_model(spec_of(MIXERS["dsa"]))
    model.loss(torch.randint(9, (2, 30))).mean().backward()
    without = {name for name, weight in model.named_parameters() if weight.grad is None}
    assert without == {name for name, _ in model.named_parameters() if ".indexer." in name}
    assert without


@pytest.mark.parametrize(("field", "value"), [("shared_index", True), ("output_gate", "head")])
def test_fields_that_are_not_built(field: str, value: Any) -> None:
    mixer = DSA(**LATENT, q_lora_rank=8, **{field: value})
    with pytest.raises(InputError, match=f"dsa layers with {field} are not built"):
        build_layer(spec_of(mixer))
