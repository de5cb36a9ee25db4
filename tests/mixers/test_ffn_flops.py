"""Tables and memories as their papers write them, a token at a time: FLOPs, parameters, what is read, what is where."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from ffn_specs import memories
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from powerplan.accounting import Accounting
from powerplan.cli import main
from powerplan.dtypes import Dtypes
from powerplan.entries import host_bytes, host_parameters
from powerplan.errors import InputError
from powerplan.ffn import FFN, MLP, Memory, MoE, Stem, multiplied_terms
from powerplan.hardware import find_device
from powerplan.load import load_model
from powerplan.mixers.formulas import total
from powerplan.run.loads import model_load
from powerplan.run.recipe import Recipe
from powerplan.serving import Fleet, Serving
from powerplan.spec import LayerGroup, ModelSpec

HIDDEN = 24


class PlainStem(nn.Module):
    """STEM, arXiv 2601.10639: down(silu(gate x) * table[token])."""

    def __init__(self, ffn: Stem, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden, ffn.intermediate_size, bias=False)
        self.down = nn.Linear(ffn.intermediate_size, hidden, bias=False)
        self.table = nn.Embedding(ffn.vocab_size, ffn.intermediate_size)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        return self.down(functional.silu(self.gate(x)) * self.table(tokens))


class PlainMemory(nn.Module):
    """Product keys with all that the papers add, one head after the other; `found` has the values that were used."""

    def __init__(self, ffn: Memory, hidden: int) -> None:
        super().__init__()
        self.ffn = ffn
        ranks = ffn.rank if ffn.rank_queries else 1
        self.queries = nn.Parameter(torch.randn(ffn.heads, ranks, 2, ffn.key_dim, hidden))
        sets = 1 if ffn.shared_keys else ffn.heads
        self.keys = nn.Parameter(torch.randn(sets, ffn.rank, 2, ffn.keys, ffn.key_dim))
        width, entries = ffn.value_size or hidden, ffn.keys**2
        self.values = nn.Parameter(torch.randn(entries, width))
        if ffn.neurons:
            self.inputs = nn.Parameter(torch.randn(entries, ffn.input_size or hidden))
        if ffn.input_size:
            self.before = nn.Linear(hidden, ffn.input_size, bias=False)
        if ffn.gated:
            self.gate = nn.Linear(hidden, width, bias=False)
        if ffn.value_projection:
            self.behind = nn.Linear(width, hidden, bias=False)
        if ffn.qk_norm:
            self.norms = nn.Parameter(torch.ones(2, ffn.key_dim))
        if ffn.rank > 1:
            self.cores = nn.Parameter(torch.rand(2, ffn.heads, ffn.rank, ffn.rank))
        self.found: list[set[int]] = []

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of one token x [1, hidden]."""
        ffn = self.ffn
        out = torch.zeros(1, self.values.shape[1])
        at_input = self.before(x) if ffn.input_size else x
        for head in range(ffn.heads):
            keys = self.keys[0 if ffn.shared_keys else head]
            queries = [[x @ side.T for side in both] for both in self.queries[head]]
            sides = [
                [queries[rank % len(queries)][side] @ keys[rank, side].T for side in (0, 1)] for rank in range(ffn.rank)
            ]
            best, chosen = self._pairs(sides, head).flatten().topk(ffn.top_k)
            weights = best.softmax(0)[None]
            if ffn.neurons:
                weights = weights * functional.gelu(at_input @ self.inputs[chosen].T)
            out = out + weights @ self.values[chosen]
            self.found.append(set(chosen.tolist()))
        if ffn.gated:
            out = out * functional.silu(self.gate(x))
        return self.behind(out) if ffn.value_projection else out

    def _pairs(self, sides: list[list[Tensor]], head: int) -> Tensor:
        """Return the score of each pair of keys from the scores of each rank, without matmuls."""
        if self.ffn.rank == 1:
            return sides[0][0].T + sides[0][1]
        core = self.cores[:, head].sum(0)
        ranks = range(self.ffn.rank)
        return sum((sides[a][0].T * sides[b][1] * core[a, b] for a in ranks for b in ranks), torch.zeros(()))


def counted(module: nn.Module, *inputs: Tensor) -> int:
    """Return the FLOPs of matmuls; an embedding has none."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs)
    return counter.get_total_flops()


def weight_flops(ffn: FFN, hidden: int = HIDDEN) -> int:
    return 2 * int(total(multiplied_terms(ffn, hidden)))


def stored(ffn: FFN, hidden: int = HIDDEN) -> int:
    return int(total((*ffn.matmul_terms(hidden), *ffn.other_terms(hidden), *ffn.idle_terms(hidden))))


@pytest.mark.parametrize("width", [1, 40])
def test_stem_is_what_its_paper_writes(width: int) -> None:
    ffn = Stem(intermediate_size=width, vocab_size=50)
    plain = PlainStem(ffn, HIDDEN)
    assert sum(weights.numel() for weights in plain.parameters()) == stored(ffn)
    assert counted(plain, torch.randn(7, HIDDEN), torch.arange(7)) == 7 * weight_flops(ffn)
    gated = MLP(intermediate_size=width)
    assert 3 * weight_flops(ffn) == 2 * weight_flops(gated)


MEMORIES = {
    "product keys": Memory(keys=6, heads=3, top_k=4, key_dim=5),
    "PEER": Memory(keys=6, heads=3, top_k=4, key_dim=5, neurons=True, shared_keys=True),
    "Memory+": Memory(keys=6, heads=2, top_k=4, key_dim=5, value_size=10, value_projection=True, gated=True),
    "UltraMemV2": Memory(
        keys=6,
        top_k=4,
        key_dim=5,
        value_size=9,
        neurons=True,
        input_size=7,
        value_projection=True,
        rank=2,
        rank_queries=True,
        qk_norm=True,
    ),
}


def check_memory(ffn: Memory) -> None:
    plain = PlainMemory(ffn, HIDDEN)
    assert sum(weights.numel() for weights in plain.parameters()) == stored(ffn)
    assert counted(plain, torch.randn(1, HIDDEN)) == weight_flops(ffn)
    assert all(len(found) == ffn.top_k for found in plain.found)
    assert ffn.picks == (plain.values.shape[0], ffn.heads * ffn.top_k)
    entry = plain.values.shape[1] + (plain.inputs.shape[1] if ffn.neurons else 0)
    assert total(ffn.idle_terms(HIDDEN)) == (ffn.picks.entries - ffn.picks.picked) * entry


@pytest.mark.parametrize("name", MEMORIES)
def test_memories_are_what_their_papers_write(name: str) -> None:
    check_memory(MEMORIES[name])


@settings(max_examples=60, deadline=None)
@given(memories())
def test_every_memory_is_what_it_says(ffn: Memory) -> None:
    check_memory(ffn)


def model(ffn: Any, layers: int = 3, **fields: Any) -> ModelSpec:
    return ModelSpec(
        name="x", vocab_size=50, hidden_size=HIDDEN, layers=(LayerGroup(repeat=layers, ffn=ffn),), **fields
    )


@pytest.mark.parametrize(
    "ffn",
    [Stem(intermediate_size=40, vocab_size=50), MEMORIES["PEER"], MEMORIES["UltraMemV2"]],
    ids=["stem", "PEER", "UltraMemV2"],
)
def test_the_host_holds_the_rows_and_sends_what_is_used(ffn: Any) -> None:
    import msgspec

    here, away = (Accounting(model(msgspec.structs.replace(ffn, host=host))) for host in (False, True))
    assert host_parameters(here) == host_bytes(here, Dtypes()) == 0
    assert here.total_parameters == away.total_parameters
    assert here.active_parameters == away.active_parameters
    entry = (HIDDEN * 2 if ffn is MEMORIES["PEER"] else 16) if isinstance(ffn, Memory) else 40
    assert host_parameters(away) == 3 * entry * ffn.picks.entries
    device = Fleet(find_device("h100-sxm"))
    near, far = (Serving(accounting, 64, "bf16", device) for accounting in (here, away))
    assert near.stored_bytes == far.stored_bytes
    assert near.device_bytes - far.device_bytes == far.host_bytes == 2 * host_parameters(away)
    assert near.step(4).fetched_bytes == 0
    assert far.step(1).fetched_bytes == 2 * 3 * entry * ffn.picks.picked
    assert far.step(4).fetched_bytes <= min(4 * far.step(1).fetched_bytes, far.host_bytes)
    assert near.step(4).weight_bytes == far.step(4).weight_bytes
    assert near.step(4).memory_bytes - far.step(4).memory_bytes == far.host_bytes


@pytest.mark.parametrize("host", [False, True])
def test_training_holds_a_table_where_it_lives(host: bool) -> None:
    """A table is no expert, that expert parallelism could divide, and no matrix to Muon."""
    ffn = Stem(intermediate_size=40, vocab_size=50, host=host)
    accounting = Accounting(model(ffn))
    (load,) = model_load(accounting, 64, Recipe()).layers
    matrices, table = 2 * HIDDEN * 40, 50 * 40
    assert load.parameters == matrices + 2 * HIDDEN + (0 if host else table)
    assert (load.expert_parameters, load.matrix_parameters) == (0, matrices)
    assert load.weight_flops == 2 * matrices
    memory = Memory(keys=6, top_k=4, key_dim=5, host=host, shared_keys=True, heads=2)
    (load,) = model_load(Accounting(model(memory)), 64, Recipe()).layers
    keys, queries = 2 * 6 * 5, 2 * 2 * 5 * HIDDEN
    assert load.parameters == keys + queries + 2 * HIDDEN + (0 if host else 36 * HIDDEN)
    assert (load.expert_parameters, load.matrix_parameters) == (0, keys + queries)
    assert load.weight_flops == 2 * (2 * keys + queries + 2 * 4 * HIDDEN)


def test_a_prompt_reads_the_rows_it_has_tokens_for() -> None:
    spec = model(Stem(intermediate_size=40, vocab_size=50))
    device = Fleet(find_device("h100-sxm"))
    short, long = (Serving(Accounting(spec), context, "bf16", device) for context in (10, 4096))
    serving = Serving(Accounting(spec), 10)
    weights = serving.stored_bytes - 2 * spec.vocab_size * HIDDEN  # No token multiplies the input embedding.
    assert short.prefill_seconds == (weights - 2 * 3 * 40 * 40) / Fraction(3350 * 10**9)
    assert long.prefill_seconds is not None
    assert long.prefill_seconds >= weights / Fraction(3350 * 10**9)


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 100])
def test_a_prompt_reads_the_experts_that_its_tokens_can_pick(tokens: int) -> None:
    spec = model(MoE(experts=8, top_k=2, intermediate_size=10))
    serving = Serving(Accounting(spec), tokens, "bf16", Fleet(find_device("h100-sxm")))
    expert = 3 * HIDDEN * 10
    resting = 3 * (8 - min(8, 2 * tokens)) * expert  # The model has three layers.
    read = 2 * (Accounting(spec).total_parameters.without_input_embedding - resting)
    assert serving.prefill_seconds == max(
        (read + serving.state_bytes) / Fraction(3350 * 10**9), serving.prefill_flops / Fraction(989 * 10**12)
    )
    if tokens == 1:
        assert read == serving.weight_bytes(1)


def test_latent_and_shared_experts_are_fields_of_a_mixture() -> None:
    ffn = MoE(experts=8, top_k=2, intermediate_size=10, latent_size=6, shared_intermediate_size=12)
    parts = {term.component: int(term.value) for term in ffn.matmul_terms(HIDDEN)}
    assert parts == {
        "router": HIDDEN * 8,
        "latent projections": 2 * HIDDEN * 6,
        "active experts": 2 * 3 * 6 * 10,
        "shared experts": 3 * HIDDEN * 12,
    }
    step = Serving(Accounting(model(ffn)), 64).step(3)
    one = Serving(Accounting(model(ffn)), 64).step(1)
    touched = 8 * (1 - Fraction(3, 4) ** 3)
    assert step.weight_bytes - one.weight_bytes == 2 * 3 * (touched - 2) * 3 * 6 * 10


WRONG = [
    ({"top_k": 37}, "1 x 37 values are more than the 36 there are, 6 x 6 pairs of keys"),
    ({"input_size": 4}, "input_size: is the width of the neurons' input, and neurons is not set"),
    ({"value_size": 4}, "value_size: needs value_projection; values have the hidden size where it is left out"),
    ({"gated": True}, "gated: needs value_projection: the gate stands before it"),
    ({"rank_queries": True}, "rank_queries: is set, and rank is 1"),
]


@pytest.mark.parametrize(("fields", "message"), WRONG)
def test_memories_that_contradict_themselves(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Memory(**{"keys": 6, "top_k": 4, "key_dim": 5} | fields)


STEM_FILE = """
name: tabled
vocab_size: 300
hidden_size: 64
layers:
  - repeat: 2
    mixer: {kind: attention, heads: 4}
    ffn: {kind: stem, intermediate_size: 128, host: true}
"""


def test_a_table_has_a_row_for_each_token_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tabled.yaml"
    path.write_text(STEM_FILE)
    (use,) = load_model(str(path)).spec.layer_uses()
    assert use.layer.ffn == Stem(intermediate_size=128, vocab_size=300, host=True)
    path.write_text(STEM_FILE.replace("128,", "128, vocab_size: 299,"))
    assert main(["wsfr", str(path)]) == 2
    said = capsys.readouterr().err
    assert "a table of 299 rows has none for some of 300 tokens; leave vocab_size of stem out" in said
    assert said.count("error:") == 1


def test_reports_say_what_the_host_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tabled.yaml"
    path.write_text(STEM_FILE)
    assert main(["decode", str(path), "--batch", "1,8", "--format", "json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["models"]
    assert (entry["params_on_host"], entry["host_bytes"]) == (2 * 300 * 128, 2 * 2 * 300 * 128)
    first, second = entry["contexts"][0]["steps"]
    assert first["fetched_bytes"] == 2 * 2 * 128 < second["fetched_bytes"] < 8 * 2 * 2 * 128
    assert main(["decode", str(path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "150 KiB of them on the host, of which a token fetches 512 B" in said
    assert "Rows on the host come over its link, for which no time counts." in said
    assert main(["wsfr", str(path), "--explain"]) == 0
    assert "of all these on the host, table on the host" in capsys.readouterr().out
    assert main(["train", str(path), "--ctx", "64", "--tokens", "1M", "--gpu", "h100-sxm"]) == 0
    assert "76.8k parameters stay on the host" in " ".join(capsys.readouterr().out.split())
    assert main(["profile", str(path)]) == 2
    assert "MODEL: tabled has stem in layers 0-1, and stem is not built" in capsys.readouterr().err
