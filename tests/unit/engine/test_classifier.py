"""A classifier at work: budgets kept, requests together as alone, the account, refusals."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.classification import ClassifyJob, ClassifyResult
from fathom.engine.classifier import MAX_ROWS, Classifier
from fathom.models.classifier_files import Answers, ClassifierFiles
from fathom.models.encoders.resnet import ResNet
from fathom.models.multi_exit import MultiExit
from fathom.types import InvalidRequest
from tests.tiny_classifiers import save_classifier, texts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def classifier(folder: Path) -> Classifier:
    return Classifier.from_directory(folder)


@pytest.fixture(scope="module")
def many() -> tuple[str, ...]:
    return tuple(texts(2000, seed=7))


def run_one(
    classifier: Classifier, inputs: tuple[str, ...], budget: float | None
) -> ClassifyResult:
    (result,) = classifier.run([ClassifyJob(inputs=inputs, budget=budget)])
    assert isinstance(result, ClassifyResult), result
    return result


@pytest.mark.parametrize("budget", [0.4, 0.55, 0.7, 0.9])
def test_new_rows_cost_what_was_asked_for(
    classifier: Classifier, many: tuple[str, ...], budget: float
) -> None:
    result = run_one(classifier, many, budget)
    assert result.requested_budget == budget
    # Standard deviations of 2,000 calibration and 2,000 new rows: about 0.01 together.
    assert result.realised_budget == pytest.approx(result.planned_budget, abs=0.03)
    assert result.planned_budget <= budget + 0.005
    if budget < 0.6:  # here more compute is known to help
        assert result.planned_budget == pytest.approx(budget, abs=0.005)


def test_rows_of_a_budget_answer_like_the_head_that_they_left_at(
    folder: Path, classifier: Classifier, many: tuple[str, ...]
) -> None:
    from fathom.models.classifier_files import read_classifier

    files = read_classifier(folder)
    inputs = many[: 2 * MAX_ROWS + 5]
    rows = files.reader().read(inputs)
    with torch.inference_mode():
        every = files.model(rows.batch(range(len(rows))), rows.sizes).softmax(-1)
    result = run_one(classifier, inputs, 0.6)
    thresholds = classifier.thresholds(0.6)
    heads = set()
    for row, expected in zip(result.rows, every, strict=True):
        np.testing.assert_allclose(row.probs, expected[row.head - 1], atol=1e-5)
        assert row.label == int(expected[row.head - 1].argmax())
        sure = expected.double().max(-1).values
        assert all(sure[m] < thresholds[m] + 1e-6 for m in range(row.head - 1))
        assert sure[row.head - 1] > thresholds[row.head - 1] - 1e-6
        heads.add(row.head)
    assert len(heads) > 1


def test_without_a_budget_every_row_goes_to_the_end(
    classifier: Classifier, many: tuple[str, ...]
) -> None:
    result = run_one(classifier, many[:50], None)
    assert {row.head for row in result.rows} == {3}
    assert (
        result.realised_budget == result.planned_budget == 1 and result.flops == result.full_flops
    )


def test_the_account_adds_up(folder: Path, classifier: Classifier, many: tuple[str, ...]) -> None:
    from fathom.models.classifier_files import read_classifier

    model = read_classifier(folder).model
    result = run_one(classifier, many[:80], 0.5)
    flops = [model.cumulative_flops(np.array([len(text.split()) + 2]))[0] for text in many[:80]]
    heads = [row.head - 1 for row in result.rows]
    assert result.flops == pytest.approx(sum(f[m] for f, m in zip(flops, heads, strict=True)))
    assert result.full_flops == pytest.approx(sum(f[-1] for f in flops))
    costs = classifier.info.costs
    assert costs[-1] == 1 and list(costs) == sorted(costs)
    assert result.realised_budget == pytest.approx(np.mean([costs[m] for m in heads]))


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 1999), min_size=1, max_size=9),
            st.one_of(st.none(), st.sampled_from([0.4, 0.5, 0.75, 1.0])),
        ),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=25)
def test_requests_together_are_answered_as_alone(
    classifier: Classifier, many: tuple[str, ...], wanted: list[tuple[list[int], float | None]]
) -> None:
    jobs = [
        ClassifyJob(inputs=tuple(many[place] for place in places), budget=budget)
        for places, budget in wanted
    ]
    for job, together in zip(jobs, classifier.run(jobs), strict=True):
        alone = run_one(classifier, job.inputs, job.budget)  # type: ignore[arg-type]
        assert isinstance(together, ClassifyResult)
        assert [row.head for row in together.rows] == [row.head for row in alone.rows]
        for one, other in zip(together.rows, alone.rows, strict=True):
            assert one.tokens == other.tokens
            np.testing.assert_allclose(one.probs, other.probs, atol=1e-5)
        assert together.realised_budget == alone.realised_budget


def test_what_is_wrong_with_one_request_harms_no_other(classifier: Classifier) -> None:
    jobs = [
        ClassifyJob(inputs=("good film",), budget=0.01),
        ClassifyJob(inputs=("good film",)),
        ClassifyJob(inputs=(b"bytes",)),
        ClassifyJob(inputs=()),
        ClassifyJob(inputs=("good",), budget=1.5),
        ClassifyJob(inputs=("good",), budget=float("nan")),
    ]
    found = classifier.run(jobs)
    smallest = f"{classifier.info.costs[0]:.4g}"
    expected = [
        (f"compute.budget must be from {smallest}, which the first of 3 exit heads costs, to 1, "
         "got 0.01.", "compute.budget"),
        None,
        ("input[0] must be of text, got bytes.", "input[0]"),
        ("input must hold at least one input, got none.", "input"),
        ("got 1.5.", "compute.budget"),
        ("got nan.", "compute.budget"),
    ]  # fmt: skip
    for result, wanted in zip(found, expected, strict=True):
        if wanted is None:
            assert isinstance(result, ClassifyResult)
        else:
            assert isinstance(result, InvalidRequest)
            assert str(result).endswith(wanted[0]) and result.param == wanted[1]


def test_a_budgets_thresholds_are_worked_out_once(classifier: Classifier) -> None:
    assert classifier.thresholds(0.6543) is classifier.thresholds(0.6543)


def test_images_are_served_like_texts() -> None:
    from PIL import Image

    torch.manual_seed(0)
    model = MultiExit(ResNet(1, (1, 2, 3)), classes=4).eval()
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 500)
    logits = rng.normal(size=(500, 3, 4)).astype(np.float32)
    calibration = Answers.of(logits, labels, np.ones(500, dtype=np.int64))
    classifier = Classifier(
        ClassifierFiles(name="i", labels=("a", "b", "c", "d"), model=model, calibration=calibration)
    )
    files = []
    for _ in range(3):
        stream = io.BytesIO()
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(stream, "PNG")
        files.append(stream.getvalue())
    broken, whole = classifier.run(
        [ClassifyJob(inputs=(files[0], b"no image")), ClassifyJob(inputs=tuple(files))]
    )
    assert isinstance(broken, InvalidRequest) and "not an image that can be read" in str(broken)
    assert isinstance(whole, ClassifyResult)
    read = classifier._reader.read(files)
    with torch.inference_mode():
        expected = model(read.batch(range(3)), read.sizes)[:, -1].softmax(-1)
    np.testing.assert_allclose([row.probs for row in whole.rows], expected, atol=1e-5)
