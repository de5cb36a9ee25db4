"""The examples run, and say something true."""

from __future__ import annotations

import math
import os
import re
import runpy
import signal
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from children import HUNG_S

from powerplan.accounting import Accounting
from powerplan.cli import main
from powerplan.dims import spow_dim
from powerplan.load import catalogue_text, load_model
from powerplan.units import format_ratio

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str, *arguments: str, folder: Path | None = None) -> str:
    """Return what an example prints: one screen of 100 columns."""
    command = [sys.executable, EXAMPLES / name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HUNG_S, cwd=folder)
    assert done.returncode == 0, done.stderr
    check_screen(done.stdout)
    return done.stdout


def check_screen(text: str) -> None:
    lines = text.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 100


def ending(name: str) -> int:
    """Run an example as a script, but in this process, which has imported torch once; return its exit code."""
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return int(ended.value.code or 0)


def numbers(line: str) -> list[float]:
    return [float(word) for word in re.findall(r"[0-9]+(?:\.[0-9]+)?", line.replace(",", ""))]


def test_plan_from_config() -> None:
    out = run("plan_from_config.py", "llama-3-8b", "64k")
    assert "llama-3-8b at 65,536 tokens" in out
    assert "power:p=2    WSFR   5.51:1" in out


def test_use_kernel() -> None:
    rows = [numbers(line) for line in run("use_kernel.py", "40").splitlines() if re.match(r" +[0-9]+  ", line)]
    steps, losses, right = zip(*(row[:3] for row in rows), strict=True)
    assert steps == tuple(range(0, 41, 4))
    assert losses[0] == pytest.approx(math.log(16), rel=0.05)
    assert losses[-1] < 0.5 * losses[0]
    assert right[0] < 20
    assert right[-1] > 80


def test_context_parallel() -> None:
    """One process, and two that share each sequence, learn the same in each step."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, EXAMPLES / "context_parallel.py"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HUNG_S)
    assert done.returncode == 0, done.stderr
    check_screen(done.stdout)
    rows = []
    for out, first, sent in ((run("context_parallel.py"), "1, 64", "0"), (done.stdout, "2, 32", "296,064")):
        assert f"ContextParallel(rank 0 of {first} of 64 tokens of sequences" in out
        assert f"It sends {sent} bytes a pass." in out
        rows.append([numbers(line) for line in out.splitlines() if re.match(r" +[0-9]+  ", line)])
    assert [row[0] for row in rows[0]] == [row[0] for row in rows[1]] == list(range(0, 61, 6))
    # Rounding errors grow with the steps, as in any training.
    assert [row[1] for row in rows[1][:5]] == pytest.approx([row[1] for row in rows[0][:5]], abs=0.005)
    for each in rows:
        assert each[0][2] < 20
        assert each[-1][2] > 90


def test_mfu() -> None:
    out = run("mfu.py", "6")
    rows = [numbers(line) for line in out.splitlines() if re.match(r" +[0-9]+  ", line)]
    steps, losses, flops, shares = zip(*rows, strict=True)
    assert steps == tuple(range(1, 7))
    assert losses[0] == pytest.approx(math.log(256), rel=0.05)
    assert losses[-1] < losses[0] - 1
    assert set(flops) == {8_537_112_576}
    assert min(shares) > 0  # A busy processor gives any share: its peak is measured before the steps are.
    assert "packed from documents of 300, 200 and 12: 8,131,608,576 FLOPs per step" in out


def test_decode_constant() -> None:
    out = run("decode_constant.py", "gpt2-small", "256,512,1k")
    rows = [numbers(line) for line in out.splitlines() if re.match(r" +[0-9,]+  ", line)]
    contexts, keys, key_times, states, state_times = zip(*rows, strict=True)
    assert contexts == (256, 512, 1024)
    assert keys == pytest.approx([2 * 768 * 4 * context / 2**20 for context in contexts], rel=1e-3)
    assert states == (pytest.approx(12 * spow_dim(64, 2) * 65 * 4 / 2**20, rel=1e-3),) * 3
    assert all(time > 0 for time in (*key_times, *state_times))


def test_convert_spec(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = run("convert_spec.py", "llama-3-8b", "64k", "converted.yaml", folder=tmp_path)
    path = tmp_path / "converted.yaml"
    converted = load_model(path).spec
    kinds = [use.layer.mixer.describe() for use in converted.layer_uses() if use.layer.mixer]
    assert [(use.count, kind) for use, kind in zip(converted.layer_uses(), kinds, strict=True)] == [
        (24, "attention, window 4,096"),
        (8, "power p=2"),
    ]
    assert main(["wsfr", str(path), "--ctx", "64k"]) == 0
    ratio = format_ratio(Accounting(converted).row(65_536).wsfr or Fraction(0))
    assert ratio in capsys.readouterr().out
    last = next(line for line in out.splitlines() if "3 windows : 1 power" in line)
    assert ratio in last


def test_convert_spec_looks_where_it_will_write(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(catalogue_text("gpt2-small"), encoding="utf-8")
    for out, problem in (
        ("no/out.yaml", "no/out.yaml: there is no folder no"),
        ("mine.yaml", "mine.yaml is the file that"),
    ):
        command = [sys.executable, EXAMPLES / "convert_spec.py", "mine.yaml", "64k", out]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"error: OUT: {problem}")


@pytest.mark.transformers
def test_transformers_power() -> None:
    pytest.importorskip("transformers")
    out = run("transformers_power.py", "60")
    assert "attn_implementation='power'" in out
    losses = [numbers(line)[1] for line in out.splitlines() if re.match(r" +[0-9]+  +[0-9.]+$", line)]
    assert losses[-1] < 0.2 * losses[0]
    assert "> the past folds into a state of constant size" in out
    kept = [line.split()[1:3] for line in out.splitlines() if re.match(r" +[0-9,]+ .*iB", line)]
    assert kept == [["36.12", "KiB"]] * 3


PLAIN = {
    "plan_from_config.py": "llama-3-8",
    "convert_spec.py": "llama-3-8",
    "decode_constant.py": "gpt2-smal",
    "use_kernel.py": "many",
    "mfu.py": "many",
    "context_parallel.py": "many",
    "transformers_power.py": "many",
}


@pytest.mark.parametrize("name", PLAIN)
def test_examples_say_how_they_are_used_and_what_was_wrong(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "transformers_power.py":
        pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)

    def exit_code(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        return ending(name)

    for asked in (["--help"], ["-h"], ["2", "--help"]):
        assert exit_code(*asked) == 0
        usage = capsys.readouterr().out
        assert re.search(rf"Usage: (python|torchrun --nproc-per-node 2) examples/{name}", usage)
        check_screen(usage)
    takes = len(re.findall(r"\[[A-Z.a-z]+\]", usage))
    for wrong, named in (
        ([PLAIN[name]], PLAIN[name]),
        (["--steps"], "'--steps'"),
        (["1"] * takes + ["'more'\n", "3"], "\"'more'\\n\" is one argument too many; --help says which there are"),
    ):
        assert exit_code(*wrong) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        (line,) = printed.err.splitlines()
        assert line.startswith("error: ")
        assert named in line
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) < 100


@pytest.mark.parametrize(
    ("name", "contexts", "problem"),
    [
        ("plan_from_config.py", "0", "CONTEXT: '0' is out of range"),
        ("convert_spec.py", "64q", "CONTEXT: '64q' is not a size in tokens"),
        ("decode_constant.py", "1k,,4k", "CONTEXTS: '' is not a size in tokens"),
        ("decode_constant.py", "1k,1G", "CONTEXTS: 1,073,741,824 tokens take too long; 65,536 are the most"),
    ],
)
def test_examples_name_the_context_that_is_wrong(
    name: str, contexts: str, problem: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "gpt2-small", contexts])
    assert ending(name) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"error: {problem}")


NEEDED = {
    "plan_from_config.py": ["powerplan"],
    "convert_spec.py": ["powerplan"],
    "decode_constant.py": ["torch"],
    "use_kernel.py": ["torch"],
    "mfu.py": ["torch"],
    "context_parallel.py": ["torch"],
    "transformers_power.py": ["torch", "transformers"],
    "train_icl.py": ["torch", "tabulate"],
}
"""A package, or several, that each example says it needs, where it is missing."""
INSTALLED_BY = {"powerplan": "[.]", "transformers": "'transformers>=[0-9.]+'"}


@pytest.mark.parametrize(("name", "package"), [(name, one) for name, needed in NEEDED.items() for one in needed])
def test_examples_name_the_package_that_is_missing(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name])
    if package == "tabulate":
        monkeypatch.delitem(sys.modules, "icl.result", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    assert ending(name) == 4
    printed = capsys.readouterr()
    assert printed.out == ""
    expected = f"error: this example needs {package}, and it is not installed: pip install "
    assert re.fullmatch(f"{expected}{INSTALLED_BY.get(package, package)}\n", printed.err)


def test_examples_say_that_a_package_does_not_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As torch where a library that it brings is missing or is built for another machine."""
    monkeypatch.setattr(sys, "argv", ["use_kernel.py"])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torch")
    for code, told in (
        ("raise ImportError('no kernel image', name='torch._C')", "torch does not load: no kernel image"),
        ("raise OSError('libcudart.so.12: cannot open shared object file')", "libcudart.so.12: cannot open shared"),
    ):
        (tmp_path / "torch.py").write_text(code, encoding="utf-8")
        assert ending("use_kernel.py") == 4
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {told}")


@pytest.mark.parametrize("name", PLAIN)
def test_ctrl_c_ends_an_example_in_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "transformers_power.py":
        pytest.importorskip("transformers")

    def interrupted(*_: object) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the signal has not come")

    for parse in ("parse_integer", "parse_context", "parse_contexts"):  # What every example calls first, or soon.
        monkeypatch.setattr(f"powerplan.units.{parse}", interrupted)
    monkeypatch.setattr(sys, "argv", [name])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # A background job would have it ignored.
    try:
        assert ending(name) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "error: interrupted\n")


AT_IMPORT = """
import os, runpy, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[2]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
sys.path.insert(0, os.path.dirname(sys.argv[1]))
runpy.run_path(sys.argv[1], run_name="__main__")
"""
"""Run a script with a signal that comes when a module is about to be imported."""


@pytest.mark.parametrize(("name", "module"), [("use_kernel.py", "torch._C"), ("train_icl.py", "icl.curves")])
def test_ctrl_c_while_an_example_is_loaded(name: str, module: str) -> None:
    command = [sys.executable, "-c", AT_IMPORT, EXAMPLES / name, module]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HUNG_S, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")


def test_a_reader_that_has_gone_ends_an_example() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, EXAMPLES / "plan_from_config.py", "gpt2-small", "1k"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=HUNG_S, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_hybrid_spec() -> None:
    loaded = load_model(EXAMPLES / "hybrid.yaml")
    accounting = Accounting(loaded.spec)
    assert [use.count for use in accounting.uses] == [12, 4]
    assert accounting.wsfr(65_536) == pytest.approx(5.705, rel=1e-3)


def test_train_icl_says_what_it_takes() -> None:
    """What it does is held by tests/test_train_icl.py."""
    command = [sys.executable, EXAMPLES / "train_icl.py", "--help"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "--mixers LIST" in out


def test_every_example_is_tested() -> None:
    """plan_in_a_notebook.ipynb is run by tests/test_docs_site.py; script.py is what all of them use."""
    text = Path(__file__).read_text(encoding="utf-8")
    assert all(path.name in text for path in EXAMPLES.iterdir() if path.is_file())
