"""Files that are no YAML, or YAML that a spec must not use: syntax, tags, aliases, depth, size."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import pytest
import yaml

from powerplan import documents
from powerplan.cli import main

LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 20)
)

SYNTAX = {
    "unclosed list": (
        "name: tiny\nlayers: [1, 2",
        ":3:1: is not valid YAML: did not find expected ',' or ']', "
        "while parsing a list in brackets that begins at line 2",
    ),
    "list closed by a brace": (
        "name: [tiny\nnorm: }",
        ":2:5: is not valid YAML: did not find expected ',' or ']', "
        "while parsing a list in brackets that begins at line 1",
    ),
    "unclosed mapping": (
        "name: tiny\nnorm: {kind: rmsnorm",
        ":3:1: is not valid YAML: did not find expected ',' or '}', "
        "while parsing a mapping in braces that begins at line 2",
    ),
    "unclosed quote": (
        'name: "tiny\nlayers: 3',
        ":2:10: is not valid YAML: found unexpected end of stream, while scanning a quoted text that begins at line 1",
    ),
    "unknown escape": (
        r'name: "\q"',
        ":1:8: is not valid YAML: found unknown escape character, while parsing a quoted text that begins at line 1",
    ),
    "half a surrogate pair": (
        r'name: "\ud800"',
        ":1:10: is not valid YAML: found invalid Unicode character escape code, "
        "while parsing a quoted text that begins at line 1",
    ),
    "tab": ("name: tiny\nlayers:\n\t- a", ":3:1: is not valid YAML: a tab stands here; YAML is indented with spaces"),
    "at sign": ("name: @tiny", ":1:7: is not valid YAML: a value cannot begin with @; put it in quotes"),
    "more behind the end": (
        '"tiny"\n"small"',
        ":2:1: is not valid YAML: the document has ended, and more stands here; check the indentation",
    ),
    "two colons": (
        "name: a: b",
        ":1:8: is not valid YAML: a key cannot stand here; "
        "check the indentation, and put a text that contains ': ' in quotes",
    ),
    "indentation": (
        "layers:\n  - repeat: 2\n   ffn: 3",
        ":3:4: is not valid YAML: did not find expected '-' indicator, "
        "while parsing a list that begins at line 2; check the indentation",
    ),
    "escape character": (
        "name: a\x1b[31m",
        r":1:8: a control character, '\x1b', is not accepted; a spec is plain data",
    ),
    "C1 character after other line breaks": (
        "a: 1\r\nb: 2\rc: 3\u2028d: \x9b",
        r":4:4: a control character, '\x9b', is not accepted; a spec is plain data",
    ),
}

STRUCTURE = {
    "empty": ("", ": is empty"),
    "blank lines": (" \n\n", ": is empty"),
    "comments": ("# a model\n# to be\n", ": is empty"),
    "byte order mark alone": ("\ufeff", ": is empty"),
    "empty document": ("---\n", ":2:1: a spec is a mapping with name, hidden_size, layers ..., and this is empty"),
    "list": ("- a\n- b", ":1:1: a spec is a mapping with name, hidden_size, layers ..., and this is a list"),
    "word": ("hello", ":1:1: a spec is a mapping with name, hidden_size, layers ..., and this is a text"),
    "number": ("5", ":1:1: a spec is a mapping with name, hidden_size, layers ..., and this is an integer"),
    "second document": (
        "name: a\n---\nname: b\n",
        ":2:1: a second YAML document starts here; a spec is one document",
    ),
    "key twice": ("name: a\nnorm: {}\nname: b\n", ":3:1: key 'name' is given twice; first at line 1"),
    "key twice inside": ("norm:\n  final: true\n  final: false\n", ":3:3: key 'final' is given twice; first at line 2"),
    "number as key": ("norm: {}\n5: b", ":2:1: a key must be a word, and this is 5"),
    "null as key": ("~: b", ":1:1: a key must be a word, and this is null"),
    "list as key": ("[a]: b", ":1:1: a key must be a word, and this is ['a']"),
    "python tag": (
        "name: !!python/object/apply:os.system [ls]",
        ":1:7: tag 'tag:yaml.org,2002:python/object/apply:os.system' is not accepted; a spec is plain data",
    ),
    "own tag": ("!model {}", ":1:1: tag '!model' is not accepted; a spec is plain data"),
    "tag with escapes": (r"name: !<a%1B%5B2J> x", r":1:7: tag 'a\x1b[2J' is not accepted; a spec is plain data"),
    "tag directive": (
        "%TAG !a! tag:a,2000:\n---\nname: a",
        ":1:1: a %TAG directive is not accepted; a spec is plain data",
    ),
    "undefined alias": ("name: a\nnote: *b", ":2:7: alias *b has no anchor before it"),
    "long alias": (f"name: *{'b' * 5000}", f":1:7: alias *{'b' * 60} has no anchor before it"),
    "recursive list": ("a: &a [*a]", ":1:8: alias *a stands inside its own anchor"),
    "recursive mapping": ("&a\nname: *a", ":2:7: alias *a stands inside its own anchor"),
    "merge of a number": ("<<: 5", ":1:1: << takes a mapping, or a list of mappings, and this is 5"),
    "billion laughs": (LAUGHS, ":5:55: holds more than 100,000 values"),
    "deep lists": ("[" * 900, ":1:61: is nested more than 60 levels deep"),
    "deep mappings": ("{a: " * 10_000, ":1:241: is nested more than 60 levels deep"),
    "deep blocks": ("- " * 10_000, ":1:121: is nested more than 60 levels deep"),
    "deep indentation": (
        "".join(f"{' ' * level}a:\n" for level in range(1000)),
        ":61:61: is nested more than 60 levels deep",
    ),
    "deep by aliases": (
        "a0: &a0 {x: 1}\n" + "".join(f"a{level}: &a{level} {{x: *a{level - 1}}}\n" for level in range(1, 100)),
        ":59:6: is nested more than 60 levels deep",
    ),
}

# A megabyte each. The second ones would be of 45 GB if a message quoted them whole, or keep libyaml busy for seconds.
SLOW = {
    "many values": ("[" + "a," * 500_000, ":1:200000: holds more than 100,000 values"),
    "many keys": (
        "".join(f"{index:x}z: a\n" for index in range(110_000)),
        ":100000:9: holds more than 100,000 values",
    ),
    "a long list of a long text": (
        f"hidden_size: [&a '{'x' * 500_000}'{', *a' * 90_000}]",
        ":1:14: hidden_size: ['xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx... is not an integer",
    ),
    "many directives": (
        "".join(f"%TAG !a{index}! x\n" for index in range(60_000)),
        ":1:1: a %TAG directive is not accepted; a spec is plain data",
    ),
    "many digits": (f"hidden_size: {'1' * 1_000_000}", ":1:14: a number of thousands of digits is out of range"),
    "many digits of a fraction": (
        f"hidden_size: 1.{'1' * 1_000_000}",
        ":1:14: hidden_size: 1.1111111111111112 is not an integer",
    ),
    "a long key": (
        f"{'k' * 1000}: 1",
        ":1:1: 'kkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkk...': unknown key; allowed are ...",
    ),
    "a long kind": (f"norm: {{kind: '{'rmsnorm' * 140_000}'}}", ":1:14: norm.kind: 'rmsnormrmsnormrmsnorm..."),
    "a long window": (
        f"hidden_size: 8\nlayers: [{{mixer: {{kind: linear, heads: 2, chunk_size: '{'1' * 1_000_000}k'}}}}]",
        ":2:55: layers[0].mixer.chunk_size: '11111111111111111111111...",
    ),
    "quotes": ("'" * 2**20, ":1:1: a spec is a mapping with name, hidden_size, layers ..., and this is a text"),
    "line breaks": ("\n" * 2**20, ": is empty"),
}


@pytest.mark.parametrize("case", SYNTAX | STRUCTURE)
def test_a_file_that_is_no_plain_yaml(
    expect_refusal: Callable[[list[str], str], None], spec: Callable[[str], list[str]], case: str
) -> None:
    content, message = (SYNTAX | STRUCTURE)[case]
    expect_refusal(spec(content), f"model.yaml{message}")


@pytest.mark.parametrize("case", SLOW)
def test_a_megabyte_is_refused_in_a_moment(
    expect_refusal: Callable[[list[str], str], None], spec: Callable[[str], list[str]], case: str
) -> None:
    content, message = SLOW[case]
    arguments = spec(content[: 2**20])
    start = time.process_time()
    expect_refusal(arguments, f"model.yaml{message}")
    assert time.process_time() - start < 3


@pytest.mark.parametrize("case", STRUCTURE)
def test_the_python_parser_refuses_the_same(
    expect_refusal: Callable[[list[str], str], None],
    spec: Callable[[str], list[str]],
    monkeypatch: pytest.MonkeyPatch,
    case: str,
) -> None:
    monkeypatch.setattr(documents, "_Loader", yaml.SafeLoader)
    content, message = STRUCTURE[case]
    expect_refusal(spec(content), f"model.yaml{message}")


def test_lists_deeper_than_the_parser_takes(
    spec: Callable[[str], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """libyaml reads ahead of what it gives: from some release on it may stop at its own limit, at another column."""
    assert main(spec("[" * 10_000)) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: model\.yaml:1:\d+: is nested more than 60 levels deep\n", error)
