"""Options and arguments: sizes, mixers, choices, devices, and what no command knows."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from powerplan import mixers
from powerplan.cli import main

SIZE = "is not a size in tokens; write 65536, 64k (=65536) or 1M (=1048576)"
RANGE = "is out of range; a context is 1 to 1,125,899,906,842,624 tokens (2^50)"

CONTEXTS = {
    "64q": f"'64q' {SIZE}",
    "": f"'' {SIZE}",
    "1k,,2k": f"'' {SIZE}",
    ",": f"'' {SIZE}",
    "-5": f"'-5' {SIZE}",
    "0": f"'0' {RANGE}",
    "1k,0": f"'0' {RANGE}",
    "1,000": "'1,000' could be one context or several; write 1000, or put spaces after commas",
    "65,536": "'65,536' could be one context or several; write 65536, or put spaces after commas",
    "1.5": "'1.5' is not a whole number of tokens",
    "0.3k": "'0.3k' is not a whole number of tokens",
    "1" + "0" * 40: f"'1{'0' * 40}' {RANGE}",
    "1e99": f"'1e99' {RANGE}",
    "1e999": f"'1e999' {SIZE}",
    "9" * 5000: f"'{'9' * 55}...' {SIZE}",
    "1." + "9" * 5000: f"'1.{'9' * 53}...' {SIZE}",
    "1e-3": f"'1e-3' {SIZE}",
    "0x10": f"'0x10' {SIZE}",
    "inf": f"'inf' {SIZE}",
    "nan": f"'nan' {SIZE}",
    "64 k": f"'64 k' {SIZE}",
    "64kk": f"'64kk' {SIZE}",
    "1_": f"'1_' {SIZE}",
    "６４k": f"'６４k' {SIZE}",
    "٣": f"'٣' {SIZE}",
    "1k\n2k": rf"'1k\n2k' {SIZE}",
    "\x1b[2J": rf"'\x1b[2J' {SIZE}",
    "\udcff": rf"'\udcff' {SIZE}",
}

SETTINGS = "allowed are bias, chunk_size, gated, head_dim, heads, kv_heads"
KINDS = ", ".join(sorted(mixers.MIXERS))
MIXERS = {
    "": f": '' is not a mixer; allowed are {KINDS}, window",
    "atention": f": 'atention' is not a mixer; did you mean attention? allowed are {KINDS}, window",
    "Power:p=2": ": 'Power' is not a mixer; did you mean power? allowed are ...",
    "gated_delta_net": ": 'gated_delta_net' is not a mixer; did you mean gated_deltanet? allowed are ...",
    "mamba": ": 'mamba' is not a mixer; did you mean mamba1? allowed are ...",
    "kda:gate_ranks=3": ": 'gate_ranks' is not a setting of kda; did you mean gate_rank? allowed are chunk_size, ...",
    "kda:head_dim": ": 'head_dim' is not a setting of kda; write kda:heads=8",
    "kda:heads=12,key_heads=5": ": key_heads 5 does not divide heads 12 (what is not set stays as the model has it)",
    "mamba2:groups=7": ": groups 7 does not divide heads 24 (what is not set stays as the model has it)",
    "mamba2:state_dim=0": ": state_dim: 0 is out of range; allowed is at least 1",
    "retnet:output_norm=both": ": output_norm: 'both' is not known; allowed are none, head, full",
    "gla:conv_size=2000": ": conv_size: 2000 is out of range; allowed is at most 1,024",
    "sse:top_k=5": ": top_k 5 is more than the 4 partitions there are (what is not set stays as the model has it)",
    "MSA": ": 'MSA' is not a mixer; did you mean memory_sparse? allowed are ...",
    "superlinear:spans=2": ": 'superlinear' is not a mixer; did you mean span_search? allowed are ...",
    "power-attention:p=2": ": 'power-attention' is not a mixer; did you mean power (power attention) or "
    "exponential_sparse (PowerAttention)? allowed are ...",
    "hyena:state_dim=3": ": a mode has 2 numbers, and state_dim is 3 (what is not set stays as the model has it)",
    "hyena:order=1": ": order: 1 is out of range; allowed is at least 2",
    "exponential_sparse:block_size=0": " block_size: '0' is out of range; ...",
    "span_search:window_anchors=5000": ": window_anchors: 5000 is out of range; allowed is at most 1,024",
    "span_search:backward=0": ": backward: 0 is out of range; allowed is at least 1",
    "memory_sparse:routed=1": ": routed: 1 is not true or false",
    "memory_sparse:document_size=1q": " document_size: '1q' is not a size in tokens; ...",
    "wersa:wavelet_levels=40": ": wavelet_levels: 40 is out of range; allowed is at most 16",
    "nsa:select_size=x": " select_size: 'x' is not ...",
    "dsa:q_lora_rank=none": ": q_lora_rank: 'none' is not an integer",
    "power": ": power needs its degree; write power:p=2",
    "power:": ": power needs its degree; write power:p=2",
    "power:gated=true": ": power needs its degree; write power:p=2",
    "power:p": ": 'p' is not a setting of power; write power:p=2",
    "power:p=": ": p: '' is not an integer",
    "power:p=x": ": p: 'x' is not an integer",
    "power:p=2.0": ": p: '2.0' is not an integer",
    "power:p=true": ": p: true is not an integer",
    "power:p=0": ": p: 0 is out of range; allowed is at least 1",
    "power:p=-2": ": p: -2 is out of range; allowed is at least 1",
    "power:p=17": ": p: 17 is out of range; allowed is at most 16",
    "power:p=" + "9" * 30: f": p: {'9' * 30} is out of range; allowed is at most 16",
    "power:p=" + "9" * 5000: f": p: '{'9' * 55}...' is not an integer",
    "power:p=2,p=3": ": p is given twice",
    "power:p=2,": ": '' is not a setting of power; write power:p=2",
    "power:p=2,q=3": f": 'q' is not a setting of power; {SETTINGS}, normalize, output_gate, p, qk_norm, tile, ...",
    "power:P=2": f": 'P' is not a setting of power; did you mean p? {SETTINGS}, ...",
    "power:p=2,gated=yes": ": gated: 'yes' is not true or false",
    "power:p=2,gated=1": ": gated: 1 is not true or false",
    "power:p=2,tile=0": ": tile: 0 is out of range; allowed is at least 1",
    "power:p=2,chunk_size=0": f" chunk_size: '0' {RANGE}",
    "power:p=2,chunk_size=big": f" chunk_size: 'big' {SIZE}",
    "linear:p=2": f": 'p' is not a setting of linear; {SETTINGS}, output_gate, qk_norm, v_head_dim",
    "linear:gatd=true": f": 'gatd' is not a setting of linear; did you mean gated? {SETTINGS}, ...",
    "attention:kv_heads=5": ": kv_heads 5 does not divide heads 12 (what is not set stays as the model has it)",
    "attention:heads=7": ": kv_heads 12 does not divide heads 7 (what is not set stays as the model has it)",
    "attention:kv_heads=0": ": kv_heads: 0 is out of range; allowed is at least 1",
    "attention:qk_norm=heads": ": qk_norm: 'heads' is not known; did you mean head? allowed are none, head, full",
    "attention:bias=qk": ": bias: 'qk' is not known; did you mean qkv? allowed are true, false, qkv, output",
    "attention:\x1b[2J=1": r": '\x1b[2J' is not a setting of attention; allowed are ...",
    "window": ": window needs its size; write window:4096",
    "window:": ": window needs its size; write window:4096",
    "power:3": ": '3' is not a setting of power; write power:p=3",
    "window:0": f" window: '0' {RANGE}",
    "window:-1": f" window: '-1' {SIZE}",
    "window:4096,128": f" window: '4096,128' {SIZE}",
    "window:4096,sinks=true": f" window: '4096,sinks=true' {SIZE}",
}

OWN_HEADS = "has no place beside --model, whose own heads are taken; leave one out"

# A command line each, and its message.
COMMANDS = {
    "wfsr": "No such command 'wfsr'...",
    "--nope": "No such option: --nope (powerplan --help)",
    "wsfr": "Missing argument 'MODEL' (powerplan wsfr --help)",
    "wsfr gpt2-small gpt2-xl": "Got unexpected extra argument...",
    "wsfr gpt2-small --ctz 1k": "No such option: --ctz...",
    "wsfr gpt2-small --ctx": "Option '--ctx' requires an argument...",
    "wsfr gpt2-small --form chunk": "--form: 'chunk' is not known; did you mean chunked? "
    "allowed are recurrent, chunked (powerplan wsfr --help)",
    "wsfr gpt2-small --causal none": "--causal: 'none' is not known; allowed are exact, full (powerplan wsfr --help)",
    "wsfr gpt2-small --exclude lmhead": "--exclude: 'lmhead' is not known; did you mean lm-head? "
    "allowed are lm-head (powerplan wsfr --help)",
    "wsfr gpt2-small --dtype bf61": "--dtype: 'bf61' is not known; did you mean bf16? "
    "allowed are fp32, bf16, fp16, fp8, int4 (powerplan wsfr --help)",
    "wsfr gpt2-small --by layers": "--by: 'layers' is not known; did you mean layer? "
    "allowed are component, layer (powerplan wsfr --help)",
    "wsfr gpt2-small --format xml": "--format: 'xml' is not known; "
    "allowed are table, json, csv, markdown (powerplan wsfr --help)",
    "wsfr gpt2-small --form \x1b[2J": r"--form: '\x1b[2J' is not known; allowed are recurrent, chunked ...",
    "wsfr gpt2-small --\x1b[2J": r"No such option: --\x1b[2J...",
    "dims --head-dim 0": "--head-dim: 0 is out of range; allowed are 1 to 65,536",
    "dims --head-dim 65537": "--head-dim: 65537 is out of range; allowed are 1 to 65,536",
    "dims --head-dim 64,,32": "--head-dim: '' is not an integer; write a number or a list such as 2,3,4",
    "dims --head-dim 64.0": "--head-dim: '64.0' is not an integer; write a number or a list such as 2,3,4",
    "dims --head-dim ６４": "--head-dim: '６４' is not an integer; write a number or a list such as 2,3,4",
    f"dims --head-dim {'9' * 30}": f"--head-dim: {'9' * 30} is out of range; allowed are 1 to 65,536",
    f"dims --head-dim {'9' * 5000}": f"--head-dim: '{'9' * 55}...' is not an integer; write ...",
    "dims --p 0": "--p: 0 is out of range; allowed are 1 to 16",
    "dims --p 17": "--p: 17 is out of range; allowed are 1 to 16",
    "dims --p two": "--p: 'two' is not an integer; write a number or a list such as 2,3,4",
    "dims --tile 0": "--tile: 0 is out of range; allowed are 1 to 4,096",
    "dims --tile 8,16": "--tile: '8,16' is not an integer; write one from 1 to 4,096",
    "dims --tile x": "--tile: 'x' is not an integer; write one from 1 to 4,096",
    "dims --v-head-dim -1": "--v-head-dim: -1 is out of range; allowed are 1 to 65,536",
    "hardware h100": "'h100' is not a known device; did you mean h100-sxm, h100-pcie or ...",
    "hardware a100": "'a100' is not a known device; did you mean a100-...",
    "hardware h100-sxn": "'h100-sxn' is not a known device; did you mean h100-sxm...",
    "hardware gpu": "'gpu' is not a known device...",
    "hardware \x1b[2J": r"'\x1b[2J' is not a known device (powerplan hardware lists them)",
    "hardware h100-sxm --format xml": "--format: 'xml' is not known; allowed are ...",
    "dims --model gpt2-smal": "'gpt2-smal' is neither a file nor a built-in model; did you mean gpt2-small, ...",
    "dims --model gpt2-small --p 17": "--p: 17 is out of range; allowed are 1 to 16",
    "dims --model gpt2-small --ctx 64q": f"--ctx: '64q' {SIZE}",
    "dims --model gpt2-small --ctx 1k,2k": f"--ctx: '1k,2k' {SIZE}",
    "dims --model gpt2-small --head-dim 64": f"--head-dim: {OWN_HEADS}",
    "dims --kind kda --tile 8": "--tile: has no place beside --kind, as a state has no tiles; leave one out",
    "dims --model gpt2-small --kind all": f"--kind: {OWN_HEADS}",
    "dims --ctx 64k": "--ctx: is for a model; such as --model llama-3-8b",
    "dims --like llama": "--like: is for a model; such as --model llama-3-8b",
    "models --name mine": "--name: names the model that --yaml prints; such as powerplan models gpt2-small "
    "--yaml --name mine",
    "models gpt2-xl --name mine": "--name: names the model that --yaml prints; such as powerplan models gpt2-xl --yaml "
    "--name mine",
    "models gpt2-xl --yaml --name ümlaut!": "--name: 'ümlaut!' holds '!'; a name has letters, digits and . _ -, and "
    "begins with a letter or digit",
    "models --like llama": "--like: is for a config.json, and there is no MODEL",
    "models --families --like llama": "--families: lists what is read; leave the other options and MODEL out",
    "models --yaml": "--yaml: is for one model; such as powerplan models gpt2-small --yaml",
    "models gpt2 --yaml --format json": "--yaml: is a format itself; leave --format out",
    "wsfr gpt2 --explain --format csv": "--format csv: --explain has no place in a table of numbers; "
    "take table, json or markdown",
    "dims --kind attention": "--kind: 'attention' is not a kind with a state of fixed size; allowed are linear, ...",
    "models --mixer linear": "--mixer: is for one model; such as powerplan models gpt2-small --mixer linear",
    "models gpt2-smal": "'gpt2-smal' is neither a file nor a built-in model; did you mean gpt2-small, ...",
    "doctor --verbose": "No such option: --verbose...",
    "schema gpt2-small": "Got unexpected extra argument...",
}


@pytest.mark.parametrize("ctx", CONTEXTS, ids=lambda text: ascii(text)[:30])
def test_contexts(expect_refusal: Callable[[list[str], str], None], ctx: str) -> None:
    expect_refusal(["wsfr", "gpt2-small", "--ctx", ctx], f"--ctx: {CONTEXTS[ctx]}")


@pytest.mark.parametrize("mixer", MIXERS, ids=lambda text: ascii(text)[:30])
def test_mixers(expect_refusal: Callable[[list[str], str], None], mixer: str) -> None:
    expect_refusal(["wsfr", "gpt2-small", "--ctx", "1k", "--mixer", mixer], f"--mixer{MIXERS[mixer]}")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda text: ascii(text)[:50])
def test_commands(expect_refusal: Callable[[list[str], str], None], command: str) -> None:
    expect_refusal(command.split(), COMMANDS[command])


@pytest.mark.parametrize("text", ["", " ", "h200 sxm 141", "a100-sxm\n80", "A" * 100_000])
def test_no_device_is_guessed(expect_refusal: Callable[[list[str], str], None], text: str) -> None:
    expect_refusal(
        ["hardware", text], f"{text!r} is not a known device..." if len(text) < 60 else f"'{'A' * 55}...' is ..."
    )


@pytest.mark.parametrize(
    ("mixer", "name"),
    [
        ("power:p=2,\nchunk_size=1k", "gpt2-small with power:p=2, chunk_size=1k"),
        (" window:4k ", "gpt2-small with window:4k"),
        ("attention:window=4_096", "gpt2-small with attention:window=4_096"),
    ],
)
def test_lengths_in_a_mixer_are_sizes_and_its_name_one_line(
    capsys: pytest.CaptureFixture[str], mixer: str, name: str
) -> None:
    assert main(["wsfr", "gpt2-small", "--ctx", "1k", "--mixer", mixer]) == 0
    assert capsys.readouterr().out.splitlines()[0] == f"{name}: 124.4M parameters"
