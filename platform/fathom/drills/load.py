"""Requests at bounded concurrency, over threads."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fathom.drills.client import CHAT, StreamClient
from fathom.drills.transcript import Transcript


def run_load(
    client: StreamClient,
    bodies: Sequence[Mapping[str, Any]],
    *,
    concurrency: int,
    name: str,
    path: str = CHAT,
    on_end: Callable[[int, Transcript], None] = lambda index, transcript: None,
) -> dict[int, Transcript]:
    """Run requests, each started as soon as one of ``concurrency`` places is free.

    Args:
        name: of this load; requests are ``{name}-{index}``. path: that they go to.
        on_end: called after each request, on any thread.

    Returns:
        what ended, by index: all of it, unless the caller was interrupted, which stops the client.
        The interruption is raised on; what ended until then has gone through ``on_end``.
    """
    found: dict[int, Transcript] = {}
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(bodies)):
        waiting.put(index)
    interrupted = threading.Event()

    def work() -> None:
        while not interrupted.is_set():
            try:
                index = waiting.get_nowait()
            except queue.Empty:
                return
            transcript = client.stream(bodies[index], f"{name}-{index}", path)
            if interrupted.is_set():
                return  # it did not fail: it was left alone
            found[index] = transcript
            on_end(index, transcript)

    workers = [
        threading.Thread(target=work, name=f"fathom-load-{place}", daemon=True)
        for place in range(min(concurrency, len(bodies)))
    ]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            while worker.is_alive():
                worker.join(0.2)
    except KeyboardInterrupt:
        interrupted.set()
        client.stop()
        raise
    return found
