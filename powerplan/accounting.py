"""Sums over a model: parameters, weight and state FLOPs, state, decode bytes. Parts equal the total, exactly.

One convention for every number (docs/accounting.md): matmul FLOPs, 2 per multiply-add, forward, per token, averaged
over a sequence of t tokens from an empty state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from powerplan.errors import InputError
from powerplan.mixers.base import Convention, Rational, Term, total
from powerplan.spec import LayerUse, ModelSpec
from powerplan.units import MAX_CONTEXT, context_of

DTYPE_BYTES = {
    "fp32": Fraction(4),
    "bf16": Fraction(2),
    "fp16": Fraction(2),
    "fp8": Fraction(1),
    "int4": Fraction(1, 2),
}
"""Bytes per element of weights and of the key/value cache. Recurrent state is fp32 whatever is chosen."""


@dataclass(frozen=True)
class Parameters:
    """A count in three conventions, since publishers differ.

    with_embeddings: all, a tied matrix once. without_input_embedding: less the look-up table and the position table,
    unless the table is the LM head too. without_embeddings: less the LM head as well.
    """

    with_embeddings: int
    without_input_embedding: int
    without_embeddings: int


@dataclass(frozen=True)
class Component:
    """One summand of a model's FLOPs: all terms of one name in one kind of layer (or in the model, layers None)."""

    name: str
    use: LayerUse | None
    weight_flops: int
    state_flops: Fraction

    def merged(self, other: Component) -> Component:
        return Component(self.name, None, self.weight_flops + other.weight_flops, self.state_flops + other.state_flops)


@dataclass(frozen=True)
class Row:
    """The answer at one context. FLOPs per token; state per sequence; bytes moved to decode one token at batch 1."""

    context: int
    weight_flops: int
    state_flops: Fraction
    state_elements: int
    state_bytes: Fraction
    decode_weight_bytes: Fraction
    decode_state_bytes: Fraction

    @property
    def flops(self) -> Fraction:
        """Forward FLOPs per token, weights and state."""
        return self.weight_flops + self.state_flops

    @property
    def wsfr(self) -> Fraction | None:
        """Weight-state FLOP ratio; None for a model without state."""
        return Fraction(self.weight_flops) / self.state_flops if self.state_flops else None


class Accounting:
    """All counts of one model under one convention."""

    def __init__(self, spec: ModelSpec, convention: Convention | None = None) -> None:
        self.spec = spec
        self.convention = convention or Convention()
        self.uses = spec.layer_uses()

    @cached_property
    def total_parameters(self) -> Parameters:
        """Every parameter that is stored, all experts included."""
        return self._parameters(idle=True)

    @cached_property
    def active_parameters(self) -> Parameters:
        """The parameters that one token touches: experts that are not chosen are left out."""
        return self._parameters(idle=False)

    def _parameters(self, idle: bool) -> Parameters:
        spec = self.spec
        body = _integer(total((*spec.embedding_norm_terms(), *spec.final_norm_terms())))
        for use in self.uses:
            per_layer = total(spec.norm_terms())
            for block in (use.layer.mixer, use.layer.ffn):
                if block is not None:
                    per_layer += total(block.matmul_terms(spec.hidden_size))
                    per_layer += total(block.other_terms(spec.hidden_size))
                    per_layer += total(block.idle_terms(spec.hidden_size)) if idle else 0
            body += _integer(per_layer) * use.count
        table = _integer(total(spec.embedding_terms()))
        positions = _integer(total(spec.position_terms()))
        head = _integer(total(spec.head_terms()))
        return Parameters(
            with_embeddings=body + positions + table + (0 if spec.tie_embeddings else head),
            without_input_embedding=body + head,
            without_embeddings=body,
        )

    @cached_property
    def weight_flops(self) -> int:
        """Weight FLOPs per token: 2 for every matmul parameter that the token touches."""
        return sum(component.weight_flops for component in self._weight_components())

    def state_flops(self, context: int) -> Fraction:
        """State FLOPs per token, averaged over a sequence of `context` tokens."""
        return sum((component.state_flops for component in self._state_components(context)), Fraction(0))

    def wsfr(self, context: int) -> Fraction | None:
        """Weight-state FLOP ratio at `context`; None for a model without state."""
        state = self.state_flops(context)
        return Fraction(self.weight_flops) / state if state else None

    def components(self, context: int) -> list[Component]:
        """Return the summands by name, over all layers, weights first."""
        merged: dict[str, Component] = {}
        for component in (*self._weight_components(), *self._state_components(context)):
            known = merged.get(component.name)
            merged[component.name] = known.merged(component) if known else component
        return list(merged.values())

    def layers(self, context: int) -> list[Component]:
        """Return one summand for each kind of layer, and one for the LM head; `use` says which layers."""
        parts: dict[LayerUse | None, Component] = {}
        for component in (*self._weight_components(), *self._state_components(context)):
            name = component.use.layer.describe() if component.use else component.name
            known = parts.get(component.use)
            weight, state = component.weight_flops, component.state_flops
            if known:
                weight, state = known.weight_flops + weight, known.state_flops + state
            parts[component.use] = Component(name, component.use, weight, state)
        return list(parts.values())

    def _weight_components(self) -> list[Component]:
        hidden = self.spec.hidden_size
        found = []
        for use in self.uses:
            for block in (use.layer.mixer, use.layer.ffn):
                for item in block.matmul_terms(hidden) if block is not None else ():
                    found.append(Component(item.component, use, 2 * _integer(item.value) * use.count, Fraction(0)))
        if self.convention.lm_head:
            for item in self.spec.head_terms():
                found.append(Component(item.component, None, 2 * _integer(item.value), Fraction(0)))
        return found

    def _state_components(self, context: int) -> list[Component]:
        found = []
        for use in self.uses:
            if use.layer.mixer is not None:
                for item in use.layer.mixer.state_flops_terms(context, self.convention):
                    found.append(Component(item.component, use, 0, Fraction(item.value) * use.count))
        return found

    def row(self, context: int | str, dtype: str = "bf16") -> Row:
        """Return the model's numbers at one context.

        Args:
            context: 1 to 2^50 tokens, as 131072 or "128k".
            dtype: the number format of weights and key/value cache: fp32, bf16, fp16, fp8 or int4.

        Returns:
            FLOPs per token, elements and bytes of the state per sequence, and bytes per decoded token at batch 1.

        Raises:
            InputError: the context is none or out of range, or the dtype is unknown.

        Example:
            >>> from powerplan.load import catalogue_spec
            >>> row = Accounting(catalogue_spec("gpt2-small")).row("64k")
            >>> row.context, float(row.wsfr)
            (65536, 0.204526964305231)
        """
        if dtype not in DTYPE_BYTES:
            raise InputError(f"dtype must be {', '.join(DTYPE_BYTES)}, and is {dtype!r}")
        context = context_of(context)
        width = DTYPE_BYTES[dtype]
        mixers = self.spec.mixer_counts()
        return Row(
            context=context,
            weight_flops=self.weight_flops,
            state_flops=self.state_flops(context),
            state_elements=sum(mixer.state_size(context).elements * count for mixer, count in mixers),
            state_bytes=sum((mixer.state_bytes(context, width) * count for mixer, count in mixers), Fraction(0)),
            decode_weight_bytes=self.active_parameters.without_input_embedding * width,
            decode_state_bytes=sum(
                (mixer.decode_bytes(context, width) * count for mixer, count in mixers), Fraction(0)
            ),
        )

    @cached_property
    def grows_with_context(self) -> bool:
        """Whether state FLOPs never fall as the context grows.

        They can in chunked forms, after a full chunk, and with mixers that are not `steady`.
        """
        mixers = self.spec.mixers()
        if self.convention.form == "recurrent":
            return all(mixer.steady for mixer in mixers)
        return not any(mixer.chunked_differs for mixer in mixers)

    def balanced_context(self, target: Fraction = Fraction(1)) -> int | None:
        """Return the longest context, in tokens, at which weight FLOPs are `target` times the state FLOPs or more.

        Exact search over integers. None where there is none: the state is too heavy at one token already, or never
        catches up with the weights; and None unless `grows_with_context`.
        """
        if not self.grows_with_context:
            return None
        if target not in self._balanced:
            limit = self.weight_flops / target
            self._balanced[target] = last_within(lambda context: self.state_flops(context) <= limit, MAX_CONTEXT)
        return self._balanced[target]

    @cached_property
    def _balanced(self) -> dict[Fraction, int | None]:
        return {}


def last_within(holds: Callable[[int], bool], highest: int) -> int | None:
    """Return the largest of 1..highest - 1 for which `holds`, which is true up to some number and false beyond.

    None where it is false at 1 already, or true at `highest` still.
    """
    if not holds(1) or holds(highest):
        return None
    low, high = 1, highest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class Explained:
    """One line of an explanation: a quantity of a component, per layer, and how many layers have it."""

    scope: str
    quantity: str
    term: Term
    count: int
    factor: int
    source: str

    @property
    def value(self) -> Rational:
        return self.factor * self.term.value


def explain(spec: ModelSpec, context: int, convention: Convention) -> list[Explained]:
    """Return every formula with the numbers put in: parameters, weight FLOPs, state and state FLOPs, by layer kind."""
    lines: list[Explained] = []
    for use in spec.layer_uses():
        scope = f"{positions_text(use.positions)}: {use.layer.describe()}"
        for block in (use.layer.mixer, use.layer.ffn):
            if block is None:
                continue
            groups: list[tuple[str, int, Sequence[Term]]] = [
                ("weight FLOPs per token", 2, block.matmul_terms(spec.hidden_size)),
                ("parameters outside matmuls", 1, block.other_terms(spec.hidden_size)),
                ("parameters not touched", 1, block.idle_terms(spec.hidden_size)),
            ]
            if block is use.layer.mixer:
                groups.append(("state elements", 1, use.layer.mixer.state_terms(context)))
                groups.append(("state FLOPs per token", 1, use.layer.mixer.state_flops_terms(context, convention)))
            for quantity, factor, terms in groups:
                lines.extend(Explained(scope, quantity, item, use.count, factor, block.source) for item in terms)
        lines.extend(
            Explained(scope, "parameters outside matmuls", item, use.count, 1, "") for item in spec.norm_terms()
        )
    outside = (
        *spec.embedding_terms(),
        *spec.position_terms(),
        *spec.embedding_norm_terms(),
        *spec.final_norm_terms(),
    )
    model: list[tuple[str, int, Sequence[Term]]] = [("parameters outside matmuls", 1, outside)]
    if convention.lm_head:
        model.append(("weight FLOPs per token", 2, spec.head_terms()))
    for quantity, factor, terms in model:
        lines.extend(Explained("model", quantity, item, 1, factor, "") for item in terms)
    return lines


def positions_text(spans: tuple[range, ...]) -> str:
    """Return layer positions (from 0) in words: "layer 3", "layers 0-11", "layers 0, 2, ... 40 (21)"."""
    positions = sorted(position for span in spans for position in span)
    runs: list[list[int]] = []
    for position in positions:
        if runs and position == runs[-1][-1] + 1:
            runs[-1][-1:] = [position] if len(runs[-1]) == 2 else [runs[-1][-1], position]
        else:
            runs.append([position])
    pieces = ["-".join(map(str, run)) for run in runs]
    if len(pieces) == 1:
        return f"layers {pieces[0]}" if len(positions) > 1 else f"layer {pieces[0]}"
    if len(pieces) > 4:
        pieces[2:-1] = ["..."]
    return f"layers {', '.join(pieces).replace('..., ', '... ')} ({len(positions)})"


def _integer(value: Rational) -> int:
    assert Fraction(value).denominator == 1, f"a parameter count is not whole: {value}"
    return int(value)
