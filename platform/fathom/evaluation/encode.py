"""From items to token ids that fit into the model's context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fathom.evaluation.errors import EvaluationError
from fathom.evaluation.tasks import ChoiceItem, GenerationTask, Item

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Scored:
    """A text whose last tokens are scored.

    Attributes:
        ids: all tokens. first: index of the first one that counts, at least 1.
    """

    ids: Ids
    first: int


def encode_item(tokenizer: Any, task: GenerationTask, item: Item, room: int) -> tuple[Ids, bool]:
    """A prompt's token ids; through the chat template, where the model has one.

    Args:
        room: most tokens. A longer prompt loses the end of its text, never of its template.

    Returns:
        the ids, and whether the text was cut.

    Raises:
        EvaluationError: when the template alone does not fit.
    """
    ids = _prompt(tokenizer, task, item.text)
    if len(ids) <= room:
        return ids, False
    text_ids = tokenizer.encode(item.text, add_special_tokens=False)
    keep = len(text_ids)
    while len(ids) > room:
        keep -= len(ids) - room
        if keep < 1:
            raise EvaluationError(
                f"{item.where}: the prompt does not fit into the {room} tokens that the answer "
                "leaves; lower --new-tokens or raise --max-model-len."
            )
        # Cut text may take more tokens than before, hence the loop.
        ids = _prompt(tokenizer, task, tokenizer.decode(text_ids[:keep]))
    return ids, True


def _prompt(tokenizer: Any, task: GenerationTask, text: str) -> Ids:
    content = task.template.format(text=text)
    if not tokenizer.hf.chat_template:
        return tuple(tokenizer.encode(content))
    return tuple(tokenizer.apply_chat_template([{"role": "user", "content": content}]))


def encode_choice(tokenizer: Any, item: ChoiceItem, room: int) -> tuple[list[Scored], bool]:
    """Each choice behind its context, as raw text, joined by a space.

    What is scored are the tokens after those of the context alone, as in lm-evaluation-harness
    (``_encode_pair``): blanks and line ends that the context ends with count as the choice's. A
    pair longer than ``room`` loses the beginning of its context.

    Returns:
        one a choice, and whether any was cut.
    """
    found, cut = [], False
    for context, continuation in zip(item.contexts, item.continuations, strict=True):
        whole = tuple(tokenizer.encode(f"{context} {continuation}"))
        # At least the last token counts, and a first token has nothing to be foretold from.
        first = max(1, min(len(tokenizer.encode(context.rstrip())), len(whole) - 1))
        surplus = max(0, len(whole) - room)
        cut = cut or surplus > 0
        found.append(Scored(whole[surplus:], max(1, first - surplus)))
    return found, cut


def encode_windows(
    tokenizer: Any, text: str, window: int, room: int, limit: int | None
) -> list[Scored]:
    """A text in windows of at most ``window`` and ``room`` tokens that do not overlap.

    Every window starts with the beginning-of-text token where the tokenizer adds one; otherwise
    its own first token goes unscored.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    start = tuple(token for token in tokenizer.encode("")[:1] if token == tokenizer.bos_token_id)
    size = min(window, room) - len(start)
    parts: Sequence[Ids] = [tuple(ids[i : i + size]) for i in range(0, len(ids), size)]
    windows = [Scored(start + part, 1) for part in parts if len(start + part) > 1]
    return windows[:limit]
