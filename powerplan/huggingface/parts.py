"""Pieces that several families share: heads, per-layer windows, tied embeddings, the assembled spec."""

from __future__ import annotations

from typing import Literal

from powerplan.errors import shown
from powerplan.huggingface.config import Config
from powerplan.mixers import Attention
from powerplan.spec import Layer, ModelSpec, Norm, group_layers

Bias = bool | Literal["qkv"]


def attention_layers(
    config: Config,
    windows: list[int | None],
    *,
    default_hidden: int | None = None,
    default_heads: int | None = None,
    default_kv_heads: int | None = None,
    default_head_dim: int | None = None,
    bias: Bias = False,
    qk_norm: Literal["none", "head", "full"] = "none",
    sinks: bool = False,
    output_gate: bool = False,
) -> list[Attention]:
    """Return one Attention per entry of `windows`, with the heads of the config."""
    hidden = config.integer("hidden_size", "n_embd", default=default_hidden)
    heads = config.integer("num_attention_heads", "n_head", default=default_heads)
    kv_heads = config.integer("num_key_value_heads", default=default_kv_heads or heads)
    if heads % kv_heads:
        raise config.error(
            f"num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}", "num_key_value_heads"
        )
    head_dim = config.optional_integer("head_dim") or default_head_dim
    if head_dim is None:
        if hidden % heads:
            raise config.error(
                f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and there is no head_dim",
                "hidden_size" if config.has("hidden_size") else "n_embd",
            )
        head_dim = hidden // heads
    made: dict[int | None, Attention] = {}
    for window in windows:
        if window not in made:
            made[window] = Attention(
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                bias=bias,
                qk_norm=qk_norm,
                window=window,
                sinks=sinks,
                output_gate=output_gate,
            )
    return [made[window] for window in windows]


def windows_of(
    config: Config, window: int | None, default_types: list[str], *, applied: bool = True
) -> list[int | None]:
    """Return each layer's window: from layer_types where the file has it, else from the family's `default_types`.

    applied: whether transformers' code for this family follows layer_types. Where it does not and the file's list says
    something else than the default, the list is followed all the same, with a remark.
    """
    types = config.words("layer_types")
    if types is None:
        types = default_types
    elif len(types) != len(default_types):
        raise config.error(f"layer_types has {len(types)} entries for {len(default_types)} layers", "layer_types")
    elif types != default_types and not applied:
        config.note(f"windows follow layer_types; transformers' {config.family} code does not look at it")
    windows: list[int | None] = []
    for index, kind in enumerate(types):
        if kind == "full_attention":
            windows.append(None)
        elif kind == "sliding_attention":
            if window is None:
                raise config.error(
                    f"layer {index} is sliding_attention, and there is no sliding_window in force", "layer_types"
                )
            windows.append(window)
        else:
            raise config.error(
                f"layer_types[{index}] {shown(kind)} is not supported for {config.family}", "layer_types", index
            )
    return windows


def alternating(count: int, period: int) -> list[str]:
    """Return sliding layers with a full one at the end of each period, as Gemma and gpt-oss have them."""
    return ["full_attention" if (index + 1) % period == 0 else "sliding_attention" for index in range(count)]


def uniform(count: int, sliding: bool) -> list[str]:
    """Return the same attention in every layer."""
    return ["sliding_attention" if sliding else "full_attention"] * count


def assemble(
    config: Config,
    name: str,
    layers: list[Layer],
    norm: Norm,
    *,
    tie: bool,
    position_embeddings: int | None = None,
    default_vocab: int | None = None,
    default_hidden: int | None = None,
) -> ModelSpec:
    """Return the spec of `layers`, with the config's embeddings; `tie` is the family's default."""
    return ModelSpec(
        name=name,
        vocab_size=config.integer("vocab_size", default=default_vocab),
        hidden_size=config.integer("hidden_size", "n_embd", default=default_hidden),
        tie_embeddings=config.boolean("tie_word_embeddings", tie),
        position_embeddings=position_embeddings,
        norm=norm,
        layers=group_layers(layers),
    )
