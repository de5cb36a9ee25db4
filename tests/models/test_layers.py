"""Layers built from specs: every weight is used, nothing sees the future, norms and positions are where they belong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kinds import HEADS, MIXERS, SHARED, spec_of

from powerplan.errors import InputError
from powerplan.load import catalogue_spec, load_model
from powerplan.mixers import RGLRU, Power
from powerplan.models import build_layer, build_model
from powerplan.models.mixers.power import PowerAttention
from powerplan.models.mixers.retention import LightningAttention, Retention
from powerplan.models.rope import apply_rope, rope_cos_sin
from powerplan.rope import Rope
from powerplan.spec import ModelSpec, Norm


@pytest.mark.parametrize("kind", MIXERS)
def test_every_weight_has_a_gradient_and_nothing_sees_the_future(kind: str) -> None:
    torch.manual_seed(0)
    layer = build_layer(spec_of(MIXERS[kind], SHARED), dtype=torch.float64)
    x = torch.randn(2, 21, 16, dtype=torch.float64)
    out = layer(x)
    assert out.shape == x.shape
    torch.testing.assert_close(layer(x[:, :13]), out[:, :13])
    out.square().sum().backward()
    for name, weight in layer.named_parameters():
        if name.startswith("mixer.indexer."):
            assert weight.grad is None, "what an indexer picks has no gradient"
            continue
        assert weight.grad is not None, name
        # Softmax and normalised weights do not change when a constant is added to every key.
        # A layer alone has its own values for those of the model's first layer: nothing is mixed in.
        unused = name == "mixer.k_proj.bias" or name.startswith("mixer.value_gate")
        assert weight.grad.abs().max() > 0 or unused, name


@pytest.mark.parametrize("impl", ["reference", "recurrent", "torch"])
def test_power_layers_take_an_implementation(impl: str) -> None:
    spec = spec_of(MIXERS["power"])
    layer, exact = build_layer(spec, dtype=torch.float64, impl=impl), build_layer(spec, dtype=torch.float64)
    exact.load_state_dict(layer.state_dict())
    x = torch.randn(1, 33, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x), exact(x))


def test_rope_depends_on_the_distance() -> None:
    q, k = torch.randn(1, 1, 1, 10, dtype=torch.float64), torch.randn(1, 1, 1, 10, dtype=torch.float64)
    cos, sin = (x.double() for x in rope_cos_sin(0, 50, 10, torch.device("cpu")))

    def product(query: int, key: int) -> float:
        rotated = (apply_rope(x, cos[at : at + 1], sin[at : at + 1]) for x, at in ((q, query), (k, key)))
        left, right = rotated
        return float((left * right).sum())

    assert product(30, 10) == pytest.approx(product(45, 25), rel=1e-5)
    assert product(0, 0) == pytest.approx(float((q * k).sum()))
    assert product(30, 10) != pytest.approx(product(30, 11), rel=1e-3)


def test_learned_positions_leave_rope_out() -> None:
    assert build_layer(spec_of(MIXERS["attention"]), device="meta").mixer.rope == Rope()  # type: ignore[union-attr]
    learned = build_layer(spec_of(MIXERS["attention"], position_embeddings=64), device="meta")
    assert learned.mixer.rope is None  # type: ignore[union-attr]


@pytest.mark.parametrize("per_layer", [0, 1, 2, 4])
def test_norms(per_layer: int) -> None:
    spec = spec_of(MIXERS["attention"], norm=Norm(per_layer=per_layer))
    assert build_layer(spec)(torch.randn(1, 5, 16)).isfinite().all()


@pytest.mark.parametrize(
    ("spec", "layer", "message"),
    [
        (spec_of(MIXERS["power"]), 1, "layer 1 is out of range; x has layers 0 to 0"),
        (spec_of(MIXERS["linear"], norm=Norm(per_layer=3)), 0, "3 norms in a layer are not built; allowed"),
        (catalogue_spec("xlstm-7b"), 0, "mlstm layers are not built; built are attention, mla, power, "),
        (spec_of(RGLRU(heads=2, head_dim=8)), 0, "rg-lru layers are not built; built are attention"),
        (spec_of(Power(**HEADS, p=3)), 0, "p=3 needs normalize: false: weights of odd degrees have both signs"),
        (spec_of(Power(**HEADS, p=6)), 0, "p=6: the kernels run degrees 1 to 4"),
    ],
)
def test_what_is_not_built_is_refused(spec: ModelSpec, layer: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_layer(spec, layer, device="meta")


@pytest.mark.parametrize("build", [build_layer, build_model])
@pytest.mark.parametrize("spec", ["gpt2-small", load_model("gpt2-small")])
def test_a_name_is_no_spec(build: Any, spec: Any) -> None:
    with pytest.raises(InputError, match=r"^spec: must be a ModelSpec, such as .*, and is (str|LoadedModel)$"):
        build(spec)


@pytest.mark.parametrize(
    ("tokens", "given"),
    [
        (torch.zeros(5, dtype=torch.long), r"torch.int64 \[5\]"),
        (torch.zeros(1, 5), r"torch.float32 \[1, 5\]"),
        ([[1, 2]], "a list"),
    ],
)
def test_what_is_no_token_ids(tokens: Any, given: str) -> None:
    model = build_model(spec_of(MIXERS["power"]))
    for call in (model, model.loss):
        with pytest.raises(InputError, match=rf"^tokens must be token ids \[B, T\], int64, and are {given}$"):
            call(tokens)


def test_a_loss_needs_a_token_after_the_first() -> None:
    model = build_model(spec_of(MIXERS["power"]))
    with pytest.raises(InputError, match=r"^tokens: a loss needs at least 2 a row, and these have 1$"):
        model.loss(torch.zeros(2, 1, dtype=torch.long))


@pytest.mark.parametrize("kind", ["attention", "power", "linear", "retnet", "lightning"])
@pytest.mark.parametrize("impl", ["flash", None, ["torch"]])
def test_implementations_that_there_are_not(kind: str, impl: str) -> None:
    with pytest.raises(InputError, match="impl must be auto, reference, recurrent, torch, triton, and is"):
        build_layer(spec_of(MIXERS[kind]), device="meta", impl=impl)


@pytest.mark.parametrize(
    ("module", "kind"), [(PowerAttention, "power"), (Retention, "retnet"), (LightningAttention, "lightning")]
)
def test_modules_refuse_them_too(module: Any, kind: str) -> None:
    rope: dict[str, Any] = {} if module is LightningAttention else {"rope": Rope()}
    with pytest.raises(InputError, match=r"impl must be auto, .*, and is 'flash'"):
        module(MIXERS[kind], 16, impl="flash", **rope)
