"""Whatever a saved profile holds, an answer or one line of error with exit code 2, and only text that prints.

POWERPLAN_FUZZ=20000 pytest tests/profile/test_saved_fuzz.py runs that many random examples instead of a few fixed ones.
"""

from __future__ import annotations

import copy
import functools
import io
import json
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from fuzzing import fuzz, hostile
from hypothesis import given
from hypothesis import strategies as st
from mutations import broken, mutated, nested, spots, words

from powerplan.choices import Format
from powerplan.cli import dispatch, main
from powerplan.cli.app import application
from powerplan.measured import SCHEMA, Measurement
from powerplan.profile.result import Crossover, Missing, Profile, Split

ROOT = Path(__file__).resolve().parents[2]
KINDS = (Measurement, Profile, Split, Crossover, Missing)
KEYS = sorted({field.encode_name for kind in KINDS for field in msgspec.structs.fields(kind)})
extremes: st.SearchStrategy[Any] = st.sampled_from(
    [0, -1, 1, 2**50, 2**50 + 1, 2**63, -(2**64), 10**400, 1e-15, 1e-16, 5e-324, 1e30, 1.1e30, 1e308, -0.0, 0.5]
)
texts = st.sampled_from(
    [
        *("forward", "forward+backward", "decode", "fwd", "train", "state", "layer", "power", "power:p=2", "power:p=0"),
        *("power:p=²", "window:0", "window:²", "window:" + "9" * 5000, "window:64", "attention:", "linear", "softmax"),
        *("\x7f", "a\x9b31mb", "tab\there", "\u202eabc", "a|b", "=1+1", "fp8", "h100-sxm", ""),
    ]
)
values = nested(words | hostile | texts) | extremes | st.floats() | texts


@st.composite
def rearranged(draw: st.DrawFn, data: Any) -> Any:
    """A profile with one to three of its own values copied over others, rows dropped or rows repeated."""
    data = copy.deepcopy(data)
    for _ in range(draw(st.integers(1, 3))):
        every = spots(data)
        *path, last = draw(st.sampled_from(every))
        parent = data
        for step in path:
            parent = parent[step]
        change = draw(st.sampled_from(["copy", "number", "repeat", "drop"]))
        if change == "copy":
            other = data
            for step in draw(st.sampled_from([spot for spot in every if spot[-1] == last or isinstance(last, int)])):
                other = other[step]
            parent[last] = copy.deepcopy(other)
        elif change == "number" and isinstance(parent[last], (int, float)):
            parent[last] = draw(extremes | st.floats() | st.integers())
        elif isinstance(parent, list):
            parent[last : last + 1] = [copy.deepcopy(parent[last])] * (2 if change == "repeat" else 0)
    return data


@pytest.fixture(scope="module")
def data() -> Any:
    """Return a real profile with fewer rows, something of each kind, and what no row of that file has."""
    data = json.loads((ROOT / "benchmarks" / "results" / "profile-cpu.json").read_text(encoding="utf-8"))
    for key in ("results", "split"):
        data[key] = [row for row in data[key] if row["name"] in ("power p=2", "softmax") and row["context"] == 4096]
    data["results"] = [row for row in data["results"] if row["pass"] == "forward+backward" or row["part"] == "state"]
    data["split"] = [row for row in data["split"] if row["pass"] == "forward+backward"]
    part = {"name": "aten::mm", "calls": 3, "seconds": 0.001}
    run = {"name": "softmax", "impl": "sdpa", "pass": "forward", "context": 4096, "parts": [part, part]}
    unsaid = {"what": "breakdown of decode", "reason": "no time is left for it"}
    return data | {"breakdown": [run], "missing": [*data["missing"][:3], unsaid]}


@pytest.fixture(scope="module", autouse=True)
def _one_application() -> Iterator[None]:
    """Keep the application of each command: making one takes as long as what it does with a file this small."""
    made = functools.cache(application)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "application_for", lambda arguments: made((arguments[0],)))
        yield


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "damaged.json"


def answer(arguments: list[str]) -> tuple[int, str]:
    """Return exit code and stdout of a command, after a check of what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(arguments)
    text, lines = out.getvalue(), err.getvalue().split("\n")
    assert lines.pop() == ""
    assert all(line.isprintable() for line in lines)
    if code == 0:
        assert text.endswith("\n")
        assert all(line.isprintable() for line in text.split("\n"))
        assert not any(line.startswith("error: ") for line in lines)
    else:
        assert code == 2
        assert text == ""
        assert len([line for line in lines if line.startswith("error: ")]) == 1
        assert all(line.startswith(("error: ", "note: ")) for line in lines)
    return code, text


def check(path: Path, raw: bytes) -> int:
    """Put the bytes of a saved profile through every format of --show, and through what plans with it."""
    path.write_bytes(raw)
    codes = set()
    for form in get_args(Format):
        code, text = answer(["profile", "--show", str(path), "--format", form])
        codes.add(code)
        if code == 0 and form == "json":
            assert json.loads(text)["schema"] == SCHEMA
    (shown,) = codes
    plan = ["gpt2-small", "--ctx", "4k", "--measured", str(path), "--format", "json"]
    for command in (["recommend", "--only", "linear"], ["budget"]):
        code, text = answer([*command, *plan])
        assert code == 2 or json.loads(text)
    return shown


def test_the_profile_itself_is_read(data: Any, path: Path) -> None:
    assert check(path, json.dumps(data).encode()) == 0


@fuzz(120)
@given(choice=st.data())
def test_any_saved_profile(choice: st.DataObject, data: Any, path: Path) -> None:
    kind = choice.draw(st.sampled_from(["broken", "rearranged", "bytes"]))
    if kind == "bytes":
        raw = choice.draw(mutated(json.dumps(data, indent=1)))
    else:
        changed = choice.draw(broken(data, values, KEYS) if kind == "broken" else rearranged(data))
        raw = json.dumps(changed, ensure_ascii=choice.draw(st.booleans())).encode("utf-8", "surrogatepass")
    check(path, raw)
