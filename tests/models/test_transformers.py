"""Models of transformers with power attention: equal to the definition put in by hand, with every kind of cache."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from powerplan.dims import spow_dim
from powerplan.load import load_model
from powerplan.models import PowerCache, power_class, register_power_attention, use_power_attention

transformers = pytest.importorskip("transformers")
from hf_models import CACHE, SHAPE, build, padding, powered, tokens  # noqa: E402
from transformers import AttentionInterface, AttentionMaskInterface  # noqa: E402
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

pytestmark = pytest.mark.transformers

KINDS = ["Llama", "Qwen2", "Qwen3"]
GATES = [False, True]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def definition(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    power: Any,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """All weights (scale q.k)^p exp(a_i - a_j) where transformers' own mask [B, 1, T, T] allows them."""
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    weights = (scaling * query @ key.mT) ** power.settings.p
    if power.log_g is not None:
        # Padding is what no later token sees.
        log_g = power.log_g.masked_fill(~attention_mask[:, 0].any(1)[..., None], 0)
        decay = log_g.cumsum(1).transpose(1, 2).repeat_interleave(groups, 1)
        weights = weights * (decay[..., :, None] - decay[..., None, :]).clamp(max=0).exp().to(weights.dtype)
    weights = weights.masked_fill(~attention_mask, 0)
    if power.settings.p % 2 == 0:
        sums = weights.sum(-1, keepdim=True)
        weights = weights / sums.masked_fill(sums == 0, 1)
    return (weights @ value).transpose(1, 2), None


@contextmanager
def by_hand() -> Iterator[None]:
    """Within it, "power" is the definition above."""

    def definition_mask(**kwargs: Any) -> Tensor:
        mask: Tensor = sdpa_mask(**(kwargs | {"allow_is_causal_skip": False}))
        # transformers lets queries at padding see all keys, because a softmax over none is NaN.
        padding = kwargs.get("attention_mask")
        return mask if padding is None else mask & padding[:, None, None, :]

    forward, mask = ALL_ATTENTION_FUNCTIONS["power"], ALL_MASK_ATTENTION_FUNCTIONS["power"]
    AttentionInterface.register("power", definition)
    AttentionMaskInterface.register("power", definition_mask)
    try:
        yield
    finally:
        AttentionInterface.register("power", forward)
        AttentionMaskInterface.register("power", mask)


def check_logits(model: Any, ids: Tensor, **inputs: Any) -> None:
    logits = model(ids, **inputs).logits
    with by_hand():
        exact = model(ids, **inputs).logits
    is_token = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    torch.testing.assert_close(logits[is_token], exact[is_token])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", GATES)
@pytest.mark.parametrize("side", ["", "left", "right"])
def test_logits_equal_the_definition(kind: str, gated: bool, side: str) -> None:
    check_logits(powered(kind, gated=gated, chunk_size=16), tokens(), attention_mask=padding(side))


@pytest.mark.parametrize("p", [1, 3, 4])
@pytest.mark.parametrize("gated", GATES)
def test_degrees(p: int, gated: bool) -> None:
    check_logits(powered(p=p, gated=gated), tokens(), attention_mask=padding("left"))


@pytest.mark.parametrize("impl", ["reference", "recurrent", "torch"])
def test_implementations(impl: str) -> None:
    check_logits(powered(impl=impl, gated=True), tokens(), attention_mask=padding("left"))


@pytest.mark.parametrize("kind", KINDS)
def test_float32_is_as_exact_as_the_definition_in_float32(kind: str) -> None:
    wide = powered(kind, gated=True)
    narrow = copy.deepcopy(wide).float()
    with by_hand():
        exact, usual = wide(tokens()).logits, narrow(tokens()).logits
    error = (narrow(tokens()).logits - exact).abs().max()
    assert error <= 8 * (usual - exact).abs().max()


@pytest.mark.parametrize("gated", GATES)
def test_gradients_equal_those_of_the_definition(gated: bool) -> None:
    model = powered(gated=gated).train()

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(tokens(), labels=tokens(), attention_mask=padding("left")).loss.backward()
        return {name: weight.grad.clone() for name, weight in model.named_parameters()}

    grads = gradients()
    with by_hand():
        exact = gradients()
    torch.testing.assert_close(grads, exact)
    assert all(grad.abs().max() > 0 for grad in grads.values())
    assert any("g_proj" in name for name in grads) == gated
    # Versions of transformers before 5.23 have the older name alone.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    torch.testing.assert_close(gradients(), grads)


@pytest.mark.parametrize("gated", GATES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(gated: bool, side: str) -> None:
    model, mask, ids = powered(gated=gated), padding(side), tokens()
    own = mask[-1].bool()
    positions = mask.cumsum(1) - 1
    logits = model(ids, attention_mask=mask, position_ids=positions.clamp(min=0)).logits
    torch.testing.assert_close(logits[-1, own], model(ids[-1:, own]).logits[0])
    torch.testing.assert_close(logits[:1], model(ids[:1]).logits)


def settings_of_generate(**changes: Any) -> dict[str, Any]:
    return {"max_new_tokens": 9, "do_sample": False, "output_logits": True, "return_dict_in_generate": True} | changes


def check_generation(model: Any, **settings: Any) -> None:
    """No cache, DynamicCache and PowerCache say the same; a model with gates has no use for the second."""
    settings = settings_of_generate(attention_mask=padding("left")) | settings
    exact = model.generate(tokens(), use_cache=False, **settings)
    caches: list[dict[str, Any]] = [{CACHE: PowerCache(model)}]
    if not model.config.power_gated:
        caches.append({})
    for cache in caches:
        generated = model.generate(tokens(), **cache, **settings)
        assert generated.sequences.tolist() == exact.sequences.tolist()
        torch.testing.assert_close(generated.logits, exact.logits)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", GATES)
def test_generation_with_and_without_caches(kind: str, gated: bool) -> None:
    check_generation(powered(kind, gated=gated))


@pytest.mark.parametrize("p", [1, 3, 4])
def test_generation_of_other_degrees(p: int) -> None:
    check_generation(powered(p=p))


@pytest.mark.parametrize("gated", GATES)
def test_beams(gated: bool) -> None:
    check_generation(powered(gated=gated), num_beams=4, num_return_sequences=2)


@pytest.mark.parametrize("cache", ["DynamicCache", "PowerCache"])
@pytest.mark.parametrize("cuts", [(1, 1, 35), (20, 16, 1), (5, 32), (30, 7)])
def test_prompts_in_pieces(cache: str, cuts: tuple[int, ...]) -> None:
    model, ids, mask = powered(), tokens(), padding("left")
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    memory = PowerCache(model) if cache == "PowerCache" else transformers.DynamicCache(config=model.config)
    outs, start = [], 0
    for count in cuts:
        at = slice(start, start + count)
        start += count
        inputs = {"attention_mask": mask[:, :start], "position_ids": positions[:, at]}
        outs.append(model(ids[:, at], **{CACHE: memory}, **inputs).logits)
        assert memory.get_seq_length() == start
    whole = model(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(torch.cat(outs, 1)[mask.bool()], whole[mask.bool()])


def test_the_cache_does_not_grow() -> None:
    model = powered(gated=True)
    cache = PowerCache(model)
    assert cache.nbytes == 0
    sizes = []
    for count in (3, 1, 40):
        model(tokens(2, count), **{CACHE: cache})
        sizes.append(cache.nbytes)
    state = spow_dim(8, 2) * (8 + 1) * SHAPE["num_key_value_heads"]
    assert sizes == [2 * SHAPE["num_hidden_layers"] * state * 8] * 3
    cache.reset()
    assert (cache.nbytes, cache.get_seq_length()) == (0, 0)


def test_the_cache_selects_and_repeats_sequences() -> None:
    model, ids = powered(gated=True), tokens(3)
    cache = PowerCache(model)
    model(ids[:, :30], **{CACHE: cache})
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    logits = model(ids[[2, 2, 0, 0], 30:], **{CACHE: cache}).logits
    torch.testing.assert_close(logits, model(ids[[2, 2, 0, 0]]).logits[:, 30:])


@pytest.mark.parametrize("gated", GATES)
def test_packed_sequences_do_not_see_each_other(gated: bool) -> None:
    model, ids, lengths = powered(gated=gated), tokens(1), (5, 1, 20, 11)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    alone = torch.cat([model(part).logits for part in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(model(ids, position_ids=positions, use_cache=False).logits, alone)
    torch.testing.assert_close(model(ids, position_ids=positions, cu_seq_lens_q=bounds).logits, alone)
    two = torch.cat((positions, torch.arange(37)[None]))
    logits = model(tokens(2), position_ids=two, use_cache=False).logits
    check_logits(model, tokens(2), position_ids=two, use_cache=False)
    torch.testing.assert_close(logits[1:], model(tokens(2)[1:]).logits)


@pytest.mark.parametrize("gated", GATES)
def test_some_layers(gated: bool) -> None:
    model = powered(gated=gated, layers=[1])
    check_logits(model, tokens(), attention_mask=padding("left"))
    check_generation(model)
    every, none = powered(gated=gated)(tokens()).logits, build()(tokens()).logits
    assert (model(tokens()).logits - every).abs().max() > 1e-3
    assert (model(tokens()).logits - none).abs().max() > 1e-3


def test_windows_stay_in_the_other_layers() -> None:
    window = {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    model = use_power_attention(build("Qwen2", **window), layers=[0])
    assert [module.sliding_window for module in model.modules() if hasattr(module, "layer_idx")] == [None, 6, 6]
    check_generation(model)
    ids = tokens()
    other = ids.clone()
    other[:, 0] = 3 + (ids[:, 0] - 2) % 50
    # 36 tokens on, two windows of 6 have forgotten the first token: only the power layer brings it there.
    assert (model(ids).logits - model(other).logits)[:, -1].abs().max() > 1e-6
    windows = build("Qwen2", **window | {"max_window_layers": 0})
    torch.testing.assert_close(windows(ids).logits[:, -1], windows(other).logits[:, -1])


def test_masks_of_the_other_layers_are_those_of_the_family() -> None:
    """EXAONE's layers name a window that the full ones among them do not have."""
    model = build("Exaone4", layer_types=["full_attention"] * 3, sliding_window=6)
    seen: list[Tensor] = []
    layers = {module.layer_idx: module for module in model.modules() if hasattr(module, "num_key_value_groups")}
    layers[0].register_forward_hook(lambda _module, _inputs, out: seen.append(out[0]))
    model(tokens())
    use_power_attention(model, layers=[1])
    model(tokens())
    torch.testing.assert_close(*seen)


def test_it_can_be_changed_again() -> None:
    model = powered(gated=True)
    use_power_attention(model, 4)
    assert not any("g_proj" in name for name in model.state_dict())
    check_logits(model, tokens())
    use_power_attention(model, 2, gated=True)
    use_power_attention(model, 2, gated=True, layers=[0, 2])
    assert sum("g_proj.weight" in name for name in model.state_dict()) == 2
    use_power_attention(model, 2, gated=True, layers=np.arange(1, 3))
    assert model.config.power_layers == [1, 2]
    use_power_attention(model, 2)
    torch.testing.assert_close(model(tokens()).logits, powered()(tokens()).logits)


def test_the_package_and_powerplan_models_have_the_same_names() -> None:
    import powerplan.models
    import powerplan.models.transformers as package

    assert all(getattr(package, name) is getattr(powerplan.models, name) for name in package.__all__)


def test_a_name_is_enough() -> None:
    register_power_attention()
    torch.manual_seed(0)
    config = build().config
    config.power_degree = 4
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="power").double().eval()
    exact = powered(p=4)
    exact.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(tokens()).logits, exact(tokens()).logits)


@pytest.mark.parametrize("settings", [{"gated": True}, {"p": 4, "gated": True, "layers": [0, 2]}, {"p": 3}])
def test_saved_and_loaded(settings: dict[str, Any], tmp_path: Path) -> None:
    model = powered("Qwen3", **settings)
    model.save_pretrained(tmp_path)
    loaded = power_class(transformers.Qwen3ForCausalLM).from_pretrained(tmp_path, dtype=torch.float64)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert (loaded.config.power_degree, loaded.config.architectures) == (settings.get("p", 2), ["Qwen3ForCausalLM"])
    torch.testing.assert_close(dict(loaded.state_dict()), dict(model.state_dict()), rtol=0, atol=0)
    torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits)


def test_planning_says_that_it_does_not_read_the_degree(tmp_path: Path) -> None:
    powered(p=4).config.save_pretrained(tmp_path)
    assert "power_degree is not read: ask with --mixer power:p=4" in load_model(tmp_path).notes
    powered(p=2, gated=True, chunk_size=16, layers=[1]).config.save_pretrained(tmp_path)
    said = "power_degree is not read: ask with --mixer power:p=2,gated=true, which puts it into all layers, not into "
    assert load_model(tmp_path).notes == (f"{said}power_layers alone",)


def test_new_gates_forget_little(tmp_path: Path) -> None:
    plain = build()
    plain.config.power_gated = True
    plain.save_pretrained(tmp_path)
    model = power_class(transformers.LlamaForCausalLM).from_pretrained(tmp_path, dtype=torch.float64)
    for module in model.modules():
        if hasattr(module, "layer_idx"):
            assert module.g_proj(torch.randn(5, 24).double()).sigmoid().detach().numpy() == pytest.approx(0.999)


def test_autocast_takes_norms_in_float32() -> None:
    model = powered("Qwen3", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens()).logits
    assert logits.isfinite().all()


def test_compiled() -> None:
    model = powered(gated=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, model(tokens()).logits)
