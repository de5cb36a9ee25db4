"""What to measure: sweeps from the command line, and the presets with the targets that they answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import product

from support.peers import default_impls
from support.shapes import PASSES, Shape, Variant

K = 1024


@dataclass(frozen=True)
class Sweep:
    """A product of settings: every pass at every context and head dim, with every variant beside each other."""

    passes: tuple[str, ...] = PASSES
    contexts: tuple[int, ...] = (1 * K, 4 * K, 16 * K)
    head_dims: tuple[int, ...] = (64,)
    p: tuple[int, ...] = (2,)
    chunks: tuple[int | None, ...] = (None,)
    batch: int = 1
    heads: int = 4
    kv_heads: int | None = None
    gates: tuple[bool, ...] = (False,)
    impls: tuple[str, ...] | None = None
    dtype: str | None = None

    def shapes(self, device: str) -> Iterator[Shape]:
        """Yield the shapes from the smallest context of a pass to its largest."""
        dtype = self.dtype or ("bf16" if device == "cuda" else "fp32")
        kv_heads = self.kv_heads or self.heads
        for kind, d, tokens in product(self.passes, self.head_dims, sorted(self.contexts)):
            yield Shape(kind, tokens, self.batch, self.heads, kv_heads, d, dtype, device)

    def variants(self, device: str) -> list[Variant]:
        """Return what is compared at each shape; degrees, chunks and gates multiply those that have them."""
        found: list[Variant] = []
        for impl in self.impls or default_impls(device):
            if impl.startswith("power-") or impl == "retention":
                found += [Variant(impl, *rest) for rest in product(self.p, self.chunks, self.gates)]
            elif impl.endswith("window"):
                found += [Variant(impl, p) for p in self.p]
            elif impl == "simple-gla":
                found += [Variant(impl, gated=gated) for gated in self.gates]
            else:
                found.append(Variant(impl))
        return found


@dataclass(frozen=True)
class Target:
    """A figure that a preset is run for: `metric` of a row, which has to be at least (or at most) `bound`.

    metric: "over_sdpa" (fastest SDPA's time over this one's), "over_retention", "memory" (bytes), "bandwidth" (share of
    a copy's), "flat" (time at the largest context over that at the smallest).
    """

    metric: str
    bound: float
    impl: str
    kind: str
    tokens: int
    heads: int
    head_dim: int = 64
    gated: bool = False
    at_most: bool = False


@dataclass(frozen=True)
class Preset:
    """Sweeps that run one after another within one time limit, and their targets."""

    sweeps: tuple[Sweep, ...]
    targets: tuple[Target, ...] = field(default=())


CPU = "power-torch"
GPU = "power-triton"
CPU_IMPLS = (CPU, "sdpa-flash", "window")

PRESETS = {
    "quick": Preset((Sweep(contexts=(1 * K, 4 * K), impls=None),)),
    "cpu-targets": Preset(
        (
            Sweep(("decode",), (1 * K, 4 * K, 16 * K, 64 * K), gates=(False, True), impls=CPU_IMPLS),
            Sweep(("forward",), (1024 * K,), heads=1, impls=(CPU,)),
            Sweep(("forward",), (4 * K, 16 * K, 32 * K, 64 * K), gates=(False, True), impls=CPU_IMPLS),
            Sweep(("train",), (4 * K, 16 * K, 64 * K), gates=(False, True), impls=CPU_IMPLS),
        ),
        (
            Target("over_sdpa", 2.5, CPU, "forward", 16 * K, 4),
            Target("over_sdpa", 5, CPU, "forward", 32 * K, 4),
            Target("over_sdpa", 11, CPU, "forward", 64 * K, 4),
            Target("over_sdpa", 2.5, CPU, "train", 16 * K, 4),
            Target("over_sdpa", 9, CPU, "train", 64 * K, 4),
            Target("memory", 200e6, CPU, "forward", 64 * K, 4, at_most=True),
            Target("memory", 200e6, CPU, "forward", 1024 * K, 1, at_most=True),
            Target("flat", 1.25, CPU, "decode", 64 * K, 4, at_most=True),
        ),
    ),
    "gpu-targets": Preset(
        (
            Sweep(("train",), (1 * K, 2 * K, 4 * K, 8 * K, 16 * K, 64 * K), heads=8, gates=(True,)),
            Sweep(("forward",), (64 * K,), (32, 64), batch=8, heads=12),
            Sweep(("decode",), (1 * K, 8 * K, 64 * K), batch=32, heads=8, gates=(True,)),
            Sweep(("forward",), (128 * K, 1024 * K), heads=1, impls=(GPU, CPU, "sdpa-flash", "sdpa-cudnn")),
        ),
        (
            Target("over_sdpa", 8, GPU, "train", 64 * K, 8, gated=True),
            Target("over_retention", 2.5, GPU, "train", 64 * K, 8, gated=True),
            Target("over_sdpa", 14, GPU, "forward", 64 * K, 12, 32),
            Target("over_sdpa", 8, GPU, "forward", 64 * K, 12, 64),
            Target("over_sdpa", 1, GPU, "train", 8 * K, 8, gated=True),
            Target("bandwidth", 0.8, GPU, "decode", 64 * K, 8, gated=True),
        ),
    ),
    "gpu-paper": Preset(
        (
            Sweep(
                ("forward", "train"),
                (64 * K,),
                (32, 64),
                chunks=(128, 256, 512, 1 * K, 2 * K, 4 * K),
                batch=8,
                heads=12,
                impls=(GPU, "retention", "sdpa-flash", "sdpa-cudnn"),
            ),
            Sweep(("forward",), (1 * K, 4 * K, 16 * K, 64 * K), (64,), p=(2, 3), batch=1, heads=12),
        ),
    ),
}


def overridden(preset: Preset, impls: tuple[str, ...] | None, dtype: str | None) -> Preset:
    """Return the preset with other implementations or another dtype in all its sweeps, where given."""
    changes = {name: value for name, value in (("impls", impls), ("dtype", dtype)) if value is not None}
    return replace(preset, sweeps=tuple(replace(sweep, **changes) for sweep in preset.sweeps))  # type: ignore[arg-type]
