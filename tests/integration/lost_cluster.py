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


def cluster() -> None:
    """Start both, and become the process that ends one."""
    import ray

    from fathom.kvstore.ray_store import NAMESPACE, start_store

    ray.init(num_cpus=1, include_dashboard=False, namespace=NAMESPACE, log_to_driver=False)
    start_store("lost", shards=1, budget_bytes=1 << 20)
    listed = subprocess.run(
        ["pgrep", "-P", str(os.getpid())], capture_output=True, text=True, check=True
    )
    address = ray.get_runtime_context().gcs_address
    client = subprocess.Popen(
        [sys.executable, __file__, address], stdout=subprocess.PIPE, start_new_session=True
    )
    assert client.stdout is not None and client.stdout.readline() == b"connected\n"
    # This process has lost its cluster too: Ray must not end it first.
    watch = [sys.executable, __file__, "watch", str(client.pid), *listed.stdout.split()]
    os.execv(sys.executable, watch)


def watch(client: int, cluster: list[int]) -> int:
    """Kill the cluster; the client's exit status."""
    for process in cluster:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(client, 0)[1])


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
    if len(sys.argv) > 2:
        sys.exit(watch(int(sys.argv[2]), [int(each) for each in sys.argv[3:]]))
    elif len(sys.argv) > 1:
        client(sys.argv[1])
    else:
        cluster()
