"""Settings of vLLM replicas, and what they do not take."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import pytest

from deployments.app import build
from fathom.commands.serve import add_parser, serve_config
from fathom.config import ConfigError, EngineConfig, ServeConfig, Topology, from_mapping
from fathom.models.config import ModelConfig
from fathom.types import AcceptMode
from fathom.vllm.settings import VllmConfig
from fathom.vllm.start import costs_of, engine_arguments

MODEL = ModelConfig(
    architecture="LlamaForCausalLM", vocab_size=1000, hidden_size=64, intermediate_size=128,
    num_layers=4, num_heads=4, num_kv_heads=2, head_dim=16, rms_norm_eps=1e-5,
    rope_inv_freq=(1.0,) * 8, rope_attention_scaling=1.0, tie_word_embeddings=True,
    qkv_bias=False, output_bias=False, mlp_bias=False, qk_norm=False, max_position=2048,
    sliding_window=None, eos_token_ids=(2,), bos_token_id=1,
)  # fmt: skip
TOKEN_BYTES = 4 * 2 * 2 * 16 * 2
"""Keys and values of a token in all layers, in bfloat16."""


def vllm(**settings: Any) -> ServeConfig:
    config = from_mapping(ServeConfig, {"topology": "vllm", **settings})
    config.validate()
    return config


def deployments_of(application: Any) -> dict[str, Any]:
    found, left = {}, [application]
    while left:
        deployment = left.pop()._bound_deployment
        found[deployment.name] = deployment
        left += [each for each in deployment.init_args if hasattr(each, "_bound_deployment")]
    return found


def test_the_application_has_vllms_replicas_and_requests_get_full_depth() -> None:
    config = vllm(
        num_replicas=2,
        cpus_per_replica=3,
        vllm={"python": "/opt/vllm/bin/python", "gpus": 2, "tensor_parallel_size": 2},
    )
    found = deployments_of(build(config))
    assert set(found) == {"Ingress", "Vllm"}
    options = found["Vllm"].ray_actor_options
    assert (options["num_cpus"], options["num_gpus"]) == (3, 2)
    assert options["runtime_env"]["py_executable"] == "/opt/vllm/bin/python"
    assert found["Vllm"].num_replicas == 2
    for name, place in (("Vllm", 0), ("Ingress", 1)):
        assert found[name].init_args[place].engine.compute.mode is AcceptMode.FULL
    # What is said of full depth stands.
    assert build({"topology": "vllm", "engine": {"compute": {"mode": "full"}}}) is not None


def test_only_vllms_replicas_start_in_its_interpreter() -> None:
    found = deployments_of(build(vllm(vllm={"python": "/opt/vllm/bin/python"})))
    assert "runtime_env" not in found["Ingress"].ray_actor_options
    assert "runtime_env" not in deployments_of(build(vllm()))["Vllm"].ray_actor_options


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"engine": {"compute": {"mode": "free"}}}, "engine.compute.mode must be full"),
        ({"engine": {"compute": {"exit_threshold": 0.7}}}, "engine.compute.mode must be full"),
        ({"engine": {"quantization": "int4"}}, "engine.quantization must be 'none'"),
        ({"engine": {"adapter": "default"}}, "engine.adapter must be 'auto'"),
        ({"engine": {"exit_layer": 10}}, "engine.exit_layer must be 0"),
        ({"operating_points": "points.yaml"}, "operating_points must be ''"),
        ({"load_aware": {"enabled": True}}, "load_aware.enabled must be False"),
        ({"shadow": {"rate": 0.1}}, "shadow.rate must be 0"),
        ({"kv_store": {"shards": 2}}, "kv_store.shards must be 0"),
        ({"vllm": {"python": "bin/python"}}, "vllm.python must be an absolute path"),
        ({"vllm": {"tensor_parallel_size": 0}}, "vllm.tensor_parallel_size must be an integer"),
        ({"vllm": {"tensor_parallel_size": 4, "gpus": 2}}, "vllm.gpus must be at least"),
        ({"vllm": {"gpu_memory_utilization": 0.5}}, "vllm.gpu_memory_utilization must be 0"),
        ({"vllm": {"arguments": {"dtype": "half"}}}, "must not hold dtype.*say engine.dtype"),
        ({"vllm": {"arguments": ["dtype"]}}, "vllm.arguments must be a mapping"),
        ({"vllm": {"pythons": ""}}, "vllm.pythons: unknown setting"),
    ],
)
def test_what_vllm_does_not_have_is_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        vllm(**settings)


def test_other_topologies_keep_their_settings() -> None:
    engine = EngineConfig(exit_layer=10)
    ServeConfig(engine=engine, vllm=VllmConfig(python="/opt/python")).validate()
    assert ServeConfig(num_replicas=2).store_shards == 2
    assert vllm(num_replicas=2).store_shards == 0


def test_the_command_line_chooses_vllm() -> None:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())

    def config(*options: str) -> ServeConfig:
        return serve_config(parser.parse_args(["serve", *options]))

    found = config("--topology", "vllm", "--vllm-python", "/opt/bin/python", "--replicas", "2")
    assert found.topology is Topology.VLLM
    assert (found.vllm.python, found.num_replicas) == ("/opt/bin/python", 2)
    with pytest.raises(ConfigError, match="--deep-replicas goes with --topology disaggregated"):
        config("--topology", "vllm", "--deep-replicas", "2")
    with pytest.raises(ConfigError, match=r"must be full with topology vllm.*got 'rollback'"):
        config("--topology", "vllm", "--mode", "rollback")


def test_vllm_gets_what_our_engine_would_get() -> None:
    engine = EngineConfig(
        dtype="float16", kv_cache_bytes=1 << 20, max_num_seqs=7, max_num_batched_tokens=99,
        prefix_caching=False,
    )  # fmt: skip
    found = engine_arguments(engine, VllmConfig(arguments={"enforce_eager": True}), MODEL)
    assert found["dtype"] == "float16"
    assert found["kv_cache_memory_bytes"] == 1 << 20
    assert (found["max_num_seqs"], found["max_num_batched_tokens"]) == (7, 99)
    assert (found["enable_prefix_caching"], found["enforce_eager"]) == (False, True)
    assert "gpu_memory_utilization" not in found
    # As long as the cache is, less a block.
    assert found["max_model_len"] == (1 << 20) // TOKEN_BYTES - 128
    on_gpu = VllmConfig(gpus=1, gpu_memory_utilization=0.8)
    found = engine_arguments(engine, on_gpu, MODEL)
    assert found["gpu_memory_utilization"] == 0.8
    assert "kv_cache_memory_bytes" not in found
    assert found["max_model_len"] == MODEL.max_position


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_model_len": 4096}, "max_model_len must be at most 2048, the model's longest"),
        ({"max_model_len": 2000}, r"at most 1920, what kv_cache_bytes \(1048576\) holds"),
        ({"kv_cache_bytes": 1000}, "at most 0, what kv_cache_bytes"),
    ],
)
def test_a_length_that_cannot_be_is_refused(changes: dict[str, int], message: str) -> None:
    engine = replace(EngineConfig(kv_cache_bytes=1 << 20), **changes)
    with pytest.raises(ConfigError, match=message):
        engine_arguments(engine, VllmConfig(), MODEL)


def test_an_exit_saves_nothing() -> None:
    costs = costs_of(EngineConfig(), MODEL)
    assert costs.exit_cost == 1.0
    assert costs.kv_bytes * MODEL.num_layers == TOKEN_BYTES
