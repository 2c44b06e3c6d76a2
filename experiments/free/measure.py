"""The methods run live on requests that chose nothing, by turns on one engine."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.free.methods import Method
from experiments.free.tasks import FreeTask
from fathom.api.usage import add_compute
from fathom.config import EngineConfig
from fathom.engine.engine import Engine
from fathom.evaluation.answers import Advance, Answer, generate, requests_for
from fathom.evaluation.bootstrap import Interval, interval
from fathom.evaluation.data import data_file
from fathom.evaluation.encode import Ids, encode_item
from fathom.evaluation.generation import Measured, Part, answer_parts, quality
from fathom.evaluation.job import describe_job
from fathom.evaluation.metrics import ratio
from fathom.evaluation.partial import Partial
from fathom.evaluation.run import Load
from fathom.evaluation.session import FULL, Session
from fathom.evaluation.tasks import Item
from fathom.tuning.live import rescore
from fathom.tuning.live_figures import Served
from fathom.tuning.operating_points import compute_fields

_ROUND = 2
"""Times as many requests as share the engine, between two turns of a method; at least 8."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a method gave; shares are of the output's tokens.

    Attributes:
        value, low, high: the task's own metric and its 95% bootstrap interval over requests.
        agreement, agreement_low, agreement_high: tokens that the full model would have chosen in
            their place, by the deep stage's verdicts; under methods that copy states nothing
            verifies, and one full pass over the finished text tells (``rescore``), as it does for
            the full model's own text: that is what passes of another shape alone change.
        exit_rate: decided at the exit. cost: mean cost of a token as a share of the full model's,
            by the depth at which it was decided (``ComputeUsage.realised_budget``).
        layers_per_token: layers x rows that ran, those of verifying passes included.
        deep_passes: passes of the deep stage a token, those over the prompt included: what is left
            of reading its weights.
        tokens_per_s: of all requests, prompts included. ratio: of that over the full model's,
            median over rounds; ratio_low, ratio_high: quartiles.
        tokens: of all answers.
    """

    name: str
    label: str
    family: str
    promised: float | None
    value: float
    low: float
    high: float
    agreement: float
    agreement_low: float
    agreement_high: float
    exit_rate: float
    cost: float
    layers_per_token: float
    deep_passes: float
    tokens_per_s: float
    ratio: float
    ratio_low: float
    ratio_high: float
    tokens: int


def measure(
    own: FreeTask,
    items: Sequence[Item],
    methods: Sequence[Method],
    folder: Path,
    config: EngineConfig,
    progress: Callable[[str, int], Advance],
) -> dict[str, Any]:
    """Run all methods on all requests; what is in ``folder`` already is not run again.

    Args:
        config: of the engine; ``max_num_seqs`` requests share it. Without prefix caching, or the
            second method would find the first one's blocks.

    Returns:
        ``meta`` and ``outcomes``, plain.

    Raises:
        EvaluationError: for a request that fails, or a folder with another comparison's results.
    """
    policies = {each.name: each.compute for each in methods}
    path = data_file(own.name, own.task.file)
    settings = {
        "requests": len(items),
        "new_tokens": own.new_tokens,
        "policies": {name: compute_fields(policy) for name, policy in policies.items()},
    }
    job = describe_job(config, list(policies), [Load(own.task, path)], settings)
    partial = Partial(folder / "live.jsonl", job)
    block = max(8, _ROUND * config.max_num_seqs)
    engine = Engine.from_config(config)
    try:
        session = Session(
            engine=engine, partial=partial, policies=policies, block=block, progress=progress
        )
        prompts = _prompts(session, own, items)
        _warm_up(session, prompts[0])
        parts = _rounds(len(items), block)
        measured = answer_parts(session, own.task, prompts, parts, own.new_tokens)
        outcomes = [
            _outcome(session, own, items, prompts, parts, measured, method) for method in methods
        ]
        info = engine.info
    finally:
        engine.close()
    return {
        "meta": {
            "task": own.name,
            "title": own.title,
            "metric": own.task.metric,
            "model": info.model,
            "weights_digest": info.weights_digest,
            "adapter_digest": info.adapter_digest,
            "exit_depth": info.exit_depth,
            "num_layers": info.num_layers,
            "dtype": info.dtype,
            "requests": len(items),
            "new_tokens": own.new_tokens,
            "at_once": config.max_num_seqs,
            "threads": config.threads,
            "cores": len(os.sched_getaffinity(0)),
            "rounds": len(parts),
        },
        "outcomes": [dataclasses.asdict(each) for each in outcomes],
    }


def _prompts(session: Session, own: FreeTask, items: Sequence[Item]) -> list[Ids]:
    # One token more, for the text that a full pass judges.
    room = session.max_prompt - own.new_tokens - 1
    return [encode_item(session.engine.tokenizer, own.task, item, room)[0] for item in items]


def _warm_up(session: Session, prompt: Ids) -> None:
    """The first passes of a process are slow: no method shall pay for them."""
    for policy in session.policies.values():
        generate(session.engine, requests_for([prompt], policy, 4), lambda: None)


def _rounds(count: int, size: int) -> list[Part]:
    """The requests' places, ``size`` at a time."""
    places = [tuple(range(start, min(start + size, count))) for start in range(0, count, size)]
    return [Part(f"round {n}", (f"round {n}",), own) for n, own in enumerate(places)]


def _outcome(
    session: Session,
    own: FreeTask,
    items: Sequence[Item],
    prompts: Sequence[Ids],
    parts: Sequence[Part],
    measured: Measured,
    method: Method,
) -> Outcome:
    answers = measured.answers[method.name]
    assert own.task.metric is not None
    texts = [answer.text.strip() for answer in answers]
    found = interval(quality(own.task.metric, texts, [item.references for item in items]))
    page = add_compute(answer.compute for answer in answers)
    agreement = interval(
        ratio(_right(session, own, prompts, method, answers), [len(a.token_ids) for a in answers])
    )
    rates = [measured.rates[method.name, 0, part.name] for part in parts]
    full = [measured.rates[FULL, 0, part.name] for part in parts]
    ratios = [o.tokens_per_s / f.tokens_per_s for o, f in zip(rates, full, strict=True)]
    low, median, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
    tokens = sum(rate.tokens for rate in rates)
    value, value_low, value_high = _known(found)
    right, right_low, right_high = _known(agreement)
    return Outcome(
        name=method.name,
        label=method.label,
        family=method.family,
        promised=method.promised,
        value=value,
        low=value_low,
        high=value_high,
        agreement=right,
        agreement_low=right_low,
        agreement_high=right_high,
        exit_rate=page.exit_rate,
        cost=1.0 if page.realised_budget is None else page.realised_budget,
        layers_per_token=page.layers_per_token,
        deep_passes=page.flushes / max(page.decided, 1),
        tokens_per_s=tokens / sum(rate.seconds for rate in rates),
        ratio=median,
        ratio_low=low,
        ratio_high=high,
        tokens=tokens,
    )


def _known(found: Interval) -> tuple[float, float, float]:
    assert found.value is not None and found.low is not None and found.high is not None
    return found.value, found.low, found.high


def _right(
    session: Session,
    own: FreeTask,
    prompts: Sequence[Ids],
    method: Method,
    answers: Sequence[Answer],
) -> list[int]:
    """Tokens of each answer that the full model would have chosen in their place."""
    served = [Served(list(answer.token_ids), answer.compute) for answer in answers]
    if method.name != FULL and not method.compute.copies_states:
        return [len(each.token_ids) - each.wrong for each in served]
    key = f"{own.name}/{method.name}/rescored"
    kept = session.partial.get(key)
    if kept is None:
        rescore(session.engine, prompts, served)
        kept = [each.right for each in served]
        session.partial.put(key, kept)
    return [int(each) for each in kept]


def figures(outcome: Mapping[str, Any]) -> dict[str, float]:
    """An outcome's numbers, for MLflow."""
    return {k: float(v) for k, v in outcome.items() if isinstance(v, (int, float))}
