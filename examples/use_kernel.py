"""Use the power attention kernel in a layer of your own, with projections and gates; train it.

The model reads 32 pairs of a key and a value. Then it must name the value of each key.
Usage: python examples/use_kernel.py [STEPS]
Prints loss and accuracy. Default: 40 steps
"""

from __future__ import annotations

import math

from script import imports, run

with imports():
    import torch
    import torch.nn.functional as F  # noqa: N812
    from torch import Tensor, nn

    from powerplan.dims import spow_dim
    from powerplan.kernels import power_attention
    from powerplan.units import parse_integer

PAIRS = 32  # keys, each stated once with a value
VALUES = 16  # values that a key can have
WIDTH = 64  # features of a token
HEADS, HEAD_DIM = 2, 16  # heads, and the features of their queries, keys and values
BATCH = 16  # sequences of a training step


class PowerLayer(nn.Module):
    """[B, T, WIDTH] -> [B, T, WIDTH]: the projections of softmax attention, and one gate for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * HEADS * HEAD_DIM)
        self.gate = nn.Linear(WIDTH, HEADS)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH)
        nn.init.constant_(self.gate.bias, 6.0)  # sigmoid(6) = 0.998: nearly everything is kept at first.

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, HEAD_DIM)) for part in self.qkv(x).chunk(3, -1))  # [B, T, H, d] each
        log_g = F.logsigmoid(self.gate(x))  # [B, T, H], at most 0
        attended = power_attention(q, k, v, log_g, p=2)
        out: Tensor = self.out(attended.flatten(-2))
        return out


class Recall(nn.Module):
    """Embeddings of keys and values, one PowerLayer, and a linear map to the logits of the values."""

    def __init__(self) -> None:
        super().__init__()
        self.keys, self.values = nn.Embedding(PAIRS, WIDTH), nn.Embedding(VALUES, WIDTH)
        self.norm, self.layer, self.head = nn.RMSNorm(WIDTH), PowerLayer(), nn.Linear(WIDTH, VALUES)

    def forward(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        """Return the logits [B, Q, VALUES] of the values that belong to the keys `queries` [B, Q]."""
        x = torch.cat((self.keys(keys) + self.values(values), self.keys(queries)), 1)
        logits: Tensor = self.head(self.layer(self.norm(x)))
        return logits[:, keys.shape[1] :]


def main(steps: str = "40") -> None:
    last = parse_integer(steps, "STEPS", 0, 10**6)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # The matrices are too small for several threads.
    model = Recall()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    count, state = sum(weight.numel() for weight in model.parameters()), spow_dim(HEAD_DIM, 2)
    print(f"{PAIRS} pairs, then {PAIRS} keys: which value stood beside each?")
    print(f"one layer of power attention, p=2, gated, {HEADS} heads of {HEAD_DIM}; {count:,} parameters")
    print(f"its memory: {HEADS} x {state} x {HEAD_DIM + 1} numbers, whatever the context\n")
    print("  step   loss    right")
    for step in range(last + 1):
        keys, queries = torch.rand(2, BATCH, PAIRS).argsort(-1)
        values = torch.randint(VALUES, keys.shape)
        targets = values.gather(1, keys.argsort(-1)).gather(1, queries)
        logits = model(keys, values, queries)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if step % max(last // 10, 1) == 0:
            right = (logits.argmax(-1) == targets).float().mean().item()
            print(f"{step:6,}  {loss.item():5.3f}  {right:6.1%}  {'#' * round(40 * right)}")
    print(f"\nguessing: {math.log(VALUES):.3f}, {1 / VALUES:.1%}")


if __name__ == "__main__":
    run(main, __doc__)
