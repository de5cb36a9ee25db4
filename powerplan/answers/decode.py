"""What serving takes: bytes and time per decoded token, prefill, memory, the largest batch that fits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, SupportsIndex, get_args

from powerplan.accounting import Accounting
from powerplan.answers import base
from powerplan.answers.base import Contexts, DrawnAnswer, Model, Whole, named_notes
from powerplan.caches.pages import engine_notes
from powerplan.caches.policy import Policy, policy_of
from powerplan.choices import Engine, Twin
from powerplan.dtypes import Dtypes
from powerplan.errors import InputError, parameter
from powerplan.hardware import Device, needs_device, peak_of
from powerplan.report.decode import Served, decode_report
from powerplan.report.render import Report
from powerplan.serving import MAX_BATCH, Fleet, Serving
from powerplan.serving import twin as twin_of
from powerplan.units import parse_integers

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True, repr=False)
class DecodeAnswer(DrawnAnswer):
    """What serving models takes.

    models: the models, each followed by its twin where twins were asked for; each has one Serving for each context.
    batches: how many sequences are decoded together. dtypes: the number formats of weights, key/value cache
    and recurrent state. fleet: the devices, None where no device was named.
    """

    models: tuple[Served, ...]
    batches: tuple[int, ...]
    dtypes: Dtypes
    fleet: Fleet | None = None

    def figure(self) -> Figure:
        """Return time, or bytes without a device, and memory over the batch, a line for each model and context."""
        from powerplan.plots.decode import decode_figure

        return decode_figure(self.models, self.batches, self.dtypes, self.fleet)

    def _report(self) -> Report:
        return decode_report(self.models, self.batches, self.dtypes, self.fleet)


def decode(
    models: Model | Sequence[Model],
    context: Contexts = "128k",
    *,
    batch: Whole | Iterable[SupportsIndex] = (1, 8, 64),
    gpu: str | Device | None = None,
    devices: Whole = 1,
    twin: Twin | None = None,
    mixer: str | None = None,
    dtype: str = "bf16",
    weights_dtype: str | None = None,
    cache_dtype: str | None = None,
    state_dtype: str | None = None,
    cache_budget: Whole | None = None,
    prefill_chunk: Whole | None = None,
    checkpoint_every: Whole | None = None,
    engine: Engine | None = None,
    page: Whole | None = None,
) -> DecodeAnswer:
    """Return what serving one model or more takes, as `powerplan decode` prints it.

    Args:
        models: a catalogue name, a path, a spec or a config, as for wsfr, or a list of them.
        context: tokens, as 65536, "64k" or "1k,64k", or a list of them.
        batch: how many sequences are decoded together, 1 to 65,536, or a list of such numbers.
        gpu: the exact name of a device, such as "h100-sxm"; no times and no limits of memory where None.
        devices: how many devices share weights, state and work; more than one needs `gpu`.
        twin: the mixer, "mla" or "attention", that a twin of each model has in every layer; no twins where None.
        mixer: the mixer to put into every layer of every model, such as "power:p=2".
        dtype: the number format of weights and key/value cache: fp32, bf16, fp16, fp8 or int4. Weights that the file of
            a model quantizes have their own.
        weights_dtype, cache_dtype, state_dtype: that of all weights, of the cache, of recurrent state (fp32) apart. A
            cache may have scales for groups of elements: "int4:group=64".
        cache_budget: the most tokens that a layer keeps of a cache that grows, as 4096 or "4k" (eviction); all of them
            where None. What that costs in quality is not modelled.
        prefill_chunk: tokens of a prompt that are read at once; all of them where None.
        checkpoint_every: tokens from one checkpoint of recurrent state to the next; no checkpoints where None.
        engine: "vllm" or "sglang", whose rules say what a sequence is allocated.
        page: tokens of a page of a cache; the engine's own where None.

    Returns:
        The answer: for each model one Serving for each context, with bytes, FLOPs and seconds of a step and a prompt.

    Raises:
        InputError: an argument cannot be used; the message begins with the argument's name.

    Examples:
        >>> (llama,) = decode("llama-3-8b", "128k", gpu="h100-sxm").models
        >>> llama.servings[0].largest_batch
        4
    """
    contexts = base.read_contexts(context)
    several = base.several_models(models)
    if not several:
        raise InputError("decode needs one model or more", "models")
    base.check_choice(twin, get_args(Twin), "twin")
    batches = tuple(parse_integers(base.list_text(batch), parameter("batch"), 1, MAX_BATCH))
    count = base.read_devices(devices)
    if gpu is None and count > 1:
        raise needs_device("devices")
    device = base.read_device(gpu)
    dtypes = Dtypes(dtype, weights_dtype, cache_dtype, state_dtype)
    rate: Literal["bf16", "fp32"] = "fp32" if dtypes.activations == "fp32" else "bf16"
    fleet = None if device is None else Fleet(device, count, rate)
    if device is not None:
        peak_of(device, rate)  # A device without the rates that times need is refused before a model is read.
    policy = policy_of(cache_budget, prefill_chunk, checkpoint_every, engine, page)
    served: list[Served] = []
    notes: list[str] = []
    for model in several:
        loaded = base.read_model(model, mixer, contexts)
        accounting = Accounting(loaded.spec)
        notes += named_notes(loaded.spec, loaded.notes)
        served.append(Served(accounting, _servings(accounting, contexts, dtypes, fleet, policy)))
        if twin is not None:
            other, remarks = twin_of(accounting, twin)
            notes += named_notes(other.spec, remarks)
            servings = _servings(other, contexts, dtypes, fleet, policy)
            served.append(Served(other, servings, (len(served) - 1, twin)))
    for one in served:
        if policy.budget is not None and all(each.cache_bytes == each.whole_cache_bytes for each in one.servings):
            unused = f"{parameter('cache_budget')} changes nothing: no layer keeps more than {policy.budget:,} tokens"
            notes += named_notes(one.accounting.spec, [unused])
        if engine is not None:
            notes += named_notes(one.accounting.spec, engine_notes(one.accounting.spec, engine))
    return DecodeAnswer(models=tuple(served), batches=batches, dtypes=dtypes, fleet=fleet, notes=tuple(notes))


def _servings(
    accounting: Accounting, contexts: Sequence[int], dtypes: Dtypes, fleet: Fleet | None, policy: Policy
) -> tuple[Serving, ...]:
    servings = tuple(Serving(accounting, context, dtypes, fleet, policy) for context in contexts)
    for serving in servings:
        _ = serving.allocation  # Raises where it is not known how the engine pages a cache.
    return servings
