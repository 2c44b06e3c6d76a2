"""What ``fathom tune`` runs live: the prompts, the finalists, and how far the replay was off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fathom.commands.prompts import check_lengths, encode_prompt, read_prompts

if TYPE_CHECKING:
    from rich.console import Console

    from fathom.tuning.finalists import Verified
    from fathom.tuning.ledger import Trial
    from fathom.tuning.live_figures import Ids
    from fathom.tuning.operating_points import OperatingPoints
    from fathom.tuning.runner import LiveTrials, Runner
    from fathom.tuning.study import Study
    from fathom.tuning.study_runs import StudyRuns
    from fathom.tuning.study_traces import Traces


class LiveRuns:
    """The live runs of a study whose prompts are read and checked.

    Attributes:
        study: with its adapters where every process finds them.
        parts: requests of trials, by trace, exit by exit. held_out: of finalists.

    Raises:
        UsageError: for prompts that cannot be read, or with their answers are too long.
        ConfigError: for prompts that a trace was not recorded from, or a baseline that cannot run
            what was traced.
        ModelError: for a model that is not to be had, or has no tokenizer.
    """

    def __init__(self, study: Study, folder: Path, traces: Traces, work_dir: Path) -> None:
        from fathom.tuning.live_parts import live_parts
        from fathom.tuning.study_checks import check_baseline_source

        self.study = study.located(folder)
        self._folder = work_dir / "live"
        check_baseline_source(study, traces.choose[0].source.quantization)
        files = _encode(study, folder, traces)
        self.parts = live_parts(study, files, traces.parts)
        self.held_out = live_parts(study, files, traces.held_out)

    def for_trials(self, runner: Runner) -> LiveTrials:
        """What live trials need; mode ``full`` is run first, unless the work folder has it."""
        from fathom.tuning.finalists import full_figures
        from fathom.tuning.runner import LiveTrials

        full = full_figures(runner, self.parts, self._folder)
        return LiveTrials(runner, self.parts, full)

    def verify(
        self,
        runner: Runner,
        trials: Sequence[Trial],
        points: Mapping[str, OperatingPoints],
        parallel: int,
        runs: StudyRuns | None,
    ) -> list[Verified]:
        """Run the finalists on held-out requests, with a line of progress."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
        )

        from fathom.tuning.finalists import finalists, verify

        wanted = finalists(self.study, trials, points)
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(),
        )  # fmt: skip
        with Progress(*columns, console=Console(stderr=True), refresh_per_second=2) as progress:
            task = progress.add_task(f"{self.study.name}: finalists live", total=len(wanted))

            def on_done(found: Verified) -> None:
                progress.advance(task)
                if runs is not None:
                    runs.add_live(found)

            return verify(
                runner, wanted, self.held_out, self._folder,
                parallel=parallel, on_done=on_done,
            )  # fmt: skip

    def baseline(
        self, runner: Runner, verified: Sequence[Verified], runs: StudyRuns | None
    ) -> dict[str, Any] | None:
        """Run what the finalists are compared with, if the study names it; see ``report_of``."""
        from rich.console import Console

        from fathom.tuning.baseline import NAME, RunsBaseline, measure, report_of

        # Of served studies alone: ``check_evaluation``.
        if self.study.live.baseline.value == "none" or not isinstance(runner, RunsBaseline):
            return None
        with Console(stderr=True).status(f"{self.study.name}: {NAME}"):
            found = measure(runner, self.held_out, self._folder)
        report = report_of(self.study, found, verified)
        if runs is not None:
            runs.add_baseline(report)
        return report


def _encode(study: Study, folder: Path, traces: Traces) -> list[list[Ids]]:
    """The prompts of each file of ``live.prompts``, as the traced model's tokens."""
    from fathom.models.config import ModelConfig
    from fathom.models.resolve import resolve_model
    from fathom.models.tokenizer import load_tokenizer

    directory = resolve_model(traces.choose[0].source.model)
    tokenizer = load_tokenizer(directory)
    longest = ModelConfig.from_directory(directory).max_position
    found = []
    for name in study.live.prompts:
        prompts = read_prompts(folder / name)
        encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
        # With one token more, so that a finished text can be scored.
        tokens = study.live.new_tokens + 1
        check_lengths(prompts, encoded, new_tokens=tokens, max_model_len=longest)
        found.append(encoded)
    return found


def show_errors(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table of what was foretold and what came."""
    from rich.table import Table

    table = Table(
        title="finalists live; replay beside it, on the same requests", title_justify="left"
    )
    table.add_column("point")
    table.add_column("data")
    for heading in ("exits", "replay", "agreement", "95%", "replay", "TPOT (ms)", "speed-up"):
        table.add_column(heading, justify="right")
    by_run: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        by_run.setdefault((row["point"], row["data"]), {})[row["figure"]] = row
    for (point, data), own in by_run.items():
        exits, quality = own["exit_rate"], own["quality"]
        table.add_row(
            point, data, f"{exits['live']:.1%}", f"{exits['replay']:.1%}",
            f"{quality['live']:.2%}", f"{quality['ci_low']:.2%} to {quality['ci_high']:.2%}",
            f"{quality['replay']:.2%}",
            f"{own['tpot_ms']['live']:.2f}" if "tpot_ms" in own else "",
            f"{own['speedup']['live']:.2f}" if "speedup" in own else "",
        )  # fmt: skip
    console.print(table)


def show_baseline(console: Console, baseline: Mapping[str, Any]) -> None:
    """A table of the baseline, and of each finalist with the mode ``full`` of its turns."""
    from rich.table import Table

    name = baseline["name"]
    if "missing" in baseline:
        console.print(f"{name}: not measured: {baseline['missing']}", highlight=False)
        return

    def text(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    table = Table(
        title=f"{name}, has {text(baseline['over_full'])} × the speed of our full "
        f"({baseline['max_num_seqs']} at once, {baseline['cpus']:g} cores)",
        title_justify="left",
    )
    for heading in ("point", "data"):
        table.add_column(heading)
    for heading in ("TPOT (ms)", "× vLLM's speed", "tokens/s", "× vLLM's"):
        table.add_column(heading, justify="right")
    for row in baseline["data"]:
        table.add_row(
            name, row["data"], text(row["tpot_ms"]), "1.00", text(row["tokens_per_s"]), "1.00"
        )
    for row in baseline["finalists"]:
        for point, which in ((f"{row['point']}, full", "full_"), (row["point"], "")):
            values = ("tpot_ms", "speedup", "tokens_per_s", "throughput_ratio")
            table.add_row(point, row["data"], *(text(row[f"{which}{each}"]) for each in values))
    console.print(table)
