"""The data sets of the comparison: requests that choose thresholds, and others that judge them.

No request does both. Where a task has a validation split, that one chooses; where its file is the
only one, its last rows do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from fathom.evaluation.data import data_file
from fathom.evaluation.tasks import TASKS, GenerationTask, Item, read_items


@dataclass(frozen=True, slots=True)
class FreeTask:
    """A data set.

    Attributes:
        adapter: that ships with Fathom; default leaves the model as it is and adds an exit.
        calibration: file in the data folder whose rows choose thresholds; empty: the last rows of
            the task's own.
        requests: to be judged by, unless told otherwise. calibrate: to choose by.
        new_tokens: most tokens of an answer.
    """

    name: str
    title: str
    adapter: str
    calibration: str
    requests: int
    calibrate: int
    new_tokens: int

    @property
    def task(self) -> GenerationTask:
        """As ``fathom eval`` has it: template, metric, file."""
        found = TASKS[self.name]
        assert isinstance(found, GenerationTask)
        return found


FREE_TASKS = {
    task.name: task
    for task in (
        FreeTask(
            "multi30k", "Multi30k, German to English (adapter multi30k)", "multi30k",
            "multi30k/valid.jsonl.gz", requests=100, calibrate=300, new_tokens=48,
        ),
        FreeTask(
            "dialogsum", "DialogSum (adapter default: the model as it is)", "default",
            "", requests=48, calibrate=200, new_tokens=48,
        ),
        FreeTask(
            "scitldr", "SciTLDR (adapter scitldr)", "scitldr",
            "scitldr/dev.jsonl.gz", requests=48, calibrate=200, new_tokens=48,
        ),
    )
}  # fmt: skip


def judged(own: FreeTask, count: int) -> list[Item]:
    """The first ``count`` requests of the task's own file.

    Raises:
        EvaluationError: for data that is missing, saying where to get it.
        SystemExit: if they would run into those that choose.
    """
    items = read_items(own.task, data_file(own.name, own.task.file))
    most = len(items) if own.calibration else len(items) - own.calibrate
    if count > most:
        raise SystemExit(f"{own.name} has {most} requests to be judged by, got --requests {count}.")
    return items[:count]


def choosing(own: FreeTask) -> list[Item]:
    """The requests that choose thresholds; as ``judged``."""
    path = data_file(own.name, own.calibration or own.task.file)
    items = read_items(own.task, path)
    return items[: own.calibrate] if own.calibration else items[-own.calibrate :]


def write_prompts(own: FreeTask, path: Path) -> None:
    """Write those as a file of ``fathom generate --prompts``, whole or not at all."""
    lines = [
        json.dumps(
            {"messages": [{"role": "user", "content": own.task.template.format(text=i.text)}]}
        )
        for i in choosing(own)
    ]
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(line + "\n" for line in lines))
    partial.replace(path)
