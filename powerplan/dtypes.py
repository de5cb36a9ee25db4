"""The number formats that bytes are counted in: of weights, of the key/value cache, of recurrent state."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from powerplan.errors import InputError, shown

DTYPE_BYTES = {
    "fp32": Fraction(4),
    "bf16": Fraction(2),
    "fp16": Fraction(2),
    "fp8": Fraction(1),
    "int4": Fraction(1, 2),
}
"""Bytes per element of each number format."""

STATE_DTYPE = "fp32"
"""The format of recurrent state where none is chosen: what kernels and reference implementations keep it in."""


@dataclass(frozen=True)
class Dtypes:
    """The number formats that were asked for, words of DTYPE_BYTES; None where one was not.

    dtype: of weights and of the key/value cache, where nothing else is said of them.
    weights_dtype: of all weights, whatever the quantization of the model says. cache_dtype: of the key/value cache and
    of the last inputs that short convolutions keep. state_dtype: of recurrent state, fp32 where None.
    Raises InputError for a word that is no format.
    """

    dtype: str = "bf16"
    weights_dtype: str | None = None
    cache_dtype: str | None = None
    state_dtype: str | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value not in DTYPE_BYTES and not (value is None and name != "dtype"):
                raise InputError(f"{name} must be {', '.join(DTYPE_BYTES)}, and is {shown(value)}")

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
        """Bytes per element of the key/value cache."""
        return DTYPE_BYTES[self.cache]

    @property
    def state_bytes(self) -> Fraction:
        """Bytes per element of recurrent state."""
        return DTYPE_BYTES[self.state]


def dtypes_of(dtypes: Dtypes | str) -> Dtypes:
    """Return `dtypes`; one word, such as "fp8", is the format of weights and cache."""
    return dtypes if isinstance(dtypes, Dtypes) else Dtypes(dtypes)
