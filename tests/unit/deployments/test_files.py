"""The deployment files: what Ray's own validators, and ours, say about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

from deployments import SERVE_ENVIRONMENT
from deployments.app import build
from fathom.api.auth import digest
from fathom.config import ConfigError, Placement, ServeConfig, Topology, from_mapping

ROOT = Path(__file__).parents[3]
DEPLOYMENTS = ROOT / "deployments"
CLUSTERS = [ROOT / "cluster.yaml", DEPLOYMENTS / "cluster-aws.yaml"]


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def deployments_of(application: Any) -> dict[str, Any]:
    """All deployments of a built application by name, in any order."""
    found, left = {}, [application]
    while left:
        deployment = left.pop()._bound_deployment
        found[deployment.name] = deployment
        left += [each for each in deployment.init_args if hasattr(each, "_bound_deployment")]
    return found


def serve_configs() -> dict[str, dict[str, Any]]:
    names = ("fused.yaml", "disaggregated.yaml", "vllm.yaml")
    files = {name: read(DEPLOYMENTS / name) for name in names}
    text = read(DEPLOYMENTS / "kuberay.yaml")["spec"]["serveConfigV2"]
    return {**files, "kuberay.yaml": yaml.safe_load(text)}


@pytest.mark.parametrize("name", list(serve_configs()))
def test_serve_takes_the_file_and_we_take_its_settings(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FATHOM_API_KEY", "a key")
    schema = ServeDeploySchema.model_validate(serve_configs()[name])
    (application,) = schema.applications
    assert application.name == "fathom"  # what `fathom` looks for
    assert application.import_path == "deployments.app:build"
    built = call_user_app_builder_with_args_if_necessary(build, application.args)
    config = from_mapping(ServeConfig, application.args)
    pools = {
        Topology.FUSED: {"Engine"},
        Topology.DISAGGREGATED: {"Shallow", "Deep"},
        Topology.VLLM: {"Vllm"},
    }[config.topology]
    assert set(deployments_of(built)) == {"Ingress", *pools}
    assert schema.http_options.host == config.host
    assert schema.http_options.port == config.port


def test_operators_keys_reach_the_ingress_and_need_clients_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FATHOM_OPERATOR_KEY", "op")
    monkeypatch.delenv("FATHOM_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="FATHOM_OPERATOR_KEY is set and FATHOM_API_KEY is not"):
        build(ServeConfig())
    monkeypatch.setenv("FATHOM_API_KEY", "client")
    arguments = deployments_of(build(ServeConfig()))["Ingress"].init_args
    assert arguments[2] == (digest("client"), digest("op"))
    assert arguments[5] == (digest("op"),)


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_ray_up_takes_the_cluster_with_ray_authentication_on(path: Path) -> None:
    config = read(path)
    prepared = prepare_config(config)
    validate_config(prepared)
    for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = [line for line in prepared[commands] if "ray start" in line]
        assert "RAY_AUTH_MODE=token" in start
    assert prepared["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert config["provider"]["type"] == ("local" if path.name == "cluster.yaml" else "aws")


def test_kuberay_has_a_ray_service_with_authentication_on() -> None:
    resource = read(DEPLOYMENTS / "kuberay.yaml")
    assert (resource["apiVersion"], resource["kind"]) == ("ray.io/v1", "RayService")
    cluster = resource["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert tuple(map(int, cluster["rayVersion"].split("."))) >= (2, 52, 0)  # or no authOptions
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        for container in group["template"]["spec"]["containers"]:
            (key,) = [each for each in container["env"] if each["name"] == "FATHOM_API_KEY"]
            assert "value" not in key  # comes from a secret
    shallow = yaml.safe_load(resource["spec"]["serveConfigV2"])["applications"][0]["args"]
    (workers,) = cluster["workerGroupSpecs"]
    cores = int(workers["template"]["spec"]["containers"][0]["resources"]["requests"]["cpu"])
    wanted = sum(
        shallow[pool]["num_replicas"] * shallow[pool]["cpus"] for pool in ("shallow", "deep")
    )
    assert cores * workers["replicas"] > wanted


def options(**settings: Any) -> dict[str, Any]:
    built = deployments_of(build({"topology": "disaggregated", **settings}))
    return {name: deployment for name, deployment in built.items() if name != "Ingress"}


def test_pools_are_sized_apart() -> None:
    found = options(shallow={"num_replicas": 3, "cpus": 2}, deep={"num_replicas": 2, "cpus": 4})
    assert {name: each.num_replicas for name, each in found.items()} == {"Shallow": 3, "Deep": 2}
    cores = {name: each.ray_actor_options["num_cpus"] for name, each in found.items()}
    assert cores == {"Shallow": 2, "Deep": 4}


def test_a_pool_with_a_maximum_follows_its_load() -> None:
    found = options(deep={"num_replicas": 2, "max_replicas": 5, "target": 0.2})
    scaling = found["Deep"]._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.initial_replicas, scaling.max_replicas) == (1, 2, 5)
    assert scaling.policy.policy_function == "deployments.autoscaling:ByQueue"
    assert scaling.policy.get_policy()(**scaling.policy.policy_kwargs)._target == 0.2
    assert found["Shallow"]._deployment_config.autoscaling_config is None


def test_beside_reserves_room_for_both_on_one_node() -> None:
    found = options(placement=Placement.BESIDE, shallow={"cpus": 2}, deep={"cpus": 3})
    (shallow,) = found.values()
    assert shallow._replica_config.placement_group_bundles == [{"CPU": 2}, {"CPU": 3}]
    assert shallow._replica_config.placement_group_strategy == "STRICT_PACK"


@pytest.mark.parametrize("router", ["prefix", "pow2"])
def test_the_router_of_requests_can_be_chosen(router: str) -> None:
    found = options(router=router, routing={"slack": 3})
    chosen = found["Shallow"]._deployment_config.request_router_config
    assert ("FathomRouter" in chosen.request_router_class) == (router == "prefix")
    assert chosen.request_router_kwargs.get("slack", 3) == 3


@pytest.mark.parametrize("path", CLUSTERS, ids=lambda path: path.name)
def test_every_node_of_a_cluster_starts_ray_with_our_settings(path: Path):
    text = path.read_text()
    starts = text.count("/ray start --") + text.count("    ray start --")
    assert starts == 2
    for name, value in SERVE_ENVIRONMENT.items():
        assert text.count(f"{name}={value}") == starts


def test_every_pod_has_our_settings():
    """But for the proxy's key check: the kubelet's probes ask Serve's own paths without a key."""
    cluster = read(DEPLOYMENTS / "kuberay.yaml")["spec"]["rayClusterConfig"]
    wanted = {k: v for k, v in SERVE_ENVIRONMENT.items() if "CALLBACK" not in k}
    assert len(wanted) == len(SERVE_ENVIRONMENT) - 1
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        found = {each["name"]: each.get("value") for each in container["env"]}
        assert wanted.items() <= found.items()
        assert not SERVE_ENVIRONMENT.keys() - wanted.keys() & found.keys()
