"""A model as arguments of Megatron-Core, and what of it Megatron-Core does not have. megatron.py says what was read."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from powerplan.ffn import MLP, MoE
from powerplan.mixers import DSA, MLA, Attention, GatedDeltaNet, Mamba2
from powerplan.mixers.block import Block
from powerplan.rope import Llama3Scaling, Rope
from powerplan.run.export.job import Lacks
from powerplan.run.stages import stage_spans
from powerplan.spec import Layer, LayerUse, ModelSpec

Arguments = dict[str, str]
"""Arguments by their names, in order; the value of a switch is empty."""

HYBRID = "--hybrid-layer-pattern"
"""The argument of models whose layers have one part each, as Mamba-2's hybrids."""

SYMBOLS: dict[type[Block], str] = {
    Attention: "*",
    MLA: "+",
    DSA: "D",
    GatedDeltaNet: "G",
    Mamba2: "M",
    MLP: "-",
    MoE: "E",
}
"""What Megatron-Core has, by the letters of its layer patterns."""


@dataclass
class ModelArguments:
    """Arguments that build a model, as far as there are any, and what has none."""

    lacks: Lacks
    values: Arguments = field(default_factory=dict)


def model_arguments(spec: ModelSpec, stages: int) -> ModelArguments:
    """Return the arguments that build a model in a number of pipeline stages."""
    found = ModelArguments(Lacks(spec))
    known = [use for use in spec.layer_uses() if all(type(block) in SYMBOLS for block in _parts(use.layer))]
    for use in spec.layer_uses():
        for block in _parts(use.layer):
            if type(block) not in SYMBOLS:
                found.lacks.add(block.describe(), [use])
    hybrid = any(len(_parts(use.layer)) == 1 or type(use.layer.mixer) is Mamba2 for use in spec.layer_uses())
    found.values |= {"--hidden-size": str(spec.hidden_size), "--vocab-size": str(spec.vocab_size)}
    if hybrid and len(known) == len(spec.layer_uses()):
        found.values[HYBRID] = _pattern(spec, stages)
    else:
        found.values["--num-layers"] = str(spec.layer_count)
        if spec.layer_count % stages:
            layout = "|".join("t" * len(span) for span in stage_spans(spec.layer_count, stages))
            found.values["--pipeline-model-parallel-layout"] = f"E{layout}L"
    _norms(spec, found)
    _embeddings(spec, found)
    _attention(spec, known, found)
    _latent(spec, known, found)
    _states(spec, known, found)
    _other_heads(spec, found)
    _feed_forward(spec, known, found)
    _biases(spec, known, found)
    for extra in spec.extras:
        found.lacks.add(f"{extra.describe()}, parameters of the whole model")
    for use in spec.layer_uses():
        for extra in use.layer.extras:
            found.lacks.add(f"{extra.describe()}, parameters of a layer", [use])
        if use.layer.tied:
            found.lacks.add("weights of an earlier layer again", [use])
    return found


def _parts(layer: Layer) -> list[Block]:
    return [block for block in (layer.mixer, layer.ffn) if block is not None]


def _pattern(spec: ModelSpec, stages: int) -> str:
    """Return the letters of all parts in order, with a bar between stages: "M-M|*-M"."""
    letters = [""] * spec.layer_count
    for use in spec.layer_uses():
        for position in (position for span in use.positions for position in span):
            letters[position] = "".join(SYMBOLS[type(block)] for block in _parts(use.layer))
    return "|".join("".join(letters[layer] for layer in span) for span in stage_spans(spec.layer_count, stages))


def _frequency(name: str, spec: ModelSpec, holds: Callable[[Layer], bool], found: ModelArguments) -> None:
    """Set an argument to 1 for each layer that `holds` is true of and else to 0: "[0]*3+[1]*58", "([1]*3+[0]*1)*12"."""
    ones = [0] * spec.layer_count
    for use in spec.layer_uses():
        for position in (position for span in use.positions for position in span):
            ones[position] = int(holds(use.layer))
    count = spec.layer_count
    period = next(size for size in range(1, count + 1) if count % size == 0 and ones == ones[:size] * (count // size))
    runs = "+".join(f"[{one}]*{len(list(group))}" for one, group in groupby(ones[:period]))
    found.values[name] = runs if period == count else f"({runs})*{count // period}"


def _norms(spec: ModelSpec, found: ModelArguments) -> None:
    norm = spec.norm
    found.values["--normalization"] = "LayerNorm" if norm.kind == "layernorm" else "RMSNorm"
    if norm.kind == "none":
        found.lacks.add("a model without norms")
    if norm.kind == "layernorm" and not norm.bias:
        found.lacks.add("LayerNorm without biases")
    if norm.embedding:
        found.lacks.add("a norm after the embedding")
    if not norm.final:
        found.lacks.add("a model without a norm before the LM head")
    for use in spec.layer_uses():
        count, parts = spec.norms_of(use.layer), len(_parts(use.layer))
        if norm.kind != "none" and count != parts:
            found.lacks.add(f"{count} norms in a layer, which has {parts}: one before each part", [use])


def _embeddings(spec: ModelSpec, found: ModelArguments) -> None:
    if spec.position_embeddings is not None:
        found.values["--position-embedding-type"] = "learned_absolute"
    else:
        _rope(spec, found)
    if not spec.tie_embeddings:
        found.values["--untie-embeddings-and-output-weights"] = ""


def _rope(spec: ModelSpec, found: ModelArguments) -> None:
    """Add how queries and keys are rotated: one way in all layers, scaled as in Llama 3.1 or not."""
    uses = [use for use in spec.layer_uses() if isinstance(use.layer.mixer, (Attention, MLA))]
    positions = [position for use in uses for span in use.positions for position in span]
    ropes = {spec.rope_at(position) for position in positions}
    rope = spec.rope_at(positions[0]) if positions else None
    if positions and ropes == {None}:
        found.values["--position-embedding-type"] = "none"
        return
    found.values["--position-embedding-type"] = "rope"
    if len(ropes) > 1:
        found.lacks.add("RoPE that differs from layer to layer", uses)
    if rope is None or len(ropes) > 1:
        return
    if rope.theta != Rope().theta:
        found.values["--rotary-base"] = f"{rope.theta:.0f}"
    if rope.partial != 1:
        found.values["--rotary-percent"] = f"{rope.partial:g}"
    scaling = rope.scaling
    if isinstance(scaling, Llama3Scaling) and scaling == Llama3Scaling(factor=scaling.factor, original_context=8192):
        found.values |= {"--use-rope-scaling": "", "--rope-scaling-factor": f"{scaling.factor:g}"}
    elif scaling is not None:
        found.lacks.add(f"RoPE with {scaling.kind} scaling", uses)


def _one_shape(uses: Sequence[LayerUse], part: str, ignored: Container[str], found: ModelArguments) -> Any:
    """Return the mixer or FFN, the `part`, that most of these layers have, and say which layers have another.

    ignored: fields that may differ from layer to layer.
    """
    alike: dict[tuple[Any, ...], list[LayerUse]] = {}
    blocks = [getattr(use.layer, part) for use in uses]
    names = [name for name in blocks[0].__struct_fields__ if name not in ignored]
    for use, block in zip(uses, blocks, strict=True):
        alike.setdefault(tuple(getattr(block, name) for name in names), []).append(use)
    usual = max(alike, key=lambda shape: sum(use.count for use in alike[shape]))
    for shape, others in alike.items():
        differing = [f"{name} {own}" for name, own, other in zip(names, shape, usual, strict=True) if own != other]
        if differing:
            found.lacks.add(f"a second shape of {blocks[0].kind}, with {', '.join(differing)}", others)
    return getattr(alike[usual][0].layer, part)


def _attention(spec: ModelSpec, known: list[LayerUse], found: ModelArguments) -> None:
    uses = [use for use in known if type(use.layer.mixer) is Attention]
    if not uses:
        return
    mixer: Attention = _one_shape(uses, "mixer", ("window",), found)
    _heads(mixer.heads, mixer.kv_heads, mixer.head_dim, found)
    if mixer.qk_norm == "head":
        found.values["--qk-layernorm"] = ""
    if mixer.output_gate is True:
        found.values["--attention-output-gate"] = ""
    if mixer.sinks:
        found.values["--softmax-type"] = "learnable"
    lacking = {
        f"value heads of {mixer.v_head_dim} beside key heads of {mixer.head_dim}": mixer.v_head_dim != mixer.head_dim,
        "a norm over all heads of queries and keys": mixer.qk_norm == "full",
        "one output gate for each head": mixer.output_gate == "head",
        "keys and values of an earlier layer": mixer.shared_kv,
        "keys and values that no cache keeps": mixer.uncached,
        "values made by the projection of the keys": mixer.keys_as_values,
        "differential attention": mixer.differential,
    }
    found.lacks.add_those(lacking, uses)
    windows = sorted({window for use in uses if (window := _window(use.layer)) is not None})
    for window in windows[:-1]:
        found.lacks.add(f"a second window, of {window:,} keys: it has one size")
    if windows:
        # Keys to the left of the token itself, which powerplan's window counts.
        found.values["--window-size"] = f"{windows[-1] - 1},0"
        if HYBRID not in found.values:
            _frequency("--window-attn-skip-freq", spec, lambda layer: _window(layer) is not None, found)
        elif any(_window(use.layer) is None for use in uses):
            found.lacks.add("attention with and without a window in one layer pattern")


def _heads(heads: int, kv_heads: int, head_dim: int, found: ModelArguments) -> None:
    found.values |= {"--num-attention-heads": str(heads), "--kv-channels": str(head_dim)}
    if kv_heads != heads:
        found.values |= {"--group-query-attention": "", "--num-query-groups": str(kv_heads)}


def _other_heads(spec: ModelSpec, found: ModelArguments) -> None:
    """Set the heads that Megatron-Core asks for in every model, where none of its attention is there to have them."""
    for mixer in spec.mixers():
        shape = mixer.own_heads()
        if "--num-attention-heads" not in found.values and shape is not None:
            _heads(shape.heads, shape.kv_heads, shape.head_dim, found)
        elif "--num-attention-heads" not in found.values and isinstance(mixer, Mamba2):
            _heads(mixer.heads, mixer.heads, mixer.head_dim, found)


def _window(layer: Layer) -> int | None:
    return layer.mixer.window if type(layer.mixer) is Attention else None


def _latent(spec: ModelSpec, known: list[LayerUse], found: ModelArguments) -> None:
    uses = [use for use in known if type(use.layer.mixer) in (MLA, DSA)]
    if not uses:
        return
    if any(type(use.layer.mixer) is Attention for use in known) and HYBRID not in found.values:
        found.lacks.add("latent attention beside attention with plain heads", uses)
        return
    kinds = {type(use.layer.mixer) for use in uses}
    if len(kinds) > 1:
        found.lacks.add("DSA beside plain latent attention", uses)
    mixer: MLA = _one_shape([use for use in uses if type(use.layer.mixer) is max(kinds, key=str)], "mixer", (), found)
    found.values |= {
        "--multi-latent-attention": "",
        "--num-attention-heads": str(mixer.heads),
        "--kv-channels": str(mixer.v_head_dim),  # Not used, but else hidden_size / heads is asked to be whole.
        "--kv-lora-rank": str(mixer.kv_lora_rank),
        "--qk-head-dim": str(mixer.qk_nope_head_dim),
        "--qk-pos-emb-head-dim": str(mixer.qk_rope_head_dim),
        "--v-head-dim": str(mixer.v_head_dim),
        "--qk-layernorm": "",
    }
    if mixer.q_lora_rank is not None:
        found.values["--q-lora-rank"] = str(mixer.q_lora_rank)
    if mixer.output_gate:
        found.lacks.add("an output gate of latent attention", uses)
    if isinstance(mixer, DSA):
        found.values |= {
            "--experimental-attention-variant": "dsa",
            "--dsa-indexer-n-heads": str(mixer.index_heads),
            "--dsa-indexer-head-dim": str(mixer.index_head_dim),
            "--dsa-indexer-topk": str(mixer.top_k),
            "--no-rope-fusion": "",
        }
        if mixer.shared_index:
            found.lacks.add("keys that an earlier layer picked", uses)


def _states(spec: ModelSpec, known: list[LayerUse], found: ModelArguments) -> None:
    deltas = [use for use in known if type(use.layer.mixer) is GatedDeltaNet]
    if deltas:
        delta: GatedDeltaNet = _one_shape(deltas, "mixer", ("chunk_size",), found)
        found.values |= {
            "--experimental-attention-variant": "gated_delta_net",
            "--linear-conv-kernel-dim": str(delta.conv_size),
            "--linear-key-head-dim": str(delta.head_dim),
            "--linear-value-head-dim": str(delta.v_head_dim),
            "--linear-num-key-heads": str(delta.key_heads),
            "--linear-num-value-heads": str(delta.heads),
        }
        if HYBRID not in found.values:
            _frequency("--linear-attention-freq", spec, lambda layer: type(layer.mixer) is GatedDeltaNet, found)
        if not delta.output_gate or delta.output_norm != "head" or delta.conv_bias or not delta.conv_size:
            what = "gated_deltanet but with convolutions without biases, an output gate and a norm of each head"
            found.lacks.add(what, deltas)
    scans = [use for use in known if type(use.layer.mixer) is Mamba2]
    if scans:
        scan: Mamba2 = _one_shape(scans, "mixer", ("chunk_size",), found)
        found.values |= {
            "--mamba-num-heads": str(scan.heads),
            "--mamba-head-dim": str(scan.head_dim),
            "--mamba-state-dim": str(scan.state_dim),
            "--mamba-num-groups": str(scan.groups),
        }
        if scan.conv_size != 4 or not scan.conv_bias or scan.bias or not scan.gated_norm:
            found.lacks.add("mamba2 but with a convolution of 4 tokens, its biases and a norm", scans)


def _feed_forward(spec: ModelSpec, known: list[LayerUse], found: ModelArguments) -> None:
    dense = [use for use in known if isinstance(use.layer.ffn, MLP)]
    mixed = [use for use in known if isinstance(use.layer.ffn, MoE)]
    gates = {use.layer.ffn.gated for use in (*dense, *mixed) if isinstance(use.layer.ffn, MLP | MoE)}
    if len(gates) > 1:
        found.lacks.add("gated FFNs beside plain ones")
    if True in gates:
        found.values["--swiglu"] = ""
    if dense:
        mlp: MLP = _one_shape(dense, "ffn", (), found)
        found.values["--ffn-hidden-size"] = str(mlp.intermediate_size)
    if not mixed:
        return
    moe: MoE = _one_shape(mixed, "ffn", (), found)
    found.values |= {
        "--num-experts": str(moe.experts),
        "--moe-router-topk": str(moe.top_k),
        "--moe-ffn-hidden-size": str(moe.intermediate_size),
    }
    if HYBRID not in found.values:
        _frequency("--moe-layer-freq", spec, lambda layer: isinstance(layer.ffn, MoE), found)
    if moe.shared_intermediate_size:
        found.values["--moe-shared-expert-intermediate-size"] = str(moe.shared_intermediate_size)
    if moe.shared_gate:
        found.values["--moe-shared-expert-gate"] = ""
    if moe.latent_size:
        found.values["--moe-latent-size"] = str(moe.latent_size)
    if moe.router_bias and not moe.bias:  # With biases everywhere the router has one too.
        found.values |= {"--moe-router-enable-expert-bias": "", "--moe-router-score-function": "sigmoid"}
    if moe.top_groups is not None and moe.top_groups < moe.groups:
        found.values |= {"--moe-router-num-groups": str(moe.groups), "--moe-router-group-topk": str(moe.top_groups)}
    if moe.top_k == 1:
        found.values["--moe-router-pre-softmax"] = ""  # After the choice of one, a softmax would always be 1.
    if moe.zero_experts:
        found.lacks.add(f"{moe.zero_experts:,} choices of the router that compute nothing", mixed)


def _biases(spec: ModelSpec, known: list[LayerUse], found: ModelArguments) -> None:
    """Megatron-Core has biases in all matrices, in those of queries, keys and values, or in none."""
    heads = {use.layer.mixer.bias for use in known if isinstance(use.layer.mixer, Attention | MLA)}
    widths = {use.layer.ffn.bias for use in known if isinstance(use.layer.ffn, MLP | MoE)}
    if heads | widths <= {True}:
        return
    found.values["--disable-bias-linear"] = ""
    if heads == {"qkv"}:
        found.values["--add-qkv-bias"] = ""
    if True in widths or heads - {False, "qkv"} or len(heads) > 1:
        found.lacks.add("biases as this model has them: in all matrices, in those of attention's inputs, or in none")
