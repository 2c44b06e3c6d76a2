"""What a classifier's folder says of itself, without its weights; imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fathom.models.errors import ModelError
from fathom.models.files import read_json

CONFIG = "classifier.json"
FORMAT_VERSION = 1


def read_config(folder: Path) -> dict[str, Any]:
    """``classifier.json`` of a folder.

    Raises:
        ModelError: if the folder holds no classifier, or one of another format version.
    """
    file = folder / CONFIG
    if not file.is_file():
        raise ModelError(
            f"{folder}: no classifier here (no {CONFIG}); `fathom train multi-exit` makes one."
        )
    config = read_json(file)
    if (found := config.get("format_version")) != FORMAT_VERSION:
        raise ModelError(
            f"{file}: classifier of format {found!r}; this version of Fathom reads format "
            f"{FORMAT_VERSION}. Train it again."
        )
    return config
