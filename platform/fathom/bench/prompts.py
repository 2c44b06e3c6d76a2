"""Prompts for a benchmark that is given none: short and long, prose, code, sums and lists."""

from __future__ import annotations

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
