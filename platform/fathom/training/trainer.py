"""The training loop: steps, and checkpoints that a killed run goes on from."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from fathom.training.errors import TrainingError
from fathom.training.examples import Batch, Example, digest_of, groups_of_epoch
from fathom.training.model import ShallowDeep
from fathom.training.objective import Objective, TrainSettings


@dataclass(slots=True)
class Progress:
    """Where a run is.

    Attributes:
        step: optimizer steps done. epoch, position: the next batch. best: of the checked figure.
        losses: of each step so far. checks: (step, figure) of each check.
    """

    step: int = 0
    epoch: int = 0
    position: int = 0
    best: float = -math.inf
    best_step: int = 0
    losses: list[float] = field(default_factory=list)
    checks: list[tuple[int, float]] = field(default_factory=list)


class Trainer:
    """Trains a ``ShallowDeep``.

    Args:
        objective: holds the model and says what a batch's loss is.
        device: where the model lies. work_dir: where checkpoints lie.
        depends_on: whatever else a checkpoint belongs to, as JSON values.
    """

    def __init__(
        self,
        objective: Objective,
        examples: Sequence[Example],
        *,
        work_dir: Path,
        device: str = "cpu",
        depends_on: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = objective.model
        self.settings = settings = objective.settings
        self.progress = Progress()
        self._objective = objective
        self._examples = examples
        self._owner = {
            "settings": asdict(settings),
            "shape": asdict(self.model.shape),
            "data": {"examples": digest_of(examples), **(depends_on or {})},
        }
        self._device = device
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._rank = torch.distributed.get_rank() if together else 0
        self._world = torch.distributed.get_world_size() if together else 1
        self._file = work_dir / "checkpoint.pt"
        self._optimizer = torch.optim.AdamW(
            _groups(self.model, settings),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._groups: list[list[int]] = []
        self._groups_epoch = -1

    @property
    def has_checkpoint(self) -> bool:
        """Whether ``run`` will go on from one."""
        return self._file.exists()

    # Steps

    def run(
        self,
        *,
        check: Callable[[], dict[str, float]] | None = None,
        on_best: Callable[[], None] = lambda: None,
        log: Callable[[int, dict[str, float]], None] = lambda step, figures: None,
        on_save: Callable[[], None] = lambda: None,
        show: bool = True,
    ) -> None:
        """Train to the last step, from the checkpoint on if there is one.

        Args:
            check: figures on held-out rows; its first one decides which state is the best.
            on_best: told of each new best, to keep that state. log: told of figures by step.
            on_save: called before each checkpoint, for what must not be behind it.
        """
        self.resume()
        saved = time.monotonic()
        bar = tqdm(
            total=self.settings.steps,
            initial=self.progress.step,
            desc="train",
            unit="step",
            disable=not show,
        )
        with bar:
            while self.progress.step < self.settings.steps:
                figures = self.step()
                step = self.progress.step
                bar.update()
                best = {"best": f"{self.progress.best:.4f}"} if self.progress.checks else {}
                bar.set_postfix({"loss": f"{figures['loss']:.3f}", **best})
                log(step, figures)
                due = step % self.settings.check_every == 0 or step == self.settings.steps
                if check is not None and due:
                    self.model.eval()
                    held = check()
                    self.model.train()
                    log(step, held)
                    now = next(iter(held.values()))
                    self.progress.checks.append((step, now))
                    if now > self.progress.best:
                        self.progress.best, self.progress.best_step = now, step
                        if self._rank == 0:
                            on_best()
                if due or time.monotonic() - saved > self.settings.save_every_s:
                    on_save()
                    self.save()
                    saved = time.monotonic()

    def step(self) -> dict[str, float]:
        """One optimizer step; returns its losses and rate."""
        self.model.train()
        self._set_rate()
        figures: dict[str, float] = {}
        self._optimizer.zero_grad(set_to_none=True)
        for _ in range(self.settings.accumulate):
            loss, parts = self._objective.losses(self._next_batch(), self.progress.step)
            torch.autograd.backward(loss / self.settings.accumulate)
            for name, value in {"loss": loss, **parts}.items():
                share = float(value.detach()) / self.settings.accumulate
                figures[name] = figures.get(name, 0.0) + share
        self._average_gradients()
        norm = nn.utils.clip_grad_norm_(list(self.model.trained().values()), 1.0)
        if not math.isfinite(float(norm)):
            raise TrainingError(
                f"step {self.progress.step + 1}: the gradient is not finite; lower the learning "
                "rate. The last checkpoint is untouched."
            )
        self._optimizer.step()
        self.progress.step += 1
        self.progress.losses.append(figures["loss"])
        return {**figures, "learning_rate": self._optimizer.param_groups[0]["lr"]}

    def _average_gradients(self) -> None:
        """The mean over workers, so that every worker takes the same step."""
        if self._world == 1:
            return
        for parameter in self.model.trained().values():
            if parameter.grad is None:  # a worker's batch may leave a layer out
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)
            parameter.grad /= self._world

    def _set_rate(self) -> None:
        s, step = self.settings, self.progress.step
        warm = min(1.0, (step + 1) / max(1, s.warmup))
        done = min(1.0, max(0, step - s.warmup) / max(1, s.steps - s.warmup))
        factor = warm * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def _next_batch(self) -> Batch:
        progress = self.progress
        groups = self._groups_of(progress.epoch)
        if progress.position * self._world >= len(groups):
            progress.epoch, progress.position = progress.epoch + 1, 0
            groups = self._groups_of(progress.epoch)
        # Workers take turns; at the end of an epoch some start over at the front.
        group = groups[(progress.position * self._world + self._rank) % len(groups)]
        progress.position += 1
        return Batch.of([self._examples[index] for index in group]).to(self._device)

    def _groups_of(self, epoch: int) -> list[list[int]]:
        if self._groups_epoch != epoch:
            self._groups_epoch = epoch
            self._groups = groups_of_epoch(
                self._examples,
                max_tokens=self.settings.batch_tokens,
                seed=self.settings.seed,
                epoch=epoch,
            )
        return self._groups

    # Checkpoints

    def save(self) -> None:
        """Write a checkpoint, whole or not at all; the first worker does."""
        if self._rank:
            return
        partial = self._file.with_suffix(".partial")
        torch.save(
            {
                **self._owner,
                "progress": asdict(self.progress),
                "trained": {name: p.detach() for name, p in self.model.trained().items()},
                "optimizer": self._optimizer.state_dict(),
            },
            partial,
        )
        partial.replace(self._file)

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one.

        Raises:
            TrainingError: if it is of a run with other settings or data.
        """
        if not self._file.exists():
            return
        state: dict[str, Any] = torch.load(self._file, weights_only=True, map_location=self._device)
        for name, own in self._owner.items():
            if json.dumps(found := state.get(name)) != json.dumps(own):
                raise TrainingError(
                    f"{self._file} is of a run with other {name} ({json.dumps(found)}): give the "
                    "same, name another --work-dir, or delete it."
                )
        with torch.no_grad():
            for name, parameter in self.model.trained().items():
                parameter.copy_(state["trained"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])


def _groups(model: ShallowDeep, settings: TrainSettings) -> Iterator[dict[str, Any]]:
    """Parameters by learning rate and weight decay: none on norms, less on deep layers."""
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.trained().items():
        rate = settings.learning_rate
        if (layer := _shared_layer(name)) is not None and layer >= model.shape.exit_layer:
            rate *= settings.deep_rate
        decay = settings.weight_decay if parameter.dim() > 1 else 0.0
        found.setdefault((rate, decay), []).append(parameter)
    for (rate, decay), parameters in found.items():
        yield {"params": parameters, "lr": rate, "weight_decay": decay}


def _shared_layer(name: str) -> int | None:
    parts = name.split(".")
    if parts[0] == "base" and "layers" in parts:
        return int(parts[parts.index("layers") + 1])
    return None
