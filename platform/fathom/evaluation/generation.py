"""Tasks that generate: each mode's answers, what they cost, and how far they are from full's."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fathom.api.usage import add_compute
from fathom.bench.measure import median_ratio
from fathom.engine.trace import DraftRecord
from fathom.evaluation.agreement import agreement, coverage
from fathom.evaluation.answers import Answer, generate, requests_for
from fathom.evaluation.bootstrap import Interval, interval
from fathom.evaluation.encode import Ids, Scored, encode_item
from fathom.evaluation.metrics import Statistic, bleu, exact_match, mean, ratio, rouge_l
from fathom.evaluation.points import RANDOM, rate_giver
from fathom.evaluation.session import FULL, Row, Session, blocks, new_row
from fathom.evaluation.tasks import GenerationTask, Item, Metric
from fathom.types import ComputePolicy

NOTHING = Interval(None, None, None)


@dataclass(slots=True)
class Rate:
    """Tokens of some answers, and the seconds that they took."""

    tokens: int = 0
    seconds: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """Prefill included."""
        return self.tokens / max(self.seconds, 1e-9)


@dataclass(slots=True)
class Measured:
    """All answers of a task.

    Attributes:
        answers: mode -> the first run's, in the items' order.
        rates: (mode, run, group) -> tokens and seconds.
    """

    answers: dict[str, list[Answer]] = field(default_factory=lambda: defaultdict(list))
    rates: dict[tuple[str, int, str], Rate] = field(default_factory=lambda: defaultdict(Rate))


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a task's items that share rows of the report. places: indices of the items."""

    name: str
    groups: tuple[str, ...]
    places: tuple[int, ...]


def measure_generation(session: Session, task: GenerationTask, items: Sequence[Item]) -> list[Row]:
    """The rows of a task: a group at a time, full depth first, then the other modes.

    Args:
        items: those of a group side by side.
    """
    new_tokens = session.new_tokens or task.new_tokens
    room = session.max_prompt - new_tokens
    encoded = [encode_item(session.engine.tokenizer, task, item, room) for item in items]
    session.truncated[task.name] = sum(cut for _, cut in encoded)
    prompts = [ids for ids, _ in encoded]
    groups = list(dict.fromkeys(item.group for item in items))
    parts = [
        Part(name, (name,), tuple(i for i, item in enumerate(items) if item.group == name))
        for name in groups
    ]
    measured = answer_parts(session, task, prompts, parts, new_tokens)
    drafts = _probe(session, task, prompts, parts, new_tokens)
    if groups != [task.name]:
        parts.append(Part(task.name, tuple(groups), tuple(range(len(items)))))
    rows = []
    for part in parts:
        for mode in session.policies:
            figures = _figures(session, mode, part, measured, drafts)
            for metric, found in _metrics(session, task, mode, part, items, prompts, measured):
                row = new_row(part.name, mode, len(part.places), metric, found)
                rows.append(_filled(row, figures))
    return rows


def answer_parts(
    session: Session,
    task: GenerationTask,
    prompts: Sequence[Ids],
    parts: Sequence[Part],
    new_tokens: int,
) -> Measured:
    """Answer every prompt in every mode, a block in all modes before the next block.

    So a machine's slow minutes meet all modes, and an interruption costs a block.

    Args:
        parts: of the prompts, each one's places in order; together all of them.
    """
    measured = Measured()
    total = len(prompts) * len(session.policies) * session.runs
    advance = session.progress(task.name, total)
    for run in range(session.runs):
        for part in parts:
            for block in blocks(part.places, session.block):
                for mode, policy in session.policies.items():
                    key = f"{task.name}/{mode}/run {run}/{block[0]}"
                    value = session.partial.get(key)
                    if value is None:
                        own = [prompts[i] for i in block]
                        if mode == RANDOM:
                            policy = _at_rate(session, measured, part, policy)
                        requests = requests_for(own, policy, new_tokens, first_seed=block[0])
                        answers, seconds = generate(session.engine, requests, advance)
                        value = {
                            "seconds": seconds,
                            "tokens": sum(len(answer.token_ids) for answer in answers),
                            # The other runs' answers are the first one's again.
                            "answers": [answer.to_json() for answer in answers] if not run else [],
                        }
                        session.partial.put(key, value)
                    else:
                        for _ in block:
                            advance()
                    measured.answers[mode] += [Answer.from_json(a) for a in value["answers"]]
                    rate = measured.rates[mode, run, part.name]
                    rate.tokens += value["tokens"]
                    rate.seconds += value["seconds"]
    return measured


def _at_rate(
    session: Session, measured: Measured, part: Part, policy: ComputePolicy
) -> ComputePolicy:
    """Forced exits at the rate that the point before them has shown on this part so far."""
    giver = rate_giver(session.policies)
    assert giver is not None
    answered = measured.answers[giver]
    page = add_compute(answered[i].compute for i in part.places if i < len(answered))
    return dataclasses.replace(policy, forced_exit_rate=page.exit_rate or 0.0)


def _probe(
    session: Session,
    task: GenerationTask,
    prompts: Sequence[Ids],
    parts: Sequence[Part],
    new_tokens: int,
) -> dict[str, list[DraftRecord]]:
    """Group -> every decision row's draft; empty without a probe, or where no mode drafts."""
    found: dict[str, list[DraftRecord]] = defaultdict(list)
    if session.probe is None or not any(each.drafts for each in session.policies.values()):
        return found
    advance = session.progress(f"{task.name} agreement", len(prompts))
    for part in parts:
        for block in blocks(part.places, session.block):
            key = f"{task.name}/probe/{block[0]}"
            values = session.partial.get(key)
            if values is None:
                own = [prompts[i] for i in block]
                requests = requests_for(own, session.policies[FULL], new_tokens, block[0])
                values = [dataclasses.asdict(r) for r in session.probe(session.engine, requests)]
                for value in values:
                    value["request_id"] = f"{task.name}/{block[int(value['request_id'])]}"
                session.partial.put(key, values)
            for _ in block:
                advance()
            records = [DraftRecord(**{**v, "lse": tuple(v["lse"])}) for v in values]
            for record in records:
                session.on_draft(record)
            found[part.name] += records
    return found


@dataclass(frozen=True, slots=True)
class Figures:
    """What a mode did and cost on a part of a task; names as in ``Row``."""

    agreement: float | None
    acceptance: float | None
    exit_rate: float | None
    coverage_at_precision_95: float | None
    layers_per_token: float | None
    tokens_per_s: float | None
    speedup_over_full: float | None


def _filled(row: Row, figures: Figures) -> Row:
    row.update(dataclasses.asdict(figures))  # type: ignore[typeddict-item]
    return row


def _figures(
    session: Session,
    mode: str,
    part: Part,
    measured: Measured,
    drafts: Mapping[str, list[DraftRecord]],
) -> Figures:
    page = add_compute(measured.answers[mode][i].compute for i in part.places)
    own, full = (
        [_rate(measured, name, run, part) for run in range(session.runs)] for name in (mode, FULL)
    )
    records: list[DraftRecord] = []
    if session.policies[mode].drafts:
        records = [record for group in part.groups for record in drafts.get(group, ())]
    return Figures(
        agreement=agreement(records),
        acceptance=page.acceptance_rate,
        exit_rate=page.exit_rate,
        coverage_at_precision_95=coverage(records),
        layers_per_token=page.layers_per_token,
        tokens_per_s=own[0],
        speedup_over_full=median_ratio(own, full),
    )


def _rate(measured: Measured, mode: str, run: int, part: Part) -> float:
    rates = [measured.rates[mode, run, group] for group in part.groups]
    return Rate(sum(r.tokens for r in rates), sum(r.seconds for r in rates)).tokens_per_s


def _metrics(
    session: Session,
    task: GenerationTask,
    mode: str,
    part: Part,
    items: Sequence[Item],
    prompts: Sequence[Ids],
    measured: Measured,
) -> list[tuple[str | None, Interval]]:
    """A mode's metrics: the task's own, then how far it is from the full model.

    The negative log-likelihood has a row of mode full too: it is what the others are read against.
    """
    if task.metric is None:
        return [(None, NOTHING)]
    answers = [measured.answers[mode][i] for i in part.places]
    texts = [answer.text.strip() for answer in answers]
    references = [items[i].references for i in part.places]
    own = quality(task.metric, texts, references)
    found: list[tuple[str | None, Interval]] = [(task.metric, interval(own))]
    if mode != FULL:
        full_texts = [(measured.answers[FULL][i].text.strip(),) for i in part.places]
        found.append(("rougeL_to_full", interval(mean(rouge_l(texts, full_texts)))))
    scored = [
        Scored(prompts[i] + tuple(answer.token_ids), len(prompts[i]))
        for i, answer in zip(part.places, answers, strict=True)
    ]
    scores = session.score(f"{task.name}/{mode}/nll", f"{task.name} {mode} NLL", scored)
    nll = ratio([-total for total, _ in scores], [count for _, count in scores])
    found.append(("nll_under_full", interval(nll)))
    return found


def quality(
    metric: Metric, answers: Sequence[str], references: Sequence[Sequence[str]]
) -> Statistic:
    """A task's own metric of its answers."""
    if metric == "bleu":
        return bleu(answers, references)
    return mean((rouge_l if metric == "rougeL" else exact_match)(answers, references))
