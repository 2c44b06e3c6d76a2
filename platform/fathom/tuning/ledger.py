"""The trials of a study on disk: the one record that says what was begun and what is done.

Ray Tune keeps its own state too, but copies it file by file while it runs: a process that is killed
can leave a searcher that knows other trials than the run does. So a trial is written down here
before it runs, its figures at each rung if it climbs any, and those that count once they are there
or a scheduler has stopped it, each file whole or not at all; a resumed study is made from these
files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fathom.tuning.objective import Figures
from fathom.tuning.space import Setting


@dataclass(frozen=True, slots=True)
class Trial:
    """A trial that is done.

    Attributes:
        seconds: of its replays.
        rung: at which the scheduler stopped it, 0 the lowest; its figures are of that rung's rows.
            None: they are of all rows.
    """

    number: int
    setting: Setting
    figures: Figures
    seconds: float
    rung: int | None = None


class Ledger:
    """Files of a study's trials; its folder must be the same for all processes of the search."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def begin(self, setting: Mapping[str, Any]) -> int:
        """Note a trial before it runs; returns its number. One process alone may call this."""
        number = len(self.begun())
        write_whole(self._folder / f"{number:05d}.begun.json", {"setting": dict(setting)})
        return number

    def note(self, trial: Trial) -> None:
        """Note what a trial gave at a rung, from which it may go on."""
        assert trial.rung is not None
        write_whole(self._rung(trial.number, trial.rung), asdict(trial))

    def finish(self, trial: Trial) -> None:
        """Note what a trial gave in the end."""
        write_whole(self._result(trial.number), asdict(trial))

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

    def at_rung(self, number: int, rung: int) -> Trial | None:
        """What a trial gave at a rung, if it has been there."""
        path = self._rung(number, rung)
        return self._read(path) if path.exists() else None

    def climbed(self, trial: Trial) -> list[Trial]:
        """What a trial that is done gave at each rung that it came to, from the lowest on."""
        count = len(list(self._folder.glob(f"{trial.number:05d}.rung-*.json")))
        found = [self.at_rung(trial.number, rung) for rung in range(count)]
        below = [each for each in found if each is not None]
        return below if trial.rung is not None else [*below, trial]

    def _rung(self, number: int, rung: int) -> Path:
        return self._folder / f"{number:05d}.rung-{rung}.json"

    def _result(self, number: int) -> Path:
        return self._folder / f"{number:05d}.done.json"

    def _read(self, path: Path) -> Trial:
        body = json.loads(path.read_text())
        return Trial(**{**body, "figures": Figures(**body["figures"])})


def write_whole(path: Path, body: Mapping[str, Any]) -> None:
    """Write a file of JSON, whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(body))
    partial.replace(path)
