"""The number formats that bytes are counted in: of weights, of the key/value cache, of recurrent state."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Literal

from powerplan.errors import InputError, check_word, parameter, shown
from powerplan.lists import parse_settings
from powerplan.units import parse_integer

DTYPE_BYTES = {
    "fp32": Fraction(4),
    "bf16": Fraction(2),
    "fp16": Fraction(2),
    "fp8": Fraction(1),
    "int4": Fraction(1, 2),
}
"""Bytes per element of each number format."""

CACHE_BITS = {"fp32": 32, "bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "int4": 4, "fp4": 4, "int2": 2}
"""Bits per element of each number format that a key/value cache may have."""

GROUP_DEFAULTS = {
    "fp8": ("fp32", "none"),
    "int8": ("fp16", "fp16"),
    "int4": ("fp16", "fp16"),
    "fp4": ("fp8", "none"),
    "int2": ("fp16", "fp16"),
}
"""The formats of a group's scale and zero point where none are given, by the format of its elements.

int: KIVI (Liu et al. 2024, arXiv 2402.02750; quant/new_pack.py keeps scale and minimum in the 16 bits of the keys).
fp8: vLLM's fp8_per_token_head (v1/kv_cache_interface.py, AttentionSpec.page_size_bytes: fp32 scales). fp4: NVFP4 (the
same file, FullAttentionSpec: an fp8 scale for every 16 elements).
"""

LARGEST_GROUP = 65_536
"""The most elements of a cache that share a scale: larger groups have no part in the bytes."""

STATE_DTYPE = "fp32"
"""The format of recurrent state where none is chosen: what kernels and reference implementations keep it in."""


@cache
def cache_element_bits(text: str) -> Fraction:
    """Return the bits of an element of a cache, from "fp8", or with its share of a scale from "int4:group=64".

    A group has one scale and, unless `zero` is none, one zero point: "int4:group=64,scale=fp16,zero=none". Plain names
    have no scales of their own for tokens, as vLLM's fp8 with one scale a tensor. All elements are in full groups: what
    is left over in a head that the group does not divide is not counted.

    Raises InputError for anything else; the message begins with the parameter's name.
    """
    where = parameter("cache_dtype")
    word, colon, rest = text.partition(":")
    check_word(word, list(CACHE_BITS), where)
    if not colon:
        return Fraction(CACHE_BITS[word])
    if word not in GROUP_DEFAULTS:
        raise InputError(f"{word} has no scales; groups are for {', '.join(GROUP_DEFAULTS)}", where)
    settings = parse_settings(rest, ("group", "scale", "zero"), where, f"{word}:group=64,scale=fp16,zero=none")
    if "group" not in settings:
        raise InputError(f"{shown(text)} has no group; write {word}:group=64", where)
    group = parse_integer(settings["group"], f"{where} group", 1, LARGEST_GROUP)
    formats = dict(zip(("scale", "zero"), GROUP_DEFAULTS[word], strict=True)) | settings
    shared = 0
    for key in ("scale", "zero"):
        check_word(formats[key], [*CACHE_BITS, *(["none"] if key == "zero" else [])], f"{where} {key}")
        shared += CACHE_BITS.get(formats[key], 0)
    return CACHE_BITS[word] + Fraction(shared, group)


@dataclass(frozen=True)
class Dtypes:
    """The number formats that were asked for, words of DTYPE_BYTES; None where one was not.

    dtype: of weights and of the key/value cache, where nothing else is said of them.
    weights_dtype: of all weights, whatever the quantization of the model says. cache_dtype: of the key/value cache and
    of the last inputs that short convolutions keep; a word of CACHE_BITS, with the scales of its groups where they are
    to be counted (`cache_element_bits`). state_dtype: of recurrent state, fp32 where None.
    Raises InputError for a word that is no format.
    """

    dtype: str = "bf16"
    weights_dtype: str | None = None
    cache_dtype: str | None = None
    state_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.cache_dtype is not None:
            if not isinstance(self.cache_dtype, str):
                raise InputError(f"{shown(self.cache_dtype)} is not a text", parameter("cache_dtype"))
            cache_element_bits(self.cache_dtype)
        for name, value in vars(self).items():
            if name == "dtype" or (name != "cache_dtype" and value is not None):
                check_word(value, list(DTYPE_BYTES), parameter(name))

    @property
    def weights(self) -> str:
        """The format of weights that no quantization of the model covers."""
        return self.weights_dtype or self.dtype

    @property
    def cache(self) -> str:
        return self.cache_dtype or self.dtype

    @property
    def state(self) -> str:
        return self.state_dtype or STATE_DTYPE

    @property
    def weight_bytes(self) -> Fraction:
        """Bytes per weight that no quantization of the model covers."""
        return DTYPE_BYTES[self.weights]

    @property
    def cache_bytes(self) -> Fraction:
        """Bytes per element of the key/value cache, its share of scales and zero points included."""
        return cache_element_bits(self.cache) / 8

    @property
    def activations(self) -> Literal["bf16", "fp16", "fp32"]:
        """The format of activations: that of `dtype`, and bf16 where it is one that weights alone are stored in."""
        return "fp32" if self.dtype == "fp32" else "fp16" if self.dtype == "fp16" else "bf16"

    @property
    def activation_bytes(self) -> Fraction:
        """Bytes per element of activations."""
        return DTYPE_BYTES[self.activations]

    @property
    def state_bytes(self) -> Fraction:
        """Bytes per element of recurrent state."""
        return DTYPE_BYTES[self.state]


def dtypes_of(dtypes: Dtypes | str) -> Dtypes:
    """Return `dtypes`; one word, such as "fp8", is the format of weights and cache."""
    return dtypes if isinstance(dtypes, Dtypes) else Dtypes(dtypes)
