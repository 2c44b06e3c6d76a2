"""Training in this process, or in several through Ray Train; the same result either way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fathom.training.errors import TrainingError
from fathom.training.examples import Example
from fathom.training.exits import ExitTraining, train_exits


def train_on_workers(
    plan: ExitTraining,
    examples: Sequence[Example],
    heldout: Sequence[Example],
    work_dir: Path,
    *,
    out: Path,
    workers: int = 1,
    threads: int = 0,
    mlflow_uri: str = "",
) -> Path:
    """Train, and write the adapter; returns its folder.

    Args:
        workers: processes that share each step's batches, gradients averaged. They reach
            ``work_dir`` and ``out`` under the same paths.
        threads: torch threads of each; 0 leaves torch's choice.
        mlflow_uri: tracking server, ``none``, or empty for SQLite in ``work_dir``.

    Raises:
        TrainingError, ModelError: naming what cannot be used.
    """
    work = _Work(plan, examples, heldout, work_dir.resolve(), out.resolve(), threads, mlflow_uri)
    if workers == 1:
        work.run(rank=0, show=True)
        return out
    from ray import train as ray_train
    from ray.train.torch import TorchTrainer

    def loop() -> None:
        context = ray_train.get_context()
        work.run(rank=context.get_world_rank(), show=context.get_world_rank() == 0)

    gpu = plan.device.startswith("cuda")
    scaling = ray_train.ScalingConfig(
        num_workers=workers,
        use_gpu=gpu,
        resources_per_worker={"CPU": max(1, threads), **({"GPU": 1} if gpu else {})},
    )
    config = ray_train.RunConfig(name=plan.name, storage_path=str(work_dir.resolve() / "ray"))
    try:
        TorchTrainer(loop, scaling_config=scaling, run_config=config).fit()
    except Exception as error:
        raise TrainingError(f"training on {workers} workers failed: {error}") from error
    return out


class _Work:
    """What each worker does."""

    def __init__(
        self,
        plan: ExitTraining,
        examples: Sequence[Example],
        heldout: Sequence[Example],
        work_dir: Path,
        out: Path,
        threads: int,
        mlflow_uri: str,
    ) -> None:
        self.plan = plan
        self.examples, self.heldout = examples, heldout
        self.work_dir, self.out = work_dir, out
        self.threads, self.mlflow_uri = threads, mlflow_uri

    def run(self, *, rank: int, show: bool) -> None:
        """Train; the first worker keeps the records and writes the adapter."""
        import torch

        if self.threads:
            torch.set_num_threads(self.threads)
        if rank or self.mlflow_uri == "none":
            self._train(show=show, write=not rank)
            return
        from fathom.training.tracking import Tracker

        params: dict[str, Any] = asdict(self.plan)
        with Tracker(
            self.work_dir, name=self.plan.name, params=params, uri=self.mlflow_uri
        ) as tracker:
            self._train(show=show, write=True, log=tracker.log, on_save=tracker.flush)
            tracker.keep_file(self.out / "adapter.safetensors")

    def _train(self, *, show: bool, write: bool, **hooks: Any) -> None:
        outcome = train_exits(
            self.plan, self.examples, self.heldout, self.work_dir, show=show, **hooks
        )
        if write:
            outcome.write(self.out)
