"""Tasks that score given text at full depth: multiple choice and perplexity.

Nothing is drafted there, so they are figures of the full-depth model whatever the mode.
"""

from __future__ import annotations

from collections.abc import Sequence

from fathom.evaluation.bootstrap import interval
from fathom.evaluation.encode import Scored, encode_choice, encode_windows
from fathom.evaluation.metrics import mean, perplexity
from fathom.evaluation.session import FULL, Row, Session, new_row
from fathom.evaluation.tasks import ChoiceItem, ChoiceTask, PerplexityTask


def measure_choices(session: Session, task: ChoiceTask, items: Sequence[ChoiceItem]) -> list[Row]:
    """Rows ``acc_norm`` and ``acc``.

    As lm-evaluation-harness defines them: ``acc`` takes the choice of the greatest log-likelihood,
    ``acc_norm`` divides it by the choice's length in characters first.
    """
    tokenizer = session.engine.tokenizer
    texts: list[Scored] = []
    cuts = 0
    for item in items:
        own, cut = encode_choice(tokenizer, item, session.max_prompt)
        texts += own
        cuts += cut
    session.truncated[task.name] = cuts
    scores = iter(session.score(f"{task.name}/choices", task.name, texts))
    right: list[float] = []
    right_norm: list[float] = []
    for item in items:
        own_scores = [next(scores)[0] for _ in item.continuations]
        lengths = [len(text) for text in item.continuations]
        per_character = [score / length for score, length in zip(own_scores, lengths, strict=True)]
        right.append(float(own_scores.index(max(own_scores)) == item.gold))
        right_norm.append(float(per_character.index(max(per_character)) == item.gold))
    return [
        new_row(task.name, FULL, len(items), metric, interval(mean(values)))
        for metric, values in (("acc_norm", right_norm), ("acc", right))
    ]


def measure_perplexity(session: Session, task: PerplexityTask, text: str) -> list[Row]:
    """One row ``perplexity``, a token of the model's own tokenizer."""
    windows = encode_windows(
        session.engine.tokenizer, text, task.window, session.max_prompt, session.limit
    )
    scores = session.score(f"{task.name}/windows", task.name, windows)
    found = interval(perplexity([-total for total, _ in scores], [count for _, count in scores]))
    return [new_row(task.name, FULL, len(windows), "perplexity", found)]
