"""What is measured on a GPU, the most important first; in the dry mode the same on a CPU, in tiny sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from powerplan.dims import UNTRIED_HOPPER_HEAD_DIMS, default_chunk_size
from powerplan.kernels.testing import Case
from support.shapes import Shape, Variant, engine_of, normalized

K = 1024

SDPA = ("sdpa-cudnn", "sdpa-flash")
"""Each backend alone; the fastest counts. The other two are slower on every GPU with bf16 products."""

CONTEXTS = (8 * K, 4 * K, 16 * K, 2 * K, 1 * K, 32 * K)
"""Contexts of the crossovers beside 64k, those near the target first."""

DECODE_TOKENS = 256
"""Tokens that build the state for decoding: a step's time depends on the state's size, not on its content."""


CHECK_CHUNK = 1024
"""The longest chunk of a check: phi of all its tokens must fit the GPU."""


@dataclass(frozen=True)
class Cell:
    """One comparison: power attention and its peers at a shape, timed in turns.

    Attributes:
        name: Unique; targets refer to it.
        shape: Where.
        power: The variant of power attention.
        peers: Implementations of softmax attention beside it.
        on_device: Whether the host's time is left out, by queueing work ahead of each run.
        untried: Whether power attention takes the Hopper kernels that no GPU has run (POWERPLAN_HOPPER=all).
        captured: Whether each call is captured in a CUDA graph, which is then timed: the host starts one thing a call.
    """

    name: str
    shape: Shape
    power: Variant
    peers: tuple[str, ...] = ()
    on_device: bool = False
    untried: bool = False
    captured: bool = False

    @property
    def variants(self) -> tuple[Variant, ...]:
        return (self.power, *map(Variant, self.peers))


def training(tokens: int, head_dim: int, batch: int = 1, heads: int = 8, dtype: str = "bf16") -> Cell:
    shape = Shape("train", tokens, batch, heads, heads, head_dim, dtype, "cuda")
    return Cell(f"{_place(shape)} gated", shape, Variant("power-triton", 2, gated=True), SDPA)


def forward(head_dim: int) -> Cell:
    shape = Shape("forward", 64 * K, 8, 12, 12, head_dim, "bf16", "cuda")
    return Cell(_place(shape), shape, Variant("power-triton", 2, gated=False), SDPA)


def other_degree(kind: str, p: int, head_dim: int) -> Cell:
    shape = Shape(kind, 16 * K, 1, 8, 8, head_dim, "bf16", "cuda")
    return Cell(f"{_place(shape)} p{p} gated", shape, Variant("power-triton", p, gated=True), SDPA)


def untried(cell: Cell) -> Cell:
    """Return a cell with the Hopper kernels that no GPU has run, to be read beside it."""
    return replace(cell, name=f"{cell.name}, untried", peers=(), untried=True)


def captured(cell: Cell) -> Cell:
    """Return a cell whose calls are replayed from a CUDA graph, to be read beside it."""
    return replace(cell, name=f"{cell.name}, captured", captured=True)


def decoding(head_dim: int, batch: int) -> Cell:
    """The states are 1 and 2 GB read and written: far more than L2 holds."""
    shape = Shape("decode", DECODE_TOKENS, batch, 16, 16, head_dim, "bf16", "cuda")
    return Cell(f"decode B{batch} H16 d{head_dim}", shape, Variant("power-triton", 2, gated=True), on_device=True)


def _place(shape: Shape) -> str:
    tokens = f"T{shape.tokens // K}k" if shape.tokens >= K else f"T{shape.tokens}"
    place = f"{shape.kind} B{shape.batch} {tokens} H{shape.heads} d{shape.head_dim}"
    return place if shape.dtype == "bf16" else f"{place} {shape.dtype}"


LONGEST = {64: training(64 * K, 64), 128: training(64 * K, 128)}
"""Training at 64k tokens by head dim: the first rows, and those whose kernels are looked at one by one."""

HOST = replace(training(2304, 64, heads=2), name="host train B1 T2304 H2 d64 gated", peers=())
"""Three chunks where one has 1,024 tokens, the last one short: all kernels are launched, each for microseconds."""

LONG = (*LONGEST.values(), forward(64), forward(32))

CROSSOVERS = (*(training(tokens, 64) for tokens in CONTEXTS), *(training(tokens, 128) for tokens in CONTEXTS))

DECODING = (decoding(64, 64), decoding(128, 16))

DEGREES = tuple(other_degree(kind, p, d) for p, d in ((3, 64), (4, 32), (1, 64)) for kind in ("forward", "train"))

HALF = training(64 * K, 64, dtype="fp16")
"""In fp16 the Hopper engine's operands are scaled, which no GPU has run either."""

CAPTURED = tuple(
    captured(training(tokens, head_dim))
    for head_dim, contexts in ((64, (4 * K, 2 * K, 8 * K)), (128, (8 * K, 4 * K, 16 * K)))
    for tokens in contexts
)
"""Contexts at which the host's time decides."""

OTHERS = (
    *CAPTURED,
    training(4 * K, 64, batch=8, heads=12),
    training(16 * K, 64, batch=4, heads=12),
    *DEGREES,
    *(untried(cell) for cell in DEGREES if cell.power.p in UNTRIED_HOPPER_HEAD_DIMS),
    HALF,
    untried(HALF),
)

CELLS = (*LONG, *CROSSOVERS, *DECODING, *OTHERS)
"""All that is compared, in the order that it is measured in."""


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        cells: All that is compared, in its order.
        host: The cell of the host's time. It is taken before the first step of decoding.
        broken_down: Cells whose kernels are looked at one by one, after the last step of decoding.
        device: Where.
    """

    cells: tuple[Cell, ...]
    host: Cell
    broken_down: tuple[Cell, ...]
    device: str


def plan(dry: bool) -> Plan:
    """Return what is measured."""
    if not dry:
        return Plan(CELLS, HOST, tuple(LONGEST.values()), "cuda")
    cells = tuple(dict.fromkeys(map(_tiny, CELLS)))
    return Plan(cells, _tiny(HOST), tuple(map(_tiny, LONGEST.values())), "cpu")


def _tiny(cell: Cell) -> Cell:
    """Return a cell of the same name on a CPU: contexts a 512th as long, one head, an eighth of the head dim."""
    shape = cell.shape
    small = replace(
        shape,
        tokens=max(16, shape.tokens // 512),
        batch=1,
        heads=1,
        kv_heads=1,
        head_dim=shape.head_dim // 8,
        dtype="fp32",
        device="cpu",
    )
    peers = ("sdpa-math", "sdpa-flash")[: len(cell.peers)]
    return replace(cell, shape=small, power=replace(cell.power, impl="power-torch", chunk=32), peers=peers)


def check_case(shape: Shape, variant: Variant) -> tuple[Case, int]:
    """Return the call that checks `variant` before it is timed, and its chunk: two whole ones and a short one."""
    p, d = variant.p or 2, shape.head_dim
    chunk = min(CHECK_CHUNK, variant.chunk or default_chunk_size(d, p, engine_of(variant)))
    case = Case(p, normalized(variant), bool(variant.gated), batch=1, groups=2, repeats=1, key_dim=d, value_dim=d)
    return replace(case, tokens=2 * chunk + 52), chunk
