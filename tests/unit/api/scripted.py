"""An engine whose answers follow from prompt and seed alone, in pieces of random size.

It stands for the real one where thousands of streams are cut: it resumes requests as that does.
"""

from __future__ import annotations

import asyncio
import codecs
import random
from collections.abc import AsyncGenerator, Sequence

from fathom.api.backend import BackendUnavailable, ModelInfo, ReplicaReport
from fathom.engine.text import TextStream
from fathom.types import FinishReason, Request, RequestOutput, Resumed, Token, Usage

INFO = ModelInfo(
    num_layers=4, exit_layer=2, exit_depth=2, vocab_size=257, max_model_len=128, weights_digest="w"
)
ALPHABET = "abcdeé漢🙂 \n"


class ByteDetokenizer:
    """Token ids are bytes; text inside a character waits for the rest of it."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        return self._decoder.decode(bytes([token_id]))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class ScriptedEngine:
    """A backend (see ``fathom.api.backend.Backend``).

    Attributes:
        info: of the model. running: ids of requests under way.
        requests: all that were made, in order.
        fails_after: pieces of a request after which no engine is left; None never fails.
    """

    def __init__(self, pieces: int, pause_s: float = 0.0) -> None:
        self._pieces = random.Random(pieces)
        self._pause_s = pause_s
        self.running: set[str] = set()
        self.requests: list[Request] = []
        self.info = INFO
        self.fails_after: int | None = None

    async def reports(self) -> Sequence[ReplicaReport]:
        return [ReplicaReport(replica="scripted", info=self.info)]

    async def generate(self, request: Request) -> AsyncGenerator[list[RequestOutput], None]:
        assert request.request_id not in self.running, "ids are unique among live requests"
        self.running.add(request.request_id)
        self.requests.append(request)
        try:
            resumed = request.resumed or (Resumed(),) * request.n
            assert len(resumed) == request.n
            open_ones = [
                Completion(request, i, each) for i, each in enumerate(resumed) if not each.finished
            ]
            count = 0
            while open_ones:
                await asyncio.sleep(self._pause_s)
                if count == self.fails_after:
                    raise BackendUnavailable("The engine's replica has stopped.")
                count += 1
                chosen = self._pieces.sample(open_ones, self._pieces.randint(1, len(open_ones)))
                batch = [each.step(self._pieces.randint(1, 3)) for each in chosen]
                yield [out for out in batch if out.tokens or out.finish_reason is not None]
                open_ones = [each for each in open_ones if not each.ended]
        finally:
            self.running.discard(request.request_id)


class Completion:
    """One completion on its way."""

    def __init__(self, request: Request, index: int, resumed: Resumed) -> None:
        params = request.sampling
        assert params.seed is not None, "a request that may go on elsewhere has a seed"
        draw = random.Random(f"{request.prompt_token_ids} {params.seed + index}")
        text = "".join(draw.choice(ALPHABET) for _ in range(params.max_tokens))
        self._script = text.encode()[: params.max_tokens]
        self._depths = [draw.choice((2, 4)) for _ in self._script]
        self._request, self._index = request, index
        self._text = TextStream(ByteDetokenizer(), params.stop)
        self._at = 0
        self.ended = False
        self._reason: FinishReason | None = None
        self._stop: str | None = None
        for token, depth in zip(resumed.token_ids, resumed.depths, strict=True):
            assert (token, depth) == (self._script[self._at], self._depths[self._at])
            self._push()
        self._text.take()  # somebody has seen it

    def _push(self) -> Token:
        at = self._at
        self._at += 1
        self._stop = self._text.push(self._script[at])
        if self._stop is not None:
            self._reason = FinishReason.STOP
        elif self._at == len(self._script):
            self._reason = FinishReason.LENGTH
        return Token(self._script[at], self._depths[at], logprob=-0.5)

    def step(self, size: int) -> RequestOutput:
        """Some tokens; the end comes alone, as it does where a last flush is due."""
        out = RequestOutput(self._request.request_id, self._index)
        if self._reason is not None:
            self._text.end()
            self.ended = True
            out.finish_reason, out.stop_reason = self._reason, self._stop
            out.usage = Usage(len(self._request.prompt_token_ids), self._at)
        while self._reason is None and size:
            out.tokens.append(self._push())
            size -= 1
        out.text = self._text.take()
        return out
