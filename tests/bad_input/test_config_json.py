"""A config.json that is no JSON, or none that can be counted."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from powerplan.cli import main
from powerplan.load import load_model

LLAMA = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}

TEXTS = {
    "empty": ("", ": is empty"),
    "blank": (" \n", ": is empty"),
    "unclosed": ("{", ":1:2: is not valid JSON: Expecting property name enclosed in double quotes"),
    "trailing comma": (
        '{"a": 1,\n}',
        ":1:8: is not valid JSON: Illegal trailing comma before end of object"
        if sys.version_info >= (3, 13)
        else ":2:1: is not valid JSON: Expecting property name enclosed in double quotes",
    ),
    "no colon": ('{"a" 1}', ":1:6: is not valid JSON: Expecting ':' delimiter"),
    "comment": ('{"a": 1 // one\n}', ":1:9: is not valid JSON: Expecting ',' delimiter"),
    "single quotes": ("{'a': 1}", ":1:2: is not valid JSON: Expecting property name enclosed in double quotes"),
    "more after the end": ("{}\n{}", ":2:1: is not valid JSON: Extra data"),
    "escape character in a string": ('{"a": "\x1b"}', ":1:8: is not valid JSON: Invalid control character"),
    "list": ("[]", ":1:1: a config.json is an object, and this is not one"),
    "number": ("5", ":1:1: a config.json is an object, and this is not one"),
    "null": ("null", ":1:1: a config.json is an object, and this is not one"),
    "deep lists": ('{"a": ' + "[" * 100_000, ":1:66: is nested more than 60 levels deep"),
    "deep objects": ('{"a":' * 100_000, ":1:301: is nested more than 60 levels deep"),
    "deep and closed": (
        '{"a": ' + "[" * 900 + "]" * 900 + "}",
        ":1:66: is nested more than 60 levels deep",
    ),
    "key twice": ('{"a": 1,\n "b": 2,\n "a": 3}', ":3:2: key 'a' is given twice; first at line 1"),
    "key twice inside": (
        '{"a": [0, {"b": 1,\n  "b": 2}]}',
        ":2:3: key 'b' is given twice; first at line 1",
    ),
    "key with escapes twice": (
        r'{"\u001b\n": 1, "\u001b\n": 2}',
        r":1:17: key '\x1b\n' is given twice; first at line 1",
    ),
    "number of thousands of digits": (
        '{"vocab_size":\n ' + "9" * 5000 + "}",
        ":2:2: a number of thousands of digits is out of range",
    ),
    "half a surrogate pair": (
        r'{"_name_or_path": "\ud800"}',
        ":1:19: half of a surrogate pair is not a character",
    ),
    "half a surrogate pair in a key": (r'{"\udfff": 1}', ":1:2: half of a surrogate pair is not a character"),
    "many values": ("[" + "1," * 1_500_000 + "1]", ":1:2000000: holds more than 1,000,000 values"),
}

# What LLAMA is changed to, one key to a line, and the message after "config.json:".
CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"model_type": None}, "1:1: has no model_type, so its family is unknown; a powerplan spec is YAML, ..."),
    ({"model_type": 5}, "2:17: model_type must be a word, and is 5"),
    (
        {"model_type": "lama"},
        "2:17: model_type 'lama' is not supported; did you mean llama? powerplan models --families lists what is",
    ),
    ({"model_type": "bert"}, "2:17: model_type 'bert' is not supported: it is an encoder, or built as one, and ..."),
    ({"model_type": "x" * 10**6}, f"2:17: model_type '{'x' * 55}...' is not supported; its keys are ..."),
    (
        {"model_type": "\x1b[2J\n"},
        r"2:17: model_type '\x1b[2J\n' is not supported; its keys are most like those of llama: ...",
    ),
    ({"hidden_size": "64"}, "4:18: hidden_size must be an integer, and is '64'"),
    ({"hidden_size": 64.0}, "4:18: hidden_size must be an integer, and is 64.0"),
    ({"hidden_size": True}, "4:18: hidden_size must be an integer, and is true"),
    ({"hidden_size": [64]}, "4:18: hidden_size must be an integer, and is [64]"),
    ({"hidden_size": float("nan")}, "4:18: hidden_size must be an integer, and is nan"),
    ({"hidden_size": float("-inf")}, "4:18: hidden_size must be an integer, and is -inf"),
    ({"hidden_size": 0}, "4:18: hidden_size 0 is out of range; allowed are 1 to 1,000,000,000"),
    ({"hidden_size": -64}, "4:18: hidden_size -64 is out of range; allowed are 1 to 1,000,000,000"),
    ({"hidden_size": 10**30}, "4:18: hidden_size 1000000000000000000000000000000 is out of range; allowed are ..."),
    ({"num_hidden_layers": 10**6}, "5:24: num_hidden_layers 1000000 is out of range; allowed are 1 to 10,000"),
    ({"num_attention_heads": 5}, "4:18: hidden_size 64 is not a multiple of num_attention_heads 5, and ..."),
    ({"num_key_value_heads": 3}, "8:26: num_key_value_heads 3 does not divide num_attention_heads 4"),
    ({"attention_bias": "yes"}, "8:21: attention_bias must be true or false, and is 'yes'"),
]


def write(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content, encoding="utf-8")


@pytest.mark.parametrize("case", TEXTS)
def test_a_config_that_is_no_json(
    expect_refusal: Callable[[list[str], str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    content, message = TEXTS[case]
    monkeypatch.chdir(tmp_path)
    write(tmp_path, content)
    expect_refusal(["wsfr", "config.json"], f"config.json{message}")


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=lambda value: ascii(value)[:50])
def test_a_config_that_is_no_model(
    expect_refusal: Callable[[list[str], str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, json.dumps(LLAMA | change, indent=2))
    expect_refusal(["wsfr", "config.json"], f"config.json:{message}")


def test_a_config_of_a_folder_is_named_in_the_message(
    expect_refusal: Callable[[list[str], str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    write(Path("mine"), "{")
    expect_refusal(["wsfr", "mine"], "mine/config.json:1:2: is not valid JSON: Expecting property name ...")


def test_the_config_itself_is_good(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, json.dumps(LLAMA))
    assert main(["wsfr", str(tmp_path / "config.json"), "--ctx", "1k"]) == 0
    assert capsys.readouterr().err == ""


def test_a_folder_lends_its_name_without_control_characters(tmp_path: Path) -> None:
    folder = tmp_path / "a\x1b[2J\n\udcff"
    folder.mkdir()
    write(folder, json.dumps(LLAMA))
    assert load_model(folder).spec.name == r"a\x1b[2J\n\udcff"
