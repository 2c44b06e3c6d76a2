"""A file as ``serve deploy`` has it, with another ``user_config``: what Serve makes of it."""

from __future__ import annotations

from typing import Any

import pytest
from ray.serve._private.deploy_utils import get_app_code_version
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.schema import ServeApplicationSchema

from deployments.user_config import with_user_config

POLICY = AutoscalingPolicy(  # type: ignore[no-untyped-call]
    policy_function="deployments.autoscaling:ByRequests", policy_kwargs={"target": 2}
)


def application(*deployments: dict[str, Any]) -> ServeApplicationSchema:
    return ServeApplicationSchema.model_validate(
        {
            "name": "a",
            "import_path": "deployments.app:build",
            "args": {"topology": "disaggregated"},
            "deployments": list(deployments),
        }
    )


@pytest.mark.parametrize(
    "own",
    [
        [],
        [{"name": "Shallow", "autoscaling_config": {"min_replicas": 1, "max_replicas": 3}}],
        [{"name": "Shallow", "autoscaling_config": {
            "initial_replicas": 2, "max_replicas": 3,
            "policy": {"policy_function": "deployments.autoscaling:ByQueue"},
        }}],
        [{"name": "Shallow", "num_replicas": 3}],
    ],
    ids=["none", "scaling", "policy", "fixed"],
)  # fmt: skip
def test_no_replica_is_replaced_and_no_pool_goes_back(own: list[dict[str, Any]]) -> None:
    file = application(*own)
    scaling = {
        "Ingress": None,
        "Shallow": AutoscalingConfig(
            min_replicas=1, initial_replicas=None, max_replicas=2, policy=POLICY
        ),
    }
    config = file
    for revision in ("r1", "r2"):  # the second finds what the first has made
        body = with_user_config(config, scaling, {"revision": revision})
        config = ServeApplicationSchema.model_validate(body)
        # Serve replaces all replicas if this changes.
        assert get_app_code_version(config) == get_app_code_version(file)
        by_name = {
            each["name"]: each for each in config.model_dump(exclude_unset=True)["deployments"]
        }
        assert {each["user_config"]["revision"] for each in by_name.values()} == {revision}
        assert set(by_name["Ingress"]) == {"name", "user_config"}
        shallow = by_name["Shallow"]
        if own and "num_replicas" in own[0]:
            assert "autoscaling_config" not in shallow
            continue
        found = AutoscalingConfig(**shallow["autoscaling_config"])
        assert found.initial_replicas is None
        assert found.max_replicas == (own[0]["autoscaling_config"]["max_replicas"] if own else 2)
        if not own:
            assert found.policy == POLICY
