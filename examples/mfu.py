"""Train a small model; print the FLOPs of each step, and their share of the machine's peak (MFU).

Usage: python examples/mfu.py [STEPS]
The peak: the catalogue's for a GPU; that of a matrix product, measured now, for a CPU.
Default: 5 steps
"""

from __future__ import annotations

import time

from script import imports, run

with imports():
    import torch
    import torch.nn.functional as F  # noqa: N812

    from powerplan import ModelSpec, flops_per_step
    from powerplan.ffn import MLP
    from powerplan.mixers import Attention, Power
    from powerplan.models import build_model
    from powerplan.profile.machine import default_dtype, examine, resolve_device
    from powerplan.profile.runs import torch_dtype
    from powerplan.spec import LayerGroup
    from powerplan.units import format_quantity, parse_integer

CONTEXT = 512  # tokens of a sequence
SEQUENCES = 4  # sequences of a step
MLP_BLOCK = MLP(intermediate_size=512)
LAYERS = (
    LayerGroup(mixer=Attention(heads=4, kv_heads=2, head_dim=32), ffn=MLP_BLOCK),
    LayerGroup(mixer=Power(p=2, heads=4, kv_heads=2, head_dim=32, gated=True), ffn=MLP_BLOCK),
)
SPEC = ModelSpec(name="small", vocab_size=256, hidden_size=128, layers=LAYERS)


def main(steps: str = "5") -> None:
    last = parse_integer(steps, "STEPS", 1, 10**6)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # The matrices are too small for several threads.
    device = resolve_device("auto")
    dtype = default_dtype(device)
    peak = examine(device, dtype).peak
    print(f"peak: {format_quantity(peak.flops_per_s, 'FLOP/s')} ({peak.kind}; {peak.name})\n")
    print("  step   loss   FLOPs per step    MFU")

    model = build_model(SPEC, device=device, dtype=torch_dtype(dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.arange(CONTEXT + 1, device=device).expand(SEQUENCES, -1) % 100  # Counting: easy to learn.
    for step in range(1, last + 1):
        start = time.perf_counter()
        loss = F.cross_entropy(model(text[:, :-1]).float().flatten(0, 1), text[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
        value = loss.item()  # On a GPU this waits for the step to end.
        flops = flops_per_step(SPEC, CONTEXT, sequences=SEQUENCES)
        mfu = float(flops / peak.flops_per_s) / (time.perf_counter() - start)
        print(f"{step:6,}  {value:5.3f}  {flops:15,}  {mfu:6.2%}")

    packed = flops_per_step(SPEC, CONTEXT, lengths=[300, 200, 12] * SEQUENCES)
    print(f"\nthe same tokens, packed from documents of 300, 200 and 12: {packed:,} FLOPs per step")


if __name__ == "__main__":
    run(main, __doc__)
