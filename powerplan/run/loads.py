"""What each layer of a model asks of the devices that train it: parameters, FLOPs, memory, and what it sends.

Numbers are of one layer and one token, before anything is split over devices.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from powerplan.accounting import Accounting
from powerplan.ffn import multiplied_terms
from powerplan.lengths import Lengths
from powerplan.lengths.flops import mean_state_flops
from powerplan.lengths.packing import filled_share
from powerplan.mixers.base import RECURRENT_BYTES, HeadShape, Mixer
from powerplan.mixers.formulas import Convention, total
from powerplan.mixers.state_size import StateSize
from powerplan.run.recipe import Recipe
from powerplan.run.saved import ends_bytes, loss_bytes, saved_layer
from powerplan.spec import LayerUse, ModelSpec

KEPT_PRECISE = frozenset({"router", "routers", "short convolutions"})
"""Components of weights whose products stay in bf16 with fp8 matmuls: DeepSeek-V3 keeps the gating of its experts
(arXiv 2412.19437, section 3.3.1), and convolutions are no matrix products."""


@dataclass(frozen=True)
class LayerLoad:
    """What one layer asks for.

    use: the layer and its positions.
    parameters: all but those of routed experts and those on the host; none where the layer is tied. expert_parameters:
    all routed experts. matrix_parameters: those of them that are in matrices, which Muon keeps one moment of.
    weight_flops, state_flops: forward FLOPs per token, as `Row` counts them.
    linear_flops: those of weight_flops that fp8 matmuls take: all but routers and short convolutions.
    expert_flops: those of weight_flops in routed experts.
    kept_bytes: bytes per token that stay from the forward to the backward pass, under the recipe.
    peak_bytes: bytes per token that exist beside what other layers keep, at most, while this layer's backward pass
    runs: what it computes again, and gradients of activations.
    entry_bytes: keys and values of a token, which ring attention passes on, also where an earlier layer made them; 0
    for recurrent state.
    gate_bytes: those of them that are gates of query heads, in fp32.
    window: keys that a query meets at most; None without a window.
    state_bytes: recurrent state of one sequence, which is passed on once, with what a part of the sequence multiplies
    it by (the matrices of delta rules, the decays of heads or channels); 0 where there is none.
    recent_bytes: the last inputs of short convolutions and token shifts of one sequence; 0 where there are none.
    kv_heads: heads that tensor parallelism can split keys, values or a state among, as every device of a group needs
    those of its queries: 1 for latents; None for a state of as many heads as there are, or channels.
    heads: the heads of this layer's attention, or of attention in the place of its state; None where it has no such.
    latent: whether keys and values of all heads are expanded from what a token keeps.
    again_flops: forward FLOPs per token to compute the state that a part of a sequence leaves behind, by itself.
    dispatched_bytes: what a token sends to its experts, one way.
    """

    use: LayerUse
    parameters: int
    expert_parameters: int
    matrix_parameters: int
    weight_flops: int
    linear_flops: int
    expert_flops: int
    state_flops: Fraction
    kept_bytes: Fraction
    peak_bytes: Fraction
    entry_bytes: Fraction
    gate_bytes: Fraction
    window: int | None
    state_bytes: Fraction
    recent_bytes: Fraction
    kv_heads: int | None
    heads: HeadShape | None
    latent: bool
    again_flops: Fraction
    dispatched_bytes: Fraction

    @property
    def parts(self) -> int:
        """Mixer and FFN, or the one of them that the layer has."""
        return sum(block is not None for block in (self.use.layer.mixer, self.use.layer.ffn))


@dataclass(frozen=True)
class ModelLoad:
    """What a model asks for at one context: its layers by kind, and what stands before and after them.

    embedding_parameters: input embedding, learned positions and the norm after them. head_parameters: LM head and final
    norm. tied: whether both share one matrix, which `head_parameters` then leaves out.
    ends_bytes, loss_bytes: those of saved.py, as floats.
    """

    spec: ModelSpec
    context: int
    recipe: Recipe
    layers: tuple[LayerLoad, ...]
    embedding_parameters: int
    head_parameters: int
    head_flops: int
    ends_bytes: tuple[float, float]
    loss_bytes: tuple[float, float]

    @property
    def tied(self) -> bool:
        return self.spec.tie_embeddings

    @property
    def parameters(self) -> int:
        """All parameters of the model but those on the host."""
        layers = sum((load.parameters + load.expert_parameters) * load.use.count for load in self.layers)
        return layers + self.embedding_parameters + self.head_parameters

    @property
    def layer_flops_per_token(self) -> Fraction:
        """Forward FLOPs per token of all layers, without the LM head."""
        layers = sum((load.weight_flops + load.state_flops) * load.use.count for load in self.layers)
        return Fraction(layers)


def model_load(accounting: Accounting, context: int, recipe: Recipe, lengths: Lengths | None = None) -> ModelLoad:
    """Return what a model asks for at `context` tokens a sequence under a recipe.

    lengths: documents that are packed whole into the sequences and attend to themselves alone; None for one document in
    each. Their state FLOPs are a mean over the tokens of sequences, padding included.
    """
    spec = accounting.spec
    whole = int(total([term for extra in spec.extras for term in extra.matmul_terms(spec.hidden_size)]))
    others = int(total([term for extra in spec.extras for term in extra.other_terms(spec.hidden_size)]))
    tables = int(total((*spec.embedding_terms(), *spec.position_terms(), *spec.embedding_norm_terms())))
    matrix = int(total(spec.head_terms()))
    head = int(total(spec.final_norm_terms())) + (0 if spec.tie_embeddings else matrix)
    return ModelLoad(
        spec=spec,
        context=context,
        recipe=recipe,
        layers=tuple(_layer_load(accounting, use, context, recipe, lengths) for use in accounting.uses),
        embedding_parameters=tables + whole + others,
        head_parameters=head,
        head_flops=2 * (matrix if accounting.convention.lm_head else 0) + 2 * whole,
        ends_bytes=_floats(ends_bytes(spec, recipe)),
        loss_bytes=_floats(loss_bytes(spec, recipe)),
    )


def _floats(pair: tuple[Fraction, Fraction]) -> tuple[float, float]:
    return float(pair[0]), float(pair[1])


def _entry(mixer: Mixer, context: int) -> int:
    """Return the elements of keys and values of a token, whether this layer keeps them or an earlier one does."""
    made = mixer.terms((("keys and values", mixer.entry),), **mixer.state_values(context)) if mixer.entry else ()
    return max(mixer.state_size(context).entry, int(total(made)))


def has_keys(mixer: Mixer, context: int) -> bool:
    """Whether a layer attends to keys and values, and has no recurrent state in their place."""
    return _entry(mixer, context) > 0


def _passed_state_bytes(mixer: Mixer, size: StateSize, context: int) -> Fraction:
    """Return the bytes that a device passes on of a recurrent state: the state and its transition, in fp32.

    Every device merges the states of those before it. What its own part of the sequence multiplies a state by is passed
    beside it: the decays of heads in powerplan.kernels (ContextParallel.exchanged_bytes), the matrices of a delta rule
    in flash-linear-attention (ops/cp/README.md).
    """
    transition = total(mixer.terms((("transition", mixer.transition),), **mixer.state_values(context)))
    return Fraction((size.recurrent + transition) * RECURRENT_BYTES)


def _attention_heads(mixer: Mixer) -> HeadShape | None:
    """Return the heads of attention, of latents those they are expanded to, or those that attention would have with the
    projections of a state; None where queries pick their keys."""
    if mixer.looked_up or (own := mixer.own_heads()) is not None:
        return None if mixer.looked_up else own
    plain = mixer.plain_heads("attention")
    if plain is None:
        return None
    heads, head_dim, v_head_dim = (plain.fields[name] for name in ("heads", "head_dim", "v_head_dim"))
    return HeadShape(heads, heads, head_dim, v_head_dim)


def state_flops(mixer: Mixer, context: int, convention: Convention, lengths: Lengths | None) -> Fraction:
    """Return the state FLOPs of a layer per token of a sequence: of one document or of those packed into it."""
    if lengths is None:
        return Fraction(total(mixer.state_flops_terms(context, convention)))
    pieces = lengths.cut(context)
    return mean_state_flops(mixer, pieces, convention) * filled_share(pieces, context)


def _layer_load(
    accounting: Accounting, use: LayerUse, context: int, recipe: Recipe, lengths: Lengths | None
) -> LayerLoad:
    spec, layer = accounting.spec, use.layer
    hidden, mixer, ffn = spec.hidden_size, layer.mixer, layer.ffn
    matmuls = [term for block in layer.blocks for term in block.matmul_terms(hidden)]
    others = [term for block in layer.blocks for term in block.other_terms(hidden)]
    idle = int(total(ffn.idle_terms(hidden))) if ffn is not None else 0
    active = int(total([term for term in matmuls if term.component == "active experts"]))
    used = int(total(matmuls))
    table = ffn is not None and ffn.is_table
    experts = 0 if table else active + idle
    host = int(total(ffn.host_terms(hidden))) if ffn is not None else 0
    multiplied = [term for block in layer.blocks for term in multiplied_terms(block, hidden)]
    size = mixer.state_size(context) if mixer is not None else None
    entry = _entry(mixer, context) if mixer is not None else 0
    heads = mixer.own_heads() if mixer is not None else None
    gates = int(total(mixer.terms((("gates", mixer.entry_gates),)))) if mixer is not None else 0
    state = Fraction(0)
    if mixer is not None and size is not None and not entry:
        state = _passed_state_bytes(mixer, size, context)
    flops = state_flops(mixer, context, accounting.convention, lengths) if mixer is not None else Fraction(0)
    # Tables and values are looked up: like the embedding they are no matrices to Muon.
    matrices = sum(int(term.value) for term in matmuls if term.component != "values") if table else used + idle
    own = used - active + (idle if table else 0) - host
    saved = saved_layer(spec, layer, context, recipe)
    return LayerLoad(
        use=use,
        parameters=0 if layer.tied else own + int(total(others)) + int(total(spec.norm_terms(layer))),
        expert_parameters=0 if layer.tied else experts,
        matrix_parameters=0 if layer.tied else matrices,
        weight_flops=2 * int(total(multiplied)),
        linear_flops=2 * int(total([term for term in multiplied if term.component not in KEPT_PRECISE])),
        expert_flops=0 if table else 2 * active,
        state_flops=flops,
        kept_bytes=saved.kept_bytes,
        peak_bytes=saved.peak_bytes,
        entry_bytes=(entry - gates) * recipe.activation_bytes + gates * Fraction(RECURRENT_BYTES),
        gate_bytes=gates * Fraction(RECURRENT_BYTES),
        window=mixer.window_size if mixer is not None else None,
        state_bytes=state,
        recent_bytes=(size.recent if size is not None else 0) * recipe.activation_bytes,
        kv_heads=heads.kv_heads if heads is not None else 1 if entry else None,
        heads=_attention_heads(mixer) if mixer is not None else None,
        latent=mixer is not None and mixer.latent_heads,
        again_flops=Fraction(total(mixer.terms((("state again", mixer.state_again),)))) if mixer else Fraction(0),
        dispatched_bytes=ffn.dispatched(hidden) * recipe.activation_bytes if ffn is not None else Fraction(0),
    )
