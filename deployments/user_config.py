"""``user_config`` of a running application, changed in place: no replica is started anew.

Ray Serve 2.60 replaces a replica when the *code version* of its deployment changes, and otherwise
calls its ``reconfigure`` (``ray.serve._private.version``). Where that version comes from depends on
how the application was deployed:

- ``serve deploy`` (or the REST API): a hash of import path, arguments and environment. The same
  file with another ``user_config`` is an update in place. What is applied must hold all such
  applications: Serve deletes those that are missing.
- ``serve.run``: drawn at random each time, and ``version=`` has been taken out of the public API.
  So the deployments are given to the controller as they stand, with their versions.

Both speak to Serve's controller in its own, private terms, which this file alone knows.

A deployment that follows its load is given back without ``initial_replicas``: Serve would set it to
that size at every change of its settings, however many replicas the load needs by then.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import ray
from ray.serve._private.deploy_utils import get_deploy_args
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve.config import AutoscalingConfig
from ray.serve.context import _get_global_client
from ray.serve.generated import serve_pb2
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

_messages: Any = serve_pb2


def user_config_of(application: str, deployment: str) -> Mapping[str, Any]:
    """What a deployment is to have now; its replicas may not have heard of it yet.

    Raises:
        KeyError: if it is not deployed.
    """
    found = _deployments(application)[deployment].deployment_config.user_config
    return found or {}


def set_user_config(
    application: str, deployments: Collection[str], user_config: Mapping[str, Any]
) -> None:
    """Give deployments of an application another ``user_config``, all at once.

    Serve tells their replicas within about a second, and every one that starts later before it
    takes a request. No pool changes its size by it.

    Args:
        user_config: as JSON can hold it.

    Raises:
        KeyError: if the application, or one of the deployments, is not there.
    """
    controller = _controller()
    details = ray.get(controller.get_serve_instance_details.remote())
    infos = _deployments(application)
    scaling = {name: _at_any_size(infos[name]) for name in deployments}
    if details["applications"][application]["source"] == "declarative":
        applied = _declared(controller, details, application, scaling, user_config)
        ray.get(controller.apply_config.remote(applied))
        return
    for name in deployments:
        infos[name].deployment_config.user_config = dict(user_config)
        infos[name].deployment_config.autoscaling_config = scaling[name]
    external = bool(ray.get(controller.get_external_scaler_enabled.remote(application)))
    settings = _messages.ApplicationArgs(external_scaler_enabled=external)
    ray.get(
        controller.deploy_applications.remote(
            {application: [_as_it_stands(name, info) for name, info in infos.items()]},
            {application: settings.SerializeToString()},
        )
    )


def _controller() -> Any:
    client: Any = _get_global_client()
    return client._controller


def _deployments(application: str) -> dict[str, DeploymentInfo]:
    """An application's deployments by name; each a copy."""
    found = ray.get(_controller().list_deployments_internal.remote())
    return {id.name: info for id, (info, _) in found.items() if id.app_name == application}


def _at_any_size(info: DeploymentInfo) -> AutoscalingConfig | None:
    """How a deployment follows its load, whatever its size; None if it does not."""
    own = info.deployment_config.autoscaling_config
    return own and own.model_copy(update={"initial_replicas": None})


def _as_it_stands(name: str, info: DeploymentInfo) -> bytes:
    """A deployment as the controller takes it, with the code version that it has."""
    args = get_deploy_args(
        name,
        replica_config=info.replica_config,
        ingress=info.ingress,
        deployment_config=info.deployment_config,
        version=info.version,
        route_prefix=info.route_prefix,
    )
    found = _messages.DeploymentArgs(
        deployment_name=name,
        deployment_config=args["deployment_config_proto_bytes"],
        replica_config=args["replica_config_proto_bytes"],
        deployer_job_id=info.deployer_job_id,
        ingress=info.ingress,
    )
    if info.route_prefix is not None:
        found.route_prefix = info.route_prefix
    encoded: bytes = found.SerializeToString()
    return encoded


def _declared(
    controller: Any,
    details: Mapping[str, Any],
    application: str,
    scaling: Mapping[str, AutoscalingConfig | None],
    user_config: Mapping[str, Any],
) -> ServeDeploySchema:
    """What ``serve deploy`` last applied, with another ``user_config``.

    Args:
        scaling: of the deployments that get it.
    """
    configs: Mapping[str, ServeApplicationSchema] = ray.get(controller.get_app_configs.remote())
    found = []
    for name, config in configs.items():
        if details["applications"].get(name, {}).get("source") != "declarative":
            continue  # it is ``serve.run``'s now, or gone
        if name == application:
            found.append(with_user_config(config, scaling, user_config))
        else:
            found.append(config.model_dump(exclude_unset=True))
    return ServeDeploySchema.model_validate(
        {"applications": found, "target_capacity": details.get("target_capacity")}
    )


def with_user_config(
    config: ServeApplicationSchema,
    scaling: Mapping[str, AutoscalingConfig | None],
    user_config: Mapping[str, Any],
) -> dict[str, Any]:
    """An application's file with another ``user_config``; its code version stays what it is.

    Args:
        scaling: of the deployments that get it; see ``set_user_config``.
    """
    body: dict[str, Any] = config.model_dump(exclude_unset=True)
    own = {each["name"]: each for each in body.get("deployments", [])}
    for name, at_any_size in scaling.items():
        changed = own.setdefault(name, {"name": name})
        changed["user_config"] = dict(user_config)
        if at_any_size is None or "num_replicas" in changed:
            continue
        if _has_own_scaling(config, name):
            changed["autoscaling_config"]["initial_replicas"] = None
        else:
            # Not as a mapping: the policy of one is part of the code version.
            changed["autoscaling_config"] = at_any_size
    body["deployments"] = list(own.values())
    return body


def _has_own_scaling(config: ServeApplicationSchema, deployment: str) -> bool:
    """Whether a file says how a deployment follows its load; not we, at an earlier promotion."""
    return any(
        each.name == deployment and isinstance(each.autoscaling_config, dict)
        for each in config.deployments
    )
