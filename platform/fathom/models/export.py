"""A model's shallow path and exit head as a checkpoint of their own: a draft model for others.

What another engine calls a draft model is a decoder with a head. The shallow path is one: k layers
of the model, M exit layers, an RMSNorm and W, but for the head's linear map A:

    logits = W @ norm(h + A @ h)

Greedy drafts want the largest logit alone, and RMSNorm divides a row by one positive number. With
norm weight g, and a norm of weight 1 left in the decoder,

    argmax W diag(g) (h + A h) / rms(h + A h) = argmax (W diag(g) (I + A)) h / rms(h)

so that the map goes into an LM head of the draft's own, and no greedy draft changes. The
probabilities do: they are those of another temperature, a different one in each row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fathom.models.adapters import Adapter
from fathom.models.config import ModelConfig, ModelError
from fathom.models.files import SINGLE_FILE, read_json, weight_files
from fathom.models.weights import WeightFiles

EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
_OTHER_FILES = ("*.json", "*.jinja", "tokenizer.model")


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft model in memory.

    Attributes:
        config: what ``config.json`` says. tensors: by their names in the model, in float32.
        exit_layer, exit_layers: k and M; the draft has k + M layers.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    exit_layer: int
    exit_layers: int


def draft_of(directory: Path, adapter: Adapter | None, exit_layer: int) -> Draft:
    """The shallow path and the exit head of a model as a model.

    Args:
        directory: of the model, from ``resolve_model``.
        adapter: what was trained for early exits, or None for the model's own norm and LM head.
        exit_layer: k, layers that the draft shares with the model: 1 to the model's less one.

    Raises:
        ModelError: if the adapter changes the model's own layers or does not fit it, if it was
            trained for another exit layer, or for a missing or damaged file.
    """
    config = ModelConfig.from_directory(directory)
    if not 1 <= exit_layer < config.num_layers:
        raise ModelError(
            f"exit_layer must be from 1 to {config.num_layers - 1}, the model's layers less one, "
            f"got {exit_layer}."
        )
    if adapter is not None:
        _check(adapter, config, exit_layer)
    files = WeightFiles(directory)
    width, table = config.hidden_size, (config.vocab_size, config.hidden_size)
    tensors = {EMBEDDING: files.tensor(EMBEDDING, table, torch.float32)}
    tensors |= _shared_layers(directory, exit_layer)
    if adapter is not None:
        tensors |= _exit_layers(adapter, tensors)
    tied = config.tie_word_embeddings
    head = tensors[EMBEDDING] if tied else files.tensor(HEAD, table, torch.float32)
    norm = files.tensor(NORM, (width,), torch.float32) if adapter is None else adapter.norm.float()
    if adapter is not None and adapter.head_adapter is not None:
        head, norm, tied = _folded(head, norm, adapter.head_adapter), torch.ones(width), False
    tensors[NORM] = norm
    if not tied:
        tensors[HEAD] = head
    extra = 0 if adapter is None else adapter.exit_layers
    raw = read_json(directory / "config.json")
    return Draft(_config(raw, exit_layer + extra, tied), tensors, exit_layer, extra)


def _shared_layers(directory: Path, exit_layer: int) -> dict[str, Tensor]:
    """Every tensor of the model's first layers, biases and norms included, in float32."""
    found: dict[str, Tensor] = {}
    for file in weight_files(directory):
        with safe_open(file, framework="pt") as reader:
            for name in reader.keys():  # noqa: SIM118
                if name.startswith("model.layers.") and int(name.split(".")[2]) < exit_layer:
                    found[name] = reader.get_tensor(name).float()
    return found


def _check(adapter: Adapter, config: ModelConfig, exit_layer: int) -> None:
    if adapter.changes_model:
        raise ModelError(
            "adapter: it changes the model's own layers (LoRA), so the model that would verify its "
            "drafts is another one than the one it was trained on; use one made with --tune exit."
        )
    if adapter.exit_layer != exit_layer:
        raise ModelError(
            f"exit_layer must be {adapter.exit_layer}, where the adapter was trained to exit, got "
            f"{exit_layer}; without an adapter any will do."
        )
    if len(adapter.norm) != config.hidden_size:
        raise ModelError(
            f"the adapter is for hidden size {len(adapter.norm)}, the model has "
            f"{config.hidden_size}: use the adapter that was trained for this model."
        )


def _exit_layers(adapter: Adapter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's layers, each with all the tensors that the model's first layer has."""
    found = {f"model.layers.{name}": tensor.float() for name, tensor in adapter.layers.items()}
    first = "model.layers.0."
    shapes = {n.removeprefix(first): t.shape for n, t in tensors.items() if n.startswith(first)}
    for index in range(adapter.exit_layer, adapter.exit_layer + adapter.exit_layers):
        for rest, shape in shapes.items():
            tensor = found.get(f"model.layers.{index}.{rest}")
            if tensor is None or tensor.shape != shape:
                state = "missing" if tensor is None else f"of shape {list(tensor.shape)}"
                raise ModelError(
                    f"adapter: tensor 'model.layers.{index}.{rest}' is {state}; the model calls "
                    f"for {list(shape)}: use the adapter that was trained for this model."
                )
    return found


def _folded(head: Tensor, norm: Tensor, linear: Tensor) -> Tensor:
    """W diag(g) (I + A) in float32: head [V, d], norm g [d], linear A [d, d]."""
    scaled = head * norm
    return torch.addmm(scaled, scaled, linear.float())


def _config(raw: dict[str, Any], layers: int, tied: bool) -> dict[str, Any]:
    config = {**raw, "num_hidden_layers": layers, "tie_word_embeddings": tied}
    kinds = config.get("layer_types")
    if kinds:  # one for each layer; beyond the model's own, as its last
        config["layer_types"] = [kinds[min(i, len(kinds) - 1)] for i in range(layers)]
    return config


def write_model(draft: Draft, out: Path, dtype: torch.dtype) -> None:
    """Write ``config.json`` and the weights of a draft; its tokenizer is another's affair.

    Args:
        out: an existing folder. dtype: of the weights in the file.
    """
    config = {**draft.config, "dtype": str(dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)  # the name that older files give it
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in draft.tensors.items()}
    _save(tensors, out / SINGLE_FILE)


def copy_model(directory: Path, out: Path, dtype: torch.dtype) -> None:
    """Write a model's directory anew, its weights in another type.

    Args:
        directory: in Hugging Face form. out: an existing folder. dtype: of the weights.

    Raises:
        ModelError: if a weights file is missing.
    """
    for file in weight_files(directory):
        _save({name: t.to(dtype) for name, t in load_file(file).items()}, out / file.name)
    copy_other_files(directory, out)
    config = {**read_json(out / "config.json"), "dtype": str(dtype).removeprefix("torch.")}
    config.pop("torch_dtype", None)
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def copy_other_files(directory: Path, out: Path, *, but: tuple[str, ...] = ()) -> None:
    """Copy what a model's directory holds beside weights: tokenizer, template, configuration.

    Args:
        but: names of files to leave out.
    """
    for pattern in _OTHER_FILES:
        for file in sorted(directory.glob(pattern)):
            if file.name not in but:
                (out / file.name).write_bytes(file.read_bytes())


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors makes files that only their owner reads
