"""Server-sent events as a client reads them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

DONE = "[DONE]"
"""The data of the event that ends a stream; a stream that ends without it was broken off."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event. data: its lines, joined. id: its own; empty if it has none."""

    data: str
    id: str = ""


def read_events(lines: Iterable[bytes]) -> Iterator[Event]:
    """The events of a stream, each as soon as the blank line after it has come.

    An event that the connection's end cuts short is none, as the standard for event streams says.

    Args:
        lines: with their line ends.
    """
    data: list[str] = []
    own_id = ""
    for line in lines:
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        if not text:
            if data:
                yield Event("\n".join(data), own_id)
            data, own_id = [], ""
            continue
        name, _, value = text.partition(":")
        value = value.removeprefix(" ")
        if name == "data":
            data.append(value)
        elif name == "id":
            own_id = value
