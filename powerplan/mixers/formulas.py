"""Formulas as text that is evaluated, the convention they follow, and the means over a causal mask that they use.

A formula is Python arithmetic kept as text. The same text is evaluated for the number and printed by `--explain`,
so what is explained cannot differ from what is computed. Values are ints and Fractions: exact, never a float.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from math import isqrt
from types import CodeType
from typing import get_args

from powerplan.choices import Causal, Form
from powerplan.errors import InputError, parameter

Rational = int | Fraction

Formulas = tuple[tuple[str, str], ...]
"""Pairs of a component and a formula for it."""

SYMBOLS = {
    "m": "hidden size",
    "V": "vocabulary",
    "T": "learned positions",
    "H": "query heads, or heads of a recurrent state",
    "G": "key/value heads",
    "k": "key head dim",
    "v": "value head dim",
    "t": "context",
    "cast": "1 where activations have 16 bits, else 0",
    "chunk": "tokens of a chunk or a window",
    "states": "recurrent states that are kept, per token",
    "padded": "tokens in whole windows, per token",
    "pieces": "parts of a chunk that share an anchor",
    "keys": "mean keys a query sees",
    "kept": "tokens whose keys and values are kept",
    "D": "dimension of phi(k)",
    "z": "1 with the normaliser, else 0",
    "late": "share of tokens after the first chunk",
    "earlier": "mean keys of a query's own chunk before it",
    "solve": "mean FLOPs to invert a chunk's triangular matrix",
    "J": "query and key heads of a delta rule",
    "W": "width of the short convolution",
    "u": "rank of a gate",
    "M": "memory slots",
    "I": "inner width of Mamba layers, channels of convolutions",
    "N": "state dim of a Mamba layer",
    "g": "groups that share B and C",
    "R": "rank of the step size",
    "levels": "states of the Fenwick tree",
    "asked": "mean states of the Fenwick tree a query meets",
    "rw": "rank of the decay",
    "ra": "rank of the in-context learning rate",
    "rv": "rank of the value residual",
    "rg": "rank of the output gate",
    "B": "state partitions",
    "chosen": "partitions a token writes and reads",
    "blocks": "blocks of keys, or a query's mean number of them",
    "picked": "mean keys in the blocks a query picks",
    "near": "mean keys in the window",
    "X": "indexer heads",
    "x": "indexer head dim",
    "top": "mean keys the indexer leaves a query",
    "q": "query LoRA rank",
    "L": "key/value LoRA rank",
    "o": "rank of the output projection",
    "P": "groups of the output projection",
    "c": "tokens that one entry compresses",
    "rest": "tokens that are not compressed yet",
    "closed": "1 once there is a compressed entry, else 0",
    "seen": "mean keys of a fixed pattern",
    "anchors": "mean anchors a query scores",
    "inside": "mean keys of a token's own document or question",
    "order": "gates of the Hyena operator",
    "S": "state of a distilled long convolution, per channel",
    "e": "features of a position",
    "y": "width of the filter network",
    "j": "inner layers of the filter network",
    "K": "tokens of the table of position features",
    "points": "points of an FFT, per token",
    "bits": "binary logarithm of the points of an FFT",
    "scales": "scales of the wavelets",
    "wave": "tokens of a block of the wavelets",
    "n": "key head dim without position",
    "r": "key head dim with RoPE",
    "f": "FFN width",
    "E": "experts",
    "a": "active experts",
    "s": "width of the shared experts",
    "l": "width of latent experts",
    "Z": "experts that compute nothing",
    "shared": "features of input and B that groups of heads share (Mamba)",
    "subkeys": "keys of each of two sets",
    "picks": "values that a query of a memory finds",
    "pre": "input width of a memory's neurons",
    "rank": "Tucker rank of a memory's keys",
    "vectors": "vectors of the hidden size",
    "elements": "further elements",
}
"""What each letter of a formula stands for. A formula with any other letter is refused when it is evaluated."""


@dataclass(frozen=True)
class Convention:
    """How FLOPs are counted; docs/accounting.md has the details.

    causal: "exact" counts the keys that a causal mask leaves, on average; "full" counts every key for every query.
    form: "recurrent" counts in proportion to the size of the state; "chunked" counts what a chunked kernel executes.
    lm_head: whether the output projection to the vocabulary counts as weight FLOPs.
    """

    causal: Causal = "exact"
    form: Form = "recurrent"
    lm_head: bool = True

    def __post_init__(self) -> None:
        for name, value, allowed in (("causal", self.causal, get_args(Causal)), ("form", self.form, get_args(Form))):
            if value not in allowed:
                raise InputError(f"{name} must be {' or '.join(allowed)}, and is {value!r}")


def convention_of(given: Convention | None) -> Convention:
    """Return a convention that is given, or the default one; raises InputError for anything else."""
    if given is not None and not isinstance(given, Convention):
        problem = "must be a Convention, such as Convention(form='chunked'), and is"
        raise InputError(f"{problem} {type(given).__name__}", parameter("convention"))
    return given or Convention()


def exact_text(value: Rational) -> str:
    """Return a number without rounding: 65,536, 32,768.5 or (1/3)."""
    if value.denominator == 1:
        return f"{int(value):,}"
    text = f"{float(value):,.10g}"
    return text if Fraction(text.replace(",", "")) == value else f"({value.numerator:,}/{value.denominator:,})"


@dataclass(frozen=True)
class Term:
    """One summand: the component that it belongs to, its formula, the values of the letters, and its own value."""

    component: str
    formula: str
    symbols: Mapping[str, Rational]
    value: Rational

    def substituted(self) -> str:
        """Return the formula with the numbers in place of the letters: 2·12·(64 + 64)·32,768.5."""

        def number(match: re.Match[str]) -> str:
            value = self.symbols.get(match[0])
            if value is None:
                return match[0]
            return exact_text(value)

        return re.sub(r"[A-Za-z_]+", number, self.formula).replace("*", "·")


@cache
def _compiled(formula: str) -> CodeType:
    code = compile(formula, "<formula>", "eval")
    unknown = set(code.co_names) - SYMBOLS.keys()
    assert not unknown, f"{formula}: SYMBOLS does not say what {', '.join(sorted(unknown))} stands for"
    return code


def term(component: str, formula: str, symbols: Mapping[str, Rational]) -> Term:
    """Evaluate a formula exactly: arithmetic over letters of SYMBOLS, a constant of this package, never user input."""
    value = eval(_compiled(formula), {"__builtins__": {}}, dict(symbols))
    assert isinstance(value, (int, Fraction)), f"{formula} is not exact: {value!r}"
    return Term(component, formula, symbols, value)


def total(terms: Iterable[Term]) -> Rational:
    """Return the exact sum of the values of `terms`."""
    return sum((summand.value for summand in terms), 0)


def exact_integer(value: Rational) -> int:
    """Return a count as an int, which it must be: one that is not whole comes of a wrong formula (AssertionError)."""
    assert value.denominator == 1, f"a count is not whole: {value}"
    return value.numerator


def integer_if_whole(value: Rational) -> Rational:
    """Return a whole number as an int: sums of ints take a tenth of the time of sums of fractions."""
    return value.numerator if value.denominator == 1 else value


def mean_keys(context: int, causal: Causal, window: int | None = None) -> Fraction:
    """Return the mean number of keys that a query attends to, over all t positions of one sequence.

    "exact" is (t+1)/2; with a window of w keys, the token itself included, it is w(w+1)/(2t) + (t-w)w/t.
    "full" is t, or w with a window. A window longer than the context counts as no window.
    """
    t = context
    w = t if window is None else min(window, t)
    if causal == "full":
        return Fraction(w)
    return Fraction(w * (w + 1), 2 * t) + Fraction((t - w) * w, t)


def mean_keys_in_chunks(context: int, causal: Causal, chunk_size: int) -> Fraction:
    """Return the mean number of keys that a query attends to in its own chunk; the last chunk may be short."""
    t = context
    c = min(chunk_size, t)
    whole, rest = divmod(t, c)
    if causal == "full":
        return Fraction(whole * c * c + rest * rest, t)
    return Fraction(whole * c * (c + 1) + rest * (rest + 1), 2 * t)


def least_keys_in_chunks(first: int, last: int, causal: Causal, chunk_size: int) -> Fraction:
    """Return the least `mean_keys_in_chunks` of all contexts of `first` to `last` tokens.

    At t = n c + r tokens, 0 <= r <= c, the mean is that of whole chunks less r(c - r)/t ("full"), or less half of that
    ("exact"). For one n that is largest at r = c(sqrt(n(n + 1)) - n), and smaller the further r is from there. For one
    r it is smaller the larger n is. So the least mean is in the chunk of `first` or in the next.
    """
    c, lows = chunk_size, (first, (first // chunk_size + 1) * chunk_size)
    contexts = [first]
    for low in lows:
        n = low // c
        high = min(last, (n + 1) * c)
        if low <= high:
            deepest = isqrt(c * c * n * (n + 1))
            contexts += [min(max(context, low), high) for context in (deepest, deepest + 1)]
    return min(mean_keys_in_chunks(context, causal, c) for context in contexts)


def mean_solve(context: int, causal: Causal, chunk_size: int) -> Fraction:
    """Return the mean FLOPs per token to invert the unit triangular matrix of each chunk by forward substitution.

    Row i of a chunk (from 0) is multiplied by the i rows above it. As a dense product ("full") that takes 2 i^2 FLOPs,
    and i (i - 1) without the zeros above their diagonals ("exact"): about 2c^2/3 and c^2/3 per token.
    """

    def chunk(c: int) -> int:
        return c * (c - 1) * (2 * c - 1 if causal == "full" else c - 2) // 3

    whole, rest = divmod(context, chunk_size)
    return Fraction(whole * chunk(chunk_size) + chunk(rest), context)
