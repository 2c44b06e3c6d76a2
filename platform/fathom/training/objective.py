"""What a batch is trained on: the shallow-deep losses, and what they are computed from."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fathom.training import losses
from fathom.training.errors import TrainingError
from fathom.training.examples import IGNORED, Batch, Example
from fathom.training.model import ShallowDeep, States

KD_KINDS = ("none", "last", "unif", "dyna", "logits")
# Of the full path's probabilities at a row, the likeliest that are kept for ``kd="logits"``.
_KEPT_PROBABILITIES = 32

# Of each setting the least value, and of real ones the greatest (the least is 0).
_WHOLE = {"steps": 1, "batch_tokens": 1, "accumulate": 1, "warmup": 0, "check_every": 1, "seed": 0}
_REAL = {
    **dict.fromkeys(("learning_rate", "weight_decay", "deep_rate", "kd_weight"), math.inf),
    **dict.fromkeys(("hold", "outside", "save_every_s"), math.inf),
    "layer_dropout": 1.0,
    "curriculum": 1.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How an exit is trained. A checkpoint belongs to one of these.

    Attributes:
        steps: optimizer steps. batch_tokens: tokens of a batch, fill included. accumulate: batches
            a step. learning_rate: peak; warm-up over ``warmup`` steps, then cosine to a tenth.
        deep_rate: factor on the learning rate of shared layers from the exit layer on.
        kd, kd_weight: knowledge distillation and its alpha: FREE's ``last``, ``unif``, ``dyna``
            on states, or ``logits``, cross entropy to the full path's probabilities.
        hold: weight of KL(original || current) on the full path.
        deep_ce: whether the full path is trained on the labels too, as FREE does.
        exit_loss: whether the exit is trained; without it this is fine-tuning, the baseline.
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
    exit_loss: bool = True
    outside: float = 0.1
    layer_dropout: float = 0.0
    curriculum: float = 0.0
    check_every: int = 100
    save_every_s: float = 300.0
    seed: int = 0

    def validate(self) -> None:
        """Check every number.

        Raises:
            TrainingError: naming the first one out of range, and its value.
        """
        for name, low in _WHOLE.items():
            if (value := getattr(self, name)) < low:
                raise TrainingError(f"{name} must be at least {low}, got {value}.")
        for name, high in _REAL.items():
            if not 0 <= (value := getattr(self, name)) <= high or math.isinf(value):
                wanted = "of at least 0" if math.isinf(high) else f"from 0 to {high:g}"
                raise TrainingError(f"{name} must be a number {wanted}, got {value}.")


class Objective:
    """The loss of a batch.

    Args:
        weight: [subset, d] LM-head rows that the exit scores; token_ids: [subset] their tokens.
        original: gives the untouched model's final-normed states of a batch's rows; needed for
            ``hold``.

    Raises:
        TrainingError: for settings that leave nothing to train, or name what the shape lacks.
    """

    def __init__(
        self,
        model: ShallowDeep,
        settings: TrainSettings,
        *,
        weight: Tensor,
        token_ids: Tensor,
        vocab_size: int,
        original: Callable[[Batch, Tensor], Tensor] | None = None,
    ) -> None:
        settings.validate()
        if settings.kd not in KD_KINDS:
            raise TrainingError(f"kd must be one of {', '.join(KD_KINDS)}, got {settings.kd!r}.")
        if settings.hold and original is None:
            raise TrainingError("hold needs the original model.")
        if not settings.exit_loss and not (model.trains_shared and settings.deep_ce):
            raise TrainingError(
                "without the exit's loss nothing is left to train here: fine-tuning needs "
                "--tune lora or full, and the full path's own loss."
            )
        if not model.trains_shared and settings.kd not in ("none", "logits"):
            raise TrainingError(
                f"kd {settings.kd!r} compares layers that --tune exit leaves as they are; use "
                "logits there, or --tune lora or full."
            )
        self.model = model
        self.settings = settings
        self._weight = weight
        self._token_ids = token_ids
        self._place = torch.full((vocab_size,), -1, device=weight.device)
        self._place[token_ids] = torch.arange(len(token_ids), device=weight.device)
        self._original = original
        # What a frozen trunk gives for an example never changes: kept from the first epoch on.
        self._shared: dict[Example, Tensor] = {}
        self._targets: dict[Example, tuple[Tensor, Tensor]] = {}

    def autocast(self) -> torch.autocast:
        """Matrix products in bfloat16; what needs float32 stays in it."""
        return torch.autocast(self._weight.device.type, torch.bfloat16)

    def losses(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of a batch, and its parts by name.

        Args:
            step: layer dropout and curriculum follow from it.
        """
        rows = batch.labels != IGNORED
        if self.model.trains_shared:
            return self._shallow_deep(batch, rows, step)
        return self._exit_alone(batch, rows)

    def _exit_alone(self, batch: Batch, rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The shared layers are frozen: no deep pass, unless its probabilities are the target."""
        s, model = self.settings, self.model
        with self.autocast():
            shared = self._frozen_states(batch)
            logits = self._exit_logits(model.exit_states(shared, rows))
        loss = self._exit_loss(logits, batch.labels[rows])
        parts = {"ce_shallow": loss}
        if s.kd == "logits":
            target = self._frozen_probabilities(batch, shared, rows)
            parts["kd"] = losses.soft_cross_entropy(logits, target, s.outside)
            loss = loss + s.kd_weight * parts["kd"]
        return loss, parts

    def _shallow_deep(
        self, batch: Batch, rows: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        s, model = self.settings, self.model
        labels = batch.labels[rows]
        parts: dict[str, Tensor] = {}
        with self.autocast():
            states: States = model(
                batch.token_ids,
                rows,
                deep=True,
                keep=self._kept_layers(),
                skip=self._skipped_layers(step),
                exit_at=self._exit_at(step),
            )
            assert states.deep is not None
            final = model.norm(states.deep)
            scores = model.lm_head(final).float()
        loss = torch.zeros((), device=final.device)
        if s.deep_ce:
            loss = parts["ce_deep"] = nn.functional.cross_entropy(scores, labels)
        if s.exit_loss:
            with self.autocast():
                logits = self._exit_logits(states.exit)
            shallow = parts["ce_shallow"] = self._exit_loss(logits, labels)
            exit_layer, num_layers = model.shape.exit_layer, model.num_layers
            loss = losses.weighted(shallow, loss, exit_layer, num_layers) if s.deep_ce else shallow
            if s.kd != "none":
                parts["kd"] = self._kd(states, final, scores, logits)
                loss = loss + s.kd_weight * parts["kd"]
        if s.hold:
            assert self._original is not None
            with torch.no_grad(), self.autocast():
                target = model.lm_head(self._original(batch, rows))
            parts["hold"] = losses.hold(scores, target)
            loss = loss + s.hold * parts["hold"]
        return loss, parts

    def _exit_logits(self, states: Tensor) -> Tensor:
        """[n, d] states at the exit -> [n, subset] float32."""
        return (self.model.head(states).to(self._weight.dtype) @ self._weight.T).float()

    def _exit_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return losses.subset_cross_entropy(logits, self._place[labels], self.settings.outside)

    def _kd(self, states: States, final: Tensor, scores: Tensor, logits: Tensor) -> Tensor:
        model, exit_layer = self.model, self.model.shape.exit_layer
        if self.settings.kd == "logits":
            target = scores.detach().softmax(-1)[:, self._token_ids]
            return losses.soft_cross_entropy(logits, target, self.settings.outside)
        if self.settings.kd == "last":
            return losses.kd_last(model.head(states.exit), final)
        normed = {layer: model.norm(h) for layer, h in states.layers.items()}
        if self.settings.kd == "unif":
            return losses.kd_unif(normed, exit_layer, model.num_layers)
        return losses.kd_dyna(normed, range(1, exit_layer + 1))

    # A frozen trunk

    def _frozen_states(self, batch: Batch) -> Tensor:
        """States after frozen shared layers, [batch, length, d]."""
        missing = [e for e in batch.examples if e not in self._shared]
        if missing:
            fresh = Batch.of(missing).to(self._weight.device)
            for example, states in zip(
                missing, self.model.shared_states(fresh.token_ids), strict=True
            ):
                self._shared[example] = states[: len(example.token_ids) - 1].clone()
        return nn.utils.rnn.pad_sequence([self._shared[e] for e in batch.examples], True)

    @torch.no_grad()
    def _frozen_probabilities(self, batch: Batch, shared: Tensor, rows: Tensor) -> Tensor:
        """The full path's probabilities of the subset's tokens, [n, subset] float32."""
        if any(example not in self._targets for example in batch.examples):
            with self.autocast():
                final = self.model.norm(self.model.deep_states(shared, rows))
                kept = [self._likeliest(part) for part in final.split(256)]
            counts = rows.sum(1).tolist()
            parts = [torch.split(torch.cat(each), counts) for each in zip(*kept, strict=True)]
            for example, own, places in zip(batch.examples, *parts, strict=True):
                self._targets[example] = own.clone(), places.clone()
        found = [self._targets[example] for example in batch.examples]
        values = torch.cat([own for own, _ in found]).float()
        columns = torch.cat([places for _, places in found]).long()
        # One column more takes what the subset lacks.
        dense = values.new_zeros(len(values), len(self._token_ids) + 1)
        return dense.scatter_(1, columns % dense.shape[1], values)[:, :-1]

    def _likeliest(self, final: Tensor) -> tuple[Tensor, Tensor]:
        """[n, d] final-normed states -> probabilities, bfloat16, and columns, int32: [n, kept]."""
        probabilities = self.model.lm_head(final).float().softmax(-1)
        values, ids = probabilities.topk(min(_KEPT_PROBABILITIES, probabilities.shape[1]))
        return values.to(torch.bfloat16), self._place[ids].to(torch.int32)

    # What follows from the step

    def _kept_layers(self) -> Sequence[int]:
        if self.settings.kd == "unif":
            pairs = losses.unif_pairs(self.model.shape.exit_layer, self.model.num_layers)
            return sorted({layer for pair in pairs for layer in pair})
        return range(1, self.model.num_layers + 1) if self.settings.kd == "dyna" else ()

    def _skipped_layers(self, step: int) -> frozenset[int]:
        """LayerSkip's layer dropout: layer l of L is left out with p_max (e^(l ln2/(L-1)) - 1)."""
        p_max, last = self.settings.layer_dropout, self.model.num_layers - 1
        if not p_max:
            return frozenset()
        # Draws follow from the step, so that a run that goes on draws what it would have.
        seed = (self.settings.seed * 1_000_003 + step) * 8 + 1
        generator = torch.Generator().manual_seed(seed)
        draws = torch.rand(last + 1, generator=generator).tolist()
        rates = [p_max * (math.exp(layer * math.log(2) / last) - 1) for layer in range(last + 1)]
        return frozenset(i for i, (d, r) in enumerate(zip(draws, rates, strict=True)) if d < r)

    def _exit_at(self, step: int) -> int:
        """Early-exit curriculum: the exit starts at the last layer and wanders down to k."""
        exit_layer, wander = self.model.shape.exit_layer, self.settings.curriculum
        if not wander:
            return exit_layer
        done = min(1.0, step / (wander * self.settings.steps))
        return round(self.model.num_layers + (exit_layer - self.model.num_layers) * done)
