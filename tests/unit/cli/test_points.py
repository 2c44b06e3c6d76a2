"""``fathom generate`` with operating points."""

from __future__ import annotations

from pathlib import Path

import pytest

from fathom.cli import build_parser, main
from fathom.commands.options import UsageError
from fathom.commands.points import compute_at, points_of
from fathom.config import EngineConfig
from fathom.engine.build import build_engine
from fathom.types import AcceptMode, ComputePolicy, PolicyName
from tests.points import points_of as made_up
from tests.tiny_models import tiny_model

__all__ = ["tiny_model"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made_up().save(tmp_path / "points.yaml")
    return tmp_path / "points.yaml"


def policy(*options: str) -> ComputePolicy:
    args = build_parser().parse_args(["generate", "hi", *options])
    return compute_at(args, points_of(args))


def test_points_and_promises_are_resolved_as_a_server_does(file: Path) -> None:
    points = ("--operating-points", str(file))
    fast = policy(*points, "--operating-point", "fast")
    assert (fast.operating_point, fast.budget, fast.mode) == ("fast", 0.7, AcceptMode.FREE)
    risk = policy(*points, "--risk", "0.05")
    assert (risk.policy, risk.mode) == (PolicyName.RISK, AcceptMode.FREE)
    assert risk.exit_threshold == made_up().certify(0.05, 0.1).threshold
    assert policy(*points, "--operating-point", "draft", "--max-stack", "2").max_stack == 2
    assert policy(*points) == ComputePolicy()
    assert policy("--mode", "free") == ComputePolicy(mode=AcceptMode.FREE)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--operating-point fast --risk 0.05", "--risk contradicts --operating-point"),
        ("--operating-point none", "--operating-point must be one of exact, balanced, fast"),
        ("--budget 0.7 --exit-threshold 0.5", "--exit-threshold contradicts --budget"),
        ("--risk 0.0001", "--risk 0.0001 with confidence 0.9 cannot be promised from 400"),
    ],
)
def test_errors_name_options(file: Path, options: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        policy("--operating-points", str(file), *options.split())


def test_a_point_needs_a_file() -> None:
    with pytest.raises(UsageError, match="--operating-point fast needs --operating-points FILE"):
        policy("--operating-point", "fast")


def test_generate_takes_a_point_of_this_model_and_no_other(
    tiny_model: Path, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = ["--model", str(tiny_model), "--dtype", "float32", "--adapter", "none",
              "--exit-layer", "2", "--kv-cache-bytes", str(4 << 20)]  # fmt: skip
    command = ["generate", "--raw", "abc", "--new-tokens", "4", *engine]
    point = ["--operating-points", str(file), "--operating-point", "draft"]
    assert main([*command, *point]) == 2
    assert "measured on another model" in capsys.readouterr().err
    config = EngineConfig(
        model=str(tiny_model), dtype="float32", adapter="none", exit_layer=2, kv_cache_bytes=4 << 20
    )
    made_up(build_engine(config).info).save(file)
    assert main([*command, *point]) == 0
    assert "free" in capsys.readouterr().err
