"""Servers as processes of their own, each with its own Ray: what ``fathom serve`` gives a user."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import yaml

from fathom.config import EngineConfig, PoolConfig, ServeConfig, Topology

_STOP_S = 60.0


def free_port() -> int:
    """A port on loopback that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def both_topologies(engine: EngineConfig) -> Iterator[dict[str, str]]:
    """A fused server of two replicas, and a disaggregated one of one and one, all of one core.

    Yields:
        their URLs by the topology's name.

    Raises:
        RuntimeError: if one does not come up, with its last words.
    """
    engine = dataclasses.replace(engine, threads=0)  # it follows from the cores
    one = PoolConfig(num_replicas=1, cpus=1)
    configs = [
        ServeConfig(
            engine=engine, topology=Topology.FUSED, num_replicas=2, cpus_per_replica=1, drain_s=1
        ),
        ServeConfig(engine=engine, topology=Topology.DISAGGREGATED, shallow=one, drain_s=1),
    ]
    with contextlib.ExitStack() as ending:
        found = {}
        for config in configs:
            own = dataclasses.replace(config, port=free_port())
            found[config.topology.value] = ending.enter_context(serving(own))
        yield found


@contextlib.contextmanager
def serving(config: ServeConfig) -> Iterator[str]:
    """A server on this machine until the end of the block; yields its URL.

    Raises:
        RuntimeError: if it does not come up, with its last words.
    """
    # A cluster that the caller's environment names would take both; keys are for others' servers.
    hidden = ("RAY_ADDRESS", "FATHOM_API_KEY", "FATHOM_OPERATOR_KEY")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    with tempfile.TemporaryDirectory(prefix="fathom-bench-") as folder:
        settings, words = Path(folder, "config.yaml"), Path(folder, "words")
        settings.write_text(yaml.safe_dump(_plain(dataclasses.asdict(config))))
        with words.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "fathom.cli", "serve", "--config", str(settings)],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for us to pass on
            )
        try:
            url = f"http://{config.host}:{config.port}"
            _wait_until_ready(process, url, words, config.startup_timeout_s)
            yield url
        finally:
            _end(process)


def _wait_until_ready(
    process: subprocess.Popen[bytes], url: str, words: Path, seconds: float
) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with (
            contextlib.suppress(urllib.error.URLError, OSError),
            urllib.request.urlopen(f"{url}/ready", timeout=10) as answer,
        ):
            if answer.status == 200:
                return
        time.sleep(0.5)
    said = words.read_text(errors="replace").strip().splitlines()[-5:]
    raise RuntimeError(f"the server at {url} did not come up: {' / '.join(said)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _plain(value: Any) -> Any:
    """A value as YAML's safe form takes it."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return value.value if isinstance(value, StrEnum) else value
