"""From confirmed token ids to the text that may be shown: detokenizing and stop strings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class Detokenizer(Protocol):
    """Turns token ids into text piece by piece."""

    def push(self, token_id: int) -> str:
        """Text that became complete with this token; empty inside a character."""
        ...

    def flush(self) -> str:
        """What is left at the end."""
        ...


DetokenizerFactory = Callable[[], Detokenizer]


class TextStream:
    """Text of one completion, with stop strings taken out and held back while they may come.

    Args:
        detokenizer: None where only token ids matter; the text is then empty.
        stop: strings that end the text and are not part of it.
    """

    def __init__(self, detokenizer: Detokenizer | None, stop: Sequence[str] = ()) -> None:
        self._detokenizer = detokenizer
        self._stop = tuple(stop)
        self._held = ""
        self._ready = ""

    def push(self, token_id: int) -> str | None:
        """Take one token; returns the stop string that it completed, if any."""
        if self._detokenizer is None:
            return None
        self._held += self._detokenizer.push(token_id)
        return self._settle()

    def end(self) -> str | None:
        """Take the end of the tokens; returns a stop string that the rest completed, if any."""
        if self._detokenizer is None:
            return None
        self._held += self._detokenizer.flush()
        found = self._settle()
        self._ready += self._held
        self._held = ""
        return found

    def take(self) -> str:
        """Text that became safe to show since the last call."""
        ready, self._ready = self._ready, ""
        return ready

    def _settle(self) -> str | None:
        """Move what is safe from held to ready, up to the first stop string."""
        found = [(self._held.find(stop), stop) for stop in self._stop if stop in self._held]
        if found:
            position, stop = min(found)
            self._ready += self._held[:position]
            self._held = ""
            self._detokenizer = None
            return stop
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        self._ready += self._held[:cut]
        self._held = self._held[cut:]
        return None


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that ``stop`` starts with."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0
