"""Experts, values and rows, of which a token picks some: what one has, what a batch touches, what lives on the host."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from powerplan.accounting import Accounting
from powerplan.dtypes import Dtypes
from powerplan.ffn import FFN, Picks
from powerplan.mixers.formulas import total
from powerplan.spec import LayerUse


def touched_experts(experts: int, top_k: int, batch: int) -> Fraction:
    """Return the expected number of experts that a batch touches, E(1 - (1 - k/E)^B), if each token picks evenly.

    Likewise for values of a memory and for rows of a table: at most B k of them, and never more than there are.
    """
    return experts * (1 - (1 - Fraction(top_k, experts)) ** batch)


def picking_uses(accounting: Accounting) -> Iterator[tuple[LayerUse, FFN, Picks]]:
    """Yield the layers of a model whose FFN has entries that a token picks some of."""
    for use in accounting.uses:
        ffn = use.layer.ffn
        if ffn is not None and ffn.picks is not None:
            yield use, ffn, ffn.picks


def entry_bytes(accounting: Accounting, use: LayerUse, ffn: FFN, picks: Picks, dtypes: Dtypes) -> Fraction:
    """Return the bytes of one entry in all layers of one kind; 0 where every token uses all of what is no table."""
    idle = picks.entries - picks.picked
    if idle:
        return accounting.idle_bytes(use, dtypes) / idle
    wide = Fraction(total(ffn.host_terms(accounting.spec.hidden_size)), picks.entries)
    return wide * use.count * dtypes.weight_bytes


def touched_bytes(accounting: Accounting, dtypes: Dtypes, batch: int) -> Fraction:
    """Return the bytes of the entries that a batch touches beyond those that one token picks."""
    beyond = Fraction(0)
    for use, ffn, picks in picking_uses(accounting):
        if picks.entries > picks.picked:
            more = touched_experts(*picks, batch) - picks.picked
            beyond += entry_bytes(accounting, use, ffn, picks, dtypes) * more
    return beyond


def prompt_bytes(accounting: Accounting, dtypes: Dtypes, tokens: int) -> Fraction:
    """Return the bytes of weights that so many tokens of a prompt read at once.

    What a decoding step reads, and of experts, values and rows all that as many tokens can pick: min(E, a tokens) of E.
    It is a bound, where a step has the expected number: that takes powers of as many digits as there are tokens.
    """
    read = accounting.read_bytes(dtypes)
    for use, ffn, picks in picking_uses(accounting):
        if picks.entries > picks.picked:
            more = min(picks.entries, picks.picked * tokens) - picks.picked
            read += entry_bytes(accounting, use, ffn, picks, dtypes) * more
    return read


def host_parameters(accounting: Accounting) -> int:
    """Return the parameters that live in the memory of the host; those of tied layers once."""
    hidden = accounting.spec.hidden_size
    own = ((use, ffn) for use, ffn, _ in picking_uses(accounting) if not use.layer.tied)
    return sum(int(total(ffn.host_terms(hidden))) * use.count for use, ffn in own)


def host_bytes(accounting: Accounting, dtypes: Dtypes) -> Fraction:
    """Return the bytes of the weights that live in the memory of the host; those of tied layers once."""
    return _on_host(accounting, dtypes, None)


def fetched_bytes(accounting: Accounting, dtypes: Dtypes, batch: int) -> Fraction:
    """Return the bytes of weights on the host that one decoding step of a batch touches; tied layers fetch again."""
    return _on_host(accounting, dtypes, batch)


def _on_host(accounting: Accounting, dtypes: Dtypes, batch: int | None) -> Fraction:
    """Return the bytes of entries on the host: all that are stored, or those that a batch touches."""
    found = Fraction(0)
    for use, ffn, picks in picking_uses(accounting):
        if ffn.host_terms(accounting.spec.hidden_size) and not (batch is None and use.layer.tied):
            rows = picks.entries if batch is None else touched_experts(*picks, batch)
            found += entry_bytes(accounting, use, ffn, picks, dtypes) * rows
    return found
