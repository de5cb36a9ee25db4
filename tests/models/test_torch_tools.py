"""Models are plain nn.Modules: torch's own tools take them as they are."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch._dynamo
import two_processes
from kinds import MIXERS, spec_of
from ranks import run_in
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from two_processes import COUNT, RATE, gradients, loss_of, small_model, small_spec, some_tokens

from powerplan.errors import InputError
from powerplan.models import Cache, Slot, build_model
from powerplan.models.decoder import INIT_STD


def step(model: Any, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and all gradients."""
    model.zero_grad()
    loss = loss_of(model, tokens)
    loss.backward()
    return loss.detach(), gradients(model)


def check_compiled(backend: str, *kinds: str) -> None:
    torch._dynamo.reset()
    model = small_model(*kinds, dtype=torch.float64)
    exact = step(model, some_tokens())
    model.compile(backend=backend, fullgraph=True)
    torch.testing.assert_close(step(model, some_tokens()), exact)


def test_a_training_step_is_traced_whole() -> None:
    check_compiled("aot_eager")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # of what inductor imports
def test_a_training_step_is_compiled_whole() -> None:
    check_compiled("inductor", "power")


def test_autocast_rounds_as_it_does_around_softmax_attention() -> None:
    errors = {}
    for kind in two_processes.MIXERS:
        model, worst = small_model(kind), 0.0
        for seed in range(4):
            tokens = some_tokens(seed=seed)
            exact = model(tokens)
            with torch.autocast("cpu", torch.bfloat16):
                rounded = model(tokens)
            assert rounded.dtype == torch.bfloat16
            assert rounded.isfinite().all()
            worst = max(worst, ((rounded.float() - exact).square().mean() / exact.square().mean()).sqrt().item())
        errors[kind] = worst
    assert errors["softmax"] > 2**-9  # A rounding of bfloat16: autocast did something.
    assert all(error <= 2 * errors["softmax"] for error in errors.values()), errors


def test_gradients_under_autocast_are_finite() -> None:
    model = small_model()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, some_tokens())
    loss.backward()
    exact = small_model()
    loss_of(exact, some_tokens()).backward()
    for name, grad in gradients(model).items():
        assert grad.isfinite().all(), name
        whole = gradients(exact)[name]
        assert torch.nn.functional.cosine_similarity(grad.flatten(), whole.flatten(), dim=0) > 0.95, name


def test_activation_checkpointing() -> None:
    model = small_model(dtype=torch.float64)
    exact = step(model, some_tokens())
    for layer in model.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    torch.testing.assert_close(step(model, some_tokens()), exact)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_with_a_cache_is_refused(reentrant: bool) -> None:
    """The second call would follow tokens that the first has put there: wrong gradients, and a wrong cache."""
    layer = small_model(dtype=torch.float64).layers[0]
    x = torch.randn(2, 8, 32, dtype=torch.float64, requires_grad=True)
    out = checkpoint(layer, x, Slot(), use_reentrant=reentrant)
    with pytest.raises(InputError, match="a cache cannot be filled again in a backward pass"):
        out.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of Dynamo, after a break
@pytest.mark.parametrize("kind", ["dsa", "moba"])
def test_sparse_layers_are_traced_and_computed_again(kind: str) -> None:
    """DSA's indexer has no gradients, and which queries picked a block of MoBA is read from the device: a graph ends
    there."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, tokens = build_model(spec_of(MIXERS[kind]), dtype=torch.float64), torch.randint(9, (2, 20))

    def found() -> list[Tensor]:
        model.zero_grad()
        loss = loss_of(model, tokens)
        loss.backward()
        return [loss.detach(), *(weight.grad.clone() for weight in model.parameters() if weight.grad is not None)]

    exact, (layer,) = found(), model.layers
    assert len(exact) > 10
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "forward", partial(checkpoint, layer.forward, use_reentrant=False))
        torch.testing.assert_close(found(), exact)
    model.compile(backend="aot_eager", fullgraph=kind == "dsa")
    torch.testing.assert_close(found(), exact)


@pytest.mark.parametrize("kind", ["qk-norm", "full qk-norm", "sinks", "power", "linear", "forgetting", "moba", "nsa"])
def test_norms_in_float32_under_autocast(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, where autocast computes them so; values are then narrower than queries and keys."""
    normed = torch.nn.RMSNorm.forward
    monkeypatch.setattr(torch.nn.RMSNorm, "forward", lambda self, x: normed(self, x.float()))
    model = build_model(spec_of(msgspec.structs.replace(MIXERS[kind], qk_norm="head"), repeat=2))
    tokens, cache = torch.randint(9, (2, 12)), Cache()
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens[:, :8], cache)
        assert model(tokens[:, 8:9], cache).isfinite().all()
        model.loss(tokens).mean().backward()


def test_a_window_is_made_in_fake_and_real_tensors_alike() -> None:
    """What a mask was made of once is not what it is made of next time."""
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert small_model("window")(torch.zeros(1, 33, dtype=torch.long)).shape == (1, 33, 40)
    assert small_model("window")(some_tokens()).isfinite().all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote: one start of them serves all tests of them."""
    folder = tmp_path_factory.mktemp("two")
    run_in(COUNT, two_processes.all_work, folder)
    return folder


def test_data_parallel_gradients_are_means(folder: Path) -> None:
    parts = [step(small_model(dtype=torch.float64), rows)[1] for rows in some_tokens().chunk(2)]
    means = {name: (parts[0][name] + parts[1][name]) / 2 for name in parts[0]}
    for rank in range(2):
        torch.testing.assert_close(torch.load(folder / f"ddp-{rank}.pt"), means)


def test_a_sharded_step_is_the_whole_step(folder: Path) -> None:
    from safetensors.torch import load_file

    model = small_model(dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    loss_of(model, some_tokens()).backward()
    optimizer.step()
    after = load_file(folder / "after.safetensors")
    assert after.keys() == before.keys()
    torch.testing.assert_close(after, dict(model.state_dict()))
    assert all((after[name] - before[name]).abs().max() > 0 for name in after)


def test_weights_are_drawn_in_shards(folder: Path) -> None:
    from safetensors.torch import load_file

    drawn = load_file(folder / "drawn.safetensors")
    whole, again = (build_model(small_spec(), dtype=torch.float64).state_dict() for _ in range(2))
    assert drawn.keys() == whole.keys()
    for name, weight in drawn.items():
        if torch.equal(whole[name], again[name]):  # Norms, skips and the like are set and not drawn.
            torch.testing.assert_close(weight, whole[name])
            continue
        if weight.numel() > 1000:
            assert weight.std().item() == pytest.approx(whole[name].std().item(), rel=0.25)
        top, bottom = weight.chunk(2)
        assert top.shape != bottom.shape or not torch.equal(top, bottom)
    assert drawn["embedding.weight"].std().item() == pytest.approx(INIT_STD, rel=0.1)


@pytest.mark.parametrize("kind", ["softmax", "power", "linear"])
def test_a_model_is_exported_for_any_length(kind: str) -> None:
    model, length = small_model(kind), torch.export.Dim("length", min=2, max=512)
    with torch.no_grad():
        exported = torch.export.export(model, (some_tokens(),), dynamic_shapes={"tokens": {1: length}})
        for tokens in (some_tokens()[:, :7], torch.cat([some_tokens()] * 3, 1)):
            torch.testing.assert_close(exported.module()(tokens), model(tokens))
