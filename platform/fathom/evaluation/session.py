"""What every task of an evaluation shares, and the form of a row of its report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict, TypeVar

from fathom.engine.trace import TraceListener
from fathom.evaluation.agreement import Probe
from fathom.evaluation.answers import Advance, log_likelihoods
from fathom.evaluation.bootstrap import Interval
from fathom.evaluation.encode import Scored
from fathom.evaluation.partial import Partial
from fathom.types import ComputePolicy

if TYPE_CHECKING:
    from fathom.engine.engine import Engine

FULL = "full"


class Row(TypedDict):
    """One metric of one mode of one task.

    Attributes:
        n: prompts, questions or windows. metric: None where only agreement and speed are measured.
        value, ci_low, ci_high: the figure and its 95% bootstrap interval over prompts.
        agreement, coverage_at_precision_95: of the exit head over every decision row, see
            ``agreement``; None without a probe.
        acceptance: share of verified drafts that the deep stage agreed with.
        exit_rate: share of the answers' tokens decided at the exit layer.
        layers_per_token: layer executions an output token, prefill left out.
        tokens_per_s: of the first run, prefill included.
        speedup_over_full: median over runs of tokens/s over that of mode full in the same run.
    """

    task: str
    mode: str
    n: int
    metric: str | None
    value: float | None
    ci_low: float | None
    ci_high: float | None
    agreement: float | None
    acceptance: float | None
    exit_rate: float | None
    coverage_at_precision_95: float | None
    layers_per_token: float | None
    tokens_per_s: float | None
    speedup_over_full: float | None


def new_row(task: str, mode: str, n: int, metric: str | None, found: Interval) -> Row:
    """A row without figures of depth and speed: a full-depth property has none."""
    return Row(
        task=task,
        mode=mode,
        n=n,
        metric=metric,
        value=found.value,
        ci_low=found.low,
        ci_high=found.high,
        agreement=None,
        acceptance=None,
        exit_rate=None,
        coverage_at_precision_95=None,
        layers_per_token=None,
        tokens_per_s=None,
        speedup_over_full=None,
    )


@dataclass(kw_only=True)
class Session:
    """One evaluation.

    Attributes:
        policies: of each point (``points.read_points``), under the name that its rows have.
        runs: how often every prompt is answered, for timing; the first run's answers count.
        block: prompts that are handed over together, timed and kept on disk as one.
        new_tokens, limit: None for each task's own length, and for all rows.
        progress: called with a label and a number of requests; gives what to call as one ends.
        on_draft: told of every draft that the probe has seen; request ids are TASK/ITEM.
        truncated: task -> prompts that were too long for the context.
    """

    engine: Engine
    partial: Partial
    policies: dict[str, ComputePolicy]
    runs: int = 1
    block: int = 32
    new_tokens: int | None = None
    limit: int | None = None
    progress: Callable[[str, int], Advance]
    probe: Probe | None = None
    on_draft: TraceListener = lambda record: None
    truncated: dict[str, int] = field(default_factory=dict)

    @property
    def max_prompt(self) -> int:
        """Most tokens of a prompt."""
        return self.engine.info.max_model_len - 1

    def score(self, key: str, label: str, texts: Sequence[Scored]) -> list[tuple[float, int]]:
        """Log-likelihood and token count of each text, block by block, kept as they come."""
        advance = self.progress(label, len(texts))
        found: list[tuple[float, int]] = []
        for number, block in enumerate(blocks(texts, self.block)):
            place = f"{key}/{number}"
            values = self.partial.get(place)
            if values is None:
                values = log_likelihoods(self.engine, block, advance)
                self.partial.put(place, values)
            else:
                for _ in block:
                    advance()
            found += [(float(total), int(count)) for total, count in values]
        return found


Value = TypeVar("Value")


def blocks(values: Sequence[Value], size: int) -> Iterator[Sequence[Value]]:
    """The values in order, ``size`` at a time; the last may be fewer."""
    for first in range(0, len(values), size):
        yield values[first : first + size]
