"""A model as one of torchtitan's, and what of it torchtitan does not have.

Read in torchtitan v0.2.2: torchtitan/models/{llama3,qwen3,deepseek_v3,gpt_oss}/__init__.py, their model/args.py,
model/model.py and infra/parallelize.py, and models/moe/moe.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

import msgspec

from powerplan.ffn import FFN, MLP, MoE
from powerplan.load import catalogue_spec
from powerplan.mixers import MLA, Attention, Mixer
from powerplan.run.export.job import Lacks
from powerplan.spec import Layer, ModelSpec

Own = TypeVar("Own")

FLAVORS = {
    "llama-3-8b": "8B",
    "llama-3-70b": "70B",
    "llama-3.1-405b": "405B",
    "qwen3-0.6b": "0.6B",
    "qwen3-1.7b": "1.7B",
    "qwen3-4b": "4B",
    "qwen3-8b": "8B",
    "qwen3-14b": "14B",
    "qwen3-32b": "32B",
    "qwen3-235b-a22b": "235B-A22B",
    "deepseek-v3": "671B",
    "gpt-oss-20b": "20b",
    "gpt-oss-120b": "120b",
}
"""The flavors that torchtitan has, by the names of the same models in the catalogue."""


@dataclass(frozen=True)
class TitanModel:
    """How torchtitan calls a model.

    registry: what must be added to torchtitan before it knows the flavor, in lines; empty where it does.
    without: parallel degrees that this model has not.
    """

    name: str
    flavor: str
    lacks: Lacks
    registry: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """One of torchtitan's models: its name, the dictionary of its flavors, the class of its arguments, what fits it.

    arguments: returns the arguments of a spec that the model can build, and None for every other.
    """

    name: str
    registry: str
    arguments_class: str
    arguments: Callable[[ModelSpec], dict[str, Any] | None]
    without: tuple[str, ...] = ()


def titan_model(spec: ModelSpec) -> TitanModel:
    """Return the first of torchtitan's models that can build a spec, or a name for one that must be written."""
    flavor, lacks = re.sub(r"[^A-Za-z0-9._-]+", "-", spec.name), Lacks(spec)
    for family in FAMILIES:
        arguments = family.arguments(spec)
        if arguments is None:
            continue
        for known, its_flavor in FLAVORS.items():
            if _sizes(catalogue_spec(known)) == _sizes(spec):
                return TitanModel(family.name, its_flavor, lacks, without=family.without)
        text = ", ".join(f"{name}={value}" for name, value in arguments.items())
        lines = (
            f"add to {family.registry} in torchtitan/models/{family.name}/__init__.py:",
            f'"{flavor}": {family.arguments_class}({text}),',
        )
        return TitanModel(family.name, flavor, lacks, lines, family.without)
    _reasons(spec, lacks)
    lines = (
        "none of its models builds these layers: register a TrainSpec whose model_cls does, such as one around",
        "powerplan.models.build_model, in a module that custom_import of [experimental] names",
    )
    return TitanModel("powerplan", flavor, lacks, lines)


def _reasons(spec: ModelSpec, lacks: Lacks) -> None:
    """Add what none of torchtitan's models has; the mix of layers itself, where each part of it has a model."""
    for use in spec.layer_uses():
        mixer, ffn = use.layer.mixer, use.layer.ffn
        if mixer is None or ffn is None:
            lacks.add("a layer of one part", [use])
        for block in (block for block in (mixer, ffn) if block is not None):
            ours = type(block) in (Attention, MLA, MLP, MoE)
            if not ours:
                lacks.add(block.describe(), [use])
            for name in SPECIAL if ours else ():
                value = getattr(block, name, None)
                if value and value != "none" and not (name == "qk_norm" and value == "head"):
                    lacks.add(f"{block.kind} with {name} {str(value).lower()}", [use])
        if isinstance(mixer, Attention) and mixer.v_head_dim != mixer.head_dim:
            lacks.add(f"value heads of {mixer.v_head_dim} beside key heads of {mixer.head_dim}", [use])
        if isinstance(ffn, MLP | MoE) and not ffn.gated:
            lacks.add(f"{ffn.kind} without gates", [use])
        if spec.norms_of(use.layer) != 2 and mixer is not None and ffn is not None:
            lacks.add(f"{spec.norms_of(use.layer)} norms in a layer", [use])
        for extra in use.layer.extras:
            lacks.add(f"{extra.describe()}, parameters of a layer", [use])
        if use.layer.tied:
            lacks.add("weights of an earlier layer again", [use])
    norm = spec.norm
    around = {
        f"norms of the kind {norm.kind}": norm.kind != "rmsnorm",
        "a norm after the embedding": norm.embedding,
        "a model without a norm before the LM head": not norm.final,
        "learned positions": spec.position_embeddings is not None,
        "an LM head tied to the embedding, with mla": spec.tie_embeddings and MLA in map(type, spec.mixers()),
        **{f"{extra.describe()}, parameters of the whole model": True for extra in spec.extras},
    }
    lacks.add_those(around)
    if not lacks.lines():
        lacks.add(f"in one model, {'; '.join(use.layer.describe() for use in spec.layer_uses())}")


SPECIAL = (
    *("window", "bias", "qk_norm", "output_gate", "sinks", "shared_kv", "uncached"),
    *("keys_as_values", "differential"),
    *("shared_gate", "latent_size", "zero_experts"),
)
"""Fields that make attention, latent attention, MLPs and experts other than torchtitan has them."""


def _sizes(spec: ModelSpec) -> ModelSpec:
    """Return a spec without what describes it, and without what changes no size."""
    return msgspec.structs.replace(
        spec,
        name="sizes",
        aliases=(),
        published=None,
        source=None,
        note=None,
        quantization=None,
        rope=None,
        trained_context=None,
    )


def _plain(spec: ModelSpec) -> bool:
    """Whether all around the mixers and FFNs is as in torchtitan's models: an RMSNorm before each, and after all."""
    norm = spec.norm
    norms = norm.kind == "rmsnorm" and norm.final and not norm.embedding
    layers = [use.layer for use in spec.layer_uses()]
    whole = all(layer.mixer is not None and layer.ffn is not None for layer in layers)
    return (
        norms
        and whole
        and not spec.extras
        and spec.position_embeddings is None
        and all(spec.norms_of(layer) == 2 and not layer.extras and not layer.tied for layer in layers)
    )


def _same(spec: ModelSpec, part: Callable[[Layer], Own]) -> Own | None:
    """Return what all layers have alike; None where they differ."""
    found = {part(use.layer) for use in spec.layer_uses()}
    return found.pop() if len(found) == 1 else None


def _softmax(mixer: Mixer | None) -> TypeGuard[Attention]:
    """Whether a mixer is attention with nothing but heads and perhaps norms of queries and keys."""
    if type(mixer) is not Attention:
        return False
    plain = Attention(heads=mixer.heads, kv_heads=mixer.kv_heads, head_dim=mixer.head_dim, qk_norm=mixer.qk_norm)
    return mixer == plain and mixer.qk_norm != "full"


def _swiglu(ffn: FFN | None) -> TypeGuard[MLP]:
    return isinstance(ffn, MLP) and ffn.gated and not ffn.bias


def _mixture(ffn: FFN | None, shared: bool) -> TypeGuard[MoE]:
    """Whether experts are as in torchtitan: gated, without biases; all shared ones as wide as so many experts."""
    if not isinstance(ffn, MoE):
        return False
    extra = ffn.bias or ffn.shared_gate or ffn.latent_size or ffn.zero_experts
    width = ffn.shared_intermediate_size
    return ffn.gated and not extra and (width % ffn.intermediate_size == 0 if shared else width == 0)


def _moe_arguments(ffn: MoE) -> str:
    shared = ffn.shared_intermediate_size // ffn.intermediate_size
    biases = ", gate_bias=True" if ffn.bias and ffn.router_bias else ""
    limited = ffn.top_groups is not None and ffn.top_groups < ffn.groups
    groups = f", num_expert_groups={ffn.groups}, num_limited_groups={ffn.top_groups}" if limited else ""
    return f"MoEArgs(num_experts={ffn.experts}, num_shared_experts={shared}, top_k={ffn.top_k}{biases}{groups})"


def _heads(spec: ModelSpec, mixer: Attention) -> dict[str, Any]:
    return {
        "dim": spec.hidden_size,
        "n_layers": spec.layer_count,
        "n_heads": mixer.heads,
        "n_kv_heads": mixer.kv_heads,
        "vocab_size": spec.vocab_size,
    }


def _llama3(spec: ModelSpec) -> dict[str, Any] | None:
    mixer, ffn = _same(spec, lambda layer: layer.mixer), _same(spec, lambda layer: layer.ffn)
    if not (_plain(spec) and _softmax(mixer) and _swiglu(ffn)) or spec.tie_embeddings:
        return None
    if mixer.qk_norm != "none" or mixer.heads * mixer.head_dim != spec.hidden_size:
        return None
    width = ffn.intermediate_size
    return _heads(spec, mixer) | {"ffn_dim_multiplier": _multiplier(spec.hidden_size, width), "multiple_of": width}


def _multiplier(hidden: int, width: int) -> float:
    """Return the multiplier that makes Llama 3's FFN `width` wide, with the fewest digits.

    It is two thirds of 4 hidden wide, times the multiplier, rounded up to a multiple of `multiple_of`, which is `width`
    here: any product from 1 to `width` gives that.
    """
    wide = int(2 * 4 * hidden / 3)
    if wide <= width:
        return 1.0
    multipliers = (round((width + 0.5) / wide, digits) for digits in range(1, 17))
    return next(multiplier for multiplier in multipliers if 1 <= int(multiplier * wide) <= width)


def _qwen3(spec: ModelSpec) -> dict[str, Any] | None:
    mixer, ffn = _same(spec, lambda layer: layer.mixer), _same(spec, lambda layer: layer.ffn)
    if not (_plain(spec) and _softmax(mixer)) or not (_swiglu(ffn) or _mixture(ffn, shared=False)):
        return None
    arguments = _heads(spec, mixer) | {"head_dim": mixer.head_dim, "qk_norm": mixer.qk_norm == "head"}
    if isinstance(ffn, MoE):
        arguments |= {"moe_enabled": True, "moe_inter_dim": ffn.intermediate_size, "moe_args": _moe_arguments(ffn)}
    else:
        arguments["hidden_dim"] = ffn.intermediate_size
    return arguments | {"enable_weight_tying": spec.tie_embeddings}


def _deepseek_v3(spec: ModelSpec) -> dict[str, Any] | None:
    mixer = _same(spec, lambda layer: layer.mixer)
    if type(mixer) is not MLA or mixer.bias or mixer.output_gate or not _plain(spec) or spec.tie_embeddings:
        return None
    uses = spec.layer_uses()
    if len(uses) != 2:
        return None
    dense, moe = (use.layer.ffn for use in uses)
    first = uses[0].count
    if not (_swiglu(dense) and _mixture(moe, shared=True)) or uses[0].positions != (range(first),):
        return None
    return {
        "vocab_size": spec.vocab_size,
        "dim": spec.hidden_size,
        "inter_dim": dense.intermediate_size,
        "moe_inter_dim": moe.intermediate_size,
        "n_layers": spec.layer_count,
        "n_dense_layers": first,
        "n_heads": mixer.heads,
        "moe_args": _moe_arguments(moe),
        "q_lora_rank": mixer.q_lora_rank or 0,
        "kv_lora_rank": mixer.kv_lora_rank,
        "qk_nope_head_dim": mixer.qk_nope_head_dim,
        "qk_rope_head_dim": mixer.qk_rope_head_dim,
        "v_head_dim": mixer.v_head_dim,
    }


def _gpt_oss(spec: ModelSpec) -> dict[str, Any] | None:
    """gpt-oss: sinks and biases everywhere, and a window in every second layer from the first on."""
    uses, moe = spec.layer_uses(), _same(spec, lambda layer: layer.ffn)
    mixers = [use.layer.mixer for use in uses]
    if not _plain(spec) or spec.tie_embeddings or len(uses) != 2 or not isinstance(moe, MoE):
        return None
    local, whole = mixers
    if not isinstance(local, Attention) or not isinstance(whole, Attention) or local.window is None:
        return None
    shape = Attention(heads=local.heads, kv_heads=local.kv_heads, head_dim=local.head_dim, bias=True, sinks=True)
    second = uses[0].positions == (range(0, spec.layer_count, 2),)
    experts = MoE(
        experts=moe.experts, top_k=moe.top_k, intermediate_size=moe.intermediate_size, bias=True, router_bias=True
    )
    if whole != shape or local != msgspec.structs.replace(shape, window=local.window) or not second or moe != experts:
        return None
    return _heads(spec, local) | {
        "head_dim": local.head_dim,
        "moe_inter_dim": moe.intermediate_size,
        "sliding_window_size": local.window,
        "moe_args": _moe_arguments(moe),
    }


FAMILIES = (
    Family("llama3", "llama3_args", "TransformerModelArgs", _llama3),
    Family("qwen3", "qwen3_args", "Qwen3ModelArgs", _qwen3, without=("pp",)),
    Family("deepseek_v3", "deepseekv3_args", "DeepSeekV3ModelArgs", _deepseek_v3),
    Family("gpt_oss", "gptoss_configs", "GptOssModelArgs", _gpt_oss, without=("pp", "cp")),
)
"""torchtitan's models, the plainest first."""
