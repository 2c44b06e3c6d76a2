"""Metrics, each as sums over prompts: what is summed can be resampled."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fathom.evaluation.errors import library

Array = NDArray[np.float64]

# A minus sign after a digit is a subtraction: "16-3" ends with 3.
_NUMBER = re.compile(r"(?:(?<!\d)-)?\d+(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Statistic:
    """A figure of a set of prompts, as a function of sums over them.

    Attributes:
        rows: [n, s] float64, what each prompt adds to the sums.
        combine: [B, s] sums of B sets -> [B] figures.
    """

    rows: Array
    combine: Callable[[Array], Array]


def mean(values: Sequence[float]) -> Statistic:
    """The mean over prompts."""
    return ratio(values, [1.0] * len(values))


def ratio(above: Sequence[float], below: Sequence[float]) -> Statistic:
    """The ratio of two sums: a mean a token, say."""
    return Statistic(_columns(above, below), _divide)


def perplexity(nll: Sequence[float], tokens: Sequence[float]) -> Statistic:
    """Exp of the mean negative log-likelihood a token, in nats."""
    return Statistic(_columns(nll, tokens), lambda sums: np.asarray(np.exp(_divide(sums))))


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Statistic:
    """Corpus BLEU, 0 to 100: sacrebleu's defaults (13a tokens, exp smoothing, 4-grams).

    Papineni et al. (2002): n-gram matches and lengths are summed over sentences before the ratios
    are taken, so those are the rows: matches, n-grams, answer and reference length.

    Raises:
        EvaluationError: when sacrebleu is not installed.
    """
    kind: Any = library("sacrebleu.metrics").BLEU
    scorer = kind()
    scores = [
        scorer.corpus_score([answer], [[each] for each in own])
        for answer, own in zip(answers, references, strict=True)
    ]
    rows = [[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores]

    def combine(sums: Array) -> Array:
        counts = np.rint(sums).astype(int).tolist()
        return np.array(
            [kind.compute_bleu(s[:4], s[4:8], s[8], s[9], smooth_method="exp").score
             for s in counts]
        )  # fmt: skip

    return Statistic(np.array(rows, dtype=np.float64).reshape(-1, 10), combine)


def rouge_l(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """F-measure of the longest common subsequence of words (Lin, 2004), 0 to 1, with stemming.

    Of several references the best counts, as SciTLDR's authors do. Two texts without a word agree.

    Raises:
        EvaluationError: when rouge-score is not installed.
    """
    scorer = library("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=True)
    return [
        max(
            1.0
            if answer.split() == reference.split()
            else float(scorer.score(reference, answer)["rougeL"].fmeasure)
            for reference in own
        )
        for answer, own in zip(answers, references, strict=True)
    ]


def exact_match(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """1 where the last number of the answer is the reference's, else 0."""
    return [
        float((found := final_number(answer)) is not None and found == final_number(own[0]))
        for answer, own in zip(answers, references, strict=True)
    ]


def final_number(text: str) -> Decimal | None:
    """The last number of a text, thousands separators left out; None without any."""
    numbers = _NUMBER.findall(text.replace(",", ""))
    return Decimal(numbers[-1]) if numbers else None


def _columns(*columns: Sequence[float]) -> Array:
    return np.array(columns, dtype=np.float64).T.reshape(-1, len(columns))


def _divide(sums: Array) -> Array:
    """First column over second; NaN for 0 / 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums[:, 0] / sums[:, 1])
