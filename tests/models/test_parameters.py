"""Built modules have the parameters of the accounting: layers of random specs, and every model of the catalogue."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import specs
from hypothesis import given
from kinds import MIXERS as SMALL

from powerplan.accounting import Accounting
from powerplan.errors import InputError
from powerplan.ffn import Memory, MoE, Stem
from powerplan.load import catalogue_names, catalogue_spec
from powerplan.mixers import MIXERS, RWKV7, FeatureAttention, LogLinear
from powerplan.mixers.formulas import total
from powerplan.models import build_layer, build_model
from powerplan.models.mixers import BUILT, unbuilt_field
from powerplan.spec import Layer, ModelSpec, Norm

DOCS = (Path(__file__).resolve().parent.parent.parent / "docs" / "models.md").read_text(encoding="utf-8")
REFUSED = {
    "apriel-h1-15b",
    "hyenadna-large-1m",
    "kimi-k3",
    "ling-3.0-flash",
    "llama-4-scout",
    "longcat-flash",
    "stem-1b",
    "ultramemv2-1.2b",
    "xlstm-7b",
}
"""Catalogue models with layers that are not built: mlstm, and others with fields that are not."""


def is_built(layer: Layer) -> bool:
    mixer, ffn = layer.mixer, layer.ffn
    if (
        isinstance(ffn, Stem | Memory)
        or layer.tied
        or layer.extras
        or (isinstance(ffn, MoE) and (ffn.latent_size or ffn.zero_experts))
    ):
        return False
    if isinstance(mixer, LogLinear) and mixer.chunk_size.bit_count() > 1:
        return False  # Chunks of a Fenwick tree have a power of 2 of tokens.
    if isinstance(mixer, RWKV7) and mixer.channel_mix and ffn is None:
        return False
    if mixer is not None and unbuilt_field(mixer):
        return False
    if isinstance(mixer, FeatureAttention) and mixer.degree % 2 and mixer.has_normaliser:
        return False  # Weights of both signs: the kernels do not run it.
    return mixer is None or type(mixer) in BUILT


def test_what_is_built() -> None:
    refused = {name for name in catalogue_names() if not all(map(is_built, layers_of(name)))}
    assert refused == REFUSED
    kinds = {str(kind.__struct_config__.tag) for kind in BUILT}
    (named,) = re.findall(r"\n\n([\w, \n]+)\sare counted and not built", DOCS)
    assert set(MIXERS) - kinds == set(re.findall(r"\w+", named)) - {"and"}
    assert {mixer.kind for mixer in SMALL.values()} == kinds, "tests/kinds.py has a small mixer of each"


def layers_of(name: str) -> list[Layer]:
    return [use.layer for use in catalogue_spec(name).layer_uses()]


@pytest.mark.parametrize("name", catalogue_names())
def test_catalogue_models_have_the_parameters_of_the_accounting(name: str) -> None:
    spec = catalogue_spec(name)
    if name in REFUSED:
        with pytest.raises(InputError, match="not built"):
            build_model(spec, device="meta")
        return
    model = build_model(spec, device="meta")
    assert sum(weight.numel() for weight in model.parameters()) == Accounting(spec).total_parameters.with_embeddings


def check_layer(spec: ModelSpec, layer: Layer) -> None:
    expected = total(spec.norm_terms(layer))
    for block in (layer.mixer, layer.ffn):
        if block is not None:
            for terms in (block.matmul_terms, block.other_terms, block.idle_terms):
                expected += total(terms(spec.hidden_size))
    module = build_layer(spec, layer, device="meta")
    assert sum(weight.numel() for weight in module.parameters()) == expected


@given(specs.specs)
def test_layers_have_the_parameters_of_the_accounting(spec: ModelSpec) -> None:
    for use in spec.layer_uses():
        parts = sum(part is not None for part in (use.layer.mixer, use.layer.ffn))
        if is_built(use.layer) and spec.norms_of(use.layer) in (0, parts, 2 * parts):
            check_layer(spec, use.layer)


@pytest.mark.parametrize("per_layer", [0, 1, 2, 4])
@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm", "none"])
def test_norms_have_the_parameters_of_the_accounting(per_layer: int, kind: str) -> None:
    layer = layers_of("llama-3.2-1b")[0]
    spec = ModelSpec(
        name="x",
        vocab_size=9,
        hidden_size=16,
        norm=Norm(kind=kind, per_layer=per_layer),  # type: ignore[arg-type]
        layers=catalogue_spec("llama-3.2-1b").layers,
    )
    check_layer(spec, layer)
