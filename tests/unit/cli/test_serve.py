"""What ``fathom serve``'s files and options become."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import yaml

from fathom.cli import build_parser
from fathom.commands.serve import serve_config
from fathom.config import ConfigError, ServeConfig, Topology, from_mapping

DEPLOYMENTS = Path(__file__).parents[3] / "deployments"


def config_of(*options: str) -> ServeConfig:
    args = build_parser().parse_args(["serve", *options])
    assert isinstance(args, argparse.Namespace)
    return serve_config(args)


@pytest.mark.parametrize("name", ["fused.yaml", "disaggregated.yaml"])
def test_a_serve_config_file_is_a_config_file(name: str) -> None:
    values = yaml.safe_load((DEPLOYMENTS / name).read_text())
    expected = from_mapping(ServeConfig, values["applications"][0]["args"])
    assert config_of("--config", str(DEPLOYMENTS / name)) == expected
    assert config_of("--config", str(DEPLOYMENTS / name), "--port", "9000").port == 9000


def test_serves_http_options_win_over_the_applications(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    application = {"import_path": "deployments.app:build", "args": {"port": 8000}}
    other = {"import_path": "other:app"}
    content = {"http_options": {"port": 8100}, "applications": [other, application]}
    path.write_text(yaml.safe_dump(content))
    assert config_of("--config", str(path)).port == 8100
    path.write_text(yaml.safe_dump({"applications": [other]}))
    with pytest.raises(ConfigError, match=r"import_path: deployments\.app:build, got 0"):
        config_of("--config", str(path))


def test_our_own_form_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("topology: disaggregated\nshallow: {cpus: 3}\n")
    config = config_of("--config", str(path), "--deep-replicas", "2")
    assert config.topology is Topology.DISAGGREGATED
    assert (config.shallow.cpus, config.deep.num_replicas) == (3, 2)


def test_pools_in_options_mean_the_disaggregated_topology() -> None:
    config = config_of("--shallow-replicas", "2", "--threads", "4")
    assert config.topology is Topology.DISAGGREGATED
    assert (config.shallow.num_replicas, config.deep.num_replicas) == (2, 1)
    assert (config.shallow.cpus, config.deep.cpus, config.cpus_per_replica) == (4, 4, 4)
    assert config_of("--replicas", "3").serving.num_replicas == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--topology fused --deep-replicas 2", "--deep-replicas goes with --topology disaggr"),
        ("--topology disaggregated --replicas 2", "say --shallow-replicas and --deep-replicas"),
        ("--shallow-replicas 0", "shallow.num_replicas must be above 0, got 0"),
    ],
)
def test_options_that_contradict_each_other(options: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config_of(*options.split())


def test_operating_points_and_load(tmp_path: Path) -> None:
    config = config_of("--operating-points", "points.yaml", "--operating-point", "fast")
    assert config.operating_points == str(Path("points.yaml").absolute())
    assert config.engine.compute.operating_point == "fast"
    assert not config.load_aware.enabled
    assert config_of("--load-aware").load_aware.enabled
    path = tmp_path / "own.yaml"
    path.write_text("load_aware: {waiting: 9}\nengine: {compute: {load_aware: false}}\n")
    config = config_of("--config", str(path), "--load-aware")
    assert (config.load_aware.enabled, config.load_aware.waiting) == (True, 9)
    assert not config.engine.compute.load_aware
    path.write_text("load_aware: {relax: 2}")
    with pytest.raises(ConfigError, match=r"load_aware.relax must be at most 1, got 2"):
        config_of("--config", str(path))
