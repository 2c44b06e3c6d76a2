"""The one error of this room, and libraries that only this room needs."""

from __future__ import annotations

import importlib
from typing import Any


class EvaluationError(RuntimeError):
    """Something the user can put right: missing data, a row of another form, a stale file."""


def library(name: str) -> Any:
    """Import a module that the extra ``train`` brings.

    Raises:
        EvaluationError: when it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.split(".")[0].replace("_", "-")
        raise EvaluationError(
            f"{package} is not installed: pip install 'fathom-serve[train]'."
        ) from error
