"""A training run as the arguments of Megatron-Core.

The names of arguments, their values and what each needs were read in Megatron-LM core_v0.19.0:
megatron/training/arguments.py, megatron/core/transformer/transformer_config.py and
megatron/core/models/hybrid/hybrid_layer_allocation.py.
"""

from __future__ import annotations

import shlex

from powerplan.run.export.job import NOT_SIZES, Job, comments
from powerplan.run.export.megatron_model import HYBRID, Arguments, model_arguments

VERSION = "Megatron-LM core_v0.19.0"


def megatron_arguments(job: Job) -> str:
    """Return a run as a bash file that sets MEGATRON_ARGS, to be sourced before torchrun starts Megatron-LM's script.

    Args:
        job: the run.

    Returns:
        Arguments of the model, the batch, the parallel degrees and the recipe. Comments at its head name what
        Megatron-Core does not have.
    """
    model = model_arguments(job.spec, job.degrees.pp)
    run, remarks = _run_arguments(job)
    lacks = model.lacks.lines()
    missing = [f"not in Megatron-Core: {what}" for what in (*lacks, *remarks)]
    script = "pretrain_hybrid.py" if HYBRID in model.values else "pretrain_gpt.py"
    head = [
        job.title(),
        f'{VERSION}: source this file, then torchrun ... {script} "${{MEGATRON_ARGS[@]}}"',
        *missing,
        *(["these arguments alone do not build this model: that takes layers of your own, by --spec"] if lacks else []),
        NOT_SIZES,
    ]
    lines = [f"  {_written(name, value)}" for name, value in (model.values | run).items()]
    return "\n".join([*comments(head), "MEGATRON_ARGS=(", *lines, ")", ""])


def _written(name: str, value: str) -> str:
    """Return an argument and the words of its value, each as bash takes it for one."""
    if value.startswith("-"):
        return f"{name}={shlex.quote(value)}"  # A layer pattern that begins with an MLP would be taken for an option.
    return " ".join([name, *(shlex.quote(word) for word in value.split())])


def _run_arguments(job: Job) -> tuple[Arguments, list[str]]:
    """Return the arguments of the batch, the degrees and the recipe, and what has none."""
    degrees, recipe, spec = job.degrees, job.recipe, job.spec
    missing: list[str] = []
    longest = max(job.context, spec.position_embeddings or 0)
    values: Arguments = {
        "--seq-length": str(job.context),
        "--max-position-embeddings": str(longest),
        "--micro-batch-size": str(recipe.micro_batch),
        "--global-batch-size": str(job.sequences),
        "--train-iters": str(job.steps),
        "--tensor-model-parallel-size": str(degrees.tp),
        "--pipeline-model-parallel-size": str(degrees.pp),
        "--context-parallel-size": str(degrees.cp),
    }
    if spec.position_embeddings is not None and spec.position_embeddings < job.context:
        missing.append(
            f"{spec.position_embeddings:,} learned positions for {job.context:,} tokens: it has one for each"
        )
    if degrees.tp > 1:
        values["--sequence-parallel"] = ""
    if degrees.ep > 1:
        values["--expert-model-parallel-size"] = str(degrees.ep)
    if degrees.tp > 1 and any(moe.bias for moe in spec.mixtures()):
        values["--expert-tensor-parallel-size"] = "1"
        missing.append(f"tp {degrees.tp} within experts that have biases: a device holds whole experts")
    values |= _sharding(job, missing)
    values |= _optimizer(job, missing)
    values |= _recomputed(job, missing)
    if recipe.dtype != "fp32":
        values[f"--{recipe.dtype}"] = ""
    if recipe.matmuls_dtype == "fp8":
        values |= {"--fp8-format": "e4m3", "--fp8-recipe": "blockwise"}  # As DeepSeek-V3 trained.
    if degrees.schedule == "dualpipe":
        missing.append("the schedule DualPipe: its pipelines run 1F1B, interleaved or not")
    if recipe.master == "none" and recipe.dtype != "fp32":
        missing.append(f"weights, gradients and moments in {recipe.dtype} alone: it keeps copies in fp32")
    if recipe.loss == "chunked":
        missing.append("a loss in chunks of tokens: the logits of a micro-batch exist at once")
    return values, missing


def _sharding(job: Job, missing: list[str]) -> Arguments:
    """Return the arguments of `zero` and of replicas. Data parallelism itself is what the other degrees leave over."""
    degrees = job.degrees
    if degrees.zero == 0 or degrees.shards == 1:
        return {}
    values: Arguments = {"--use-distributed-optimizer": ""}
    if degrees.zero > 1:
        values["--use-megatron-fsdp"] = ""
        values["--data-parallel-sharding-strategy"] = {2: "optim_grads", 3: "optim_grads_params"}[degrees.zero]
        values["--ckpt-format"] = "fsdp_dtensor"
        values["--no-gradient-accumulation-fusion"] = ""
        if job.recipe.optimizer == "muon":
            missing.append(f"zero {degrees.zero} with Muon: its FSDP takes adam; zero 1 takes both")
    if degrees.replicas > 1:
        values["--num-distributed-optimizer-instances"] = str(degrees.replicas)
    return values


def _optimizer(job: Job, missing: list[str]) -> Arguments:
    optimizer = job.recipe.optimizer
    if optimizer == "adamw":
        return {"--optimizer": "adam"}
    if optimizer == "muon":
        return {"--optimizer": "muon"}
    missing.append("moments in 8 bits with a scale for each block of 256: its fp8 moments have one for each tensor")
    precise = {"--use-precision-aware-optimizer": "", "--exp-avg-dtype": "fp8", "--exp-avg-sq-dtype": "fp8"}
    return {"--optimizer": "adam", "--use-distributed-optimizer": "", **precise}


def _recomputed(job: Job, missing: list[str]) -> Arguments:
    if job.recipe.recompute == "none":
        return {}
    if job.recipe.recompute == "full":
        uniform = {"--recompute-method": "uniform", "--recompute-num-layers": "1"}
        return {"--recompute-granularity": "full", **uniform}
    modules = ["layernorm"]
    if job.spec.mixtures():
        modules.append("moe_act")
    dense = any(use.layer.ffn is not None and use.layer.ffn not in job.spec.mixtures() for use in job.spec.layer_uses())
    if dense:
        missing.append("recomputing the activation function of a dense MLP alone: it can compute all of the MLP again")
    grouped = {"--moe-grouped-gemm": ""} if "moe_act" in modules else {}
    return {"--recompute-granularity": "selective", "--recompute-modules": " ".join(modules), **grouped}
