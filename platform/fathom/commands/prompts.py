"""Prompt files: JSON lines, each ``{"prompt": text}`` or ``{"messages": [...]}``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fathom.commands.options import UsageError

_FORM = 'write {"prompt": "text"} or {"messages": [{"role": "user", "content": "text"}]}'


@dataclass(frozen=True, slots=True)
class Prompt:
    """One line of a prompt file: raw text, or messages for the model's chat template.

    Attributes:
        where: ``file:line``, for error messages. domain: the line's own, for figures by domain.
    """

    where: str
    text: str | None = None
    messages: tuple[dict[str, str], ...] | None = None
    domain: str = ""


def read_prompts(path: Path) -> list[Prompt]:
    """Read and check a whole prompt file. Empty lines are skipped, other fields are ignored.

    Raises:
        UsageError: for a file that cannot be read or holds no prompt, or naming the file and
            line of the first line that is not of the form.
    """
    try:
        # Not splitlines(): JSON strings may hold other line separators as they are.
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise UsageError(f"{path}: cannot read the prompts: {reason}.") from error
    prompts = [
        _parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()
    ]
    if not prompts:
        raise UsageError(f"{path}: no prompts; {_FORM}, one a line.")
    return prompts


def _parse(line: str, where: str) -> Prompt:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: no valid JSON ({error.msg}); {_FORM}.") from error
    if not isinstance(value, dict):
        raise UsageError(f"{where}: must be an object, got {type(value).__name__}; {_FORM}.")
    if ("prompt" in value) == ("messages" in value):
        raise UsageError(f'{where}: needs either "prompt" or "messages"; {_FORM}.')
    domain = str(value.get("domain", ""))
    if "prompt" in value:
        text = value["prompt"]
        if not isinstance(text, str) or not text:
            raise UsageError(f'{where}: "prompt" must be a non-empty string; {_FORM}.')
        return Prompt(where, text=text, domain=domain)
    messages = value["messages"]
    if not isinstance(messages, list) or not messages:
        raise UsageError(f'{where}: "messages" must be a non-empty list; {_FORM}.')
    for message in messages:
        fields = [message.get(k) for k in ("role", "content")] if isinstance(message, dict) else []
        if not fields or not all(isinstance(field, str) for field in fields):
            raise UsageError(f'{where}: a message needs "role" and "content", both text; {_FORM}.')
    return Prompt(where, messages=tuple(messages), domain=domain)


def encode_prompt(tokenizer: Any, prompt: Prompt) -> tuple[int, ...]:
    """The prompt's token ids; messages go through the model's chat template.

    Raises:
        UsageError: naming the prompt, where the model has no tokenizer or no chat template.
    """
    if tokenizer is None:
        raise UsageError(f"{prompt.where}: the model has no tokenizer, so it takes no text.")
    if prompt.messages is None:
        ids = tokenizer.encode(prompt.text)
    else:
        try:
            ids = tokenizer.apply_chat_template([dict(m) for m in prompt.messages])
        except ValueError as error:
            raise UsageError(f"{prompt.where}: {error}") from error
    if not ids:
        raise UsageError(f"{prompt.where}: the prompt has no tokens; give it some text.")
    return tuple(ids)


def check_lengths(
    prompts: Sequence[Prompt],
    encoded: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    max_model_len: int,
) -> None:
    """Check that every prompt and its answer fit into the context.

    Raises:
        UsageError: naming the first prompt that does not fit.
    """
    for prompt, ids in zip(prompts, encoded, strict=True):
        if len(ids) + new_tokens > max_model_len:
            raise UsageError(
                f"{prompt.where}: {len(ids)} prompt tokens and {new_tokens} new ones exceed the "
                f"context of {max_model_len}; shorten the prompt or lower --new-tokens."
            )
