"""States and windows against what transformers' models keep and see, layer by layer, of a prompt and one more token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hf_caches import APART, CONTEXT, KEEPS_ALL, PROMPT, UNCACHED, Kept, cache_settings, run
from hf_decoders import Settings, mixers_by_layer, written

from powerplan.huggingface import FAMILIES
from powerplan.load import LoadedModel
from powerplan.mixers import ChunkedAttention, Mixer
from powerplan.spec import ModelSpec

pytestmark = pytest.mark.transformers

Read = Callable[[Settings], LoadedModel]

auto = pytest.importorskip("transformers.models.auto.modeling_auto")
DECODERS = sorted(name for name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name in {*FAMILIES} - {*APART})


def built(transformers: Any, torch: Any, model_type: str) -> Any:
    config_class = transformers.CONFIG_MAPPING[model_type]
    config = config_class(**cache_settings(config_class, model_type))
    config._attn_implementation = "eager"
    names = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    torch.manual_seed(0)
    return getattr(transformers, names if isinstance(names, str) else names[0])(config).eval()


def mixers_by_cache(spec: ModelSpec, kept: list[Kept]) -> list[list[Mixer]]:
    """Return the mixers that each layer of transformers' cache belongs to.

    A layer that keeps keys as well as a recurrent state is two layers here; a layer without a mixer keeps nothing.
    """
    mixers = [layer.mixer for group in spec.layers for layer in group.period * group.repeat]
    present: list[list[Mixer]] = [[mixer] for mixer in mixers if mixer is not None]
    if len(present) == len(kept):
        return present
    if len(mixers) == len(kept):
        return [[mixer] if mixer is not None else [] for mixer in mixers]
    ahead = iter(mixers)
    taken = [[next(ahead) for _ in range(1 + bool(layer.cached and layer.recurrent))] for layer in kept]
    assert next(ahead, None) is None
    return [[mixer for mixer in pair if mixer is not None] for pair in taken]


def expected(mixers: list[Mixer], window: int | None, forgets: bool) -> Kept:
    """Return what transformers keeps of these mixers.

    A cache with a window w holds the last w - 1 tokens between steps: the next one brings its own key. powerplan
    counts the w that one step reads.
    """
    sizes = [mixer.state_size(CONTEXT if window is None else min(CONTEXT, window - 1)) for mixer in mixers]
    windows = [mixer.window_size for mixer, size in zip(mixers, sizes, strict=True) if size.cache]
    return Kept(
        cached=sum(size.cache if forgets else size.entry * CONTEXT for size in sizes),
        window=windows[0] if windows and forgets else None,
        recurrent=sum(size.recurrent for size in sizes),
        recent=sum(size.recent for size in sizes),
    )


def attends(mixer: Mixer) -> bool:
    """Whether a mixer looks up keys, its own or those of an earlier layer."""
    size = mixer.state_size(1)
    return bool(size.cache or size.looked_up)


def keys_seen(mixer: Mixer, position: int) -> int:
    window = mixer.window_size
    if window is None:
        return position + 1
    return position % window + 1 if isinstance(mixer, ChunkedAttention) else min(position + 1, window)


@pytest.mark.parametrize("model_type", DECODERS)
def test_caches_and_windows(transformers: Any, torch: Any, read: Read, model_type: str) -> None:
    model = built(transformers, torch, model_type)
    spec = read(written(model.config, "whole")).spec
    kept, weights = run(transformers, torch, model)
    if model_type not in UNCACHED:
        forgets = model_type not in KEEPS_ALL
        layers = zip(mixers_by_cache(spec, kept), kept, strict=True)
        assert [expected(mixers, layer.window, forgets) for mixers, layer in layers] == kept

    attending = [mixer for mixer in mixers_by_layer(spec) if attends(mixer)]
    assert len(weights) == len(attending)
    for seen, mixer in zip(weights, attending, strict=True):
        counts = (seen > 0).any(dim=0).sum(dim=-1)  # in a single head, a weight may be too small for float32
        assert counts.tolist() == [keys_seen(mixer, position) for position in range(PROMPT)]
