"""Every kind trains: weights are all initialised, the loss falls below what a model without mixing reaches, and models
are saved and loaded."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from kinds import EXPERTS, MIXERS, SHARED, spec_of
from safetensors.torch import load_model, save_model

from powerplan.models import Decoder, build_model
from powerplan.spec import Norm

EVERYTHING = {"norm": Norm(kind="layernorm", embedding=True), "position_embeddings": 32, "tie_embeddings": True}


def poisoned(model: Decoder) -> Decoder:
    """Return the model on the CPU with NaN in all of its memory."""
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(torch.nan)
    return model


@pytest.mark.parametrize("kind", MIXERS)
@pytest.mark.parametrize("ffn", [EXPERTS, SHARED], ids=["experts", "shared"])
def test_a_model_from_the_meta_device_is_initialised_whole(kind: str, ffn: object) -> None:
    model = poisoned(build_model(spec_of(MIXERS[kind], ffn, repeat=2, **EVERYTHING), device="meta"))
    model.init_weights()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert tensor.isfinite().all(), name
    assert model.loss(torch.randint(9, (2, 20))).isfinite().all()


def test_decays_begin_as_published() -> None:
    """A in [1, 16] and steps in [0.001, 0.1], so that log decays at an input of 0 lie between -1.6 and -0.001."""
    for kind in ("gated_deltanet", "kda"):
        decay = build_model(spec_of(MIXERS[kind])).layers[0].mixer.decay  # type: ignore[union-attr]
        log_g = decay(torch.zeros(1, 1, 16))
        assert log_g.max() <= -0.001 * (1 - 1e-4)
        assert log_g.min() >= -1.6


def test_the_last_matrices_of_branches_begin_smaller() -> None:
    torch.manual_seed(0)
    model = build_model(spec_of(MIXERS["kda"], EXPERTS, repeat=8, hidden_size=64))
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    for name in ("mixer.o_proj.weight", "ffn.experts.down"):
        assert weights[f"layers.3.{name}"].std().item() == pytest.approx(0.02 / 4, rel=0.1)
    assert weights["layers.3.ffn.experts.up"].std().item() == pytest.approx(0.02, rel=0.1)


def test_low_rank_projections_begin_like_others() -> None:
    torch.manual_seed(0)
    mixer = msgspec.structs.replace(MIXERS["mla"], q_lora_rank=64, kv_lora_rank=64)
    weights = dict(build_model(spec_of(mixer, repeat=8, hidden_size=64)).named_parameters())
    for name in ("q_down", "kv_down"):
        assert weights[f"layers.3.mixer.{name}.weight"].std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gates_forget_little_at_first(bias: bool, dtype: torch.dtype) -> None:
    mixer = msgspec.structs.replace(MIXERS["power"], bias=bias)
    layer = build_model(spec_of(mixer), dtype=dtype).layers[0]
    *_, log_g = layer.mixer.project(torch.zeros(2, 9, 16, dtype=dtype))  # type: ignore[union-attr]
    assert log_g.dtype == torch.promote_types(dtype, torch.float32)
    assert log_g.exp().detach().numpy() == pytest.approx(0.999)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # Torch's RMSNorm of float32 weights under autocast.
@pytest.mark.parametrize("kind", MIXERS)
def test_half_precision(kind: str) -> None:
    """Weights in bfloat16, and float32 ones under autocast, give nearly the loss of float32, and gradients to all."""
    torch.manual_seed(0)
    tokens = torch.randint(9, (2, 20))
    exact = build_model(spec_of(MIXERS[kind], SHARED, repeat=2))
    half = build_model(exact.spec, dtype=torch.bfloat16)
    half.load_state_dict(exact.state_dict())
    expected = exact.loss(tokens).mean()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = exact.loss(tokens).mean()
    for loss, model in ((half.loss(tokens).mean(), half), (mixed, exact)):
        assert loss.item() == pytest.approx(expected.item(), rel=2**-8)
        loss.backward()
        for name, weight in model.named_parameters():
            if ".indexer." in name:
                continue  # What it picks has no gradient.
            assert weight.grad is not None, name
            assert weight.grad.isfinite().all(), name


TOKENS = torch.tensor([[1, 1, 2, 2, 3, 3, 4, 4, 1, 2, 3, 4], [4, 4, 3, 3, 2, 2, 1, 1, 4, 3, 2, 1]])
"""Each token is followed by itself or by another, equally often: what is next depends on what came before it."""


def unmixed() -> float:
    """Return the least mean loss of a model that knows only the token before, over TOKENS."""
    pairs = torch.zeros(5, 5)
    for before, after in zip(TOKENS[:, :-1].flatten(), TOKENS[:, 1:].flatten(), strict=True):
        pairs[before, after] += 1
    shares = pairs / pairs.sum(-1, keepdim=True).clamp(min=1)
    return float(-(pairs * shares.clamp(min=1e-9).log()).sum() / pairs.sum())


@pytest.mark.parametrize("kind", MIXERS)
def test_each_kind_learns_what_needs_mixing(kind: str) -> None:
    torch.manual_seed(0)
    model = build_model(spec_of(MIXERS[kind], repeat=2))
    optimiser = torch.optim.Adam(model.parameters(), lr=0.01, betas=(0.9, 0.95))
    assert unmixed() > 0.9
    for _ in range(300):
        loss = model.loss(TOKENS).mean()
        if loss < unmixed() / 2:
            return
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    raise AssertionError(f"300 steps leave a loss of {float(loss):.3f}; without mixing it is {unmixed():.3f}")


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["window, sinks", "mla", "kda", "power"])
def test_models_are_saved_and_loaded(kind: str, tied: bool, tmp_path: Path) -> None:
    spec = spec_of(MIXERS[kind], SHARED, tie_embeddings=tied)
    model, path = build_model(spec), tmp_path / "model.safetensors"
    save_model(model, str(path))
    other = poisoned(build_model(spec, device="meta"))
    load_model(other, path)
    tokens = torch.randint(9, (2, 20))
    assert torch.equal(model(tokens), other(tokens))
    assert (other.lm_head.weight is other.embedding.weight) == tied
    assigned = build_model(spec, device="meta")
    assigned.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(model(tokens), assigned(tokens))
    assert (assigned.lm_head.weight is assigned.embedding.weight) == tied
