"""examples/train_icl.py under torchrun: ranks that share sequences and batches train as one process does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from children import HUNG_S
from icl_on_ranks import CASES, COUNT, all_work, begin
from ranks import run_in

from icl.ranks import command_line
from powerplan.errors import InputError
from train_icl import _check_shared, _experiment, main

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "train_icl.py"


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of four processes, and what each of them found: one start of them serves all tests."""
    folder: Path = tmp_path_factory.mktemp("icl")
    run_in(COUNT, all_work, folder)
    return folder, [json.loads((folder / f"found-{rank}.json").read_text(encoding="utf-8")) for rank in range(COUNT)]


Found = tuple[Path, list[dict[str, Any]]]


@pytest.mark.parametrize("case", CASES)
def test_losses_and_measures_are_those_of_one_process(found: Found, case: str, tmp_path: Path) -> None:
    folder, each = found
    alone = begin(case, tmp_path)
    alone.train(lambda _: None)
    losses, record = alone.losses, alone.finish()
    for own in each:
        # AdamW divides by the size of gradients, so that roundings of small ones are seen after some steps.
        assert own[case]["losses"] == pytest.approx(losses, rel=1e-4)
        assert [value is None for value in own[case]["values"]] == [value is None for value in record["values"]]
        pairs = zip(own[case]["values"], record["values"], strict=True)
        assert all(one == pytest.approx(two, rel=1e-3) for one, two in pairs if one is not None)
    saved = [path.name for path in (folder / case / "runs").iterdir()]
    assert saved == [f"{alone.name}.json"]


def test_one_process_continues_what_ranks_have_begun(found: Found, tmp_path: Path) -> None:
    folder, each = found
    assert [own["stopped"] for own in each] == [3] * COUNT
    case = "sequences over 2, rows over 2"
    alone = begin(case, folder / "cut")
    said: list[str] = []
    alone.train(said.append)
    assert said == [f"{alone.name}: {alone.variant.steps} steps, from step 3 on"]
    assert alone.losses == pytest.approx(each[0][case]["losses"], rel=1e-4)


def test_the_whole_of_it_under_torchrun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--preset", "tiny", "--seeds", "1", "--tasks", "recall", "--mixers", "power"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    shared = [*options, "--context-parallel", "2", "--out", str(tmp_path / "shared")]
    done = subprocess.run([*launch, EXAMPLE, *shared], capture_output=True, text=True, timeout=HUNG_S)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("0 of 1 runs are done") == 1
    assert done.stdout.count("recall, context 128, 1 seeds") == 1
    assert main([*options, "--out", str(tmp_path / "alone")]) == 0
    results = [json.loads((tmp_path / name / "icl.json").read_text(encoding="utf-8")) for name in ("shared", "alone")]
    for one, two in zip(*(data["tasks"][0]["runs"] for data in results), strict=True):
        assert one["training_losses"] == pytest.approx(two["training_losses"], rel=1e-3)
    assert results[0]["machine"] | {"ranks": 2, "context_parallel": 2} == results[0]["machine"]
    assert "ranks" not in results[1]["machine"]
    assert results[0]["command"].startswith("torchrun --nproc-per-node 2 examples/train_icl.py --preset tiny")
    # With any number of ranks the folder has nothing left to do.
    capsys.readouterr()
    assert main([*options, "--out", str(tmp_path / "shared")]) == 0
    assert "1 of 1 runs are done" in capsys.readouterr().err


def refused(arguments: str, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["--preset", "tiny", "--out", str(out), *arguments.split()]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert not list(out.iterdir())
    return said.err


def test_without_torchrun_it_names_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = (
        "error: --context-parallel: 4 ranks are started by torchrun: torchrun --nproc-per-node 4 examples/train_icl.py"
    )
    said = refused("--context-parallel 4 --seeds 1", tmp_path, capsys)
    assert said == f"{start} --preset tiny --out {tmp_path} --context-parallel 4 --seeds 1\n"


UNDER_TORCHRUN = {
    "--context-parallel 3": "--context-parallel: 3 does not divide the 4 ranks that torchrun has started",
    "--context-parallel 2 --jobs 2": "--jobs: the ranks of torchrun do one run at a time; leave it out",
    "--context-parallel 0": "--context-parallel: 0 is out of range; allowed are 1 to 1,024",
}


@pytest.mark.parametrize("arguments", UNDER_TORCHRUN)
def test_refusals_are_said_once(
    arguments: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    for rank, said in ((0, f"error: {UNDER_TORCHRUN[arguments]}\n"), (1, "")):
        monkeypatch.setenv("RANK", str(rank))
        assert refused(arguments, tmp_path, capsys) == said


def test_a_batch_and_heads_that_ranks_cannot_share() -> None:
    from icl.settings import PRESETS

    options: Any = SimpleNamespace(mixers=("window", "softmax"), match="flops")
    experiment = _experiment("code", PRESETS["tiny"]["code"], options)
    for count, groups, message in (
        (4, 2, None),
        (4, 4, "--batch: 2 sequences of code cannot be shared by 4 groups of ranks"),
        (4, 1, "--context-parallel: 4 ranks cannot share the 2 heads of softmax attention, which softmax has"),
    ):
        ranks: Any = SimpleNamespace(count=count, groups=groups)
        if message is None:
            _check_shared([experiment], ranks)
            continue
        with pytest.raises(InputError) as error:
            _check_shared([experiment], ranks)
        assert str(error.value) == message


def test_the_command_of_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    expected = "torchrun --nproc-per-node 8 --nnodes 2 examples/train_icl.py --out 'a b'"
    assert command_line(["--out", "a b"], 16) == expected
    assert command_line(["--out", "a"], None) == "python examples/train_icl.py --out a"
