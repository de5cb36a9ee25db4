"""What training keeps of a layer's activations: bytes per token from the forward to the backward pass, and beside it.

Blocks say what they keep (powerplan/mixers/kept.py); norms, the residual stream and the loss are here. Numbers are of
one token of a sequence that is alone in its micro-batch: what torch keeps once per position, such as the cosines of
rotary positions, counts in full.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from powerplan.choices import Recompute
from powerplan.dtypes import DTYPE_BYTES
from powerplan.mixers.block import Block
from powerplan.run.recipe import Recipe
from powerplan.spec import Layer, ModelSpec

LOGIT_TENSORS = 3
"""fp32 tensors of the logits' size at the peak of the loss: the log-softmax, the gradient of the cross entropy, and
that of the logits. torch's tracker finds 12 bytes per token and entry of the vocabulary, for bf16 and fp32 models."""


@dataclass(frozen=True)
class SavedPart:
    """What a norm, a mixer or an FFN of a layer keeps, in bytes per token.

    name: "norm", or the kind of the block. components: bytes of each component, in the order of the formulas.
    again: the part of the sum that selective recomputation makes again. working: what its backward pass makes at most,
    less what it lets go before.
    """

    name: str
    components: tuple[tuple[str, Fraction], ...]
    again: Fraction
    working: Fraction
    is_estimate: bool

    @property
    def bytes(self) -> Fraction:
        """All that is kept without recomputation."""
        return _sum(size for _, size in self.components)


@dataclass(frozen=True)
class SavedLayer:
    """What a layer keeps, under a recipe.

    parts: norms, mixer and FFN in the order of the forward pass. width_bytes: bytes of a token on the residual stream.
    keeps_input: whether the first part keeps the layer's input itself, and not a copy of it in another format.
    """

    parts: tuple[SavedPart, ...]
    recompute: Recompute
    width_bytes: Fraction
    keeps_input: bool

    @property
    def kept_bytes(self) -> Fraction:
        """Bytes per token that stay from the forward to the backward pass.

        With recomputation "full" that is the layer's input alone. "selective" keeps everything but the outputs of
        norms, activation functions and gates, and rotations; matmuls and kernels do not run a second time.
        """
        if self.recompute == "full":
            return self.width_bytes
        return _sum(part.bytes - self._again(part) for part in self.parts)

    @property
    def peak_bytes(self) -> Fraction:
        """Bytes per token that exist at most while the layer works, beside what all layers keep.

        That is the gradient of the layer's output, what the part at work makes, and what was computed again for it.
        Parts behind it are through, and what they kept is gone.
        """
        worst, done = Fraction(0), Fraction(0)
        for part in reversed(self.parts):
            again = self._again(part)
            worst = max(worst, part.working + again - done)
            done += part.bytes - again
        whole = Fraction(0)
        if self.recompute == "full":
            whole = done - (self.width_bytes if self.keeps_input else 0)
        return self.width_bytes + worst + whole

    def _again(self, part: SavedPart) -> Fraction:
        return part.again if self.recompute == "selective" else Fraction(0)


def saved_layer(spec: ModelSpec, layer: Layer, context: int, recipe: Recipe) -> SavedLayer:
    """Return what a layer of a model keeps of each token of sequences of `context` tokens.

    A norm before each block comes first. Where there are more norms than blocks, the others stand behind the blocks.
    One norm before two blocks is read by both, which keep its output once.
    """
    blocks = [block for block in layer.blocks if block.matmul_formulas()[0][1]]
    norms = spec.norms_of(layer) if spec.norm.kind != "none" else 0
    before = min(norms, len(blocks))
    after = norms - before
    norm = _norm_part(spec, recipe)
    parts = []
    for index, block in enumerate(blocks):
        parts.extend([norm] * (index < before))
        parts.append(saved_block(block, spec, context, recipe, reads_input=index == 0 or before != 1))
        parts.extend([norm] * (index < after))
    parts.extend([norm] * (after - len(blocks)))
    copies = norms > 0 and spec.norm.kind == "rmsnorm" and recipe.kernels == "torch" and recipe.dtype != "fp32"
    return SavedLayer(tuple(parts), recipe.recompute, spec.hidden_size * recipe.activation_bytes, not copies)


def loss_bytes(spec: ModelSpec, recipe: Recipe) -> tuple[Fraction, Fraction]:
    """Return the bytes per token of logits and cross entropy: what stays for all tokens, and what exists at the peak.

    The peak is that of `Decoder.loss`, in the backward pass of the cross entropy: the forward pass takes two fp32
    tensors and the logits. With a vocabulary that is small for the width, the final norm's backward pass takes more.
    A chunked loss has it for the tokens of a chunk; it computes the gradient of the LM head's
    input at once, which stays.
    """
    peak = Fraction(LOGIT_TENSORS * spec.vocab_size * DTYPE_BYTES["fp32"])
    if spec.norm.final:
        # By then the input of the LM head, which counts as kept, is gone.
        peak = max(peak, _norm_part(spec, recipe).working - spec.hidden_size * recipe.activation_bytes)
    stays = spec.hidden_size * recipe.activation_bytes if recipe.loss == "chunked" else Fraction(0)
    return stays, peak


def ends_bytes(spec: ModelSpec, recipe: Recipe) -> tuple[Fraction, Fraction]:
    """Return the bytes per token that stay before the layers and behind them: embedding norm; final norm, LM head.

    The log-softmax, which stays from the loss's forward to its backward pass, is a part of `loss_bytes`.
    """
    norm = _norm_part(spec, recipe).bytes
    head = spec.hidden_size * recipe.activation_bytes
    return norm * spec.norm.embedding, norm * spec.norm.final + head


def _norm_part(spec: ModelSpec, recipe: Recipe) -> SavedPart:
    """Return a norm of the residual stream.

    Fused, it keeps its input and an fp32 number per token (a LayerNorm two), and makes gradients of its output and of
    its input. torch's RMSNorm is made of plain operators on a CPU: it keeps an fp32 copy of its input and the
    normalised input, and makes five fp32 tensors of the size, by when one of those two is gone.
    """
    if spec.norm.kind == "none":
        return SavedPart("norm", (), Fraction(0), Fraction(0), False)
    width, fp32 = spec.hidden_size, DTYPE_BYTES["fp32"]
    if recipe.kernels == "torch" and spec.norm.kind == "rmsnorm":
        size, working = (2 * width + 1) * fp32, 4 * width * fp32
    else:
        numbers = 2 if spec.norm.kind == "layernorm" else 1
        size = width * recipe.activation_bytes + numbers * fp32
        working = 2 * width * recipe.activation_bytes
    return SavedPart("norm", (("norms", size),), size, working, False)


def saved_block(block: Block, spec: ModelSpec, context: int, recipe: Recipe, reads_input: bool = True) -> SavedPart:
    """Return what a mixer, an FFN or an extra keeps. reads_input: whether it is the first to keep what it reads."""
    kernels = block.runs_on(recipe.kernels)
    kept = [part for part in block.saved_formulas(context, kernels) if reads_input or part.component != "input"]
    moments = block.working_formulas(context, kernels)
    symbols = {"m": spec.hidden_size, "t": context, "cast": int(recipe.dtype != "fp32")}
    formulas = [*kept, *(part for moment in moments for part in moment)]
    formats = {"activations": recipe.activation_bytes, "fp32": DTYPE_BYTES["fp32"], "bytes": Fraction(1)}
    terms = block.terms(
        tuple((part.component, part.formula) for part in formulas), **symbols, **block.saved_values(context, kernels)
    )
    sizes = iter([term.value * formats[part.format] for part, term in zip(formulas, terms, strict=True)])
    components: dict[str, Fraction] = {}
    again = Fraction(0)
    for part in kept:
        size = next(sizes)
        components[part.component] = components.get(part.component, 0) + size
        again += size * part.again
    working = max((_sum(next(sizes) for _ in moment) for moment in moments), default=Fraction(0))
    return SavedPart(block.kind, tuple(components.items()), again, working, block.saved_is_estimate(kernels))


def _sum(sizes: Iterable[Fraction]) -> Fraction:
    return sum(sizes, Fraction(0))
