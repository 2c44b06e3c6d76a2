"""An evaluation from its tasks' files to its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fathom.evaluation.answers import generate, requests_for
from fathom.evaluation.data import read_text
from fathom.evaluation.errors import EvaluationError, library
from fathom.evaluation.generation import measure_generation
from fathom.evaluation.scoring import measure_choices, measure_perplexity
from fathom.evaluation.session import Row, Session
from fathom.evaluation.tasks import (
    ChoiceItem,
    ChoiceTask,
    GenerationTask,
    Item,
    Task,
    read_choices,
    read_items,
)

_WARM_UP = "The quick brown fox jumps over the lazy dog."


@dataclass(frozen=True, slots=True)
class Load:
    """A task with its data, read and checked, which needs no model."""

    task: Task
    path: Path
    items: Sequence[Item] = ()
    choices: Sequence[ChoiceItem] = ()
    text: str = ""


def load(task: Task, path: Path, limit: int | None) -> Load:
    """Read a task's file.

    Raises:
        EvaluationError: for a file that cannot be read, naming the first row at fault, or for a
            library that is not installed.
    """
    if isinstance(task, GenerationTask):
        if task.metric is not None:  # before the hours of generation, not after
            library("rouge_score.rouge_scorer")
        if task.metric == "bleu":
            library("sacrebleu.metrics")
        return Load(task, path, items=read_items(task, path, limit))
    if isinstance(task, ChoiceTask):
        return Load(task, path, choices=read_choices(path, limit))
    return Load(task, path, text=read_text(path))


def evaluate(session: Session, loads: Sequence[Load]) -> Iterator[list[Row]]:
    """Measure one task after the other; each one's rows as soon as they are there.

    Raises:
        EvaluationError: for a model without a tokenizer, or a request that fails.
    """
    tokenizer = session.engine.tokenizer
    if tokenizer is None:
        raise EvaluationError("the model has no tokenizer, so it takes no text.")
    # The first passes of a process are slow: no mode shall pay for them.
    prompt = tuple(tokenizer.encode(_WARM_UP))
    for policy in session.policies.values():
        generate(session.engine, requests_for([prompt], policy, 4), lambda: None)
    for each in loads:
        if isinstance(each.task, GenerationTask):
            yield measure_generation(session, each.task, each.items)
        elif isinstance(each.task, ChoiceTask):
            yield measure_choices(session, each.task, each.choices)
        else:
            yield measure_perplexity(session, each.task, each.text)
