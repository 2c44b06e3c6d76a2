"""What an evaluation's figures depend on, and whether they are there already."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fathom.config import EngineConfig
from fathom.engine.info import EngineInfo
from fathom.evaluation.bootstrap import CONFIDENCE, RESAMPLES
from fathom.evaluation.errors import EvaluationError
from fathom.evaluation.run import Load
from fathom.models.adapters import find_adapter
from fathom.models.files import weights_digest
from fathom.models.resolve import resolve_model

_ENGINE = (
    "model",
    "dtype",
    "device",
    "threads",
    "adapter",
    "exit_layer",
    "exit_vocab",
    "meta",
    "max_num_seqs",
    "max_model_len",
    "kv_cache_bytes",
)


def describe_job(
    config: EngineConfig,
    points: Sequence[str],
    loads: Sequence[Load],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """A JSON object that two evaluations share if one can go on with the other's answers.

    The model's and the adapter's contents count, not their names alone: a folder that was trained
    into again holds another adapter.

    Args:
        settings: limit, new_tokens, runs and agreement.

    Raises:
        ModelError: if there is no such model or adapter.
    """
    weights = weights_digest(resolve_model(config.model))
    adapter = find_adapter(config.adapter, config.model, weights)
    return {
        "tasks": {
            each.task.name: {
                "file": each.path.name,
                "sha256": hashlib.sha256(each.path.read_bytes()).hexdigest(),
            }
            for each in loads
        },
        "modes": list(points),
        **settings,
        "engine": {name: getattr(config, name) for name in _ENGINE},
        "weights_sha256": weights,
        "adapter_sha256": adapter.digest if adapter else None,
        "compute": {**dataclasses.asdict(config.compute), "mode": None},
    }


def describe_engine(info: EngineInfo) -> dict[str, Any]:
    """What ran, and how the intervals were drawn: the part of a report's meta known here."""
    names = (
        "model",
        "weights_digest",
        "adapter",
        "num_layers",
        "exit_layer",
        "exit_depth",
        "exit_vocab",
        "dtype",
    )
    intervals = {"resamples": RESAMPLES, "confidence": CONFIDENCE, "over": "prompts"}
    return {**{name: getattr(info, name) for name in names}, "bootstrap": intervals}


def library_versions() -> dict[str, str]:
    """Versions of what the figures come from; a library that is not installed has none."""
    found = {}
    for name in ("torch", "transformers", "rouge-score", "sacrebleu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def is_complete(out: Path, partial: Path, job: Mapping[str, Any], *, resume: bool) -> bool:
    """Whether a resumed evaluation has nothing left to do.

    Args:
        out: the finished report. partial: what an interrupted evaluation left.

    Raises:
        EvaluationError: when there is an interrupted evaluation and ``resume`` is false, or a
            finished one of another job and ``resume`` is true.
    """
    if partial.exists():
        if not resume:
            raise EvaluationError(
                f"{partial} holds an interrupted evaluation: go on with --resume, or remove "
                "the file."
            )
        return False
    if not resume or not out.exists():
        return False
    try:
        done = json.loads(out.read_text())["meta"]["job"]
    except (ValueError, KeyError, TypeError):
        done = None
    if done != json.loads(json.dumps(job)):
        raise EvaluationError(
            f"{out} is of an evaluation with other data or options: name another file, or leave "
            "--resume out to replace it."
        )
    return True
