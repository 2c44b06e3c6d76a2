"""Exit-layer hidden states of a sequence: what the deep stage has not seen, and what it may need
again.
"""

from __future__ import annotations

import torch

_FIRST_ROWS = 32


class ExitStates:
    """States of the positions [start, stop), in order, in one buffer.

    The rows that ``rows`` gives out are a view: they stay as they are until a cut goes below them
    and other rows take their place.
    """

    def __init__(self, start: int = 0) -> None:
        self._start = start
        self._count = 0
        self._buffer: torch.Tensor | None = None

    @property
    def start(self) -> int:
        """Position of the first row that is kept."""
        return self._start

    @property
    def stop(self) -> int:
        """Position after the last row."""
        return self._start + self._count

    def append(self, states: torch.Tensor) -> None:
        """Add the next rows, [rows, d]."""
        needed = self._count + len(states)
        if self._buffer is None or needed > len(self._buffer):
            grown = states.new_empty(max(_FIRST_ROWS, 2 * self._count, needed), states.shape[1])
            if self._buffer is not None:
                grown[: self._count] = self._buffer[: self._count]
            self._buffer = grown
        self._buffer[self._count : needed] = states
        self._count = needed

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """The states of the positions [start, stop), [stop - start, d].

        Raises:
            IndexError: for positions that are not kept.
        """
        if not self._start <= start < stop <= self.stop or self._buffer is None:
            raise IndexError(f"rows {start} to {stop} of {self._start} to {self.stop}")
        return self._buffer[start - self._start : stop - self._start]

    def cut(self, stop: int) -> None:
        """Forget the positions from ``stop`` on."""
        self._count = max(0, min(self._count, stop - self._start))
        self._start = min(self._start, stop)

    def drop(self, start: int) -> None:
        """Forget the positions before ``start``; rows given out keep their memory."""
        if start <= self._start:
            return
        left = self.rows(start, self.stop) if start < self.stop else None
        self._start, self._count, self._buffer = start, 0, None
        if left is not None:
            self.append(left)

    def fork(self, stop: int) -> ExitStates:
        """A copy of the positions before ``stop``; starts there if none of them is kept."""
        copy = ExitStates(min(self._start, stop))
        if stop > self.stop:
            raise IndexError(f"cannot fork at {stop}: rows {self._start} to {self.stop} are kept")
        if stop > copy.start:
            copy.append(self.rows(copy.start, stop))
        return copy
