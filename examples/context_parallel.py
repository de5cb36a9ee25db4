"""Train one layer of power attention on sequences that lie on several processes.

The first tokens of a sequence state a value for each key, the last ones ask for it. Of two
processes one has all statements and the other all questions: what it answers came as a state.
Usage: torchrun --nproc-per-node 2 examples/context_parallel.py [STEPS]
Without torchrun one process has all. Default: 60 steps
"""

from __future__ import annotations

import os

from script import imports, run

with imports():
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F  # noqa: N812
    from torch import Tensor, nn

    from powerplan.kernels import ContextParallel, power_attention
    from powerplan.units import parse_integer

PAIRS = 32  # keys, each stated once with a value, and asked for once
VALUES = 16  # values that a key can have; one more stands for a question
WIDTH = 64  # features of a token
HEADS, HEAD_DIM = 2, 16  # heads, and the features of their queries, keys and values
BATCH = 16  # sequences of a training step


class Recall(nn.Module):
    """Embeddings, one layer of power attention, and a linear map to the logits of the values."""

    def __init__(self, plan: ContextParallel) -> None:
        super().__init__()
        self.plan, self.norm = plan, nn.RMSNorm(WIDTH)
        self.keys, self.values = nn.Embedding(PAIRS, WIDTH), nn.Embedding(VALUES + 1, WIDTH)
        self.qkv, self.gate = nn.Linear(WIDTH, 3 * HEADS * HEAD_DIM), nn.Linear(WIDTH, HEADS)
        self.out, self.head = nn.Linear(HEADS * HEAD_DIM, WIDTH), nn.Linear(WIDTH, VALUES)
        nn.init.constant_(self.gate.bias, 6.0)  # sigmoid(6) = 0.998: nearly everything is kept at first.

    def forward(self, keys: Tensor, values: Tensor) -> Tensor:
        """Return the logits [B, t, VALUES] of this process's tokens, keys and values [B, t]."""
        x = self.norm(self.keys(keys) + self.values(values))
        q, k, v = (part.unflatten(-1, (HEADS, HEAD_DIM)) for part in self.qkv(x).chunk(3, -1))  # [B, t, H, d] each
        attended = power_attention(q, k, v, F.logsigmoid(self.gate(x)), p=2, cp=self.plan)
        assert isinstance(attended, Tensor)  # With return_state=True it would be a tuple.
        return self.head(x + self.out(attended.flatten(-2)))  # type: ignore[no-any-return]


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Return keys, values and answers of whole sequences, [B, 2 PAIRS] each; no answer is -100."""
    stated, asked = torch.rand(2, BATCH, PAIRS).argsort(-1)
    values = torch.randint(VALUES, stated.shape)
    answers = values.gather(1, stated.argsort(-1)).gather(1, asked)
    question, nothing = torch.full_like(values, VALUES), torch.full_like(values, -100)
    return torch.cat((stated, asked), 1), torch.cat((values, question), 1), torch.cat((nothing, answers), 1)


def main(steps: str = "60") -> None:
    last = parse_integer(steps, "STEPS", 0, 10**6)
    torch.set_num_threads(1)
    if "RANK" not in os.environ:  # which torchrun sets
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    dist.init_process_group("gloo")  # nccl, on GPUs
    torch.manual_seed(0)  # The same weights, and the same sequences, in each process.
    plan = ContextParallel(tokens=2 * PAIRS)
    model = Recall(plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if plan.rank == 0:
        sent = plan.exchanged_bytes(HEADS, HEAD_DIM, batch=BATCH)
        print(f"{plan}\nIt sends {sent:,} bytes a pass.\n\n  step   loss    right")
    for step in range(last + 1):
        keys, values, answers = map(plan.shard, batch())
        logits, answers = model(keys, values).flatten(0, 1), answers.flatten()
        loss = F.cross_entropy(logits, answers, reduction="sum") / (BATCH * PAIRS)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for weight in model.parameters():  # The loss is this process's share: shares are summed, and so are gradients.
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            dist.all_reduce(weight.grad)
        optimizer.step()
        right = (logits.argmax(-1) == answers).sum() / (BATCH * PAIRS)
        dist.all_reduce(both := torch.stack((loss.detach(), right)))
        if plan.rank == 0 and step % max(last // 10, 1) == 0:
            print(f"{step:6,}  {both[0].item():5.3f}  {both[1].item():6.1%}  {'#' * round(40 * both[1].item())}")
    dist.destroy_process_group()


if __name__ == "__main__":
    run(main, __doc__)
