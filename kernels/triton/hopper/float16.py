"""fp16 calls at p = 2: the kernels of this folder over operands that are scaled by powers of two.

phi, weights, states and their gradients are operands of products, in the inputs' dtype. bf16 has the range for them,
fp16 has not: powers of scores, their sums over a sequence and the quotients of the backward pass leave 2^-24 to 2^16.
Scaling loses nothing but what then underflows, and the kernels know nothing of it. With A for each query, and kappa, nu
and gamma for each sequence and key/value head,

    q' = A q, k' = kappa k, v' = nu v, S' = kappa^2 nu S, Z' = kappa^2 Z

a weight is (A kappa)^2 times as large, and the output nu times; without a normaliser (A kappa)^2 nu times. Backward the
kernels get gamma times the gradient of the output, so that dq' = gamma nu / A dq, dk' = gamma nu / kappa dk, dv' =
gamma dv, and the gradient of a gate is gamma nu times as large.

Scales are held as exponents, in float32. They follow from the largest values of a sequence, by operators of torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from powerplan.kernels.call import LOWEST_LOG_GATE, SMALLEST_NORM, Gradients, Inputs, Outputs
from powerplan.kernels.triton import run
from powerplan.kernels.triton.shapes import LaunchShape

QUERY = 7
"""Forward, a query is at most 2^7 times as long as 1, or as 1 / the longest key, so that weights are below 2^14.

A weight that is 2^-28 times as large is still a normal number of fp16.
"""

KEY = 5
"""Keys are shorter than 2^5.

Where one key of a sequence is 2^8 times as long as the rest, these have lengths of 2^-3, and phi of them, 2^-6 over K,
is still of normal numbers up to K = 128 or so. Queries are as much shorter, and phi of them is 2^4 over K.
"""

SUM = 14
"""Sums of phi(k) v^T and of k k^T over a sequence stay below 2^14."""

EDGE = 13
"""So do the gradients of sums, and the values of initial states and of the gradients of final ones, below 2^13."""

NORM = 6
"""Backward, a query whose sum of weights is 2^6 or more is scaled down until it is from 2^6 to 2^8.

Its weights are then about 2^6 times its share of each key, and the gradient of its weighted sum 2^-6 times that of its
output: for late tokens, whose sums may be 2^16 times those of early ones, as for these.
"""

GRADIENT = 10
"""The gradient of a weighted sum has a length below 2^10, and that of a score is at most 2^5 times as large."""

NARROW = 4
"""Where sums of weights are below 1, scores are, and the gradient of the weighted sum may be 2^4 times as long."""

PLAIN_SCORE = 4
"""Backward without a normaliser, scores are below 2^4, and queries shorter than 2."""

LEAST = 2.0**-25
"""Lengths of vectors of fp16 are larger, or 0."""

NEXT_TO_NOTHING = 2.0**-120
"""The same for other values: what bounds a scale by 2^120 does not bound it."""


class Sequences:
    """The sequences of a call: which tokens belong to each.

    Attributes:
        index: [T], the sequence of each token; None where each row of the batch is one.
        within: [T], how many tokens of its sequence come before each token.
    """

    def __init__(self, inputs: Inputs) -> None:
        self.count, tokens, bounds = inputs.sequences, inputs.k.shape[1], inputs.cu_seqlens
        self.positions = self.within = torch.arange(tokens, device=inputs.k.device)
        self.index = None
        if bounds is not None:
            bounds = bounds.long()
            self.index = torch.searchsorted(bounds[1:].contiguous(), self.positions, right=True)
            self.within = self.positions - bounds[self.index]

    def greatest(self, x: Tensor) -> Tensor:
        """Return the greatest of x [B, T, G], from 0 on, for each sequence, [N, G]."""
        if self.index is None:
            return x.amax(1)
        index = self.index[:, None].expand(x.shape[1:])
        return x.new_zeros(self.count, x.shape[2]).scatter_reduce(0, index, x[0], "amax")

    def total(self, x: Tensor) -> Tensor:
        """Return the sum of x [B, T, G], from 0 to 1, for each sequence, [N, G]: of integers, in whatever order."""
        parts = (x * 2.0**31).long()
        if self.index is None:
            sums = parts.sum(1)
        else:
            sums = parts.new_zeros(self.count, x.shape[2]).index_add(0, self.index, parts[0])
        return sums.float() * 2.0**-31

    def each(self, x: Tensor) -> Tensor:
        """[N, heads] -> what every token has of it, [B, 1 or T, heads]."""
        return x[:, None] if self.index is None else x[self.index][None]

    def decays(self, log_g: Tensor, chunk_size: int) -> Tensor:
        """Return the decay from the start of its chunk to each token, [B, T, G], for gates [B, T, G]."""
        parts = (log_g.float().nan_to_num(0.0).clamp(min=LOWEST_LOG_GATE) * 2.0**20).long()
        sums = torch.nn.functional.pad(parts.cumsum(1), (0, 0, 1, 0))
        starts = self.positions - self.within % chunk_size
        return ((sums[:, 1:] - sums[:, starts]).float() * 2.0**-20).exp()


def exponent(x: Tensor, least: float = NEXT_TO_NOTHING) -> Tensor:
    """Return the smallest integer e with x < 2^e. Less than `least`, NaN and infinity count as `least`."""
    return torch.frexp(x.nan_to_num(0.0, 0.0, 0.0).clamp(min=least))[1].float()


def times(x: Tensor, exponents: Tensor) -> Tensor:
    """Return x 2^exponents, in float32."""
    return x * torch.exp2(exponents)


def length(x: Tensor) -> Tensor:
    """Return the lengths of the last dim's vectors, in float32; 0 for those that are not finite.

    An infinite key has no say in how the others are scaled.
    """
    lengths: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32)
    return lengths.nan_to_num(0.0, 0.0, 0.0)


class Scales:
    """The scales of keys and values.

    Attributes:
        all: [N, G, 3] float32, as `Outputs.scales` has them.
        keys: [N, G], kappa is 2^-keys.
        values: [N, G], nu is 2^-values.
        longest: [N, G], from 0 to KEY: scaled keys are shorter than 2^longest.
    """

    def __init__(self, scales: Tensor) -> None:
        self.all = scales
        self.keys, self.values, self.longest = scales.unbind(-1)

    @staticmethod
    def of(inputs: Inputs, initial_state: Tensor | None, normalize: bool, sequences: Sequences) -> Scales:
        """Return scales under which values have lengths of at most 1, keys of at most 2^KEY, and states stay in range.

        Keys are as long as the sum of their squares allows: beside one long key the others do not vanish.
        """
        lengths = length(inputs.k)
        longest = exponent(sequences.greatest(lengths), LEAST)
        squares = exponent(sequences.total(times(lengths, -sequences.each(longest)).square()))
        keys = longest + ((squares - SUM) / 2).ceil().clamp(min=-KEY)
        values = exponent(sequences.greatest(length(inputs.v)), LEAST)
        if initial_state is not None:
            kv, key = _largest(initial_state, normalize)
            if key is not None:
                keys = torch.maximum(keys, ((key - EDGE) / 2).ceil())
            values = torch.maximum(values, kv - 2 * keys - EDGE)
        return Scales(torch.stack((keys, values, (longest - keys).clamp(min=0)), -1))

    def scaled(self, state: Tensor, normalize: bool) -> Tensor:
        """Return S' and Z' for states S and Z, [N, G, D, W]."""
        return times_states(state, -2 * self.keys - self.values, -2 * self.keys, normalize)


def _largest(state: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Return the exponents of the largest values of states [N, G, D, W], and of those of their normaliser, [N, G]."""
    columns = exponent(state.abs().amax(2))
    if not normalize:
        return columns.amax(-1), None
    return columns[..., :-1].amax(-1), columns[..., -1]


def times_states(state: Tensor, kv: Tensor, key: Tensor, normalize: bool) -> Tensor:
    """Return states [N, G, D, W] times 2^kv, and their normaliser, the last column, times 2^key, [N, G] each."""
    exponents = kv[..., None]
    if normalize:
        exponents = torch.cat((exponents.expand(*kv.shape, state.shape[3] - 1), key[..., None]), -1)
    return times(state, exponents[:, :, None])


def _query_sizes(scales: Scales, shape: LaunchShape, sequences: Sequences) -> Tensor:
    """Return the exponents of the lengths that queries have at most forward, [B, 1 or T, H]."""
    return QUERY - _of_heads(sequences.each(scales.longest), shape)


def _query_exponents(q: Tensor, sizes: Tensor) -> Tensor:
    """Return the exponents of A, [B, T, H], with which queries are shorter than 2^sizes, and half as long at least."""
    return sizes - exponent(length(q), LEAST)


def _scaled_inputs(inputs: Inputs, queries: Tensor | None, scales: Scales, sequences: Sequences) -> Inputs:
    """Return q', k' and v', and gates in float32; queries: the exponents of A, or None where q is not read."""
    q, k, v, log_g, _ = inputs
    return inputs._replace(
        q=q if queries is None else times(q, queries[..., None]).to(q.dtype),
        k=times(k, -sequences.each(scales.keys)[..., None]).to(k.dtype),
        v=times(v, -sequences.each(scales.values)[..., None]).to(v.dtype),
        log_g=log_g.float() if log_g is not None and log_g.itemsize < 4 else log_g,
    )


def _of_heads(x: Tensor, shape: LaunchShape) -> Tensor:
    """[..., G] -> [..., H]: what each query head has of its key/value head."""
    repeats = shape.call.heads_per_kv_head
    return x if repeats == 1 else x.repeat_interleave(repeats, -1)


def _of_groups(x: Tensor, shape: LaunchShape) -> Tensor:
    """[B, T, H] -> [B, T, G, R]."""
    return x.view(*x.shape[:2], shape.call.kv_heads, shape.call.heads_per_kv_head)


def forward(inputs: Inputs, initial_state: Tensor | None, shape: LaunchShape, return_state: bool) -> Outputs:
    """Do what `run.forward` does. norm and the saved states stay scaled."""
    call, sequences = shape.call, Sequences(inputs)
    scales = Scales.of(inputs, initial_state, call.normalize, sequences)
    queries = _query_exponents(inputs.q, _query_sizes(scales, shape, sequences))
    start = None if initial_state is None else scales.scaled(initial_state, call.normalize)
    made = run.forward(_scaled_inputs(inputs, queries, scales, sequences), start, shape.scaled_shape, return_state)
    gained = -_of_heads(sequences.each(scales.values), shape)
    if not call.normalize:
        gained = gained + _weight_exponents(queries, scales, shape, sequences)
    end = made.final_state
    if end is not None:
        end = times_states(end, 2 * scales.keys + scales.values, 2 * scales.keys, call.normalize)
    out = times(made.out, -gained[..., None]).to(inputs.v.dtype)
    return made._replace(out=out, final_state=end, scales=scales.all)


def _weight_exponents(queries: Tensor, scales: Scales, shape: LaunchShape, sequences: Sequences) -> Tensor:
    """Return the exponents of what weights gain, [B, T, H]; queries: those of A."""
    return 2 * (queries - _of_heads(sequences.each(scales.keys), shape) + shape.scale_exponent)


def backward(
    grad_out: Tensor,
    grad_state: Tensor | None,
    inputs: Inputs,
    outputs: Outputs,
    shape: LaunchShape,
    has_initial_state: bool,
) -> Gradients:
    """Do what `run.backward` does."""
    assert outputs.scales is not None, "the forward pass of these kernels returns its scales"
    normalize, sequences, scales = shape.call.normalize, Sequences(inputs), Scales(outputs.scales)
    sizes, norm, lengths = _query_sizes(scales, shape, sequences), outputs.norm, length(grad_out)
    out = times(outputs.out, -_of_heads(sequences.each(scales.values), shape)[..., None])
    if normalize:
        # Each query anew, by its sum of weights. What divides a gradient here, divides it in the kernels.
        less = ((exponent(norm.abs()) - NORM - 1) / 2).floor().clamp(min=0)
        sizes, norm = sizes - less, times(norm, -2 * less)
        sums = norm.abs()  # Those of an initial state may be negative.
        lengths = (lengths / sums).masked_fill(sums < SMALLEST_NORM, 0.0)
        if has_initial_state:  # Its values may be longer than 1. The gradient of norm is as much longer as the output.
            lengths = lengths * length(out).clamp(min=1.0)
        queries, gained = _query_exponents(inputs.q, sizes), torch.zeros_like(lengths)
    else:
        sizes = (sizes - QUERY + PLAIN_SCORE).clamp(max=1)
        queries = _query_exponents(inputs.q, sizes)
        gained = -_weight_exponents(queries, scales, shape, sequences)
        lengths = times(lengths, gained)
    terms = times(lengths, 2 * sizes)
    if normalize:
        # A score is no larger than the root of its query's sum, and its gradient is as much smaller.
        lengths = lengths * (sums.sqrt() * 2.0**-NARROW).clamp(2.0**-NARROW, 1.0)
    if inputs.log_g is not None:
        # Where gates close, a sum of weights may be one small weight. Its gradient is large, and adds to no sum.
        terms = terms * _of_heads(sequences.decays(inputs.log_g, shape.call.chunk_size), shape)
    if not has_initial_state:  # The queries of the first chunk are in no sum.
        terms = terms * (sequences.within >= shape.call.chunk_size)[None, :, None]
    gamma = _gradient_exponents(lengths, terms, grad_state, shape, scales, sequences)
    grad = times(grad_out, (gained + _of_heads(sequences.each(gamma), shape))[..., None])
    final = outputs.final_state
    scaled = outputs._replace(
        out=out,
        norm=norm,
        final_state=None if final is None else scales.scaled(final, normalize),
    )
    made = run.backward(
        grad if normalize else grad.to(grad_out.dtype),  # A quotient is taken before it is rounded.
        None if grad_state is None else _scaled_grad_state(grad_state, gamma, scales, normalize),
        _scaled_inputs(inputs, queries, scales, sequences),
        scaled,
        shape.scaled_shape,
        has_initial_state,
    )
    back = scales.values - gamma  # 1 / (gamma nu)
    log_g, start = made.log_g, made.initial_state
    if log_g is not None and inputs.log_g is not None:
        log_g = times(log_g, sequences.each(back)).to(inputs.log_g.dtype)
    if start is not None:
        start = times_states(start, -gamma - 2 * scales.keys, back - 2 * scales.keys, normalize)
    dq = times(made.q, (queries + _of_heads(sequences.each(back), shape))[..., None]).to(inputs.q.dtype)
    return Gradients(dq, *_grad_keys(made.k, made.v, gamma, inputs, scales, sequences), log_g, start)


def _gradient_exponents(
    lengths: Tensor,
    terms: Tensor,
    grad_state: Tensor | None,
    shape: LaunchShape,
    scales: Scales,
    sequences: Sequences,
) -> Tensor:
    """Return the exponents of gamma, [N, G]: the largest with which gradients and their sums are in range.

    Args:
        lengths: [B, T, H], those of the gradients of weighted sums, without gamma.
        terms: [B, T, H], those of what is summed over a sequence: phi(q) y^T, decayed.
        grad_state: [N, G, D, W], the gradient of the final state; None where there is none.
        shape: Shape and settings of the call.
        scales: Those of keys and values.
        sequences: Those of the call.
    """
    found = GRADIENT - exponent(sequences.greatest(_of_groups(lengths.nan_to_num(0.0, 0.0, 0.0), shape).amax(3)))
    terms = _of_groups(terms.nan_to_num(0.0, 0.0, 0.0), shape).sum(3)
    largest = exponent(sequences.greatest(terms))
    total = exponent(sequences.total(times(terms, -sequences.each(largest))))
    found = torch.minimum(found, EDGE - largest - total.clamp(min=0))
    if grad_state is not None:
        kv, key = _largest(grad_state, shape.call.normalize)
        found = torch.minimum(found, EDGE - 2 * scales.keys - kv)
        if key is not None:
            found = torch.minimum(found, EDGE - 2 * scales.keys + scales.values - key)
    return found.clamp(-100, 100)


def _scaled_grad_state(grad_state: Tensor, gamma: Tensor, scales: Scales, normalize: bool) -> Tensor:
    """Return the gradients of S' and Z' for those of S and Z, [N, G, D, W]."""
    of_kv = gamma + 2 * scales.keys
    return times_states(grad_state, of_kv, of_kv - scales.values, normalize)


def _grad_keys(
    dk: Tensor, dv: Tensor, gamma: Tensor, inputs: Inputs, scales: Scales, sequences: Sequences
) -> tuple[Tensor, Tensor]:
    """Return dk and dv for dk' and dv'."""
    of_keys = scales.values - gamma - scales.keys
    return (
        times(dk, sequences.each(of_keys)[..., None]).to(inputs.k.dtype),
        times(dv, -sequences.each(gamma)[..., None]).to(inputs.v.dtype),
    )


def state(inputs: Inputs, shape: LaunchShape) -> Tensor:
    """Do what `run.state` does."""
    normalize, sequences = shape.call.normalize, Sequences(inputs)
    scales = Scales.of(inputs, None, normalize, sequences)
    made = run.state(_scaled_inputs(inputs, None, scales, sequences), shape.scaled_shape)
    return times_states(made, 2 * scales.keys + scales.values, 2 * scales.keys, normalize)


def state_backward(grad_state: Tensor, inputs: Inputs, shape: LaunchShape) -> tuple[Tensor, Tensor, Tensor | None]:
    """Do what `run.state_backward` does."""
    normalize, sequences = shape.call.normalize, Sequences(inputs)
    scales = Scales.of(inputs, None, normalize, sequences)
    no_queries = inputs.k.new_zeros(inputs.k.shape[:3], dtype=torch.float32)
    gamma = _gradient_exponents(no_queries, no_queries, grad_state, shape, scales, sequences)
    given = _scaled_inputs(inputs, None, scales, sequences)
    end = _scaled_grad_state(grad_state, gamma, scales, normalize)
    dk, dv, shares = run.state_backward(end, given, shape.scaled_shape)
    if shares is not None:
        shares = times(shares, sequences.each(scales.values - gamma))
    return *_grad_keys(dk, dv, gamma, inputs, scales, sequences), shares
