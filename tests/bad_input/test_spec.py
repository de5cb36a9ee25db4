"""Specs that are YAML and no model: unknown keys and kinds, values that are missing, wrong, or contradictory."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from powerplan.cli import main
from powerplan.ffn import FFNS
from powerplan.mixers import MIXERS

SPEC = """\
name: tiny
vocab_size: 1000
hidden_size: 768
tie_embeddings: false
norm: {kind: rmsnorm, per_layer: 2}
layers:
  - repeat: 2
    mixer: {kind: attention, heads: 12, kv_heads: 4}
    ffn: {kind: moe, experts: 8, top_k: 2, intermediate_size: 64}
  - pattern:
      - mixer: {kind: power, p: 2, heads: 12}
        ffn: {kind: mlp, intermediate_size: 3072}
      - mixer: {kind: mla, heads: 4, kv_lora_rank: 8, qk_nope_head_dim: 8, qk_rope_head_dim: 8, v_head_dim: 8}
"""
KINDS = ", ".join(sorted(MIXERS))
HEAD = "name: tiny\nvocab_size: 1000\nhidden_size: 768\n"

# One mistake in SPEC each: what is replaced by what, and the message after "model.yaml:".
STRUCTURE = r"""
vocab_size => vocabsize
    2:1: vocabsize: unknown key; did you mean vocab_size? allowed are ...
per_layer => per_layers
    5:23: norm.per_layers: unknown key; did you mean per_layer? allowed are bias, embedding, final, kind, per_layer
repeat => repeats
    7:5: layers[0].repeats: unknown key; did you mean repeat? allowed are ...
heads: 12, kv => head: 12, kv
    8:30: layers[0].mixer.head: unknown key; did you mean heads? allowed are ...
top_k => topk
    9:34: layers[0].ffn.topk: unknown key; did you mean top_k? allowed are ...
p: 2, heads: 12 => p: 2, haeds: 12
    11:36: layers[1].pattern[0].mixer.haeds: unknown key; did you mean heads? allowed are ...
ffn: {kind: mlp => fnn: {kind: mlp
    12:9: layers[1].pattern[0].fnn: unknown key; did you mean ffn? allowed are extras, ffn, mixer, norms, tied
heads: 12, kv_heads: 4 => heads: 12, p: 2
    8:41: layers[0].mixer.p: unknown key; allowed are ...
hidden_size => Hidden_Size
    3:1: Hidden_Size: unknown key; did you mean hidden_size? allowed are ...
tie_embeddings => "tie\n\e[31m"
    4:1: 'tie\n\x1b[31m': unknown key; allowed are ...
tie_embeddings => "x` - at `$.layers"
    4:1: 'x` - at `$.layers': unknown key; allowed are ...
kind: attention => kind: atention
    8:19: layers[0].mixer.kind: 'atention' is not known; did you mean attention? allowed are ...
kind: mlp => kind: mpl
    12:21: layers[1].pattern[0].ffn.kind: 'mpl' is not known; did you mean mlp? allowed are FFNS
rmsnorm => rms_norm
    5:14: norm.kind: 'rms_norm' is not known; did you mean rmsnorm? allowed are rmsnorm, layernorm, none
kind: attention => kind: mlp
    8:19: layers[0].mixer.kind: 'mlp' is an ffn, not a mixer; allowed are KINDS
rmsnorm => "rms\e[2J\nnorm"
    5:14: norm.kind: 'rms\x1b[2J\nnorm' is not known; did you mean rmsnorm? allowed are rmsnorm, layernorm, none
kind: attention => kind: [attention]
    8:19: layers[0].mixer.kind: ['attention'] is not known; allowed are KINDS
kind: attention => kind: null
    8:19: layers[0].mixer.kind: null is not known; allowed are KINDS
kind: attention, heads: 12 => heads: 12
    8:12: layers[0].mixer: needs a kind; allowed are KINDS
kind: mlp, inter => inter
    12:14: layers[1].pattern[0].ffn: needs a kind; allowed are FFNS
name: tiny => note: tiny
    1:1: name: is missing
hidden_size: 768 => position_embeddings: 768
    1:1: hidden_size: is missing
heads: 12, kv_heads => kv_heads
    8:12: layers[0].mixer.heads: is missing
p: 2, heads => heads
    11:16: layers[1].pattern[0].mixer.p: is missing
, intermediate_size: 64} => }
    9:10: layers[0].ffn.intermediate_size: is missing
kv_lora_rank: 8, qk => qk
    13:16: layers[1].pattern[1].mixer.kv_lora_rank: is missing
heads: 12, kv_heads: 4 => heads: 7
    8:12: layers[0].mixer.head_dim: is missing, and hidden_size 768 is not a multiple of heads 7
kv_heads: 4 => kv_heads: 5
    8:51: layers[0].mixer.kv_heads: kv_heads 5 does not divide heads 12
kv_heads: 4 => kv_heads: 24
    8:51: layers[0].mixer.kv_heads: kv_heads 24 does not divide heads 12
kv_heads: 4 => kv_heads: 0
    8:51: layers[0].mixer.kv_heads: 0 is out of range; allowed is at least 1
top_k: 2 => top_k: 9
    9:41: layers[0].ffn.top_k: top_k 9 is more than the 8 experts there are
top_k: 2 => top_k: 2, shared_gate: true
    9:57: layers[0].ffn.shared_gate: shared_gate is set, and there is no shared expert to gate
top_k: 2 => top_k: 2, shared_intermediate_size: -1
    9:70: layers[0].ffn.shared_intermediate_size: -1 is out of range; allowed is at least 0
{kind: attention, heads: 12, kv_heads: 4} => attention
    8:12: layers[0].mixer: 'attention' is not a mapping; write mixer: {kind: attention, ...}
{kind: attention, heads: 12, kv_heads: 4} => [attention]
    8:12: layers[0].mixer: ['attention'] is not a mapping
{kind: attention, heads: 12, kv_heads: 4} => {}
    8:12: layers[0].mixer: needs a kind; allowed are KINDS
"""
# The mixer of line 8 is replaced by another kind.
OTHER_KINDS = r"""
kind: gated_deltanet, heads: 12, key_heads: 5
    8:57: layers[0].mixer.key_heads: key_heads 5 does not divide heads 12
kind: retnet, heads: 7
    8:12: layers[0].mixer.head_dim: is missing, and hidden_size 768 is not a multiple of heads 7
kind: kda, heads: 12, gate: 3
    8:35: layers[0].mixer.gate: unknown key; did you mean gate_bias? allowed are ...
kind: kimi, heads: 12
    8:19: layers[0].mixer.kind: 'kimi' is not known; allowed are KINDS
kind: mamba, inner_size: 4
    8:19: layers[0].mixer.kind: 'mamba' is not known; did you mean mamba1? allowed are KINDS
kind: MSA, heads: 12
    8:19: layers[0].mixer.kind: 'MSA' is not known; did you mean memory_sparse? allowed are KINDS
kind: power_attention, heads: 12
    8:19: layers[0].mixer.kind: 'power_attention' is not known; did you mean power (power attention) or ...
kind: hyena, inner_size: 64, state_dim: 3
    8:53: layers[0].mixer.state_dim: a mode has 2 numbers, and state_dim is 3
kind: span_search, heads: 12, spans: 65
    8:50: layers[0].mixer.spans: 65 is out of range; allowed is at most 64
kind: memory_sparse, heads: 12, document_size: 0
    8:60: layers[0].mixer.document_size: 0 is out of range; allowed is at least 1
kind: mamba1, inner_size: 1536
    8:12: layers[0].mixer.dt_rank: is missing
kind: mamba2, heads: 24, groups: 5
    8:46: layers[0].mixer.groups: groups 5 does not divide heads 24
kind: mamba2, heads: 24, head_dims: 5
    8:38: layers[0].mixer.head_dims: unknown key; did you mean head_dim? allowed are ...
kind: dsa, heads: 4, kv_lora_rank: 8, qk_nope_head_dim: 8, qk_rope_head_dim: 8, v_head_dim: 8
    8:12: layers[0].mixer: q_lora_rank is missing: the indexer's queries come from the query latent
kind: rwkv7, heads: 12, decay_rank: 64
    8:12: layers[0].mixer.rate_rank: is missing
kind: nsa, heads: 12, window: 0
    8:43: layers[0].mixer.window: 0 is out of range; allowed is at least 1
kind: nsa, heads: 12, select_size: 4x
    8:48: layers[0].mixer.select_size: '4x' is not a size in tokens; write 65536, 64k (=65536) or 1M (=1048576)
kind: moba, heads: 12, block_size: 0
    8:48: layers[0].mixer.block_size: 0 is out of range; allowed is at least 1
kind: sse, heads: 12, top_k: 9
    8:42: layers[0].mixer.top_k: top_k 9 is more than the 4 partitions there are
kind: gsa, heads: 12, slots: 0
    8:42: layers[0].mixer.slots: 0 is out of range; allowed is at least 1
kind: gla, heads: 12, conv_size: -1
    8:46: layers[0].mixer.conv_size: -1 is out of range; allowed is at least 0
kind: forgetting, heads: 12, kv_heads: 5
    8:52: layers[0].mixer.kv_heads: kv_heads 5 does not divide heads 12
kind: log_linear, heads: 12, max_levels: many
    8:54: layers[0].mixer.max_levels: 'many' is not an integer
kind: lightning, heads: 12, output_norm: half
    8:54: layers[0].mixer.output_norm: 'half' is not known; allowed are none, head, full
kind: deltanet, heads: 12, beta: true
    8:40: layers[0].mixer.beta: unknown key; allowed are ...
"""

VALUES = r"""
kv_heads: 4 => window: 0
    8:49: layers[0].mixer.window: 0 is out of range; allowed is at least 1
kv_heads: 4 => window: -4096
    8:49: layers[0].mixer.window: -4096 is out of range; allowed is at least 1
kv_heads: 4 => window: large
    8:49: layers[0].mixer.window: 'large' is not a size in tokens; write 65536, 64k (=65536) or 1M (=1048576)
kv_heads: 4 => window: 0k
    8:49: layers[0].mixer.window: '0k' is out of range; a context is 1 to 1,125,899,906,842,624 tokens (2^50)
kv_heads: 4 => window: 9999999g
    8:49: layers[0].mixer.window: '9999999g' is out of range; a context is ...
kv_heads: 4 => window: '1,2,3'
    8:49: layers[0].mixer.window: '1,2,3' is not a size in tokens; write 65536, 64k (=65536) or 1M (=1048576)
kv_heads: 4 => window: 0.3k
    8:49: layers[0].mixer.window: '0.3k' is not a whole number of tokens
p: 2, => p: 2, chunk_size: 0,
    11:48: layers[1].pattern[0].mixer.chunk_size: 0 is out of range; allowed is at least 1
p: 2 => p: 0
    11:33: layers[1].pattern[0].mixer.p: 0 is out of range; allowed is at least 1
p: 2 => p: 17
    11:33: layers[1].pattern[0].mixer.p: 17 is out of range; allowed is at most 16
p: 2 => p: 2.5
    11:33: layers[1].pattern[0].mixer.p: 2.5 is not an integer
p: 2 => p: 2, tile: 0
    11:42: layers[1].pattern[0].mixer.tile: 0 is out of range; allowed is at least 1
768 => 768.0
    3:14: hidden_size: 768.0 is not an integer; write 768
768 => 1e3
    3:14: hidden_size: 1000.0 is not an integer; write 1000
768 => "768"
    3:14: hidden_size: '768' is not an integer; write 768 without quotes
768 => many
    3:14: hidden_size: 'many' is not an integer
768 => true
    3:14: hidden_size: true is not an integer
768 => null
    3:14: hidden_size: null is not an integer
hidden_size: 768 => hidden_size:
    3:13: hidden_size: null is not an integer
768 => .nan
    3:14: hidden_size: nan is not an integer
768 => .inf
    3:14: hidden_size: inf is not an integer
768 => -.inf
    3:14: hidden_size: -inf is not an integer
768 => -768
    3:14: hidden_size: -768 is out of range; allowed is at least 1
768 => 0
    3:14: hidden_size: 0 is out of range; allowed is at least 1
768 => 1000000000000000000000000000000
    3:14: hidden_size: 1000000000000000000000000000000 is out of range; allowed is at most 1,000,000,000
768 => 0x300
    3:14: hidden_size: '0x300' is not an integer
768 => [768]
    3:14: hidden_size: [768] is not an integer
768 => {value: 768}
    3:14: hidden_size: {value: 768} is not an integer
768 => 2024-01-01
    3:14: hidden_size: '2024-01-01' is not an integer
repeat: 2 => repeat: 0
    7:13: layers[0].repeat: 0 is out of range; allowed is at least 1
repeat: 2 => repeat: 1000000
    7:13: layers[0].repeat: 1000000 is out of range; allowed is at most 100,000
repeat: 2 => repeat: yes
    7:13: layers[0].repeat: 'yes' is not an integer
repeat: 2 => repeat: 100000
    7:3: layers: 100,002 layers in all; allowed are up to 100,000
per_layer: 2 => per_layer: 17
    5:34: norm.per_layer: 17 is out of range; allowed is at most 16
{kind: rmsnorm, per_layer: 2} => null
    5:7: norm: null is not a mapping
{kind: rmsnorm, per_layer: 2} => layernorm
    5:7: norm: 'layernorm' is not a mapping; write norm: {kind: layernorm, ...}
per_layer: 2 => final: maybe
    5:30: norm.final: 'maybe' is not true or false
false => yes
    4:17: tie_embeddings: 'yes' is not true or false
false => 0
    4:17: tie_embeddings: 0 is not true or false
false => null
    4:17: tie_embeddings: null is not true or false
false => "true"
    4:17: tie_embeddings: 'true' is not true or false; write true without quotes
kv_heads: 4 => bias: qk
    8:47: layers[0].mixer.bias: 'qk' is not known; did you mean qkv? allowed are true, false, qkv, output
kv_heads: 4 => bias: 1
    8:47: layers[0].mixer.bias: 1 is not known; allowed are true, false, qkv, output
kv_heads: 4 => qk_norm: heads
    8:50: layers[0].mixer.qk_norm: 'heads' is not known; did you mean head? allowed are none, head, full
kv_heads: 4 => qk_norm: true
    8:50: layers[0].mixer.qk_norm: true is not known; allowed are none, head, full
kv_heads: 4 => sinks: 1
    8:48: layers[0].mixer.sinks: 1 is not true or false
name: tiny => name: ""
    1:7: name: is empty
name: tiny => name: "  "
    1:7: name: is blank
name: tiny => name: 7
    1:7: name: 7 is not a text; put it in quotes
name: tiny => name:
    1:6: name: null is not a text
name: tiny => name: [tiny]
    1:7: name: ['tiny'] is not a text
name: tiny => name: "a\e[31m"
    1:7: name: holds a control character, '\x1b'
name: tiny => name: "a\nb"
    1:7: name: holds a control character, '\n'
name: tiny => name: "a\u202Eb"
    1:7: name: holds a control character, '\u202e'
tie_embeddings: false => note: "\e[2J"
    4:7: note: holds a control character, '\x1b'
tie_embeddings: false => published: 124.4
    4:12: published: 124.4 is not a text; put it in quotes
tie_embeddings: false => aliases: [a, 5]
    4:14: aliases[1]: 5 is not a text; put it in quotes
tie_embeddings: false => aliases: a
    4:10: aliases: 'a' is not a list
tie_embeddings: false => position_embeddings: 0
    4:22: position_embeddings: 0 is out of range; allowed is at least 1
"""
WHOLE = {
    "a key of a thousand letters": (
        SPEC.replace("tie_embeddings", "k" * 1000),
        "4:1: 'kkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkk...': unknown key; allowed are ...",
    ),
    "a window of thousands of digits": (
        SPEC.replace("kv_heads: 4", f"window: {'9' * 5000}k"),
        "8:49: layers[0].mixer.window: '9999999999999999999999999999999999999999999999999999999...' ...",
    ),
    "an integer of thousands of digits": (
        SPEC.replace("768", "7" * 5000),
        "3:14: a number of thousands of digits is out of range",
    ),
    "a long name": (
        SPEC.replace("tiny", "x" * 201),
        "1:7: name: is longer than 200 characters",
    ),
    "a group of nothing": (
        HEAD + "layers: [{}]",
        "4:10: layers[0]: a group needs a mixer, an ffn or a pattern, and has none of them",
    ),
    "a group of a repeat alone": (
        HEAD + "layers: [{repeat: 3}]",
        "4:10: layers[0]: a group needs a mixer, an ffn or a pattern, and has none of them",
    ),
    "a group that is null": (
        HEAD + "layers: [null]",
        "4:10: layers[0]: null is not a mapping",
    ),
    "a group that is a number": (
        HEAD + "layers: [5]",
        "4:10: layers[0]: 5 is not a mapping",
    ),
    "a pattern and an ffn": (
        HEAD
        + "layers: [{pattern: [{ffn: {kind: mlp, intermediate_size: 3}}], ffn: {kind: mlp, intermediate_size: 3}}]",
        "4:20: layers[0].pattern: a group has either a pattern or its own mixer and ffn, and this one has both",
    ),
    "a pattern and a mixer": (
        HEAD + "layers: [{pattern: [{ffn: {kind: mlp, intermediate_size: 3}}], mixer: {kind: linear, heads: 1}}]",
        "4:20: layers[0].pattern: a group has either a pattern or its own mixer and ffn, and this one has both",
    ),
    "an empty pattern": (
        HEAD + "layers: [{pattern: []}]",
        "4:20: layers[0].pattern: is empty; at least one is needed",
    ),
    "a pattern that is a mapping": (
        HEAD + "layers: [{pattern: {}}]",
        "4:20: layers[0].pattern: {} is not a list",
    ),
    "a layer of nothing": (
        HEAD + "layers: [{pattern: [{}]}]",
        "4:21: layers[0].pattern[0]: a layer needs a mixer, an ffn or both, and has neither",
    ),
    "a layer that is a word": (
        HEAD + "layers: [{pattern: [power]}]",
        "4:21: layers[0].pattern[0]: 'power' is not a mapping",
    ),
    "no layers": (
        HEAD,
        "1:1: layers: is missing",
    ),
    "empty layers": (
        HEAD + "layers: []",
        "4:9: layers: is empty; at least one is needed",
    ),
    "layers that are a mapping": (
        HEAD + "layers: {repeat: 2}",
        "4:9: layers: {repeat: 2} is not a list",
    ),
    "layers that are a number": (
        HEAD + "layers: 12",
        "4:9: layers: 12 is not a list",
    ),
    "layers that are null": (
        HEAD + "layers:",
        "4:8: layers: null is not a list",
    ),
    "a width that is missing behind the layers": (
        "name: a\nvocab_size: 9\nlayers: [{mixer: {kind: linear, heads: 2}}]\nhiden_size: 8",
        "4:1: hiden_size: unknown key; did you mean hidden_size? allowed are ...",
    ),
    "a width that is wrong behind the layers": (
        "name: a\nvocab_size: 9\nlayers: [{mixer: {kind: linear, heads: 2}}]\nhidden_size: eight",
        "4:14: hidden_size: 'eight' is not an integer",
    ),
    "an unknown key taken over by a merge": (
        HEAD + "layers: [{<<: {repaet: 2}, ffn: {kind: mlp, intermediate_size: 3}}]",
        "4:24: layers[0].repaet: unknown key; did you mean repeat? allowed are extras, ffn, mixer, ...",
    ),
}


def cases(table: str) -> list[tuple[str, str]]:
    lines = table.replace("KINDS", KINDS).replace("FFNS", ", ".join(sorted(FFNS))).strip().splitlines()
    return [(edit, message.strip()) for edit, message in zip(lines[::2], lines[1::2], strict=True)]


@pytest.mark.parametrize(("edit", "message"), cases(STRUCTURE) + cases(VALUES))
def test_one_mistake_in_a_spec(
    expect_refusal: Callable[[list[str], str], None], spec: Callable[[str], list[str]], edit: str, message: str
) -> None:
    old, new = edit.split(" => ")
    assert old in SPEC
    expect_refusal(spec(SPEC.replace(old, new, 1)), f"model.yaml:{message}")


@pytest.mark.parametrize(("mixer", "message"), cases(OTHER_KINDS))
def test_one_mistake_in_another_kind_of_mixer(
    expect_refusal: Callable[[list[str], str], None], spec: Callable[[str], list[str]], mixer: str, message: str
) -> None:
    content = SPEC.replace("kind: attention, heads: 12, kv_heads: 4", mixer)
    expect_refusal(spec(content), f"model.yaml:{message}")


@pytest.mark.parametrize("case", WHOLE)
def test_a_spec_that_is_wrong_as_a_whole(
    expect_refusal: Callable[[list[str], str], None], spec: Callable[[str], list[str]], case: str
) -> None:
    content, message = WHOLE[case]
    expect_refusal(spec(content), f"model.yaml:{message}")


def test_the_spec_itself_is_good(spec: Callable[[str], list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(spec(SPEC)) == 0
    assert capsys.readouterr().out.startswith("tiny: ")
