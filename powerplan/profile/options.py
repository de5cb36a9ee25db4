"""From the options of `powerplan profile` to the workload that they ask for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, TypeGuard

import msgspec

from powerplan.accounting import positions_text
from powerplan.dims import KERNEL_DEGREES, odd_degree
from powerplan.errors import InputError
from powerplan.ffn import MLP, MoE
from powerplan.lists import parse_words, split_words
from powerplan.measured import RECURRENT
from powerplan.mixers import GLA, GSA, RWKV7, FeatureAttention, GroupedHeads, LogLinear, Mamba2, Mixer, Power
from powerplan.mixers.delta import DeltaRule
from powerplan.profile.result import PASSES
from powerplan.profile.workload import TimedMixer, Workload
from powerplan.spec import Layer, ModelSpec, check_spec
from powerplan.swap import Swap, parse_swap, swapped
from powerplan.swap.shapes import replacement_heads
from powerplan.swap.windows import can_swap, same_state_window
from powerplan.units import parse_integers

IMPLS = ("auto", "torch", "triton", "recurrent", "reference")
"""Implementations of power attention, as `power_attention` names them."""

BASELINES = ("attention", "window", "linear", *RECURRENT)
"""Values of `--against`."""

_OTHER_NAMES = {"softmax": "attention", "train": "forward+backward"}
"""Other words for values of `--against` and `--pass`."""

CPU_CONTEXTS = (1024, 4096, 16384)
"""Contexts that are timed on a processor where the user gives none."""

GPU_CONTEXTS = (4096, 16384, 65536, 262144)
"""Contexts that are timed on a GPU where the user gives none."""

DIFFERENCES: tuple[Callable[[Any], str], ...] = (
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
"""Suffixes that tell mixers of equal names apart, in the order in which they are tried."""


def workload_of(
    spec: ModelSpec,
    *,
    degrees: str | None = None,
    mixer: str | None = None,
    against: str = "attention,window",
    impl: str = "auto",
    passes: tuple[str, ...] = ("forward", "train"),
    contexts: list[int] | None = None,
    device: str = "cpu",
    dtype: str | None = None,
    batch: int = 1,
    chunk_sizes: tuple[int, ...] = (),
    breakdown: bool = False,
) -> Workload:
    """Return the workload that the options of `powerplan profile` describe.

    Args:
        spec: The model. Of its layers the most frequent one is timed.
        degrees: `--p`, degrees of power attention such as "2,3".
        mixer: `--mixer`, in place of `degrees`. Without both, the model's own power and linear attention is timed; a
            model without any gets power attention of degree 2.
        against: `--against`, a list of BASELINES, or "none".
        impl: `--impl`, a list of IMPLS.
        passes, device, batch, chunk_sizes, breakdown: As in Workload.
        contexts: As in Workload; None for contexts that fit the time limit.
        dtype: As in Workload; None for bf16 on a GPU and fp32 on a processor.

    Returns:
        The workload. Its notes say what was assumed or changed.

    Raises:
        InputError: If an option is unknown, out of range or contradicts another, or the model's mixers have no heads.
    """
    check_spec(spec)
    if degrees is not None and mixer is not None:
        raise InputError("--p and --mixer both say which mixer to measure; give one of them")
    if not can_swap(spec):
        raise InputError(f"{spec.name} has layers whose mixer has no heads that another could take", "MODEL")
    against_names = parse_names(against, "--against", (*BASELINES, "none"))
    gpu = device.startswith("cuda")
    # What runs windows, and softmax attention as a subject: FlexAttention, or SDPA in blocks.
    softmax_impl = "flex" if gpu else "sdpa"
    impls = parse_names(impl, "--impl", IMPLS)
    dtype = dtype or ("bf16" if gpu else "fp32")
    notes: list[str] = []
    requested = _requested_mixers(spec, degrees, mixer, notes)
    mixers = list(dict.fromkeys(_as_kernels_run(own, notes) for own in requested))
    baselines: list[tuple[Mixer, str]] = [
        (own, _chosen_impl(impl, own, device, dtype, notes))
        for own, impl in _baselines(spec, mixers[0], against_names, softmax_impl, max(contexts or (1,)), notes)
        if own not in mixers
    ]
    names = distinct_names([*mixers, *(baseline for baseline, _ in baselines)])
    subjects: list[TimedMixer] = []
    for subject in mixers:
        chosen = [_chosen_impl(name, subject, device, dtype, notes) for name in impls]
        own_impls = [softmax_impl] if subject.degree is None else list(dict.fromkeys(chosen))
        for own in own_impls:
            name = f"{names[subject]} {own}" if len(own_impls) > 1 else names[subject]
            subjects.append(TimedMixer(name, subject, own))
    if any(getattr(own, "sinks", False) for own in spec.mixers()):
        notes.append("attention sinks are not timed: they are left out of the layer")
    layer, positions = _most_frequent_layer(spec)
    if layer.ffn is not None and not isinstance(layer.ffn, MLP | MoE):
        kind = layer.ffn.kind
        raise InputError(f"{spec.name} has {layer.ffn.describe()} in {positions}, and {kind} is not built", "MODEL")
    return Workload(
        spec=spec,
        layer=layer,
        positions=positions,
        subjects=tuple(subjects),
        baselines=tuple(TimedMixer(names[baseline], baseline, own) for baseline, own in baselines),
        passes=passes,
        contexts=tuple(sorted(contexts)) if contexts else (GPU_CONTEXTS if gpu else CPU_CONTEXTS),
        device=device,
        dtype=dtype,
        batch=batch,
        chunk_sizes=chunk_sizes,
        breakdown=breakdown,
        notes=tuple(notes),
        may_shorten=not contexts,
    )


def distinct_names(mixers: Sequence[Mixer]) -> dict[Mixer, str]:
    """Return a name for each mixer, "attention", "window 1,040" or "power p=2", with a suffix where two would be equal:
    times are kept and looked up by name."""
    short = {mixer: mixer.label for mixer in mixers}
    names = {mixer: "attention" if mixer.family == "attention" else name for mixer, name in short.items()}
    for difference in DIFFERENCES:
        for name in set(names.values()):
            namesakes = [mixer for mixer in mixers if names[mixer] == name]
            try:
                suffixes = {mixer: difference(mixer) for mixer in namesakes}
            except AttributeError:  # Softmax attention has no chunks, linear attention no tiles.
                continue
            if len(set(suffixes.values())) > 1:
                names |= {mixer: f"{name} {suffix}".rstrip() for mixer, suffix in suffixes.items()}
    for name in set(names.values()):
        for number, mixer in enumerate([mixer for mixer in mixers if names[mixer] == name][1:], 2):
            names[mixer] = f"{name} #{number}"
    return names


def parse_names(text: str, where: str, allowed: tuple[str, ...]) -> list[str]:
    """Return the names in a list such as "attention,window"; raises InputError for a name that is not allowed."""
    return parse_words([_OTHER_NAMES.get(word, word) for word in split_words(text)], allowed, where)


def parse_chunk_sizes(text: str) -> tuple[int, ...]:
    """Return the chunk sizes in "256,512"; none for "auto", the implementation's own."""
    return () if text.strip() == "auto" else tuple(parse_integers(text, "--chunk-size", 1, 2**20))


def parse_passes(text: str) -> tuple[str, ...]:
    """Return the passes in "forward,forward+backward", as keys of PASSES in their order."""
    directions = parse_names(text, "--pass", tuple(PASSES.values()))
    return tuple(name for name, direction in PASSES.items() if direction in directions)


def _chosen_impl(name: str, mixer: Mixer, device: str, dtype: str, notes: list[str]) -> str:
    """Return the implementation that `auto` stands for, as `power_attention` takes it; any other name as it is.

    For recurrent kinds: "fla" where they run in flash-linear-attention, else "torch".
    """
    if mixer.kind in RECURRENT:
        return "fla" if _runs_in_fla(mixer, device, dtype) else "torch"
    if name != "auto" or mixer.degree is None:
        return name
    if not device.startswith("cuda"):
        return "torch"
    assert isinstance(mixer, FeatureAttention)
    import torch

    from powerplan.kernels.triton.support import lacking
    from powerplan.profile.runs import torch_dtype

    # Only sizes, dtype and device are looked at: no memory is taken for them.
    def like(dim: int) -> Any:
        return SimpleNamespace(device=torch.device(device), dtype=torch_dtype(dtype), shape=(1, 1, 1, dim))

    reason = lacking(like(mixer.head_dim), like(mixer.v_head_dim), mixer.degree)
    if reason is not None:
        notes.append(f"{mixer.describe()} runs on the torch engine: impl='triton' {reason}")
    return "triton" if reason is None else "torch"


def _runs_in_fla(mixer: Mixer, device: str, dtype: str) -> bool:
    if not device.startswith("cuda") or dtype == "fp32":
        return False
    if isinstance(mixer, DeltaRule | GLA | RWKV7):
        sizes: tuple[int, ...] = (mixer.head_dim, mixer.v_head_dim)
    elif isinstance(mixer, GSA):
        sizes = (mixer.head_dim, mixer.v_head_dim, mixer.slots)
    elif isinstance(mixer, Mamba2) and not isinstance(mixer, LogLinear):
        sizes = (mixer.state_dim, mixer.head_dim)
    else:
        return False
    from powerplan.models.mixers.fla import HAS_FLA, fits_fla

    return HAS_FLA and fits_fla(*sizes)


def _requested_mixers(spec: ModelSpec, degrees: str | None, mixer: str | None, notes: list[str]) -> list[GroupedHeads]:
    """Return the mixers that `--p` or `--mixer` asks for; without either, the model's own power or linear attention."""
    if mixer is not None:
        return [_swapped_in(spec, parse_swap(mixer), notes)]
    if degrees is None:
        own = [known for known in spec.mixers() if known.degree is not None and _can_be_timed(known)]
        if own:
            return own
        notes.append("no --p given: power p=2 assumed")
    powers = [2] if degrees is None else parse_integers(degrees, "--p", KERNEL_DEGREES[0], KERNEL_DEGREES[-1])
    heads = replacement_heads(spec)
    return [_swapped_in(spec, Swap.power(p, heads), notes) for p in powers]


def _swapped_in(spec: ModelSpec, swap: Swap, notes: list[str]) -> GroupedHeads:
    changed, remarks = swapped(spec, swap)
    mixer = _most_frequent_layer(changed)[0].mixer
    assert mixer is not None
    if not _can_be_timed(mixer):
        more = f"; give it as --against {mixer.kind}" if mixer.kind in RECURRENT else ""
        raise InputError(f"{mixer.kind}: profile times attention, windows, power and linear attention{more}", "--mixer")
    notes += [remark for remark in remarks if remark not in notes]
    return mixer


def _can_be_timed(mixer: Mixer) -> TypeGuard[GroupedHeads]:
    return mixer.family in ("attention", "window", "power", "linear")


def _as_kernels_run(mixer: GroupedHeads, notes: list[str]) -> GroupedHeads:
    """Return `mixer` without what no implementation has: sinks, and the normaliser of an odd degree."""
    if getattr(mixer, "sinks", False):
        return msgspec.structs.replace(mixer, sinks=False)
    if mixer.degree is not None and mixer.degree not in KERNEL_DEGREES:
        degrees = f"degrees {KERNEL_DEGREES[0]} to {KERNEL_DEGREES[-1]}"
        raise InputError(f"p={mixer.degree}: the kernels run {degrees}", "--mixer")
    if not (isinstance(mixer, Power) and mixer.normalize and odd_degree(mixer.p)):
        return mixer
    note = f"p={mixer.degree} is measured without the normaliser: weights of odd degrees have both signs"
    notes += [note] if note not in notes else []
    return msgspec.structs.replace(mixer, normalize=False)


def _baselines(
    spec: ModelSpec, subject: GroupedHeads, names: list[str], window_impl: str, longest: int, notes: list[str]
) -> list[tuple[Mixer, str]]:
    """Return the baselines `names` in the heads of `subject`, and the model's own windows; each with what runs it.

    longest: the longest context that the user gives, in tokens.
    """
    heads = subject.own_heads()
    base = Workload(spec, *_most_frequent_layer(spec), (), (), (), (), "", "").one_layer(subject)
    swaps: list[tuple[Swap, str]] = []
    if "attention" in names:
        swaps.append((Swap.attention(heads), "sdpa"))
    if "window" in names:
        windows = [own.window_size for own in spec.mixers() if own.family == "window"]
        for size in dict.fromkeys(filter(None, [same_state_window(base), *windows])):
            swaps.append((Swap.attention(heads, size), window_impl))
    if "linear" in names:
        swaps.append((Swap.of("linear", heads), "auto"))
    found: list[tuple[Mixer, str]] = [(_as_kernels_run(_swapped_in(base, swap, []), []), impl) for swap, impl in swaps]
    for name in names:
        if name in RECURRENT:
            changed, remarks = swapped(base, Swap.of(name))
            notes += [remark if remark.startswith(name) else f"{name}: {remark}" for remark in remarks]
            mixer = _most_frequent_layer(changed)[0].mixer
            assert mixer is not None
            if isinstance(mixer, LogLinear):  # Its levels bound the context.
                levels = max(longest, *CPU_CONTEXTS, *GPU_CONTEXTS).bit_length() + 1
                mixer = msgspec.structs.replace(mixer, max_levels=max(mixer.max_levels, levels))
            found.append((mixer, "auto"))
    return found


def _most_frequent_layer(spec: ModelSpec) -> tuple[Layer, str]:
    """Return the layer with a mixer that the model has most often, and where the model has it, in words."""
    uses = [use for use in spec.layer_uses() if use.layer.mixer is not None]
    use = max(uses, key=lambda use: use.count)
    return use.layer, positions_text(use.positions)
