"""Studies on the dashboard: a real one, in a real MLflow, promoted on a real Serve."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest

from fathom.engine.info import EngineInfo
from fathom.tuning.registry import Registry, connect
from tests.browser.conftest import TRIALS
from tests.browser.page import Page
from tests.browser.steps import show, stream, wait_for
from tests.ray_fixtures import KEYS, TestServer, free_port


@pytest.mark.usefixtures("mlflow_ui")  # it starts meanwhile
def test_a_point_of_a_study_is_promoted_and_taken_back(
    dashboard: Page, server: TestServer, study: str
) -> None:
    def serving() -> dict[str, Any]:
        with server.http() as http:
            found: dict[str, Any] = http.get("/v1/operating_points").json()
            return found

    assert serving()["default"] is None
    show(dashboard, "studies")
    buttons = dashboard.until(lambda: dashboard.all("#front-table button"), "the front")
    assert dashboard.texts("#study-list tbody td")[0] == "sky"
    assert dashboard.one("#front-chart .scatterlayer .trace")
    point = buttons[-1].get_attribute("data-point")
    buttons[-1].click()
    assert point in dashboard.one("#confirm-title").text
    dashboard.screenshot("promote-1280-light")
    dashboard.one("#confirm button[value=no]").click()
    assert serving()["default"] is None
    dashboard.all("#front-table button")[-1].click()
    dashboard.one("#confirm-yes").click()
    dashboard.until(
        lambda: "served" in dashboard.texts("#front-table tbody tr")[-1], "the promotion"
    )
    now = serving()
    assert now["default"] == point
    assert point in dashboard.one("#serving").text
    registry = Registry(server.mlflow)
    (name,) = {now["source"].removeprefix("models:/").rpartition("/")[0]}
    assert registry.resolve(f"models:/{name}@production").uri == now["source"]
    with server.http() as http:  # requests that say nothing get it
        body = {"model": server.model, "prompt": "The sea", "max_tokens": 4}
        usage = http.post("/v1/completions", json=body).json()["usage"]
    assert usage["compute"]["operating_point"] == point
    for width in (1280, 390):
        dashboard.resize(width)
        for scheme in ("light", "dark"):
            dashboard.prefer(scheme)
            assert dashboard.overflow() == 0
            assert dashboard.faint() == []
            dashboard.screenshot(f"studies-{width}-{scheme}")
    dashboard.resize(1280)
    show(dashboard, "playground")  # the point can be named there now
    assert point in dashboard.texts("#point option")
    show(dashboard, "studies")
    dashboard.until(lambda: dashboard.one("#rollback").is_displayed(), "the button")
    dashboard.one("#rollback").click()
    dashboard.one("#confirm-yes").click()
    dashboard.until(
        lambda: len(dashboard.all("#front-table button")) == len(buttons), "the rollback"
    )
    assert serving()["default"] is None
    assert "production" not in registry.aliases(name)


def test_studies_are_shown_without_a_server_and_by_a_proxy(
    page: Page, server: TestServer, info: EngineInfo, study: str
) -> None:
    key = {"FATHOM_API_KEY": KEYS[0]}
    gone = f"http://127.0.0.1:{free_port()}"
    with (
        proxy(["--server", gone, "--mlflow", server.mlflow], key) as alone,
        proxy(["--server", server.url], key) as before,
    ):
        link = address(alone)
        page.open(link)
        assert page.url.endswith("/dashboard")
        page.until(lambda: "does not answer" in page.one("#banner").text, "the banner")
        assert "Trying again" in page.one("#banner").text
        show(page, "studies")
        page.until(lambda: page.all("#front-table button"), "the front")
        assert not any(each.is_enabled() for each in page.all("#front-table button"))
        page.screenshot("no-server-1280-light")
        assert page.hosts() == {urlsplit(link).netloc}
        page.forget()  # a browser notes every answer of 502
        link = address(before)
        page.open(link.partition("/login")[0])
        assert page.url.endswith("/login")  # the link alone begins a session
        page.open(link)
        show(page, "studies")
        page.until(lambda: page.all("#front-table button"), "the front, read by the server")
        show(page, "playground")
        page.until(lambda: page.texts("#model") != [""], "the model's name")
        assert info.exit_depth in stream(page, "free")
        assert page.errors() == []
        assert page.hosts() == {urlsplit(link).netloc}


@contextlib.contextmanager
def proxy(options: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """``fathom dashboard``, on its way up."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fathom.cli", "dashboard", "--port", "0", *options],
        env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        process.wait(20)


def address(process: subprocess.Popen[str]) -> str:
    """The address that ``fathom dashboard`` has printed, once it answers there."""
    assert process.stderr is not None
    said = process.stderr.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+/dashboard\S+", said)
    assert found, said
    wait_for(found[0].partition("/dashboard")[0] + "/dashboard/login")
    return found[0]


def test_mlflow_shows_the_runs_of_the_study(
    page: Page, server: TestServer, study: str, mlflow_ui: str
) -> None:
    wait_for(f"{mlflow_ui}/health")
    experiment = connect(server.mlflow).get_run(study).info.experiment_id
    page.resize(1600)
    page.open(f"{mlflow_ui}/#/experiments/{experiment}/runs")

    def text() -> str:
        return str(page.run("return document.body.innerText"))

    page.until(lambda: re.search(rf"\b{TRIALS + 1}\s+matching runs", text()), "the runs", 60)
    # The trials are folded into their study.
    unfold = ".ag-cell [aria-label*=xpand], .ag-cell [class*=expander], .ag-cell button svg"
    page.until(lambda: page.all(unfold), "what unfolds them")[0].click()
    page.until(lambda: f"trial-{TRIALS - 1:05d}" in text(), "the trials")
    page.screenshot("mlflow-runs")
