"""Settings of a study, served: a real application for each, beside what else the cluster serves.

A trial's application has a name and a path of its own, so that several can be up, and a server that
is there already is left alone. It is asked through Serve's HTTP on the head node, where the process
that runs the trial is placed; its replicas are wherever the cluster has room.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import ray
from ray import serve

from deployments.app import INGRESS_CPUS, build
from deployments.cluster import deploy, start_http, start_ray
from deployments.shared import end
from fathom.api.auth import KEY_VARIABLE
from fathom.compute import ComputePolicy
from fathom.config import ConfigError, DeepConfig, EngineConfig, PoolConfig, ServeConfig, Topology
from fathom.drills.client import StreamClient
from fathom.tuning.live_figures import FULL, LiveFigures
from fathom.tuning.live_parts import LivePart
from fathom.tuning.objective import compute_of, with_first_threshold
from fathom.tuning.ratios import replicas_of
from fathom.tuning.rows import SAME, Source
from fathom.tuning.runner import LiveRun, check_source, engine_config, filled
from fathom.tuning.served import run_served
from fathom.tuning.study import Study
from fathom.tuning.study_live import ONLY

HEAD = "node:__internal_head__"
"""A resource of Ray's head node, where HTTP is."""

_MODEL = "trial"
_READY_S = 120.0
_FREED_S = 5.0
"""Ray tells a little later of cores that became free."""


@dataclass(frozen=True, slots=True, eq=False)
class Applications:
    """Runs settings on applications; see ``fathom.tuning.runner.Runner``.

    Attributes:
        url: of Serve's HTTP, as the head node has it. name: what their names begin with.
        at_once: as many as the cluster had room for.
    """

    study: Study
    url: str
    name: str
    at_once: int

    def resources(self, setting: Mapping[str, Any]) -> dict[str, float]:
        """The process that asks reserves no core: the replicas reserve theirs."""
        return {"CPU": 0, HEAD: 0.001}

    def run(
        self,
        setting: Mapping[str, Any],
        parts: Sequence[LivePart],
        *,
        compute: ComputePolicy | None = None,
        beside_full: bool = True,
    ) -> list[LiveRun]:
        """See ``Runner.run``.

        Raises:
            ServerError: for an application that does not come up, with the reason.
        """
        found = []
        for part in (part for part in parts if part.rows.exit == setting.get("exit", ONLY)):
            source = part.rows.source
            own = compute or with_first_threshold(compute_of(setting, source.exit_cost), part.first)
            engine = engine_config(self.study, setting, source)
            config = serve_config(self.study, setting, engine)
            with _running(config, f"{self.name}{secrets.token_hex(4)}", self.url) as prefix:
                for identity in _identities(self.url + prefix):
                    check_source(identity, source, engine.adapter)
                figures = run_served(
                    StreamClient(self.url, key=_key(), tries=1),
                    part.prompts,
                    own,
                    model=_MODEL,
                    prefix=prefix,
                    exit_cost=source.exit_cost,
                    new_tokens=self.study.live.new_tokens,
                    at_once=engine.max_num_seqs,
                    beside_full=beside_full,
                )
            found.append(LiveRun(part, source.costs, figures))
        return found

    def run_vllm(self, parts: Sequence[LivePart]) -> list[LiveFigures]:
        """See ``RunsBaseline.run_vllm``; all parts are asked of one application.

        Raises:
            ServerError: if vLLM does not start, with the reason.
        """
        source = parts[0].rows.source
        config = vllm_config(self.study, source)
        python = config.vllm.python
        if python and not os.access(python, os.X_OK):  # Ray would try it until its time is over
            raise ConfigError(f"live.vllm.python {python} is no program on the head node.")
        with _running(config, f"{self.name}{secrets.token_hex(4)}", self.url) as prefix:
            for own in _identities(self.url + prefix):
                if own["weights_digest"] != source.weights_digest:
                    raise ConfigError(
                        f"vLLM has loaded other weights than the traces', weights_digest "
                        f"{own['weights_digest']!r}, not {source.weights_digest!r}."
                    )
            return [
                run_served(
                    StreamClient(self.url, key=_key(), tries=1),
                    part.prompts,
                    FULL,
                    model=_MODEL,
                    prefix=prefix,
                    exit_cost=source.exit_cost,
                    new_tokens=self.study.live.new_tokens,
                    at_once=config.engine.max_num_seqs,
                    beside_full=False,
                )
                for part in parts
            ]


def vllm_config(study: Study, source: Source) -> ServeConfig:
    """The application that finalists are compared with: one vLLM replica of all their cores."""
    values = filled(study, {})
    return ServeConfig(
        engine=EngineConfig(
            model=source.model,
            dtype=source.dtype,
            adapter="none",
            **{name: values[name] for name in ("max_num_seqs", "max_num_batched_tokens")},
        ),
        model_name=_MODEL,
        topology=Topology.VLLM,
        cpus_per_replica=study.live.cpus,
        vllm=study.live.vllm,
        drain_s=1,
        surge_percent=0,
    )


def serve_config(study: Study, setting: Mapping[str, Any], engine: EngineConfig) -> ServeConfig:
    """The application of a setting."""
    own = replicas_of(filled(study, setting)["replica_ratio"], study.live.cpus)
    pool = PoolConfig(num_replicas=own.shallow, cpus=own.cpus)
    return ServeConfig(
        engine=replace(engine, threads=0),  # they follow from a replica's cores
        model_name=_MODEL,
        topology=Topology.DISAGGREGATED if own.deep else Topology.FUSED,
        num_replicas=pool.num_replicas,
        cpus_per_replica=pool.cpus,
        shallow=pool,
        deep=DeepConfig(num_replicas=max(1, own.deep), cpus=own.cpus),
        drain_s=1,
        surge_percent=0,
    )


@contextlib.contextmanager
def applications(study: Study, work_dir: Path) -> Iterator[Applications]:
    """What runs a study's settings on Ray, which is started here if this process has none.

    An application that a killed search has left behind is deleted, and Serve is left as it was.

    Args:
        work_dir: of the study; tells its applications from those of another of the same name.

    Raises:
        ConfigError: for more cores than the cluster has free.
    """
    need = study.live.cpus + INGRESS_CPUS
    owns_ray = not ray.is_initialized()
    if owns_ray:
        start_ray(int(need) + 1)
    own = f"{work_dir.resolve()}\n{study.name}"
    name = f"fathom-tune-{hashlib.sha256(own.encode()).hexdigest()[:12]}-"
    owns_serve = not _serve_is_up()
    try:
        url = _start_http() if owns_serve else _http()
        _sweep(name)
        yield Applications(study, url, name, _room(need))
    finally:
        if ray.is_initialized():
            with contextlib.suppress(Exception):  # the cluster may be going as well
                _sweep(name)
                if owns_serve and not owns_ray:
                    serve.shutdown()  # type: ignore[no-untyped-call]
            if owns_ray:
                ray.shutdown()


def _room(need: float) -> int:
    """Applications for which there are cores.

    Raises:
        ConfigError: if there are too few for one.
    """
    deadline = time.monotonic() + _FREED_S
    while True:
        free = ray.available_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]
        if free >= need or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    if free < need:
        raise ConfigError(
            f"live.cpus {need - INGRESS_CPUS:g} and {INGRESS_CPUS:g} for HTTP are more than the "
            f"{free:g} cores that are free in the cluster: lower it, or end what else runs there."
        )
    return int(free // need)


def _serve_is_up() -> bool:
    actors = ray.util.list_named_actors(all_namespaces=True)
    return {"name": "SERVE_CONTROLLER_ACTOR", "namespace": "serve"} in actors


def _start_http() -> str:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    start_http("127.0.0.1", port)
    return f"http://127.0.0.1:{port}"


def _http() -> str:
    """Where a Serve that is up already listens, as its head node has it."""
    controller: Any = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    options: Any = ray.get(controller.get_http_config.remote())
    host = "127.0.0.1" if options.host in ("0.0.0.0", "::", "localhost") else options.host
    return f"http://[{host}]:{options.port}" if ":" in host else f"http://{host}:{options.port}"


def _sweep(name: str) -> None:
    """Delete the applications whose names begin so."""
    for each in list(serve.status().applications):
        if each.startswith(name):
            _delete(each)


def _delete(name: str) -> None:
    serve.delete(name)
    end(name)


@contextlib.contextmanager
def _running(config: ServeConfig, name: str, url: str) -> Iterator[str]:
    """An application until the end of the block; yields its path."""
    prefix = f"/{name}"
    try:
        deploy(build(config), config, name=name, prefix=prefix)
        answer = httpx.get(
            f"{url}{prefix}/ready", headers=_headers(), timeout=_READY_S, trust_env=False
        )
        answer.raise_for_status()
        yield prefix
    finally:
        _delete(name)


def _identities(url: str) -> Iterator[dict[str, Any]]:
    """The fields of ``rows.SAME`` of each engine that answers."""
    answer = httpx.get(f"{url}/v1/exits", headers=_headers(), timeout=_READY_S, trust_env=False)
    for replica in answer.raise_for_status().json()["replicas"]:
        # As ``EngineInfo.exit_identity`` puts them together, which is in the order of ``SAME``.
        values = replica["group"].split(" ")
        own: dict[str, Any] = dict(zip((name for name, _ in SAME), values, strict=True))
        own |= {name: int(own[name]) for name in ("exit_layer", "exit_vocab")}
        yield own


def _key() -> str:
    """A key that the application takes: it is built where this is asked."""
    return os.environ.get(KEY_VARIABLE, "").split(",")[0].strip()


def _headers() -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if (key := _key()) else {}
