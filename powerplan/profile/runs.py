"""What is timed, as functions without arguments: a mixer alone, a projection, an FFN, a layer, a decoding step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from powerplan.profile.plan import Contender, Plan
from powerplan.profile.result import PASSES
from powerplan.profile.timing import Run
from powerplan.spec import Layer

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

PREFIX = 256
"""Tokens that make the state for a decoding step: its time depends on the size of the state, not on what is in it."""

Place = tuple[str, str, int]
"""Part ("state", "projections", "ffn", "layer"), pass ("forward", "train", "decode") and tokens of the context."""


def words(place: Place) -> str:
    """Return a place in words: "state, forward, 4,096 tokens"."""
    part, kind, tokens = place
    return f"{part}, {PASSES[kind]}" + (f", {tokens:,} tokens" if (part, kind) != ("ffn", "decode") else "")


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype of "fp32", "bf16" or "fp16"."""
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def prepare(plan: Plan, contender: Contender, place: Place) -> Run:
    """Return one run at `place`, its inputs and weights made; what it returns is its output and gradients."""
    part, kind, tokens = place
    if part == "state":
        return _decode(plan, contender, tokens) if kind == "decode" else _state(plan, contender, kind, tokens)
    if part == "projections":
        # Without the FFN: experts would take memory, and no part in it.
        plan = replace(plan, layer=Layer(mixer=contender.mixer))  # type: ignore[arg-type]
    module = layer_module(plan, contender)
    tokens = 1 if kind == "decode" else tokens
    x = hidden_state(plan, tokens)
    if part == "layer":
        return _run(module, [x], module, kind)
    if part == "ffn":
        assert module.ffn is not None
        return _run(module.ffn, [x], module.ffn, kind)
    assert part == "projections", part
    mixer: Any = module.mixer
    filler = _random(plan, plan.batch, tokens, contender.mixer.heads, contender.mixer.v_head_dim)

    def project(x: Tensor, filler: Tensor) -> tuple[Tensor, ...]:
        heads = [part for part in mixer.project(x) if part is not None]
        return (*heads, mixer.merge(x, filler))

    return _run(project, [x, filler], mixer, kind)


def layer_module(plan: Plan, contender: Contender, device: str | None = None, dtype: Any = None) -> Any:
    """Return the layer with `contender` as its mixer, with torch's random weights."""
    import torch

    from powerplan.models import build_layer

    torch.manual_seed(0)
    impl = contender.impl if contender.is_power else "auto"
    settings: dict[str, Any] = {"device": device or plan.device, "dtype": dtype or torch_dtype(plan.dtype)}
    return build_layer(plan.with_mixer(contender.mixer), impl=impl, **settings)


def hidden_state(plan: Plan, tokens: int) -> Tensor:
    """Return normal random numbers [B, tokens, hidden]."""
    return _random(plan, plan.batch, tokens, plan.spec.hidden_size)


def heads_of(plan: Plan, contender: Contender, tokens: int) -> list[Tensor]:
    """Return q [B, T, H, K], k [B, T, G, K], v [B, T, G, V]; log_g [B, T, G] in (-0.01, 0] where there is a gate."""
    import torch

    mixer, batch = contender.mixer, plan.batch
    sizes = [(mixer.heads, mixer.head_dim), (mixer.kv_heads, mixer.head_dim), (mixer.kv_heads, mixer.v_head_dim)]
    made = [_random(plan, batch, tokens, *size) for size in sizes]
    if getattr(mixer, "gated", False):
        made.append(torch.rand(batch, tokens, mixer.kv_heads, device=plan.device) * -0.01)
    return made


def mix(contender: Contender) -> Callable[..., Any]:
    """Return the mixer alone, as a function of q, k, v and log_g where there is one."""
    mixer: Any = contender.mixer
    if not contender.is_power:
        from powerplan.models.mixers.attention import softmax_attention

        return lambda q, k, v: softmax_attention(q, k, v, mixer.window)
    from powerplan.kernels import power_attention

    settings = _settings(mixer) | {"chunk_size": mixer.chunk_size, "impl": contender.impl}
    return lambda q, k, v, log_g=None: power_attention(q, k, v, log_g, **settings)


def _settings(mixer: Any) -> dict[str, Any]:
    return {"p": mixer.degree, "normalize": mixer.has_normaliser}


def _state(plan: Plan, contender: Contender, kind: str, tokens: int) -> Run:
    return _run(mix(contender), heads_of(plan, contender, tokens), None, kind)


def _decode(plan: Plan, contender: Contender, tokens: int) -> Run:
    """Return one more token after `tokens` of context: a step of the state, or a look at the cached keys and values."""
    import torch
    import torch.nn.functional as F  # noqa: N812

    mixer: Any = contender.mixer
    last = [x[:, 0] for x in heads_of(plan, contender, 1)]
    if contender.is_power:
        from powerplan.kernels import power_attention, power_attention_step

        settings = _settings(mixer)
        q, k, v, *gate = heads_of(plan, contender, min(tokens, PREFIX))
        impl = "triton" if contender.impl == "triton" else "recurrent"
        with torch.no_grad():
            _, state = power_attention(q, k, v, *gate, return_state=True, impl=contender.impl, **settings)
        q, k, v, *gate = last
        log_g = gate[0] if gate else None

        def step() -> Any:
            with torch.no_grad():
                return power_attention_step(q, k, v, log_g, state, impl=impl, **settings)

        return step
    kept = tokens if mixer.window is None else min(tokens, mixer.window)
    query = last[0][:, :, None]
    keys = _random(plan, plan.batch, mixer.kv_heads, kept, mixer.head_dim)
    values = _random(plan, plan.batch, mixer.kv_heads, kept, mixer.v_head_dim)
    grouped = mixer.heads != mixer.kv_heads

    def look() -> Any:
        with torch.no_grad():
            return F.scaled_dot_product_attention(query, keys, values, enable_gqa=grouped)

    return look


def _run(function: Callable[..., Any], inputs: Sequence[Tensor], module: nn.Module | None, kind: str) -> Run:
    """Return a pass of `function` over `inputs`: forward without gradients, or forward and all gradients."""
    import torch

    if kind != "train":

        def forward() -> Any:
            with torch.no_grad():
                return function(*inputs)

        return forward
    wanted = [x.requires_grad_() for x in inputs]
    wanted += [] if module is None else list(module.parameters())
    grads: list[Tensor] = []

    def train() -> Any:
        out = function(*inputs)
        outs = out if isinstance(out, tuple) else (out,)
        if not grads:
            grads.extend(torch.ones_like(x) for x in outs)
        # A projection that gives queries has no part in the gradient of the merged heads.
        return outs, torch.autograd.grad(outs, wanted, grads, allow_unused=True)

    return train


def _random(plan: Plan, *shape: int) -> Tensor:
    import torch

    return torch.randn(*shape, device=plan.device, dtype=torch_dtype(plan.dtype))
