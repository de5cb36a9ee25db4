"""Families whose layers run several times over in one pass: each run is a layer here, and weights are stored once."""

from __future__ import annotations

from msgspec.structs import replace

from powerplan.errors import shown
from powerplan.extras import Extra
from powerplan.ffn import MLP
from powerplan.huggingface import parts
from powerplan.huggingface.config import MAX_CONFIG_LAYERS, Config, Family
from powerplan.huggingface.dense import qwen_windows
from powerplan.huggingface.mixed import gates_without_bias
from powerplan.huggingface.parts import FULL, SLIDING
from powerplan.mixers import Attention
from powerplan.spec import MAX_LAYERS, Layer, ModelSpec, Norm


def hrm_text(config: Config, name: str) -> ModelSpec:
    """HRM: two stacks of layers in loops, each H cycle being L_cycles times the low stack and once the high one.

    Every pass of a stack has a cache of its own, and only the first has weights of its own. Norms have no parameters.
    num_hidden_layers is that of one stack, or of all passes where num_layers_per_stack is stated.
    """
    high, low = config.integer("H_cycles", high=1000), config.integer("L_cycles", high=1000)
    passes = high * (low + 1)
    per_stack = config.optional_integer("num_layers_per_stack", high=MAX_CONFIG_LAYERS)
    if per_stack is None:
        per_stack = config.layer_count
    elif config.layer_count != per_stack * passes:
        problem = f"num_hidden_layers {config.layer_count} is not {per_stack} layers in {passes} passes"
        raise config.error(problem, "num_hidden_layers")
    _check_runs(config, "H_cycles", per_stack * passes)
    if config.boolean("prefix_lm", True):
        config.note("hrm_text: tokens of a prompt see each other both ways; causal attention is counted")
    attention = parts.attention(config, bias=config.boolean("attention_bias", False), output_gate=True)
    first = Layer(mixer=attention, ffn=parts.mlp(config))
    stack, again = [first] * per_stack, [replace(first, tied=True)] * per_stack
    cycle = again * low + again
    layers = stack + again * (low - 1) + stack + cycle * (high - 1)
    extras = (Extra(name="first low state", vectors=1),)
    return parts.assemble(config, name, layers, norm=Norm(kind="none"), extras=extras)


def ouro(config: Config, name: str) -> ModelSpec:
    """Ouro: all layers run total_ut_steps times, each run with a cache of its own; four norms a layer.

    A gate reads the state after each run, and says whether to stop: all runs are counted, and the gate once. vLLM,
    model_executor/models/ouro.py.
    """
    runs = config.integer("total_ut_steps", default=4, high=1000)
    _check_runs(config, "total_ut_steps", runs * config.layer_count)
    if runs > 1:
        config.note(f"ouro: all layers run {runs} times; each run is a layer here")
    mixers = parts.attention_layers(config, qwen_windows(config))
    mlp = MLP(intermediate_size=config.integer("intermediate_size"))
    first = [Layer(mixer=mixer, ffn=mlp) for mixer in mixers]
    again = [replace(layer, tied=True) for layer in first]
    extras = (Extra(name="early exit gate", vectors=1, matmul=True), Extra(name="early exit bias", elements=1))
    return parts.assemble(config, name, first + again * (runs - 1), norm=Norm(per_layer=4), extras=extras)


def _check_runs(config: Config, key: str, total: int) -> None:
    """Refuse loops that make more layers than a model may have, before a list of them is made."""
    if total > MAX_LAYERS:
        problem = f"{key} {config.value(key)} makes {total:,} layers in all; allowed are up to {MAX_LAYERS:,}"
        raise config.error(problem, key)


BLOCK = "mlp"
"""What layer_types of Dory's files has for the MLP of a layer, which they count as a layer of its own."""


def dory(config: Config, name: str) -> ModelSpec:
    """Dory: nGPT (Loshchilov et al. 2024, arXiv 2410.01131) whose middle layers run n_recurrent_loops times.

    With recurrent_kv_cache_mode per_loop each run of a layer has a cache of its own. With last_loop only the last one
    has; earlier ones make keys and values of a token too, and look up those of the last run for the tokens before it.
    Norms have no parameters. Learned are scales of queries, of gates, of both halves of the MLP, of both residuals and
    of the logits.
    """
    config.refuse("hybrid_layer_pattern", "it is of Dory's first files, before layer_types")
    types, (before, looped, after) = _dory_layers(config)
    loops = config.integer("n_recurrent_loops", high=MAX_CONFIG_LAYERS)
    _check_runs(config, "n_recurrent_loops", before + loops * looped + after)
    bias, mlp_bias = config.boolean("attention_bias", False), config.boolean("mlp_bias", False)
    full = parts.attention(config, bias=bias, output_gate=True)
    width = config.integer("intermediate_size")
    scales = Extra(name="scales", vectors=2, elements=2 * full.heads * full.head_dim + 2 * width)
    plain = Layer(ffn=MLP(intermediate_size=width, bias=mlp_bias), extras=(scales,))
    kinds = {
        FULL: replace(plain, mixer=full),
        SLIDING: replace(plain, mixer=replace(full, window=config.integer("sliding_window"))),
    }
    layers = [kinds[layer_type] for layer_type in types]
    loop = layers[before : before + looped]
    runs = [loop, *[[replace(layer, tied=True) for layer in loop]] * (loops - 1)]
    if config.word("recurrent_kv_cache_mode", ("per_loop", "last_loop")) == "last_loop":
        runs[:-1] = [[_without_cache(layer) for layer in run] for run in runs[:-1]]
    if looped and loops > 1:
        config.note(f"dory: layers {before + 1} to {before + looped} run {loops} times; each run is a layer here")
    in_order = layers[:before] + [layer for run in runs for layer in run] + layers[before + looped :]
    logits = Extra(name="scales of logits", elements=config.integer("vocab_size"))
    return gates_without_bias(parts.assemble(config, name, in_order, norm=Norm(kind="none"), extras=(logits,)))


def _dory_layers(config: Config) -> tuple[list[str], tuple[int, int, int]]:
    """Return the kind of each layer's attention, and how many layers stand before, in and after the loop."""
    count, words = config.layer_count, config.strings("layer_types")
    blocks = 2 if words is not None and BLOCK in words else 1
    if words is not None and blocks == 2:
        if len(words) != count or count % 2 or set(words[1::2]) != {BLOCK}:
            problem = f"layer_types must say attention and mlp in turn for each of {count} blocks"
            raise config.error(problem, "layer_types")
        for index, word in enumerate(words[::2]):
            if word not in (FULL, SLIDING):
                problem = f"layer_types[{2 * index}] {shown(word)} is not supported for {config.family}"
                raise config.error(problem, "layer_types", 2 * index)
        types = words[::2]
    else:
        default = [SLIDING if (index + 1) % 4 else FULL for index in range(count)]
        types = list(parts.layer_types(config, default, (FULL, SLIDING)))
    before, after = (_layers(config, key, blocks) for key in ("n_input_layers", "n_output_layers"))
    looped = len(types) - before - after
    if config.value("n_recurrent_layers") is not None:
        looped = _layers(config, "n_recurrent_layers", blocks)
    if looped < 0 or before + looped + after != len(types):
        parted = f"n_input_layers {before}, n_recurrent_layers {max(looped, 0)} and n_output_layers {after}"
        raise config.error(f"{parted} do not make {len(types)} layers of attention and MLP", "num_hidden_layers")
    return types, (before, looped, after)


def _layers(config: Config, key: str, blocks: int) -> int:
    """Return a number of layers that the file states in blocks."""
    stated = config.integer(key, low=0, high=MAX_CONFIG_LAYERS)
    if stated % blocks:
        raise config.error(f"{key} {stated} parts an attention from its MLP: layer_types has both as layers", key)
    return stated // blocks


def _without_cache(layer: Layer) -> Layer:
    """Return a layer that makes keys and values and keeps none, and looks up those of another run."""
    assert isinstance(layer.mixer, Attention)
    return replace(layer, mixer=replace(layer.mixer, uncached=True))


FAMILIES: dict[str, Family] = {
    "dory": Family(dory, inert=frozenset({"ngpt_alpha_init"})),
    "ouro": Family(ouro, like="qwen2", inert=frozenset({"early_exit_threshold", "early_exit_step"})),
    "hrm_text": Family(hrm_text, inert=frozenset({"L_bp_cycles"})),
}
"""Reader by model_type."""
