"""Tasks read files of the documented form, and say which row is not of it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fathom.config import EngineConfig
from fathom.evaluation.data import data_file, read_rows, read_text
from fathom.evaluation.errors import EvaluationError, library
from fathom.evaluation.job import describe_job, is_complete
from fathom.evaluation.partial import Partial
from fathom.evaluation.run import load
from fathom.evaluation.tasks import TASKS, GenerationTask, Item, read_choices, read_items
from fathom.models.adapters import Adapter


def write(path: Path, *rows: Any) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def generation(name: str) -> GenerationTask:
    task = TASKS[name]
    assert isinstance(task, GenerationTask)
    return task


@pytest.mark.parametrize(
    ("name", "row", "text", "references"),
    [
        ("gsm8k", {"question": "1+1?", "answer": "#### 2"}, "1+1?", ("#### 2",)),
        ("dialogsum", {"dialogue": "A: hi", "summary": "A greets."}, "A: hi", ("A greets.",)),
        ("scitldr", {"source": ["One.", "Two."], "target": ["a", "b"]}, "One. Two.", ("a", "b")),
        ("scitldr", {"source": "One.", "target": "a"}, "One.", ("a",)),
        ("scitldr", {"source": ["One.", "  "], "target": "a"}, "One.", ("a",)),
        ("multi30k", {"de": "Hund", "en": "dog"}, "Hund", ("dog",)),
    ],
)
@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_generation_rows(
    tmp_path: Path, name: str, row: dict, text: str, references: tuple, ending: str
) -> None:
    path = write(tmp_path / f"in{ending}", row)
    assert read_items(generation(name), path) == [Item(f"{path}:1", name, text, references)]


def test_the_limit_of_spec_bench_is_a_categorys(tmp_path: Path) -> None:
    rows = [{"category": "ab"[i % 2], "turns": [str(i), "x"]} for i in range(6)]
    items = read_items(generation("spec_bench"), write(tmp_path / "in.jsonl", *rows), 2)
    assert [(item.group, item.text) for item in items] == [
        ("spec_bench/a", "0"), ("spec_bench/a", "2"), ("spec_bench/b", "1"), ("spec_bench/b", "3"),
    ]  # fmt: skip


def test_choices_of_both_forms(tmp_path: Path) -> None:
    path = write(
        tmp_path / "in.jsonl",
        {"query": "q", "choices": ["a", "b", "c"], "gold": 2},
        {"context_options": ["x so x", "x so y"], "continuation": "won.", "gold": 0},
    )
    plain, swapped = read_choices(path)
    assert (plain.contexts, plain.continuations) == (("q",) * 3, ("a", "b", "c"))
    assert plain.gold == 2
    assert (swapped.contexts, swapped.continuations) == (("x so x", "x so y"), ("won.", "won."))
    assert len(read_choices(path, 1)) == 1


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("gsm8k", {"answer": "#### 2"}, 'needs the field "question", a text; got None'),
        ("gsm8k", {"question": "?", "answer": "two"}, '"answer" holds no number; end it with'),
        ("scitldr", {"source": [], "target": ["a"]}, 'needs the field "source", a list of texts'),
        ("scitldr", {"source": [3], "target": ["a"]}, 'needs the field "source", a list of texts'),
        ("multi30k", {"de": " ", "en": "a"}, 'needs the field "de", a text'),
        ("gsm8k", [1], "must be an object, got list"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, name: str, row: Any, says: str) -> None:
    task = generation(name)
    good = {"question": "?", "answer": "1", "source": "a", "target": "b", "de": "a", "en": "b"}
    path = write(tmp_path / "in.jsonl", good, row)
    with pytest.raises(EvaluationError, match=r"in\.jsonl:2: ") as caught:
        read_items(task, path)
    assert says in str(caught.value)


@pytest.mark.parametrize("gold", [None, 2, -1, "0"])
def test_a_bad_gold_is_named(tmp_path: Path, gold: Any) -> None:
    path = write(tmp_path / "in.jsonl", {"query": "q", "choices": ["a", "b"], "gold": gold})
    with pytest.raises(EvaluationError, match='"gold" must be the index of one of the 2 choices'):
        read_choices(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n\n{"a"\n')
    with pytest.raises(EvaluationError, match=r"bad\.jsonl:3: no valid JSON"):
        read_rows(tmp_path / "bad.jsonl")
    assert len(read_rows(tmp_path / "bad.jsonl", 1)) == 1
    (tmp_path / "bad.txt.gz").write_bytes(b"plain")
    with pytest.raises(EvaluationError, match="cannot read it"):
        read_text(tmp_path / "bad.txt.gz")
    (tmp_path / "bad.txt").write_bytes(b"\xff")
    with pytest.raises(EvaluationError, match="no UTF-8"):
        read_text(tmp_path / "bad.txt")
    (tmp_path / "empty.txt").write_bytes(b"\n")
    with pytest.raises(EvaluationError, match="the file is empty"):
        read_text(tmp_path / "empty.txt")


def test_missing_data_says_where_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FATHOM_DATA", raising=False)
    for task in TASKS.values():
        with pytest.raises(EvaluationError, match="FATHOM_DATA is unset") as caught:
            data_file(task.name, task.file)
        assert f"--data {task.name}=FILE" in str(caught.value)
    monkeypatch.setenv("FATHOM_DATA", str(tmp_path))
    with pytest.raises(EvaluationError, match=r"test_a\.jsonl\.gz is missing.*openai/gsm8k"):
        data_file("gsm8k", "gsm8k/test_a.jsonl.gz")


def test_a_missing_library_names_the_extra() -> None:
    with pytest.raises(EvaluationError, match=r"no-such is not .* 'fathom-serve\[train\]'"):
        library("no_such.thing")


def test_partial_results_survive_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "out.json.partial"
    partial = Partial(path, {"a": (1,)})
    partial.put("x", [1, 2])
    partial.put("y", {"z": None})
    path.write_text(path.read_text() + '{"key": "w", "val')
    again = Partial(path, {"a": [1]})
    assert again.get("x") == [1, 2]
    assert again.get("y") == {"z": None}
    assert again.get("w") is None
    with pytest.raises(EvaluationError, match="other data or options"):
        Partial(path, {"a": [2]})
    again.remove()
    assert not path.exists()


def test_what_is_complete(tmp_path: Path) -> None:
    out, partial = tmp_path / "out.json", tmp_path / "out.json.partial"
    job = {"limit": 3}
    assert not is_complete(out, partial, job, resume=True)
    out.write_text(json.dumps({"meta": {"job": job}, "rows": []}))
    assert is_complete(out, partial, job, resume=True)
    assert not is_complete(out, partial, job, resume=False)  # measured anew
    with pytest.raises(EvaluationError, match="other data or options"):
        is_complete(out, partial, {"limit": 4}, resume=True)
    partial.write_text("")
    assert not is_complete(out, partial, job, resume=True)
    with pytest.raises(EvaluationError, match="go on with --resume"):
        is_complete(out, partial, job, resume=False)


def test_a_job_is_of_the_contents_of_its_files(tmp_path: Path, tiny_model: Path) -> None:
    data = write(tmp_path / "in.jsonl", {"de": "Hund", "en": "dog"})

    def job() -> dict[str, Any]:
        config = EngineConfig(model=str(tiny_model), adapter=str(tmp_path / "adapter"))
        return describe_job(config, ["full"], [load(TASKS["multi30k"], data, None)], {"limit": 1})

    def train(norm: float) -> None:
        ids = torch.tensor([3, 4])
        Adapter(exit_layer=2, norm=torch.full((32,), norm), token_ids=ids).write(
            tmp_path / "adapter"
        )

    train(1.0)
    first = job()
    assert job() == first
    train(2.0)
    assert job() != first
    train(1.0)
    write(data, {"de": "Hund", "en": "a dog"})
    assert job() != first
