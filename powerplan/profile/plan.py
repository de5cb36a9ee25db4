"""What is to be measured: the layer of a model, the mixers that take turns in it, the passes and the contexts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeGuard

import msgspec

from powerplan.accounting import DTYPE_BYTES, positions_text
from powerplan.dims import KERNEL_DEGREES, default_chunk_size
from powerplan.errors import InputError, allowed_values, shown
from powerplan.ffn import AnyFFN, MoE
from powerplan.mixers import Attention, Convention, FeatureAttention, GroupedHeads, Power
from powerplan.mixers.base import total
from powerplan.profile.result import PASSES, LayerShape
from powerplan.spec import Layer, LayerGroup, ModelSpec
from powerplan.swap import Swap, swap_text, with_mixer
from powerplan.swap.shapes import replacement_heads
from powerplan.swap.windows import can_swap, same_state_window
from powerplan.units import parse_integers

IMPLS = ("auto", "torch", "triton", "recurrent", "reference")
"""Implementations of power attention, as `power_attention` names them."""

RIVALS = ("softmax", "window", "linear")
DTYPES = ("fp32", "bf16", "fp16")
CPU_CONTEXTS = (1024, 4096, 16384)
GPU_CONTEXTS = (4096, 16384, 65536, 262144)


@dataclass(frozen=True)
class Contender:
    """One mixer and the implementation that runs it. impl is the kernels' name for power and linear attention."""

    name: str
    mixer: GroupedHeads
    impl: str

    @property
    def is_power(self) -> bool:
        return isinstance(self.mixer, FeatureAttention)

    @property
    def text(self) -> str:
        """The mixer as `--mixer` takes it, without its heads."""
        if isinstance(self.mixer, Attention):
            return "attention" if self.mixer.window is None else f"window:{self.mixer.window}"
        return f"power:p={self.mixer.p}" if isinstance(self.mixer, Power) else "linear"

    @property
    def chunk_size(self) -> int | None:
        """Tokens per chunk that the implementation takes; None for one without chunks."""
        mixer = self.mixer
        if not isinstance(mixer, FeatureAttention) or self.impl not in ("torch", "triton"):
            return None
        if self.impl == "triton":
            from powerplan.kernels.triton.support import CHUNKS

            return mixer.chunk_size or CHUNKS[mixer.degree]
        return mixer.chunk_size or default_chunk_size(mixer.head_dim, mixer.degree)

    def with_chunk(self, size: int) -> Contender:
        """Return the same in chunks of another size, which its name then says."""
        mixer = msgspec.structs.replace(self.mixer, chunk_size=size)
        return Contender(f"{self.name.removeprefix('power ')} chunk {size:,}", mixer, self.impl)

    def state_flops(self, kind: str, context: int, executed: bool) -> Fraction:
        """Return the state FLOPs of one sequence: `executed` by the implementation, or as `recommend` counts.

        The accounting counts the state after the last token. In chunks it is not computed where nobody reads it, as
        here: the last chunk, which may be the only one, is not added.
        """
        if kind == "decode":
            return Fraction(total(self.mixer.state_flops_terms(context, Convention(causal="full"))))
        chunk = self.chunk_size
        if not executed or chunk is None:
            return Fraction(total(self.mixer.state_flops_terms(context, Convention()))) * context * _passes(kind)
        mixer = msgspec.structs.replace(self.mixer, chunk_size=chunk)
        terms = mixer.state_flops_terms(context, Convention(form="chunked"))
        (update,) = [item.value for item in terms if item.component.endswith("update state")]
        unread = update * (context % chunk or chunk)
        return (Fraction(total(terms)) * context - unread) * _passes(kind)

    def weight_flops(self, hidden: int) -> int:
        """Return the FLOPs of the projections for one token."""
        return 2 * int(total(self.mixer.matmul_terms(hidden)))

    def bytes_moved(self, kind: str, context: int, dtype: str) -> Fraction:
        """Return the least bytes that a pass over one sequence moves: in and out once a pass, and the state."""
        width, mixer = DTYPE_BYTES[dtype], self.mixer
        if kind == "decode":
            return Fraction(mixer.decode_bytes(context, width))
        heads = (mixer.heads + mixer.kv_heads) * (mixer.head_dim + mixer.v_head_dim)
        recurrent = 4 * mixer.state_size(context).recurrent
        return _passes(kind) * (context * heads * width + recurrent)

    @property
    def projection_key(self) -> tuple[Any, ...]:
        """What the cost of the projections depends on: contenders that share it share one measurement."""
        fields = ("heads", "kv_heads", "head_dim", "v_head_dim", "bias", "qk_norm", "output_gate")
        return (*(getattr(self.mixer, field) for field in fields), getattr(self.mixer, "gated", False))


def _passes(kind: str) -> int:
    return 3 if kind == "train" else 1


@dataclass(frozen=True)
class Plan:
    """All that is to be measured. The first subject is the one that crossovers and the breakdown are about."""

    spec: ModelSpec
    layer: Layer
    positions: str
    subjects: tuple[Contender, ...]
    rivals: tuple[Contender, ...]
    passes: tuple[str, ...]
    contexts: tuple[int, ...]
    """Rising. Where `chosen` is set they were not asked for, and may be shortened to what fits."""

    device: str
    dtype: str
    batch: int = 1
    chunk_sizes: tuple[int, ...] = ()
    breakdown: bool = False
    notes: tuple[str, ...] = ()
    chosen: bool = False

    @property
    def contenders(self) -> tuple[Contender, ...]:
        return (*self.subjects, *self.rivals)

    @property
    def softmax(self) -> Contender | None:
        return next((item for item in self.rivals if item.text == "attention"), None)

    @property
    def rope(self) -> bool:
        return self.spec.position_embeddings is None

    @property
    def ffn(self) -> AnyFFN | None:
        return self.layer.ffn

    def shape(self) -> LayerShape:
        ffn = None
        if self.ffn is not None:
            kind = f"{self.ffn.describe()} experts of" if isinstance(self.ffn, MoE) else self.ffn.describe()
            ffn = f"{kind} {self.ffn.intermediate_size:,}{', gated' * self.ffn.gated}"
        return LayerShape(
            model=self.spec.name,
            positions=self.positions,
            hidden_size=self.spec.hidden_size,
            ffn=ffn,
            rope=self.rope,
        )

    def ffn_flops(self) -> int:
        """Return the FLOPs of the FFN for one token, 0 without one."""
        return 0 if self.ffn is None else 2 * int(total(self.ffn.matmul_terms(self.spec.hidden_size)))

    def ffn_weights(self, tokens: int | None = None) -> int:
        """Return the FFN's weights in matrices; with `tokens`, at most those that as many tokens can meet.

        Experts that all choose alike would be fewer: this is for bounds, of memory and of time.
        """
        if self.ffn is None:
            return 0
        hidden = self.spec.hidden_size
        active, idle = int(total(self.ffn.matmul_terms(hidden))), int(total(self.ffn.idle_terms(hidden)))
        return active + idle if tokens is None else min(active + idle, active * tokens)

    def with_mixer(self, mixer: GroupedHeads) -> ModelSpec:
        """Return a model of the one layer that is built, with `mixer` in it, and norms for the parts it has."""
        norm = self.spec.norm
        if self.ffn is None and norm.per_layer > 2:
            norm = msgspec.structs.replace(norm, per_layer=2)
        group = LayerGroup(mixer=mixer, ffn=self.ffn)  # type: ignore[arg-type]
        return msgspec.structs.replace(self.spec, layers=(group,), norm=norm)


def plan_of(
    spec: ModelSpec,
    *,
    degrees: str | None = None,
    mixer: str | None = None,
    against: str = "softmax,window",
    impl: str = "auto",
    passes: tuple[str, ...] = ("forward", "train"),
    contexts: list[int] | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    batch: int = 1,
    chunk_sizes: tuple[int, ...] = (),
    breakdown: bool = False,
) -> Plan:
    """Return what to measure. Raises InputError for what is unknown, out of range, or contradicts itself."""
    if degrees is not None and mixer is not None:
        raise InputError("--p and --mixer both say which mixer to measure; give one of them")
    if not can_swap(spec):
        raise InputError(f"{spec.name} has layers whose mixer has no heads that another could take", "MODEL")
    rivals, impls = words(against, "--against", (*RIVALS, "none")), words(impl, "--impl", IMPLS)
    gpu = device.startswith("cuda")
    resolved = tuple(dict.fromkeys(("triton" if gpu else "torch") if item == "auto" else item for item in impls))
    notes: list[str] = []
    texts, assumed = _subjects(spec, degrees, mixer)
    if assumed:
        notes.append(assumed)
    layer, positions = _layer(spec)
    mixers: list[GroupedHeads] = []
    for variant in _own(spec) if texts is None else [_variant(spec, text, notes) for text in texts]:
        kind, extra = _runnable(variant)
        notes += [note for note in extra if note not in notes]
        mixers += [kind] if kind not in mixers else []
    found = [item for item in _rivals(spec, mixers[0], rivals, gpu) if item[0] not in mixers]
    names = _names([*mixers, *(item for item, _ in found)])
    subjects: list[Contender] = []
    for item in mixers:
        own = resolved if isinstance(item, FeatureAttention) else (_softmax_impl(gpu),)
        subjects += [Contender(f"{names[item]} {one}" if len(own) > 1 else names[item], item, one) for one in own]
    if any(getattr(item, "sinks", False) for item in _mixers(spec)):
        notes.append("sinks of the attention are left out")
    return Plan(
        spec=spec,
        layer=layer,
        positions=positions,
        subjects=tuple(subjects),
        rivals=tuple(Contender(names[item], item, how) for item, how in found),
        passes=passes,
        contexts=tuple(sorted(contexts)) if contexts else (GPU_CONTEXTS if gpu else CPU_CONTEXTS),
        device=device,
        dtype=dtype or ("bf16" if gpu else "fp32"),
        batch=batch,
        chunk_sizes=chunk_sizes,
        breakdown=breakdown,
        notes=tuple(notes),
        chosen=not contexts,
    )


def words(text: str, where: str, allowed: tuple[str, ...]) -> list[str]:
    """Return the words of a list such as "softmax,window"; raises InputError for one that is not allowed."""
    found = [word.strip() for word in text.split(",")]
    for word in found:
        if word not in allowed:
            raise InputError(f"{shown(word)} is not known{allowed_values(word, allowed)}", where)
    return list(dict.fromkeys(found))


def parse_chunks(text: str, where: str = "--chunk-size") -> tuple[int, ...]:
    """Return chunk sizes of "256,512"; none for "auto", the implementation's own."""
    if text.strip() == "auto":
        return ()
    return tuple(parse_integers(text, where, 1, 2**20))


def parse_passes(text: str, where: str = "--pass") -> tuple[str, ...]:
    """Return passes of "forward,train" in their order. Raises InputError for one that is not known."""
    found = words(text, where, tuple(PASSES))
    return tuple(name for name in PASSES if name in found)


def _mixers(spec: ModelSpec) -> list[Any]:
    return list(dict.fromkeys(use.layer.mixer for use in spec.layer_uses() if use.layer.mixer is not None))


def _own(spec: ModelSpec) -> list[GroupedHeads]:
    return [mixer for mixer in _mixers(spec) if isinstance(mixer, FeatureAttention)]


def _subjects(spec: ModelSpec, degrees: str | None, mixer: str | None) -> tuple[list[str] | None, str | None]:
    """Return the `--mixer` texts to measure, None for the model's own mixers, and what was assumed."""
    if mixer is not None:
        return [mixer], None
    if degrees is None and _own(spec):
        return None, None
    low, high = KERNEL_DEGREES[0], KERNEL_DEGREES[-1]
    found = [2] if degrees is None else parse_integers(degrees, "--p", low, high)
    shape = replacement_heads(spec)
    assumed = "no --p given: power p=2 assumed" if degrees is None else None
    return [swap_text(Swap.power(p, shape, normalize=p % 2 == 0)) for p in found], assumed


def _variant(spec: ModelSpec, text: str, notes: list[str]) -> GroupedHeads:
    """Return the mixer that `text` puts in the layer that is measured. Raises InputError for one that is not timed."""
    changed, remarks = with_mixer(spec, text)
    mixer = _layer(changed)[0].mixer
    if not _timed(mixer):
        assert mixer is not None
        raise InputError(f"{mixer.kind}: profile times attention, windows, power and linear attention", "--mixer")
    notes += [remark for remark in remarks if remark not in notes]
    return mixer


def _timed(mixer: Any) -> TypeGuard[GroupedHeads]:
    """Whether runs and checks know the kind: attention exactly, as what derives from it has gates of its own."""
    return type(mixer) is Attention or isinstance(mixer, FeatureAttention)


def _runnable(mixer: GroupedHeads) -> tuple[GroupedHeads, list[str]]:
    """Return `mixer` as the kernels run it, and what was changed for that."""
    if isinstance(mixer, Power) and mixer.p not in KERNEL_DEGREES:
        raise InputError(f"p={mixer.p}: the kernels run degrees {KERNEL_DEGREES[0]} to {KERNEL_DEGREES[-1]}", "--mixer")
    if isinstance(mixer, Power) and mixer.p % 2 and mixer.normalize:
        plain = msgspec.structs.replace(mixer, normalize=False)
        return plain, [f"p={mixer.p} is measured without the normaliser: weights of odd degrees have both signs"]
    if isinstance(mixer, Attention) and mixer.sinks:
        return msgspec.structs.replace(mixer, sinks=False), []
    return mixer, []


_TELLING: tuple[Callable[[Any], str], ...] = (
    lambda mixer: f"{mixer.heads}x{mixer.head_dim}",
    lambda mixer: f"kv {mixer.kv_heads}",
    lambda mixer: f"v {mixer.v_head_dim}",
    lambda mixer: "" if mixer.has_normaliser else "unnormalised",
    lambda mixer: "gated" if mixer.gated else "",
    lambda mixer: f"chunk {mixer.chunk_size}" if mixer.chunk_size else "",
    lambda mixer: f"tile {mixer.tile}",
    lambda mixer: "output gate" if mixer.output_gate else "",
    lambda mixer: f"{mixer.qk_norm} qk-norm" if mixer.qk_norm != "none" else "",
    lambda mixer: {True: "bias", False: ""}.get(mixer.bias, f"{mixer.bias} bias"),
)
"""What may tell mixers of one description apart, in words."""


def _names(mixers: list[GroupedHeads]) -> dict[GroupedHeads, str]:
    """Return a name for each of these, all different, since times are kept and looked up by it."""
    names = {mixer: _described(mixer) for mixer in mixers}
    for telling in _TELLING:
        for name in set(names.values()):
            alike = [mixer for mixer in mixers if names[mixer] == name]
            try:
                words = {mixer: telling(mixer) for mixer in alike}
            except AttributeError:  # Softmax attention has no chunks, linear attention no tiles.
                continue
            if len(set(words.values())) > 1:
                names |= {mixer: f"{name} {word}".rstrip() for mixer, word in words.items()}
    for name in set(names.values()):
        for number, mixer in enumerate([mixer for mixer in mixers if names[mixer] == name][1:], 2):
            names[mixer] = f"{name} #{number}"
    return names


def _described(mixer: GroupedHeads) -> str:
    name = "softmax" if isinstance(mixer, Attention) and mixer.window is None else mixer.describe()
    return name.removeprefix("attention, ")


def _softmax_impl(gpu: bool) -> str:
    return "flex" if gpu else "sdpa"


def _rivals(spec: ModelSpec, first: GroupedHeads, names: list[str], gpu: bool) -> list[tuple[GroupedHeads, str]]:
    """Return what `first` is measured against, in its heads, and the model's own windows; each with what runs it."""
    heads = first.own_heads()
    base = Plan(spec, *_layer(spec), (), (), (), (), "", "").with_mixer(first)
    found: list[tuple[GroupedHeads, str]] = []

    def add(text: str, impl: str) -> None:
        mixer, _ = _runnable(_variant(base, text, []))
        found.append((mixer, impl))

    if "softmax" in names:
        add(swap_text(Swap.attention(heads)), "sdpa")
    if "window" in names:
        window = same_state_window(base)
        windows = [window] if window else []
        windows += [mixer.window for mixer in _mixers(spec) if type(mixer) is Attention and mixer.window]
        for size in dict.fromkeys(windows):
            add(swap_text(Swap.attention(heads, size)), _softmax_impl(gpu))
    if "linear" in names:
        add(swap_text(Swap.of("linear", heads)), "triton" if gpu else "torch")
    return found


def _layer(spec: ModelSpec) -> tuple[Layer, str]:
    """Return the layer with a mixer that a model has most often, and where it has it."""
    uses = [use for use in spec.layer_uses() if use.layer.mixer is not None]
    use = max(uses, key=lambda item: item.count)
    return use.layer, positions_text(use.positions)
