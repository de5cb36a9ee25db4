"""Wrappers whose files have the keys of the text decoder at the top, beside those of the other towers."""

from __future__ import annotations

from typing import NamedTuple

from powerplan.errors import shown
from powerplan.huggingface.config import Config, keys


class Flat(NamedTuple):
    """A wrapper without an object for its text decoder.

    text: the family of the decoder; empty where a version says it. inert: keys that concern images and sounds.
    """

    text: str
    inert: frozenset[str] = frozenset()


_LLAVA = keys(
    """
    add_faster_video faster_token_stride force_sample freeze_mm_mlp_adapter freeze_mm_vision_resampler
    image_aspect_ratio image_crop_resolution image_grid_pinpoints image_split_resolution mm_compressor_type
    mm_hidden_size mm_newline_position mm_patch_merge_type mm_projector_lr mm_projector_type mm_resampler_type
    mm_spatial_pool_mode mm_spatial_pool_out_channels mm_spatial_pool_stride mm_tunable_parts mm_use_im_patch_token
    mm_use_im_start_end mm_vision_select_feature mm_vision_select_layer mm_vision_tower mm_vision_tower_lr
    pos_skipping_range tokenizer_model_max_length tokenizer_padding_side tune_mm_mlp_adapter
    tune_mm_vision_resampler unfreeze_mm_vision_tower use_mm_proj use_pos_skipping vision_tower_pretrained
    """
)

_MINICPM = keys(
    """
    audio_config audio_chunk_length audio_pool_step batch_3d_resampler batch_vision_input drop_vision_last_layer
    image_size init_audio init_tts init_vision insert_layer_id patch_size query_num slice_config slice_mode
    stream_input tts_config use_image_id version vision_batch_size vision_config
    """
)

FLAT: dict[str, Flat] = {
    "dots_ocr": Flat("qwen2", keys("image_token_id video_token_id vision_config")),
    "fuyu": Flat("persimmon", keys("image_size num_channels patch_size")),
    "keye": Flat("qwen3", keys("vision_config")),
    "llava_llama": Flat("llama", _LLAVA),
    "llava_mistral": Flat("mistral", _LLAVA),
    "llava_qwen": Flat("qwen2", _LLAVA),
    "minicpmo": Flat("", _MINICPM),
    "minicpmv": Flat("", _MINICPM),
    "phi3_v": Flat("phi3", keys("embd_layer img_processor num_img_tokens")),
    "qwen2_5_vl": Flat("qwen2_5_vl_text", keys("vision_config")),
    "qwen2_vl": Flat("qwen2_vl_text", keys("vision_config")),
}
"""By model_type. Of some wrappers there are files of this kind, and files with a text_config."""

MINICPM_VERSIONS = {
    "minicpmo": {"2.6": "qwen2", "4.5": "qwen3"},
    "minicpmv": {"2.0": "minicpm", "2.5": "llama", "2.6": "qwen2", "4": "llama", "4.0": "llama", "4.5": "qwen3"},
}
"""The family of the decoder by `version` of MiniCPM-V and MiniCPM-o, as vLLM's minicpmv.py and minicpmo.py have it."""


def flat_family(outer: Config, model_type: str) -> tuple[str, frozenset[str]]:
    """Return the family of a wrapper's text decoder, and the keys beside it. InputError for a version not known."""
    flat = FLAT[model_type]
    if flat.text:
        return flat
    versions = MINICPM_VERSIONS[model_type]
    version = outer.data.get("version")
    if version is None and model_type == "minicpmv":  # The first two have none, and the first is the narrow one.
        first = outer.data.get("hidden_size") == 2304 and outer.data.get("query_num") == 64
        return versions["2.0" if first else "2.5"], flat.inert
    listed = ", ".join(sorted(versions))
    if version is None:
        raise outer.error(f"{model_type} needs version, and the file has none; known are {listed}", "model_type")
    if str(version) not in versions:
        raise outer.error(f"version {shown(version)} of {model_type} is not known; known are {listed}", "version")
    return versions[str(version)], flat.inert
