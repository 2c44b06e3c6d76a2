"""A Ray cluster that goes away under a client of its KV store.

    python lost_cluster.py

Starts a cluster with a store, and a process that connects to it as vLLM's connector does; kills the
cluster, and exits as that process did: with 0 if it still answered after ``SECONDS``.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

SECONDS = 75
"""Longer than Ray lets a process wait for its cluster, 60 s, unless told otherwise."""


def cluster() -> int:
    """Start both, end one."""
    import ray

    from fathom.kvstore.ray_store import NAMESPACE, start_store

    ray.init(num_cpus=1, include_dashboard=False, namespace=NAMESPACE, log_to_driver=False)
    start_store("lost", shards=1, budget_bytes=1 << 20)
    listed = subprocess.run(["pgrep", "-P", str(os.getpid())], capture_output=True, check=True)
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, __file__, address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as client:
        assert client.stdout is not None and client.stdout.readline() == b"connected\n"
        for process in listed.stdout.split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)
        return client.wait()


def client(address: str) -> None:
    """Ask the store until it is long gone."""
    from fathom.vllm.kv_client import client_of

    store = client_of({"ray_address": address, "store": "lost"})()
    assert store is not None
    print("connected", flush=True)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        time.sleep(1)
        assert not len(store.lookup([b"a key"]))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        client(sys.argv[1])
    else:
        os._exit(cluster())  # Ray would wait for what it has lost
