"""A training run as a configuration file of torchtitan.

The tables, their keys and values were read in torchtitan v0.2.2, the last version whose configuration is a TOML file:
torchtitan/config/job_config.py, distributed/parallel_dims.py, distributed/pipeline_parallel.py, train.py and
components/optimizer.py. torchtitan_model.py has what was read of its models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from powerplan.run.export.job import NOT_SIZES, Job, comments
from powerplan.run.export.torchtitan_model import TitanModel, titan_model
from powerplan.run.stages import stage_spans

VERSION = "torchtitan v0.2.2"

Table = dict[str, Any]


def torchtitan_toml(job: Job) -> str:
    """Return a run as a TOML file of torchtitan.

    torchtitan trains named models in named flavors. Where it has no flavor of these sizes, a comment has the line that
    adds one to its registry.

    Args:
        job: the run.

    Returns:
        The tables model, training, parallelism, activation_checkpoint and optimizer. Comments at the head of the file
        name what torchtitan does not have.
    """
    missing: list[str] = []
    model = titan_model(job.spec)
    tables = {
        "job": {"description": job.title()},
        "model": {"name": model.name, "flavor": model.flavor},
        "optimizer": _optimizer(job, missing),
        "training": _training(job, missing),
        "parallelism": _parallelism(job, model, missing),
        "activation_checkpoint": _recomputed(job, missing),
    }
    lacks = model.lacks.lines()
    head = [
        job.title(),
        f"{VERSION}: torchrun --nproc_per_node ... -m torchtitan.train --job.config_file this file",
        *(f"not in torchtitan: {what}" for what in (*lacks, *missing)),
        *model.registry,
        NOT_SIZES,
    ]
    blocks = [
        "\n".join([f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in table.items())])
        for name, table in tables.items()
    ]
    return "\n\n".join(["\n".join(comments(head)), *blocks]) + "\n"


def _toml(value: Any) -> str:
    """Return a value as TOML has it; strings and lists are those of JSON, whose escapes TOML has too."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _optimizer(job: Job, missing: list[str]) -> Table:
    if job.recipe.optimizer != "adamw":
        missing.append(f"the optimizer {job.recipe.optimizer}: it has Adam and AdamW")
    return {"name": "AdamW"}


def _training(job: Job, missing: list[str]) -> Table:
    recipe = job.recipe
    # A pipeline cuts the local batch into its micro-batches; without one, the local batch is a micro-batch.
    local = job.sequences // job.degrees.sequences_at_once if job.degrees.pp > 1 else recipe.micro_batch
    table: Table = {
        "local_batch_size": local,
        "global_batch_size": job.sequences,
        "seq_len": job.context,
        "steps": job.steps,
    }
    if recipe.dtype == "fp16":
        missing.append("fp16: it trains in bfloat16 or float32")
    whole = recipe.dtype == "bf16" and recipe.master == "none"
    table["dtype"] = "bfloat16" if whole else "float32"
    table["mixed_precision_param"] = "float32" if recipe.dtype == "fp32" else "bfloat16"
    if recipe.matmuls_dtype is not None:
        missing.append(f"matmuls in {recipe.matmuls_dtype}: its converters do it, which have settings of their own")
    if recipe.loss == "chunked":
        missing.append("a loss in chunks of tokens: the logits of a micro-batch exist at once")
    return table


def _parallelism(job: Job, model: TitanModel, missing: list[str]) -> Table:
    degrees = job.degrees
    replicate, shard, reshard = degrees.replicas, degrees.fsdp, "default"
    if degrees.shards > 1:
        if degrees.zero == 3 and degrees.pp > 1:
            reshard = "always"  # By default, weights stay whole from the forward to the backward pass of a pipeline.
        elif degrees.zero == 0 and degrees.cp == 1:
            replicate, shard = replicate * shard, 1
        elif degrees.zero < 3:
            # Weights are gathered once for forward and backward pass, and sharded between steps.
            reshard = "never"
            missing.append(f"zero {degrees.zero}: FSDP that gathers weights once a step stands for it, and shards more")
    table: Table = {
        "data_parallel_replicate_degree": replicate,
        "data_parallel_shard_degree": shard,
        "fsdp_reshard_after_forward": reshard,
        "tensor_parallel_degree": degrees.tp,
        "pipeline_parallel_degree": degrees.pp,
        "context_parallel_degree": degrees.cp,
        "expert_parallel_degree": degrees.ep,
    }
    if degrees.ep > 1:
        table["expert_tensor_parallel_degree"] = degrees.tp
    if degrees.pp > 1:
        if degrees.schedule == "dualpipe":
            missing.append("the schedule DualPipe: 1F1B stands for it")
        table["pipeline_parallel_schedule"] = "1F1B"
        table["pipeline_parallel_microbatch_size"] = job.recipe.micro_batch
        table["module_fqns_per_model_part"] = _parts(job)
    for name in model.without:
        if getattr(degrees, name) > 1:
            missing.append(f"{name} {getattr(degrees, name)} for its model {model.name}")
    return table


def _parts(job: Job) -> list[list[str]]:
    """Return the modules of each pipeline stage, as torchtitan's models name them."""
    spans = stage_spans(job.spec.layer_count, job.degrees.pp)
    parts = [[f"layers.{layer}" for layer in span] for span in spans]
    parts[0].insert(0, "tok_embeddings")
    parts[-1] += ["norm", "output"]
    return parts


def _recomputed(job: Job, missing: list[str]) -> Mapping[str, str]:
    if job.recipe.recompute == "selective":
        missing.append("recomputing norms and activation functions alone: op keeps attention and every second product")
        return {"mode": "selective", "selective_ac_option": "op"}
    return {"mode": job.recipe.recompute}
