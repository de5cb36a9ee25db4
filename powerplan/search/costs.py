"""What a choice costs per layer, in whole numbers, so that a plan is a sum and no model is built for a candidate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial
from operator import mul

import msgspec

from powerplan.accounting import Accounting
from powerplan.dtypes import Dtypes
from powerplan.ffn import multiplied_terms
from powerplan.mixers import Convention, Mixer
from powerplan.mixers.block import Block
from powerplan.mixers.formulas import Rational, exact_integer, integer_if_whole, total
from powerplan.search.choices import Choice, Scope, staying


class Cost(msgspec.Struct, frozen=True):
    """The cost of one layer's mixer, of several layers, or of a whole model. Costs add up, exactly.

    weight_flops_per_token: weight FLOPs per token.
    parameters: stored parameters. weight_bits: the bits that they are stored in.
    state_elements: elements of the state of one sequence, at the longest context.
    state_half_bytes, decode_half_bytes: bytes of that state, and state bytes moved to decode one token at batch 1, in
        halves of a byte, since int4 has half a byte per element.
    scaled_state_flops: for each context t, 2t times the state FLOPs per token. Means over causal keys are whole then.
    """

    weight_flops_per_token: int
    parameters: int
    weight_bits: Rational
    state_elements: int
    state_half_bytes: int
    decode_half_bytes: int
    scaled_state_flops: tuple[int, ...]

    def plus(self, other: Cost, count: int = 1) -> Cost:
        """Return this cost and `count` times the other one, which is taken away where `count` is negative."""
        flops = zip(self.scaled_state_flops, other.scaled_state_flops, strict=True)
        return Cost(
            self.weight_flops_per_token + count * other.weight_flops_per_token,
            self.parameters + count * other.parameters,
            self.weight_bits + count * other.weight_bits,
            self.state_elements + count * other.state_elements,
            self.state_half_bytes + count * other.state_half_bytes,
            self.decode_half_bytes + count * other.decode_half_bytes,
            tuple([one + count * more for one, more in flops]),
        )

    @property
    def weight_bytes(self) -> Fraction:
        """Bytes of all stored weights."""
        return Fraction(self.weight_bits, 8)

    @property
    def state_bytes(self) -> Fraction:
        """Bytes of the state of one sequence at the longest context."""
        return Fraction(self.state_half_bytes, 2)

    @property
    def decode_bytes(self) -> Fraction:
        """State bytes moved to decode one token at the end of the longest context, batch 1."""
        return Fraction(self.decode_half_bytes, 2)


@dataclass(frozen=True)
class CostBasis:
    """Under what costs are counted: contexts (rising, in tokens), convention, dtypes."""

    contexts: tuple[int, ...]
    convention: Convention
    dtypes: Dtypes

    @property
    def longest(self) -> int:
        """The longest context, which limits, windows and state refer to."""
        return self.contexts[-1]

    def scaled_flops(self, cost: Cost) -> int:
        """Return 2t times the forward FLOPs per token, weights and state, at the longest context t."""
        return 2 * self.longest * cost.weight_flops_per_token + cost.scaled_state_flops[-1]

    def flops_per_token(self, cost: Cost) -> Fraction:
        """Return the forward FLOPs per token at the longest context, weights and state."""
        return Fraction(self.scaled_flops(cost), 2 * self.longest)

    def wsfr(self, cost: Cost, index: int = -1) -> Fraction | None:
        """Return the weight-state FLOP ratio at one of the contexts; None without state."""
        state = cost.scaled_state_flops[index]
        return Fraction(2 * self.contexts[index] * cost.weight_flops_per_token, state) if state else None

    def of_block(self, block: Block, accounting: Accounting) -> Cost:
        """Return the cost of one layer's mixer or FFN in this model."""
        hidden = accounting.spec.hidden_size
        matmul = int(total(block.matmul_terms(hidden)))
        outside = total((*block.other_terms(hidden), *block.idle_terms(hidden)))
        weights, parameters = 2 * int(total(multiplied_terms(block, hidden))), matmul + int(outside)
        bits = integer_if_whole(8 * accounting.block_bytes(block, self.dtypes))
        if not isinstance(block, Mixer):
            return Cost(weights, parameters, bits, 0, 0, 0, (0,) * len(self.contexts))
        widths, size = (self.dtypes.cache_bytes, self.dtypes.state_bytes), block.state_size(self.longest)
        flops = [2 * t * total(block.state_flops_terms(t, self.convention)) for t in self.contexts]
        return Cost(
            weight_flops_per_token=weights,
            parameters=parameters,
            weight_bits=bits,
            state_elements=size.elements,
            state_half_bytes=exact_integer(2 * size.bytes(*widths)),
            decode_half_bytes=exact_integer(2 * size.decode_bytes(*widths)),
            scaled_state_flops=tuple(map(exact_integer, flops)),
        )

    def scaled_block_flops(self, block: Block, hidden: int) -> int:
        """Return `scaled_flops` of the cost of one layer's mixer or FFN, without the rest of its cost."""
        flops = 2 * total(multiplied_terms(block, hidden))
        if isinstance(block, Mixer):
            flops += total(block.state_flops_terms(self.longest, self.convention))
        return exact_integer(2 * self.longest * flops)

    def of_frame(self, accounting: Accounting, norms: int) -> Cost:
        """Return the cost of what a model has besides its blocks: embeddings, extras, LM head, and norms.

        norms: how many norms its layers have in all.
        """
        spec = accounting.spec
        head = int(total(spec.head_terms()))
        outside = (
            *spec.embedding_norm_terms(),
            *spec.final_norm_terms(),
            *spec.embedding_terms(),
            *spec.position_terms(),
        )
        parameters = int(total(outside)) + norms * spec.norm.vectors * spec.hidden_size
        parameters += 0 if spec.tie_embeddings else head
        matmul = int(total(term for extra in spec.extras for term in extra.matmul_terms(spec.hidden_size)))
        parameters += matmul + int(total(term for extra in spec.extras for term in extra.other_terms(spec.hidden_size)))
        weights = 2 * (matmul + (head if self.convention.lm_head else 0))
        stored = parameters * self.dtypes.weight_bytes + accounting.tables_beyond(self.dtypes, stored=True)
        return Cost(weights, parameters, integer_if_whole(8 * stored), 0, 0, 0, (0,) * len(self.contexts))

    def of_model(self, accounting: Accounting) -> Cost:
        """Return the cost of a whole model."""
        rows = [accounting.row(context, self.dtypes) for context in self.contexts]
        last = rows[-1]
        return Cost(
            weight_flops_per_token=last.weight_flops_per_token,
            parameters=accounting.total_parameters.with_embeddings,
            weight_bits=integer_if_whole(8 * accounting.stored_bytes(self.dtypes)),
            state_elements=last.state_elements,
            state_half_bytes=exact_integer(2 * last.state_bytes),
            decode_half_bytes=exact_integer(2 * last.decode_state_bytes_per_token),
            scaled_state_flops=tuple(exact_integer(2 * row.context * row.state_flops_per_token) for row in rows),
        )


class ScopeCosts:
    """The costs of plans over one scope of a model. rest: that of the model without the mixers of the scope."""

    def __init__(self, accounting: Accounting, scope: Scope, basis: CostBasis) -> None:
        self.scope, self.basis = scope, basis
        # The cost of a mixer in one layer.
        self.of: Callable[[Mixer], Cost] = cache(partial(basis.of_block, accounting=accounting))
        self._columns = cache(self._columns_of)
        self.rest = basis.of_model(accounting).plus(self.layers(staying(scope.distinct), scope.counts), -1)

    def uniform(self, choice: Choice) -> Cost:
        """Return the cost of the model with `choice` in every layer of the scope."""
        return self.layers(choice, self.scope.counts).plus(self.rest)

    def layers(self, choice: Choice, counts: Iterable[int]) -> Cost:
        """Return the cost of `counts` layers of each of the mixers of a choice."""
        return self._columns(choice).times(tuple(counts))

    def _columns_of(self, choice: Choice) -> Columns:
        return Columns([self.of(mixer) for mixer in choice.mixers])


class Columns:
    """Costs by field, so that a sum of 500 of them, each some times, is a few sums of whole numbers."""

    def __init__(self, costs: Sequence[Cost]) -> None:
        self._weights = tuple(cost.weight_flops_per_token for cost in costs)
        self._parameters = tuple(cost.parameters for cost in costs)
        self._bits = tuple(cost.weight_bits for cost in costs)
        self._elements = tuple(cost.state_elements for cost in costs)
        self._state = tuple(cost.state_half_bytes for cost in costs)
        self._decode = tuple(cost.decode_half_bytes for cost in costs)
        self._flops = list(zip(*(cost.scaled_state_flops for cost in costs), strict=True))

    def times(self, counts: Sequence[int]) -> Cost:
        """Return the sum of the costs, each as often as `counts` says."""
        return Cost(
            weight_flops_per_token=sum(map(mul, self._weights, counts)),
            parameters=sum(map(mul, self._parameters, counts)),
            weight_bits=sum(map(mul, self._bits, counts)),
            state_elements=sum(map(mul, self._elements, counts)),
            state_half_bytes=sum(map(mul, self._state, counts)),
            decode_half_bytes=sum(map(mul, self._decode, counts)),
            scaled_state_flops=tuple([sum(map(mul, column, counts)) for column in self._flops]),
        )
