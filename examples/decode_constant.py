"""Time one more token after a long context, with a KV cache and with the state of power attention.

Usage: python examples/decode_constant.py [MODEL] [CONTEXTS]
Runs one layer of the model on this CPU and prints bytes and milliseconds.
Defaults: gpt2-small 1k,4k,16k
"""

from __future__ import annotations

import time

from script import imports, run

with imports():
    import torch

    from powerplan import load_model
    from powerplan.errors import InputError
    from powerplan.mixers import GroupedHeads
    from powerplan.models import Cache, Slot, build_layer
    from powerplan.swap import with_mixer
    from powerplan.units import format_bytes, parse_contexts

MIXERS = {"softmax, KV cache": "attention", "power p=2, state": "power:p=2"}
REPEATS = 30
"""Tokens that are decoded and timed one by one; the fastest time is printed."""
LONGEST = 65_536
"""The longest context, in tokens: attention over it takes minutes on one CPU thread."""


@torch.no_grad()
def decode(model: str, mixer: str, context: int) -> tuple[int, float]:
    """Return the bytes that the mixer of one layer keeps after `context` tokens, and the seconds for the next token."""
    spec = with_mixer(load_model(model).spec, mixer)[0]
    module, slot = build_layer(spec).mixer, Slot()
    assert module is not None
    torch.manual_seed(0)
    module(torch.randn(1, context, spec.hidden_size), slot)
    nbytes, seconds = Cache([slot]).nbytes, []
    for _ in range(REPEATS):
        token = torch.randn(1, 1, spec.hidden_size)
        start = time.perf_counter()
        module(token, slot)
        seconds.append(time.perf_counter() - start)
    return nbytes, min(seconds)


def main(model: str = "gpt2-small", contexts: str = "1k,4k,16k") -> None:
    spec, several = load_model(model).spec, parse_contexts(contexts, "CONTEXTS")
    if max(several) > LONGEST:
        raise InputError(f"{max(several):,} tokens take too long; {LONGEST:,} are the most", "CONTEXTS")
    uses = with_mixer(spec, MIXERS["softmax, KV cache"])[0].layer_uses()
    heads = next(use.layer.mixer for use in uses if isinstance(use.layer.mixer, GroupedHeads))
    torch.set_num_threads(1)  # One token is too little work for several threads.
    print(f"decoding with one layer of {spec.name}: {heads.heads} heads of {heads.head_dim}, float32, one CPU thread\n")
    print("          " + "".join(f"{name:>26}" for name in MIXERS))
    print("  context " + f"{'kept':>14}{'a token':>12}" * len(MIXERS))
    for context in several:
        line = f"{context:9,} "
        for mixer in MIXERS.values():
            nbytes, seconds = decode(model, mixer, context)
            line += f"{format_bytes(nbytes):>14}{1000 * seconds:9.2f} ms"
        print(line)
    print(f"\nkept: bytes after the context, of one sequence; a token: fastest of {REPEATS}, with projections")


if __name__ == "__main__":
    run(main, __doc__)
