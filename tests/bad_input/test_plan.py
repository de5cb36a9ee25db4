"""Options of budget, compare and recommend: each mistake has one message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from powerplan.measured import MAX_FILE_BYTES
from powerplan.search.choices import NAMED_KINDS

SHARE = "is out of range; a share is more than 0 and at most 1 (100%)"

NO_BUDGET = "is missing; give one, or a budget to ask which: --flops 1e21, or --gpu-hours 1000 --gpu h100-sxm"
MANY = ",".join(map(str, range(1, 1002)))

COMMANDS = {
    "budget gpt2-small --flops 0": "--flops: '0' is out of range; allowed are 1 to 1e40",
    "budget gpt2-small --flops -1": "--flops: '-1' is not a count of FLOPs; write 1e21, 300B (=3e11) or 1.5T",
    "budget gpt2-small --flops 1e41": "--flops: '1e41' is out of range; allowed are 1 to 1e40",
    "budget gpt2-small --flops 0.5": "--flops: '0.5' is not a whole number",
    "budget gpt2-small --tokens lots": "--tokens: 'lots' is not a count of tokens; write 1e21, 300B (=3e11) or 1.5T",
    "budget gpt2-small --tokens 1B --flops 1e20": "--flops and --tokens are one budget twice; give one of them",
    "budget gpt2-small --gpu-hours 10": "--gpu-hours: needs the device; such as --gpu h100-sxm",
    "budget gpt2-small --gpu-hours x --gpu h100-sxm": "--gpu-hours: 'x' is not a number of hours; ...",
    "budget gpt2-small --gpu-hours 0 --gpu h100-sxm": "--gpu-hours: '0' is out of range; allowed are 1 to 1e40",
    "budget gpt2-small --gpu-hours 1e39 --gpu h100-sxm": "--gpu-hours: more FLOPs than 1e40",
    "budget gpt2-small --mfu 0.5": "--mfu: needs the device; such as --gpu h100-sxm",
    "budget gpt2-small --devices 8": "--devices: needs the device; such as --gpu h100-sxm",
    "budget gpt2-small --devices 0 --gpu h100-sxm": "--devices: 0 is out of range; allowed are 1 to 10,000,000",
    "budget gpt2-small --gpu h100": "'h100' is not a known device; did you mean h100-sxm, h100-pcie or ...",
    "budget gpt2-small --mfu 0": f"--mfu: '0' {SHARE}",
    "budget gpt2-small --mfu 1.5": f"--mfu: '1.5' {SHARE}",
    "budget gpt2-small --mfu 140%": f"--mfu: '140%' {SHARE}",
    "budget gpt2-small --mfu high": "--mfu: 'high' is not a share; write 0.4 or 40%",
    "budget gpt2-small --batch-tokens 0": "--batch-tokens: '0' is out of range; ...",
    "budget gpt2-small --ctx 1k,2q": "--ctx: '2q' is not a size in tokens; ...",
    "budget gpt2-small --ctx 65,536": "--ctx: '65,536' could be one context or several; write 65536, or ...",
    "budget gpt2-small --measured none.json": "none.json: no such file",
    "budget gpt2-small gpt2": "MODEL: gpt2-small is given twice; give each model once",
    "budget gpt2-small gpt2-smal": "'gpt2-smal' is neither a file nor a built-in model; ...",
    "budget gpt2-small gpt2-xl --like llama": "--like: is for a config.json, and gpt2-small is a built-in model",
    "budget gpt2-small gpt2-xl --tokens 1B --flops 1e20": "--flops and --tokens are one budget twice; give one of them",
    f"budget gpt2-small --ctx {MANY}": "--ctx: 1 times 1,001 models and contexts are too many; 1,000 rows are the most",
    "budget": f"MODEL: {NO_BUDGET}",
    "budget --gpu h100-sxm --devices 8": f"MODEL: {NO_BUDGET}",
    "budget --gpu-hours 1000": "--gpu-hours: needs the device; such as --gpu h100-sxm",
    "budget --gpu-hours 1e39 --gpu h100-sxm": "--gpu-hours: more FLOPs than 1e40",
    "budget --tokens 1B": "--tokens: needs a model; without one the budget is --flops or --gpu-hours",
    "budget --flops 1e21 --gpu h100-sxm --like llama": "--like: is for a config.json, and there is no MODEL",
    "budget --flops 1e21 --mixer kdb": "--mixer: 'kdb' is not a mixer; ...",
    "budget --flops 1e21 --ctx ,": "--ctx: '' is not a size in tokens; ...",
    f"budget --flops 1e21 --ctx {MANY}": "--ctx: 1,001 contexts are too many to size models at; give 16 at most",
    "decode": "Missing argument 'MODEL...' (powerplan decode --help)",
    "decode gpt2-small --batch 0": "--batch: 0 is out of range; allowed are 1 to 65,536",
    "decode gpt2-small --batch 65537": "--batch: 65537 is out of range; allowed are 1 to 65,536",
    "decode gpt2-small --batch 1,x": "--batch: 'x' is not an integer; write a number or a list such as 2,3,4",
    "decode gpt2-small --ctx 0": "--ctx: '0' is out of range; ...",
    "decode gpt2-small --devices 4": "--devices: needs the device; such as --gpu h100-sxm",
    "decode gpt2-small --hardware h100": "'h100' is not a known device; did you mean h100-sxm, h100-pcie or ...",
    "decode gpt2-small --twin atention": "--twin: 'atention' is not known; did you mean attention? allowed are ...",
    "decode gpt2-small --cache-budget lots": "--cache-budget: 'lots' is not a size in tokens; ...",
    "decode gpt2-small --cache-budget 0": "--cache-budget: '0' is out of range; a budget is 1 to ...",
    "decode gpt2-small --prefill-chunk 1.5": "--prefill-chunk: '1.5' is not a whole number of tokens",
    "decode gpt2-small --prefill-chunk 0": "--prefill-chunk: '0' is out of range; a chunk is 1 to ...",
    "decode gpt2-small --checkpoint-every -1": "--checkpoint-every: '-1' is not a size in tokens; ...",
    "decode gpt2-small --checkpoint-every 0": "--checkpoint-every: '0' is out of range; the ...",
    "decode gpt2-small --checkpoint-every 4k --cache-budget 4k": "--checkpoint-every: a prefix cannot go on from a "
    "cache that eviction has changed since; leave --cache-budget out",
    "decode gpt2-small --page 0": "--page: '0' is out of range; a page is 1 to ...",
    "decode gpt2-small --engine vlm": "--engine: 'vlm' is not known; did you mean vllm? allowed are vllm, sglang ...",
    "decode deepseek-v3.2-exp --engine vllm": "--engine vllm: how it allocates dsa, as in deepseek-v3.2-exp, is not "
    "known here; attention, chunked_attention, mla are; --page 16 counts whole pages of any kind",
    "decode llama-3-8b --twin attention": "--twin attention: llama-3-8b has attention in every layer already",
    "compare gpt2-small": "MODEL: compare needs two models or more, or one with --mixer; such as powerplan compare "
    "gpt2-small llama-3-8b",
    "compare gpt2-small gpt2-smal": "'gpt2-smal' is neither a file nor a built-in model; ...",
}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda text: text[:60])
def test_commands(expect_refusal: Callable[[list[str], str], None], command: str) -> None:
    expect_refusal(command.split(), COMMANDS[command])


RESULT = {
    "name": "x",
    "impl": "torch",
    "pass": "forward",
    "context": 4096,
    "ms_p50": 1.0,
    "mixer": "power",
    "heads": 1,
    "kv_heads": 1,
    "head_dim": 64,
}


def saved(**changes: object) -> dict[str, object]:
    """Return a saved profile of one row, with changes in that row."""
    return {"schema": "powerplan.profile/1", "device": "x", "results": [RESULT | changes]}


UNREAD = "--measured: p.json "
WRONG: dict[str, tuple[object, str]] = {
    "list": ([], UNREAD + "has no schema; wanted is powerplan.profile/1, what powerplan profile --save writes"),
    "version": ({"schema": "powerplan.profile/9"}, UNREAD + "is of schema 'powerplan.profile/9'; wanted is ..."),
    "nothing": (saved() | {"results": []}, UNREAD + "holds no results"),
    "missing": ({"schema": "powerplan.profile/1", "results": [RESULT]}, "p.json:1:1: device: is missing"),
    "no row": (saved() | {"results": [3]}, "p.json:1:62: results[0]: 3 is not a mapping"),
    "zero": (saved(ms_p50=0), "p.json:1:139: results[0].ms_p50: 0 is out of range; allowed is at least 1e-15"),
    "denormal": (saved(ms_p50=5e-324), "p.json:1:139: results[0].ms_p50: 5e-324 is out of range; allowed is ..."),
    "nan": (saved(tflops=float("nan")), "p.json:1:215: results[0].tflops: nan is not a finite number"),
    "infinite": (saved(ms_p50=float("inf")), "p.json:1:139: results[0].ms_p50: inf is not a finite number"),
    "beyond 63 bits": (saved(heads=2**64), "p.json:1:171: results[0].heads: 18446744073709551616 is out of range"),
    "control": (saved(impl="a\x1b[2J"), "p.json:1:84: results[0].impl: holds a character that does not print, '\\x1b'"),
    "pass": (
        saved(**{"pass": "train"}),
        "p.json:1:101: results[0].pass: 'train' is not known; ...",
    ),
    "digits": (saved(mixer="window:" + "9" * 5000), "p.json:1:153: results[0].mixer: 'window:99999..."),
    "superscript": (
        saved(mixer="window:²"),
        "p.json:1:153: results[0].mixer: 'window:²' is not a mixer that is timed; "
        "allowed are attention, window:4096, linear, power, power:p=2 and recurrent kinds such as kda",
    ),
    "degree": (saved(mixer="power:p=2", p=3), "p.json:1:214: results[0].p: 3 contradicts the mixer, power:p=2"),
    "heads": (saved(heads=3, kv_heads=2), "p.json:1:186: results[0].kv_heads: 2 does not divide heads 3"),
    "spread": (saved(ms_p20=2.0), "p.json:1:215: results[0].ms_p20: 2.0 is more than ms_p50 1.0"),
    "unknown": (saved(prt="ffn"), "p.json:1:205: results[0].prt: unknown key; did you mean part? ..."),
}


@pytest.mark.parametrize("case", WRONG)
def test_profiles(
    expect_refusal: Callable[[list[str], str], None], case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data, message = WRONG[case]
    Path("p.json").write_text(json.dumps(data))
    expect_refusal(["budget", "gpt2-small", "--gpu", "h100-sxm", "--measured", "p.json"], message)


def test_a_profile_that_says_a_thing_twice(
    expect_refusal: Callable[[list[str], str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.json").write_text(json.dumps(saved()).replace('"head_dim"', '"heads": 2, "head_dim"'))
    expect_refusal(
        ["recommend", "gpt2-small", "--measured", "p.json"], "p.json:1:189: key 'heads' is given twice; first at line 1"
    )


def test_a_profile_of_many_megabytes(
    expect_refusal: Callable[[list[str], str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.json").write_text(json.dumps(saved()) + " " * MAX_FILE_BYTES)
    message = "p.json: is larger than 4 MiB; a saved profile has some kilobytes"
    expect_refusal(["recommend", "gpt2-small", "--measured", "p.json"], message)


def test_a_profile_without_the_rates_of_its_device(
    expect_refusal: Callable[[list[str], str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.json").write_text(json.dumps({"schema": "powerplan.profile/1", "device": "x", "results": [RESULT]}))
    expect_refusal(
        ["budget", "gpt2-small", "--measured", "p.json"], "--measured: needs the device; such as --gpu h100-sxm"
    )


ALWAYS = "allowed are attention, window, linear, power, mla, mix"
KINDS = f"{ALWAYS}, {', '.join(NAMED_KINDS)}"
NAMES = "a name has letters, digits and . _ -, and begins with a letter or digit"

RECOMMEND = {
    "--target 0:1": "--target: '0:1' has a side of 0; both sides of a ratio are more than 0",
    "--target 1": "--target: '1' is not a ratio; write 1:1, 3:1 or 1:2.5 (weight to state)",
    "--target -1:1": "--target: '-1:1' is not a ratio; ...",
    "--max-state 0": "--max-state: '0' is out of range; allowed are 1 byte to 2^80",
    "--max-state -5MiB": "--max-state: '-5MiB' is not a size in bytes; write 512MiB, 2GB (=2e9) or 1048576",
    "--max-decode-bytes lots": "--max-decode-bytes: 'lots' is not a size in bytes; ...",
    "--flops 0": "--flops: '0' is out of range; allowed are 1 to 1e40",
    "--tokens 10B": "--tokens: needs the budget that they must fit; add --flops",
    "--hardware h1000": "'h1000' is not a known device; ...",
    "--devices 4": "--devices: needs the device; such as --gpu h100-sxm",
    "--max-days 3": "--max-days: needs the device; such as --gpu h100-sxm",
    "--gpu-hours 1000": "--gpu-hours: needs the device; such as --gpu h100-sxm",
    "--price 2.50 --devices 8": "--price: needs the device; such as --gpu h100-sxm",
    "--gpu h100-sxm --max-days 0": "--max-days: '0' is out of range; allowed is more than 0",
    "--gpu h100-sxm --max-days -3": "--max-days: '-3' is not a number of days; write 30 or 1.5",
    "--gpu h100-sxm --price -2.50": "--price: '-2.50' is not an amount of money; write 2.50",
    "--gpu h100-sxm --gpu-hours 0": "--gpu-hours: '0' is out of range; allowed are 1 to 1e40",
    "--gpu rtx-4090 --devices 64 --price 1": "--devices: the catalogue has no rates of links that join 64 rtx-4090",
    "--gpu h100-sxm --devices 10000000 --price 1": "--devices: no layout of 10,000,000 devices can share a batch of "
    "4,194,304 tokens in sequences of 65,536 evenly",
    "--solve p --max-days 3 --gpu-hours 9 --price 0": "--solve: answers with one number: leave --max-days, --gpu-hours "
    "and --price out",
    "--devices 0": "--devices: 0 is out of range; allowed are 1 to 10,000,000",
    "--keep params": "--keep: 'params' is not known; allowed are weights, flops (powerplan recommend --help)",
    "--only power --exclude power": "--only, --exclude: power is asked for and excluded",
    "--only pwoer": f"--only: 'pwoer' is not known; did you mean power? {KINDS}",
    "--exclude lm_head": f"--exclude: 'lm_head' is not known; did you mean lm-head? {KINDS}, lm-head",
    "--only mla": "--only mla: no candidate is left of gpt2-small",
    "--top 0": "--top: 0 is out of range; allowed are 1 to 1,000",
    "--pick 99 --write x.yaml": "--pick: 99 is out of range; allowed are 1 to 6",
    "--solve heads": "--solve: 'heads' is not known; allowed are context, window, p (powerplan recommend --help)",
    "--pick 2": "--pick: says which candidate --write saves; such as --pick 2 --write model.yaml",
    "--solve window --ctx 1k,2k": "--solve: answers with one number: leave lists of contexts out",
    "--solve p --write x.yaml": "--solve: answers with one number: leave --write out",
    "--solve p --top 3 --plot x.png": "--solve: answers with one number: leave --top and --plot out",
    "--solve p --max-state 1GiB --max-decode-bytes 1GiB --flops 1e21 --tokens 1B": "--solve: answers with one number: "
    "leave --max-state, --max-decode-bytes, --flops and --tokens out",
    "--solve p --gpu h100-sxm --devices 2 --keep flops --weights-vs-state state": "--solve: answers with one number: "
    "leave --gpu, --devices, --keep and --weights-vs-state out",
    "--solve p --only power --exclude lm-head,window --measured p.json --pick 2": "--solve: answers with one number: "
    "leave --only, kinds of --exclude, --measured and --pick out",
    "--solve context --form chunked --mixer power:p=2": "--solve context: needs --form recurrent: chunked, ...",
    "--equal-state power:p=2": "--equal-state: says what --solve looks for; such as --solve window --equal-state "
    "power:p=2",
    "--solve p --equal-state powr:p=2": "--equal-state: 'powr' is not a mixer; did you mean power? ...",
    "--solve p --equal-state power": "--equal-state: power needs its degree; write power:p=2",
    "--solve p --equal-state window:4x": "--equal-state window: '4x' is not a size in tokens; write 65536, ...",
    "--solve p --equal-state power:p=2,heads=7": "--equal-state: kv_heads 12 does not divide heads 7 ...",
    "--solve p --equal-state window:4k --target 2:1": "--equal-state: asks for a state, and --target for a ratio; "
    "leave one out",
    "--solve context --equal-state attention": "--equal-state: attention has a state that grows too; name one of fixed "
    "size, such as power:p=2",
    "--name mine": "--name: names the model that --write saves; such as --write model.yaml --name my-model",
    "--solve p --name mine": "--solve: answers with one number: leave --name out",
    "--write x.yaml --name a/b": f"--name: 'a/b' holds '/'; {NAMES}",
    "--write x.yaml --name -": f"--name: '-' is not a name; {NAMES}",
    f"--write x.yaml --name {'x' * 201}": f"--name: '{'x' * 55}...' has 201 characters; allowed are up to 200",
    "--weights-vs-state both": "--weights-vs-state: 'both' is not known; allowed are weights, state ...",
    "--plot out.gif": "--plot: out.gif must end in .png, .svg, .pdf",
    "--plot nowhere/out.png": "--plot: nowhere/out.png: there is no folder nowhere",
    "--write .": "--write: . is a folder; give a file",
    "--measured none.json": "none.json: no such file",
}


@pytest.mark.parametrize("options", RECOMMEND, ids=lambda text: text[:60])
def test_recommend(
    expect_refusal: Callable[[list[str], str], None], options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["recommend", "gpt2-small", *options.split()]
    expect_refusal(arguments if "--ctx" in options else [*arguments, "--ctx", "64k"], RECOMMEND[options])
    assert list(tmp_path.iterdir()) == []
