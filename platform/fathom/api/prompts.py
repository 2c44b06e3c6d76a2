"""Prompts and messages of a request, on their way to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from fathom.api.schemas import Message
from fathom.types import InvalidRequest

MAX_PROMPTS = 128
ROLES = ("system", "developer", "user", "assistant")


class Tokenizer(Protocol):
    """What the API needs of a tokenizer (``fathom.models.tokenizer.Tokenizer`` has it)."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def token_text(self, token_id: int) -> str: ...

    def apply_chat_template(self, messages: Sequence[Any]) -> list[int]: ...


def tokenize_prompts(
    prompt: str | list[str] | list[int] | list[list[int]], tokenizer: Tokenizer
) -> list[list[int]]:
    """The token ids of each prompt in any of the four forms of ``prompt``.

    Raises:
        InvalidRequest: for too many prompts, or none.
    """
    if isinstance(prompt, str):
        return [tokenizer.encode(prompt)]
    if not prompt:
        raise InvalidRequest("prompt must not be empty.", param="prompt")
    if isinstance(prompt[0], int):
        return [list(prompt)]
    if len(prompt) > MAX_PROMPTS:
        raise InvalidRequest(
            f"prompt may hold at most {MAX_PROMPTS} prompts, got {len(prompt)}.", param="prompt"
        )
    return [tokenizer.encode(p) if isinstance(p, str) else list(p) for p in prompt]


def prompt_offsets(ids: Sequence[int], text: str, tokenizer: Tokenizer) -> list[int]:
    """Where each token of a prompt starts in the prompt's text, in characters.

    A token that the text leaves out (the one that begins a sequence, say) takes no room in it. One
    that starts inside a character has that character's offset.
    """
    characters = [i for i, character in enumerate(text) for _ in character.encode()]
    characters.append(len(text))
    data, at = text.encode(), 0
    offsets: list[int] = []
    for token in ids:
        offsets.append(characters[at])
        piece = tokenizer.token_bytes(token)
        if not data.startswith(piece, at):
            piece = piece.removeprefix(b" ")  # SentencePiece begins a text with a space
        if data.startswith(piece, at):
            at += len(piece)
    return offsets


def template_message(index: int, message: Message) -> dict[str, str]:
    """A message as chat templates take it.

    Args:
        index: its position, for errors.

    Raises:
        InvalidRequest: for an unknown role, or content that is no text.
    """
    where = f"messages[{index}]"
    if message.role not in ROLES:
        raise InvalidRequest(
            f"{where}.role must be one of {', '.join(ROLES)}, got {message.role!r}.",
            param=f"{where}.role",
        )
    content = message.content
    if isinstance(content, list):
        for part in content:
            if part.type != "text" or part.text is None:
                raise InvalidRequest(
                    f"{where}.content may hold parts of type 'text' only, got {part.type!r}.",
                    param=f"{where}.content",
                )
        content = "".join(part.text or "" for part in content)
    if content is None:
        raise InvalidRequest(f"{where}.content must be a text.", param=f"{where}.content")
    # OpenAI's newer name; chat templates know the older one.
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": content}
