"""Settings: what a YAML file may say, and how a wrong one is named."""

from __future__ import annotations

import pytest

from fathom.config import ConfigError, EngineConfig, ServeConfig, from_mapping, load_yaml
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
