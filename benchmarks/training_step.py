"""A training step as `train --measured` predicts it, beside one that is run: small models on the local CPU.

For each mixer the layer of a small model is profiled, a step is predicted from that file, and whole steps (forward,
loss, backward, fused AdamW) are timed right after. What counts is their ratio: both come from the same minutes.

Usage: python benchmarks/training_step.py [RESULT.json]
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import powerplan
from powerplan.dump import spec_to_yaml
from powerplan.ffn import MLP
from powerplan.mixers import Attention
from powerplan.models import build_model
from powerplan.spec import LayerGroup, ModelSpec
from powerplan.swap import with_mixer

CONTEXTS = (1024, 4096)
MIXERS = ("attention", "window:512", "power:p=2")
STEPS = 5
PROFILE_LIMIT = "20s"


def small_model(mixer: str) -> ModelSpec:
    """Return a model of 6 layers of 384, 15.5M parameters, that trains in seconds a step."""
    base = ModelSpec(
        name="small",
        vocab_size=8192,
        hidden_size=384,
        tie_embeddings=True,
        layers=(
            LayerGroup(repeat=6, mixer=Attention(heads=6, head_dim=64), ffn=MLP(intermediate_size=1536, gated=False)),
        ),
    )
    return with_mixer(base, mixer)[0]


def profiled(spec: ModelSpec, context: int, folder: Path) -> Path:
    """Return the saved profile of the training pass of a model's layers."""
    model, saved = folder / "model.yaml", folder / f"{spec.mixers()[0].family}-{context}.json"
    model.write_text(spec_to_yaml(spec), encoding="utf-8")
    options = ["--ctx", str(context), "--pass", "train", "--dtype", "fp32", "--device", "cpu", "--against", "softmax"]
    command = [sys.executable, "-m", "powerplan", "profile", str(model), *options]
    subprocess.run([*command, "--time-limit", PROFILE_LIMIT, "--save", str(saved)], check=True, capture_output=True)
    return saved


def predicted_s(spec: ModelSpec, context: int, saved: Path) -> tuple[float, dict[str, float]]:
    """Return the seconds of a step that `train` predicts, and its parts."""
    answer = powerplan.train(
        spec, context, tokens=context, measured=str(saved), dtype="fp32", batch_tokens=context, micro_batch=1
    )
    step = answer.plan.layout.step
    parts = {
        "weights": step.weights_s,
        "mixers": step.attention_s + step.recurrent_s,
        "head": step.head_s,
        "update": step.update_s,
    }
    return step.seconds, parts


def measured_s(spec: ModelSpec, context: int) -> float:
    """Return the median seconds of a step of one sequence; the first two steps are not counted."""
    torch.manual_seed(0)
    model = build_model(spec)
    model.init_weights()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(spec.vocab_size, (1, context + 1))
    times = []
    for _ in range(STEPS + 2):
        start = time.perf_counter()
        torch.autograd.backward(model.loss(tokens).mean())
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def main() -> int:
    rows: list[dict[str, Any]] = []
    device = ""
    with tempfile.TemporaryDirectory() as name:
        for mixer in MIXERS:
            spec = small_model(mixer)
            for context in CONTEXTS:
                saved = profiled(spec, context, Path(name))
                device = json.loads(saved.read_text(encoding="utf-8"))["device"]
                predicted, parts = predicted_s(spec, context, saved)
                measured = measured_s(spec, context)
                rows.append(
                    {
                        "mixer": mixer,
                        "context": context,
                        "predicted_s": predicted,
                        "measured_s": measured,
                        "predicted_over_measured": predicted / measured,
                        "predicted_parts_s": parts,
                    }
                )
                print(f"{mixer:12} {context:6,}  {predicted:7.3f} s predicted, {measured:7.3f} s measured", flush=True)
    result = {
        "schema": "powerplan.training-step/1",
        "date": datetime.now(UTC).date().isoformat(),
        "device": device,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "results": rows,
    }
    text = json.dumps(result, indent=2)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(f"{text}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
