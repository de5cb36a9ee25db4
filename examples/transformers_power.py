"""Train a small Llama of transformers with power attention, and let it write.

Usage: python examples/transformers_power.py [STEPS]
Prints the training loss, a text, and the bytes of its constant cache at several contexts.
Default: 80 steps
"""

from __future__ import annotations

from script import imports, run

with imports():
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    from powerplan.models import PowerCache, use_power_attention
    from powerplan.units import format_bytes, parse_integer

WINDOW = 128
"""Tokens of one training sequence."""

TEXT = "the past folds into a state of constant size, and every token costs the same. " * 8
"""What the model learns to write."""


def build() -> LlamaForCausalLM:
    """Return a small Llama over bytes, with gated power attention in every layer."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=65_536,
        pad_token_id=0,
        eos_token_id=None,
    )
    return use_power_attention(LlamaForCausalLM(config), p=2, gated=True)


def train(model: LlamaForCausalLM, steps: int) -> None:
    """Train on TEXT and print the loss about five times."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = torch.tensor(list(TEXT.encode()))
    print("  step    loss")
    for step in range(steps + 1):
        starts = torch.randint(len(text) - WINDOW, (8,)).tolist()
        batch = torch.stack([text[start : start + WINDOW] for start in starts])
        loss = model(batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % max(steps // 4, 1) == 0:
            print(f"{step:6,}  {loss.item():6.3f}")


def main(steps: str = "80") -> None:
    last = parse_integer(steps, "STEPS", 0, 10**6)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # The matrices are too small for several threads.
    model = build()
    count = sum(weight.numel() for weight in model.parameters())
    print(f"Llama, {count:,} parameters, attn_implementation={model.config._attn_implementation!r}, p=2, gated\n")
    train(model, last)
    model.eval()
    prompt = torch.tensor([list(b"the past folds")])
    out = model.generate(prompt, max_new_tokens=64, do_sample=False, cache=PowerCache(model))
    print(f"\n> {bytes(out[0].tolist()).decode()}\n")
    print("  tokens      PowerCache    keys and values")
    for tokens in (100, 1_000, 10_000):
        power, softmax = cache_bytes(model, tokens)
        print(f"{tokens:8,}    {format_bytes(power):>12}    {format_bytes(softmax):>15}")


@torch.no_grad()
def cache_bytes(model: LlamaForCausalLM, tokens: int) -> tuple[int, int]:
    """Return the bytes of a PowerCache and of a DynamicCache after a prompt of `tokens` tokens."""
    power, softmax = PowerCache(model), DynamicCache(config=model.config)
    prompt = torch.randint(128, (1, tokens))
    for cache in (power, softmax):
        model(prompt, cache=cache, logits_to_keep=1)
    return power.nbytes, sum(layer.keys.nbytes + layer.values.nbytes for layer in softmax.layers)


if __name__ == "__main__":
    run(main, __doc__)
