"""What must hold between the fields of a study by the way in which its trials are measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from fathom.settings import ConfigError
from fathom.tuning.space import LIVE_ONLY, SERVED_ONLY, Dimension

if TYPE_CHECKING:
    from fathom.tuning.study import Study


def check_evaluation(study: Study) -> None:
    """Check that a study's trials can be measured as it says.

    Raises:
        ConfigError: naming the field, its value and the remedy.
    """
    dimensions = study.space.dimensions()
    if study.live.baseline.value != "none":
        _check_baseline(study, dimensions)
    if not study.is_served:
        _check_single(dimensions, SERVED_ONLY, "an engine in one process", "served")
    if study.runs_live:
        _check_live(study, dimensions)
        return
    _check_single(dimensions, LIVE_ONLY, "a replay", "live")
    if "throughput" in study.objectives:
        raise ConfigError(
            "objectives: throughput is of an engine with several requests, which a replay does "
            "not have: take evaluate: live, or tpot."
        )


def _check_single(
    dimensions: Mapping[str, Dimension], names: tuple[str, ...], what: str, remedy: str
) -> None:
    for name in names:
        if not dimensions[name].single:
            raise ConfigError(
                f"space.{name} has several values, which {what} cannot tell apart: take "
                f"evaluate: {remedy}, or one value."
            )


def _check_baseline(study: Study, dimensions: Mapping[str, Dimension]) -> None:
    what = f"live.baseline {study.live.baseline.value}"
    if not study.is_served:
        raise ConfigError(
            f"{what} is an application, as trials are with evaluate: served alone, got evaluate: "
            f"{study.evaluate.value}: take that, or leave the baseline out."
        )
    if not study.finalists:
        raise ConfigError(f"finalists must be at least 1 with {what}, which they are beside.")
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        if not dimensions[name].single:
            raise ConfigError(
                f"space.{name} must be one value with {what}, got {getattr(study.space, name)!r}: "
                "both must have the same limits, and as many requests at once."
            )
    if study.live.vllm.gpus:
        raise ConfigError(
            f"live.vllm.gpus must be 0, got {study.live.vllm.gpus!r}: trials run on live.cpus."
        )


def check_baseline_source(study: Study, quantization: str) -> None:
    """Check that the baseline can run what was traced.

    Raises:
        ConfigError: naming the field, its value and the remedy.
    """
    if study.live.baseline.value != "none" and quantization != "none":
        raise ConfigError(
            f"live.baseline {study.live.baseline.value} runs weights that are not quantized, and "
            f"the traces are of quantization {quantization!r}: record them without, or leave the "
            "baseline out."
        )


def _check_live(study: Study, dimensions: Mapping[str, Dimension]) -> None:
    how = study.evaluate.value
    if not study.live.prompts:
        raise ConfigError(
            "live.prompts must name the prompts that the traces were recorded from, with "
            f"evaluate: {how}."
        )
    if study.scheduler.value == "asha":
        raise ConfigError(
            f"scheduler asha begins trials on few rows of a trace, and evaluate: {how} has "
            "none: take scheduler none, or evaluate: replay."
        )
    if study.is_served and dimensions["threads"].values != (1,):
        raise ConfigError(
            f"space.threads must be left out with evaluate: served, got {study.space.threads!r}: "
            "a replica's threads follow from its share of live.cpus."
        )
    rows, stack = dimensions["max_num_batched_tokens"], dimensions["max_stack"]
    least = min(rows.values or (rows.low,))
    most = max(stack.values or (stack.high,))
    if least <= most:
        raise ConfigError(
            f"space.max_num_batched_tokens must exceed space.max_stack ({most}), got {least}: "
            "a stack is flushed in one pass."
        )
