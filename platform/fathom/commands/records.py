"""Results as JSON, and a results file that survives an interruption."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fathom.api.usage import usage_body
from fathom.commands.options import UsageError
from fathom.types import FinishReason, RequestOutput, Token, Usage


@dataclass(slots=True)
class Completion:
    """What a request has produced so far."""

    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    error: str | None = None
    usage: Usage = field(default_factory=Usage)

    def add(self, output: RequestOutput) -> None:
        """Take the engine's news."""
        self.tokens += output.tokens
        self.text += output.text
        self.finish_reason = output.finish_reason
        self.error = output.error
        if output.usage is not None:
            self.usage = output.usage

    def record(self, prompt_token_ids: tuple[int, ...]) -> dict[str, Any]:
        """The JSON line of this request."""
        values: dict[str, Any] = {
            "prompt_token_ids": list(prompt_token_ids),
            "token_ids": [token.id for token in self.tokens],
            "text": self.text,
            "depths": [token.depth for token in self.tokens],
            "finish_reason": self.finish_reason.value if self.finish_reason else None,
            "usage": usage_body({(0, 0): self.usage}),
        }
        if self.error:
            values["error"] = self.error
        return values


class ResultsFile:
    """Results of a batch job, in the input's order, safe from interruptions.

    Each result goes to ``OUT.partial`` as soon as it is there; when all are, ``OUT`` is written
    in order and takes its place in one step. An ``OUT`` from before stays whole until then.

    Args:
        path: OUT. job: what the results depend on; a resumed job must have the same.
        total: number of results wanted. resume: go on from ``OUT.partial``.

    Raises:
        UsageError: an interrupted job's results lie there and ``resume`` is false, or they are of
            another job.
    """

    def __init__(self, path: Path, job: Mapping[str, Any], total: int, *, resume: bool) -> None:
        self._path = path
        self._partial = path.with_name(path.name + ".partial")
        self._total = total
        self.done: dict[int, dict[str, Any]] = {}
        header = {"job": dict(job)}
        if self._partial.exists():
            if not resume:
                raise UsageError(
                    f"{self._partial} holds an interrupted job's results: go on with --resume, or "
                    "remove the file."
                )
            self._load(header)
        elif resume and path.exists():
            self._load_finished()
            if self.is_complete:
                return
        # Rewritten from what was readable: a line that was cut by the interruption is dropped.
        lines = [header, *({"index": i, **record} for i, record in sorted(self.done.items()))]
        try:
            self._partial.write_text("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            raise UsageError(f"{self._partial}: cannot write: {error.strerror}.") from error

    @property
    def is_complete(self) -> bool:
        """Whether every result is there."""
        return len(self.done) == self._total

    def add(self, index: int, record: dict[str, Any]) -> None:
        """Keep one result; it is on disk when this returns."""
        with self._partial.open("a") as file:
            file.write(json.dumps({"index": index, **record}) + "\n")
        self.done[index] = record

    def finish(self) -> None:
        """Write OUT in the input's order and remove the partial file."""
        ordered = self._path.with_name(self._path.name + ".tmp")
        ordered.write_text("".join(json.dumps(self.done[i]) + "\n" for i in range(self._total)))
        os.replace(ordered, self._path)
        self._partial.unlink(missing_ok=True)

    def _load(self, header: dict[str, Any]) -> None:
        lines = self._partial.read_text().splitlines()
        if not lines or _loads(lines[0]) != json.loads(json.dumps(header)):
            raise UsageError(
                f"{self._partial} is of a job with other prompts or options: give the same ones, "
                "or remove the file to start afresh."
            )
        for line in lines[1:]:
            value = _loads(line)
            if isinstance(value, dict) and isinstance(value.get("index"), int):
                self.done[value.pop("index")] = value

    def _load_finished(self) -> None:
        values = [_loads(line) for line in self._path.read_text().splitlines()]
        if len(values) == self._total and all(isinstance(value, dict) for value in values):
            self.done = dict(enumerate(values))


def _loads(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
