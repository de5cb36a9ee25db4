"""The models that are compared. They differ in the mixer of their layers, and in how many steps they are trained.

powerplan computes all sizes, states and FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from icl.settings import TaskSettings
from powerplan import Accounting, ModelSpec, Row
from powerplan.ffn import MLP
from powerplan.mixers import Attention
from powerplan.search import Request, recommend
from powerplan.spec import LayerGroup, Norm
from powerplan.swap import with_mixer
from powerplan.swap.windows import same_state_window
from powerplan.training import Budget, budget_of

MIXERS = ("softmax", "window", "linear", "power", "mix")
"""The mixers that --mixers takes."""

POWER = "power:p=2,gated=true"
"""Power attention as `powerplan --mixer` takes it."""

LINEAR = "linear:gated=true"
"""Linear attention as `powerplan --mixer` takes it."""


@dataclass(frozen=True)
class Variant:
    """One of the models at one context.

    Attributes:
        mixer: Its mixer, one of MIXERS.
        spec: The model.
        budget: The training FLOPs that it may use.
        step_tokens: Tokens of one training step.
    """

    mixer: str
    spec: ModelSpec
    budget: Budget
    step_tokens: int

    @property
    def row(self) -> Row:
        return self.budget.row

    @property
    def steps(self) -> int:
        """Training steps that use up the budget, the last one rounded up."""
        return self.budget.steps(self.step_tokens)

    @property
    def tokens(self) -> int:
        return self.steps * self.step_tokens

    @property
    def parameters(self) -> int:
        return Accounting(self.spec).total_parameters.with_embeddings


def body(settings: TaskSettings, vocabulary: int, name: str) -> ModelSpec:
    """Return the model with softmax attention: RoPE, RMSNorm, SwiGLU, tied embeddings."""
    layer = LayerGroup(
        repeat=settings.layers,
        mixer=Attention(heads=settings.heads, head_dim=settings.head_dim, bias="qkv"),
        ffn=MLP(intermediate_size=settings.intermediate_size, gated=True),
    )
    return ModelSpec(
        name=name,
        vocab_size=vocabulary,
        hidden_size=settings.hidden_size,
        tie_embeddings=True,
        norm=Norm(kind="rmsnorm", per_layer=2),
        layers=(layer,),
    )


def spec_of(base: ModelSpec, mixer: str, context: int) -> ModelSpec:
    """Return `base` with another mixer in its layers.

    The window has the length at which its keys and values take as much state as power attention of degree 2. The mix is
    the mix of softmax and power layers that `powerplan recommend` ranks first for this context.
    """
    power = with_mixer(base, POWER)[0]
    if mixer == "mix":
        answer = recommend(power, Request(contexts=[context], only=("mix", "attention", "power"), top=100))
        return next(candidate.spec for candidate in answer.candidates if candidate.plan.is_mix)
    if mixer == "window":
        window = same_state_window(power)
        assert window is not None
        return with_mixer(base, f"window:{window}")[0]
    return {"softmax": base, "power": power, "linear": with_mixer(base, LINEAR)[0]}[mixer]


def variants(
    settings: TaskSettings, mixers: Sequence[str], vocabulary: int, name: str, match: str
) -> tuple[Variant, ...]:
    """Return the models of a task.

    Args:
        settings: Settings of the task.
        mixers: Some of MIXERS.
        vocabulary: Number of token ids.
        name: Name of the specs.
        match: "flops" gives every mixer the same training FLOPs: `settings.flops`, or what softmax attention uses in
            `settings.steps` steps. "tokens" gives every mixer `settings.steps` steps.
    """
    base, context = body(settings, vocabulary, name), settings.context
    step_tokens = settings.batch * context
    tokens = settings.steps * step_tokens
    flops = Fraction(settings.flops or budget_of(Accounting(base), context, tokens=tokens).total_flops)
    models = []
    for mixer in mixers:
        accounting = Accounting(spec_of(base, mixer, context))
        if match == "flops":
            budget = budget_of(accounting, context, flops=flops)
        else:
            budget = budget_of(accounting, context, tokens=tokens)
        models.append(Variant(mixer, accounting.spec, budget, step_tokens))
    return tuple(models)
