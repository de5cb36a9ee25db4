"""The task `code`: the source text of the Python standard library that runs this, byte by byte.

Each sequence comes from a single file.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icl.settings import TaskSettings
from icl.tasks import Batch, generator
from powerplan.errors import InputError

EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
)
"""Folders that are not code of the library itself: installed packages, tests, tables of characters, prose."""

HELD_OUT_PERCENT = 10
"""Share of the files that are evaluated and never trained on."""


@dataclass(frozen=True)
class File:
    """A file of the library.

    Attributes:
        path: Its path in the library, with / between folders.
        content: Its bytes.
        held_out: Whether it is evaluated and never trained on.
    """

    path: str
    content: bytes
    held_out: bool


def is_held_out(path: str) -> bool:
    """Return whether a file is held out. A hash of its path decides, so the answer is the same on every machine."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % 100 < HELD_OUT_PERCENT


def library_files(folder: Path, shortest: int) -> Iterator[File]:
    """Yield the Python files under `folder` of at least `shortest` bytes, sorted by path, without EXCLUDED_FOLDERS."""
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if EXCLUDED_FOLDERS.isdisjoint(relative.parts) and path.is_file():
            content = path.read_bytes()
            if len(content) >= shortest:
                yield File(relative.as_posix(), content, is_held_out(relative.as_posix()))


class Code:
    """Pieces of T + 1 bytes, each from one file: T tokens, and the byte after each of them as its target.

    An epoch cuts every training file into pieces, from a random offset on, and shuffles all pieces. The held-out pieces
    come from other files and start anywhere in them, so that every position sees the same kind of text.
    """

    name = "code"
    vocabulary = 256
    measure = "loss"
    unit = "bits per byte"
    x_label = "bytes of context"

    def __init__(self, settings: TaskSettings, folder: Path | None = None) -> None:
        self.length = settings.context + 1
        self.batch_size, self.held_out_count = settings.batch, settings.held_out
        self.folder = folder or Path(sysconfig.get_path("stdlib"))
        files = list(library_files(self.folder, self.length))
        self.training = [file for file in files if not file.held_out]
        self.evaluated = [file for file in files if file.held_out]
        for kind, some_files in (("training", self.training), ("held-out", self.evaluated)):
            if not some_files:
                raise InputError(f"{self.folder} has no {kind} files of {self.length:,} bytes", "--context")
        self._text = torch.frombuffer(bytearray(b"".join(file.content for file in self.training)), dtype=torch.uint8)
        # Every epoch has the same number of pieces: as many as fit into each file.
        self._batches = sum(len(file.content) // self.length for file in self.training) // self.batch_size
        if not self._batches:
            raise InputError(
                f"fewer pieces of {self.length:,} bytes than --batch asks for: {self.batch_size:,}", "--batch"
            )
        self._epoch: tuple[tuple[int, int], Tensor] | None = None

    def batch(self, seed: int, step: int) -> Batch:
        epoch, index = divmod(step, self._batches)
        starts = self._shuffled_starts(seed, epoch)[index * self.batch_size : (index + 1) * self.batch_size]
        return self._batch(self._text[starts[:, None] + torch.arange(self.length)])

    def _shuffled_starts(self, seed: int, epoch: int) -> Tensor:
        """Return the positions in the text at which the pieces of an epoch start, in the order of training."""
        if self._epoch is None or self._epoch[0] != (seed, epoch):
            rng = generator(seed, epoch)
            starts, begin = [], 0
            for file in self.training:
                size = len(file.content)
                count = size // self.length
                spare = size - count * self.length
                offset = int(torch.randint(spare + 1, (), generator=rng))
                starts.append(begin + offset + self.length * torch.arange(count))
                begin += size
            order = torch.cat(starts)
            self._epoch = (seed, epoch), order[torch.randperm(order.numel(), generator=rng)]
        return self._epoch[1]

    def held_out(self) -> Batch:
        return self._batch(self._pieces)

    @cached_property
    def _pieces(self) -> Tensor:
        """The held-out pieces [held_out_count, T + 1]. A hash of path and start decides which ones are taken."""
        hashed: list[tuple[str, bytes]] = []
        for file in self.evaluated:
            for start in range(0, len(file.content) - self.length + 1, self.length):
                digest = hashlib.sha256(f"{file.path}:{start}".encode()).hexdigest()
                hashed.append((digest, file.content[start : start + self.length]))
        pieces = [piece for _, piece in sorted(hashed)[: self.held_out_count]]
        return torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.uint8).view(-1, self.length)

    def _batch(self, tokens: Tensor) -> Batch:
        curve_x = torch.arange(1, self.length).expand(tokens.shape[0], -1)
        return Batch(tokens[:, :-1].long(), tokens[:, 1:].long(), curve_x)

    def describe(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for file in (*self.training, *self.evaluated):
            digest.update(file.path.encode() + b"\0" + file.content)
        return {
            "source": f"standard library of Python {sysconfig.get_python_version()}",
            "training_files": len(self.training),
            "training_bytes": self._text.numel(),
            "held_out_files": [file.path for file in self.evaluated],
            "held_out_bytes": sum(len(file.content) for file in self.evaluated),
            "evaluated_bytes": self._pieces.numel(),
            "sha256": digest.hexdigest(),
            "baselines": {"one byte of context": self.bigram_bits()},
        }

    def bigram_bits(self) -> float:
        """Return the bits per held-out byte of a bigram model, which counts pairs in the training files (plus 1)."""
        counts = torch.ones(256, 256, dtype=torch.float64)
        text = self._text.long()
        counts += torch.bincount(text[:-1] * 256 + text[1:], minlength=256 * 256).view(256, 256)
        bits = -(counts / counts.sum(1, keepdim=True)).log2()
        pieces = self._pieces.long()
        return float(bits[pieces[:, :-1], pieces[:, 1:]].mean())
