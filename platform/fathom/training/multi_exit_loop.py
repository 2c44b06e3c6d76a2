"""Steps over labelled rows, and checkpoints that a killed run goes on from."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from fathom.models.inputs import ImageRows, Rows, normalize
from fathom.models.multi_exit import MultiExit
from fathom.training.errors import TrainingError

_POOL = 32
"""Batches whose rows are sorted by size together, so that little is padding."""
_CROP = 4
SAVE_EVERY_S = 60.0


class Run:
    """Trains the heads, and with ``tune`` the encoder, on the mean of the heads' cross-entropies.

    What a step does depends on the seed and its number alone, so that a run which was killed ends
    with the same weights as one in one go.

    Args:
        labels: [n] int64. features: [n, M, d] float32 where the encoder stays as it is and they
            are known; then the encoder does not run.
        tune: train the encoder too; a text encoder's embeddings stay as they are.
        rates: learning rates of heads and of encoder.
        work_dir: where the checkpoint lies. depends_on: what else it belongs to, JSON values.
    """

    def __init__(
        self,
        model: MultiExit,
        rows: Rows,
        labels: Tensor,
        *,
        features: Tensor | None,
        tune: bool,
        epochs: int,
        batch_rows: int,
        rates: tuple[float, float],
        weight_decay: float,
        seed: int,
        work_dir: Path,
        depends_on: Mapping[str, Any],
    ) -> None:
        self.model, self.losses = model, list[float]()
        self._rows, self._labels, self._features = rows, labels, features
        self._tune, self._batch, self._seed = tune, batch_rows, seed
        self.per_epoch = math.ceil(len(rows) / batch_rows)
        self.steps = epochs * self.per_epoch
        self._file = work_dir / "checkpoint.pt"
        self._owner = json.dumps(depends_on, sort_keys=True)
        groups = list(_groups(model, tune, rates, weight_decay))
        self._optimizer = torch.optim.AdamW(groups)
        self._rates = [group["lr"] for group in self._optimizer.param_groups]
        self._order: list[list[int]] = []
        self._order_epoch = -1

    @property
    def step(self) -> int:
        """Steps done."""
        return len(self.losses)

    def run(
        self, log: Callable[[int, Mapping[str, float]], None] | None = None, *, show: bool = True
    ) -> None:
        """Train to the last step, from the checkpoint on if there is one.

        Raises:
            TrainingError: for a checkpoint of another run, or a loss that is not finite.
        """
        self._resume()
        saved = time.monotonic()
        bar = tqdm(total=self.steps, initial=self.step, desc="train", unit="step", disable=not show)
        with bar:
            while self.step < self.steps:
                loss = self._one_step()
                bar.update()
                bar.set_postfix({"loss": f"{loss:.3f}"})
                if log is not None:
                    log(self.step, {"loss": loss})
                if self.step == self.steps or time.monotonic() - saved > SAVE_EVERY_S:
                    self._save()
                    saved = time.monotonic()
        self.model.eval()

    def _one_step(self) -> float:
        self._set_rate()
        places = self._places(self.step)
        self.model.train()
        if not self._tune:
            self.model.encoder.eval()
        logits = self._logits(places)
        target = self._labels[places]
        # Each head counts the same: the mean over heads and rows (MSDNet's uniform weights).
        loss = F.cross_entropy(logits.flatten(0, 1), target.repeat_interleave(logits.shape[1]))
        value = float(loss.detach())
        if not math.isfinite(value):
            raise TrainingError(
                f"step {self.step + 1}: the loss is not finite; lower the learning rate. The last "
                "checkpoint is untouched."
            )
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(
            [p for group in self._optimizer.param_groups for p in group["params"]], 1.0
        )
        self._optimizer.step()
        self.losses.append(value)
        return value

    def _logits(self, places: Sequence[int]) -> Tensor:
        """[rows, M, K] float32."""
        if self._features is not None:
            return self.model.read(list(self._features[places].unbind(1)))
        sizes = self._rows.sizes[places]
        if isinstance(self._rows, ImageRows):
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.step)
            pixels = augment(self._rows.pixels[torch.as_tensor(places)], generator)
            inputs = normalize(pixels)
        else:
            inputs = self._rows.batch(places)
        if self._tune:
            logits: Tensor = self.model(inputs, sizes)
            return logits
        with torch.no_grad():
            features = self.model.features(inputs, sizes)
        return self.model.read(features)

    def _places(self, step: int) -> list[int]:
        """The rows of a step; each epoch has an order of its own."""
        epoch, place = divmod(step, self.per_epoch)
        if epoch != self._order_epoch:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            shuffled = torch.randperm(len(self._rows), generator=generator)
            batches: list[list[int]] = []
            for pool in torch.split(shuffled, _POOL * self._batch):
                pool = pool[torch.argsort(self._rows.sizes[pool], stable=True)]
                batches += [part.tolist() for part in torch.split(pool, self._batch)]
            order = torch.randperm(len(batches), generator=generator).tolist()
            self._order = [batches[index] for index in order]
            self._order_epoch = epoch
        return self._order[place]

    def _set_rate(self) -> None:
        """A linear rise over the first twentieth, then half a cosine down to nothing."""
        warmup = max(1, self.steps // 20)
        rise = min(1.0, (self.step + 1) / warmup)
        done = max(0, self.step - warmup) / max(1, self.steps - warmup)
        factor = rise * 0.5 * (1 + math.cos(math.pi * done))
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    # Checkpoints

    def _state(self) -> dict[str, Tensor]:
        """What training changes; batch norms' statistics are among it."""
        module = self.model if self._tune else self.model.heads
        return module.state_dict()

    def _save(self) -> None:
        """Write a checkpoint, whole or not at all."""
        self._file.parent.mkdir(parents=True, exist_ok=True)
        partial = self._file.with_suffix(".partial")
        torch.save(
            {
                "owner": self._owner,
                "losses": self.losses,
                "state": self._state(),
                "optimizer": self._optimizer.state_dict(),
            },
            partial,
        )
        partial.replace(self._file)

    def _resume(self) -> None:
        if not self._file.exists():
            return
        saved: dict[str, Any] = torch.load(self._file, weights_only=True)
        if saved.get("owner") != self._owner:
            raise TrainingError(
                f"{self._file} is of a run with other settings or data ({saved.get('owner')}): "
                "give the same, name another --work-dir, or delete it."
            )
        module = self.model if self._tune else self.model.heads
        module.load_state_dict(saved["state"])
        self._optimizer.load_state_dict(saved["optimizer"])
        self.losses = list(saved["losses"])


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images, and move each by up to four pixels (He et al., 2016).

    Args:
        pixels: [n, 3, side, side] uint8. What moves in from outside is black.
    """
    n, _, side, _ = pixels.shape
    mirrored = torch.rand(n, generator=generator) < 0.5
    pixels = torch.where(mirrored[:, None, None, None], pixels.flip(3), pixels)
    padded = F.pad(pixels, (_CROP,) * 4)
    places = torch.randint(0, 2 * _CROP + 1, (2, n), generator=generator)
    span = torch.arange(side)
    ys, xs = places[0][:, None] + span, places[1][:, None] + span
    rows = torch.arange(n)[:, None, None]
    # Indexing moves the channels to the end.
    return padded[rows, :, ys[:, :, None], xs[:, None, :]].permute(0, 3, 1, 2)


def _groups(
    model: MultiExit, tune: bool, rates: tuple[float, float], weight_decay: float
) -> Iterator[dict[str, Any]]:
    """Parameters by rate and decay: no decay on norms and biases; the others stay as they are."""
    found: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        in_head = name.startswith("heads.")
        fixed = name.startswith(("encoder.words", "encoder.positions", "encoder.segment"))
        parameter.requires_grad_(in_head or (tune and not fixed))
        if parameter.requires_grad:
            decay = weight_decay if parameter.dim() > 1 else 0.0
            found.setdefault((rates[0 if in_head else 1], decay), []).append(parameter)
    for (rate, decay), parameters in found.items():
        yield {"params": parameters, "lr": rate, "weight_decay": decay}
