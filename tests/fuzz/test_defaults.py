"""Random files of defaults: an answer, or one line that says what is wrong and where."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzzing import VALUES, ends_well, fuzz, hostile_words
from hypothesis import given
from hypothesis import strategies as st

from powerplan.cli.app import COMMANDS
from powerplan.defaults import OPTIONS

COMMAND_LINES = ["wsfr gpt2-small", "decode gpt2-small", "dims", "budget gpt2-small --tokens 1B", "schema"]

keys = st.sampled_from([*OPTIONS, "by", "flops", "kind", "output", "powerplan", "tool", *COMMANDS]) | hostile_words
texts = st.sampled_from([value for option in OPTIONS for value in VALUES.get(f"--{option}", ["1"])]) | hostile_words
quoted = texts.map(lambda text: '"' + text.encode("unicode_escape").decode().replace('"', '\\"') + '"')
values = quoted | st.sampled_from(
    ["1", "0.5", "1e21", "nan", "inf", "true", "[]", "{}", "1979-05-27", "[1, '8k']", "", "'"]
)
headers = st.sampled_from([*COMMANDS, "tool.powerplan", "x"]).map(lambda name: f"[{name}]")
lines = st.tuples(keys, values).map(lambda pair: f"{pair[0]} = {pair[1]}") | headers | hostile_words


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("defaults")
        patch.chdir(path)
        yield path


@fuzz(200)
@given(
    command=st.sampled_from(COMMAND_LINES),
    content=st.lists(lines, max_size=5).map("\n".join),
    project=st.booleans(),
)
def test_files_of_defaults(folder: Path, command: str, content: str, project: bool) -> None:
    own, other = folder / "powerplan.toml", folder / "pyproject.toml"
    for path in (own, other):
        path.unlink(missing_ok=True)
    raw = content.encode(errors="surrogateescape")
    (other if project else own).write_bytes(b"[tool.powerplan]\n" + raw if project else raw)
    ends_well(command.split())
