"""Runs, as functions without arguments: the mixer alone, its projections, the FFN, the layer, or a decoding step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from powerplan import kernels, models
from powerplan.mixers import FeatureAttention
from powerplan.models.mixers.attention import softmax_attention
from powerplan.profile.recurrent import recurrence_inputs, recurrence_of, recurrence_step
from powerplan.profile.timing import Run
from powerplan.profile.workload import Point, TimedMixer, Workload
from powerplan.spec import Layer

PREFIX = 256
"""Most tokens that build the state for a decoding step: a step's time depends on the state's size, not its content."""


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of "fp32", "bf16" or "fp16"."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def prepare(workload: Workload, timed: TimedMixer, point: Point) -> Run:
    """Return the run at `point`, with its inputs and weights made. It returns its output, and gradients in training."""
    if point.part == "state":
        if timed.is_recurrent:
            return _recurrence(workload, timed, point)
        if point.decodes:
            return _decoding_step(workload, timed, point.context)
        return _pass_of(_mixing(timed), heads_of(workload, timed, point.context), None, point)
    if point.part == "projections":
        # Without the FFN: experts would take memory, and no part in it.
        workload = replace(workload, layer=Layer(mixer=timed.mixer))  # type: ignore[arg-type]
    module = layer_module(workload, timed)
    x = random_tensor(workload, point.tokens, workload.spec.hidden_size)
    if point.part != "projections":
        whole = {"layer": module, "ffn": module.ffn}[point.part]
        return _pass_of(whole, [x], whole, point)
    mixer = module.mixer
    mixed = random_tensor(workload, point.tokens, timed.shape.heads, timed.shape.v_head_dim)

    def project(x: Tensor, mixed: Tensor) -> tuple[Tensor, ...]:
        heads = [projected for projected in mixer.project(x) if projected is not None]
        return (*heads, mixer.merge(x, mixed))

    return _pass_of(project, [x, mixed], mixer, point)


def layer_module(
    workload: Workload, timed: TimedMixer, device: str | None = None, dtype: torch.dtype | None = None
) -> Any:
    """Return the layer with `timed` as its mixer, with torch's random weights."""
    torch.manual_seed(0)
    impl = "auto" if timed.feature is None else timed.impl
    settings: dict[str, Any] = {"device": device or workload.device, "dtype": dtype or torch_dtype(workload.dtype)}
    return models.build_layer(workload.one_layer(timed.mixer), impl=impl, **settings)


def heads_of(workload: Workload, timed: TimedMixer, tokens: int) -> list[Tensor]:
    """Return q [B, T, H, K], k [B, T, G, K], v [B, T, G, V]; log_g [B, T, G] in (-0.01, 0] where there is a gate."""
    shape = timed.shape
    sizes = [(shape.heads, shape.head_dim), (shape.kv_heads, shape.head_dim), (shape.kv_heads, shape.v_head_dim)]
    tensors = [random_tensor(workload, tokens, *size) for size in sizes]
    if timed.gated:
        tensors.append(torch.rand(workload.batch, tokens, shape.kv_heads, device=workload.device) * -0.01)
    return tensors


def kernel_settings(mixer: FeatureAttention) -> dict[str, Any]:
    """Return the arguments of `power_attention` that make it this mixer."""
    return {"p": mixer.degree, "normalize": mixer.has_normaliser}


def _mixing(timed: TimedMixer) -> Callable[..., Any]:
    """Return the mixer alone, as a function of q, k, v, and log_g where there is a gate."""
    if timed.feature is None:
        return lambda q, k, v: softmax_attention(q, k, v, timed.mixer.window_size)
    settings = kernel_settings(timed.feature) | {"chunk_size": timed.feature.chunk_size, "impl": timed.impl}
    return lambda q, k, v, log_g=None: kernels.power_attention(q, k, v, log_g, **settings)


def _recurrence(workload: Workload, timed: TimedMixer, point: Point) -> Run:
    """Return a run of a recurrent mixer alone: nobody reads its last state, and it has no gradient."""
    dtype = torch_dtype(workload.dtype)
    if point.decodes:
        return torch.no_grad()(recurrence_step(workload, timed, point.context, dtype))
    function = recurrence_of(timed)
    inputs = recurrence_inputs(workload, timed, point.context, dtype)
    return _pass_of(lambda *parts: function(*parts)[0], inputs, None, point)


def _decoding_step(workload: Workload, timed: TimedMixer, context: int) -> Run:
    """Return a run for one more token after `context` tokens, through the state or the cached keys and values."""
    q, k, v, *gate = [x[:, 0] for x in heads_of(workload, timed, 1)]
    if timed.feature is not None:
        settings = kernel_settings(timed.feature)
        prefix = heads_of(workload, timed, min(context, PREFIX))
        with torch.no_grad():
            _, prefilled = kernels.power_attention(*prefix, return_state=True, impl=timed.impl, **settings)
            log_g = gate[0] if gate else None
            settings["impl"] = "triton" if timed.impl == "triton" else "recurrent"
            # A step's state lies otherwise in memory than a prefill's, and all steps of a model but the first find one.
            _, state = kernels.power_attention_step(q, k, v, log_g, prefilled, **settings)
        return torch.no_grad()(lambda: kernels.power_attention_step(q, k, v, log_g, state, **settings))
    shape, query = timed.shape, q[:, :, None]
    kept = min(context, timed.mixer.window_size or context)
    keys, values = (random_tensor(workload, shape.kv_heads, kept, dim) for dim in (shape.head_dim, shape.v_head_dim))
    grouped = shape.heads != shape.kv_heads
    return torch.no_grad()(lambda: F.scaled_dot_product_attention(query, keys, values, enable_gqa=grouped))


def _pass_of(function: Callable[..., Any], inputs: Sequence[Tensor], module: nn.Module | None, point: Point) -> Run:
    """Return a pass of `function` over `inputs`: forward without gradients, or forward and all gradients."""
    if not point.trains:
        return torch.no_grad()(lambda: function(*inputs))
    differentiated = [x.requires_grad_() for x in inputs]
    differentiated += [] if module is None else list(module.parameters())
    grad_outputs: list[Tensor] = []

    def train() -> Any:
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        if not grad_outputs:
            grad_outputs.extend(torch.ones_like(x) for x in outputs)
        # Unused are the weights of a projection to queries: the merged heads do not depend on them.
        return outputs, torch.autograd.grad(outputs, differentiated, grad_outputs, allow_unused=True)

    return train


def random_tensor(workload: Workload, *shape: int) -> Tensor:
    """Return normal random numbers [B, *shape]."""
    return torch.randn(workload.batch, *shape, device=workload.device, dtype=torch_dtype(workload.dtype))
