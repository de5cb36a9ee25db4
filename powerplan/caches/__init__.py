"""The state of sequences that are served: budgets, prompts in chunks, checkpoints, what engines allocate."""

from __future__ import annotations
