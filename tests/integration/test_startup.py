"""What goes wrong before a server is up ends in one clear error, not in a hang."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.schema import ServeDeploySchema

from deployments.app import build, run
from deployments.cluster import check_port
from fathom.config import ConfigError, EngineConfig, ServeConfig
from fathom.models.errors import ModelError
from tests.ray_fixtures import free_port

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.parallel


def test_a_public_host_without_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FATHOM_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="FATHOM_API_KEY"):
        run(ServeConfig(host="0.0.0.0"), blocking=False)
    with pytest.raises(ConfigError, match="FATHOM_API_KEY"):
        build({"host": "0.0.0.0"})


def test_a_setting_that_does_not_exist() -> None:
    with pytest.raises(ConfigError, match=r"engine\.depth: unknown setting"):
        build({"engine": {"depth": 3}})
    with pytest.raises(ConfigError, match=r"compute\.mode"):
        build({"engine": {"compute": {"mode": "magic"}}})


def test_a_model_that_does_not_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = ServeConfig(engine=EngineConfig(model=str(tmp_path / "none")), port=free_port())
    with pytest.raises(ModelError, match="none"):
        run(config, blocking=False)


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot bind 127.0.0.1:{port}"):
            run(ServeConfig(port=port), blocking=False)
    check_port("127.0.0.1", port)


def test_the_config_file_is_valid() -> None:
    path = ROOT / "deployments" / "fused.yaml"
    schema = ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    (application,) = schema.applications
    assert application.import_path == "deployments.app:build"
    built = call_user_app_builder_with_args_if_necessary(build, application.args)
    assert built._bound_deployment.name == "Ingress"
    assert schema.http_options.host == application.args["host"]
    assert schema.http_options.port == application.args["port"]


def start_python(script: str) -> subprocess.Popen[str]:
    """A process of its own, for Ray starts and ends in it."""
    paths = [str(ROOT), str(ROOT / "platform"), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "FATHOM_API_KEY": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_an_engine_that_cannot_be_built() -> None:
    process = start_python(f"""
import ray
from deployments.app import run
from deployments.cluster import ServerError
from fathom.config import EngineConfig, ServeConfig
try:
    run(ServeConfig(engine=EngineConfig(exit_layer=99), port={free_port()}), blocking=False)
except ServerError as error:
    print("REFUSED:", error)
print("RAY:", ray.is_initialized())
""")
    try:
        output, _ = process.communicate(timeout=240)
    finally:
        process.kill()  # its Ray ends with it
    assert "REFUSED:" in output, output
    assert "exit_layer" in output
    assert "RAY: False" in output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_blocking_server(number: signal.Signals) -> None:
    port = free_port()
    process = start_python(f"""
from deployments.app import run
from fathom.config import EngineConfig, ServeConfig
server = run(ServeConfig(engine=EngineConfig(kv_cache_bytes=64 << 20), port={port}), blocking=False)
print("UP", flush=True)
server.wait()
print("ENDED")
""")
    try:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        assert any(line == "UP\n" for line in lines), process.wait()
        time.sleep(0.5)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "ENDED" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_sigterm_ends_a_server_that_is_not_up_yet() -> None:
    """As an orchestrator does that changes its mind: Ray ends too, and nothing aborts."""
    port = free_port()
    process = start_python(f"""
import atexit, ray
from deployments.app import run
from fathom.config import EngineConfig, ServeConfig
atexit.register(lambda: print("RAY:", ray.is_initialized()))
run(ServeConfig(engine=EngineConfig(kv_cache_bytes=64 << 20), port={port}))
""")
    try:
        deadline = time.monotonic() + 120
        while True:
            assert process.poll() is None, process.stdout and process.stdout.read()
            assert time.monotonic() < deadline
            with socket.socket() as probe:  # HTTP is up long before the replicas are
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "RAY: False" in output
    assert "Traceback" not in output
