"""Reading weights: tensors by name from one safetensors file or many."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fathom.models.errors import ModelError
from fathom.models.files import weight_files


class WeightFiles:
    """The weights of a model directory, read tensor by tensor.

    Args:
        directory: holds ``model.safetensors``, or shards and their index.

    Raises:
        ModelError: if a file is missing or damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._file_of: dict[str, Path] = {}
        for file in weight_files(directory):
            try:
                with safe_open(file, framework="pt") as reader:
                    self._file_of.update(dict.fromkeys(reader.keys(), file))
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{file}: damaged safetensors file: {error}. Delete it and fetch it again."
                ) from error

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Read one tensor into memory of its own.

        Args:
            shape: the shape that the configuration calls for.
            dtype: floating-point type to cast to.

        Raises:
            ModelError: if it is missing, not floating point, or of another shape.
        """
        file = self._file_of.get(name)
        if file is None:
            raise ModelError(f"{self.directory}: missing tensor {name!r}.")
        # Opened anew for each tensor: the pages of a closed map no longer count as resident, so
        # that loading peaks near the size of the weights as loaded, not of file and weights.
        with safe_open(file, framework="pt") as reader:
            tensor: Tensor = reader.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"{file}: tensor {name!r} has shape {list(tensor.shape)}; config.json calls for "
                f"{list(shape)}."
            )
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ModelError(
                f"{file}: tensor {name!r} has type {tensor.dtype}; supported are float32, "
                "bfloat16, float16 and float64."
            )
        return tensor.to(device=device, dtype=dtype, copy=True)
