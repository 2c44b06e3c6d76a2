"""The shadow in the terminal: its table, and the options that turn it on."""

from __future__ import annotations

import argparse
import io
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from fathom.api.exits import exits_body
from fathom.cli import build_parser
from fathom.commands.exits import show
from fathom.commands.serve import serve_config
from fathom.config import ConfigError, ServeConfig, ShadowConfig, from_mapping
from fathom.exits.drift import Expected
from fathom.exits.shadow_watch import DEFAULT, ShadowWatch
from tests.shadows import FREE, completion, expected_of


def printed(state: dict[str, Any] | None) -> str:
    console = Console(width=220, record=True, file=io.StringIO())
    show(exits_body([], state), console)
    return console.export_text()


def state(loss: float, **more: Any) -> dict[str, Any]:
    rng, watch = np.random.default_rng(0), ShadowWatch(0.05)
    watch.expect({"p": expected_of(rng, loss=0.08, count=300), DEFAULT: Expected(compute=FREE)})
    watch.take(completion(rng, loss=loss) for _ in range(150))
    return {"rate": 0.01, "alert": watch.alert, "points": watch.points(), **more}


def test_a_point_as_it_should_be() -> None:
    run = {"uri": "http://mlflow", "run_id": "r1", "error": ""}
    text = printed(state(0.05, mlflow=run))
    assert "1.00% of the completions" in text
    row = next(line for line in text.splitlines() if line.strip(" │").startswith("p "))
    cells = [cell.strip() for cell in row.strip(" │").split("│")]
    assert cells[:3] == ["p", "150", "3,000"]
    assert cells[4] == "92.00%"
    assert cells[-1] == "no"
    assert "experiment fathom-serve, run r1" in text
    assert "fathom tune" not in text


def test_a_point_that_has_drifted() -> None:
    away = {"uri": "http://mlflow", "run_id": None, "error": "refused"}
    text = printed(state(0.6, mlflow=away))
    assert "agreement" in text
    assert "what p was measured on: run `fathom tune` again on a fresh trace." in text
    assert "http://mlflow does not answer: refused" in text


def test_no_shadow_no_table() -> None:
    assert "Shadow" not in printed(None)


def config_of(*options: str) -> ServeConfig:
    args = build_parser().parse_args(["serve", *options])
    assert isinstance(args, argparse.Namespace)
    return serve_config(args)


def test_options() -> None:
    config = config_of()
    assert (config.shadow.rate, config.otlp_traces_endpoint) == (0, "")
    config = config_of("--shadow", "0.05", "--mlflow", "http://m:5000")
    assert config.shadow == ShadowConfig(rate=0.05)
    assert config.mlflow == "http://m:5000"
    assert config_of("--otlp-traces-endpoint").otlp_traces_endpoint == "env"
    url = "http://localhost:4318/v1/traces"
    assert config_of("--otlp-traces-endpoint", url).otlp_traces_endpoint == url


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"shadow": {"rate": 1.5}}, r"shadow.rate must be a share .* in \[0, 1\], got 1.5"),
        ({"shadow": {"every_s": 0}}, "shadow.every_s must be above 0, got 0"),
        ({"shadow": {"false_alarms": 1}}, r"shadow.false_alarms must be .* in \(0, 1\), got 1"),
        ({"otlp_traces_endpoint": "localhost:4317"}, "must be a URL of OTLP over HTTP"),
    ],
)
def test_a_wrong_setting_is_named(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        from_mapping(ServeConfig, values).validate()
