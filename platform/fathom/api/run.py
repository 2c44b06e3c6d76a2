"""One API call under way: its engine requests, what comes back as choices, its usage."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING

from fathom.api.backend import Backend
from fathom.api.errors import failure_of
from fathom.api.fanout import interleave
from fathom.api.records import Given, Progress
from fathom.api.responses import Choice
from fathom.api.schemas import ComputeOptions
from fathom.observability.metrics import RequestTimer
from fathom.types import InvalidRequest, Request, RequestOutput, Token, Usage

if TYPE_CHECKING:
    from fathom.observability.tracing import RequestSpan


class Run:
    """Runs the engine requests of one API call, all with the same ``n``.

    Args:
        given: by index, what completions have given already where this goes on with them.
        span: of its trace, if it is traced; ended with it.

    Attributes:
        usages: (prompt, completion) -> usage, complete once ``batches`` has ended.
    """

    def __init__(
        self,
        backend: Backend,
        requests: Sequence[Request],
        timer: RequestTimer,
        given: Mapping[int, Given] | None = None,
        span: RequestSpan | None = None,
    ) -> None:
        self._backend = backend
        self._requests = requests
        self._timer = timer
        self._span = span
        self._reasons: list[str] = []
        self._n = n = requests[0].n
        given = given or {}
        self._finished = {index for index, each in given.items() if each.finished}
        self._offsets = {index: each.characters for index, each in given.items()}
        self._scored: dict[int, Sequence[Token]] = {  # prompt -> its tokens
            index // n: each.scored for index, each in given.items() if each.scored
        }
        self.usages: dict[tuple[int, int], Usage] = {
            divmod(index, n): each.usage for index, each in given.items() if each.usage
        }

    async def batches(self) -> AsyncGenerator[list[Choice], None]:
        """News of the choices, in order. Closing this early cancels the requests.

        Raises:
            ApiError: when a completion ends in an error or at its deadline.
            InvalidRequest, QueueFull, BackendUnavailable: from the backend.
        """
        n = self._n
        wanted = [i for i in range(n * len(self._requests)) if i not in self._finished]
        self._timer.begin(wanted)
        reason = "cancelled"
        failure: Exception | None = None
        prompts = sorted({index // n for index in wanted})
        streams = [self._backend.generate(self._requests[prompt]) for prompt in prompts]
        try:
            async with aclosing(interleave(streams)) as outputs:
                async for position, batch in outputs:
                    prompt = prompts[position]
                    news = [out for out in batch if prompt * n + out.index not in self._finished]
                    if news:
                        yield [self._choice(prompt, out) for out in news]
        except InvalidRequest as error:
            reason, failure = "error", error
            raise _in_the_callers_words(error) from error
        except Exception as error:
            reason, failure = "error", error
            raise
        finally:
            self._timer.abandon(reason)
            if self._span is not None:
                self._span.end(self.usages, self._reasons, failure)

    def progress(self, choice: Choice) -> Progress:
        """What the latest news of a completion brought, as it is kept."""
        prompt, completion = divmod(choice.index, self._n)
        return Progress(
            index=choice.index,
            token_ids=tuple(token.id for token in choice.tokens),
            depths=tuple(token.depth for token in choice.tokens),
            characters=len(choice.text),
            finished=choice.finish_reason is not None,
            usage=self.usages.get((prompt, completion)),
            scored=tuple(choice.prompt) if not completion else (),
        )

    def _choice(self, prompt: int, out: RequestOutput) -> Choice:
        index = prompt * self._n + out.index
        self._timer.tokens(index, len(out.tokens))
        if self._span is not None and out.tokens:
            self._span.tokens()
        if out.usage is not None:
            self.usages[prompt, out.index] = out.usage
        if out.finish_reason is not None:
            self._timer.finish(index, out.finish_reason.value)
            self._reasons.append(out.finish_reason.value)
        failure = failure_of(out)
        if failure is not None:
            raise failure
        if out.prompt_tokens is not None:
            self._scored[prompt] = out.prompt_tokens
        is_first = index not in self._offsets
        offset = self._offsets.get(index, 0)
        self._offsets[index] = offset + len(out.text)
        return Choice(
            index=index,
            text=out.text,
            tokens=out.tokens,
            finish_reason=out.finish_reason,
            stop_reason=out.stop_reason,
            offset=offset,
            # Completion 0 has the scores on its first output, which comes before all others'.
            prompt=self._scored.get(prompt, ()) if is_first else (),
        )


def _in_the_callers_words(error: InvalidRequest) -> InvalidRequest:
    """The engine knows the fields of ``compute`` without their prefix."""
    if error.param not in ComputeOptions.model_fields:
        return error
    return InvalidRequest(f"compute.{error}", param=f"compute.{error.param}", code=error.code)
