"""The words that parameters and options may be, each list in one place."""

from __future__ import annotations

from typing import Final, Literal

Causal = Literal["exact", "full"]
Form = Literal["recurrent", "chunked"]
Dtype = Literal["fp32", "bf16", "fp16", "fp8", "int4"]
By = Literal["component", "layer"]
Twin = Literal["mla", "attention"]
Engine = Literal["vllm", "sglang"]
Keep = Literal["weights", "flops"]
Side = Literal["weights", "state"]
Unknown = Literal["context", "window", "p"]
Format = Literal["table", "json", "csv", "markdown"]
Optimizer = Literal["adamw", "adamw-8bit", "muon"]
Recompute = Literal["none", "selective", "full"]
Loss = Literal["whole", "chunked"]
Master = Literal["fp32", "none"]
Kernels = Literal["fused", "torch"]
TrainingDtype = Literal["bf16", "fp16", "fp32"]
MatmulsDtype = Literal["fp8"]
Schedule = Literal["1f1b", "dualpipe"]
Trainer = Literal["torchtitan", "megatron"]

LM_HEAD: Final = "lm-head"
"""The word of `exclude` for the FLOPs of the LM head."""
