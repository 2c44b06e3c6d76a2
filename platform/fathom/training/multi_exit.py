"""``fathom train multi-exit``: from labelled rows to a classifier that answers at any depth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fathom.models.classifier_files import TOKENIZER, ClassifierFiles
from fathom.models.encoders.bert import load_bert
from fathom.models.encoders.resnet import load_resnet
from fathom.models.inputs import ImageReader, Rows, TextReader
from fathom.models.multi_exit import MultiExit
from fathom.models.resolve import resolve_model
from fathom.training.errors import TrainingError
from fathom.training.features import all_logits, answers_of, cached_features, digest_of
from fathom.training.labelled import Labelled, classes_of
from fathom.training.multi_exit_loop import Run

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
_RESNET_SUFFIXES = (".th", ".pt", ".pth")

Log = Callable[[int, Mapping[str, float]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiExitTraining:
    """Everything that a run depends on, data aside.

    Attributes:
        name: of the classifier.
        encoder: hub name or directory of a BERT, or a ``.th`` file of a CIFAR-10 ResNet.
        tune: train the encoder too; otherwise the heads alone.
        hidden: width of a text head's hidden layer; 0 for linear heads.
        exits: of a ResNet, see ``load_resnet``. max_tokens: of a text.
        epochs: passes over the data. batch_rows: of a step.
        learning_rate: of the heads. encoder_rate: of the encoder.
    """

    name: str
    encoder: str = DEFAULT_ENCODER
    tune: bool = False
    hidden: int = 256
    exits: tuple[int, ...] = ()
    max_tokens: int = 64
    epochs: int = 3
    batch_rows: int = 32
    learning_rate: float = 1e-3
    encoder_rate: float = 5e-5
    weight_decay: float = 0.01
    seed: int = 0

    def validate(self) -> None:
        """Check every number.

        Raises:
            TrainingError: naming the first one out of range, its value and what is allowed.
        """
        for name, low in (("epochs", 1), ("batch_rows", 2), ("hidden", 0), ("max_tokens", 2)):
            if (value := getattr(self, name)) < low:
                raise TrainingError(f"{name} must be at least {low}, got {value}.")
        for name in ("learning_rate", "encoder_rate"):
            if not (value := getattr(self, name)) > 0:
                raise TrainingError(f"{name} must be above 0, got {value}.")
        if self.weight_decay < 0:
            raise TrainingError(f"weight_decay must be at least 0, got {self.weight_decay}.")

    @property
    def takes_images(self) -> bool:
        """Whether the encoder is a ResNet."""
        return self.encoder.endswith(_RESNET_SUFFIXES)


def train_multi_exit(
    plan: MultiExitTraining,
    data: Labelled,
    heldout: Labelled,
    work_dir: Path,
    *,
    features_dir: Path | None = None,
    log: Log | None = None,
    show: bool = True,
) -> ClassifierFiles:
    """Train a classifier; ``heldout`` becomes its calibration set.

    A call that was interrupted goes on when it is given again; one that is done only reads.

    Args:
        heldout: rows like those that will be served, not in ``data``; its labels are in ``data``.
        work_dir: the checkpoint. features_dir: of a frozen text encoder's features, which runs
            may share; default: in ``work_dir``.
        log: takes figures by step. show: progress bars.

    Raises:
        TrainingError, ModelError, InputError: naming what cannot be used.
    """
    plan.validate()
    _check_kinds(plan, data, heldout)
    names = classes_of(data)
    model, reader, tokenizer = _build(plan, len(names))
    rows, held = (read_rows(reader, part) for part in (data, heldout))
    labels, held_labels = (_numbers(part, names) for part in (data, heldout))
    features = held_features = None
    if not plan.tune and not plan.takes_images:
        cache = features_dir or work_dir / "features"
        features = cached_features(model, rows, cache, show=show)
        held_features = cached_features(model, held, cache, show=show)
    run = Run(
        model,
        rows,
        labels,
        features=features,
        tune=plan.tune,
        epochs=plan.epochs,
        batch_rows=plan.batch_rows,
        rates=(plan.learning_rate, plan.encoder_rate),
        weight_decay=plan.weight_decay,
        seed=plan.seed,
        work_dir=work_dir,
        depends_on={
            "plan": asdict(plan),
            "data": rows.digest(),
            "labels": list(data.labels),
            "weights": digest_of(model.encoder),
        },
    )
    run.run(log, show=show)
    answers = answers_of(all_logits(model, held, held_features, show=show), held_labels, held)
    accuracy = [float(a) for a in answers.correct.mean(0)]
    if log is not None:
        log(run.step, {f"heldout_accuracy_head_{m}": a for m, a in enumerate(accuracy, 1)})
    return ClassifierFiles(
        name=plan.name,
        labels=tuple({**data.names, **heldout.names}.get(name, name) for name in names),
        model=model,
        calibration=answers,
        max_tokens=0 if tokenizer is None else plan.max_tokens,
        tokenizer=tokenizer,
        notes={
            "training": asdict(plan),
            "rows": len(data.inputs),
            "heldout_rows": len(heldout.inputs),
            "heldout_accuracy": accuracy,
        },
    )


def split_heldout(data: Labelled, every: int = 10) -> tuple[Labelled, Labelled]:
    """Every tenth row apart, where there is no file of held-out rows."""
    rows = range(len(data.inputs))
    return data.take([r for r in rows if r % every]), data.take([r for r in rows if not r % every])


def read_rows(reader: TextReader | ImageReader, data: Labelled) -> Rows:
    """The inputs as rows.

    Raises:
        InputError: for an image that cannot be read.
    """
    inputs: Any = data.inputs
    return reader.read(inputs)


def _check_kinds(plan: MultiExitTraining, data: Labelled, heldout: Labelled) -> None:
    wanted = "images" if plan.takes_images else "texts"
    for part in (data, heldout):
        if not part.inputs:
            raise TrainingError("data and heldout must each hold a row.")
        if part.is_text == plan.takes_images:
            raise TrainingError(
                f"encoder {plan.encoder!r} takes {wanted}; the data is not {wanted}."
            )
    unknown = sorted(set(heldout.labels) - set(data.labels))
    if unknown:
        raise TrainingError(f"heldout has labels that the data has not: {unknown[:5]}.")


def _build(
    plan: MultiExitTraining, classes: int
) -> tuple[MultiExit, TextReader | ImageReader, Path | None]:
    torch.manual_seed(plan.seed)  # the heads' first weights
    if plan.takes_images:
        net, weight, bias = load_resnet(Path(plan.encoder), plan.exits)
        model = MultiExit(net, classes)
        if classes == len(bias):  # the network's own head is a better start than chance
            own = model.heads[-1].linear
            with torch.no_grad():
                own.weight.copy_(weight)  # type: ignore[union-attr, operator]
                own.bias.copy_(bias)  # type: ignore[union-attr, operator]
        return model, ImageReader(), None
    directory = resolve_model(plan.encoder)
    bert = load_bert(directory)
    if plan.max_tokens > bert.config.max_positions:
        raise TrainingError(
            f"max_tokens must be at most the encoder's {bert.config.max_positions}, "
            f"got {plan.max_tokens}."
        )
    tokenizer = directory / TOKENIZER
    return MultiExit(bert, classes, plan.hidden), TextReader(tokenizer, plan.max_tokens), tokenizer


def _numbers(data: Labelled, names: Sequence[str]) -> torch.Tensor:
    """[n] int64 places of the labels in ``names``."""
    places = {name: place for place, name in enumerate(names)}
    return torch.tensor([places[label] for label in data.labels])
