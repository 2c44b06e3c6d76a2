"""Checks of what a caller asks for, and the error that names what is wrong with it."""

from __future__ import annotations

import math
from typing import Any


class InvalidRequest(ValueError):
    """A request that cannot be served as asked.

    Attributes:
        param: the request field at fault, in the caller's spelling, or None.
        code: a short machine-readable reason (``context_length_exceeded``, ...), or None.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        # Keyword-only arguments are lost by the default reduction; errors cross process borders.
        return _rebuild_invalid_request, (str(self), self.param, self.code)


def _rebuild_invalid_request(message: str, param: str | None, code: str | None) -> InvalidRequest:
    return InvalidRequest(message, param=param, code=code)


def check_range(name: str, value: float, low: float, high: float, remedy: str) -> None:
    """Check that a field is a finite number in [low, high].

    Raises:
        InvalidRequest: naming the field, the value and the remedy.
    """
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not ok or not math.isfinite(value) or not low <= value <= high:
        raise InvalidRequest(f"{name} must be {remedy}, got {value!r}.", param=name)


def check_int(name: str, value: int, low: int, remedy: str) -> None:
    """Check that a field is an integer of at least ``low``.

    Raises:
        InvalidRequest: naming the field, the value and the remedy.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise InvalidRequest(f"{name} must be {remedy}, got {value!r}.", param=name)
