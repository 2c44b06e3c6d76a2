"""The trials of a study on disk: the one record that says what was begun and what is done.

Ray Tune keeps its own state too, but copies it file by file while it runs: a process that is killed
can leave a searcher that knows other trials than the run does. So a trial is written down here
before it runs, and its figures once they are there, each file whole or not at all; a resumed study
is made from these files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fathom.tuning.objective import Figures
from fathom.tuning.study import Setting


@dataclass(frozen=True, slots=True)
class Trial:
    """A trial that is done.

    Attributes:
        seconds: of its replay.
    """

    number: int
    setting: Setting
    figures: Figures
    seconds: float


class Ledger:
    """Files of a study's trials; its folder must be the same for all processes of the search."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self, setting: Mapping[str, Any]) -> int:
        """Note a trial before it runs; returns its number. One process alone may call this."""
        number = len(self.begun())
        _write(self._folder / f"{number:05d}.begun.json", {"setting": dict(setting)})
        return number

    def finish(self, trial: Trial) -> None:
        """Note what a trial gave."""
        _write(self._result(trial.number), asdict(trial))

    def begun(self) -> dict[int, Setting]:
        """Settings by number, of all trials."""
        return {
            int(path.name[:5]): json.loads(path.read_text())["setting"]
            for path in sorted(self._folder.glob("*.begun.json"))
        }

    def done(self, without: frozenset[int] = frozenset()) -> list[Trial]:
        """Trials that are done, by number, without those that the caller has already."""
        found = []
        for path in sorted(self._folder.glob("*.done.json")):
            number = int(path.name[:5])
            if number not in without:
                found.append(self._read(path))
        return found

    def result(self, number: int) -> Trial | None:
        """What a trial gave, if it is done."""
        path = self._result(number)
        return self._read(path) if path.exists() else None

    def _result(self, number: int) -> Path:
        return self._folder / f"{number:05d}.done.json"

    def _read(self, path: Path) -> Trial:
        body = json.loads(path.read_text())
        return Trial(**{**body, "figures": Figures(**body["figures"])})


def _write(path: Path, body: Mapping[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(body))
    partial.replace(path)
