"""A real Chromium before a real server."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import yaml

from fathom.cli import main
from fathom.config import EngineConfig
from fathom.engine.build import build_engine
from fathom.engine.info import EngineInfo
from tests.browser.page import Page
from tests.browser.steps import log_in
from tests.ray_fixtures import TestServer, free_port, server
from tests.traces import write_trace

__all__ = ["server"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TRIALS = 12
REMEDY = "install Chromium and its driver (Debian: apt-get install chromium chromium-driver)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def artifacts() -> Path:
    """Where screenshots go."""
    folder = Path(os.environ.get("FATHOM_TEST_ARTIFACTS", "test-artifacts"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def browser(artifacts: Path) -> Iterator[Page]:
    """One browser for all tests; each begins with empty logs."""
    binary = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        missing = "Chromium" if binary is None else "chromedriver"
        message = f"no {missing} on PATH: {REMEDY}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    page = Page(binary, driver, artifacts)
    yield page
    page.close()


@pytest.fixture
def page(browser: Page) -> Page:
    """The browser, at 1280 pixels in the light scheme."""
    browser.forget()
    browser.resize(1280)
    browser.prefer("light")
    return browser


@pytest.fixture
def dashboard(page: Page, server: TestServer) -> Iterator[Page]:
    """The dashboard after a login; no test may leave errors or have asked another host."""
    log_in(page, server)
    yield page
    assert page.errors() == []
    assert page.hosts() == {urlsplit(server.url).netloc}


@pytest.fixture(scope="session")
def info(server: TestServer) -> EngineInfo:
    """What the server's replica runs."""
    # Its settings are in tests.ray_fixtures.
    engine = build_engine(
        EngineConfig(model=server.model, dtype="float32", kv_cache_bytes=8 << 20, threads=1)
    )
    found = engine.info
    engine.close()
    return found


@pytest.fixture(scope="session")
def study(server: TestServer, info: EngineInfo, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A study of what the server runs, in the tracking server that it knows; its run's id."""
    pytest.importorskip("optuna")
    folder = tmp_path_factory.mktemp("study")
    write_trace(
        folder / "sky.parquet", requests=60, tokens=30, scale=4,
        model=info.model, weights_digest=info.weights_digest, adapter=info.adapter,
        adapter_digest=info.adapter_digest, exit_layer=str(info.exit_layer),
        exit_depth=str(info.exit_depth), exit_vocab=str(info.exit_vocab),
        num_layers=str(info.num_layers), dtype=info.dtype,
    )  # fmt: skip
    body = {
        "traces": ["sky.parquet"],
        "trials": TRIALS,
        "space": {"confidence": ["softmax_gap", "max_prob"], "max_stack": {"low": 1, "high": 12}},
    }
    (folder / "sky.yaml").write_text(yaml.safe_dump(body))
    work = folder / "work"
    command = ["tune", str(folder / "sky.yaml"), "--work-dir", str(work), "--mlflow", server.mlflow]
    assert main([*command, "--parallel", "2"]) == 0
    return (work / "mlflow_run_id").read_text()


@pytest.fixture(scope="session")
def mlflow_ui(server: TestServer, study: str) -> Iterator[str]:
    """MLflow's own pages of the study; they may take a while to be up."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", server.mlflow,
         "--port", str(port), "--workers", "1"],
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true",
             "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    yield f"http://127.0.0.1:{port}"
    os.killpg(process.pid, signal.SIGTERM)
    process.wait(20)
