"""The tasks: which file, what is asked, what counts as right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fathom.evaluation.data import read_rows
from fathom.evaluation.errors import EvaluationError
from fathom.evaluation.metrics import final_number

Metric = Literal["exact_match", "rougeL", "bleu"]


@dataclass(frozen=True, slots=True)
class Item:
    """One row of a generation task.

    Attributes:
        where: ``file:line``. group: the row of the report that it belongs to.
        text: what the task's template takes. references: right answers; none for spec_bench.
    """

    where: str
    group: str
    text: str
    references: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ChoiceItem:
    """One multiple-choice question: ``contexts[i] + " " + continuations[i]`` is choice i.

    Attributes:
        gold: index of the right choice.
    """

    where: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationTask:
    """Answers are generated, and compared with references and with the full model's answers.

    Attributes:
        file: in the data folder. template: of the user's message, with ``{text}``.
        parse: from ``file:line`` and a row to what is asked.
        new_tokens: most tokens of an answer. metric: None where nothing is right or wrong.
    """

    name: str
    file: str
    template: str
    parse: Callable[[str, Mapping[str, Any]], Item]
    new_tokens: int
    metric: Metric | None


@dataclass(frozen=True, slots=True)
class ChoiceTask:
    """The likeliest choice is the model's answer."""

    name: str
    file: str


@dataclass(frozen=True, slots=True)
class PerplexityTask:
    """Perplexity a token of a text, over windows of ``window`` tokens that do not overlap."""

    name: str
    file: str
    window: int = 512


Task = GenerationTask | ChoiceTask | PerplexityTask


def _gsm8k(where: str, row: Mapping[str, Any]) -> Item:
    answer = _text(where, row, "answer")
    if final_number(answer) is None:
        raise EvaluationError(f'{where}: "answer" holds no number; end it with "#### 42".')
    return Item(where, "gsm8k", _text(where, row, "question"), (answer,))


def _dialogsum(where: str, row: Mapping[str, Any]) -> Item:
    return Item(where, "dialogsum", _text(where, row, "dialogue"), (_text(where, row, "summary"),))


def _scitldr(where: str, row: Mapping[str, Any]) -> Item:
    sentences = row.get("source")
    if isinstance(sentences, list):  # the data has blank ones among them
        row = {**row, "source": [s for s in sentences if not isinstance(s, str) or s.strip()]}
    text = " ".join(_texts(where, row, "source"))
    return Item(where, "scitldr", text, _texts(where, row, "target"))


def _multi30k(where: str, row: Mapping[str, Any]) -> Item:
    return Item(where, "multi30k", _text(where, row, "de"), (_text(where, row, "en"),))


def _spec_bench(where: str, row: Mapping[str, Any]) -> Item:
    # The first turn alone: the second builds on an answer, which differs from mode to mode.
    return Item(
        where, f"spec_bench/{_text(where, row, 'category')}", _texts(where, row, "turns")[0]
    )


_ALL: tuple[Task, ...] = (
    GenerationTask(
        name="gsm8k", file="gsm8k/test_a.jsonl.gz", template="{text}", parse=_gsm8k,
        new_tokens=256, metric="exact_match",
    ),
    GenerationTask(
        name="dialogsum", file="dialogsum/dev.jsonl.gz", parse=_dialogsum,
        template="Summarize the following conversation.\n\n{text}",
        new_tokens=96, metric="rougeL",
    ),
    GenerationTask(
        name="scitldr", file="scitldr/test.jsonl.gz", parse=_scitldr,
        template="Summarize the following text in one sentence.\n\n{text}",
        new_tokens=64, metric="rougeL",
    ),
    GenerationTask(
        name="multi30k", file="multi30k/test2016.jsonl.gz", parse=_multi30k,
        template="Translate German to English: {text}", new_tokens=64, metric="bleu",
    ),
    GenerationTask(
        name="spec_bench", file="spec_bench/questions_a.jsonl.gz", template="{text}",
        parse=_spec_bench, new_tokens=128, metric=None,
    ),
    *(
        ChoiceTask(name, f"choice/{'arc_easy_a' if name == 'arc_easy' else name}.jsonl.gz")
        for name in ("arc_easy", "piqa", "copa", "boolq", "openbook_qa", "winogrande")
    ),
    PerplexityTask("wikitext2", "wikitext2/test.txt.gz"),
)  # fmt: skip
TASKS = {task.name: task for task in _ALL}


def read_items(task: GenerationTask, path: Path, limit: int | None = None) -> list[Item]:
    """A generation task's items, grouped; at most ``limit`` of each group.

    Raises:
        EvaluationError: for a file that cannot be read, or naming the first row at fault.
    """
    # A group's rows may lie anywhere in the file: the limit applies once they are sorted out.
    groups: dict[str, list[Item]] = {}
    for where, row in read_rows(path):
        item = task.parse(where, row)
        group = groups.setdefault(item.group, [])
        if limit is None or len(group) < limit:
            group.append(item)
    return [item for group in groups.values() for item in group]


def read_choices(path: Path, limit: int | None = None) -> list[ChoiceItem]:
    """A multiple-choice task's questions, at most ``limit``.

    A row has ``query``, ``choices`` and ``gold``; or, where the choice lies in the context
    (Winogrande), ``context_options``, ``continuation`` and ``gold``.

    Raises:
        EvaluationError: for a file that cannot be read, or naming the first row at fault.
    """
    items = []
    for where, row in read_rows(path, limit):
        if "context_options" in row:
            contexts = _texts(where, row, "context_options")
            continuations = (_text(where, row, "continuation"),) * len(contexts)
        else:
            continuations = _texts(where, row, "choices")
            contexts = (_text(where, row, "query"),) * len(continuations)
        gold = row.get("gold")
        if not isinstance(gold, int) or not 0 <= gold < len(contexts):
            raise EvaluationError(
                f'{where}: "gold" must be the index of one of the {len(contexts)} choices, '
                f"got {gold!r}."
            )
        items.append(ChoiceItem(where, contexts, continuations, gold))
    return items


def _text(where: str, row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise EvaluationError(f'{where}: needs the field "{name}", a text; got {value!r}.')
    return value


def _texts(where: str, row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A list of texts; a single one counts as a list of one."""
    value = row.get(name)
    values = [value] if isinstance(value, str) else value
    if (
        not isinstance(values, list)
        or not values
        or not all(isinstance(each, str) and each.strip() for each in values)
    ):
        raise EvaluationError(f'{where}: needs the field "{name}", a list of texts; got {value!r}.')
    return tuple(values)
