"""Compare the kernels of an installed flash-linear-attention with the signatures that tests hold calls to.

Usage: python scripts/fla_signatures.py tests/data/fla_signatures.json [--write]
Where flash-linear-attention and triton are installed: they are no dependency of the tests. Prints every difference and
exits with 1 if there are any. With --write, the file is written anew.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

KERNELS = (
    "fla.ops.delta_rule.chunk_delta_rule",
    "fla.ops.gated_delta_rule.chunk_gated_delta_rule",
    "fla.ops.kda.chunk_kda",
    "fla.ops.gla.chunk_gla",
    "fla.ops.simple_gla.chunk_simple_gla",
    "fla.ops.rwkv7.chunk_rwkv7",
    "fla.ops.gsa.chunk_gsa",
    "fla.ops.forgetting_attn.parallel_forgetting_attn",
)
"""What models/mixers/fla.py calls."""


def parameters(kernel: Callable[..., Any]) -> str:
    """Return the parameters of a function in order, with defaults and without types: "q, k, scale=None"."""
    signature = inspect.signature(kernel)
    plain = [part.replace(annotation=part.empty) for part in signature.parameters.values()]
    return str(inspect.Signature(plain))[1:-1]


def main() -> None:
    """Compare, and write the file if asked to."""
    path = Path(sys.argv[1])
    found = {}
    for name in KERNELS:
        module, _, function = name.rpartition(".")
        found[name] = parameters(getattr(importlib.import_module(module), function))
    if "--write" in sys.argv[2:]:
        data = {"made_with": f"fla-core {version('fla-core')}, scripts/fla_signatures.py", "signatures": found}
        path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        return
    data = json.loads(path.read_text(encoding="utf-8"))
    known = data["signatures"]
    changed = [name for name in sorted(found.keys() | known.keys()) if found.get(name) != known.get(name)]
    for name in changed:
        sys.stdout.write(f"{name}\n  file:      {known.get(name)}\n  installed: {found.get(name)}\n")
    if changed:
        sys.exit(1)
    sys.stdout.write(f"fla-core {version('fla-core')}: {len(found)} kernels as in {path} ({data['made_with']})\n")


if __name__ == "__main__":
    main()
