"""What several families share: attention, windows, MLA, mixtures of experts, kinds of layers, the whole spec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from powerplan.errors import shown
from powerplan.ffn import MLP, AnyFFN, MoE
from powerplan.huggingface.config import Config
from powerplan.mixers import MLA, AnyMixer, Attention
from powerplan.spec import Layer, ModelSpec, Norm, group_layers

Bias = bool | Literal["qkv"]
FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"


def attention_layers(
    config: Config,
    windows: Sequence[int | None],
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
    """Return one Attention per entry of `windows`, with the heads of the config.

    Args:
        config: The config of the model.
        windows: The window of each layer, in tokens; None for full attention.
        default_hidden: hidden_size of a file without it. Without a default, as below, such a file is refused.
        default_heads: num_attention_heads of a file without it.
        default_kv_heads: num_key_value_heads of a file without it; as many as query heads where the file says null,
            or where the family has no default.
        default_head_dim: head_dim of a file without it; hidden_size / num_attention_heads where there is no default.
        bias, qk_norm, sinks, output_gate: As for Attention, the same in every layer.

    Raises:
        InputError: The key/value heads do not divide the query heads, or the heads do not divide the hidden size.
    """
    hidden = config.integer("hidden_size", "n_embd", default=default_hidden)
    heads = config.integer("num_attention_heads", "n_head", default=default_heads)
    kv_heads = config.optional_integer("num_key_value_heads", absent=default_kv_heads) or heads
    config.check_divides("num_key_value_heads", kv_heads, "num_attention_heads", heads)
    head_dim = config.optional_integer("head_dim") or default_head_dim
    if head_dim is None:
        if hidden % heads:
            raise config.error(
                f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}, and there is no head_dim",
                "hidden_size" if config.has("hidden_size") else "n_embd",
            )
        head_dim = hidden // heads
    by_window = {
        window: Attention(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            bias=bias,
            qk_norm=qk_norm,
            window=window,
            sinks=sinks,
            output_gate=output_gate,
        )
        for window in windows
    }
    return [by_window[window] for window in windows]


def layer_types(config: Config, default: Sequence[str], allowed: Sequence[str]) -> Sequence[str]:
    """Return the kind of each layer: layer_types where the file has it, else `default`.

    Raises:
        InputError: layer_types is not as long as `default`, or has an entry that is not in `allowed`.
    """
    types = config.strings("layer_types")
    if types is None:
        return default
    if len(types) != len(default):
        raise config.error(f"layer_types has {len(types)} entries for {len(default)} layers", "layer_types")
    for index, layer_type in enumerate(types):
        if layer_type not in allowed:
            problem = f"layer_types[{index}] {shown(layer_type)} is not supported for {config.family}"
            raise config.error(problem, "layer_types", index)
    return types


def windows_of(
    config: Config, window: int | None, default_types: list[str], *, applied: bool = True
) -> list[int | None]:
    """Return the window of each layer, in tokens; None for full attention.

    Args:
        config: The config of the model.
        window: The window of the sliding layers; None where no window is in force.
        default_types: The layer_types of a file without them.
        applied: Whether transformers' code for this family reads layer_types. Where it does not and the file's list
            differs from the default, the list is followed all the same, with a remark.

    Raises:
        InputError: layer_types has the wrong length or an unknown entry, or names a window where there is none.
    """
    types = layer_types(config, default_types, (FULL, SLIDING))
    if types != default_types and not applied:
        config.note(f"windows follow layer_types; transformers' {config.family} code does not look at it")
    if window is None and SLIDING in types:
        problem = f"layer {types.index(SLIDING)} is sliding_attention, and there is no sliding_window in force"
        raise config.error(problem, "layer_types")
    return [window if layer_type == SLIDING else None for layer_type in types]


def one_window(config: Config, window: int | None) -> list[int | None]:
    """Return windows of families whose code has one window, or none, in all layers and does not read layer_types."""
    return windows_of(config, window, [SLIDING if window else FULL] * config.layer_count, applied=False)


def alternating(count: int, period: int) -> list[str]:
    """Return sliding layers with a full one at the end of each period, as Gemma and gpt-oss have them."""
    return [SLIDING if (index + 1) % period else FULL for index in range(count)]


def mla(config: Config, default_q_rank: int | None) -> MLA:
    """Return the latent attention of DeepSeek and Kimi Linear; `default_q_rank` None projects queries directly."""
    return MLA(
        heads=config.integer("num_attention_heads"),
        q_lora_rank=config.optional_integer("q_lora_rank", absent=default_q_rank),
        kv_lora_rank=config.integer("kv_lora_rank", default=512),
        qk_nope_head_dim=config.integer("qk_nope_head_dim", default=128),
        qk_rope_head_dim=config.integer("qk_rope_head_dim", default=64),
        v_head_dim=config.integer("v_head_dim", default=128),
        bias=config.boolean("attention_bias", False),
    )


def experts_chosen(config: Config, experts: int, default: int | None) -> int:
    """Return how many of `experts` a token is sent to."""
    names = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token")
    chosen = config.integer(*names, default=default)
    if chosen > experts:
        key = next((name for name in names if name in config.data), names[0])
        raise config.error(f"num_experts_per_tok {chosen} is more than the {experts} experts", key)
    return chosen


def local_experts(config: Config, default: int, default_chosen: int, bias: bool = False) -> MoE:
    """Return the experts of Mixtral, gpt-oss and MiniMax: num_local_experts of intermediate_size, none shared."""
    experts = config.integer("num_local_experts", "num_experts", default=default)
    return MoE(
        experts=experts,
        top_k=experts_chosen(config, experts, default_chosen),
        intermediate_size=config.integer("intermediate_size"),
        bias=bias,
        router_bias=bias,
    )


def qwen_layers(
    config: Config,
    mixers: Sequence[AnyMixer],
    *,
    default_experts: int,
    default_chosen: int,
    default_width: int,
    default_shared: int = 0,
) -> list[Layer]:
    """Return the layers of a Qwen mixture of experts, one per entry of `mixers`.

    A layer has a dense MLP where mlp_only_layers names it or decoder_sparse_step skips it, and experts elsewhere.
    `default_shared` is the width of a gated shared expert; 0 for families that have no shared expert.
    """
    experts = config.integer("num_experts", "num_local_experts", default=default_experts, low=0)
    dense_layers = set(config.integers("mlp_only_layers"))
    step = config.integer("decoder_sparse_step", default=1)
    layers = []
    for index, mixer in enumerate(mixers):
        ffn: AnyFFN
        if index in dense_layers or experts == 0 or (index + 1) % step:
            ffn = MLP(intermediate_size=config.integer("intermediate_size"))
        else:
            shared = default_shared and config.integer("shared_expert_intermediate_size", default=default_shared)
            ffn = MoE(
                intermediate_size=config.integer("moe_intermediate_size", default=default_width),
                experts=experts,
                top_k=experts_chosen(config, experts, default_chosen),
                shared_intermediate_size=shared,
                shared_gate=shared > 0,
            )
        layers.append(Layer(mixer=mixer, ffn=ffn))
    return layers


def note_prediction_layers(config: Config, *names: str) -> None:
    """Remark that the layers which predict further tokens are left out, where one of the keys `names` counts any."""
    if config.optional_integer(*names, absent=0, low=0):
        config.note("multi-token-prediction layers (num_nextn_predict_layers) are not counted")


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
    """Return the spec of `layers`, with the config's embeddings; `tie` is the family's tie_word_embeddings."""
    return ModelSpec(
        name=name,
        vocab_size=config.integer("vocab_size", default=default_vocab),
        hidden_size=config.integer("hidden_size", "n_embd", default=default_hidden),
        tie_embeddings=config.boolean("tie_word_embeddings", tie),
        position_embeddings=position_embeddings,
        norm=norm,
        layers=group_layers(layers),
    )
