"""Families of grouped-query attention and experts. latent.py has latent attention, mixed.py what has more to read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from msgspec.structs import replace

from powerplan.extras import Extra
from powerplan.ffn import MLP, MoE
from powerplan.huggingface import parts
from powerplan.huggingface.config import Config, Family, keys
from powerplan.huggingface.dense import LAYERNORM, qwen_windows
from powerplan.huggingface.parts import FULL, SLIDING
from powerplan.mixers import AnyMixer
from powerplan.spec import Layer, ModelSpec, Norm

RMSNORMS = Norm()
"""Before the mixer and before the FFN."""

EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
"""Keys of how many routed experts there are."""

GROUPS = ("n_group", "num_expert_group")
"""Keys of the groups that they are in, where routers pick groups first."""


@dataclass(frozen=True)
class Experts:
    """The keys of a family's experts.

    width: of one routed expert. shared: how many shared ones of that width there are. shared_width: that of all shared
    experts together. router_bias: whether the router has a bias, be it learned by gradients or by a rule.
    """

    width: str = "moe_intermediate_size"
    shared: str = ""
    shared_width: str = ""
    router_bias: bool = False


def moe_of(config: Config, keys: Experts) -> MoE:
    """Return the experts of a config; all gated, and without biases but the router's."""
    experts, width = parts.alike(config, *EXPERTS), parts.alike(config, keys.width)
    shared = config.optional_integer(keys.shared_width, low=0) if keys.shared_width else 0
    if keys.shared:
        shared = width * (config.optional_integer(keys.shared, low=0) or 0)
    chosen = parts.experts_chosen(config, experts)
    groups, top_groups = groups_chosen(config, experts, chosen)
    return MoE(
        experts=experts,
        top_k=chosen,
        intermediate_size=width,
        shared_intermediate_size=shared or 0,
        router_bias=keys.router_bias,
        groups=groups,
        top_groups=top_groups,
    )


def routed_experts(config: Config, routed: Sequence[str], shared: Sequence[str], router_bias: bool) -> MoE:
    """Return the experts of DeepSeek and Kimi Linear, counted by the keys named `routed` and `shared`."""
    experts = config.integer(*routed)
    width = config.integer("moe_intermediate_size")
    shared_count = config.optional_integer(*shared, low=0) or 0
    chosen = parts.experts_chosen(config, experts)
    groups, top_groups = groups_chosen(config, experts, chosen)
    return MoE(
        experts=experts,
        top_k=chosen,
        intermediate_size=width,
        shared_intermediate_size=shared_count * width,
        router_bias=router_bias,
        groups=groups,
        top_groups=top_groups,
    )


def groups_chosen(config: Config, experts: int, chosen: int) -> tuple[int, int | None]:
    """Return the groups of experts, and of how many of them a token's experts are: 1 and None without a limit.

    They say where tokens go and change no count, so that a file is not refused for values that fit nothing here: a
    router of all experts has 1 group, or the topk_method greedy, and picks out of all.
    """
    stated = next((value for key in GROUPS if (value := config.data.get(key)) is not None), None)
    limit = config.data.get("topk_group")
    if config.data.get("topk_method") == "greedy" or type(stated) is not int or type(limit) is not int:
        return 1, None
    fits = 0 < limit < stated and experts % stated == 0 and chosen <= limit * (experts // stated)
    return (stated, limit) if fits else (1, None)


Which = Callable[[Config], list[bool]]
"""Says which layers of a config have experts."""


def every_layer(config: Config) -> list[bool]:
    """Return that every layer has experts."""
    return [True] * config.layer_count


def sparse_layers(config: Config, first: int = 1) -> list[bool]:
    """Return which layers have experts: mlp_layer_types, or one in moe_layer_freq from first_k_dense_replace on.

    first: the default of first_k_dense_replace, for families whose config class has none.
    """
    count = config.layer_count
    types = config.strings("mlp_layer_types")
    if types is None:
        start = config.integer("first_k_dense_replace", default=first, low=0)
        if isinstance(config.value("moe_layer_freq"), list):
            return listed(config, "moe_layer_freq", count)
        step = config.integer("moe_layer_freq", default=1)
        return [index >= start and index % step == 0 for index in range(count)]
    for key in ("first_k_dense_replace", "moe_layer_freq"):  # The list holds, whatever these say.
        config.optional_integer(key, low=0)
    parts.check_words(config, "mlp_layer_types", types, "dense", "sparse")
    return [layer_type == "sparse" for layer_type in types]


def listed(config: Config, key: str, count: int) -> list[bool]:
    """Return whether a list has 1, and not 0, for each layer."""
    listed = config.integers(key)
    if len(listed) != count or not set(listed) <= {0, 1}:
        raise config.error(f"{key} must have 0 or 1 for each of {count} layers", key)
    return [entry == 1 for entry in listed]


def qwen_sparse(config: Config) -> list[bool]:
    """Return which layers have experts: those that decoder_sparse_step names and mlp_only_layers does not."""
    dense, step = set(config.integers("mlp_only_layers")), config.integer("decoder_sparse_step", default=1)
    return [index not in dense and (index + 1) % step == 0 for index in range(config.layer_count)]


Windows = Callable[[Config], Sequence[int | None]]
"""Gives the window of each layer, None for full attention."""


def no_windows(config: Config) -> list[int | None]:
    """Return that no layer has a window."""
    return [None] * config.layer_count


def typed_windows(config: Config, slides: Callable[[Config, int], bool]) -> list[int | None]:
    """Return the windows by layer_types; where the file has none, `slides` says which layers have one."""
    window = config.optional_integer("sliding_window", low=0) or None
    default = [FULL] * config.layer_count
    if config.strings("layer_types") is None:
        default = [SLIDING if slides(config, index) else FULL for index in range(len(default))]
    return parts.windows_of(config, window, default)


def typed(slides: Callable[[Config, int], bool]) -> Windows:
    """Return what reads windows as `typed_windows` does."""
    return partial(typed_windows, slides=slides)


@dataclass(frozen=True)
class Grouped:
    """What tells a family of grouped-query attention and experts from the others. Called, it reads a config.

    biased: the flag for biases in attention, and `biases` where they are. normed: the flag for qk-norm per head. heads:
    further fields of the attention. dense: the key of the width of dense MLPs, where that is not intermediate_size, or
    need not be. mlp_biased: the flag for biases in dense MLPs and shared experts. head_biased: that
    for a bias of the LM head. refuses: settings that are not read, and why.
    """

    experts: Experts = Experts()
    sparse: Which = every_layer
    windows: Windows = no_windows
    biased: str = "attention_bias"
    biases: Literal[True, "qkv"] = True
    normed: str = ""
    heads: Mapping[str, Any] = field(default_factory=dict)
    norm: Norm = RMSNORMS
    dense: str = "intermediate_size"
    mlp_biased: str = ""
    head_biased: str = ""
    refuses: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, config: Config, name: str) -> ModelSpec:
        for key, because in self.refuses.items():
            config.refuse(key, because)
        heads = dict(self.heads)
        if _flag(config, self.normed):
            heads["qk_norm"] = "head"
        bias = self.biases if _flag(config, self.biased) else False
        mixers = parts.attention_layers(config, self.windows(config), bias=bias, **heads)
        return self.model(config, name, mixers)

    def model(
        self, config: Config, name: str, mixers: Sequence[AnyMixer], moe: Callable[[Config, Experts], MoE] = moe_of
    ) -> ModelSpec:
        """Return the spec of `mixers` with the family's dense MLPs and experts; `moe` makes the experts."""
        parts.note_prediction_layers(config, "num_nextn_predict_layers", "num_mtp_layers")
        sparse, bias = self.sparse(config), _flag(config, self.mlp_biased)
        by_kind: dict[bool, Layer] = {}
        keys = self.experts
        parts.look_up(config, *EXPERTS, keys.width, keys.shared, keys.shared_width, "num_experts_per_tok")
        if True in sparse:
            experts = moe(config, self.experts)
            by_kind[True] = Layer(ffn=experts, extras=shared_biases(experts) if bias else ())
        width = config.optional_integer(self.dense) or config.optional_integer("intermediate_size")
        if False in sparse:
            width = width or config.integer(self.dense)
            by_kind[False] = Layer(ffn=MLP(intermediate_size=width, bias=bias))
        layers = [replace(by_kind[kind], mixer=mixer) for mixer, kind in zip(mixers, sparse, strict=True)]
        extras = (parts.head_bias(config),) if _flag(config, self.head_biased) else ()
        return parts.assemble(config, name, layers, norm=self.norm, extras=extras)


def _flag(config: Config, key: str) -> bool:
    return bool(key) and config.boolean(key, False)


def shared_biases(moe: MoE) -> tuple[Extra, ...]:
    """Return the biases of gated shared experts, 2s + m."""
    width = moe.shared_intermediate_size
    return (Extra(name="shared expert biases", vectors=1, elements=2 * width),) if width else ()


def mixtral(config: Config, name: str) -> ModelSpec:
    """Mixtral: experts in every layer; a window in every layer if there is one."""
    mixers = parts.attention_layers(config, parts.one_window(config))
    moe = parts.local_experts(config)
    return parts.assemble(config, name, [Layer(mixer=mixer, ffn=moe) for mixer in mixers])


def qwen2_moe(config: Config, name: str) -> ModelSpec:
    """Qwen 1.5 and 2 MoE: biases on query, key and value, a gated shared expert; windows in every other layer if used.

    With use_sliding_window, layers 0, 2, 4 ... below max_window_layers have the window, as in transformers.
    """
    window = config.optional_integer("sliding_window", low=0)
    if not config.boolean("use_sliding_window", False):
        window = None
    last = config.integer("max_window_layers", low=0)
    slides = [bool(window) and index % 2 == 0 and index < last for index in range(config.layer_count)]
    windows = parts.windows_of(config, window or None, [SLIDING if slide else FULL for slide in slides])
    bias: Literal[False, "qkv"] = "qkv" if config.boolean("qkv_bias", True) else False
    mixers = parts.attention_layers(config, windows, bias=bias)
    return parts.assemble(config, name, parts.qwen_layers(config, mixers))


def qwen3_moe(config: Config, name: str) -> ModelSpec:
    """Qwen 3 MoE: dense MLPs in mlp_only_layers and where decoder_sparse_step skips; qk-norm per head.

    transformers applies an active window to every layer; a file that states max_window_layers means those from
    there on, as in the dense Qwen families.
    """
    windows = qwen_windows(config)
    if None in windows and any(windows):
        config.note("windows as in max_window_layers or layer_types; transformers' qwen3_moe code looks at neither")
    bias = config.boolean("attention_bias", False)
    mixers = parts.attention_layers(config, windows, bias=bias, qk_norm="head")
    return parts.assemble(config, name, parts.qwen_layers(config, mixers))


def gpt_oss(config: Config, name: str) -> ModelSpec:
    """gpt-oss: windows in every other layer from the first on, sinks, biases on projections, experts and router."""
    windows, bias = parts.alternating_windows(config, period=2), config.boolean("attention_bias", True)
    mixers = parts.attention_layers(config, windows, bias=bias, sinks=True)
    moe = parts.local_experts(config, bias=True)
    return parts.assemble(config, name, [Layer(mixer=mixer, ffn=moe) for mixer in mixers])


def minimax_m2(config: Config, name: str) -> ModelSpec:
    """MiniMax-M2: softmax attention in all layers, with qk-norm over all heads; experts of intermediate_size.

    The published file has keys of MiniMax-Text-01 beside: attn_type_list must be 1 everywhere.
    """
    if config.has("attn_type_list") and not all(listed(config, "attn_type_list", config.layer_count)):
        raise config.error(
            "attn_type_list has a layer that is not softmax attention, and MiniMax-M2 has none", "attn_type_list"
        )
    config.word("qk_norm_type", ("per_layer",))
    config.refuse("shared_intermediate_size", "no published MiniMax-M2 has a shared expert")
    parts.note_prediction_layers(config, "num_mtp_modules")
    read = Grouped(
        Experts(width="intermediate_size", router_bias=config.boolean("use_routing_bias", True)),
        biased="",
        heads={"qk_norm": "full" if config.boolean("use_qk_norm", True) else "none"},
    )
    return read(config, name)


def _every_fourth(config: Config, index: int) -> bool:
    return index % 4 != 0


def _exaone_slides(config: Config, index: int) -> bool:
    has_window = config.optional_integer("sliding_window", low=0) is not None
    return has_window and (index + 1) % config.integer("sliding_window_pattern") != 0


def _flint_slides(config: Config, index: int) -> bool:
    return index >= 2 and index % 4 != 1 and index != config.layer_count - 1


def _dots_slides(config: Config, index: int) -> bool:
    has_window = config.optional_integer("sliding_window", low=0) is not None
    return has_window and index >= config.integer("max_window_layers", low=0)


OLMO = Experts(width="intermediate_size")
GRANITE = Experts(width="intermediate_size", shared_width="shared_intermediate_size")
DEEPSEEK = Experts(shared="n_shared_experts", router_bias=True)
HEAD = {"qk_norm": "head"}

UNUSED_WIDTH = frozenset({"intermediate_size"})
"""The width of dense MLPs, where no layer has one."""

M2_KEYS = keys(
    """
    layernorm_full_attention_beta layernorm_linear_attention_beta layernorm_mlp_beta mlp_intermediate_size
    mtp_transformer_layers shared_moe_mode use_mtp
    """
)

FAMILIES: dict[str, Family] = {
    "aria_text": Family(
        Grouped(Experts(width="intermediate_size", shared="moe_num_shared_experts"), mlp_biased="mlp_bias")
    ),
    "deepseek": Family(
        Grouped(Experts(shared="n_shared_experts"), sparse=sparse_layers), defaults={"first_k_dense_replace": 0}
    ),
    "dots1": Family(
        Grouped(DEEPSEEK, sparse=sparse_layers, windows=typed(_dots_slides), heads=HEAD),
        inert=frozenset({"max_window_layers"}),
    ),
    "exaone_moe": Family(
        Grouped(
            Experts(shared="num_shared_experts", router_bias=True),
            sparse=sparse_layers,
            windows=typed(_exaone_slides),
            biased="",
            heads=HEAD,
        ),
        inert=frozenset({"sliding_window_pattern"}),
    ),
    "flex_olmo": Family(Grouped(OLMO, heads={"qk_norm": "full"})),
    "flint": Family(
        Grouped(
            Experts(shared_width="shared_expert_intermediate_size"),
            sparse=qwen_sparse,
            windows=typed(_flint_slides),
            heads=HEAD | {"sinks": True},
        ),
        defaults={"mlp_only_layers": [0, 1]},
    ),
    "glm4_moe": Family(
        Grouped(DEEPSEEK, sparse=sparse_layers, biases="qkv", normed="use_qk_norm", heads={"whole": False})
    ),
    "glm4v_moe_text": Family(Grouped(DEEPSEEK, sparse=sparse_layers, biases="qkv", heads={"whole": False})),
    "gpt_oss": Family(gpt_oss, inert=keys("initial_context_length")),
    "granitemoe": Family(Grouped(OLMO)),
    "granitemoe_swa": Family(Grouped(GRANITE, windows=typed(_every_fourth), heads={"sinks": True})),
    "granitemoeshared": Family(Grouped(GRANITE)),
    "hy_v3": Family(
        Grouped(
            Experts(shared="num_shared_experts", router_bias=True),
            sparse=sparse_layers,
            heads=HEAD,
            mlp_biased="mlp_bias",
        )
    ),
    "kolibri1": Family(
        Grouped(
            Experts(shared_width="shared_expert_intermediate_size", router_bias=True),
            windows=typed(lambda config, index: (index + 1) % 5 != 0),
            biased="",
            heads=HEAD,
            norm=Norm(per_layer=4),
        )
    ),
    "mellum": Family(
        Grouped(sparse=partial(sparse_layers, first=0), windows=typed(lambda config, index: False), heads=HEAD),
        inert=frozenset({"mtp_layer_types", "mtp_mlp_layer_types"}),
    ),
    "minimax_m2": Family(minimax_m2, inert=M2_KEYS),
    "mixtral": Family(mixtral),
    "olmoe": Family(Grouped(OLMO, heads={"qk_norm": "full"})),
    "phimoe": Family(Grouped(OLMO, windows=parts.one_window, norm=LAYERNORM, head_biased="lm_head_bias")),
    "qwen2_moe": Family(qwen2_moe, inert=UNUSED_WIDTH),
    "qwen3_moe": Family(qwen3_moe, defaults={"max_window_layers": 0}, inert=UNUSED_WIDTH | {"use_qk_norm"}),
    "qwen3_vl_moe_text": Family(qwen3_moe, defaults={"max_window_layers": 0}, inert=UNUSED_WIDTH),
    "solar_open": Family(
        Grouped(
            DEEPSEEK,
            biases="qkv",
            refuses=dict.fromkeys(("first_k_dense_replace", "use_qk_norm"), "transformers' solar_open has none"),
        ),
        inert=UNUSED_WIDTH,
    ),
}
"""Reader by model_type."""
