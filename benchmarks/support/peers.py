"""The contenders: power attention, softmax attention by every backend, windows, and other packages' kernels.

`forward_of` gives an implementation as a function of q, k, v, log_g in the layout it likes; `prepare` makes the run of
a pass from it, inputs included.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from powerplan.kernels import power_attention, power_attention_step
from powerplan.models.mixers.attention import windowed
from powerplan.profile.timing import Run
from support.shapes import Shape, Variant, normalized, window_of_equal_state

Forward = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

BACKENDS = {
    "sdpa-math": SDPBackend.MATH,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
}
SOFTMAX = (*BACKENDS, "flex")
IMPLS = ("power-torch", "power-triton", *SOFTMAX, "window", "flex-window", "retention", "simple-gla")
TIMES_FIRST = ("power-torch", "power-triton", "retention", "simple-gla")
"""Those whose tensors are [B, T, H, d]; the others take [B, H, T, d]."""

RETENTION_CHUNK = 1024


class UnavailableError(Exception):
    """An implementation cannot run here, or not this shape; the message says why."""


def default_impls(device: str) -> tuple[str, ...]:
    """Return what is compared where nothing is named: all that can run. Flex compiles too long on a CPU."""
    return IMPLS if device == "cuda" else tuple(impl for impl in IMPLS if not impl.startswith("flex"))


def prepare(shape: Shape, variant: Variant) -> Run:
    """Return one run of a pass over fresh inputs; what it returns is its outputs. Raises UnavailableError."""
    return (_decode if shape.kind == "decode" else _sequence)(shape, variant)


def forward_of(variant: Variant, shape: Shape) -> Forward:
    """Return `variant` as a function of q, k, v, log_g, for shapes such as `shape`. Raises UnavailableError."""
    impl, d, p = variant.impl, shape.head_dim, variant.p or 2
    if variant.is_power:
        name = impl.removeprefix("power-")
        settings = {"p": p, "chunk_size": variant.chunk, "impl": name, "normalize": normalized(variant)}
        return partial(_power, gated=bool(variant.gated), settings=settings)
    if impl in BACKENDS:
        return partial(_sdpa, backend=BACKENDS[impl])
    if impl == "window":
        return partial(_window, width=window_of_equal_state(shape, p))
    if impl in ("flex", "flex-window"):
        if shape.device == "cpu" and shape.kind == "train":
            raise UnavailableError("FlexAttention has no backward pass on a CPU")
        return _flex(shape, None if impl == "flex" else window_of_equal_state(shape, p))
    package = {"retention": "retention", "simple-gla": "fla"}[impl]
    if find_spec(package) is None:
        raise UnavailableError(f"the package {package} is not installed")
    if shape.device != "cuda":
        raise UnavailableError(f"{package} runs on CUDA devices only")
    if impl == "retention":
        if p % 2 or d not in (32, 64) or shape.dtype == "fp32":
            raise UnavailableError("retention takes even degrees, head dims 32 and 64, bf16 and fp16")
        chunk = variant.chunk or RETENTION_CHUNK
        return partial(_retention, p=p, chunk=chunk, gated=bool(variant.gated))
    if shape.heads != shape.kv_heads:
        raise UnavailableError("simple-gla has as many key/value heads as query heads")
    return partial(_simple_gla, gated=bool(variant.gated))


def layout(variant: Variant, x: Tensor) -> Tensor:
    """Return [B, T, H, d] as `variant` takes it, contiguous."""
    return x if variant.impl in TIMES_FIRST else x.transpose(1, 2).contiguous()


def _sequence(shape: Shape, variant: Variant) -> Run:
    forward = forward_of(variant, shape)
    made = shape.inputs()
    q, k, v = (layout(variant, made.pop(name)) for name in "qkv")
    log_g = made["log_g"]
    if shape.kind == "forward":

        def run() -> Tensor:
            with torch.no_grad():
                return forward(q, k, v, log_g)

        return run
    inputs = [x.requires_grad_() for x in (q, k, v, *((log_g,) if variant.gated else ()))]
    grad = torch.randn_like(q)

    def train() -> tuple[Tensor, ...]:
        out = forward(q, k, v, log_g)
        return out.detach(), *torch.autograd.grad(out, inputs, grad)

    return train


def _decode(shape: Shape, variant: Variant) -> Run:
    """Return one step after a context of shape.tokens, which is run (power) or cached (softmax) here."""
    made = shape.inputs()
    q, k, v, log_g = (made[name] for name in ("q", "k", "v", "log_g"))
    if variant.is_power:
        settings: dict[str, Any] = {"p": variant.p, "normalize": normalized(variant)}
        gates = log_g if variant.gated else None
        impl = variant.impl.removeprefix("power-")
        # The output of the context is not needed: one head's queries are as good as all.
        asked = k
        with torch.no_grad():
            _, state = power_attention(asked, k, v, gates, return_state=True, impl=impl, **settings)
        last = (q[:, 0], k[:, -1].clone(), v[:, -1].clone(), None if gates is None else gates[:, -1].clone())
        del made, k, v, asked
        with torch.no_grad():  # All steps of a model but the first start from what a step returned.
            _, state = power_attention_step(*last, state, impl=step_impl(variant), **settings)

        def step() -> Any:
            with torch.no_grad():
                return power_attention_step(*last, state, impl=step_impl(variant), **settings)

        return step
    if variant.is_softmax or variant.impl == "window":
        if variant.impl == "flex":
            raise UnavailableError("flex is not timed in decoding")
        kept = shape.tokens if variant.is_softmax else min(shape.tokens, window_of_equal_state(shape, variant.p or 2))
        queries, keys, values = (layout(variant, x) for x in (q, k[:, -kept:], v[:, -kept:]))
        backend = BACKENDS.get(variant.impl)

        def look() -> Tensor:
            with torch.no_grad():
                return _sdpa(queries, keys, values, q, backend=backend, causal=False)

        return look
    raise UnavailableError(f"{variant.impl} is not timed in decoding")


def step_impl(variant: Variant) -> str:
    """Return the implementation of a step that belongs to one of whole sequences."""
    return "triton" if variant.impl == "power-triton" else "recurrent"


def _power(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, *, gated: bool, settings: dict[str, Any]) -> Tensor:
    out: Tensor = power_attention(q, k, v, log_g if gated else None, **settings)
    return out


def _sdpa(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, *, backend: SDPBackend | None, causal: bool = True) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)


def _window(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, *, width: int) -> Tensor:
    return windowed(q, k, v, width)


def _flex(shape: Shape, width: int | None) -> Forward:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    def sliding(_b: Tensor, _h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        assert width is not None
        return (query >= key) & (query - key < width)

    # Past its limit of recompilations torch.compile runs the eager, quadratic form without an error.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def run(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor) -> Tensor:
        out: Tensor = compiled(q, k, v, block_mask=mask(q.shape[2]), enable_gqa=shape.heads != shape.kv_heads)
        return out

    @cache
    def mask(tokens: int) -> Any:
        rule = causal if width is None else sliding
        # _compile: made block by block, where the eager form holds all T^2 entries.
        return create_block_mask(rule, None, None, tokens, tokens, device=shape.device, _compile=tokens > 8192)

    return run


def _retention(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, *, p: int, chunk: int, gated: bool) -> Tensor:
    out: Tensor = import_module("retention").power_retention(q, k, v, log_g if gated else None, deg=p, chunk_size=chunk)
    return out


def _simple_gla(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor, *, gated: bool) -> Tensor:
    out: Tensor = import_module("fla.ops.simple_gla").chunk_simple_gla(q, k, v, log_g if gated else None)[0]
    return out
