"""experiments/free: thresholds come from points, methods run live, tables tell what was found."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from experiments.free.measure import measure
from experiments.free.methods import Method, choose
from experiments.free.report import BEGIN, END, write_figure, write_tables
from experiments.free.tasks import FREE_TASKS, choosing, judged, write_prompts
from fathom.config import EngineConfig
from fathom.tuning.operating_points import OperatingPoints, Point
from fathom.types import AcceptMode, ComputePolicy, PolicyName
from tests.points import points_of
from tests.tiny_models import save_random_llama, tiny_model

__all__ = ["tiny_model"]

OWN = dataclasses.replace(FREE_TASKS["multi30k"], calibrate=5, new_tokens=24)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder in the form of Multi30k's and DialogSum's."""
    for file, rows in (
        ("multi30k/test2016", [{"de": f"Satz {n}.", "en": f"Line {n}."} for n in range(9)]),
        ("multi30k/valid", [{"de": f"Wahl {n}.", "en": f"Choice {n}."} for n in range(9)]),
        ("dialogsum/dev", [{"dialogue": f"A: {n}", "summary": f"{n}"} for n in range(9)]),
    ):
        path = tmp_path / "data" / f"{file}.jsonl.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    monkeypatch.setenv("FATHOM_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def searched() -> OperatingPoints:
    """Fixed λ in mode free, as `fathom tune` measures them."""
    points = {}
    for threshold, agreement, budget in ((0.2, 0.8, 0.5), (0.5, 0.93, 0.7), (0.8, 0.97, 0.9)):
        compute = ComputePolicy(mode=AcceptMode.FREE, exit_threshold=threshold)
        measured = {"agreement": agreement, "budget": budget, "predicted_speedup": 1 / budget}
        points[f"front-{threshold}"] = Point(compute, measured)
    return dataclasses.replace(points_of(), points=points)


def test_thresholds_are_those_of_the_trace() -> None:
    found = choose(points_of(), searched())
    by_name = {method.name: method for method in found.methods}
    assert found.methods[0].name == "full"
    assert not found.missing
    computes = {name: method.compute for name, method in by_name.items()}
    assert computes["exact"].exit_threshold == 0.4
    # The fastest that still agrees so often, for CALM and FREE alike.
    for name, threshold in (("95", 0.8), ("90", 0.5), ("paper", 0.9)):
        assert computes[f"calm-{name}"].exit_threshold == threshold
        assert computes[f"calm-{name}"].mode is AcceptMode.COPY
        assert computes[f"free-{name}"].exit_threshold == threshold
        assert computes[f"free-{name}"].mode is AcceptMode.FREE
    assert by_name["free-90"].promised == 0.93
    assert computes["static"].policy is PolicyName.ALWAYS
    assert computes["budget"].budget == 0.9
    certificate = points_of().certify(0.05, 0.1)
    assert computes["risk"].exit_threshold == certificate.threshold
    for method in found.methods:
        method.compute.validate()


def test_what_a_trace_cannot_promise_is_missing_with_its_reason() -> None:
    poor = dataclasses.replace(
        searched(), points={"front-1": searched().points["front-0.2"]}
    )  # 80% alone
    found = choose(points_of(requests=12), poor)
    names = {method.name for method in found.methods}
    assert {"calm-95", "free-95", "free-90", "risk", "budget"}.isdisjoint(names)
    assert "requests" in found.missing["risk"]
    assert "0.2" in found.missing["fixed λ for 95%"]


def test_no_request_chooses_and_judges(data: Path, tmp_path: Path) -> None:
    assert [item.text for item in judged(OWN, 2)] == ["Satz 0.", "Satz 1."]
    assert [item.text for item in choosing(OWN)] == [f"Wahl {n}." for n in range(5)]
    shared = dataclasses.replace(FREE_TASKS["dialogsum"], calibrate=4)
    used = {item.text for item in choosing(shared)}
    assert used == {f"A: {n}" for n in range(5, 9)}
    assert used.isdisjoint(item.text for item in judged(shared, 5))
    with pytest.raises(SystemExit, match="has 5 requests to be judged by, got --requests 6"):
        judged(shared, 6)
    write_prompts(OWN, tmp_path / "prompts.jsonl")
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    assert [json.loads(line)["messages"][0]["content"] for line in lines] == [
        f"Translate German to English: Wahl {n}." for n in range(5)
    ]


def unsure(folder: Path, tokenizer: Path) -> Path:
    """A random model whose exit is right now and then."""
    save_random_llama(
        folder, seed=3, vocab_size=257, initializer_range=0.15, tie_word_embeddings=True,
        eos_token_id=256, bos_token_id=None,
    )  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder)
    return folder


def test_methods_run_live_once_and_the_page_tells_of_them(
    data: Path, tmp_path: Path, tiny_model: Path
) -> None:
    config = EngineConfig(
        model=str(unsure(tmp_path / "model", tiny_model)), dtype="float32", threads=1,
        kv_cache_bytes=4 << 20, pause_drafting=False, exit_layer=2, adapter="none", max_num_seqs=4,
        prefix_caching=False,
    )  # fmt: skip
    free = ComputePolicy(mode=AcceptMode.FREE, exit_threshold=0.0)
    methods = [
        Method("full", "full model", "full", ComputePolicy(mode=AcceptMode.FULL), 1.0),
        Method("static", "static exit", "static",
               ComputePolicy(mode=AcceptMode.COPY, policy=PolicyName.ALWAYS)),
        Method("free-90", "FREE", "FREE fixed", free, 0.9),
    ]  # fmt: skip
    shown: list[str] = []

    def progress(label: str, total: int) -> Any:
        return lambda: shown.append(label)

    folder = tmp_path / "work"
    folder.mkdir()
    items = judged(OWN, 9)
    found = measure(OWN, items, methods, folder, config, progress)
    full, static, drafted = found["outcomes"]
    assert found["meta"]["rounds"] == 2
    assert (full["agreement"], full["cost"], full["exit_rate"], full["ratio"]) == (1, 1, 0, 1)
    assert full["layers_per_token"] == 4
    # All but each answer's first token.
    assert static["exit_rate"] == pytest.approx(1 - 9 / static["tokens"])
    assert static["layers_per_token"] < 3
    assert drafted["exit_rate"] > 0.8
    assert 0 < drafted["agreement"] < 0.9
    assert static["agreement"] < 0.9
    assert drafted["deep_passes"] < 0.3
    for own in (static, drafted):
        assert own["agreement_low"] <= own["agreement"] <= own["agreement_high"]
        assert own["cost"] < 1

    before = len(shown)
    kept = (folder / "live.jsonl").read_text()
    assert measure(OWN, items, methods, folder, config, progress) == found
    assert (folder / "live.jsonl").read_text() == kept
    assert len(shown) == 2 * before

    page = tmp_path / "README.md"
    page.write_text(f"# Free\n{BEGIN}\nstale\n{END}\nafter\n")
    write_tables(page, [{**found, "missing": {"risk": "too few requests"}}])
    text = page.read_text()
    assert "stale" not in text and text.endswith("after\n")
    row = next(line for line in text.splitlines() if line.startswith("| static exit"))
    assert f"{static['exit_rate']:.1%}" in row
    assert "risk: too few requests" in text
    figure = write_figure(found, tmp_path / "multi30k.png")
    assert figure.read_bytes().startswith(b"\x89PNG")
