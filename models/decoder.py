"""The language model around the layers: embeddings, final norm, LM head.

Shapes: B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from powerplan.errors import InputError
from powerplan.models.cache import Cache, Slot
from powerplan.models.layers import ResidualLayer, ValueResidualLayer, build_norm
from powerplan.models.mixers.base import check_plan
from powerplan.spec import ModelSpec

if TYPE_CHECKING:
    from powerplan.kernels import ContextParallel

INIT_STD = 0.02
"""Standard deviation of the first weights, as in GPT-2 (Radford et al. 2019, section 2.3)."""


class Decoder(nn.Module):
    """A decoder-only language model: tokens [B, T] -> logits [B, T, V]. `build_model` makes one.

    Args:
        spec: The model that `layers` belong to.
        layers: Its residual layers in order, as `build_layer` makes them.
        **factory_kwargs: device and dtype of the other weights.
    """

    def __init__(self, spec: ModelSpec, layers: Iterable[ResidualLayer], **factory_kwargs: Any) -> None:
        super().__init__()
        hidden_size = spec.hidden_size
        self.spec = spec
        self.embedding = nn.Embedding(spec.vocab_size, hidden_size, **factory_kwargs)
        table = spec.position_embeddings
        self.positions = None if table is None else nn.Embedding(table, hidden_size, **factory_kwargs)
        self.embedding_norm = build_norm(spec.norm, hidden_size, **factory_kwargs) if spec.norm.embedding else None
        self.layers = nn.ModuleList(layers)
        self.hand_values = {at for at, layer in enumerate(self.layers) if isinstance(layer, ValueResidualLayer)}
        self.final_norm = build_norm(spec.norm, hidden_size, **factory_kwargs) if spec.norm.final else None
        self.lm_head = nn.Linear(hidden_size, spec.vocab_size, bias=False, **factory_kwargs)
        self._tie_embeddings()
        self.register_load_state_dict_post_hook(Decoder._tie_embeddings)  # type: ignore[no-untyped-call]

    def forward(self, tokens: Tensor, cache: Cache | None = None, cp: ContextParallel | None = None) -> Tensor:
        """Predict the token after each token.

        Args:
            tokens: Token ids [B, T], int64.
            cache: Memory of the tokens before these, to which these are added. None: there are none, and none are kept.
            cp: A plan of sequences that lie on several ranks. The tokens are then those of this rank, and so are the
                logits. A cache, which must be empty, remembers the tokens of all ranks afterwards, on every rank.

        Returns:
            Logits [B, T, V].

        Raises:
            InputError: `tokens` are no token ids [B, T]; there are more of them than learned positions; a mixer does
                not run over several ranks; or with a plan the cache is not empty, or the plan has packed sequences.
        """
        check_plan(cp)
        _check_tokens(tokens)
        slots: list[Slot | None] = [None] * len(self.layers)
        past_tokens = 0
        if cache is not None:
            cache.slots = cache.slots or [Slot() for _ in self.layers]
            slots, past_tokens = list(cache.slots), cache.tokens
        if cp is not None and tokens.shape[1] != cp.local_tokens:
            raise InputError(f"tokens: {tokens.shape[1]} a row, and rank {cp.rank} of the plan has {cp.local_tokens}")
        x = self.embedding(tokens)
        if self.positions is not None:
            total = past_tokens + tokens.shape[1] if cp is None else cp.layout.longest_sequence
            table = self.positions.num_embeddings
            if total > table:
                raise InputError(f"{total:,} tokens do not fit the {table:,} learned positions of {self.spec.name}")
            own = torch.arange(past_tokens, total, device=tokens.device) if cp is None else cp.positions(tokens.device)
            x = x + self.positions(own)
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        first_values: Tensor | None = None
        for index, (layer, slot) in enumerate(zip(self.layers, slots, strict=True)):
            if index in self.hand_values:
                x, first_values = layer(x, slot, cp, first_values)
            else:
                x = layer(x, slot) if cp is None else layer(x, slot, cp)
        if self.final_norm is not None:
            x = self.final_norm(x)
        logits: Tensor = self.lm_head(x)
        return logits

    def _apply(self, fn: Any, recurse: bool = True) -> Decoder:
        """Apply `fn` to all tensors, as `to` and `to_empty` do, and tie the embeddings again.

        A tensor that leaves the meta device is a new one, so embedding and LM head would no longer share it.
        """
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._tie_embeddings()
        return self

    def _tie_embeddings(self, *_: Any) -> None:
        if self.spec.tie_embeddings:
            self.lm_head.weight = self.embedding.weight

    def loss(self, tokens: Tensor, cp: ContextParallel | None = None) -> Tensor:
        """Return the cross entropy of each token after the first, given the tokens before it.

        Args:
            tokens: Token ids [B, T], int64.
            cp: A plan of T - 1 tokens over several ranks; each of them gives all tokens.

        Returns:
            Cross entropies [B, T - 1] in nats, float32; with a plan those of this rank's tokens.
        """
        check_plan(cp)
        _check_tokens(tokens)
        if tokens.shape[1] < 2:
            raise InputError(f"tokens: a loss needs at least 2 a row, and these have {tokens.shape[1]}")
        if cp is None:
            logits, targets = self(tokens[:, :-1]), tokens[:, 1:]
        else:
            logits, targets = self(cp.shard(tokens[:, :-1]), cp=cp), cp.shard(tokens[:, 1:])
        return F.cross_entropy(logits.transpose(1, 2).float(), targets, reduction="none")

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all weights anew, in place.

        Matrices are normal with standard deviation INIT_STD, norms 1, biases 0. Modules with weights of another kind
        (decays, convolutions, sinks, experts) have an `init_weights` of their own. The last matrices of each residual
        branch are divided by sqrt(2 layers), as in GPT-2 (Radford et al. 2019, section 2.3).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=INIT_STD)
                if module.bias is not None:
                    module.bias.zero_()
            elif isinstance(module, nn.Embedding):
                module.weight.normal_(std=INIT_STD)
            elif isinstance(module, (nn.RMSNorm, nn.LayerNorm, nn.GroupNorm)):
                module.reset_parameters()
        for module in self.modules():
            init_own_weights = getattr(module, "init_weights", None)
            if module is not self and init_own_weights is not None:
                init_own_weights(INIT_STD)
        branch_scale = 1 / math.sqrt(2 * len(self.layers))
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", ".down.weight", "experts.down")):
                weight.mul_(branch_scale)


def _check_tokens(tokens: Tensor) -> None:
    """Raise InputError unless these are token ids [B, T]."""
    if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
        given = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else f"a {type(tokens).__name__}"
        raise InputError(f"tokens must be token ids [B, T], int64, and are {given}")
