"""Three simulated nodes, one for each role, and a fourth that takes over.

A program of its own, for a process has one Ray; it writes down what requests gave::

    python -m tests.integration.three_nodes MODEL_DIR RESULT.json
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.handle import DeploymentHandle

from deployments.app import build
from fathom.config import DataPlaneConfig, DeepConfig, PoolConfig, ServeConfig, Topology
from fathom.types import Request
from tests.integration.apart import engine_settings, requests_of, tokens_of

ROLE = 2  # cores: a node has room for one replica


def node_of(deployment: str) -> str:
    """Ray's id of the node of a deployment's only replica."""
    details = serve.context._get_global_client().get_serve_details()
    (replica,) = details["applications"]["apart"]["deployments"][deployment]["replicas"]
    return str(replica["node_id"])


def generate(handle: DeploymentHandle, request: Request) -> list[tuple[int, int]]:
    """(token, depth) of a request."""
    return tokens_of(output for outputs in handle.generate.remote(request) for output in outputs)


def main() -> None:
    """Run."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    nodes = [cluster.add_node(num_cpus=ROLE) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    config = ServeConfig(
        engine=engine_settings(Path(sys.argv[1])),
        topology=Topology.DISAGGREGATED,
        shallow=PoolConfig(cpus=ROLE),
        deep=DeepConfig(cpus=ROLE),
        data_plane=DataPlaneConfig(tls=True),
    )
    serve.start(proxy_location="Disabled")
    serve.run(build(config), name="apart", route_prefix=None)
    handle = serve.get_deployment_handle("Shallow", "apart").options(stream=True)
    with ThreadPoolExecutor(8) as pool:
        first = list(pool.map(lambda item: generate(handle, item), requests_of(seed=1)))

        # The node of the deep replica goes away while requests run; another one is there.
        deep = node_of("Deep")
        placed = {node_of("Shallow"), deep}
        cluster.add_node(num_cpus=ROLE)
        requests = requests_of(seed=5, count=4, max_tokens=400)
        running = [pool.submit(generate, handle, item) for item in requests]
        time.sleep(0.5)
        (gone,) = [node for node in nodes if node.node_id == deep]
        unfinished = sum(not each.done() for each in running)
        cluster.remove_node(gone, allow_graceful=False)
        second = [each.result(timeout=100) for each in running]
    found = {
        "nodes": len(placed),
        "unfinished": unfinished,
        "moved": node_of("Deep") not in placed,
        "first": first,
        "second": second,
    }
    Path(sys.argv[2]).write_text(json.dumps(found))
    serve.shutdown()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
