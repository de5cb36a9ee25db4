"""The answers of `import powerplan`: they print what the commands print, and every example in docstrings is true."""

from __future__ import annotations

import copy
import doctest
import inspect
import json
import pickle
import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import powerplan
from powerplan import Convention
from powerplan.answers.base import Answer
from powerplan.cli import main
from powerplan.errors import InputError
from powerplan.hardware import find_device
from powerplan.load import load_model

PAGE = Path(__file__).resolve().parent.parent / "docs" / "api.md"
KIMI = "kimi-linear-48b-a3b"

MODULES = [
    "accounting",
    "balance",
    *(f"answers.{name}" for name in ("wsfr", "compare", "decode", "budget", "train", "recommend", "flops")),
]
ANSWERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "wsfr gpt2-small": ("wsfr", {"model": "gpt2-small"}),
    "wsfr gemma-2-9b --ctx 8k,64k --by layer --form chunked": (
        "wsfr",
        {"model": "gemma-2-9b", "context": [8192, "64k"], "by": "layer", "convention": Convention(form="chunked")},
    ),
    "wsfr llama-3-8b --ctx 64k --explain --causal full --exclude lm-head --dtype fp8": (
        "wsfr",
        {
            "model": "llama-3-8b",
            "context": 65536,
            "explain": True,
            "convention": Convention(causal="full", lm_head=False),
            "dtype": "fp8",
        },
    ),
    "compare gpt2-small llama-3-8b --mixer power:p=2": (
        "compare",
        {"models": ["gpt2-small", "llama-3-8b"], "mixer": "power:p=2"},
    ),
    f"decode {KIMI} --ctx 1M --batch 1,8 --twin mla": (
        "decode",
        {"models": KIMI, "context": "1M", "batch": [1, 8], "twin": "mla"},
    ),
    "budget gpt2-small --flops 1e21 --gpu h100-sxm --devices 8": (
        "budget",
        {"model": "gpt2-small", "flops": 1e21, "gpu": "h100-sxm", "devices": 8},
    ),
    "train llama-3-8b --ctx 32k --tokens 1B --gpu h100-sxm --devices 16 --recompute full --price 2": (
        "train",
        {
            "model": "llama-3-8b",
            "context": "32k",
            "tokens": "1B",
            "gpu": "h100-sxm",
            "devices": 16,
            "recompute": "full",
            "price": 2,
        },
    ),
    "budget gpt2-small llama-3-8b --ctx 8k,64k --tokens 300B --batch-tokens 4M": (
        "budget",
        {"model": ["gpt2-small", "llama-3-8b"], "context": "8k,64k", "tokens": "300B", "batch_tokens": "4M"},
    ),
    "recommend gpt2-small --ctx 64k": ("recommend", {"model": "gpt2-small", "context": "64k"}),
    "decode gpt2-small gpt2-xl --gpu h100-sxm --devices 2 --batch 4": (
        "decode",
        {"models": ["gpt2-small", "gpt2-xl"], "gpu": "h100-sxm", "devices": 2, "batch": 4},
    ),
}


@pytest.mark.parametrize("command", ANSWERS, ids=lambda text: text[:50])
def test_an_answer_is_what_the_command_prints(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, arguments = ANSWERS[command]
    answer: Answer = getattr(powerplan, name)(**arguments)
    formats = {"table": str(answer), "json": answer.to_json(), "csv": answer.to_csv(), "markdown": answer.to_markdown()}
    for form, text in formats.items():
        if form == "csv" and "--explain" in command:
            continue  # The command line refuses these two together.
        assert main([*command.split(), "--format", form]) == 0
        printed = capsys.readouterr()
        assert printed.out == f"{text}\n"
        assert printed.err == "".join(f"note: {note}\n" for note in answer.notes)
    assert answer.to_dict() == json.loads(formats["json"])
    assert answer._repr_markdown_().replace("  \n", "\n") == formats["markdown"]


def test_a_notebook_keeps_the_lines_of_text() -> None:
    text, table, verdict = powerplan.wsfr("llama-3.1-8b", "64k")._repr_markdown_().split("\n\n")
    assert text.count("  \n") == text.count("\n") == 2
    assert "  \n" not in table + verdict


def test_models_and_contexts_may_be_given_in_several_ways() -> None:
    loaded = load_model("gpt2-small")
    for model in ("gpt2-small", loaded, loaded.spec):
        for context in (65_536, "64k", [65_536], ["64k", 65_536], range(65_536, 65_537)):
            assert [row.context for row in powerplan.wsfr(model, context).rows] == [65_536]
    assert powerplan.decode(loaded, gpu=find_device("h100-sxm")).notes == ()
    assert powerplan.wsfr("gpt2-small", mixer="power:p=2").model.name == "gpt2-small with power:p=2"
    assert powerplan.Accounting(loaded.spec).row("128k").context == 131_072


def test_notes_of_several_models_name_them() -> None:
    notes = powerplan.decode("deepseek-v3", mixer="power:p=2").notes
    assert notes == (
        "deepseek-v3 with power:p=2: MLA's low-rank projections become full ones of the same heads: "
        "the weights change too",
    )


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("wsfr", {"model": ""}, "model: is empty; give a file, a folder with a config.json, or a catalogue name"),
        ("wsfr", {"model": None}, "model: must be a catalogue name, a path, a spec or a config, and is null"),
        ("wsfr", {"model": 3}, "model: must be a catalogue name, a path, a spec or a config, and is 3"),
        ("wsfr", {"model": "gpt2", "convention": {}}, "convention: must be a Convention, such as .*, and is dict"),
        ("degrees", {"model": "gpt2", "convention": 1}, "convention: must be a Convention, such as .*, and is int"),
        ("flops_per_step", {"model": "gpt2", "context": 8, "convention": []}, "convention: must be .*, and is list"),
        ("Accounting", {"spec": "gpt2"}, "spec: must be a ModelSpec, such as .*, and is str"),
        ("Accounting", {"spec": load_model("gpt2")}, "spec: must be a ModelSpec, such as .*, and is LoadedModel"),
        ("compare", {"models": {"model_type": "llama"}}, "models: compare needs a list of two models or more, or .*"),
        ("solve", {"model": "gpt2", "unknown": "ctx"}, "unknown: 'ctx' is not known; .*allowed are context, window, p"),
        ("train", {"model": "gpt2", "gpu": "h100-sxm", "stages": ["9B"]}, "stages: '9B' is not a stage; .*"),
        (
            "train",
            {"model": "gpt2", "gpu": "h100-sxm", "stages": ["9B@1k"], "tokens": "1B"},
            "stages: has tokens and contexts of its own: leave tokens out",
        ),
        ("wsfr", {"model": "gpt2", "context": "64q"}, "context: '64q' is not a size in tokens; write 65536, .*"),
        ("wsfr", {"model": "gpt2", "context": 1.5}, "context: 1.5 is not a context; write tokens, as 65536 or '64k'"),
        ("wsfr", {"model": "gpt2", "context": [True]}, "context: true is not a context; .*"),
        ("wsfr", {"model": "gpt2", "context": []}, "context: is empty; .*"),
        ("wsfr", {"model": "gpt2", "context": 0}, "context: a context is 1 to [0-9,]+ tokens, and is 0"),
        ("wsfr", {"model": "gpt2", "mixer": "kdb"}, "mixer: 'kdb' is not a mixer; did you mean kda.*"),
        ("wsfr", {"model": "gpt2", "by": "layers"}, "by: 'layers' is not known; did you mean layer.*"),
        ("wsfr", {"model": "gpt2", "dtype": "int2"}, "dtype: 'int2' is not known; did you mean int4.*"),
        ("compare", {"models": ["gpt2"]}, "models: compare needs a list of two models or more, or of one with a mixer"),
        ("compare", {"models": "gpt2"}, "models: compare needs a list of two models or more, or of one with a mixer"),
        ("decode", {"models": []}, "models: decode needs one model or more"),
        ("decode", {"models": "gpt2", "batch": 0}, "batch: 0 is out of range; allowed are 1 to 65,536"),
        ("decode", {"models": "gpt2", "batch": [1, 2.0]}, "batch: '2.0' is not an integer; .*"),
        ("decode", {"models": "gpt2", "devices": 2}, "devices: needs the device; such as gpu='h100-sxm'"),
        ("decode", {"models": "gpt2", "gpu": "h10"}, "'h10' is not a known device.*"),
        ("decode", {"models": "gpt2", "twin": "kda"}, "twin: 'kda' is not known; allowed are mla, attention"),
        ("decode", {"models": "gpt2", "twin": "attention"}, "twin attention: gpt2-small has attention in every .*"),
    ],
)
def test_an_error_names_the_parameter(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{message}$"):
        getattr(powerplan, name)(**arguments)


def test_messages_name_arguments_that_there_are() -> None:
    """What the source hands to `parameter` is an argument of a function, or of a method of an answer."""
    names = ("wsfr", "compare", "decode", "budget", "recommend", "train", "solve", "degrees", "page", "flops_per_step")
    functions = [getattr(powerplan, name) for name in (*names, "load_model", "Convention")]
    known = {name for function in functions for name in inspect.signature(function).parameters}
    known |= {"trainer", "name", "plot"}  # TrainAnswer.export, RecommendAnswer.name, --plot
    for file in (PAGE.parent.parent / "powerplan").rglob("*.py"):
        found = re.findall(r"parameter\(\s*[\"'](\w+)[\"']", file.read_text(encoding="utf-8"))
        assert set(found) <= known, file


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_state": "1KiB"}, "max_state: even the least of 3,473 candidates needs 36 KiB, .*"),
        (
            {"gpu": "h100-sxm", "devices": 2, "max_days": 1, "tokens": "1T", "only": "attention"},
            "max_days: the only candidate needs .* days, .*",
        ),
        (
            {"gpu": "rtx-4090", "price": 1, "only": "attention", "model": "llama-3-8b"},
            "gpu in training: the only candidate needs .*; more devices share it",
        ),
    ],
)
def test_a_limit_that_binds_has_its_name_in_python(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(powerplan.InfeasibleError, match=f"^{message}$"):
        powerplan.recommend(**{"model": "gpt2-small", "context": "64k"} | arguments)


def test_what_does_not_fit_has_bytes_in_full() -> None:
    message = r"does not fit 1 x h100-sxm: [1-9]\d,\d{3} GB at the peak in each, which has 85\.\d\d GB"
    with pytest.raises(powerplan.InfeasibleError, match=message):
        powerplan.train("deepseek-v3", "8k", gpu="h100-sxm")


def test_the_export_of_a_run_names_its_argument() -> None:
    run = powerplan.train("gpt2-small", "1k", gpu="h100-sxm", tokens="1B")
    with pytest.raises(InputError, match=r"^trainer: 'deepspeed' is not known"):
        run.export("deepspeed")  # type: ignore[arg-type]
    assert len(repr(run.plan)) < 10_000, "hundreds of other layouts are not in it"


@pytest.mark.parametrize("command", ANSWERS)
def test_an_answer_is_one_short_line_in_a_session_and_can_be_pickled(command: str) -> None:
    name, arguments = ANSWERS[command]
    answer = getattr(powerplan, name)(**arguments)
    first = str(answer).splitlines()[0].strip()
    assert re.fullmatch(r"<\w+Answer: .{5,150}>", repr(answer))
    assert first[:30] in repr(answer)
    again = pickle.loads(pickle.dumps(answer))
    assert (again.to_json(), again.notes) == (answer.to_json(), answer.notes)
    assert copy.deepcopy(answer).to_json() == answer.to_json()


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(InputError, match=r"^form must be recurrent or chunked, and is 'chunk'$"):
        Convention(form="chunk")  # type: ignore[arg-type]


@pytest.mark.parametrize("context", [1.5, True, None, "x"])
def test_a_row_refuses_what_is_no_context(context: Any) -> None:
    with pytest.raises(InputError, match=r"is not a (context|size in tokens)"):
        powerplan.Accounting(load_model("gpt2-small").spec).row(context)


@pytest.mark.parametrize("module", MODULES)
def test_examples_of_docstrings_are_true(module: str) -> None:
    results = doctest.testmod(import_module(f"powerplan.{module}"))
    assert results.failed == 0
    assert results.attempted > 0


def test_examples_of_the_page_are_true() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    test = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, PAGE.name, str(PAGE), 0)
    result = doctest.DocTestRunner().run(test)
    assert result.failed == 0
    assert result.attempted >= 20
