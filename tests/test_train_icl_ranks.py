"""examples/train_icl.py under torchrun: ranks that share sequences and batches train as one process does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import icl_on_ranks
import pytest
import torch
from children import HUNG_S
from icl_on_ranks import CASES, COUNT, CUT, OPTIONS, begin

from icl.ranks import command_line, joined
from icl.settings import PRESETS
from powerplan.errors import InputError
from train_icl import _check_shared, _experiment, main


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Found:
    """The folder of four processes of torchrun, what each of them found, and what they printed."""

    def __init__(self, folder: Path) -> None:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(COUNT)]
        path = os.pathsep.join(filter(None, sys.path))
        done = subprocess.run(
            [*launch, icl_on_ranks.__file__, folder],
            capture_output=True,
            text=True,
            timeout=HUNG_S,
            env=os.environ | {"PYTHONPATH": path},
        )
        assert done.returncode == 0, done.stderr
        self.folder, self.out, self.err = folder, done.stdout, done.stderr
        texts = [(folder / f"found-{rank}.json").read_text(encoding="utf-8") for rank in range(COUNT)]
        self.each: list[dict[str, Any]] = [json.loads(text) for text in texts]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """One start of the processes serves all tests."""
    return Found(tmp_path_factory.mktemp("icl"))


def test_the_whole_of_it_under_torchrun(found: Found, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert [own["code"] for own in found.each] == [0] * COUNT
    assert found.err.count("0 of 2 runs are done") == 1
    assert found.out.count("recall, context 128, 1 seeds") == 1
    assert main([*OPTIONS, "--out", str(tmp_path)]) == 0
    shared, alone = (
        json.loads((folder / "icl.json").read_text(encoding="utf-8")) for folder in (found.folder / "whole", tmp_path)
    )
    for one, two in zip(shared["tasks"][0]["runs"], alone["tasks"][0]["runs"], strict=True):
        assert one["training_losses"] == pytest.approx(two["training_losses"], rel=1e-3)
        check_values(one["values"], two["values"])
    assert shared["machine"] | {"ranks": 4, "context_parallel": 2} == shared["machine"]
    assert "ranks" not in alone["machine"]
    assert shared["command"].startswith("torchrun --nproc-per-node 4 examples/train_icl.py --preset tiny")
    # With any number of ranks the folder has nothing left to do.
    capsys.readouterr()
    assert main([*OPTIONS, "--out", str(found.folder / "whole")]) == 0
    assert "2 of 2 runs are done" in capsys.readouterr().err


def check_values(values: list[float | None], expected: list[float | None]) -> None:
    assert [value is None for value in values] == [value is None for value in expected]
    assert all(
        one == pytest.approx(two, rel=1e-3) for one, two in zip(values, expected, strict=True) if one is not None
    )


@pytest.mark.parametrize("case", CASES)
def test_losses_and_measures_are_those_of_one_process(found: Found, case: str, tmp_path: Path) -> None:
    mixer, _, context = CASES[case]
    alone = begin(mixer, context, tmp_path)
    alone.train(lambda _: None)
    losses, record = alone.losses, alone.finish()
    for own in found.each:
        # AdamW divides by the size of gradients, so that roundings of small ones are seen after some steps.
        assert own[case]["losses"] == pytest.approx(losses, rel=1e-4)
        check_values(own[case]["values"], record["values"])
    saved = [path.name for path in (found.folder / case / "runs").iterdir()]
    assert saved == [f"{alone.name}.json"]


def test_one_process_continues_what_ranks_have_begun(found: Found, tmp_path: Path) -> None:
    assert [own["stopped"] for own in found.each] == [3] * COUNT
    mixer, _, context = CUT
    whole = begin(mixer, context, tmp_path)
    whole.train(lambda _: None)
    resumed = begin(mixer, context, found.folder / "cut")
    said: list[str] = []
    resumed.train(said.append)
    assert said == [f"{resumed.name}: {resumed.variant.steps} steps, from step 3 on"]
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-4)
    for own in found.each:
        assert own["resumed"] == pytest.approx(whole.losses, rel=1e-4)


def test_weights_are_shared(found: Found) -> None:
    shares = [own["share"] for own in found.each]
    assert sum(shares) == pytest.approx(1)
    # Vectors with fewer numbers than there are ranks, such as a gate's bias, lie on the first ranks.
    assert max(shares) < 1.1 / COUNT


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


def test_a_batch_that_groups_cannot_share() -> None:
    options: Any = SimpleNamespace(mixers=("softmax",), match="flops")
    experiment = _experiment("recall", PRESETS["tiny"]["recall"], options)
    two, four = (SimpleNamespace(groups=groups) for groups in (2, 4))
    _check_shared([experiment], two)  # type: ignore[arg-type]
    with pytest.raises(InputError) as error:
        _check_shared([experiment], four)  # type: ignore[arg-type]
    assert str(error.value) == "--batch: 2 sequences of recall cannot be shared by 4 groups of ranks"


def test_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "4"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError) as error, joined(2, "cuda"):
        pass
    assert str(error.value) == "--device: torchrun has started 4 ranks on a machine with 2 GPUs"


def test_the_command_of_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    expected = "torchrun --nproc-per-node 8 --nnodes 2 examples/train_icl.py --out 'a b'"
    assert command_line(["--out", "a b"], 16) == expected
    assert command_line(["--out", "a"], None) == "python examples/train_icl.py --out a"
