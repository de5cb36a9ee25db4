"""Weights and optimizer states that may be sharded over ranks: whole in a checkpoint, whatever ranks read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(state: Any) -> Any:
    """Return a state dict with whole tensors. Every rank calls it, as shards are gathered."""
    if isinstance(state, dict):
        return {name: whole(value) for name, value in state.items()}
    return state.full_tensor() if isinstance(state, DTensor) else state


def load_model(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load whole weights into a model, sharded or not. Raises what load_state_dict raises."""
    own = model.state_dict()
    model.load_state_dict({name: _like(value, own.get(name)) for name, value in state.items()})


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Load whole states into an optimizer of parameters that may be sharded. Raises what load_state_dict raises."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = {
        number: {name: _like(value, parameters[number]) for name, value in own.items()}
        for number, own in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": states})


def _like(value: Any, own: Tensor | None) -> Any:
    """Return a value sharded as `own` is. Numbers, such as the count of steps, and tensors of others stay whole."""
    if not isinstance(own, DTensor) or not isinstance(value, Tensor) or value.shape != own.shape:
        return value
    # Every rank has read the whole value, so that none is sent.
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)
