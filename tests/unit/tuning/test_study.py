from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fathom.settings import ConfigError
from fathom.tuning.study import Study, load_study
from fathom.tuning.study_checks import check_baseline_source


def write(folder: Path, **fields: Any) -> Path:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"traces": ["a.parquet"], **fields}))
    return path


def test_a_study_is_named_after_its_file_and_has_defaults(tmp_path: Path) -> None:
    study = load_study(write(tmp_path))
    assert study.name == "mine"
    assert study.objectives == ("quality", "budget", "tpot")
    assert study.total == study.trials == 40


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"traces": []}, ["traces", "[]", "--trace"]),
        ({"traces": ["x/a.parquet", "y/a.parquet"]}, ["traces", "'a.parquet'", "once"]),
        ({"objectives": ["speed"]}, ["objectives", "'speed'", "quality, budget, tpot"]),
        ({"trials": 0}, ["trials", "at least 1", "0"]),
        ({"trials": 2.5}, ["trials", "integer", "2.5"]),
        ({"searcher": "annealing"}, ["searcher", "optuna, random, grid", "'annealing'"]),
        ({"scheduler": "asha"}, ["scheduler asha", "3: ['quality', 'budget', 'tpot']", "Keep one"]),
        ({"scheduler": "hyperband"}, ["scheduler", "none, asha", "'hyperband'"]),
        ({"asha": {"first_rows": 0}}, ["asha.first_rows", "at least 1", "0"]),
        ({"asha": {"reduction_factor": 2.5}}, ["asha.reduction_factor", "integer", "2.5"]),
        ({"asha": {"rows": 5}}, ["asha.rows", "unknown", "first_rows"]),
        ({"choose_share": 1}, ["choose_share", "between 0 and 1", "got 1"]),
        ({"constraints": {"max_quality_loss": 2}}, ["constraints.max_quality_loss", "(0, 1]", "2"]),
        ({"constraints": {"loss": 2}}, ["constraints.loss", "unknown", "max_quality_loss"]),
        ({"space": {"mode": "copy"}}, ["space.mode", "exact, free", "'copy'"]),
        ({"space": {"policy": ["risk"]}}, ["space.policy", "calibrate fit", "'risk'"]),
        ({"space": {"confidence": "meta"}}, ["space.confidence", "'meta'"]),
        ({"space": {"max_stack": [2.5]}}, ["space.max_stack", "integers in [1, 64]", "2.5"]),
        ({"space": {"budget": {"low": 0.9, "high": 0.2}}}, ["space.budget.low", "swap"]),
        ({"space": {"budget": {"from": 0.2}}}, ["space.budget", "low", "'from'"]),
        ({"space": {"exit_threshold": 1.5}}, ["space.exit_threshold", "[0, 1]", "1.5"]),
        ({"space": {"exit_threshold": []}}, ["space.exit_threshold", "None"]),
        ({"searcher": "grid", "trials": 3}, ["trials 3", "10 settings", "grid_steps"]),
        ({"tracess": []}, ["tracess", "unknown setting"]),
    ],
)  # fmt: skip
def test_errors_name_field_value_and_remedy(
    tmp_path: Path, fields: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_study(write(tmp_path, **fields))
    for word in ("mine.yaml", *words):
        assert word in str(caught.value)


SERVED: dict[str, Any] = {"evaluate": "served", "objectives": ["throughput"]}
LIVE: dict[str, Any] = {"prompts": ["p.jsonl"], "baseline": "vllm"}


def test_vllm_can_be_a_served_studys_baseline(tmp_path: Path) -> None:
    live = {**LIVE, "vllm": {"python": "/opt/vllm/bin/python"}}
    study = load_study(write(tmp_path, **SERVED, live=live))
    assert study.live.vllm.python == "/opt/vllm/bin/python"
    check_baseline_source(study, "none")
    with pytest.raises(ConfigError, match=r"live.baseline vllm .* 'int8:int4': .* leave"):
        check_baseline_source(study, "int8:int4")
    check_baseline_source(load_study(write(tmp_path)), "int8")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"live": {"baseline": "tgi"}}, ["live.baseline", "none, vllm", "'tgi'"]),
        ({"live": LIVE}, ["live.baseline vllm", "evaluate: served", "replay"]),
        ({"live": LIVE, "evaluate": "live"}, ["live.baseline vllm", "evaluate: served", "live"]),
        ({**SERVED, "live": {**LIVE, "vllm": {"python": "py"}}}, ["live.vllm.python", "'py'"]),
        ({**SERVED, "live": {**LIVE, "vllm": {"gpus": 1}}}, ["live.vllm.gpus", "1", "cpus"]),
        ({**SERVED, "live": {**LIVE, "vllm": {"pyton": ""}}}, ["live.vllm.pyton", "unknown"]),
        ({**SERVED, "live": LIVE, "finalists": 0}, ["finalists", "at least 1"]),
        ({**SERVED, "live": LIVE, "space": {"max_num_seqs": [4, 8]}},
         ["space.max_num_seqs", "one value", "[4, 8]", "live.baseline vllm"]),
    ],
)  # fmt: skip
def test_errors_of_a_baseline(tmp_path: Path, fields: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_study(write(tmp_path, **fields))
    for word in words:
        assert word in str(caught.value)


def test_a_grid_gives_each_policy_its_own_dimensions(tmp_path: Path) -> None:
    study = load_study(
        write(
            tmp_path,
            searcher="grid",
            grid_steps=3,
            trials=100,
            space={
                "mode": "free",
                "policy": ["threshold", "budget", "adaptive"],
                "exit_threshold": {"low": 0.2, "high": 0.8},
                "budget": [0.6, 0.7],
                "max_stack": {"low": 2, "high": 3},
            },
        )
    )
    grid = list(study.grid())
    assert study.total == len(grid) == 2 * (3 + 2 + 1)
    assert len({tuple(sorted(setting.items())) for setting in grid}) == len(grid)
    assert {s["exit_threshold"] for s in grid if s["policy"] == "threshold"} == {0.2, 0.5, 0.8}
    assert all(set(s) & {"exit_threshold", "budget"} == set() for s in grid[-2:])
    assert {s["max_stack"] for s in grid} == {2, 3}


def test_a_study_can_be_made_without_a_file() -> None:
    Study(name="s", traces=("t.parquet",)).validate()
