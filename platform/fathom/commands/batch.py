"""A file of prompts through one engine: continuous batching, progress, results as they come."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fathom.api.usage import add_compute
from fathom.commands.records import Completion, ResultsFile
from fathom.commands.terminal import summary
from fathom.types import FinishReason, Request

if TYPE_CHECKING:
    from fathom.engine.engine import Engine


def run_batch(
    engine: Engine,
    requests: Mapping[int, Request],
    results: ResultsFile | None,
    *,
    total: int,
    notes: Console,
    domains: Mapping[int, str] | None = None,
) -> int:
    """Run requests to their end; returns how many of them failed.

    Args:
        requests: by their place in the input; ids are that place as text.
        results: where each result goes; None prints them in order on standard output.
        total: number of prompts, those of an earlier, resumed job included.
        notes: where progress and the summary go.
        domains: what to note in each result as ``domain``, by place.
    """
    completions = {index: Completion() for index in requests}
    printer = _InOrder(sorted(requests))
    failed = 0
    tokens = 0
    for request in requests.values():
        engine.add_request(request)
    start = time.perf_counter()
    with _progress(notes) as bar:
        task = bar.add_task("requests", total=total, completed=total - len(requests), rate="")
        while engine.has_work():
            for output in engine.step():
                index = int(output.request_id)
                completion = completions[index]
                completion.add(output)
                tokens += len(output.tokens)
                if completion.finish_reason is None:
                    continue
                record = completion.record(requests[index].prompt_token_ids)
                if domains is not None:
                    record["domain"] = domains[index]
                failed += completion.finish_reason is FinishReason.ERROR
                if results is not None:
                    results.add(index, record)
                else:
                    printer.add(index, record)
                bar.advance(task)
            rate = tokens / (time.perf_counter() - start)
            bar.update(task, rate=f"{rate:.0f} tok/s")
    seconds = time.perf_counter() - start
    if results is not None:
        results.finish()
    pages = [completion.usage.compute for completion in completions.values()]
    if pages:
        line = summary(add_compute(pages), seconds=seconds, num_layers=engine.info.num_layers)
        notes.print(f"{len(pages)} requests · {line}", style="dim", highlight=False, soft_wrap=True)
    return failed


def _progress(notes: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=notes,
    )


class _InOrder:
    """Prints records in the input's order, each as soon as those before it are there."""

    def __init__(self, order: list[int]) -> None:
        self._order = order
        self._next = 0
        self._held: dict[int, dict[str, Any]] = {}

    def add(self, index: int, record: dict[str, Any]) -> None:
        self._held[index] = record
        while self._next < len(self._order) and self._order[self._next] in self._held:
            print(json.dumps(self._held.pop(self._order[self._next])), file=sys.stdout, flush=True)
            self._next += 1
