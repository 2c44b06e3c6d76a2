"""One completion of a request at vLLM: what vLLM says of it becomes our outputs and usage."""

from __future__ import annotations

from typing import Any

from fathom.engine.info import EngineInfo
from fathom.engine.text import DetokenizerFactory, TextStream
from fathom.ledger import Ledger
from fathom.types import (
    ComputeUsage,
    FinishReason,
    Request,
    RequestOutput,
    Resumed,
    Token,
    Usage,
)
from fathom.vllm.convert import scored_prompt, tokens_of


class Completion:
    """Where one completion stands.

    The end of it is found here, by the same rules as in our own engine (``engine.output``), and in
    the text that our own detokenizer makes: equal tokens give equal answers.

    Args:
        index: which of the request's completions. ledger: takes what was run for it.
        new_detokenizer: None where only token ids matter.

    Attributes:
        finish_reason: set once nothing more of it is wanted.
        prompt: token ids that vLLM gets: the request's, and what was given before a loss.
    """

    def __init__(
        self,
        request: Request,
        index: int,
        info: EngineInfo,
        ledger: Ledger,
        new_detokenizer: DetokenizerFactory | None,
    ) -> None:
        params = request.sampling
        given = request.resumed[index] if request.resumed else Resumed()
        self.index = index
        self.given = given
        self.prompt = (*request.prompt_token_ids, *given.token_ids)
        self.finish_reason: FinishReason | None = None
        self._request = request
        self._info = info
        self._ledger = ledger
        self._page = ComputeUsage(mode=request.compute.mode.value)
        self._text = TextStream(new_detokenizer() if new_detokenizer else None, params.stop)
        eos = () if params.ignore_eos else info.eos_token_ids
        self._stop_ids = {*eos, *params.stop_token_ids}
        room = info.max_model_len - len(request.prompt_token_ids)
        self._max_tokens = min(params.max_tokens, room)
        self._stop_reason: str | int | None = None
        self._count = 0  # of the output's tokens
        self._rows = 0  # rows that vLLM has run for it
        self._cached = 0
        if request.resumed:
            ledger.enter_resumption(self._page, given.depths)
            for token in given.token_ids:
                if self.finish_reason is None:
                    self._advance(token)
            self._text.take()  # was shown

    @property
    def over(self) -> bool:
        """Whether nothing more of it is wanted."""
        return self.finish_reason is not None

    def take(self, output: Any) -> RequestOutput | None:
        """Take in what vLLM says is new: one of its ``RequestOutput``, with news alone (DELTA).

        Returns:
            what is new for the caller, with the usage if it has ended; None if nothing is.
        """
        (news,) = output.outputs
        params, depth = self._request.sampling, self._info.num_layers
        found = tokens_of(news.token_ids, news.logprobs, params.logprobs, depth)
        scores = self._prefill(output) if found and not self._rows else None
        kept: list[Token] = []
        for token in found:
            self._decode()
            if not self._max_tokens:  # the prompt was to be scored and no more
                self.finish_reason = FinishReason.LENGTH
            if self.finish_reason is not None:
                break
            kept.append(token)
            self._ledger.enter_token(self._page, depth)
            self._advance(token.id)
        error = None
        if self.finish_reason is None and news.finish_reason is not None:
            # By our rules it is not over: its engine has given up.
            self.finish_reason = FinishReason.ERROR
            error = f"vLLM ended it: {news.finish_reason}"
        if self.finish_reason is not None:
            return self._last(kept, scores, error)
        text = self._text.take()
        if not (kept or text or scores):
            return None
        return RequestOutput(self._request.request_id, self.index, kept, text, prompt_tokens=scores)

    def end(self, reason: FinishReason, error: str | None = None) -> RequestOutput:
        """The last output of a completion that ends before its time."""
        self.finish_reason = reason
        return self._last([], None, error)

    def _last(
        self, tokens: list[Token], scores: list[Token] | None, error: str | None
    ) -> RequestOutput:
        self._text.end()
        return RequestOutput(
            self._request.request_id,
            self.index,
            tokens,
            self._text.take(),
            finish_reason=self.finish_reason,
            stop_reason=self._stop_reason,
            error=error,
            prompt_tokens=scores,
            usage=Usage(
                prompt_tokens=len(self._request.prompt_token_ids),
                completion_tokens=self._count,
                cached_tokens=min(self._cached, len(self._request.prompt_token_ids)),
                compute=self._page,
            ),
        )

    def _advance(self, token: int) -> None:
        """Count one more token, take its text, and see whether the completion ends with it."""
        params = self._request.sampling
        self._count += 1
        if token in self._stop_ids:
            self.finish_reason = FinishReason.STOP
            self._stop_reason = token if token in params.stop_token_ids else None
            return
        stop = self._text.push(token)
        if stop is not None and self._count >= params.min_tokens:
            self.finish_reason, self._stop_reason = FinishReason.STOP, stop
        elif self._count >= self._max_tokens:
            self.finish_reason = FinishReason.LENGTH

    def _prefill(self, output: Any) -> list[Token] | None:
        """Enter the prompt's rows but the last; returns the prompt's scores, where it has any."""
        self._cached = output.num_cached_tokens or 0
        length = len(self.prompt)
        self._rows = length - 1
        if length - 1 > self._cached:
            self._enter(self._cached, length - 1 - self._cached)
        params = self._request.sampling
        if params.prompt_logprobs is None or self.index or self.given.token_ids:
            return None
        self._ledger.enter_lm_head(self._page, length - 1)
        # A prompt of one token has nothing to score.
        found = output.prompt_logprobs or [None] * length
        return scored_prompt(self.prompt, found, params.prompt_logprobs, self._info.num_layers)

    def _decode(self) -> None:
        """Enter the row that has chosen a token, of the prompt's rows the last one."""
        self._enter(self._rows, 1)
        self._rows += 1
        self._ledger.enter_lm_head(self._page, 1)

    def _enter(self, start: int, rows: int) -> None:
        self._ledger.enter_rows(
            self._page,
            start=start,
            rows=rows,
            first_decision=len(self.prompt) - 1,
            layers=self._info.num_layers,
        )
