"""What could stand in a layer instead of its mixer, at the same weights: head shapes, and `--mixer` texts for them."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import gcd

from powerplan.accounting import Accounting, last_within
from powerplan.dims import KERNEL_DEGREES
from powerplan.mixers import MLA, Attention, FeatureAttention, GroupedHeads, Mixer, Power
from powerplan.mixers.base import Convention, total
from powerplan.spec import ModelSpec
from powerplan.whatif import first_of, parse_mixer, swapped, with_mixer

AS_IS = "as it is"
"""The text that stands for no change where others are `--mixer` texts."""

HEAD_DIMS = (16, 32, 48, 64, 80, 96, 128, 192, 256)
"""Key head dims that a recommendation may take: multiples of 16, as matrix units want them."""


@dataclass(frozen=True)
class Shape:
    """Heads of a layer: H query heads that share G key/value heads, of k key and v value features each."""

    heads: int
    kv_heads: int
    head_dim: int
    v_head_dim: int

    def setting(self) -> str:
        """Return the shape as `--mixer` takes it."""
        return f"heads={self.heads},kv_heads={self.kv_heads},head_dim={self.head_dim},v_head_dim={self.v_head_dim}"

    def describe(self) -> str:
        dims = f"{self.head_dim}" if self.head_dim == self.v_head_dim else f"{self.head_dim}/{self.v_head_dim}"
        groups = "" if self.heads == self.kv_heads else f" ({self.kv_heads} kv)"
        return f"{self.heads}{groups} heads of {dims}"


def sequence_mixers(spec: ModelSpec) -> list[Mixer]:
    """Return the distinct mixers of a model, in order of first use."""
    return list(dict.fromkeys(use.layer.mixer for use in spec.layer_uses() if use.layer.mixer is not None))


def head_shape(mixer: Mixer, hidden: int) -> Shape | None:
    """Return the heads that another kind would have in place of `mixer`; None where it has nothing like heads.

    Ordinary heads stay. MLA's become grouped heads of its value head dim, 8 key/value heads or as many as divide, and
    as many query heads as bring the projections nearest to MLA's parameters, so that the weights stay.
    """
    if isinstance(mixer, GroupedHeads):
        return Shape(mixer.heads, mixer.kv_heads, mixer.head_dim, mixer.v_head_dim)
    if isinstance(mixer, MLA):
        dim = mixer.v_head_dim
        groups = gcd(mixer.heads, 8)
        # m(H + G)k + mGv + Hvm with k = v = dim is 2m dim (H + G).
        wanted = Fraction(total(mixer.matmul_terms(hidden)), 2 * hidden * dim) - groups
        return Shape(max(1, round(wanted / groups)) * groups, groups, dim, dim)
    return None


def common_shape(mixers: list[Mixer], hidden: int) -> Shape | None:
    """Return the heads of all `mixers` where they have the same, else None."""
    shapes = {head_shape(mixer, hidden) for mixer in mixers}
    return shapes.pop() if len(shapes) == 1 else None


def same_weights(shape: Shape) -> list[Shape]:
    """Return the other shapes of the same projections: H k, G k, H v and G v stay, and so does every parameter."""
    found = []
    for dim in HEAD_DIMS:
        factor = Fraction(shape.head_dim, dim)
        sizes = [shape.heads * factor, shape.kv_heads * factor, shape.v_head_dim / factor]
        if dim != shape.head_dim and all(size.denominator == 1 for size in sizes):
            heads, groups, values = (int(size) for size in sizes)
            found.append(Shape(heads, groups, dim, values))
    return found


def fewer_kv_heads(shape: Shape) -> list[Shape]:
    """Return the shapes whose query heads share 1/2, 1/4 ... as many key/value heads: less state, smaller weights."""
    found = []
    groups = shape.kv_heads
    while groups % 2 == 0:
        groups //= 2
        found.append(Shape(shape.heads, groups, shape.head_dim, shape.v_head_dim))
    return found


def mixer_text(kind: str, *settings: str) -> str:
    """Return a `--mixer` value: mixer_text("power", "p=2", "heads=6") is "power:p=2,heads=6"."""
    return f"{kind}:{','.join(settings)}" if settings else kind


def short(text: str, shaped: bool = True) -> str:
    """Return a `--mixer` text for a table: "window 4,096", "power p=2, 6 heads of 128" (heads only if `shaped`)."""
    kind, settings = parse_mixer(text)
    if kind == "attention":
        name = f"window {settings['window']:,}" if "window" in settings else "attention"
    else:
        name = kind + (f" p={settings['p']}" if "p" in settings else "")
    if "heads" not in settings or not shaped:
        return name
    shape = Shape(*(settings[key] for key in ("heads", "kv_heads", "head_dim", "v_head_dim")))
    return f"{name}, {shape.describe()}"


def window_text(window: int, shape: Shape | None = None) -> str:
    """Return the `--mixer` value of a window, in the model's own heads where no shape is given."""
    return f"window:{window}" if shape is None else mixer_text("attention", f"window={window}", shape.setting())


def power_text(p: int, shape: Shape | None = None, normalize: bool = True) -> str:
    """Return the `--mixer` value of power attention of degree p."""
    shaped = [shape.setting()] if shape else []
    return mixer_text("power", f"p={p}", *shaped, *([] if normalize else ["normalize=false"]))


def swappable(mixer: Mixer) -> bool:
    """Whether `--mixer` can put another kind in place of this mixer."""
    return isinstance(mixer, (GroupedHeads, MLA))


def can_swap(spec: ModelSpec) -> bool:
    """Whether a model has mixers, and `--mixer` can put another kind in place of all of them."""
    mixers = sequence_mixers(spec)
    return bool(mixers) and all(swappable(mixer) for mixer in mixers)


def default_shape(spec: ModelSpec) -> Shape | None:
    """Return the heads to name in a `--mixer` text that keeps the weights; None where the model's own do that.

    Only MLA needs it: its heads as they are would more than double the projections. Layers that stay have no say.
    """
    mixers = [mixer for mixer in sequence_mixers(spec) if swappable(mixer)]
    return common_shape(mixers, spec.hidden_size) if any(isinstance(mixer, MLA) for mixer in mixers) else None


def runs_here(mixer: Mixer) -> bool:
    """Whether powerplan.kernels has this mixer, where it is power attention; other kinds are not its business."""
    if not isinstance(mixer, Power):
        return True
    return mixer.p in KERNEL_DEGREES and not (mixer.p % 2 and mixer.normalize)


def grows(mixer: Mixer) -> bool:
    """Whether the state of a mixer grows with the context, without bound."""
    return mixer.state_size(2**40).elements > mixer.state_size(2**39).elements


def uniform_state_flops(spec: ModelSpec, text: str, context: int, convention: Convention) -> Fraction:
    """Return the state FLOPs per token with the mixer of `text` in every layer, without building the whole model."""
    kind, settings = parse_mixer(text)
    known = first_of(spec, kind)
    flops = Fraction(0)
    for use in spec.layer_uses():
        if use.layer.mixer is not None:
            mixer, _ = swapped(use.layer.mixer, kind, settings, spec.hidden_size, known)
            flops += total(mixer.state_flops_terms(context, convention)) * use.count
    return flops


def balanced_window(
    spec: ModelSpec, context: int, convention: Convention, target: Fraction = Fraction(1)
) -> int | None:
    """Return the longest window, in tokens, which in every layer leaves the weights `target` times the state FLOPs.

    Exact search over integers below `context`. None where one key is too many, or the whole context is light enough,
    or a mixer cannot be swapped.
    """
    if context < 2 or not can_swap(spec):
        return None
    shape = default_shape(spec)
    limit = Accounting(with_mixer(spec, window_text(1, shape))[0], convention).weight_flops / target
    return last_within(
        lambda window: uniform_state_flops(spec, window_text(window, shape), context, convention) <= limit, context
    )


def same_state_window(spec: ModelSpec) -> int | None:
    """Return the window, in tokens, whose keys and values have as many elements as the recurrent state of a model.

    As `powerplan dims` has it, without the normaliser's column; rounded down. None unless all layers are recurrent.
    """
    mixers = [(use.layer.mixer, use.count) for use in spec.layer_uses() if use.layer.mixer is not None]
    state = keys = 0
    for mixer, count in mixers:
        if not isinstance(mixer, FeatureAttention):
            return None
        columns = mixer.v_head_dim + int(mixer.has_normaliser)
        state += mixer.state_size(1).recurrent // columns * mixer.v_head_dim * count
        keys += mixer.kv_heads * (mixer.head_dim + mixer.v_head_dim) * count
    return state // keys if keys else None


def cache_context(spec: ModelSpec, elements: int) -> int | None:
    """Return the longest context whose state has at most `elements`; None where the state does not grow past them."""

    def fits(context: int) -> bool:
        mixers = ((use.layer.mixer, use.count) for use in spec.layer_uses() if use.layer.mixer is not None)
        return sum(mixer.state_size(context).elements * count for mixer, count in mixers) <= elements

    return last_within(fits, 2**50)


def is_softmax(mixer: Mixer) -> bool:
    """Whether a query meets every key: softmax attention without a window, or MLA that picks none (DSA does)."""
    return type(mixer) is MLA or (isinstance(mixer, Attention) and mixer.window is None)
