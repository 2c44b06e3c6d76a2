"""A classifier's folder: everything that serving needs, and nothing of how it was trained.

classifier.json          form, labels, costs' reference, notes of the training
model.safetensors        weights of the encoder and of the heads, float32
tokenizer.json           of a text classifier
calibration.safetensors  each head's answers for held-out rows, from which any budget's
                         thresholds are worked out when a request asks for it
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from fathom.models.classifier_config import CONFIG, FORMAT_VERSION, read_config
from fathom.models.errors import ModelError
from fathom.models.inputs import ImageReader, TextReader
from fathom.models.multi_exit import MultiExit, build

WEIGHTS, TOKENIZER = "model.safetensors", "tokenizer.json"
CALIBRATION = "calibration.safetensors"


@dataclass(frozen=True, slots=True)
class Answers:
    """What every head says of rows whose labels are known.

    Attributes:
        confidence: [n, M] float64 in [0, 1], each head's largest probability (``confidence_of``).
        predicted: [n, M] int64, the class of it. labels: [n] int64.
        sizes: [n] int64 tokens of each row (1 for an image).
    """

    confidence: NDArray[np.float64]
    predicted: NDArray[np.int64]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]

    @property
    def correct(self) -> NDArray[np.bool_]:
        """[n, M] bool."""
        return self.predicted == self.labels[:, None]

    def take(self, rows: NDArray[np.int64]) -> Answers:
        """These rows alone."""
        return Answers(
            self.confidence[rows], self.predicted[rows], self.labels[rows], self.sizes[rows]
        )

    @staticmethod
    def of(
        logits: NDArray[np.float32], labels: NDArray[np.int64], sizes: NDArray[np.int64]
    ) -> Answers:
        """From logits [n, M, K] float32."""
        confidence, predicted = confidence_of(torch.from_numpy(logits))
        return Answers(confidence.numpy(), predicted.numpy(), labels, sizes)


def confidence_of(logits: Tensor) -> tuple[Tensor, Tensor]:
    """The largest probability and its class.

    In double precision: a head that is sure of most rows says 1 to all of them in single
    precision, and a threshold among equals lets all of them go or none.

    Args:
        logits: [..., K] float32.

    Returns:
        [...] float64 in [0, 1]; [...] int64.
    """
    confidence, predicted = logits.double().softmax(-1).max(-1)
    return confidence, predicted


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierFiles:
    """What lies in a classifier's folder.

    Attributes:
        name: of the classifier. labels: of the classes, K of them.
        model: in evaluation mode. calibration: of held-out rows.
        max_tokens: of a row of text; 0 for images.
        tokenizer: its ``tokenizer.json``; None for images.
        notes: of the training, JSON values.
    """

    name: str
    labels: tuple[str, ...]
    model: MultiExit
    calibration: Answers
    max_tokens: int = 0
    tokenizer: Path | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def takes(self) -> str:
        """``text`` or ``image``."""
        return "image" if self.tokenizer is None else "text"

    def reader(self) -> TextReader | ImageReader:
        """Reads this classifier's inputs."""
        if self.tokenizer is None:
            return ImageReader()
        return TextReader(self.tokenizer, self.max_tokens)

    def write(self, folder: Path) -> Path:
        """Write the folder, whole or not at all; one that is there is replaced.

        Raises:
            ModelError: if the folder holds something else than a classifier.
        """
        if folder.exists() and any(folder.iterdir()) and not (folder / CONFIG).exists():
            raise ModelError(f"{folder}: holds other files than a classifier's; name another.")
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        config = {
            "format_version": FORMAT_VERSION,
            "name": self.name,
            "labels": list(self.labels),
            "max_tokens": self.max_tokens,
            "model": self.model.spec(),
            "notes": dict(self.notes),
        }
        text = json.dumps(config, indent=1, ensure_ascii=False)
        (partial / CONFIG).write_text(text + "\n", encoding="utf-8")
        weights = {n: t.detach().contiguous() for n, t in self.model.state_dict().items()}
        save_file(weights, partial / WEIGHTS)
        c = self.calibration
        save_arrays(
            {
                "confidence": np.ascontiguousarray(c.confidence),
                "predicted": np.ascontiguousarray(c.predicted, dtype=np.int16),
                "labels": np.ascontiguousarray(c.labels, dtype=np.int16),
                "sizes": np.ascontiguousarray(c.sizes, dtype=np.int32),
            },
            partial / CALIBRATION,
        )
        if self.tokenizer is not None:
            shutil.copyfile(self.tokenizer, partial / TOKENIZER)
        for file in partial.iterdir():
            file.chmod(0o644)  # safetensors makes files that only their owner reads
        old = folder.with_name(f"{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
        return folder


def read_classifier(folder: Path) -> ClassifierFiles:
    """Read a classifier.

    Raises:
        ModelError: for a file that is missing, damaged, or does not belong to the others.
    """
    config = read_config(folder)
    tokenizer = folder / TOKENIZER if config.get("max_tokens") else None
    try:
        model = build(config["model"])
        model.load_state_dict(load_file(folder / WEIGHTS))
        arrays = load_arrays(folder / CALIBRATION)
        calibration = Answers(
            arrays["confidence"],
            *(arrays[name].astype(np.int64) for name in ("predicted", "labels", "sizes")),
        )
        labels = tuple(map(str, config["labels"]))
    except (OSError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise ModelError(f"{folder}: damaged classifier: {error}. Train it again.") from error
    if calibration.confidence.shape[1:] != (model.num_heads,) or len(labels) != model.classes:
        raise ModelError(f"{folder}: calibration or labels are of another classifier.")
    model.eval()
    return ClassifierFiles(
        name=str(config["name"]),
        labels=labels,
        model=model,
        calibration=calibration,
        max_tokens=int(config["max_tokens"]),
        tokenizer=tokenizer,
        notes=config.get("notes", {}),
    )
