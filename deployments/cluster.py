"""Running the application on this machine: Ray, Serve's HTTP, start-up errors, a clean end."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.schema import ApplicationStatus, LoggingConfig

from deployments.shared import end
from fathom.config import ConfigError, Placement, ServeConfig, Topology
from fathom.models.classifier_config import read_config
from fathom.models.resolve import resolve_model

APP_NAME = "fathom"
CLASSIFIER_CPUS = 1
_FAILED = (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.DELETING)
_QUIET = LoggingConfig(log_level="WARNING", enable_access_log=False)


class ServerError(RuntimeError):
    """A server that did not come up; the message holds Ray Serve's reason."""


class Server:
    """A running server.

    Attributes:
        url: where it is, without a path.
    """

    def __init__(self, url: str, *, owns_ray: bool) -> None:
        self.url = url
        self._owns_ray = owns_ray

    def wait(self) -> None:
        """Serve until Ctrl-C or SIGTERM, then stop."""
        stop = threading.Event()

        def on_signal(_signal: int, _frame: FrameType | None) -> None:
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, on_signal)
        while not stop.wait(1.0):
            pass
        self.stop()

    def stop(self) -> None:
        """Let requests under way finish (for ``drain_s`` at most), then end what was started."""
        if not ray.is_initialized():
            return
        serve.delete(APP_NAME)  # lets the replicas drain, and returns when they are gone
        end(APP_NAME)
        if self._owns_ray:
            ray.shutdown()


def start(application: Application, config: ServeConfig) -> Server:
    """Bring an application up and wait until it answers.

    Raises:
        ConfigError, ModelError, ServerError: see ``deployments.app.run``.
    """
    resolve_model(config.engine.model)  # a missing model should not cost Ray's start
    if config.classifier:
        read_config(Path(config.classifier))
    check_port(config.host, config.port)
    owns_ray = not ray.is_initialized()
    if owns_ray:
        start_ray(cores_for(config))
        _exit_on_sigterm()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        start_http(config.host, config.port)
        deploy(application, config)
        host = "127.0.0.1" if config.host in ("0.0.0.0", "::", "localhost") else config.host
        url = f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"
        _wait_until_up(url)
    except BaseException as error:
        if owns_ray:
            ray.shutdown()
        else:
            with suppress(Exception):  # perhaps it was never deployed
                serve.delete(APP_NAME)
                end(APP_NAME)
        if isinstance(error, Exception) and not isinstance(error, ServerError):
            raise ServerError(f"The server did not come up: {error}") from error
        raise
    return Server(url, owns_ray=owns_ray)


def _exit_on_sigterm() -> None:
    """Let SIGTERM during the start-up unwind as Ctrl-C does, so that what was started is ended.

    To be called after Ray's start, which sets a handler of its own: that one aborts the process.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))


def check_port(host: str, port: int) -> None:
    """Check that HTTP can bind.

    Raises:
        ConfigError: if it cannot, with the system's reason.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            # As HTTP servers do, so that connections that are still closing are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot bind {host}:{port}: {error.strerror or error}; choose another host or port."
        ) from error


def cores_for(config: ServeConfig) -> int:
    """Cores that the application's actors reserve at most, an update's additional ones included."""
    cores = config.serving.most * config.serving.cpus
    if config.topology is Topology.DISAGGREGATED:
        cores += config.deep.cpus * (
            config.shallow.most if config.placement is Placement.BESIDE else config.deep.most
        )
    cores += CLASSIFIER_CPUS if config.classifier else 0
    # Old replicas that drain have their cores until they are gone, and do not count as surge.
    return math.ceil(2 * cores) + 1


def start_ray(cpus: int) -> None:
    """Connect to the cluster that ``RAY_ADDRESS`` names, or start one here.

    Ray turns token authentication on for a cluster that ``ray.init`` starts, and makes the token
    (``~/.ray/auth_token``) if there is none; we only make sure that nobody else can read it.

    Args:
        cpus: cores that a cluster started here lets actors reserve, if this machine has fewer.
    """
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**common)
        return
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    umask = os.umask(0o077)
    try:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, cpus),
            include_dashboard=False,
            **common,
        )
    finally:
        os.umask(umask)


def start_http(host: str, port: int) -> None:
    """Start Serve, with HTTP on the head node; a Serve that is up already stays as it is."""
    serve.start(
        proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=_QUIET
    )


def deploy(
    application: Application, config: ServeConfig, *, name: str = APP_NAME, prefix: str = "/"
) -> None:
    """Deploy, and wait until all replicas are up or one has failed for good.

    Args:
        name: of the application. prefix: of its paths.

    Raises:
        ServerError: if it does not come up in ``startup_timeout_s``, with the reason.
    """
    # Not serve.run in a thread: its waiting has no time limit, and a thread that waits on after
    # a failure connects to Ray anew, that is, starts another one.
    target = serve.RunTarget(application, name, prefix, logging_config=_QUIET)
    serve.run_many([target], wait_for_applications_running=False)
    deadline = time.monotonic() + config.startup_timeout_s
    while True:
        here = serve.status().applications.get(name)
        if here is not None and here.status == ApplicationStatus.RUNNING:
            return
        if here is None or here.status in _FAILED:
            raise ServerError(f"The server did not come up: {_status(name)}")
        if time.monotonic() > deadline:
            raise ServerError(
                f"The server was not up after {config.startup_timeout_s:g} s: {_status(name)}"
            )
        time.sleep(0.2)


def _status(name: str) -> str:
    """Serve's words about what is wrong, innermost reason last."""
    application = serve.status().applications.get(name)
    if application is None:
        return ""
    messages = [application.message]
    messages += [d.message for d in application.deployments.values() if d.message]
    return reason_of("\n".join(message for message in messages if message))


def reason_of(words: str) -> str:
    """What is for a user in Serve's words: our own error, without the traces around it.

    Words that hold none of ours are given back whole.
    """
    ours = re.findall(r"fathom\.[\w.]*Error: (.+)", words)
    return str(ours[-1]).strip() if ours else words


def _wait_until_up(url: str, timeout_s: float = 30.0) -> None:
    """Wait until HTTP answers, which also shows that it is bound where we asked.

    Raises:
        ServerError: if it does not: a Serve that was running already keeps its own address.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass
        if time.monotonic() > deadline:
            raise ServerError(
                f"Nothing answers at {url}/health. A Ray Serve that was running before keeps its "
                "own address: stop it (`serve shutdown`), or use its host and port."
            )
        time.sleep(0.1)
