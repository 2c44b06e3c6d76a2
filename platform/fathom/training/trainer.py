"""The training loop: losses of a batch, steps, checkpoints that a killed run goes on from."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fathom.training import losses
from fathom.training.errors import TrainingError
from fathom.training.examples import IGNORED, Batch, Example, groups_of_epoch
from fathom.training.model import ShallowDeep, States

KD_KINDS = ("none", "last", "unif", "dyna")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How an exit is trained. A checkpoint belongs to one of these.

    Attributes:
        steps: optimizer steps. batch_tokens: tokens of a batch, fill included. accumulate: batches
            a step. learning_rate: peak; warm-up over ``warmup`` steps, then cosine to a tenth.
        deep_rate: factor on the learning rate of shared layers from the exit layer on.
        kd, kd_weight: knowledge distillation of free.md and its alpha.
        hold: weight of KL(original || current) on the full path.
        deep_ce: whether the full path is trained on the labels too, as FREE does.
        outside: weight of rows whose token the exit's subset lacks.
        layer_dropout: LayerSkip's p_max, the rate at the last layer. curriculum: share of the
            steps over which the exit wanders from the last layer down to the exit layer.
        check_every: steps between checks on held-out rows. save_every_s: seconds between
            checkpoints.
    """

    steps: int = 1000
    batch_tokens: int = 4096
    accumulate: int = 1
    learning_rate: float = 1e-4
    warmup: int = 50
    weight_decay: float = 0.01
    deep_rate: float = 1.0
    kd: str = "none"
    kd_weight: float = 0.5
    hold: float = 0.0
    deep_ce: bool = True
    outside: float = 0.1
    layer_dropout: float = 0.0
    curriculum: float = 0.0
    check_every: int = 100
    save_every_s: float = 300.0
    seed: int = 0


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
        weight: [subset, d] LM-head rows that the exit scores; token_ids: [subset] their tokens.
        original: gives the untouched model's final-normed states of a batch's rows; needed for
            ``hold``.
        work_dir: where checkpoints lie.
    """

    def __init__(
        self,
        model: ShallowDeep,
        examples: Sequence[Example],
        settings: TrainSettings,
        *,
        weight: Tensor,
        token_ids: Tensor,
        vocab_size: int,
        work_dir: Path,
        original: Callable[[Batch, Tensor], Tensor] | None = None,
    ) -> None:
        if settings.kd not in KD_KINDS:
            raise TrainingError(f"kd must be one of {', '.join(KD_KINDS)}, got {settings.kd!r}.")
        if settings.hold and original is None:
            raise TrainingError("hold needs the original model.")
        self.model = model
        self.settings = settings
        self.progress = Progress()
        self._examples = examples
        self._weight = weight
        self._device = weight.device
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        self._rank = torch.distributed.get_rank() if together else 0
        self._world = torch.distributed.get_world_size() if together else 1
        self._place = torch.full((vocab_size,), -1, device=weight.device)
        self._place[token_ids] = torch.arange(len(token_ids), device=weight.device)
        self._original = original
        self._file = work_dir / "checkpoint.pt"
        self._optimizer = torch.optim.AdamW(
            _groups(model, settings), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._groups: list[list[int]] = []
        self._groups_epoch = -1
        self._shared: dict[Example, Tensor] = {}

    @property
    def has_checkpoint(self) -> bool:
        """Whether ``run`` will go on from one."""
        return self._file.exists()

    def autocast(self) -> torch.autocast:
        """Matrix products in bfloat16; what needs float32 stays in it."""
        return torch.autocast(self._device.type, torch.bfloat16)

    # Steps

    def run(
        self,
        *,
        check: Callable[[], dict[str, float]] | None = None,
        on_best: Callable[[], None] = lambda: None,
        log: Callable[[int, dict[str, float]], None] = lambda step, figures: None,
        show: bool = True,
    ) -> None:
        """Train to the last step, from the checkpoint on if there is one.

        Args:
            check: figures on held-out rows; its first one decides which state is the best.
            on_best: told of each new best, to keep that state. log: told of figures by step.
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
                bar.set_postfix(loss=f"{figures['loss']:.3f}", best=f"{self.progress.best:.4f}")
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
                    self.save()
                    saved = time.monotonic()

    def step(self) -> dict[str, float]:
        """One optimizer step; returns its losses and rate."""
        self.model.train()
        self._set_rate()
        figures: dict[str, float] = {}
        self._optimizer.zero_grad(set_to_none=True)
        for _ in range(self.settings.accumulate):
            loss, parts = self._losses(self._next_batch())
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
        if self._groups_epoch == progress.epoch and progress.position * self._world >= len(
            self._groups
        ):
            progress.epoch, progress.position = progress.epoch + 1, 0
        if self._groups_epoch != progress.epoch:
            self._groups_epoch = progress.epoch
            self._groups = groups_of_epoch(
                self._examples,
                max_tokens=self.settings.batch_tokens,
                seed=self.settings.seed,
                epoch=progress.epoch,
            )
        # Workers take turns; at the end of an epoch some start over at the front.
        place = (progress.position * self._world + self._rank) % len(self._groups)
        group = self._groups[place]
        progress.position += 1
        return Batch.of([self._examples[index] for index in group]).to(self._device)

    def _frozen_states(self, batch: Batch) -> Tensor:
        """States after frozen shared layers, [batch, length, d]: kept from the first epoch on."""
        missing = [e for e in batch.examples if e not in self._shared]
        if missing:
            fresh = Batch.of(missing).to(self._device)
            for example, states in zip(
                missing, self.model.shared_states(fresh.token_ids), strict=True
            ):
                self._shared[example] = states[: len(example.token_ids) - 1].clone()
        return nn.utils.rnn.pad_sequence([self._shared[e] for e in batch.examples], True)

    # Losses

    def _losses(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        s, model = self.settings, self.model
        rows = batch.labels != IGNORED
        labels = batch.labels[rows]
        deep = model.trains_shared
        with self.autocast():
            if deep:
                states: States = model(
                    batch.token_ids,
                    rows,
                    deep=True,
                    keep=self._kept_layers(),
                    skip=self._skipped_layers(),
                    exit_at=self._exit_at(),
                )
            else:
                exit_states = model.exit_states(self._frozen_states(batch), rows)
                states = States(exit_states, {}, None)
            logits = model.head(states.exit).to(self._weight.dtype) @ self._weight.T
        shallow = losses.subset_cross_entropy(logits.float(), self._place[labels], s.outside)
        parts = {"ce_shallow": shallow}
        if not deep:
            return shallow, parts
        assert states.deep is not None
        final = model.norm(states.deep)
        loss = shallow
        if s.deep_ce or s.hold:
            with self.autocast():
                scores = model.lm_head(final)
        if s.deep_ce:
            parts["ce_deep"] = nn.functional.cross_entropy(scores.float(), labels)
            loss = losses.weighted(
                shallow, parts["ce_deep"], model.shape.exit_layer, model.num_layers
            )
        if s.kd != "none":
            parts["kd"] = self._kd(states, final)
            loss = loss + s.kd_weight * parts["kd"]
        if s.hold:
            assert self._original is not None
            with torch.no_grad(), self.autocast():
                target = model.lm_head(self._original(batch, rows))
            parts["hold"] = losses.hold(scores, target)
            loss = loss + s.hold * parts["hold"]
        return loss, parts

    def _kd(self, states: States, final: Tensor) -> Tensor:
        model, exit_layer = self.model, self.model.shape.exit_layer
        if self.settings.kd == "last":
            return losses.kd_last(model.head(states.exit), final)
        normed = {layer: model.norm(h) for layer, h in states.layers.items()}
        if self.settings.kd == "unif":
            return losses.kd_unif(normed, exit_layer, model.num_layers)
        return losses.kd_dyna(normed, range(1, exit_layer + 1))

    def _kept_layers(self) -> Sequence[int]:
        if self.settings.kd == "unif":
            pairs = losses.unif_pairs(self.model.shape.exit_layer, self.model.num_layers)
            return sorted({layer for pair in pairs for layer in pair})
        return range(1, self.model.num_layers + 1) if self.settings.kd == "dyna" else ()

    def _skipped_layers(self) -> frozenset[int]:
        """LayerSkip's layer dropout: layer l of L is left out with p_max (e^(l ln2/(L-1)) - 1)."""
        p_max, last = self.settings.layer_dropout, self.model.num_layers - 1
        if not p_max:
            return frozenset()
        draws = torch.rand(last + 1, generator=self._generator(1)).tolist()
        rates = [p_max * (math.exp(layer * math.log(2) / last) - 1) for layer in range(last + 1)]
        return frozenset(i for i, (d, r) in enumerate(zip(draws, rates, strict=True)) if d < r)

    def _exit_at(self) -> int:
        """Early-exit curriculum: the exit starts at the last layer and wanders down to k."""
        exit_layer, wander = self.model.shape.exit_layer, self.settings.curriculum
        if not wander:
            return exit_layer
        done = min(1.0, self.progress.step / (wander * self.settings.steps))
        return round(self.model.num_layers + (exit_layer - self.model.num_layers) * done)

    def _generator(self, purpose: int) -> torch.Generator:
        """Draws follow from the step, so that a run that goes on draws what it would have."""
        seed = (self.settings.seed * 1_000_003 + self.progress.step) * 8 + purpose
        return torch.Generator().manual_seed(seed)

    # Checkpoints

    def save(self) -> None:
        """Write a checkpoint, whole or not at all; the first worker does."""
        if self._rank:
            return
        partial = self._file.with_suffix(".partial")
        torch.save(
            {
                "settings": asdict(self.settings),
                "shape": asdict(self.model.shape),
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
            TrainingError: if it is of a run with other settings.
        """
        if not self._file.exists():
            return
        state: dict[str, Any] = torch.load(self._file, weights_only=True, map_location=self._device)
        own = {"settings": asdict(self.settings), "shape": asdict(self.model.shape)}
        found = {name: state[name] for name in own}
        if json.dumps(found) != json.dumps(own):
            raise TrainingError(
                f"{self._file} is of a run with other settings ({json.dumps(found)}): give the "
                "same ones, name another --work-dir, or delete it."
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
