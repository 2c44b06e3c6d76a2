"""Settings: what a YAML file may say, and how a wrong one is named."""

from __future__ import annotations

import argparse

import pytest

from fathom.commands.options import add_engine_options, engine_values
from fathom.config import (
    ConfigError,
    DeepConfig,
    EngineConfig,
    KVStoreConfig,
    Placement,
    PoolConfig,
    ServeConfig,
    Topology,
    from_mapping,
    load_yaml,
)
from fathom.types import AcceptMode, ComputePolicy


def test_a_yaml_file_becomes_nested_settings(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text(
        "port: 9000\nengine:\n  dtype: float32\n  compute: {mode: free, max_stack: 3}\n"
    )
    config = load_yaml(ServeConfig, path)
    config.validate()
    assert (config.port, config.engine.dtype) == (9000, "float32")
    assert config.engine.compute.mode is AcceptMode.FREE
    assert config.engine.compute.max_stack == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot: 1", "prot: unknown setting"),
        ("engine: 3", "engine must be a mapping, got 3"),
        ("engine: {compute: {mode: best}}", "engine.compute.mode must be one of full"),
        ("engine: {threads: -1}", "threads must be an integer of at least 0, got -1"),
        ("engine: {flush_rule: late}", "engine.flush_rule must be one of rate, full, eager, got"),
        ("engine: {dtype: int3}", "dtype must be one of float32"),
        ("engine: {compute: {exit_threshold: 2}}", "exit_threshold must be a number in"),
        ("port: 0", "port must be from 1 to 65535"),
        ("num_replicas: 0", "num_replicas must be above 0"),
        ("- a", "the top level must be a mapping"),
        ("a: [", "no valid YAML"),
    ],
)
def test_a_wrong_setting_is_named_with_its_value_and_remedy(tmp_path, text, words):
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words.replace("[", r"\[")):
        load_yaml(ServeConfig, path).validate()


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        load_yaml(EngineConfig, tmp_path / "none.yaml")


def test_a_stack_must_fit_a_pass():
    config = EngineConfig(max_num_batched_tokens=8, compute=ComputePolicy(max_stack=8))
    with pytest.raises(ConfigError, match=r"must exceed compute.max_stack \(8\), got 8"):
        config.validate()
    from_mapping(EngineConfig, {"max_num_batched_tokens": 9}).validate()


def test_options_of_an_engine_are_its_settings():
    parser = argparse.ArgumentParser()
    add_engine_options(parser)
    assert engine_values(parser.parse_args([])) == {}
    given = engine_values(parser.parse_args(["--no-pause-drafting", "--flush-rule", "eager"]))
    assert given == {"pause_drafting": False, "flush_rule": "eager"}
    EngineConfig(**given).validate()


def test_pools_are_nested_settings(tmp_path):
    path = tmp_path / "serve.yaml"
    path.write_text(
        "topology: disaggregated\nplacement: beside\n"
        "shallow: {num_replicas: 2, max_replicas: 6}\ndeep: {cpus: 4}\n"
        "kv_store: {budget_bytes: 1000}\ndata_plane: {tls: true}\n"
    )
    config = load_yaml(ServeConfig, path)
    config.validate()
    assert config.topology is Topology.DISAGGREGATED
    assert config.placement is Placement.BESIDE
    assert config.serving == config.shallow
    assert config.deep.cpus == 4
    assert config.data_plane.tls


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("topology: split", "topology must be one of fused, disaggregated, vllm, got 'split'"),
        ("shallow: {num_replicas: 0}", "shallow.num_replicas must be above 0, got 0"),
        ("deep: {leases: -1}", "deep.leases must be at least 0, got -1"),
        ("deep: {max_replicas: 2, num_replicas: 3}", "deep.num_replicas must be from"),
        ("kv_store: {shards: -2}", "kv_store.shards must be at least -1, got -2"),
        ("data_plane: {deadline_s: 0}", "data_plane.deadline_s must be above 0, got 0"),
        ("data_plane: {tls_key: key.pem}", "belong together: set all of them, or none"),
        ("placement: beside\ndeep: {max_replicas: 2}", "deep.max_replicas must be 0 with"),
        ("surge_percent: 101", "surge_percent must be at most 100, got 101"),
    ],
)
def test_a_wrong_cluster_setting_is_named(tmp_path, text, words):
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_yaml(ServeConfig, path).validate()


def test_the_store_is_on_where_there_is_someone_to_share_with():
    assert ServeConfig().store_shards == 0
    assert ServeConfig(num_replicas=2).store_shards == 2
    assert ServeConfig(topology=Topology.DISAGGREGATED).store_shards == 2
    assert ServeConfig(num_replicas=2, kv_store=KVStoreConfig(shards=0)).store_shards == 0


def test_all_ingresses_together_take_what_the_server_takes():
    config = ServeConfig(
        topology=Topology.DISAGGREGATED,
        shallow=PoolConfig(num_replicas=1, max_replicas=3),
        num_ingress_replicas=2,
        max_ongoing_requests=10,
        max_queued_requests=5,
    )
    assert config.max_requests == 18  # (3 * 10 + 5) / 2


@pytest.mark.parametrize("shallow", [1, 2, 5])
@pytest.mark.parametrize("deep", [1, 2, 4])
@pytest.mark.parametrize("placement", list(Placement))
def test_one_deep_replica_may_be_missing(shallow, deep, placement):
    """Also while an update has started new shallow replicas and old ones drain."""
    config = ServeConfig(
        shallow=PoolConfig(num_replicas=shallow),
        deep=DeepConfig(num_replicas=deep),
        placement=placement,
        surge_percent=25,
    )
    there = shallow if placement is Placement.BESIDE else deep
    assert config.leases * max(1, there - 1) >= shallow + 1
    assert ServeConfig(deep=DeepConfig(leases=7)).leases == 7
