"""One decoding step after contexts of 1k to 64k tokens, interleaved in one process: the time must not depend on them.

Usage: python benchmarks/decode_flat.py [RESULT.json]
"""

from __future__ import annotations

import statistics
import sys
import time
from datetime import UTC, datetime

import torch

from powerplan.kernels import PowerState, power_attention, power_attention_step
from support.files import print_result

CONTEXTS = (1024, 4096, 16_384, 65_536)


def main() -> int:
    torch.manual_seed(0)
    states: dict[int, PowerState] = {}
    times: dict[int, list[float]] = {tokens: [] for tokens in CONTEXTS}
    with torch.no_grad():
        for tokens in CONTEXTS:
            q, k, v = (torch.randn(1, tokens, 4, 64) for _ in range(3))
            _, states[tokens] = power_attention(q, k, v, return_state=True)
        q, k, v = (torch.randn(1, 4, 64) for _ in range(3))
        for _ in range(60):
            for tokens, state in states.items():
                start = time.perf_counter()
                power_attention_step(q, k, v, None, state)
                times[tokens].append(time.perf_counter() - start)
    result = {
        "schema": "powerplan.decode-flat/1",
        "date": datetime.now(UTC).date().isoformat(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "median_us": {str(tokens): round(statistics.median(own) * 1e6, 1) for tokens, own in times.items()},
    }
    print_result(result, next(iter(sys.argv[1:]), None))
    return 0


if __name__ == "__main__":
    sys.exit(main())
