"""The counts of a model: parameters, weight and state FLOPs, state, bytes per decoded token. Parts sum to the total.

One convention for every number (docs/accounting.md): matmul FLOPs, 2 per multiply-add, forward, per token, averaged
over a sequence of t tokens from an empty state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import chain
from math import lcm
from typing import SupportsIndex

from powerplan.dtypes import Dtypes, dtypes_of
from powerplan.ffn import multiplied_terms
from powerplan.longest import last_at_most, last_at_most_in_periods
from powerplan.mixers.block import Block
from powerplan.mixers.formulas import Convention, Rational, Term, convention_of, exact_integer, total
from powerplan.quantization import PartName, WeightFormats
from powerplan.spec import LayerUse, ModelSpec, check_spec
from powerplan.units import MAX_CONTEXT, context_of


@dataclass(frozen=True)
class Parameters:
    """A number of parameters in the three conventions that publishers follow."""

    with_embeddings: int
    """All parameters; a matrix that is both input embedding and LM head counts once."""
    without_input_embedding: int
    """Without the input embedding, unless it is the LM head too, and without learned positions."""
    without_embeddings: int
    """Without the LM head as well."""


@dataclass(frozen=True)
class Component:
    """The FLOPs per token of one component, such as "attention", in one kind of layer.

    use: the layers of that kind; None where the FLOPs are those of the whole model.
    """

    name: str
    use: LayerUse | None
    weight_flops_per_token: int
    state_flops_per_token: Fraction

    @classmethod
    def sum_of(cls, name: str, use: LayerUse | None, parts: Sequence[Component]) -> Component:
        weight = sum(part.weight_flops_per_token for part in parts)
        return cls(name, use, weight, sum((part.state_flops_per_token for part in parts), Fraction(0)))


@dataclass(frozen=True)
class Row:
    """The numbers of a model at one context."""

    context: int
    """Tokens of the sequence."""
    weight_flops_per_token: int
    """Forward matmul FLOPs per token between activations and weights."""
    state_flops_per_token: Fraction
    """Forward matmul FLOPs per token between activations and state, averaged over the sequence."""
    state_elements: int
    """Elements of one sequence's state at the end of the context: key/value cache and recurrent state."""
    state_bytes: Fraction
    """Bytes of that state, in the dtypes of the cache and of the recurrent state."""
    decode_weight_bytes_per_token: Fraction
    """Bytes of weights that are read to decode one token at batch 1, as the dtypes and the quantization store them."""
    decode_state_bytes_per_token: Fraction
    """Bytes of state that are read and written to decode one token at batch 1."""

    @property
    def flops_per_token(self) -> Fraction:
        """Forward FLOPs per token, weights and state."""
        return self.weight_flops_per_token + self.state_flops_per_token

    @property
    def wsfr(self) -> Fraction | None:
        """The weight-state FLOP ratio, weight FLOPs over state FLOPs; None for a model without state."""
        state = self.state_flops_per_token
        return Fraction(self.weight_flops_per_token) / state if state else None


class Accounting:
    """All counts of one model under one convention.

    Args:
        spec: the model.
        convention: what is counted; Convention() where None.
    """

    def __init__(self, spec: ModelSpec, convention: Convention | None = None) -> None:
        check_spec(spec)
        self.spec = spec
        self.convention = convention_of(convention)
        self.uses = spec.layer_uses()
        self._balanced: dict[Fraction, int | None] = {}
        self._beyond: dict[tuple[Dtypes, bool], Fraction] = {}

    def __repr__(self) -> str:
        return f"<Accounting of {self.spec.name}, {self.convention}>"

    @cached_property
    def total_parameters(self) -> Parameters:
        """All parameters that are stored, those of every expert included."""
        return self._parameters(idle=True)

    @cached_property
    def active_parameters(self) -> Parameters:
        """The parameters that one token touches: experts that are not chosen are left out."""
        return self._parameters(idle=False)

    @cached_property
    def parameters_read(self) -> int:
        """The parameters that decoding one token at batch 1 reads: tied layers read theirs again, and a look-up little.

        The input embedding and learned positions are left out, the LM head is not.
        """
        return self._parameters(idle=False, again=True).without_input_embedding

    def _parameters(self, idle: bool, again: bool = False) -> Parameters:
        """Return the parameters, with those of experts that are `idle`, and with tied layers counted `again`."""
        spec = self.spec
        body = exact_integer(total((*spec.embedding_norm_terms(), *spec.final_norm_terms())))
        own = [extra for extra in spec.extras if not extra.lookup]
        body += exact_integer(total(_stored_terms(own, spec.hidden_size, idle)))
        for use in self.uses:
            if use.layer.tied and not again:
                continue
            terms = (*spec.norm_terms(use.layer), *_stored_terms(use.layer.blocks, spec.hidden_size, idle))
            body += exact_integer(total(terms)) * use.count
        head = exact_integer(total(spec.head_terms()))
        lookups = [extra for extra in spec.extras if extra.lookup]
        rows = _stored_terms(lookups, spec.hidden_size, idle)
        tables = exact_integer(total((*spec.embedding_terms(), *spec.position_terms(), *rows)))
        return Parameters(
            with_embeddings=body + tables + (0 if spec.tie_embeddings else head),
            without_input_embedding=body + head,
            without_embeddings=body,
        )

    @cached_property
    def weight_flops_per_token(self) -> int:
        """The weight FLOPs per token: 2 for every matmul parameter that the token touches."""
        return sum(component.weight_flops_per_token for component in self._weight_components())

    def state_flops_per_token(self, context: SupportsIndex | str) -> Fraction:
        """Return the state FLOPs per token, averaged over a sequence of `context` tokens, as 131072 or "128k"."""
        tokens, mixers = context_of(context), self.spec.mixer_counts()
        flops = (Fraction(total(mixer.state_flops_terms(tokens, self.convention))) * count for mixer, count in mixers)
        return sum(flops, Fraction(0))

    def wsfr(self, context: SupportsIndex | str) -> Fraction | None:
        """Return the weight-state FLOP ratio at `context`, in tokens; None for a model without state."""
        state = self.state_flops_per_token(context)
        return Fraction(self.weight_flops_per_token) / state if state else None

    def components(self, context: SupportsIndex | str) -> list[Component]:
        """Return the FLOPs of each component by its name, summed over all layers, weights first."""
        parts: dict[str, list[Component]] = {}
        for part in (*self._weight_components(), *self._state_components(context)):
            parts.setdefault(part.name, []).append(part)
        return [own[0] if len(own) == 1 else Component.sum_of(name, None, own) for name, own in parts.items()]

    def layers(self, context: SupportsIndex | str) -> list[Component]:
        """Return the FLOPs of each kind of layer, and those of the LM head; `use` says which layers are of a kind."""
        parts: dict[LayerUse | str, list[Component]] = {}
        for part in (*self._weight_components(), *self._state_components(context)):
            parts.setdefault(part.use or part.name, []).append(part)
        return [
            Component.sum_of(use, None, own)
            if isinstance(use, str)
            else Component.sum_of(use.layer.describe(), use, own)
            for use, own in parts.items()
        ]

    def _weight_components(self) -> list[Component]:
        parts = [
            Component(term.component, use, 2 * exact_integer(term.value) * use.count, Fraction(0))
            for use in self.uses
            for block in use.layer.blocks
            for term in multiplied_terms(block, self.spec.hidden_size)
        ]
        whole = [term for extra in self.spec.extras for term in extra.matmul_terms(self.spec.hidden_size)]
        whole += self.spec.head_terms() if self.convention.lm_head else ()
        return parts + [Component(term.component, None, 2 * exact_integer(term.value), Fraction(0)) for term in whole]

    def _state_components(self, context: SupportsIndex | str) -> list[Component]:
        tokens = context_of(context)
        return [
            Component(term.component, use, 0, Fraction(term.value) * use.count)
            for use in self.uses
            if use.layer.mixer is not None
            for term in use.layer.mixer.state_flops_terms(tokens, self.convention)
        ]

    def row(self, context: SupportsIndex | str, dtypes: Dtypes | str = "bf16") -> Row:
        """Return the model's numbers at one context.

        Args:
            context: 1 to 2^50 tokens, as 131072 or "128k".
            dtypes: the number formats of weights, key/value cache and recurrent state; or one word, fp32, bf16, fp16,
                fp8 or int4, for weights and cache beside recurrent state in fp32.

        Returns:
            FLOPs per token, elements and bytes of the state per sequence, and bytes per decoded token at batch 1.

        Raises:
            InputError: the context is none or out of range, or a dtype is unknown.

        Examples:
            >>> from powerplan.load import catalogue_spec
            >>> row = Accounting(catalogue_spec("gpt2-small")).row("64k")
            >>> row.context, float(row.wsfr)
            (65536, 0.20452695932577525)
        """
        dtypes, context = dtypes_of(dtypes), context_of(context)
        cache, state = dtypes.cache_bytes, dtypes.state_bytes
        mixers = self.spec.mixer_counts()
        return Row(
            context=context,
            weight_flops_per_token=self.weight_flops_per_token,
            state_flops_per_token=self.state_flops_per_token(context),
            state_elements=sum(mixer.state_size(context).elements * count for mixer, count in mixers),
            state_bytes=sum((mixer.state_bytes(context, cache, state) * count for mixer, count in mixers), Fraction(0)),
            decode_weight_bytes_per_token=self.read_bytes(dtypes),
            decode_state_bytes_per_token=sum(
                (mixer.decode_bytes(context, cache, state) * count for mixer, count in mixers), Fraction(0)
            ),
        )

    def stored_bytes(self, dtypes: Dtypes) -> Fraction:
        """Return the bytes of all weights, all experts among them; those of tied layers once."""
        wide = self.total_parameters.with_embeddings * dtypes.weight_bytes
        return wide + self._bytes_beyond(dtypes, stored=True)

    def read_bytes(self, dtypes: Dtypes) -> Fraction:
        """Return the bytes of weights that are read to decode one token: no input embedding, no idle experts.

        Tied layers read theirs again.
        """
        return self.parameters_read * dtypes.weight_bytes + self._bytes_beyond(dtypes, stored=False)

    def idle_bytes(self, use: LayerUse, dtypes: Dtypes) -> Fraction:
        """Return the bytes of the experts, values or rows in layers of one kind that a token does not choose."""
        ffn = use.layer.ffn
        if ffn is None:
            return Fraction(0)
        wide = total(ffn.idle_terms(self.spec.hidden_size)) * use.count * dtypes.weight_bytes
        every, read = (self._block_beyond(ffn, chain(*use.positions), dtypes, idle) for idle in (True, False))
        return wide + every - read

    def block_bytes(self, block: Block, dtypes: Dtypes) -> Fraction:
        """Return the bytes of a block's weights in one layer: their mean over layers, where rules tell layers apart."""
        hidden, quantization = self.spec.hidden_size, self.spec.quantization
        alike = quantization is None or all(rule.in_layers is None for rule in quantization.rules)
        layers = range(1 if alike else self.spec.layer_count)
        wide = total(_stored_terms([block], hidden, idle=True)) * dtypes.weight_bytes
        return wide + self._block_beyond(block, layers, dtypes, idle=True) / len(layers)

    @cached_property
    def _formats(self) -> WeightFormats | None:
        quantization = self.spec.quantization
        return None if quantization is None else WeightFormats(quantization)

    def _bytes_beyond(self, dtypes: Dtypes, stored: bool) -> Fraction:
        """Return the bytes that quantized weights have beyond those of `dtypes`, mostly below 0.

        stored: of all weights, those of tied layers once; else of those that decoding one token reads.
        """
        if (dtypes, stored) not in self._beyond:
            uses = [use for use in self.uses if not (stored and use.layer.tied)]
            blocks = [(block, use) for use in uses for block in use.layer.blocks]
            beyond = (self._block_beyond(block, chain(*use.positions), dtypes, stored) for block, use in blocks)
            self._beyond[dtypes, stored] = sum(beyond, self.tables_beyond(dtypes, stored))
        return self._beyond[dtypes, stored]

    def tables_beyond(self, dtypes: Dtypes, stored: bool) -> Fraction:
        """Return the same for the LM head, and for the input embedding where it is `stored` or is the LM head."""
        spec, wide = self.spec, 8 * dtypes.weight_bytes
        if self._formats is None or dtypes.weights_dtype is not None:
            return Fraction(0)
        tables: list[PartName] = ["embedding"] if stored or spec.tie_embeddings else []
        tables += [] if spec.tie_embeddings else ["lm_head"]
        sizes = spec.vocab_size, spec.hidden_size
        return sum((self._formats.table_bits_beyond(table, *sizes, wide) for table in tables), Fraction(0)) / 8

    def _block_beyond(self, block: Block, layers: Iterable[int], dtypes: Dtypes, idle: bool) -> Fraction:
        if self._formats is None or dtypes.weights_dtype is not None:
            return Fraction(0)
        return self._formats.bits_beyond(block, self.spec.hidden_size, 8 * dtypes.weight_bytes, layers, idle) / 8

    @cached_property
    def grows_with_context(self) -> bool:
        """Whether state FLOPs per token never fall as the context grows: they can in chunks, and if not `steady`."""
        return self.longest_is_found and all(mixer.steady for mixer in self.spec.mixers())

    @cached_property
    def longest_is_found(self) -> bool:
        """Whether `longest_context` finds anything: FLOPs `grow_with_context`, or fall only after chunks of keys."""
        chunked = self.convention.form == "chunked"
        return all(
            (mixer.steady or mixer.restarts_after is not None) and not (chunked and mixer.chunked_differs)
            for mixer in self.spec.mixers()
        )

    def longest_context(self, limit: Rational) -> int | None:
        """Return the longest context, in tokens, whose state FLOPs per token are at most `limit`.

        At all longer contexts, up to 2^50 tokens, they are more. Shorter ones may have more too, where attention is in
        chunks: just after the end of a chunk the mean falls. The search is exact, over integers. The result is None
        where the state takes more at any context or at most the limit at 2^50 tokens, and unless `longest_is_found`.
        """
        if not self.longest_is_found:
            return None
        if self.grows_with_context:
            return last_at_most(limit, self.state_flops_per_token, MAX_CONTEXT)
        period = lcm(*(mixer.restarts_after or 1 for mixer in self.spec.mixers()))
        return last_at_most_in_periods(limit, self._least_state_flops, period, MAX_CONTEXT)

    def _least_state_flops(self, first: int, last: int) -> Fraction:
        """Return a number that the state FLOPs per token are not below from `first` to `last`; theirs if these are one.

        It is the sum of the least that each mixer has: not all have it at the same context.
        """
        convention, mixers = self.convention, self.spec.mixer_counts()
        flops = (total(mixer.least_state_flops_terms(first, last, convention)) * count for mixer, count in mixers)
        return Fraction(sum(flops))

    def balanced_context(self, target: Fraction = Fraction(1)) -> int | None:
        """Return the longest context, in tokens, at which weight FLOPs are `target` times the state FLOPs or more.

        It is the `longest_context` whose state FLOPs are at most that. The result is None where no context balances, as
        the state is too heavy at any or never catches up with the weights, and None unless `longest_is_found`.
        """
        if target not in self._balanced:
            self._balanced[target] = self.longest_context(self.weight_flops_per_token / target)
        return self._balanced[target]


def _stored_terms(blocks: Sequence[Block], hidden: int, idle: bool) -> Iterator[Term]:
    for block in blocks:
        yield from (*block.matmul_terms(hidden), *block.other_terms(hidden))
        yield from block.idle_terms(hidden) if idle else ()


def positions_text(spans: Iterable[Iterable[int]]) -> str:
    """Return the positions of layers (from 0) in words: "layer 3", "layers 0-11", "layers 0, 2, ... 40 (21)"."""
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
