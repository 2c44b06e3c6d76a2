"""The files of a model directory, without reading tensors: JSON, lists of shards, the digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fathom.models.cache import remembered
from fathom.models.errors import ModelError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelError: if the file is missing, or holds anything but a JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{file}: cannot read: {error.strerror}.") from error
    except ValueError as error:
        raise ModelError(f"{file}: damaged: not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file}: damaged: expected a JSON object, got {type(value).__name__}.")
    return value


def weight_files(directory: Path) -> list[Path]:
    """The directory's safetensors files in name order.

    Raises:
        ModelError: if there are none, or one that the index names is missing.
    """
    index = directory / INDEX_FILE
    if index.exists():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ModelError(f"{index}: damaged: no weight_map.")
        files = [directory / name for name in sorted({str(name) for name in shards.values()})]
    else:
        files = [directory / SINGLE_FILE]
    for file in files:
        if not file.is_file():
            raise ModelError(
                f"{file}: missing weights file; supported are {SINGLE_FILE}, or shards named by "
                f"{INDEX_FILE}."
            )
    return files


def weights_digest(directory: Path) -> str:
    """SHA-256, in hexadecimal, over the contents of the directory's weights files in name order.

    It covers the weights only: directories that differ just in ``config.json``, say in their RoPE
    scaling, share it. It is remembered in the cache by path, size and time of change, so that only
    the first call reads the files.

    Raises:
        ModelError: if a weights file is missing or cannot be read.
    """
    files = weight_files(directory.resolve())
    try:
        stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        identity = hashlib.sha256(json.dumps(stats).encode()).hexdigest()
        return remembered("digests", identity, lambda: _digest(files))
    except OSError as error:
        raise ModelError(f"{error.filename}: cannot read: {error.strerror}.") from error


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()
