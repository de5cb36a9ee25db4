"""The shape of a layer's heads, which one kind of mixer can take over from another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class HeadShape:
    """Heads of one layer: `heads` query heads share `kv_heads` key/value heads.

    head_dim counts the features of a key, v_head_dim those of a value.
    """

    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int

    def describe(self) -> str:
        """Return "6 heads of 128", or "32 (8 kv) heads of 192/128" where heads are shared and values are shorter."""
        dims = f"{self.head_dim}" if self.head_dim == self.v_head_dim else f"{self.head_dim}/{self.v_head_dim}"
        shared = "" if self.heads == self.kv_heads else f" ({self.kv_heads} kv)"
        return f"{self.heads}{shared} heads of {dims}"

    def label(self) -> str:
        """Return "6x128", or "32x128/8" where 8 key/value heads are shared: the name in a table."""
        shared = f"/{self.kv_heads}" if self.kv_heads != self.heads else ""
        return f"{self.heads}x{self.head_dim}{shared}"


class Inherited(NamedTuple):
    """What a new mixer takes from the one that it replaces: its fields, and remarks on what changes besides."""

    fields: dict[str, Any]
    remarks: tuple[str, ...] = ()
