"""The formats of the methods that quantization_config names, each with the source that its bytes follow.

Scales of activations (input_scale), shapes and code books are not weights, and not counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from powerplan.errors import parameter, shown
from powerplan.huggingface.config import Config
from powerplan.huggingface.modules import NotUnderstoodError

Format = tuple[tuple[str, int], ...]
"""Fields of a Rule that say how a matrix is stored, and their values."""


def _format(bits: int, **fields: int | None) -> Format:
    return (("bits", bits), *((name, value) for name, value in sorted(fields.items()) if value))


MXFP4 = _format(4, block=32, scale_bits=8)
"""OCP Microscaling Formats 1.0, section 5; transformers 5, integrations/mxfp4.py."""

NVFP4 = _format(4, block=16, scale_bits=8, matrix_bits=32)
"""Blocks of 16 with a scale in fp8 and a scale in fp32 (weight_scale_2): vLLM, quantization/modelopt.py."""


@dataclass
class Reading:
    """What a quantization_config says. label: the method in a few words.

    linear: the format of linear layers, None where they are wide; experts: of routed experts where it is another one.
    lm_head: whether it counts as a linear layer. wide: modules that stay wide. within: the modules that are
    quantized, None for all. others: formats of modules by their names; wide where None.
    """

    label: str
    linear: Format | None
    experts: Format | None = None
    lm_head: bool = False
    wide: list[str] = field(default_factory=list)
    within: list[str] | None = None
    others: dict[str, Format | None] = field(default_factory=dict)


def _bits(settings: Config, *names: str, known: tuple[int, ...] = (2, 3, 4, 8)) -> int:
    bits = settings.optional_integer(*names, high=64)
    if bits not in known:
        raise NotUnderstoodError(f"{names[0]} {shown(bits)}")
    return bits


def _group(settings: Config, default: int = 128) -> int | None:
    """Return the inputs that share a scale, None for all of them (-1)."""
    size = settings.integer("group_size", default=default, low=-1)
    if size == 0:
        raise NotUnderstoodError("group_size 0")
    return None if size == -1 else size


def _inner(settings: Config | None, name: str) -> Config | None:
    """Return the object under `name`; None where there is none, as methods write other values there too."""
    is_object = settings is not None and isinstance(settings.data.get(name), dict)
    return settings.nested(name) if settings is not None and is_object else None


def _skipped(settings: Config, *names: str) -> tuple[list[str], bool]:
    """Return the modules that a list keeps wide, and whether the LM head is quantized if no name is its own.

    Without a list the head is wide: transformers 5, quantizers/base.py, get_modules_to_not_convert.
    """
    lists = [modules for name in names if (modules := settings.strings(name)) is not None]
    return (lists[0], True) if lists else ([], False)


def _fp8(settings: Config) -> Reading:
    """Blocks with a scale, or one scale per matrix: transformers 5, integrations/finegrained_fp8.py, FP8Linear."""
    wide, head = _skipped(settings, "modules_to_not_convert", "ignored_layers")
    scale = 8 if settings.data.get("scale_fmt") == "ue8m0" else 32
    experts = MXFP4 if settings.data.get("expert_dtype") == "fp4" else None
    if settings.data.get("expert_dtype") not in (None, "fp8", "fp4"):
        raise NotUnderstoodError(f"expert_dtype {shown(settings.data['expert_dtype'])}")
    blocks = settings.integers("weight_block_size")
    if not blocks:
        return Reading("fp8", _format(8, matrix_bits=32), experts, head, wide=wide)
    if len(blocks) != 2 or min(blocks) < 1:
        raise settings.error(f"weight_block_size must be two sizes, and is {shown(blocks)}", "weight_block_size")
    linear = _format(8, block_rows=blocks[0], block=blocks[1], scale_bits=scale)
    return Reading("fp8", linear, experts, head, wide=wide)


def _fbgemm_fp8(settings: Config) -> Reading:
    """A scale in fp32 for each output: transformers 5, integrations/fbgemm_fp8.py, FbgemmFp8Linear."""
    wide, head = _skipped(settings, "modules_to_not_convert")
    return Reading("fbgemm_fp8", _format(8, scale_bits=32), lm_head=head, wide=wide)


def _mxfp4(settings: Config) -> Reading:
    """Matrices of experts alone, not their biases: transformers 5, quantizers/quantizer_mxfp4.py."""
    return Reading("mxfp4", None, MXFP4, wide=_skipped(settings, "modules_to_not_convert")[0])


def _nvfp4(settings: Config) -> Reading:
    wide, head = _skipped(settings, "modules_to_not_convert")
    return Reading("nvfp4", NVFP4, lm_head=head, wide=wide)


def _gptq(settings: Config) -> Reading:
    """Scales in fp16, packed zero points (also where symmetric), a group for each input: AutoGPTQ, qlinear_cuda.py."""
    bits = _bits(settings, "bits")
    linear = _format(bits, block=_group(settings), scale_bits=16, zero_bits=bits, column_bits=32)
    reading = Reading(f"gptq int{bits}", linear, lm_head=settings.boolean("lm_head", False))
    blocks = settings.data.get("modules_in_block_to_quantize")
    if isinstance(blocks, list):
        flat = [name for names in blocks for name in (names if isinstance(names, list) else [names])]
        reading.within = [name for name in flat if isinstance(name, str)]
    dynamic = settings.nested("dynamic")
    for pattern, change in dynamic.data.items() if dynamic else ():
        if pattern.startswith("-:"):
            reading.wide.append(f"re:{pattern[2:]}")
        elif change:
            raise NotUnderstoodError(f"dynamic {shown(pattern)}")
    return reading


def _awq(settings: Config) -> Reading:
    """Scales in fp16 and packed zero points; blocks of layers only: AutoAWQ, awq/modules/linear/gemm.py."""
    bits = _bits(settings, "bits", "w_bit")
    zeros = bits if settings.boolean("zero_point", True) else 0
    wide, _ = _skipped(settings, "modules_to_not_convert")
    return Reading(f"awq int{bits}", _format(bits, block=_group(settings), scale_bits=16, zero_bits=zeros), wide=wide)


def _bitsandbytes(settings: Config) -> Reading:
    """8 bits with a scale in fp32 for each output, or 4 bits in blocks of 64.

    LLM.int8(), arXiv 2208.07339, section 2; QLoRA, arXiv 2305.14314, section 3: a scale in fp32 for 64 weights, or, by
    double quantization, one in 8 bits with a second scale in fp32 for 256 of them.
    """
    wide, head = _skipped(settings, "llm_int8_skip_modules")
    if settings.boolean("load_in_8bit", False) or settings.boolean("_load_in_8bit", False):
        return Reading("bitsandbytes int8", _format(8, scale_bits=32), lm_head=head, wide=wide)
    if not (settings.boolean("load_in_4bit", False) or settings.boolean("_load_in_4bit", False)):
        raise NotUnderstoodError("bitsandbytes with neither load_in_4bit nor load_in_8bit")
    kind = settings.data.get("bnb_4bit_quant_type", "fp4")
    if settings.boolean("bnb_4bit_use_double_quant", False):
        linear = _format(4, block=64, scale_bits=8, scales_block=256)
    else:
        linear = _format(4, block=64, scale_bits=32)
    return Reading(f"bitsandbytes {'nf4' if kind == 'nf4' else 'fp4'}", linear, lm_head=head, wide=wide)


def _auto_round(settings: Config) -> Reading:
    """GPTQ's packing without the groups of inputs: auto-round, export_to_autoround. extra_config: single modules."""
    kind = settings.data.get("data_type", "int")
    base = _auto_round_format(settings, settings)
    reading = Reading(f"auto-round {'int' if kind == 'int' else 'fp'}{_bits(settings, 'bits')}", base)
    extra = settings.nested("extra_config")
    for name in extra.data if extra else ():
        assert extra is not None
        own = extra.nested(name)
        if own is not None and (form := _auto_round_format(own, settings)) != base:
            reading.others[name] = form
    return reading


def _auto_round_format(own: Config, base: Config) -> Format | None:
    bits = (own if own.has("bits") else base).optional_integer("bits", high=64)
    if bits is not None and bits >= 16:
        return None
    group = _group(own if own.has("group_size") else base)
    kind = (own if own.has("data_type") else base).data.get("data_type", "int")
    if kind == "int" and bits in (2, 3, 4, 8):
        return _format(bits, block=group, scale_bits=16, zero_bits=bits)
    if kind in ("mx_fp", "mx_fp4") and bits == 4:
        return MXFP4
    if kind in ("nv_fp", "nv_fp4") and bits == 4:
        return NVFP4
    raise NotUnderstoodError(f"auto-round of {shown(bits)} bits of {shown(kind)}")


def _hqq(settings: Config) -> Reading:
    """Scale and zero point in fp16 for each group: HQQ, hqq/core/quantize.py; 3 bits are packed in another way."""
    inner = _inner(settings, "quant_config")
    weights = _inner(inner, "weight_quant_params")
    if weights is None or inner is None or inner.has("scale_quant_params") or inner.has("zero_quant_params"):
        raise NotUnderstoodError("hqq with more than one set of weight_quant_params, or none")
    bits = _bits(weights, "nbits", known=(1, 2, 4, 8))
    wide = settings.strings("skip_modules")
    linear = _format(bits, block=_group(weights, 64), scale_bits=16, zero_bits=16)
    return Reading(f"hqq int{bits}", linear, lm_head=True, wide=["lm_head"] if wide is None else wide)


def _torchao(settings: Config) -> Reading:
    """Int4WeightOnlyConfig: scale and zero point in bf16 for each group: torchao, quantization/quant_api.py."""
    default = _inner(_inner(settings, "quant_type"), "default")
    kind = default.data.get("_type") if default else settings.data.get("quant_type")
    data = _inner(default, "_data")
    if default is None or kind != "Int4WeightOnlyConfig" or settings.boolean("include_input_output_embeddings", False):
        raise NotUnderstoodError(f"torchao's {shown(kind)}")
    wide, head = _skipped(settings, "modules_to_not_convert")
    group = _group(data, 128) if data else 128
    return Reading("torchao int4", _format(4, block=group, scale_bits=16, zero_bits=16), lm_head=head, wide=wide)


def _quark(settings: Config) -> Reading:
    """AMD Quark, JsonExporter: fp8 and int8 with scales in fp32, OCP MXFP4; formats of single layers are not read."""
    weight = _inner(_inner(settings, "global_quant_config"), "weight")
    if weight is None or settings.data.get("layer_quant_config") or settings.data.get("layer_type_quant_config"):
        raise NotUnderstoodError("quark without one format for all weights")
    kind, scheme = weight.data.get("dtype"), weight.data.get("qscheme")
    wide, head = _skipped(settings, "exclude")
    known = {
        ("fp8_e4m3", "per_tensor"): _format(8, matrix_bits=32),
        ("int8", "per_tensor"): _format(8, matrix_bits=32),
        ("fp8_e4m3", "per_channel"): _format(8, scale_bits=32),
        ("int8", "per_channel"): _format(8, scale_bits=32),
    }
    form = known.get((str(kind), str(scheme)))
    if kind == "fp4" and scheme == "per_group" and weight.data.get("group_size") == 32:
        form = MXFP4
    if form is None:
        raise NotUnderstoodError(f"quark's {shown(kind)}, {shown(scheme)}")
    return Reading(f"quark {'mxfp4' if form == MXFP4 else str(kind).partition('_')[0]}", form, lm_head=head, wide=wide)


def _compressed_tensors(settings: Config) -> Reading:
    """Scales in 16 bits, as the model was, unless scale_dtype says more: compressed-tensors, compressors/."""
    if settings.data.get("format") == "dense":
        raise NotUnderstoodError("compressed-tensors with format dense")
    sparsity = _inner(settings, "sparsity_config")
    if sparsity is not None and sparsity.data.get("format", "dense") != "dense":
        raise NotUnderstoodError("compressed-tensors with sparsity_config")
    if settings.has("kv_cache_scheme"):
        settings.note(f"kv_cache_scheme is not read: the cache's bytes follow {parameter('cache_dtype')}")
    reading = _groups(settings, "compressed-tensors", 16)
    reading.lm_head = True
    reading.wide = settings.strings("ignore") or []
    return reading


def _groups(settings: Config, method: str, scale_bits: int) -> Reading:
    """Read config_groups: schemes of all linear layers, or of the modules that `targets` name."""
    groups = _inner(settings, "config_groups")
    if groups is None or not groups.data:
        raise NotUnderstoodError("no config_groups")
    reading = Reading("", None)
    labels: list[str] = []
    for name in groups.data:
        group = _inner(groups, name)
        if group is None:
            raise NotUnderstoodError(f"config_groups {shown(dict(groups.data))}")
        weights = _inner(group, "weights")
        if weights is None:
            continue
        label, form = _scheme(weights, scale_bits)
        labels.append(label)
        for target in group.strings("targets") or ["Linear"]:
            if target == "Linear":
                reading.linear = form
            else:
                reading.others[target] = form
    reading.label = f"{method} {' and '.join(dict.fromkeys(labels))}".strip()
    return reading


def _scheme(weights: Config, scale_bits: int) -> tuple[str, Format]:
    """Return what a scheme of config_groups is called, and the format of its weights."""
    bits, kind = _bits(weights, "num_bits", known=tuple(range(1, 9))), weights.data.get("type", "int")
    strategy, group = weights.data.get("strategy"), weights.optional_integer("group_size", low=-1)
    strategy = strategy or ("group" if group and group > 0 else "channel" if group == -1 else "tensor")
    if kind == "float" and bits == 4:
        known = {16: ("nvfp4", NVFP4), 32: ("mxfp4", MXFP4)}
        if group not in known:
            raise NotUnderstoodError(f"floats of 4 bits in groups of {shown(group)}")
        return known[group]
    if kind not in ("int", "float") or (kind == "float" and bits != 8):
        raise NotUnderstoodError(f"{shown(kind)} of {bits} bits")
    scale = {"torch.float32": 32, "float32": 32, "torch.uint8": 8}.get(str(weights.data.get("scale_dtype")), scale_bits)
    zeros = 0 if weights.boolean("symmetric", True) else bits
    label = f"{'fp' if kind == 'float' else 'int'}{bits}"
    if strategy == "tensor":
        return label, _format(bits, matrix_bits=scale + zeros)
    if strategy == "channel":
        return label, _format(bits, scale_bits=scale, zero_bits=zeros)
    if strategy == "group" and group and group > 0:
        return label, _format(bits, block=group, scale_bits=scale, zero_bits=zeros)
    blocks = weights.integers("block_structure") if strategy == "block" else []
    if len(blocks) == 2 and min(blocks) > 0:
        return label, _format(bits, block_rows=blocks[0], block=blocks[1], scale_bits=scale, zero_bits=zeros)
    raise NotUnderstoodError(f"strategy {shown(strategy)}")


def _modelopt(settings: Config) -> Reading:
    """NVIDIA Model Optimizer, as vLLM's quantization/modelopt.py reads it: scales in fp32, the LM head wide."""
    inner = _inner(settings, "quantization") or settings
    if inner.has("kv_cache_scheme") or inner.has("kv_cache_quant_algo"):
        settings.note(f"the format of the cache is not read: its bytes follow {parameter('cache_dtype')}")
    algorithm = str(inner.data.get("quant_algo")).upper()
    known = {
        "NVFP4": ("nvfp4", NVFP4),
        "FP8": ("fp8", _format(8, matrix_bits=32)),
        "FP8_PER_CHANNEL_PER_TOKEN": ("fp8", _format(8, scale_bits=32)),
        "FP8_PB_WO": ("fp8", _format(8, block_rows=128, block=128, scale_bits=32)),
        "MXFP8": ("mxfp8", _format(8, block=32, scale_bits=8)),
    }
    if inner.has("config_groups"):
        reading = _groups(inner, "modelopt", 32)
    elif algorithm in known:
        label, form = known[algorithm]
        reading = Reading(f"modelopt {label}", form)
        if algorithm == "NVFP4" and inner.integer("group_size", default=16) != 16:
            raise NotUnderstoodError(f"NVFP4 in groups of {inner.data['group_size']}")
    else:
        raise NotUnderstoodError(f"quant_algo {shown(inner.data.get('quant_algo'))}")
    reading.wide = inner.strings("ignore") or inner.strings("exclude_modules") or []
    return reading


METHODS: dict[str, Callable[[Config], Reading]] = {
    "auto-round": _auto_round,
    "awq": _awq,
    "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed_tensors,
    "fbgemm_fp8": _fbgemm_fp8,
    "fp8": _fp8,
    "gptq": _gptq,
    "hqq": _hqq,
    "modelopt": _modelopt,
    "modelopt_fp4": _modelopt,
    "mxfp4": _mxfp4,
    "nvfp4": _nvfp4,
    "quark": _quark,
    "torchao": _torchao,
}
"""The reader of each quant_method."""
