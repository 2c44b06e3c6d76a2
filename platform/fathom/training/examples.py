"""Training examples: token ids with a label at each row, and the order in which they are seen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fathom.training.errors import TrainingError

IGNORED = -100
"""The label of a row without one, as in torch's cross entropy."""

_WINDOW = 64
"""Batches' worth of examples that are sorted by length together: little padding, still random."""


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence.

    Attributes:
        token_ids: prompt and target. num_prompt: leading tokens that are not predicted; at least 1.
        domain: the name that its figures are reported under.
    """

    token_ids: tuple[int, ...]
    num_prompt: int
    domain: str = ""

    @property
    def num_targets(self) -> int:
        """Rows with a label."""
        return len(self.token_ids) - self.num_prompt


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples of like length, filled up on the right.

    Causal attention never looks right, so no mask is needed: what the fill computes is not read.

    Attributes:
        token_ids: [examples, longest] int64.
        labels: [examples, longest] int64, the token after each row, or ``IGNORED``.
        examples: what it was made of.
    """

    token_ids: Tensor
    labels: Tensor
    examples: tuple[Example, ...]

    @property
    def num_targets(self) -> int:
        """Rows with a label."""
        return sum(example.num_targets for example in self.examples)

    def to(self, device: str | torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(self.token_ids.to(device), self.labels.to(device), self.examples)

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Batch:
        """Put examples together."""
        longest = max(len(e.token_ids) for e in examples) - 1
        token_ids = torch.zeros((len(examples), longest), dtype=torch.int64)
        labels = torch.full_like(token_ids, IGNORED)
        for row, example in enumerate(examples):
            ids = torch.tensor(example.token_ids)
            token_ids[row, : len(ids) - 1] = ids[:-1]
            labels[row, example.num_prompt - 1 : len(ids) - 1] = ids[example.num_prompt :]
        return cls(token_ids, labels, tuple(examples))


def digest_of(examples: Sequence[Example]) -> str:
    """SHA-256, in hexadecimal, of what the examples hold, in their order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.token_ids, example.num_prompt)).encode())
    return digest.hexdigest()


def groups_of_epoch(
    examples: Sequence[Example], *, max_tokens: int, seed: int, epoch: int
) -> list[list[int]]:
    """All examples once, in groups of at most ``max_tokens`` tokens, fill included.

    The order follows from seed and epoch alone, so a run that goes on sees what it would have
    seen. An example longer than ``max_tokens`` is a group of its own.

    Returns:
        places in ``examples``, a list a group.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(examples), generator=generator).tolist()
    lengths = [len(example.token_ids) for example in examples]
    mean = max(1, sum(lengths) // max(1, len(lengths)))
    window = max(1, _WINDOW * max_tokens // mean)
    groups: list[list[int]] = []
    for start in range(0, len(order), window):
        members = sorted(order[start : start + window], key=lengths.__getitem__)
        groups += _cut(members, lengths, max_tokens)
    shuffled = torch.randperm(len(groups), generator=generator).tolist()
    return [groups[group] for group in shuffled]


def _cut(members: Iterable[int], lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Cut a list in order of length where the next one would burst the batch."""
    group: list[int] = []
    for index in members:
        if group and (len(group) + 1) * lengths[index] > max_tokens:
            yield group
            group = []
        group.append(index)
    if group:
        yield group


def read_examples(paths: Sequence[Path], tokenizer: Any, *, max_length: int) -> list[Example]:
    """Read JSON-lines files of training examples.

    A line is one of
    ``{"prompt_token_ids": [...], "token_ids": [...]}`` (what ``fathom generate --json`` and
    ``--self-distill`` write), ``{"messages": [...]}`` whose last message is the assistant's,
    ``{"prompt": text, "completion": text}``, or ``{"text": text}``, where all tokens are targets.
    ``domain`` is kept where there is one; the file's name stands in for it.

    Args:
        tokenizer: ``fathom.models.tokenizer.Tokenizer``.
        max_length: tokens of an example; longer ones are cut, or left out where the prompt alone
            is that long.

    Raises:
        TrainingError: naming file and line of the first one that is not of these forms, or when
            nothing can be trained on.
    """
    examples: list[Example] = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise TrainingError(f"{path}: cannot read the examples: {error}.") from error
        for number, line in enumerate(lines, 1):
            if line.strip():
                example = _parse(line, f"{path}:{number}", tokenizer, max_length, path.stem)
                if example is not None:
                    examples.append(example)
    if not examples:
        names = ", ".join(map(str, paths))
        raise TrainingError(f"{names}: nothing to train on: no line has a target that fits.")
    return examples


def _parse(line: str, where: str, tokenizer: Any, max_length: int, domain: str) -> Example | None:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise TrainingError(f"{where}: no valid JSON ({error.msg}).") from error
    if not isinstance(value, dict):
        raise TrainingError(f"{where}: must be an object, got {type(value).__name__}.")
    prompt, target = _token_ids(value, where, tokenizer)
    ids = (*prompt, *target)[:max_length]
    num_prompt = max(1, len(prompt))
    if num_prompt >= len(ids):
        return None
    return Example(ids, num_prompt, str(value.get("domain", domain)))


def _token_ids(
    value: Mapping[str, Any], where: str, tokenizer: Any
) -> tuple[Sequence[int], Sequence[int]]:
    """Prompt and target of one line."""
    if "token_ids" in value:
        return value.get("prompt_token_ids", ()), value["token_ids"]
    if "messages" in value:
        messages = value["messages"]
        if not messages or messages[-1].get("role") != "assistant":
            raise TrainingError(
                f"{where}: the last message must be the assistant's; prompts alone need "
                "--self-distill."
            )
        prompt = tokenizer.apply_chat_template(messages[:-1])
        whole = tokenizer.apply_chat_template(messages, add_generation_prompt=False)
        if whole[: len(prompt)] != prompt:
            raise TrainingError(f"{where}: the chat template changes the prompt once answered.")
        return prompt, whole[len(prompt) :]
    if "completion" in value and "prompt" in value:
        prompt = tokenizer.encode(value["prompt"])
        answer = tokenizer.encode(value["completion"], add_special_tokens=False)
        return prompt, [*answer, *([tokenizer.eos_token_id] if tokenizer.eos_token_id else [])]
    if "text" in value:
        return (), tokenizer.encode(value["text"])
    raise TrainingError(
        f"{where}: no example; write messages, prompt and completion, text, or "
        "prompt_token_ids and token_ids. Prompts alone need --self-distill."
    )
