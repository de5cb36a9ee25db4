"""The task `code`: bytes of the Python standard library that runs this, cut into contexts within one file each."""

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

LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
)
"""Folders that are no code of the library: installed packages, tests, tables of characters, prose."""

HELD_OUT_PERCENT = 10


@dataclass(frozen=True)
class File:
    """A file by its path in the library, with / between folders; its bytes; whether it is held out."""

    path: str
    content: bytes
    held_out: bool


def is_held_out(path: str) -> bool:
    """Whether a file is evaluated and never trained on, by a hash of its path: the same on every machine."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % 100 < HELD_OUT_PERCENT


def library_files(folder: Path, shortest: int) -> Iterator[File]:
    """Yield the Python files under `folder` of at least `shortest` bytes, sorted by path, but for those LEFT_OUT."""
    for path in sorted(folder.rglob("*.py")):
        relative = path.relative_to(folder)
        if LEFT_OUT.isdisjoint(relative.parts) and path.is_file():
            content = path.read_bytes()
            if len(content) >= shortest:
                yield File(relative.as_posix(), content, is_held_out(relative.as_posix()))


class Code:
    """Contexts of T + 1 bytes, each from one file, so that all T bytes of context are of the same file.

    An epoch cuts every training file into such pieces from an offset of its own, and shuffles them all. Held out:
    pieces of other files, starting anywhere, so that every position sees the same kind of text.
    """

    name = "code"
    vocabulary = 256
    measure = "loss"
    unit = "bits per byte"
    over = "bytes of context"

    def __init__(self, settings: TaskSettings, folder: Path | None = None) -> None:
        self.length = settings.context + 1
        self.batch_size, self.held_out_count = settings.batch, settings.held_out
        self.folder = folder or Path(sysconfig.get_path("stdlib"))
        files = list(library_files(self.folder, self.length))
        self.training = [file for file in files if not file.held_out]
        self.evaluated = [file for file in files if file.held_out]
        for kind, found in (("training", self.training), ("held-out", self.evaluated)):
            if not found:
                raise InputError(f"{self.folder} has no {kind} files of {self.length:,} bytes", "--context")
        self._text = torch.frombuffer(bytearray(b"".join(file.content for file in self.training)), dtype=torch.uint8)
        # Every epoch has as many pieces: all that fit into each file.
        self._batches = sum(len(file.content) // self.length for file in self.training) // self.batch_size
        if not self._batches:
            raise InputError(
                f"fewer pieces of {self.length:,} bytes than --batch asks for: {self.batch_size:,}", "--batch"
            )
        self._epoch: tuple[tuple[int, int], Tensor] | None = None

    def batch(self, seed: int, step: int) -> Batch:
        epoch, place = divmod(step, self._batches)
        starts = self._order(seed, epoch)[place * self.batch_size : (place + 1) * self.batch_size]
        return self._batch(self._text[starts[:, None] + torch.arange(self.length)])

    def _order(self, seed: int, epoch: int) -> Tensor:
        """Return where the pieces of an epoch start; every epoch has as many."""
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
        """The held-out pieces, from anywhere in the files: those whose place has the smallest hashes."""
        found: list[tuple[str, bytes]] = []
        for file in self.evaluated:
            for start in range(0, len(file.content) - self.length + 1, self.length):
                order = hashlib.sha256(f"{file.path}:{start}".encode()).hexdigest()
                found.append((order, file.content[start : start + self.length]))
        pieces = [piece for _, piece in sorted(found)[: self.held_out_count]]
        return torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.uint8).view(-1, self.length)

    def _batch(self, tokens: Tensor) -> Batch:
        place = torch.arange(1, self.length).expand(tokens.shape[0], -1)
        return Batch(tokens[:, :-1].long(), tokens[:, 1:].long(), place)

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
        """Return the bits per held-out byte of a table of byte pairs, counted in the training files, plus one each."""
        counts = torch.ones(256, 256, dtype=torch.float64)
        text = self._text.long()
        counts += torch.bincount(text[:-1] * 256 + text[1:], minlength=256 * 256).view(256, 256)
        bits = -(counts / counts.sum(1, keepdim=True)).log2()
        pieces = self._pieces.long()
        return float(bits[pieces[:, :-1], pieces[:, 1:]].mean())
