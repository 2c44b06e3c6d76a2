"""From a trained model to the adapter that is served."""

from __future__ import annotations

import torch
from torch import Tensor

from fathom.models.adapters import Adapter
from fathom.training.model import ExitHead, ShallowDeep


def export(model: ShallowDeep, token_ids: Tensor, metadata: dict[str, str]) -> Adapter:
    """What was trained beside the model's own weights, as it is served: bfloat16, on the CPU."""
    first = model.shape.exit_layer
    layers = {
        f"{first + index}.{name}": _served(tensor)
        for index, layer in enumerate(model.branch)
        for name, tensor in layer.state_dict().items()
    }
    head: ExitHead = model.head
    return Adapter(
        exit_layer=first,
        exit_layers=model.shape.exit_layers,
        norm=_served(head.norm_weight),
        head_adapter=None if head.adapter is None else _served(head.adapter),
        token_ids=token_ids.cpu(),
        layers=layers,
        lora=_lora(model),
        metadata=metadata,
    )


def _served(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.bfloat16).contiguous()


def _lora(model: ShallowDeep) -> dict[str, tuple[Tensor, Tensor]]:
    """(A, B) by the name of the weight that they change; peft's scaling goes into B."""
    if model.shape.tune != "lora":
        return {}
    scale = model.shape.lora_alpha / model.shape.lora_rank
    found: dict[str, tuple[Tensor, Tensor]] = {}
    state = {name: p for name, p in model.base.named_parameters() if "lora_" in name}
    for name, a in state.items():
        if "lora_A" not in name:
            continue
        stem = name[name.index("model.layers.") : name.index(".lora_A")]
        b = state[name.replace("lora_A", "lora_B")]
        found[f"{stem}.weight"] = _served(a), _served(b * scale)
    return found
