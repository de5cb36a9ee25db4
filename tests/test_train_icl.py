"""examples/train_icl.py: its data, curves, budgets, resumption and refusals, and the whole of it on a tiny preset."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from children import interruptible

from icl.code import Code
from icl.curves import Tally, bin_edges, over_seeds
from icl.recall import KEYS, VALUES, Recall
from icl.run import Run, RunEnvironment, build_task, measure_predictions
from icl.settings import PRESETS, TaskSettings
from icl.variants import MIXERS, variants
from powerplan import Accounting
from powerplan.errors import MachineError
from powerplan.swap.windows import same_state_window
from powerplan.training import train_flops
from train_icl import Job, main, run_jobs


def script(name: str) -> ModuleType:
    """Return a module of scripts/, which is no package."""
    path = Path(__file__).resolve().parent.parent / "scripts" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


icl_docs = script("icl_docs")

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "train_icl.py"
TINY = PRESETS["tiny"]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_the_tiny_preset_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["--preset", "tiny", "--seeds", "2", "--mixers", "softmax,power", "--plot", "--out", str(out)]
    assert main(command) == 0
    printed = capsys.readouterr()
    data = json.loads((out / "icl.json").read_text(encoding="utf-8"))
    assert data["schema"] == "powerplan.icl/1"
    assert {task["task"] for task in data["tasks"]} == {"code", "recall"}
    for task in data["tasks"]:
        assert f"{task['task']}, context 128, 2 seeds" in printed.out
        check_task(task)
        assert (out / f"icl-{task['task']}.png").read_bytes().startswith(b"\x89PNG")
    section = icl_docs.section("Tiny", "tiny-cpu", data)
    lines = ("### Tiny", "`code`:", "![Tiny: recall](images/tiny-recall.png)", "| mixer   |")
    assert all(line in section for line in lines)
    # Once more: nothing is left to do.
    assert main(command) == 0
    assert "8 of 8 runs are done" in capsys.readouterr().err


def check_task(task: dict[str, Any]) -> None:
    assert [model["mixer"] for model in task["models"]] == ["softmax", "power"]
    assert len(task["runs"]) == 4
    for run in task["runs"]:
        model = next(model for model in task["models"] if model["mixer"] == run["mixer"])
        assert run["steps"] == model["steps"] == len(run["training_losses"])
        assert len(run["values"]) == len(task["bin_edges"]) - 1
    for summary in task["summary"]:
        values = [run["values"][-1] for run in task["runs"] if run["mixer"] == summary["mixer"]]
        if None not in values:
            assert summary["mean"][-1] == pytest.approx(sum(values) / 2)
            assert summary["spread"][-1] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)


@pytest.mark.parametrize("name", ["code", "recall"])
@pytest.mark.parametrize("preset", ["laptop", "tiny"])
def test_equal_flops_within_a_step(preset: str, name: str) -> None:
    settings = PRESETS[preset][name]
    models = variants(settings, MIXERS, 256, name, "flops")
    budget = settings.steps * settings.batch * settings.context * train_flops(models[0].row)
    for model in models:
        step = settings.batch * settings.context * train_flops(Accounting(model.spec).row(settings.context))
        assert 0 <= model.steps * step - budget < step
    assert models[0].steps == settings.steps


def test_equal_tokens() -> None:
    settings = TINY["code"]
    assert {model.steps for model in variants(settings, MIXERS, 256, "code", "tokens")} == {settings.steps}


def test_the_window_holds_the_state_of_power_attention() -> None:
    models = {model.mixer: model for model in variants(TINY["code"], MIXERS, 256, "code", "flops")}
    window = next(use.layer.mixer for use in models["window"].spec.layer_uses())
    assert window is not None
    assert window.window == same_state_window(models["power"].spec) == 18
    kinds = {use.layer.mixer.kind for use in models["mix"].spec.layer_uses() if use.layer.mixer is not None}
    assert kinds == {"attention", "power"}


@pytest.mark.parametrize("task", ["code", "recall"])
@pytest.mark.parametrize("mixer", ["softmax", "mix"])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path: Path, task: str, mixer: str) -> None:
    whole = record(tmp_path / "whole", task, mixer)
    cut = begin(tmp_path / "parts", task, mixer)
    with pytest.raises(KeyboardInterrupt):
        cut.train(lambda _: None, lambda: cut.step == 3)
    assert cut.step == 3
    reported: list[str] = []
    again = begin(tmp_path / "parts", task, mixer)
    again.train(reported.append)
    assert reported == [f"{task}-{mixer}-0: {cut.variant.steps} steps, from step 3 on"]
    resumed = again.finish()
    assert resumed["training_losses"] == whole["training_losses"]
    assert resumed["values"] == whole["values"]
    assert not again.checkpoint.exists()


def test_ctrl_c_ends_after_a_step_and_leaves_a_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLE, "--preset", "tiny", "--tasks", "recall", "--mixers", "softmax", "--seeds", "1"]
    command += ["--steps", "1000000", "--threads", "1", "--out", tmp_path]
    with interruptible(command) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "0 of 1 runs are done\n"
        assert process.stderr.readline() == "recall-softmax-0: 1,000,000 steps\n"
        process.send_signal(signal.SIGINT)
        assert "interrupted: the same command goes on from here" in process.communicate()[1]
    assert process.returncode == 130
    assert torch.load(tmp_path / "runs" / "recall-softmax-0.pt", weights_only=True)["step"] >= 1


def begin(out: Path, task: str, mixer: str) -> Run:
    (out / "runs").mkdir(parents=True, exist_ok=True)
    data = build_task(task, TINY[task])
    (variant,) = variants(TINY[task], (mixer,), data.vocabulary, task, "flops")
    return Run(data, variant, TINY[task], 0, RunEnvironment(out))


def record(out: Path, task: str, mixer: str) -> dict[str, Any]:
    run = begin(out, task, mixer)
    run.train(lambda _: None)
    return run.finish()


def test_held_out_files_are_never_trained_on(tmp_path: Path) -> None:
    library = tmp_path / "library"
    for index in range(60):
        path = library / f"package{index % 3}" / f"module{index}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes([index]) * (129 + 3 * index))  # a byte names its file
    (library / "test").mkdir()
    (library / "test" / "test_it.py").write_bytes(b"\xff" * 1000)
    code = Code(TINY["code"], library)
    training, held_out = ({file.content[0] for file in files} for files in (code.training, code.evaluated))
    assert training | held_out == set(range(60))
    assert not training & held_out
    assert set(code.held_out().tokens.flatten().tolist()) <= held_out
    seen = torch.cat([code.batch(0, step).tokens for step in range(90)])  # more than three epochs
    assert set(seen.flatten().tolist()) == training
    assert (seen == seen[:, :1]).all()  # a context is of one file
    assert torch.equal(code.batch(0, 7).tokens, Code(TINY["code"], library).batch(0, 7).tokens)
    assert not torch.equal(code.batch(0, 7).tokens, code.batch(1, 7).tokens)


def test_the_library_itself() -> None:
    code = Code(TINY["code"])
    assert {file.path for file in code.training}.isdisjoint(file.path for file in code.evaluated)
    assert not any({"test", "site-packages"} & set(file.path.split("/")) for file in code.training)
    data = code.describe()
    assert data["training_bytes"] > 10 * data["held_out_bytes"] / 3 > 0


def test_binning() -> None:
    edges = bin_edges(16)
    assert edges == [1, 2, 3, 4, 6, 8, 11, 17]
    tally = Tally(edges)
    positions = torch.arange(1, 17)
    tally.add(positions.float(), positions)
    tally.add(torch.full((2,), 100.0), torch.tensor([1, 16]))
    expected = [(1 + 100) / 2, 2, 3, 4.5, 6.5, 9, (sum(range(11, 17)) + 100) / 7]
    assert tally.means() == pytest.approx(expected)
    assert Tally([1, 2, 3]).means() == [None, None]
    assert over_seeds([[1.0, None], [3.0, None]]) == [(2.0, pytest.approx(2**0.5)), None]


def test_loss_is_in_bits() -> None:
    targets = torch.tensor([[0, 1]])
    assert measure_predictions("loss", torch.zeros(1, 2, 8), targets).tolist() == [[3.0, 3.0]]
    assert measure_predictions("accuracy", torch.eye(2)[None], targets).tolist() == [[1.0, 1.0]]


def test_recall_for_an_oracle_and_by_chance() -> None:
    settings = replace(TINY["recall"], held_out=400)
    task = Recall(settings)
    batch = task.held_out()
    assert batch.scored.sum().item() == 400 * (settings.context - task.statements)
    # The oracle looks where `curve_x` says that the statement stands: key k with value v is token k VALUES + v.
    back = torch.arange(settings.context) - batch.curve_x
    stated = batch.tokens.gather(1, back)
    assert torch.equal((stated // VALUES)[batch.scored], (batch.tokens - KEYS * VALUES)[batch.scored])
    answers = torch.nn.functional.one_hot(stated % VALUES, task.vocabulary).float()
    assert measure_predictions("accuracy", answers, batch.targets)[batch.scored].mean() == 1
    guesses = torch.zeros(*batch.tokens.shape, task.vocabulary)
    guesses[..., :VALUES] = torch.rand(*batch.tokens.shape, VALUES, generator=torch.Generator().manual_seed(0))
    guessed = measure_predictions("accuracy", guesses, batch.targets)[batch.scored].mean().item()
    # Guesses at the questions for one statement are right or wrong independently: an ordinary binomial spread.
    assert abs(guessed - task.chance) < 5 * (task.chance / batch.scored.sum().item()) ** 0.5
    assert batch.curve_x[batch.scored].min() == 1
    assert batch.curve_x.max() > settings.context * 0.9
    assert torch.equal(task.batch(3, 5).tokens, Recall(settings).batch(3, 5).tokens)


def test_training_asks_about_few_statements_and_about_all() -> None:
    def counts(context: int) -> list[int]:
        task = Recall(replace(TINY["recall"], context=context))
        return [int((task.batch(0, step).curve_x[0] == 0).sum()) for step in range(6)]

    assert counts(128) == [16, 8, 4, 2, 1, 16]
    assert counts(64) == [8, 4, 2, 1, 1, 8]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--mixers softmax,atention",
            "--mixers: 'atention' is not one; allowed are softmax, window, linear, power, mix",
        ),
        ("--mixers power,power", "--mixers: power is given twice"),
        ("--tasks cod", "--tasks: 'cod' is not one; did you mean code? allowed are code, recall"),
        ("--context 1000", "--context: 1,000 is not a power of two from 64 to 16,384"),
        ("--context 32k", "--context: 32,768 is not a power of two from 64 to 16,384"),
        ("--preset lapto", "--preset: 'lapto' is not a preset; did you mean laptop? allowed are laptop, tiny"),
        ("--match time", "--match: 'time' is not one; allowed are flops, tokens"),
        (
            "--tasks code --context 16k --batch 4096",
            "--batch: fewer pieces of 16,385 bytes than --batch asks for: 4,096",
        ),
        ("--seeds 0", "--seeds: 0 is out of range; allowed are 1 to 100"),
        ("--steps 10 --flops 1e9", "--steps and --flops both say how long to train; give one"),
        ("--match tokens --flops 1e9", "--flops cannot be matched by tokens; give --steps"),
        ("--device tpu", "--device: 'tpu' is not a device; did you mean cpu? allowed are cpu, cuda"),
    ],
)
def test_refusals(arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--preset", "tiny", "--out", str(tmp_path), *arguments.split()]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_more_jobs_than_a_pipe_holds(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each of two processes fails at its first job; none waits for the others to be handed out."""
    settings = replace(TINY["code"], context=2**30)
    job = Job("code", settings, "power", 0, "flops", RunEnvironment(tmp_path))
    with pytest.raises(MachineError, match="a run ended with exit code 2"):
        run_jobs([job] * 500, 2)
    assert "has no training files of 1,073,741,825 bytes" in capfd.readouterr().err


def test_folders_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--preset", "tiny", "--out", str(tmp_path / "file")]) == 2
    assert capsys.readouterr().err == f"error: --out: {tmp_path / 'file'} cannot be made: Not a directory\n"
    few = ["--preset", "tiny", "--tasks", "recall", "--mixers", "softmax", "--seeds", "1", "--out", str(tmp_path)]
    assert main(few) == 0
    capsys.readouterr()
    assert main([*few, "--context", "64"]) == 2
    assert capsys.readouterr().err == f"error: --out: {tmp_path} holds runs of other settings; give another folder\n"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with one run that is done and one that has a checkpoint, of the command DAMAGED."""
    out = tmp_path_factory.mktemp("begun")
    assert main([*DAMAGED, "--mixers", "softmax", "--out", str(out)]) == 0
    cut = begin(out, "recall", "power")
    with pytest.raises(KeyboardInterrupt):
        cut.train(lambda _: None, lambda: cut.step == 3)
    (out / "icl.json").unlink()
    return out


DAMAGED = ["--preset", "tiny", "--tasks", "recall", "--seeds", "1"]
RESULT, POINT = "runs/recall-softmax-0.json", "runs/recall-power-0.pt"
AGAIN, RESTART = "; move it away, and the run is done again", "; move it away, and the run starts again"


def saved_with(**changes: Any) -> Callable[[bytes], bytes]:
    """Return what changes the values of a checkpoint; None leaves one out."""

    def change(content: bytes) -> bytes:
        state = torch.load(io.BytesIO(content), weights_only=True) | changes
        buffer = io.BytesIO()
        torch.save({key: value for key, value in state.items() if value is not None}, buffer)
        return buffer.getvalue()

    return change


def record_with(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps(json.loads(content) | changes).encode()


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes], str]] = {
    "settings cut": ("settings.json", lambda content: content[:-5], "is damaged, not JSON; move it away if its ..."),
    "settings of bytes": ("settings.json", lambda content: b"\xff\x00", "is damaged, not JSON; move it away if ..."),
    "settings deep": ("settings.json", lambda content: b"[" * 10**5, "is damaged, not JSON; move it away if ..."),
    "result cut": (RESULT, lambda content: content[: len(content) // 2], f"is damaged, not JSON{AGAIN}"),
    "result empty": (RESULT, lambda content: b"", f"is damaged, not JSON{AGAIN}"),
    "result list": (RESULT, lambda content: b"[]", f"is damaged: Expected `object`, got `array`{AGAIN}"),
    "result lacks": (RESULT, lambda content: b"{}", "is damaged: Object missing required field `task`..."),
    "result type": (RESULT, record_with(values="x"), "is damaged: Expected `array`, got `str` - at `$.values`..."),
    "result bins": (RESULT, record_with(values=[1.0]), f"holds another run, or half of one{AGAIN}"),
    "result losses": (RESULT, record_with(training_losses=[1.0]), f"holds another run, or half of one{AGAIN}"),
    "result mixer": (RESULT, record_with(mixer="power"), f"holds another run, or half of one{AGAIN}"),
    "checkpoint cut": (POINT, lambda content: content[: len(content) // 2], f"is a damaged checkpoint{RESTART}"),
    "checkpoint empty": (POINT, lambda content: b"", f"is a damaged checkpoint{RESTART}"),
    "checkpoint of text": (POINT, lambda content: b"hello", f"is a damaged checkpoint{RESTART}"),
    "checkpoint lacks": (POINT, saved_with(step=None), "is a damaged checkpoint: Object missing required field ..."),
    "checkpoint type": (POINT, saved_with(losses="x"), "is a damaged checkpoint: Expected `array`, got `str` ..."),
    "checkpoint step": (POINT, saved_with(step=2), "is no checkpoint of this run of 8 steps..."),
    "checkpoint model": (POINT, saved_with(model={}), f"does not fit the model{RESTART}"),
    "checkpoint optimizer": (POINT, saved_with(optimizer={"state": 1}), f"does not fit the model{RESTART}"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_file_is_named_and_nothing_lost(
    case: str, begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, change, message = DAMAGE[case]
    out = tmp_path / "out"
    shutil.copytree(begun, out)
    (out / name).write_bytes(change((out / name).read_bytes()))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main([*DAMAGED, "--mixers", "softmax,power", "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.splitlines()[-1]
    begin_of_line, dots, _ = f"error: {out / name}: {message}".partition("...")
    assert line.startswith(begin_of_line)
    assert dots or line == begin_of_line
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_folder_in_the_place_of_a_file(begun: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in (RESULT, POINT, "settings.json"):
        out = tmp_path / name.replace("/", "-")
        shutil.copytree(begun, out)
        (out / name).unlink()
        (out / name).mkdir()
        assert main([*DAMAGED, "--mixers", "softmax,power", "--out", str(out)]) == 2
        assert capsys.readouterr().err == f"error: {out / name}: cannot be read: Is a directory\n"
    for name in ("icl.json", "icl-recall.png"):
        out = tmp_path / name
        shutil.copytree(begun, out)
        (out / name).mkdir()
        assert main([*DAMAGED, "--mixers", "softmax,power", "--plot", "--out", str(out)]) == 2
        assert capsys.readouterr().err == f"error: --out: {out / name} is a folder; give a file\n"


def test_a_library_without_long_files(tmp_path: Path) -> None:
    from powerplan.errors import InputError

    settings: TaskSettings = replace(TINY["code"], context=64)
    with pytest.raises(InputError, match="has no training files of 65 bytes"):
        Code(settings, tmp_path)


def test_the_docs_hold_what_was_measured() -> None:
    text, sections = icl_docs.PAGE.read_text(encoding="utf-8"), []
    for title, name in icl_docs.RESULTS.items():
        data = icl_docs.result_of(name)
        sections.append(icl_docs.section(title, name, data))
        assert all((icl_docs.IMAGES / icl_docs.image(name, record["task"])).exists() for record in data["tasks"])
    assert text == icl_docs.page(text, sections)
