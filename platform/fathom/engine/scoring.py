"""Scoring a prompt: what the full model thinks of tokens that were given, not generated."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fathom.types import Token

# Rows whose logprobs are computed at once: at a vocabulary of 49152, 25 MB in float32.
ROWS_AT_ONCE = 128


class PromptScores:
    """The scores of one prompt, as far as the deep stage has come.

    The row of position p predicts the token at p + 1, so the rows [0, P - 1) of a prompt of P
    tokens are scored, in order and each once: what a preemption throws away is kept here.

    Args:
        prompt: its P token ids.
        num_top: alternatives to report at each position; 0 reports the prompt's tokens only.
        depth: number of layers L, which every prompt token passes.
    """

    def __init__(self, prompt: Sequence[int], num_top: int, depth: int) -> None:
        self._prompt = prompt
        self._num_top = num_top
        self._depth = depth
        self._tokens = [Token(prompt[0], depth)]  # nothing comes before it that could predict it
        self._taken = False

    @property
    def num_rows(self) -> int:
        """Leading rows that have been scored."""
        return len(self._tokens) - 1

    @property
    def complete(self) -> bool:
        """Whether every token has its score."""
        return len(self._tokens) == len(self._prompt)

    def rows_due(self, start: int, rows: int) -> int:
        """How many of the rows [start, start + rows) are still to be scored.

        Args:
            start: at most ``num_rows``: a row that is skipped would never be scored.
        """
        last = min(start + rows, len(self._prompt) - 1)
        return max(0, last - max(start, self.num_rows))

    def add(self, logits: torch.Tensor) -> None:
        """Score the next rows.

        Args:
            logits: [rows, vocabulary] of the full model, finite.
        """
        for row in range(0, len(logits), ROWS_AT_ONCE):
            part = logits[row : row + ROWS_AT_ONCE]
            first = len(self._tokens)
            ids = self._prompt[first : first + len(part)]
            for token, (logprob, top) in zip(
                ids, logprobs_of_rows(part, ids, self._num_top), strict=True
            ):
                self._tokens.append(Token(token, self._depth, logprob, top))

    def take(self) -> list[Token] | None:
        """The scored prompt, once; None before it is complete and after it was taken."""
        if self._taken or not self.complete:
            return None
        self._taken = True
        return self._tokens


def logprobs_of_rows(
    logits: torch.Tensor, tokens: Sequence[int], num_top: int
) -> list[tuple[float, dict[int, float] | None]]:
    """``sampling.logprobs_of`` for many rows.

    Args:
        logits: [rows, vocabulary] as the model gave them. tokens: one a row.

    Returns:
        for each row the token's logprob in nats, and token id -> logprob of the ``num_top`` best,
        best first (None for 0).
    """
    scores = torch.log_softmax(logits.float(), dim=-1)
    index = torch.tensor(tokens, dtype=torch.int64, device=scores.device)
    chosen = scores.gather(1, index[:, None])[:, 0].tolist()
    if not num_top:
        return [(logprob, None) for logprob in chosen]
    values, ids = scores.topk(min(num_top, scores.shape[-1]), dim=-1)
    tops = [dict(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
    return list(zip(chosen, tops, strict=True))
