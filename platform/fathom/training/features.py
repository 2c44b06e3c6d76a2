"""What the heads read, computed once where the encoder stays as it is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from fathom.models.classifier_files import Answers
from fathom.models.inputs import Rows
from fathom.models.multi_exit import MultiExit

_SHARD = 1024
_BATCH = 64


def by_size(rows: Rows, batch: int = _BATCH) -> Iterator[list[int]]:
    """Places of all rows in batches, shortest first, so that little is padding."""
    order = torch.argsort(rows.sizes, stable=True).tolist()
    for start in range(0, len(order), batch):
        yield order[start : start + batch]


@torch.inference_mode()
def cached_features(model: MultiExit, rows: Rows, folder: Path, *, show: bool = True) -> Tensor:
    """The features of every head for every row of a text encoder.

    They are kept in ``folder`` in pieces of 1,024 rows, under a name that depends on the rows and
    on the encoder's weights: an interrupted call goes on at the next piece.

    Returns:
        [n, M, d] float32.
    """
    model.eval()
    home = folder / digest_of(model.encoder, rows.digest())
    home.mkdir(parents=True, exist_ok=True)
    order = torch.argsort(rows.sizes, stable=True)
    found: Tensor | None = None
    bar = tqdm(total=len(rows), desc="features", unit="row", disable=not show)
    with bar:
        for number, places in enumerate(torch.split(order, _SHARD)):
            piece = _piece(model, rows, places.tolist(), home / f"{number:05d}.safetensors")
            if found is None:
                found = torch.empty(len(rows), *piece.shape[1:])
            found[places] = piece
            bar.update(len(places))
    assert found is not None, "no rows"
    return found


def _piece(model: MultiExit, rows: Rows, places: Sequence[int], file: Path) -> Tensor:
    """Features [len(places), M, d] of these rows, from the file if it is there."""
    try:
        return load_file(file)["features"]
    except (OSError, SafetensorError):
        pass
    parts = []
    for start in range(0, len(places), _BATCH):
        chosen = places[start : start + _BATCH]
        parts.append(torch.stack(model.features(rows.batch(chosen), rows.sizes[chosen]), dim=1))
    piece = torch.cat(parts)
    partial = file.with_suffix(".partial")
    save_file({"features": piece}, partial)
    partial.replace(file)
    return piece


@torch.inference_mode()
def all_logits(
    model: MultiExit, rows: Rows, features: Tensor | None = None, *, show: bool = True
) -> NDArray[np.float32]:
    """Every head's logits for every row, [n, M, K] float32, in evaluation mode.

    Args:
        features: [n, M, d] of these rows where they are known; else the encoder runs.
    """
    model.eval()
    out = np.empty((len(rows), model.num_heads, model.classes), dtype=np.float32)
    with tqdm(total=len(rows), desc="answers", unit="row", disable=not show) as bar:
        for places in by_size(rows, 256 if features is not None else _BATCH):
            if features is not None:
                logits = model.read(list(features[places].unbind(1)))
            else:
                logits = model(rows.batch(places), rows.sizes[places])
            out[places] = logits.numpy()
            bar.update(len(places))
    return out


def answers_of(logits: NDArray[np.float32], labels: Tensor, rows: Rows) -> Answers:
    """What the heads say, beside the labels [n] int64."""
    return Answers.of(logits, labels.numpy(), rows.sizes.numpy())


def digest_of(module: nn.Module, *more: str) -> str:
    """SHA-256 over a module's weights and buffers, and other strings."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    for text in more:
        digest.update(text.encode())
    return digest.hexdigest()[:32]
