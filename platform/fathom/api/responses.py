"""The bodies of answers: chat completions and completions, whole or as chunks of a stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from fathom.api.prompts import Tokenizer, prompt_offsets
from fathom.types import FinishReason, Token

MIN_LOGPROB = -9999.0  # JSON has no infinity


@dataclass(slots=True)
class Choice:
    """News of one completion, or all of it: what one entry of ``choices`` is made from.

    Attributes:
        offset: characters of the completion before this news, for ``text_offset``.
        prompt: the tokens of the prompt where they were scored, on a completion's first news.
    """

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    offset: int = 0
    prompt: Sequence[Token] = ()


class Dialect(Protocol):
    """What differs between the two endpoints."""

    @property
    def detailed(self) -> bool:
        """Whether choices tell something of every token, beside the text."""
        ...

    def whole(self, choice: Choice) -> dict[str, Any]:
        """An entry of ``choices`` of an answer in one piece."""
        ...

    def delta(self, choice: Choice) -> dict[str, Any]:
        """An entry of ``choices`` of a chunk."""
        ...

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        """An entry to send before the first news of a completion, if the protocol has one."""
        ...

    def envelope(
        self, choices: list[dict[str, Any]], *, chunk: bool, usage: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The object around ``choices``."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """What an answer's objects have in common. Plain values: another server can go on with it.

    Attributes:
        logprobs, depths: whether choices carry them. echo: the prompts' texts, by prompt, when
            they are to be repeated. n: completions a prompt.
    """

    response_id: str
    model: str
    fingerprint: str
    logprobs: bool = False
    depths: bool = False
    echo: Sequence[str] = ()
    n: int = 1
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def detailed(self) -> bool:
        """Whether choices tell something of every token, beside the text."""
        return self.logprobs or self.depths

    def envelope(
        self, kind: str, choices: list[dict[str, Any]], usage: dict[str, Any] | None
    ) -> dict[str, Any]:
        """The object around ``choices``; ``usage`` is left out when there is none."""
        body: dict[str, Any] = {
            "id": self.response_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }
        if usage is not None:
            body["usage"] = usage
        return body

    def entry(self, choice: Choice, **content: Any) -> dict[str, Any]:
        """An entry of ``choices`` around ``content``."""
        reason = choice.finish_reason
        entry = {
            "index": choice.index,
            **content,
            "finish_reason": None if reason is None else reason.value,
        }
        if choice.stop_reason is not None:
            entry["stop_reason"] = choice.stop_reason
        if self.depths:
            entry["depths"] = [token.depth for token in choice.tokens]
        return entry


@dataclass(frozen=True, slots=True)
class ChatDialect:
    """``/v1/chat/completions``."""

    style: Style
    tokenizer: Tokenizer

    @property
    def detailed(self) -> bool:
        return self.style.detailed

    def whole(self, choice: Choice) -> dict[str, Any]:
        message = {"role": "assistant", "content": choice.text, "refusal": None}
        return self.style.entry(choice, message=message, logprobs=self._logprobs(choice))

    def delta(self, choice: Choice) -> dict[str, Any]:
        delta = {"content": choice.text} if choice.text else {}
        return self.style.entry(choice, delta=delta, logprobs=self._logprobs(choice))

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def envelope(
        self, choices: list[dict[str, Any]], *, chunk: bool, usage: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        kind = "chat.completion.chunk" if chunk else "chat.completion"
        return self.style.envelope(kind, choices, usage)

    def _logprobs(self, choice: Choice) -> dict[str, Any] | None:
        if not self.style.logprobs:
            return None
        return {"content": [self._scored(token) for token in choice.tokens], "refusal": None}

    def _scored(self, token: Token) -> dict[str, Any]:
        top = (token.top_logprobs or {}).items()
        return {
            **self._alternative(token.id, token.logprob),
            "top_logprobs": [self._alternative(i, logprob) for i, logprob in top],
        }

    def _alternative(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        text = self.tokenizer.token_text(token_id)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode())}


@dataclass(frozen=True, slots=True)
class CompletionDialect:
    """``/v1/completions``."""

    style: Style
    tokenizer: Tokenizer

    @property
    def detailed(self) -> bool:
        return self.style.detailed

    def whole(self, choice: Choice) -> dict[str, Any]:
        text = self._prompt_text(choice) + choice.text
        logprobs = self._logprobs(choice.prompt, choice)
        return self.style.entry(choice, text=text, logprobs=logprobs)

    def delta(self, choice: Choice) -> dict[str, Any]:
        return self.style.entry(choice, text=choice.text, logprobs=self._logprobs((), choice))

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        if not self.style.echo:
            return None
        return {
            "index": choice.index,
            "text": self._prompt_text(choice),
            "logprobs": self._logprobs(choice.prompt, Choice(choice.index)),
            "finish_reason": None,
        }

    def envelope(
        self, choices: list[dict[str, Any]], *, chunk: bool, usage: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return self.style.envelope("text_completion", choices, usage)

    def _prompt_text(self, choice: Choice) -> str:
        """The prompt as it is to be repeated, or nothing."""
        return self.style.echo[choice.index // self.style.n] if self.style.echo else ""

    def _logprobs(self, prompt: Sequence[Token], choice: Choice) -> dict[str, Any] | None:
        """What is told of tokens: ``prompt``'s, then the completion's in ``choice``."""
        if not self.style.logprobs:
            return None
        tokens = [*prompt, *choice.tokens]
        texts = [self.tokenizer.token_text(token.id) for token in tokens]
        offsets = self._prompt_offsets(prompt, choice)
        offset = len(self._prompt_text(choice)) + choice.offset
        for text in texts[len(prompt) :]:
            offsets.append(offset)
            offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": [self._top(t, text) for t, text in zip(tokens, texts, strict=True)],
            "text_offset": offsets,
        }

    def _prompt_offsets(self, prompt: Sequence[Token], choice: Choice) -> list[int]:
        if not prompt:
            return []
        ids = [token.id for token in prompt]
        return prompt_offsets(ids, self._prompt_text(choice), self.tokenizer)

    def _top(self, token: Token, text: str) -> dict[str, float | None] | None:
        if token.logprob is None:  # the first of a prompt: nothing predicts it
            return None
        top: dict[str, float | None] = {}
        for i, logprob in (token.top_logprobs or {}).items():
            # Different tokens can show the same text; the best one stays.
            top.setdefault(self.tokenizer.token_text(i), _finite(logprob))
        top.setdefault(text, _finite(token.logprob))
        return top


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, MIN_LOGPROB)
