"""Prompts for a benchmark that is given none: short and long, prose, code, sums and lists."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

QUESTIONS = (
    "Explain in simple words why the sky is blue.",
    "Write a short story about a lighthouse keeper who finds a message in a bottle.",
    "Write a Python function that returns the n-th Fibonacci number, and explain it.",
    "A shop sells pencils at 3 for 2 dollars. How much do 18 pencils cost? Show your steps.",
    "List five things to check before renting an apartment, with a sentence on each.",
    "Translate into French: The train leaves at nine, and we must not be late again.",
    "Summarize in two sentences: The city council met on Tuesday to discuss the new park. Several "
    "residents asked for more trees and benches, while others worried about the cost and the loss "
    "of parking. The mayor promised a revised plan by the end of the month, with two designs to "
    "choose from and a public vote in spring.",
    "What is the difference between a virus and a bacterium?",
    "Write a polite email asking a colleague to send last week's sales figures.",
    "Give three arguments for and three arguments against working from home.",
    "Who wrote Romeo and Juliet, and what is the play about?",
    "Describe how bread is made, step by step, from flour to loaf.",
)


def token_prompts(tokenizer: Any, count: int, length: int = 0) -> list[tuple[int, ...]]:
    """The questions as token ids, beginning again when there are no more.

    Args:
        tokenizer: a ``models.tokenizer.Tokenizer``.
        length: of each prompt in tokens: text of the questions, each prompt beginning with another
            one. 0 takes each question as it is, in the model's chat template if it has one.
    """
    texts = list(itertools.islice(itertools.cycle(QUESTIONS), count))
    if length:
        return [
            tuple(itertools.islice(_tokens_from(tokenizer, first), length))
            for first in range(len(texts))
        ]
    if not tokenizer.hf.chat_template:
        return [tuple(tokenizer.encode(text)) for text in texts]
    return [
        tuple(tokenizer.apply_chat_template([{"role": "user", "content": text}])) for text in texts
    ]


def _tokens_from(tokenizer: Any, first: int) -> Iterator[int]:
    """Tokens without end: the questions, from one of them on."""
    start = first % len(QUESTIONS)
    while True:
        yield from tokenizer.encode(" ".join(QUESTIONS[start:] + QUESTIONS[:start]))
