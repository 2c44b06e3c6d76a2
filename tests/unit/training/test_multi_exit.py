"""Training classifiers with many heads: what is learnt, what is kept, what is refused."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fathom.models.classifier_config import CONFIG
from fathom.models.classifier_files import WEIGHTS, ClassifierFiles, read_classifier
from fathom.models.encoders.resnet import ResNet
from fathom.models.errors import ModelError
from fathom.models.inputs import ImageReader, InputError
from fathom.models.multi_exit import MultiExit
from fathom.training import multi_exit_loop
from fathom.training.errors import TrainingError
from fathom.training.labelled import Labelled, classes_of, read_labelled
from fathom.training.multi_exit import MultiExitTraining, split_heldout, train_multi_exit
from fathom.training.multi_exit_loop import augment
from tests.tiny_classifiers import save_random_bert, write_texts


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Labelled:
    return read_labelled(write_texts(tmp_path_factory.mktemp("data") / "train.jsonl", 400))


@pytest.fixture(scope="module")
def heldout(tmp_path_factory: pytest.TempPathFactory) -> Labelled:
    folder = tmp_path_factory.mktemp("data")
    return read_labelled(write_texts(folder / "heldout.jsonl", 200, seed=1))


def plan_for(encoder: Path, **changes: object) -> MultiExitTraining:
    plan = MultiExitTraining(
        name="mood", encoder=str(encoder), hidden=16, epochs=6, learning_rate=5e-3, max_tokens=16
    )
    return replace(plan, **changes)


def same_weights(a: MultiExit, b: MultiExit) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("tune", [False, True])
def test_heads_learn_the_task(
    encoder: Path, data: Labelled, heldout: Labelled, tmp_path: Path, tune: bool
) -> None:
    figures: dict[str, float] = {}
    files = train_multi_exit(
        plan_for(encoder, tune=tune, encoder_rate=2e-3), data, heldout, tmp_path,
        log=lambda step, found: figures.update(found), show=False,
    )  # fmt: skip
    assert files.labels == ("blame", "praise")
    accuracy = files.calibration.correct.mean(0)
    common = max(np.bincount(files.calibration.labels)) / len(heldout.labels)
    assert (accuracy > common + 0.15).all(), accuracy
    assert figures["heldout_accuracy_head_3"] == pytest.approx(accuracy[2])
    assert json.loads(json.dumps(files.notes))["heldout_accuracy"] == pytest.approx(accuracy)


def test_a_frozen_encoder_stays_as_it_was(
    encoder: Path, data: Labelled, heldout: Labelled, tmp_path: Path
) -> None:
    from fathom.models.encoders.bert import load_bert

    files = train_multi_exit(plan_for(encoder), data, heldout, tmp_path, show=False)
    for name, tensor in load_bert(encoder).state_dict().items():
        assert torch.equal(files.model.encoder.state_dict()[name], tensor), name


def test_the_calibration_set_is_what_the_model_says(
    encoder: Path, data: Labelled, heldout: Labelled, tmp_path: Path
) -> None:
    """Through cached features, sorted by size, in pieces: yet row for row the same."""
    plan = plan_for(encoder, epochs=1)
    files = train_multi_exit(plan, data, heldout, tmp_path / "run", show=False)
    files.write(tmp_path / "out")
    again = read_classifier(tmp_path / "out")
    kept = again.calibration
    for row in (0, 7, 199):
        read = again.reader().read([heldout.inputs[row]])
        with torch.inference_mode():
            logits = again.model(read.batch([0]), read.sizes)[0]
        confidence, predicted = logits.softmax(-1).max(-1)
        np.testing.assert_allclose(kept.confidence[row], confidence, rtol=1e-4)
        assert kept.predicted[row].tolist() == predicted.tolist()
        assert again.labels[kept.labels[row]] == heldout.labels[row]
        assert kept.sizes[row] == int(read.sizes[0]) == len(heldout.inputs[row].split()) + 2


@pytest.mark.parametrize("tune", [False, True])
def test_a_killed_run_ends_with_the_same_weights(
    encoder: Path,
    data: Labelled,
    heldout: Labelled,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tune: bool,
) -> None:
    plan = plan_for(encoder, tune=tune, epochs=2)
    whole = train_multi_exit(plan, data, heldout, tmp_path / "whole", show=False)
    monkeypatch.setattr(multi_exit_loop, "SAVE_EVERY_S", 0.0)

    def killed(step: int, figures: object) -> None:
        if step == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_multi_exit(plan, data, heldout, tmp_path / "cut", log=killed, show=False)
    steps: list[int] = []
    resumed = train_multi_exit(
        plan, data, heldout, tmp_path / "cut", log=lambda step, _: steps.append(step), show=False
    )
    assert steps[0] == 17  # the step that was killed before its checkpoint is done again
    assert same_weights(whole.model, resumed.model)


def test_a_checkpoint_of_another_run_is_refused(
    encoder: Path, data: Labelled, heldout: Labelled, tmp_path: Path
) -> None:
    plan = plan_for(encoder, epochs=1)
    train_multi_exit(plan, data, heldout, tmp_path, show=False)
    for other, rows in ((replace(plan, seed=1), data), (plan, data.take(range(300)))):
        with pytest.raises(TrainingError, match="of a run with other settings or data"):
            train_multi_exit(other, rows, heldout, tmp_path, show=False)


def images(rows: int, seed: int) -> Labelled:
    """Bright and dark squares, as PNG files."""
    from PIL import Image

    rng = np.random.default_rng(seed)
    found, labels = [], []
    for row in range(rows):
        level = 60 if row % 2 else 190
        pixels = rng.normal(level, 30, (32, 32, 3)).clip(0, 255).astype(np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        found.append(stream.getvalue())
        labels.append(str(row % 2))
    return Labelled(found, labels, {"0": "bright", "1": "dark"})


def save_random_resnet(file: Path) -> Path:
    torch.manual_seed(0)
    weights = {}
    for name, tensor in ResNet(1, (1, 3)).state_dict().items():
        if name.startswith("blocks."):
            _, block, rest = name.split(".", 2)
            name = f"layer{int(block) + 1}.0.{rest}"
        else:
            name = name.replace("conv.", "conv1.").replace("bn.", "bn1.")
        weights[name] = tensor
    weights |= {"linear.weight": torch.rand(10, 64), "linear.bias": torch.rand(10)}
    torch.save({"state_dict": weights}, file)
    return file


def test_images_are_learnt_and_served_from_the_folder(tmp_path: Path) -> None:
    plan = MultiExitTraining(
        name="light", encoder=str(save_random_resnet(tmp_path / "net.th")), tune=True,
        exits=(1, 3), epochs=2, batch_rows=8, encoder_rate=1e-3,
    )  # fmt: skip
    files = train_multi_exit(plan, images(64, 0), images(32, 1), tmp_path / "run", show=False)
    assert files.labels == ("bright", "dark")
    assert files.takes == "image"
    assert (files.calibration.correct.mean(0) > 0.9).all()
    files.write(tmp_path / "out")
    again = read_classifier(tmp_path / "out")
    assert same_weights(files.model, again.model)  # batch norms' statistics too
    read = again.reader().read(images(4, 2).inputs)
    with torch.inference_mode():
        assert again.model(read.batch(range(4)), read.sizes)[:, -1].argmax(-1).tolist() == [
            0,
            1,
            0,
            1,
        ]


def test_augmented_images_are_moved_mirrored_and_reproducible() -> None:
    pixels = torch.arange(2 * 3 * 32 * 32).view(2, 3, 32, 32).remainder(251).to(torch.uint8) + 1
    many = pixels[:1].repeat(64, 1, 1, 1)
    out = augment(many, torch.Generator().manual_seed(0))
    assert out.shape == many.shape and out.dtype == torch.uint8
    assert torch.equal(out, augment(many, torch.Generator().manual_seed(0)))
    padded = torch.nn.functional.pad(pixels[0], (4,) * 4)
    mirrored = torch.nn.functional.pad(pixels[0].flip(2), (4,) * 4)
    windows = {
        whole[:, y : y + 32, x : x + 32].contiguous().numpy().tobytes()
        for whole in (padded, mirrored)
        for y in range(9)
        for x in range(9)
    }
    found = {image.contiguous().numpy().tobytes() for image in out}
    assert found <= windows and len(found) > 30


def test_reading_labelled_rows(tmp_path: Path) -> None:
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"text": "a", "label": 10}\n\n{"text": "b", "label": 9}\n')
    found = read_labelled(lines)
    assert (list(found.inputs), list(found.labels)) == (["a", "b"], ["10", "9"])
    assert classes_of(found) == ["9", "10"]  # in the order of numbers
    table = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"jpeg": [b"x", b"y"], "label": [1, 0], "name": ["cat", "ant"]}), table)
    shown = read_labelled(table)
    assert shown.names == {"1": "cat", "0": "ant"} and not shown.is_text
    for text, message in (
        ("{", "rows.jsonl:1"),
        ('{"text": "a"}', "KeyError"),
        ('{"text": 1, "label": 1}', "text must be a string"),
        ("", "holds no rows"),
    ):
        lines.write_text(text)
        with pytest.raises(TrainingError, match=message):
            read_labelled(lines)
    table.write_bytes(b"no parquet")
    with pytest.raises(TrainingError, match=r"Parquet with columns jpeg and label"):
        read_labelled(table)
    with pytest.raises(TrainingError, match="cannot read"):
        read_labelled(tmp_path / "none.jsonl")


def test_unusable_data_and_settings_are_named(
    encoder: Path, data: Labelled, heldout: Labelled, tmp_path: Path
) -> None:
    def train(plan: MultiExitTraining, data: Labelled, heldout: Labelled) -> None:
        train_multi_exit(plan, data, heldout, tmp_path, show=False)

    plan = plan_for(encoder)
    for field, value in (("epochs", 0), ("batch_rows", 1), ("learning_rate", 0), ("max_tokens", 1)):
        with pytest.raises(TrainingError, match=f"{field} must be"):
            train(replace(plan, **{field: value}), data, heldout)
    with pytest.raises(TrainingError, match=r"max_tokens must be at most the encoder's 32, got 64"):
        train(replace(plan, max_tokens=64), data, heldout)
    with pytest.raises(TrainingError, match="takes texts; the data is not texts"):
        train(plan, images(4, 0), heldout)
    with pytest.raises(TrainingError, match=r"labels that the data has not: \['dull'\]"):
        train(plan, data, Labelled(["a"], ["dull"], {}))
    blame = Labelled(["a"], ["blame"], {})
    with pytest.raises(TrainingError, match=r"at least two classes, got \['blame'\]"):
        train(plan, blame, blame)


def test_a_tenth_is_held_out(data: Labelled) -> None:
    most, rest = split_heldout(data)
    assert (len(most.inputs), len(rest.inputs)) == (360, 40)
    assert sorted([*most.inputs, *rest.inputs]) == sorted(data.inputs)


def test_what_is_no_image_is_refused() -> None:
    from PIL import Image

    with pytest.raises(InputError, match="not an image that can be read"):
        ImageReader().read([b"\xff\xd8\xff\xe0 half a JPEG"])
    stream = io.BytesIO()
    Image.new("L", (8000, 8000)).save(stream, "PNG")  # 60 KB that would be 190 MB of pixels
    with pytest.raises(InputError, match="8000x8000 pixels"):
        ImageReader().read([stream.getvalue()])
    small = io.BytesIO()
    Image.new("L", (7, 50), 200).save(small, "PNG")
    assert torch.equal(
        ImageReader().read([small.getvalue()]).pixels, torch.full((1, 3, 32, 32), 200).byte()
    )


@pytest.fixture(scope="module")
def files(
    encoder: Path, data: Labelled, tmp_path_factory: pytest.TempPathFactory
) -> ClassifierFiles:
    plan = plan_for(encoder, epochs=1)
    few = data.take(range(40))
    return train_multi_exit(plan, few, few, tmp_path_factory.mktemp("run"), show=False)


def test_a_folder_is_whole_or_refused(files: ClassifierFiles, tmp_path: Path) -> None:
    out = tmp_path / "out"
    files.write(out)
    files.write(out)  # replaces a classifier
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("years of work")
    with pytest.raises(ModelError, match="holds other files"):
        files.write(tmp_path / "other")
    with pytest.raises(ModelError, match="no classifier here"):
        read_classifier(tmp_path / "other")
    config = json.loads((out / CONFIG).read_text())
    (out / CONFIG).write_text(json.dumps({**config, "labels": ["one"]}))
    with pytest.raises(ModelError, match="of another classifier"):
        read_classifier(out)
    (out / CONFIG).write_text(json.dumps({**config, "format_version": 9}))
    with pytest.raises(ModelError, match="classifier of format 9"):
        read_classifier(out)
    (out / CONFIG).write_text(json.dumps(config))
    weights = (out / WEIGHTS).read_bytes()
    (out / WEIGHTS).write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ModelError, match="damaged classifier"):
        read_classifier(out)


def test_shuffled_batches_hold_every_row_once(
    encoder: Path, data: Labelled, tmp_path: Path
) -> None:
    plan = plan_for(encoder)
    rows = files_rows(encoder, data, plan)
    run = multi_exit_loop.Run(
        MultiExit(ResNet(1, (3,)), 2), rows, torch.zeros(len(rows), dtype=torch.int64),
        features=None, tune=False, epochs=2, batch_rows=7, rates=(1e-3, 1e-3), weight_decay=0.0,
        seed=3, work_dir=tmp_path, depends_on={},
    )  # fmt: skip
    first = [run._places(step) for step in range(run.per_epoch)]
    second = [run._places(step) for step in range(run.per_epoch, 2 * run.per_epoch)]
    for epoch in (first, second):
        assert sorted(place for batch in epoch for place in batch) == list(range(len(rows)))
    assert first != second
    # Rows of about one size stand together.
    spans = [int(rows.sizes[batch].max() - rows.sizes[batch].min()) for batch in first]
    assert np.mean(spans) < 2


def files_rows(encoder: Path, data: Labelled, plan: MultiExitTraining):
    from fathom.models.inputs import TextReader

    return TextReader(encoder / "tokenizer.json", plan.max_tokens).read(data.inputs)
