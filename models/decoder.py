"""The language model around the layers: embeddings, final norm, LM head."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from powerplan.errors import InputError
from powerplan.models.cache import Cache, Slot
from powerplan.models.layers import ResidualLayer, build_norm
from powerplan.spec import ModelSpec

STANDARD_DEVIATION = 0.02
"""Of weights, as in GPT-2 (Radford et al. 2019, section 2.3), which also divides the last ones of a branch by
sqrt(2 layers)."""


class Decoder(nn.Module):
    """A decoder-only language model: tokens [B, T] -> logits [B, T, V]. Made by `build_model`."""

    def __init__(self, spec: ModelSpec, layers: Iterable[ResidualLayer], **settings: Any) -> None:
        super().__init__()
        hidden = spec.hidden_size
        self.spec = spec
        self.embedding = nn.Embedding(spec.vocab_size, hidden, **settings)
        table = spec.position_embeddings
        self.positions = None if table is None else nn.Embedding(table, hidden, **settings)
        self.embedding_norm = build_norm(spec.norm, hidden, **settings) if spec.norm.embedding else None
        self.layers = nn.ModuleList(layers)
        self.final_norm = build_norm(spec.norm, hidden, **settings) if spec.norm.final else None
        self.lm_head = nn.Linear(hidden, spec.vocab_size, bias=False, **settings)
        self._tie()
        self.register_load_state_dict_post_hook(Decoder._tie)  # type: ignore[no-untyped-call]

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Return the logits [B, T, V] of the token after each of `tokens` [B, T].

        With a cache, the tokens follow those that it remembers, and it remembers them too. Raises InputError where they
        outgrow the table of learned positions.
        """
        slots: list[Slot | None] = [None] * len(self.layers)
        seen = 0
        if cache is not None:
            cache.slots = cache.slots or [Slot() for _ in self.layers]
            slots, seen = list(cache.slots), cache.tokens
        x = self.embedding(tokens)
        if self.positions is not None:
            last = seen + tokens.shape[1]
            if last > self.positions.num_embeddings:
                table = self.positions.num_embeddings
                raise InputError(f"{last:,} tokens do not fit the {table:,} learned positions of {self.spec.name}")
            x = x + self.positions(torch.arange(seen, last, device=tokens.device))
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        for layer, slot in zip(self.layers, slots, strict=True):
            x = layer(x, slot)
        if self.final_norm is not None:
            x = self.final_norm(x)
        logits: Tensor = self.lm_head(x)
        return logits

    def _apply(self, fn: Any, recurse: bool = True) -> Decoder:
        """Change all tensors by `fn`, as to, to_empty and others do; what leaves the meta device is tied again."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._tie()
        return self

    def _tie(self, *_: Any) -> None:
        if self.spec.tie_embeddings:
            self.lm_head.weight = self.embedding.weight

    def loss(self, tokens: Tensor) -> Tensor:
        """Return the cross entropy [B, T - 1] in nats of each token after the first, given those before it."""
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.transpose(1, 2).float(), tokens[:, 1:], reduction="none")

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all weights anew, in place: matrices normal with 0.02, those that end a branch less, norms 1.

        Modules with weights of another kind (decays, convolutions, sinks, experts) have an `init_weights` of their own.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=STANDARD_DEVIATION)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(std=STANDARD_DEVIATION)
            elif isinstance(module, (nn.RMSNorm, nn.LayerNorm)):
                module.reset_parameters()
        for module in self.modules():
            own = getattr(module, "init_weights", None)
            if module is not self and own is not None:
                own(STANDARD_DEVIATION)
        shrink = 1 / math.sqrt(2 * len(self.layers))
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", ".down.weight", "experts.down")):
                weight.mul_(shrink)
