"""The completions under way: which there are, how they end, and what is told of them."""

from __future__ import annotations

import time
from collections.abc import Callable

from fathom.engine.output import take_output
from fathom.engine.scheduler import Scheduler
from fathom.engine.sequence import Sequence
from fathom.types import FinishReason, RequestOutput


class Completions:
    """Completions by request, those of one request its family.

    Args:
        scheduler: gives back what a completion held.
        on_end: is told of each that has ended, after that and before its last output.

    Attributes:
        families: completions that have not ended, by request.
    """

    def __init__(self, scheduler: Scheduler, on_end: Callable[[Sequence], None]) -> None:
        self.families: dict[str, list[Sequence]] = {}
        self._scheduler = scheduler
        self._on_end = on_end
        self._outputs: list[RequestOutput] = []

    def __bool__(self) -> bool:
        """Whether any is under way, or has something that was not taken."""
        return bool(self.families or self._outputs)

    def every(self) -> list[Sequence]:
        """All that have not ended, of all requests."""
        return [seq for family in self.families.values() for seq in family]

    def end_expired(self) -> None:
        """End those whose time is over."""
        now = time.monotonic()
        for seq in self.every():
            if seq.finish_reason is None and seq.expired(now):
                timeout = seq.request.timeout_s
                self.end(seq, FinishReason.DEADLINE, f"not done within {timeout} s")

    def end_request(self, request_id: str, reason: FinishReason) -> None:
        """End all completions of a request before their time."""
        for seq in list(self.families[request_id]):
            self.end(seq, reason)

    def end(self, seq: Sequence, reason: FinishReason, error: str | None = None) -> None:
        """End a completion before its time."""
        seq.finish_reason, seq.error = reason, error
        if not seq.in_flight:  # else when its flush is back
            self.retire(seq)

    def retire(self, seq: Sequence) -> None:
        """Give back what a completion held and report its end."""
        self._scheduler.waiting.extend(seq.children)  # on their own now
        seq.children = []
        if seq.parent is not None and seq in seq.parent.children:
            seq.parent.children.remove(seq)
        # What was cut short was never checked for non-finite values.
        checked = seq.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)
        self._scheduler.remove(seq, scrub=not checked)
        self._on_end(seq)
        family = self.families[seq.request.request_id]
        family.remove(seq)
        if not family:
            del self.families[seq.request.request_id]
        if not seq.retriable:  # else the text goes on elsewhere, from what was shown
            seq.text.end()
        self.report(seq)

    def report(self, seq: Sequence) -> None:
        """Note what is new of a completion, if anything is."""
        family = self.families.get(seq.request.request_id, ())
        ended = seq.finish_reason is not None and seq not in family
        output = take_output(seq, ended=ended)
        if output is not None:
            self._outputs.append(output)

    def take_outputs(self) -> list[RequestOutput]:
        """What is new since the last call, in order."""
        outputs, self._outputs = self._outputs, []
        return outputs
