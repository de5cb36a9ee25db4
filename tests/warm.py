"""A child that has powerplan loaded, and forks for each command line: 15 ms in place of the 400 of a new process."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from powerplan.cli import main, run

CLOSED, GONE = "closed", "gone"
"""Streams that are closed, and pipes whose other end is. Any other stream is the path of a file."""


COMMANDS = [
    "--help",
    "wsfr zzz",
    "wsfr",
    "models",
    "dims",
    "hardware",
    "schema",
    "reproduce",
    "budget gpt2-small --flops 1e21",
]
COMMANDS += ["compare gpt2-small gpt2-xl", "decode gpt2-small", "recommend gpt2-small --only power"]
"""What the child does before anything is asked of it."""


@dataclass(frozen=True)
class Done:
    """How a command ended: its exit code (negative after a signal), and what it wrote into files."""

    code: int
    out: bytes
    err: bytes


class Warm:
    """The child, as a context manager."""

    def __enter__(self) -> Warm:
        self.folder = tempfile.TemporaryDirectory()
        command = [sys.executable, __file__]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        self.child.stdin.close()
        self.child.wait()
        self.child.stdout.close()
        self.folder.cleanup()

    def run(
        self, arguments: Sequence[str], stdin: str = "/dev/null", stdout: str | None = None, stderr: str | None = None
    ) -> Done:
        """Run a command line in the working directory of this process; None for a stream captures it in a file."""
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        out, err = Path(self.folder.name, "out"), Path(self.folder.name, "err")
        for path in (out, err):
            path.write_bytes(b"")
        job = {
            "arguments": list(arguments),
            "folder": str(Path.cwd()),
            "streams": [stdin, stdout or str(out), stderr or str(err)],
        }
        self.child.stdin.write(json.dumps(job) + "\n")
        self.child.stdin.flush()
        code = int(self.child.stdout.readline())
        return Done(code, out.read_bytes(), err.read_bytes())


def serve() -> None:
    """Read jobs line by line, run each in a fork, and write its exit code."""
    for words in COMMANDS:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            main(words.split())  # Imports what a command needs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    jobs = os.fdopen(os.dup(0), encoding="utf-8")
    codes = os.dup(1)
    while line := jobs.readline():
        child = os.fork()
        if child == 0:
            os.close(codes)
            jobs.close()
            become(json.loads(line))
            return
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(codes, f"{code}\n".encode())


def become(job: dict[str, Any]) -> None:
    """Take the streams of a job as a new process has them, and run its command."""
    os.chdir(job["folder"])
    opened: list[int | None] = []
    for descriptor, what in enumerate(job["streams"]):  # Above 2, so that none takes the number of a closed stream.
        number: int | None = None
        if what == GONE:
            reader, writer = os.pipe()
            os.close(reader)
            number = fcntl.fcntl(writer, fcntl.F_DUPFD, 10)
            os.close(writer)
        elif what != CLOSED:
            other = os.open(what, os.O_WRONLY if descriptor else os.O_RDONLY)
            number = fcntl.fcntl(other, fcntl.F_DUPFD, 10)
            os.close(other)
        opened.append(number)
    streams: list[IO[str] | None] = []
    for descriptor, number in enumerate(opened):
        os.close(descriptor)
        if number is not None:
            os.dup2(number, descriptor)
            os.close(number)
        mode = "w" if descriptor else "r"
        streams.append(None if number is None else os.fdopen(descriptor, mode, closefd=False))
    sys.stdin, sys.stdout, sys.stderr = streams  # type: ignore[assignment]
    sys.argv = ["powerplan", *job["arguments"]]
    run()


if __name__ == "__main__":
    serve()
