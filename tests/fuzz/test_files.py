"""Random and damaged specs and config.json files through whole commands: an answer, or one line that names the file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzzing import ends_well, fuzz
from hypothesis import given
from hypothesis import strategies as st

from powerplan.huggingface import FAMILIES
from powerplan.load import catalogue_names, catalogue_text

COMMANDS = [
    ["models", "FILE"],
    ["models", "FILE", "--yaml"],
    ["models", "FILE", "--format", "json"],
    ["wsfr", "FILE", "--ctx", "1k, 1M", "--by", "layer"],
    ["wsfr", "FILE", "--explain", "--format", "json"],
    ["wsfr", "FILE", "--mixer", "power:p=2", "--form", "chunked"],
    ["compare", "FILE", "gpt2-small", "--format", "csv"],
    ["budget", "FILE", "--flops", "1e21", "--gpu", "h100-sxm"],
    ["budget", "FILE", "gpt2-small", "--ctx", "1k, 64k", "--tokens", "300B", "--format", "csv"],
    ["decode", "FILE", "--gpu", "h100-sxm", "--format", "json"],
    ["recommend", "FILE", "--solve", "context"],
]
"""Commands that read FILE."""

CONFIG = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 4096,
    "sliding_window": 128,
    "tie_word_embeddings": False,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
    "rope_scaling": {"type": "yarn", "factor": 2.0},
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "kv_lora_rank": 32,
    "n_embd": 64,
    "n_head": 4,
    "n_layer": 4,
}

NUMBERS = ["0", "-1", "1", "9" * 20, "9" * 400, "9" * 5000, "1e308", "1e309", "-0.0", ".nan", ".inf", "NaN", "Infinity"]
NUMBERS += ["1.5", "true", "null", "~", "''", '""', "[]", "{}", "[[]]", '"4k"', "4k", "0x10", "0o7", "1_000", "１２"]

PIECES = [
    b"\0",
    b"\xff",
    b"\xfe\xff",
    b"\xc3",
    b"\xed\xa0\x80",
    b"\t",
    b"\r",
    b"\x1b[2J",
    "\u2028".encode(),
    b"\xef\xbb\xbf",
]
PIECES += [
    b"&a ",
    b"*a",
    b"<<: *a",
    b"!!python/object:x ",
    b"%TAG ! x",
    b"---\n",
    b"...\n",
    b"[" * 100,
    b"{" * 2000,
    b'"',
]
PIECES += [
    b"# ",
    b": ",
    b"- ",
    b"|\n",
    b">-\n",
    b"\\u0000",
    b"\\ud800",
    b", ",
    b"]",
    b"}",
    b"layers:\n",
    b"kind: power, p: 16, ",
]

ENCODINGS = ["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-7", "latin-1", "cp037"]

texts = st.sampled_from(sorted(catalogue_names())).map(catalogue_text)
configs = st.builds(
    lambda family, left_out, indent: json.dumps(
        {"model_type": family} | {key: value for key, value in CONFIG.items() if key not in left_out}, indent=indent
    ),
    st.sampled_from(sorted(FAMILIES)),
    st.sets(st.sampled_from(sorted(CONFIG)), max_size=3),
    st.sampled_from([None, 1]),
)


@st.composite
def damaged(draw: st.DrawFn, originals: st.SearchStrategy[str]) -> bytes:
    """The bytes of a file with numbers and words replaced, pieces put in, cut out or repeated, or the end cut off."""
    text = draw(originals)
    for _ in range(draw(st.integers(0, 2))):
        found = list(re.finditer(r"-?\b[0-9][\w.]*\b|\b[a-z_]+\b", text))
        if found:
            match = draw(st.sampled_from(found))
            text = text[: match.start()] + draw(st.sampled_from(NUMBERS)) + text[match.end() :]
    raw = text.encode(draw(st.sampled_from(ENCODINGS)), "replace")
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(raw)))
        stop = min(len(raw), start + draw(st.integers(0, 60)))
        change = draw(st.sampled_from(["insert", "overwrite", "cut", "repeat", "swap", "end", "lines"]))
        piece = draw(st.sampled_from(PIECES) | st.binary(max_size=6))
        if change == "end":
            raw = raw[:start]
        elif change == "repeat":
            raw = raw[:stop] + raw[start:stop] * draw(st.sampled_from([1, 2, 50, 3000])) + raw[stop:]
        elif change == "swap":
            raw = raw[stop:] + raw[start:stop] + raw[:start]
        elif change == "lines":
            raw = raw.replace(b"\n", draw(st.sampled_from([b"\r\n", b"\r", b"\n\n", b" ", b""])))
        else:
            raw = raw[:start] + (b"" if change == "cut" else piece) + raw[start if change == "insert" else stop :]
    return raw


@st.composite
def made(draw: st.DrawFn) -> bytes:
    """Documents that are deep, wide, or expand: what readers are broken with."""
    depth = draw(st.sampled_from([1, 10, 59, 60, 61, 1000, 100_000]))
    kind = draw(st.sampled_from(["list", "mapping", "block", "aliases", "keys", "string", "layers"]))
    if kind == "list":
        return b"layers: " + b"[" * depth + b"]" * depth
    if kind == "mapping":
        return b'{"a":' * depth + b"1" + b"}" * depth
    if kind == "block":
        return b"".join(b" " * level + b"a:\n" for level in range(min(depth, 500)))
    if kind == "aliases":
        lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, min(depth, 60)))]
        return "\n".join(lines).encode()
    if kind == "keys":
        return "\n".join(f"key{n}: {n}" for n in range(depth)).encode()
    if kind == "string":
        return b"name: " + b"a" * depth
    layer = f"{{mixer: {{kind: attention, heads: 1, head_dim: 1}}, repeat: {depth}}}"
    return f"name: x\nvocab_size: {depth}\nhidden_size: {depth}\nlayers: [{layer}]".encode()


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("files")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield path


def read(raw: bytes, name: str, command: list[str]) -> None:
    """Let a command read a file of these bytes; where it refuses them, its message names the file or an option."""
    Path(name).write_bytes(raw)
    ended = ends_well([name if word == "FILE" else word for word in command])
    if ended.code == 2:
        assert ended.err.splitlines()[-1].startswith((f"error: {name}", "error: --", "error: MODEL", "error: ")), (
            ended.err
        )


commands = st.sampled_from(COMMANDS)


@fuzz(150)
@given(raw=damaged(texts), command=commands)
def test_damaged_specs(raw: bytes, command: list[str]) -> None:
    read(raw, "model.yaml", command)


@fuzz(150)
@given(raw=damaged(configs), command=commands)
def test_damaged_configs(raw: bytes, command: list[str]) -> None:
    read(raw, "config.json", command)


@fuzz(60)
@given(
    raw=made() | st.binary(max_size=300), name=st.sampled_from(["model.yaml", "config.json", "model"]), command=commands
)
def test_made_files(raw: bytes, name: str, command: list[str]) -> None:
    read(raw, name, command)


@fuzz(6)
@given(raw=damaged(texts) | damaged(configs), name=st.sampled_from(["model.yaml", "config.json"]))
def test_recommend(raw: bytes, name: str) -> None:
    read(raw, name, ["recommend", "FILE"])
