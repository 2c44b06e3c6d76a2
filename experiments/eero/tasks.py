"""What is trained: encoders, data sets and settings, each for three seeds."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, replace
from pathlib import Path

from fathom.models.classifier_config import CONFIG
from fathom.models.classifier_files import ClassifierFiles, read_classifier
from fathom.training.labelled import Labelled, read_labelled
from fathom.training.multi_exit import DEFAULT_ENCODER, MultiExitTraining, train_multi_exit

DATA_HELP = (
    "Set FATHOM_DATA to a folder with ag_news/{train,test}.jsonl.gz (text, label; "
    "huggingface.co/datasets/fancyzhx/ag_news), sst2/train.jsonl.gz (text, label; "
    "huggingface.co/datasets/stanfordnlp/sst2) and cifar10/cifar10_jpeg_{train,test}.parquet "
    "(jpeg, label, name; the images of huggingface.co/datasets/uoft-cs/cifar10 as JPEG files)."
)
RESNET_HELP = (
    "Give --resnet FILE: resnet32-d509ac18.th of github.com/akamaster/pytorch_resnet_cifar10."
)


@dataclass(frozen=True, slots=True)
class Task:
    """One classifier.

    Attributes:
        title: for tables. train, heldout: files in the data folder; where they are the same one,
            held-out rows are other rows of it. train_rows, heldout_rows: drawn at random; 0: all.
    """

    title: str
    plan: MultiExitTraining
    train: str
    heldout: str
    train_rows: int = 0
    heldout_rows: int = 0


def tasks(resnet: Path | None) -> dict[str, Task]:
    """The tasks by name.

    Args:
        resnet: weights of a CIFAR-10 ResNet-32; without them there is no image classifier.
    """
    frozen = MultiExitTraining(
        name="", encoder=DEFAULT_ENCODER, epochs=8, batch_rows=128, learning_rate=1e-3
    )
    tuned = replace(frozen, tune=True, epochs=1, batch_rows=32, encoder_rate=1e-4)
    sst2 = {"train": "sst2/train.jsonl.gz", "heldout": "sst2/train.jsonl.gz"}
    found = {
        "ag_news-frozen": Task(
            "AG News, frozen MiniLM",
            replace(frozen, name="ag_news-frozen"),
            "ag_news/train.jsonl.gz",
            "ag_news/test.jsonl.gz",
        ),
        "sst2-frozen": Task(
            "SST-2, frozen MiniLM",
            replace(frozen, name="sst2-frozen"),
            **sst2,
            train_rows=10_000,
            heldout_rows=12_000,
        ),
        "sst2-tuned": Task(
            "SST-2, tuned MiniLM",
            replace(tuned, name="sst2-tuned"),
            **sst2,
            train_rows=10_000,
            heldout_rows=12_000,
        ),
    }
    if resnet is not None:
        image = MultiExitTraining(
            name="cifar10-resnet32",
            encoder=str(resnet),
            tune=True,
            exits=(1, 4, 7, 10, 13, 15),
            epochs=2,
            batch_rows=128,
            learning_rate=2e-3,
            encoder_rate=1e-3,
        )
        found["cifar10"] = Task(
            "CIFAR-10 (JPEG), ResNet-32",
            image,
            "cifar10/cifar10_jpeg_train.parquet",
            "cifar10/cifar10_jpeg_test.parquet",
            train_rows=30_000,
        )
    return found


def trained(task: Task, seed: int, work_dir: Path) -> ClassifierFiles:
    """The classifier of a task and seed, trained unless ``work_dir`` has it.

    The seed decides which rows are drawn, the heads' first weights and the order of steps; the
    held-out rows of a task are the same for all seeds.

    Raises:
        SystemExit: when data is missing; the message says where to get it.
    """
    home = work_dir / f"{task.plan.name}-{seed}"
    done = home / "classifier"
    if (done / CONFIG).is_file():
        return read_classifier(done)
    data, heldout = read_data(task, seed)
    files = train_multi_exit(
        replace(task.plan, seed=seed), data, heldout, home, features_dir=work_dir / "features"
    )
    files.write(done)
    return files


def read_data(task: Task, seed: int) -> tuple[Labelled, Labelled]:
    """Training rows of a seed, and held-out rows."""
    data = _read(task.train)
    places = list(range(len(data.inputs)))
    if task.train == task.heldout:
        random.Random(0).shuffle(places)
        heldout = data.take(sorted(places[: task.heldout_rows]))
        places = places[task.heldout_rows :]
    else:
        heldout = _read(task.heldout)
    if task.train_rows:
        places = random.Random(seed + 1).sample(places, task.train_rows)
    return data.take(sorted(places)), heldout


def _read(name: str) -> Labelled:
    folder = os.environ.get("FATHOM_DATA", "")
    file = Path(folder) / name
    if not folder or not file.is_file():
        raise SystemExit(f"{file} is missing (FATHOM_DATA is {folder or 'unset'}). {DATA_HELP}")
    return read_labelled(file)
