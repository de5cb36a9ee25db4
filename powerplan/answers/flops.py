"""The training FLOPs of one optimizer step: what a trainer divides by time and peak to report its MFU."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from functools import lru_cache
from typing import Any

from powerplan.accounting import Accounting
from powerplan.answers.base import Model, Whole, read_model, text_of
from powerplan.errors import InputError, parameter
from powerplan.lengths import counted
from powerplan.mixers.formulas import Convention, Rational, convention_of, integer_if_whole
from powerplan.spec import ModelSpec
from powerplan.training import document_flops
from powerplan.units import MAX_COUNT, context_of, parse_integer

MAX_MODELS = 64
"""Models, with their mixers and conventions, whose counts are kept between calls."""


def flops_per_step(
    model: Model,
    context: Whole,
    *,
    sequences: Whole | None = None,
    lengths: Iterable[int] | None = None,
    mixer: str | None = None,
    convention: Convention | None = None,
) -> int | Fraction:
    """Return the training FLOPs of one optimizer step, over all its devices and micro-batches: 3 forward passes.

    MFU is this number over the seconds of the step, the number of devices, and the peak FLOP/s of one. What activation
    checkpoints compute again is not in it: that would be HFU. A call with a spec takes a few microseconds, and 20 to 50
    more for each length that is new. A path is read again at each call.

    Args:
        model: a catalogue name, a path to a YAML or a config.json, a spec, or a config (as load_model takes it).
        context: tokens of a sequence, as 65536 or "64k".
        sequences: how many sequences of `context` tokens the step trains on; 1 where neither this nor lengths is given.
        lengths: the tokens of every document of the step, where documents are packed into sequences and attend only
            to themselves, and recurrent state starts anew with each; a list, an array or a tensor. Padding is not
            counted. `context` is the longest that a document can be.
        mixer: the mixer to put into every layer, such as "power:p=2"; the model's own where None.
        convention: how FLOPs are counted; Convention() where None. Convention(causal="full", form="chunked") counts
            what torch's FlopCounterMode counts (docs/accounting.md).

    Returns:
        An int; a Fraction where a convention counts a mean that is not whole over the step.

    Raises:
        InputError: an argument cannot be used; the message begins with the argument's name.

    Examples:
        >>> flops_per_step("gpt2-small", 1024, sequences=8)
        6536155889664
        >>> flops_per_step("gpt2-small", 1024, lengths=[600, 300, 124])
        784770859008
    """
    longest = context_of(context, parameter("context"))
    if sequences is not None and lengths is not None:
        raise InputError(f"{parameter('sequences')} and {parameter('lengths')} are one step twice; give one of them")
    if lengths is None:
        count = 1 if sequences is None else parse_integer(text_of(sequences), parameter("sequences"), 1, MAX_COUNT)
        documents = {longest: count}
    else:
        documents = _documents(lengths, longest)
    accounting = _accounting(read_model(model).spec, mixer, convention_of(convention))
    flops: Rational = sum(document_flops(accounting, tokens) * count for tokens, count in documents.items())
    return integer_if_whole(flops)


@lru_cache(MAX_MODELS)
def _accounting(spec: ModelSpec, mixer: str | None, convention: Convention | None) -> Accounting:
    return Accounting(read_model(spec, mixer).spec, convention)


def _documents(lengths: Any, longest: int) -> dict[int, int]:
    """Return how many documents there are of each length; raises InputError where `lengths` are none."""
    where = parameter("lengths")
    documents = counted(lengths, where)
    if (largest := max(documents)) > longest:
        raise InputError(f"a document of {largest:,} tokens does not fit the context of {longest:,}", where)
    return documents
