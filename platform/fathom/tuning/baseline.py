"""What a study's finalists are compared with: vLLM, as an application on as many cores.

It answers the finalists' held-out requests once, at full depth, through the same HTTP. It comes
after them and not in turns, as both together would need the cores twice: a machine that is slower
by then makes a difference of its own.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ray

from fathom.tuning.finalists import Verified, task_options
from fathom.tuning.ledger import write_whole
from fathom.tuning.live_figures import LiveFigures
from fathom.tuning.live_parts import LivePart
from fathom.tuning.rows import SAME
from fathom.tuning.runner import Runner, filled
from fathom.tuning.study import Study

NAME = "vLLM, full depth"


@runtime_checkable
class RunsBaseline(Runner, Protocol):
    """A runner whose applications can be vLLM's as well."""

    def run_vllm(self, parts: Sequence[LivePart]) -> list[LiveFigures]:
        """Answer the prompts of each part at full depth on one replica of vLLM.

        Raises:
            ConfigError: where it has loaded another model, or its interpreter is not there.
            LiveError: for a request that fails.
        """
        ...


@dataclass(frozen=True, slots=True)
class Measured:
    """What the baseline gave.

    Attributes:
        data: names of the traces, one for each of ``live``. missing: why there are none.
        seconds: that it took, its start included.
    """

    data: list[str]
    live: list[LiveFigures]
    seconds: float
    missing: str = ""


def measure(runner: RunsBaseline, parts: Sequence[LivePart], folder: Path) -> Measured:
    """Run the baseline as a task of Ray's, unless ``folder`` has it; a failure is not kept.

    Args:
        parts: of held-out requests, of all exits; those of the first are taken, as it has none.
    """
    own = [part for part in parts if part.rows.exit == runner.study.first_exit]
    path = folder / f"baseline-{_key(runner.study, own)}.json"
    if path.exists():
        body = json.loads(path.read_text())
        body["live"] = [LiveFigures.from_dict(each) for each in body["live"]]
        return Measured(**body)
    start = time.perf_counter()
    task = ray.remote(_run).options(**task_options(runner, {}))
    try:
        live: list[LiveFigures] = ray.get(task.remote(runner, own))
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None) or error
        why = str(cause).strip().splitlines() or [type(cause).__name__]
        return Measured([], [], time.perf_counter() - start, why[-1])
    found = Measured([part.rows.name for part in own], live, time.perf_counter() - start)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(path, asdict(found))
    return found


def report_of(study: Study, found: Measured, verified: Sequence[Verified]) -> dict[str, Any]:
    """The baseline and the finalists beside it, as ``front.json`` has them.

    Ratios are above 1 where what is named is faster: ``speedup`` in milliseconds a token,
    ``throughput_ratio`` in tokens a second, ``over_full`` of vLLM over our own mode ``full``,
    which the finalists ran in turns with.
    """
    if found.missing:
        return {"name": NAME, "missing": found.missing}
    rows = [
        {
            "point": own.point,
            "trial": own.trial,
            "data": data,
            "tpot_ms": live.tpot_ms.value,
            "full_tpot_ms": live.full_tpot_ms.value,
            "speedup": _over(base.tpot_ms.value, live.tpot_ms.value),
            "full_speedup": _over(base.tpot_ms.value, live.full_tpot_ms.value),
            "tokens_per_s": live.tokens_per_s,
            "full_tokens_per_s": live.full_tokens_per_s,
            "throughput_ratio": _over(live.tokens_per_s, base.tokens_per_s),
            "full_throughput_ratio": _over(live.full_tokens_per_s, base.tokens_per_s),
        }
        for own in verified
        for data, live, base in zip(found.data, own.live, found.live, strict=True)
    ]
    full = _mean(live.full_tpot_ms.value for own in verified for live in own.live)
    tpot = _mean(each.tpot_ms.value for each in found.live)
    return {
        "name": NAME,
        "tpot_ms": tpot,
        "tokens_per_s": _mean(each.tokens_per_s for each in found.live),
        "over_full": _over(full, tpot),
        "cpus": study.live.cpus,
        "max_num_seqs": filled(study, {})["max_num_seqs"],
        "requests": sum(each.requests for each in found.live),
        "tokens": sum(each.tokens for each in found.live),
        "seconds": found.seconds,
        "data": [
            {
                "data": data,
                "tpot_ms": live.tpot_ms.value,
                "ci_low": live.tpot_ms.low,
                "ci_high": live.tpot_ms.high,
                "tokens_per_s": live.tokens_per_s,
            }
            for data, live in zip(found.data, found.live, strict=True)
        ],
        "finalists": rows,
    }


def _run(runner: RunsBaseline, parts: Sequence[LivePart]) -> list[LiveFigures]:
    return runner.run_vllm(parts)


def _key(study: Study, parts: Sequence[LivePart]) -> str:
    """Of everything that the baseline's figures depend on."""
    values = filled(study, {})
    text = json.dumps(
        {
            "engine": [values["max_num_seqs"], values["max_num_batched_tokens"]],
            "vllm": asdict(study.live.vllm),
            "cpus": study.live.cpus,
            "new_tokens": study.live.new_tokens,
            "prompts": [
                (part.rows.name, [getattr(part.rows.source, key) for key, _ in SAME], part.prompts)
                for part in parts
            ],
        },
        sort_keys=True,
    )
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _over(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None
