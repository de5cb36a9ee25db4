"""What several families share: attention, windows, MLA, mixtures of experts, kinds of layers, the whole spec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from msgspec.structs import replace

from powerplan.errors import shown
from powerplan.extras import Extra
from powerplan.ffn import MLP, AnyFFN, MoE
from powerplan.huggingface.config import Config
from powerplan.mixers import MLA, AnyMixer, Attention
from powerplan.spec import Layer, ModelSpec, group_layers

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"


def attention(config: Config, *, whole: bool = True, **fields: Any) -> Attention:
    """Return the attention of the config's heads; `fields` are its bias, qk_norm, sinks and output_gate.

    There are as many key/value heads as query heads where the file says null, or neither file nor family has a number.
    head_dim is hidden_size / num_attention_heads where neither has it, and where the file says null: a whole number, or
    one that is rounded down if not `whole`.
    """
    hidden = config.integer("hidden_size", "n_embd")
    heads = config.integer("num_attention_heads", "n_head")
    kv_heads = config.optional_integer("num_key_value_heads") or heads
    config.check_divides("num_key_value_heads", kv_heads, "num_attention_heads", heads)
    head_dim = config.optional_integer("head_dim")
    if head_dim is None:
        if hidden % heads and (whole or hidden < heads):
            key = "hidden_size" if config.has("hidden_size") else "n_embd"
            multiple = f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}"
            raise config.error(f"{multiple}, and there is no head_dim", key)
        head_dim = hidden // heads
    return Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim, **fields)


def attention_layers(config: Config, windows: Sequence[int | None], **fields: Any) -> list[Attention]:
    """Return the attention of each layer, given its window in tokens, or None for full attention."""
    full = attention(config, **fields)
    by_window = {window: replace(full, window=window) for window in set(windows)}
    return [by_window[window] for window in windows]


def layer_types(config: Config, default: Sequence[str], allowed: Sequence[str]) -> Sequence[str]:
    """Return the kind of each layer: layer_types, of the length of `default` and all allowed, else `default`."""
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


def check_words(config: Config, key: str, words: Sequence[str], *allowed: str) -> None:
    """Raise InputError unless `words`, which the file has under `key`, say one of `allowed` for each layer."""
    count = config.layer_count
    if len(words) != count or set(words) - set(allowed):
        raise config.error(f"{key} must say {' or '.join(allowed)} for each of {count} layers", config.key(key))


def windows_of(config: Config, window: int | None, default_types: list[str], applied: bool = True) -> list[int | None]:
    """Return the window of each layer, in tokens; None for full attention. `window` is that of the sliding layers.

    Families whose code in transformers does not read layer_types (not `applied`) follow the file's all the same, with a
    remark where they differ from the default.
    """
    types = layer_types(config, default_types, (FULL, SLIDING))
    if types != default_types and not applied:
        config.note(f"windows follow layer_types; transformers' {config.family} code does not look at it")
    if window is None and SLIDING in types:
        problem = f"layer {types.index(SLIDING)} is sliding_attention, and there is no sliding_window in force"
        raise config.error(problem, "layer_types")
    return [window if layer_type == SLIDING else None for layer_type in types]


def one_window(config: Config) -> list[int | None]:
    """Return windows of families whose code has one window, or none, in all layers and does not read layer_types."""
    window = config.optional_integer("sliding_window")
    return windows_of(config, window, [SLIDING if window else FULL] * config.layer_count, applied=False)


def alternating_windows(config: Config, period: int) -> list[int | None]:
    """Return windows in all layers but the last of each period, as Gemma and gpt-oss have them."""
    window = config.optional_integer("sliding_window")
    types = [SLIDING if (index + 1) % period else FULL for index in range(config.layer_count)]
    return windows_of(config, window, types)


def mla(config: Config) -> MLA:
    """Return the latent attention of DeepSeek and Kimi Linear; queries are projected directly without q_lora_rank."""
    if "kv_lora_rank" in config.data and not config.has("kv_lora_rank"):
        raise config.error("kv_lora_rank is null: without a latent, this is another attention", "kv_lora_rank")
    return MLA(
        heads=config.integer("num_attention_heads"),
        q_lora_rank=config.optional_integer("q_lora_rank"),
        kv_lora_rank=config.integer("kv_lora_rank", default=512),
        qk_nope_head_dim=config.integer("qk_nope_head_dim", default=128),
        qk_rope_head_dim=config.integer("qk_rope_head_dim", default=64),
        v_head_dim=config.integer("v_head_dim", default=128),
        bias=config.boolean("attention_bias", False),
    )


def alike(config: Config, *names: str) -> int:
    """Return an integer that a file may also write as a list, with the same entry for each layer."""
    name = config.key(*names)
    if not isinstance(config.data.get(name), list):
        return config.integer(*names)
    entries = config.integers(name)
    if len(entries) != config.layer_count or len(set(entries)) != 1:
        problem = f"{name} must be the same in each of {config.layer_count} layers, and is {shown(entries)}"
        raise config.error(problem, name)
    return entries[0]


def mlp(config: Config) -> MLP:
    """Return the gated MLP of intermediate_size, with biases where mlp_bias says so."""
    return MLP(intermediate_size=config.integer("intermediate_size"), bias=config.boolean("mlp_bias", False))


def look_up(config: Config, *names: str) -> None:
    """Mark keys as known that stand for nothing in this config, such as the width of experts where there are none."""
    for name in names:
        config.has(name)


def experts_chosen(config: Config, experts: int) -> int:
    """Return how many of `experts` a token is sent to; the first name counts where a file has two, as gpt-oss does."""
    names = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_topk")
    chosen = alike(config, *names)
    look_up(config, *names)
    if chosen > experts:
        raise config.error(f"num_experts_per_tok {chosen} is more than the {experts} experts", config.key(*names))
    return chosen


def local_experts(config: Config, bias: bool = False) -> MoE:
    """Return the experts of Mixtral, gpt-oss and MiniMax: num_local_experts of intermediate_size, none shared."""
    experts = config.integer("num_local_experts", "num_experts")
    chosen, width = experts_chosen(config, experts), config.integer("intermediate_size")
    return MoE(experts=experts, top_k=chosen, intermediate_size=width, bias=bias, router_bias=bias)


def qwen_layers(config: Config, mixers: Sequence[AnyMixer]) -> list[Layer]:
    """Return the layers of a Qwen mixture of experts, one per entry of `mixers`.

    A layer has a dense MLP where mlp_only_layers names it or decoder_sparse_step skips it, and experts elsewhere; in
    Qwen 2 and Qwen3-Next also a shared one, with a gate.
    """
    experts = config.integer("num_experts", "num_local_experts", low=0)
    has_shared = config.family in ("qwen2_moe", "qwen3_5_moe_text", "qwen3_next")
    look_up(config, "moe_intermediate_size", "num_experts_per_tok")
    if has_shared:
        look_up(config, "shared_expert_intermediate_size")
    dense_layers = set(config.integers("mlp_only_layers"))
    step = config.integer("decoder_sparse_step", default=1)
    layers = []
    for index, mixer in enumerate(mixers):
        ffn: AnyFFN
        if index in dense_layers or experts == 0 or (index + 1) % step:
            ffn = MLP(intermediate_size=config.integer("intermediate_size"))
        else:
            shared = config.integer("shared_expert_intermediate_size") if has_shared else 0
            ffn = MoE(
                intermediate_size=config.integer("moe_intermediate_size"),
                experts=experts,
                top_k=experts_chosen(config, experts),
                shared_intermediate_size=shared,
                shared_gate=shared > 0,
            )
        layers.append(Layer(mixer=mixer, ffn=ffn))
    return layers


def note_prediction_layers(config: Config, *names: str) -> None:
    """Remark that the layers which predict further tokens are left out, where one of the keys `names` counts any."""
    if config.has(config.key(*names)) and config.optional_integer(*names, low=0):
        config.note("multi-token-prediction layers (num_nextn_predict_layers) are not counted")


def head_bias(config: Config) -> Extra:
    """Return the bias of the LM head, which is there whether the head is tied or not."""
    return Extra(name="lm head bias", elements=config.integer("vocab_size"))


def assemble(
    config: Config, name: str, layers: list[Layer], *, tie: bool = False, ties: bool = True, **fields: Any
) -> ModelSpec:
    """Return the spec of `layers`, with the config's embeddings.

    tie: tie_word_embeddings of a family that transformers does not have. ties: whether the family's code heeds it.
    """
    tied = config.boolean("tie_word_embeddings", tie)
    if tied and not ties:
        config.note(f"tie_word_embeddings is not heeded: transformers' {config.family} does not tie its embeddings")
    return ModelSpec(
        name=name,
        vocab_size=config.integer("vocab_size"),
        hidden_size=config.integer("hidden_size", "n_embd"),
        tie_embeddings=tied and ties,
        layers=group_layers(layers),
        **fields,
    )
