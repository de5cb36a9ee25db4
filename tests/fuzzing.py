"""What the fuzzers of tests/fuzz share: how many examples, hostile values, and what every command owes its user.

POWERPLAN_FUZZ=20000 pytest tests/fuzz runs that many random examples of each test instead of a few fixed ones.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple, get_args

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from powerplan.choices import (
    By,
    Causal,
    Dtype,
    Engine,
    Form,
    Format,
    Keep,
    Loss,
    Master,
    MatmulsDtype,
    Optimizer,
    Recompute,
    Schedule,
    Side,
    Trainer,
    TrainingDtype,
    Twin,
    Unknown,
)
from powerplan.cli import main
from powerplan.dtypes import CACHE_BITS
from powerplan.swap.value import KINDS

ROUNDS = os.environ.get("POWERPLAN_FUZZ")
PROFILE = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "profile-cpu.json"
"""A saved profile."""
CASES = Path(__file__).resolve().parent / "data" / "cases"
"""config.json files."""


def fuzz(examples: int) -> settings:
    """Return the settings of a test: `examples` fixed ones, or POWERPLAN_FUZZ random ones."""
    return settings(
        deadline=None,
        max_examples=int(ROUNDS) if ROUNDS else examples,
        derandomize=not ROUNDS,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


HOSTILE = ["\x1b[2J", "\n", "\u2028", "x` - at `$.layers", "name: x", "9" * 5000, "é" * 70, "<<", "~"]
hostile = st.sampled_from(HOSTILE)

# Without slashes: a word may become the name of a file, which stays in the working directory.
hostile_words = st.text(max_size=12).map(lambda text: text.replace("/", "")) | st.sampled_from(
    [
        *HOSTILE,
        *("", " ", "-", "--", "-1", "0", "00", "+1", "1.5", "1e400", "1e-400", "nan", "inf", "-inf", "0x10", "１", "٣"),
        *("1:0", "1,", ",", "1,,2", ":", "=", "p=", "a:b:c", "p=2,p=3", "64k,64k", "1k, 2k", "∞", "½", "\udcff", "\0"),
        *("--help", "--format", "/dev/null", ".", "..", "/", "none.json", "%s", "{}", "{0}", "$HOME", "a" * 10_000),
        *("9" * 30, "1" + "0" * 40, "1e40", "1e41", "2^80", "1GiB", "18446744073709551616", "null", "true", "[red]x"),
    ]
)

CONTEXTS = ["1", "1k", "64k", "1M", "65536", "1k, 8k", "8k,64k"]
MIXERS = [
    *sorted(KINDS),
    *("window:4096", "power:p=2", "power:p=16", "power:p=3,gated=true", "linear:gated=true", "attention:heads=4"),
    *("attention:kv_heads=1", "power:p=2,chunk_size=1k", "mamba2:heads=8", "kda:heads=2,head_dim=8"),
]
MODELS = [
    "gpt2-small",
    "deepseek-v3",
    "power-coder-3b",
    "gemma-3-1b",
    "kimi-linear-48b-a3b",
    "gpt-oss-20b",
    "rwkv7-0.4b",
    *(str(CASES / f"{name}.json") for name in ("kimi_k3_like", "santacoder_like", "k25_nvfp4_like")),
]
DEVICES = ["h100-sxm", "a100-sxm-80gb", "h200-sxm", "b200-sxm", "tpu-v5e", "h100"]
COUNTS = ["1", "1e21", "300B", "1.5T", "1e40"]
SMALL = ["1", "2", "3", "8", "64", "1,2", "2,3,4"]

VALUES: dict[str, Sequence[str]] = {
    "model": MODELS,
    "models": MODELS,
    "device": DEVICES,
    "name": ["table2", "table3", "figure2", "table4", "power-speed", "kimi", "hybrids", "field", "all"],
    "--ctx": CONTEXTS,
    "--mixer": MIXERS,
    "--by": get_args(By),
    "--explain": (),
    "--form": get_args(Form),
    "--causal": get_args(Causal),
    "--exclude": ["lm-head", "mla", "lm-head,window"],
    "--like": ["llama", "gpt_bigcode", "kimi_k3", "deepseek_v3", "mamba", "gemma4", "zaya"],
    "--families": (),
    **dict.fromkeys(["--dtype", "--weights-dtype", "--state-dtype"], get_args(Dtype)),
    "--cache-dtype": [*CACHE_BITS, "int4:group=64", "fp8:group=128,scale=fp16", "int2:group=32,zero=none"],
    "--format": get_args(Format),
    "--flops": COUNTS,
    "--tokens": COUNTS,
    "--gpu-hours": ["1", "1000", "1e9"],
    "--gpu": DEVICES,
    "--max-days": ["1", "0.5", "1000"],
    "--mfu": ["0.4", "40%", "1", "0.0001"],
    "--devices": ["1", "8", "10000000"],
    "--batch-tokens": ["512k", "1", "4M"],
    "--stage": ["1B@8k", "950B@64k", "1@1"],
    "--micro-batch": ["auto", "1", "8"],
    "--parallel": ["auto", "fsdp=8", "tp=8", "fsdp=2,cp=4", "pp=2,fsdp=4,interleave=2", "replicas=2,fsdp=4,ep=2"],
    "--zero": ["0", "1", "2", "3"],
    "--schedule": get_args(Schedule),
    "--recompute": ["auto", *get_args(Recompute)],
    "--optimizer": get_args(Optimizer),
    "--master": get_args(Master),
    "--loss": get_args(Loss),
    "--efficiency": ["0.5", "40%", "weights=0.6,attention=0.5", "recurrent=1", "experts=0.25,fp8=40%"],
    "--overlap": ["experts=0", "tensor=1,experts=90%"],
    "--matmuls-dtype": get_args(MatmulsDtype),
    "--export": get_args(Trainer),
    "--price": ["2.50", "0", "3"],
    "--node-devices": ["1", "8", "72"],
    "--link-gbs": ["50", "0.001", "12.5"],
    "--network-gbs": ["50", "0.001", "12.5"],
    **dict.fromkeys(["--gradients-dtype", "--moments-dtype"], get_args(TrainingDtype)),
    "--measured": [str(PROFILE)],
    "--batch": SMALL,
    "--twin": get_args(Twin),
    **dict.fromkeys(["--cache-budget", "--prefill-chunk", "--checkpoint-every"], ("1", "4k", "1M")),
    "--engine": get_args(Engine),
    "--lengths": ["4k", "4k:0.9,64k:0.1", "lognormal:mean=4k,p99=64k", "lognormal:median=400,sigma=2,max=8k"],
    "--page": ["1", "16", "64"],
    "--target": ["1:1", "3:1", "1:2.5", "1000:1"],
    "--max-state": ["512MiB", "1GiB", "1", "2GB"],
    "--max-decode-bytes": ["512MiB", "100GiB", "1"],
    "--keep": get_args(Keep)[:1],  # To resize a model takes seconds.
    "--only": ["attention", "window", "power", "mix", "linear,power", "kda,attention", "mla", "mamba2"],
    "--weights-vs-state": get_args(Side),
    "--solve": get_args(Unknown),
    "--equal-state": MIXERS,
    "--model": MODELS,
    "--name": ["mine", "gpt2-small-power-p2", "1.0_x"],
    "--top": ["1", "3", "1000"],
    "--pick": ["1", "2", "30"],
    "--write": ["/dev/null"],
    "--plot": ["no/x.png"],
    "--save": ["/dev/null"],
    "--force": (),
    **dict.fromkeys(["--json", "--quiet", "--no-color"], ()),
    "--output": ["-"],
    "--head-dim": ["1", "64", "32,64", "65536"],
    "--p": ["1", "2", "1,2,3", "16"],
    "--tile": ["1", "8", "4096"],
    "--v-head-dim": ["1", "64"],
    "--kind": ["all", "kda", "kda,mamba2", "power"],
    "--yaml": (),
    "--pass": ["forward", "train", "decode", "decode,train", "forward+backward"],
    "--against": ["attention", "softmax", "window", "linear", "none", "attention,window"],
    "--impl": ["auto", "torch", "recurrent", "reference", "triton"],
    "--device": ["auto", "cpu", "cuda", "cuda:1"],
    "--chunk-size": ["auto", "64", "64,128"],
    "--breakdown": (),
    "--time-limit": ["1", "60", "5min", "24h"],
    "--memory-limit": ["1", "4GiB"],
    "--show": [str(PROFILE)],
}
"""Valid values of every option and argument; a flag has none."""


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def run(arguments: Sequence[str]) -> Ended:
    """Run a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main(list(arguments))
    return Ended(code, out.getvalue(), err.getvalue())


def ends_well(arguments: Sequence[str]) -> Ended:
    """Run a command line, and hold it to the contract.

    An exit code that is documented; notes and at most one error on stderr, a printable line each; nothing on stdout
    beside an error; an answer where there is none, in JSON where that is asked for.
    """
    ended = run(arguments)
    check_contract(ended, to_file=any(word.startswith(("report", "-o", "-qo", "--output")) for word in arguments))
    if ended.code == 0 and ended.out.startswith("{"):
        answer = json.loads(ended.out, parse_constant=_refuse)
        assert answer.get("schema", "").startswith("powerplan.") or "$schema" in answer
    return ended


def check_contract(ended: Ended, to_file: bool = False) -> None:
    """Hold what a command printed to the contract; see ends_well. to_file: whether its answer may be in a file."""
    assert ended.code in (0, 2, 3, 4), ended
    *lines, rest = ended.err.split("\n")
    assert rest == "", ended.err
    assert all(line.isprintable() and line.startswith(("error: ", "note: ")) for line in lines), ended.err
    errors = [line for line in lines if line.startswith("error: ")]
    if ended.code:
        assert ended.out == ""
        assert errors == lines[-1:], ended.err
        assert 7 < len(errors[0]) < 2200
    else:
        assert not errors
        assert ended.out.strip() or to_file


def _refuse(constant: str) -> Any:
    raise AssertionError(f"{constant} is no JSON")
