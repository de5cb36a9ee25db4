"""The memory that a prompt takes while it is read, whole or in chunks."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from powerplan.accounting import Accounting
from powerplan.caches.policy import Policy, held
from powerplan.dtypes import DTYPE_BYTES, Dtypes
from powerplan.mixers.block import Block
from powerplan.run.recipe import Recipe
from powerplan.run.saved import saved_block
from powerplan.spec import ModelSpec


@dataclass(frozen=True)
class PrefillMemory:
    """What one prompt takes beside the weights at its peak, in bytes.

    chunk: tokens that are worked on at once. chunks: how many there are. state_bytes: cache and recurrent state when
    the last chunk is read, before anything is evicted. activation_bytes: what exists of the tokens at work.
    place: the kind of block in which that is most, "logits" where they are. is_estimate: whether neither a kernel's
    code nor a measurement stands behind the size of that block.
    """

    chunk: int
    chunks: int
    state_bytes: Fraction
    activation_bytes: Fraction
    place: str
    is_estimate: bool

    @property
    def bytes(self) -> Fraction:
        return self.state_bytes + self.activation_bytes


def prefill_memory(accounting: Accounting, context: int, dtypes: Dtypes, policy: Policy) -> PrefillMemory:
    """Return what a prompt of `context` tokens takes while it is read, on one device.

    With n = min(chunk, context) tokens at work, the activations are

        n hidden_size a + max(n largest block, 4 vocab_size)

    bytes: the residual stream in a bytes an element, and what the largest mixer or FFN makes of the n tokens, or the
    logits of the last token in fp32. What a block makes is what its forward pass writes: its input, everything that
    training would keep of it (docs/training-activations.md, fused kernels), and the state before each chunk. It is let
    go when the block is done.
    The cache is that of all tokens read so far: with a budget of b and chunks, min(context, b + n) at most.
    Not counted: MLA's latents of earlier chunks, which are expanded again a part at a time; the weights' share of
    experts that an engine gathers; what an allocator cannot use.
    """
    spec, tokens = accounting.spec, policy.prefill_tokens(context)
    recipe = Recipe(dtype=dtypes.activations)
    blocks = {block for use in accounting.uses for block in use.layer.blocks if block.matmul_formulas()[0][1]}
    sizes = [
        (tokens * _forward_bytes(block, spec, tokens, recipe), block.kind, block.saved_is_estimate(recipe.kernels))
        for block in blocks
    ]
    largest, place, is_estimate = max([*sizes, (spec.vocab_size * DTYPE_BYTES["fp32"], "logits", False)])
    kept = None if policy.budget is None else policy.budget + tokens
    state = sum(
        (
            mixer.state_bytes(held(mixer, context, kept), dtypes.cache_bytes, dtypes.state_bytes) * count
            for mixer, count in spec.mixer_counts()
        ),
        Fraction(0),
    )
    stream = tokens * spec.hidden_size * dtypes.activation_bytes
    return PrefillMemory(tokens, -(-context // tokens), state, stream + largest, place, is_estimate)


def _forward_bytes(block: Block, spec: ModelSpec, tokens: int, recipe: Recipe) -> Fraction:
    """Return the bytes per token that a block makes of `tokens` tokens at once.

    Kernels of recurrences write the state before every chunk, also where training does not keep it and computes it
    again (flash-linear-attention, ops/common/chunk_h.py; mamba_ssm, ops/triton/ssd_combined.py): in the format that
    the backward pass has it in.
    """
    saved = saved_block(block, spec, tokens, recipe)
    if not block.chunk_state or "states" in dict(saved.components):
        return saved.bytes
    moments = block.working_formulas(tokens, recipe.kernels)
    formats = {part.format for moment in moments for part in moment if part.component == "states"}
    width = DTYPE_BYTES["fp32"] if formats == {"fp32"} else recipe.activation_bytes
    (states,) = block.terms(
        (("states", f"({block.chunk_state})*states"),), **block.saved_values(tokens, recipe.kernels)
    )
    return saved.bytes + states.value * width
