"""Standard streams that are closed, full or gone, in every combination: the exit code of the command, no traceback."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzzing import PROFILE, fuzz
from hypothesis import given
from hypothesis import strategies as st
from warm import CLOSED, GONE, Warm

COMMANDS = {
    "wsfr gpt2-small": 0,
    "wsfr gpt2-small --explain --format json": 0,
    "models --format json": 0,
    "models gpt2-small --yaml": 0,
    "compare gpt2-small gpt2-xl": 0,
    "budget gpt2-small --flops 1e21": 0,
    "budget gpt2-small gpt2-xl --ctx 8k,64k --flops 1e21": 0,
    "budget --flops 1e21 --ctx 8k": 0,
    "decode gpt2-small": 0,
    "dims": 0,
    "hardware": 0,
    "schema": 0,
    "reproduce table2": 0,
    "recommend gpt2-small --only power --ctx 64k": 0,
    "recommend gpt2-small --only power --write out.yaml --force": 0,
    f"profile --show {PROFILE}": 0,
    "--help": 0,
    "--version": 0,
    "": 0,
    "decode --help": 0,
    "wsfr": 2,
    "wsfr nope": 2,
    "nope": 2,
    "wsfr gpt2-small --form x": 2,
    "dims --p 99": 2,
    "profile --save nope/": 2,
    "recommend gpt2-small --max-state 1": 3,
}
"""Commands and their exit codes."""

ERRORS = (CLOSED, GONE, "/dev/full", "/dev/null", None)


@pytest.fixture(scope="module")
def warm() -> Iterator[Warm]:
    with Warm() as child:
        yield child


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("streams")
        patch.chdir(path)
        yield path


@fuzz(60)
@given(
    command=st.sampled_from(sorted(COMMANDS)),
    stdin=st.sampled_from([CLOSED, GONE, "/dev/null", "/dev/zero"]),
    stdout=st.sampled_from(ERRORS),
    stderr=st.sampled_from(ERRORS),
)
def test_streams(warm: Warm, command: str, stdin: str, stdout: str | None, stderr: str | None) -> None:
    done = warm.run(command.split(), stdin, stdout, stderr)
    code = COMMANDS[command]
    assert done.code == (4 if code == 0 and stdout == "/dev/full" else code)
    assert b"Traceback" not in done.err
    if stdout is None:
        assert bool(done.out) == (code == 0)
    if stderr is None:
        errors = [line for line in done.err.splitlines() if line.startswith(b"error: ")]
        assert len(errors) == (1 if done.code else 0)
