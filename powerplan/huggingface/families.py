"""Every model_type that is read, its reader and its defaults; and those that are refused, with the reason."""

from __future__ import annotations

from powerplan.huggingface import (
    bailing,
    dense,
    experts,
    fla,
    gemma,
    gpt,
    hub,
    hybrids,
    latent,
    looped,
    mamba,
    mamba_hybrids,
    mixed,
    recurrent,
    remote,
    remote_experts,
    sarvam,
    special,
    towers,
)
from powerplan.huggingface.config import Family
from powerplan.huggingface.defaults import tables
from powerplan.huggingface.flat import FLAT

FAMILIES: dict[str, Family] = {
    **dense.FAMILIES,
    **gpt.FAMILIES,
    **remote.FAMILIES,
    **hub.FAMILIES,
    **special.FAMILIES,
    **towers.FAMILIES,
    **looped.FAMILIES,
    **experts.FAMILIES,
    **latent.FAMILIES,
    **sarvam.FAMILIES,
    **mixed.FAMILIES,
    **bailing.FAMILIES,
    **remote_experts.FAMILIES,
    **hybrids.FAMILIES,
    **gemma.FAMILIES,
    **mamba.FAMILIES,
    **mamba_hybrids.FAMILIES,
    **recurrent.FAMILIES,
    **fla.FAMILIES,
}
"""The reader of each model_type. Wrappers (mistral3 ...) are read through their text_config."""

_ENCODERS = """
    albert bert bert-generation big_bird camembert data2vec-text deberta deberta-v2 distilbert electra ernie longformer
    megatron-bert mobilebert modernbert mpnet rembert roberta roberta-prelayernorm roc_bert roformer xlm xlm-roberta
    xlm-roberta-xl xmod
"""
_WITH_ENCODERS = """
    bart bigbird_pegasus blenderbot blenderbot-small fsmt git led longt5 m2m_100 marian mbart mt5 mvp nllb-moe pegasus
    pegasus_x plbart prophetnet switch_transformers t5 t5gemma t5gemma2 trocr umt5 whisper
"""

REFUSED: dict[str, str] = {
    **dict.fromkeys(_ENCODERS.split(), "it is an encoder, or built as one, and powerplan plans decoders"),
    **dict.fromkeys(_WITH_ENCODERS.split(), "its decoder attends to an encoder, which is not counted"),
    **dict.fromkeys(("moshi", "musicgen", "musicgen_melody"), "it generates audio"),
    "blt": "its layers run on patches of bytes, and no token count says how many there are",
    **dict.fromkeys(("dots3_note", "dots3_note_text"), "it mixes latent attention in a window with sparse attention"),
    **dict.fromkeys(
        ("inkling_text", "inkling2_text", "inkling2_loop_text"),
        "its attention has relative positions, and convolutions between layers, which are not counted",
    ),
    **dict.fromkeys(
        ("qwen4_exp", "qwen4_exp_text"), "it has several residual streams and looks up n-grams, which is not counted"
    ),
    "beam": "its gates and windows are not read",
    **dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "it drafts for another model, and reads the keys and values of that one",
    ),
    "jetmoe": "its queries come from a mixture of experts, and which of them a batch uses is not counted",
    "zaya": "its keys and values are made by convolutions over time in a compressed space, which is not counted",
    "iquestloopcoder": "its second pass attends to keys of the first as well, which is not counted",
    "phi3small": "its block-sparse attention is not counted",
    "plamo2": "its Mamba layers have the states of Mamba-2 and the steps of Mamba-1, which is not counted",
    **dict.fromkeys(("step3_text", "step3_vl"), "its queries alone come from a latent, which is not counted"),
    "reformer": "its attention hashes keys into buckets, which is not counted",
    **dict.fromkeys(
        ("glm5_next", "glm5_next_text"), "it has several residual streams, and pools the keys of its indexer"
    ),
    **dict.fromkeys(
        ("mistral_large4", "mistral_large4_text"),
        "its attention has scales of each head's own and an indexer without latents",
    ),
    **dict.fromkeys(("unlimited_ocr", "unlimited_ocr_text"), "its window keeps all tokens of the prompt"),
    **dict.fromkeys(
        ("diffusion_gemma", "diffusion_gemma_text", "llada", "llada2_moe", "dream", "Dream"),
        "it denoises blocks of tokens, and powerplan plans decoders that go token by token",
    ),
    "xlnet": "its attention is over two streams, which is not counted",
}
"""Language models of transformers that are not read, and why."""


def wrapped_families() -> dict[str, str]:
    """Return the wrappers whose text decoder is read, and its model_type if none is named; empty if one must be."""
    wrappers = {name: wrapper.text for name, wrapper in tables().wrappers.items() if name not in FAMILIES}
    wrappers |= {name: flat.text for name, flat in FLAT.items()}
    return {name: text for name, text in wrappers.items() if text in ("", *FAMILIES) and name not in REFUSED}


def supported_families() -> list[str]:
    """Return the model_type values that are read, wrappers included."""
    return sorted({*FAMILIES, *wrapped_families()})
