"""The work folder of ``fathom tune``: whose trials it holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.commands.options import UsageError
from fathom.commands.reports import write_json

if TYPE_CHECKING:
    from fathom.tuning.study import Study
    from fathom.tuning.study_traces import Traces


def claim(work_dir: Path, study: Study, traces: Traces) -> None:
    """Make the folder this study's, by a note of its fields in it.

    Traces are told by their content, so files may move. What runs live after the search has a
    record of its own. A note may be of a library that knew fewer fields, and then ran as their
    defaults say: what is not there counts as its default.

    Raises:
        UsageError: for a folder that has another study's trials, naming the first field at odds.
    """
    from fathom.tuning.study import Study

    note = work_dir / "study.json"
    own = _plain({**study.as_dict(), "traces": traces.digests})
    if note.exists():
        there = _with_defaults(json.loads(note.read_text()), _plain(Study().as_dict()))
        free = {"finalists"} if study.runs_live else {"finalists", "live"}
        ours, theirs = _of_trials(own), _of_trials(there)
        differs = [name for name in ours if name not in free and ours[name] != theirs[name]]
        if differs:
            name = differs[0]
            raise UsageError(
                f"{work_dir}: holds trials of a study whose {name} is {theirs[name]!r}, not "
                f"{ours[name]!r}: give another --work-dir, or delete this one."
            )
    write_json(note, own)


def _with_defaults(there: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The note with the fields that it lacks, those of groups of fields among them."""
    from fathom.tuning.study_live import Exit

    found = {**defaults, **there}
    for name, default in defaults.items():
        if isinstance(default, dict) and isinstance(found[name], dict):
            found[name] = {**default, **found[name]}
    default_exit = _plain(asdict(Exit()))
    found["exits"] = {name: {**default_exit, **each} for name, each in found["exits"].items()}
    return found


def _of_trials(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields without those of the baseline, which runs when the trials are over."""
    live = {k: v for k, v in fields["live"].items() if k not in ("baseline", "vllm")}
    return {**fields, "live": live}


def _plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Through JSON, which makes lists of tuples."""
    plain: dict[str, Any] = json.loads(json.dumps(fields))
    return plain
