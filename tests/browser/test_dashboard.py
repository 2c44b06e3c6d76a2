"""The dashboard in a real browser: default model, real Serve, real study in a real MLflow."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from fathom.cli import main
from fathom.config import EngineConfig
from fathom.engine.build import build_engine
from fathom.engine.info import EngineInfo
from fathom.tuning.registry import Registry, connect
from tests.browser.page import Page
from tests.ray_fixtures import KEYS, TestServer, free_port
from tests.traces import write_trace

pytest.importorskip("optuna")

TRIALS = 20
# Values and notes of the tiles, by their labels.
_TILES = """
return Object.fromEntries([...document.querySelectorAll('#tiles > div')]
  .map((tile) => [...tile.children].map((each) => each.textContent))
  .map(([label, value, note]) => [label, [value, note]]));
"""
PROMPT = "Explain in three sentences why the sky is blue."


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


@pytest.fixture
def dashboard(page: Page, server: TestServer) -> Page:
    """The dashboard after a login; no test may leave errors or have asked another host."""
    log_in(page, server)
    yield page
    assert page.errors() == []
    assert page.hosts() == {urlsplit(server.url).netloc}


def log_in(page: Page, server: TestServer, key: str = KEYS[1]) -> None:
    page.open(f"{server.url}/dashboard")
    page.one("#key").send_keys(key)
    page.one("button.primary").click()
    page.until(lambda: page.all("#status, [role=alert]"), "the answer to the login")


def show(page: Page, view: str) -> None:
    page.one(f"nav a[href='#{view}']").click()
    page.until(lambda: page.one(f"#view-{view}").is_displayed(), f"the view {view}")


def choose(page: Page, select: str, value: str) -> None:
    page.one(f"{select} option[value='{value}']").click()


def stream(page: Page, mode: str, tokens: int = 48) -> list[int]:
    """Ask in a mode, and wait for the answer's end; returns the depths of its tokens."""
    page.one(f"#modes input[value='{mode}']").click()
    field = page.one("#max-tokens")
    field.clear()
    field.send_keys(str(tokens))
    before = len(page.all("#runs tbody tr"))
    page.one("#send").click()
    page.until(lambda: len(page.all("#runs tbody tr")) > before, f"the answer in mode {mode}", 60)
    return [int(each) for each in page.run(
        "return [...document.querySelectorAll('#answer .tok')].map((e) => e.dataset.depth)"
    )]  # fmt: skip


def test_a_key_opens_it_and_nothing_else(page: Page, server: TestServer) -> None:
    page.open(f"{server.url}/dashboard")
    assert page.url == f"{server.url}/dashboard/login"
    assert page.faint() == []
    page.screenshot("login-1280-light")
    log_in(page, server, "wrong")
    assert "none of this server's API keys" in page.one("[role=alert]").text
    assert page.cookies() == []
    page.errors()  # it says that the form was refused
    log_in(page, server)
    assert page.url == f"{server.url}/dashboard"
    (cookie,) = page.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"], cookie["path"]) == (True, "Strict", "/")
    assert not any(key in cookie["value"] for key in KEYS)
    assert 11 * 3600 < cookie["expiry"] - time.time() <= 12 * 3600
    page.until(lambda: page.one("#status").text == "1 replica up", "the server's state")
    page.one("#logout button").click()
    page.until(lambda: page.url == f"{server.url}/dashboard/login", "the login again")
    assert page.cookies() == []
    assert page.errors() == []
    assert page.hosts() == {urlsplit(server.url).netloc}


def test_an_answer_streams_with_every_token_coloured_by_its_depth(
    dashboard: Page, server: TestServer, info: EngineInfo
) -> None:
    show(dashboard, "playground")
    dashboard.until(lambda: dashboard.texts("#model") != [""], "the model's name")
    free = stream(dashboard, "free")
    assert set(free) == {info.exit_depth, info.num_layers}
    assert "sky" in dashboard.texts("#answer")[0]
    assert "".join(dashboard.texts("#spoken span")).split() == dashboard.texts("#answer")[0].split()
    colours = {
        depth: {
            each.value_of_css_property("background-color")
            for each in dashboard.all(f"#answer .tok[data-depth='{depth}']")
        }
        for depth in set(free)
    }
    # One colour a depth, another for each; and told apart without colours too.
    assert all(len(each) == 1 for each in colours.values())
    assert len(set.union(*colours.values())) == len(colours)
    early = dashboard.one(f"#answer .tok[data-depth='{info.exit_depth}']")
    assert early.value_of_css_property("border-bottom-style") == "dotted"
    assert early.get_attribute("title") == (
        f"{info.exit_depth} of {info.num_layers} layers, left early"
    )
    assert dashboard.faint() == []
    dashboard.one("#numbers").click()
    shown = dashboard.run("return getComputedStyle(arguments[0], '::after').content", early)
    assert shown == f'"{info.exit_depth}"'
    dashboard.one("#numbers").click()
    dashboard.screenshot("playground-1280-light")

    # What the API itself says of the same request: greedy, so token for token.
    with server.http() as http:
        body = {
            "model": server.model, "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": 48, "temperature": 0, "depths": True, "compute": {"mode": "free"},
        }  # fmt: skip
        answer = http.post("/v1/chat/completions", json=body).json()
    assert free == answer["choices"][0]["depths"]
    assert dashboard.texts("#answer")[0] == answer["choices"][0]["message"]["content"]

    full = stream(dashboard, "full")
    assert set(full) == {info.num_layers}
    exact = stream(dashboard, "exact")
    assert len(exact) == len(full)
    rows = dashboard.texts("#runs tbody tr td:nth-child(2)")
    assert rows == ["exact", "full", "free"]
    dashboard.resize(390)
    assert dashboard.overflow() == 0
    dashboard.prefer("dark")
    assert dashboard.faint() == []
    dashboard.screenshot("playground-390-dark")


def test_an_answer_can_be_stopped_and_errors_are_shown(dashboard: Page, server: TestServer) -> None:
    show(dashboard, "playground")
    dashboard.until(lambda: dashboard.texts("#model") != [""], "the model's name")
    prompt = dashboard.one("#prompt")
    prompt.clear()
    prompt.send_keys("Count from one to five hundred, in words.")
    field = dashboard.one("#max-tokens")
    field.clear()
    field.send_keys("1000")
    dashboard.one("#send").click()
    dashboard.until(lambda: len(dashboard.all("#answer .tok")) > 3, "some tokens")
    dashboard.one("#stop").click()
    dashboard.until(lambda: dashboard.all("#runs tbody tr"), "the end")
    assert "stopped" in dashboard.texts("#runs tbody tr")[0]
    server.wait_until_idle()  # the server has stopped too

    choose(dashboard, "#knob", "budget")
    value = dashboard.one("#knob-value")
    value.clear()
    value.send_keys("0.01")
    dashboard.one("#send").click()
    failure = dashboard.until(lambda: dashboard.one("#failure").text, "the API's words")
    assert re.search(r"compute\.budget must be at least 0\.\d+, got 0\.01", failure)
    (refused,) = dashboard.errors()  # the browser notes the answer's status
    assert "400" in refused


def test_live_figures_are_those_of_the_metrics(
    dashboard: Page, server: TestServer, info: EngineInfo
) -> None:
    with server.http() as http:
        for mode in ("free", "exact"):
            body = {
                "model": server.model, "prompt": "The sea is", "max_tokens": 60,
                "compute": {"mode": mode, "policy": "adaptive"}, "ignore_eos": True,
            }  # fmt: skip
            http.post("/v1/completions", json=body).raise_for_status()
    total = int(server.metrics()["fathom_generation_tokens_total"])
    served = f"{total:,} in all"
    dashboard.until(lambda: dashboard.run(_TILES).get("Throughput", ["", ""])[1] == served, served)
    found = dashboard.until(
        lambda: (t := dashboard.run(_TILES)) and t["TTFT, median"][0] != "–" and t, "latencies"
    )
    assert found["Replicas"][0] == "1 up"
    assert re.fullmatch(r"[\d.]+ m?s", found["TTFT, median"][0])
    assert re.fullmatch(r"[\d.]+ %", found["Exit rate"][0])
    assert re.fullmatch(r"[\d.]+ %", found["Drafts accepted"][0])
    assert float(found["Layers per token"][0].split()[0]) > info.exit_layer
    # Charts hold lines, λ's density too; and each has a table that says the same.
    dashboard.until(
        lambda: len(dashboard.all(".js-plotly-plot .scatterlayer .trace")) >= 10, "the charts"
    )
    assert dashboard.all(".js-plotly-plot .barlayer .trace")
    dashboard.one("#charts figure summary").click()
    rows = dashboard.until(lambda: dashboard.texts("#charts figure tbody tr"), "the table")
    assert re.match(r"\d\d:\d\d:\d\d", rows[0])
    dashboard.one("#charts figure summary").click()
    assert dashboard.faint() == []
    for width in (1280, 390):
        dashboard.resize(width)
        for scheme in ("light", "dark"):
            dashboard.prefer(scheme)
            assert dashboard.faint() == []
            assert dashboard.overflow() == 0
            dashboard.screenshot(f"live-{width}-{scheme}")


def test_rates_and_quantiles_are_prometheus_own(dashboard: Page) -> None:
    before = """
c_total{ingress="a"} 5
c_total{ingress="b"} 100
h_bucket{le="0.1"} 1
h_bucket{le="1"} 2
h_bucket{le="+Inf"} 2
"""
    # b was started anew, c was not there before, and a label may hold anything.
    after = """
c_total{ingress="a"} 9
c_total{ingress="b"} 3
c_total{ingress="c, \\"x\\""} 50
h_bucket{le="0.1"} 5
h_bucket{le="1"} 11
h_bucket{le="+Inf"} 12
"""
    found = dashboard.run_async(
        """
        const { parse, increase, quantile, samples } =
          await import('./dashboard/assets/metrics.js');
        const [one, two] = args.map(parse);
        return {
          grown: increase(one, two, 'c_total'),
          labels: samples(two, 'c_total').map((each) => each.labels.ingress),
          median: quantile(one, two, 'h', 0.5), high: quantile(one, two, 'h', 0.99),
          none: quantile(two, two, 'h', 0.5),
        };
        """,
        before,
        after,
    )
    assert found["grown"] == 4 + 3
    assert found["labels"] == ["a", "b", 'c, "x"']
    # 4 of 10 are below 0.1, 9 below 1: the fifth lies a fifth of the way.
    assert found["median"] == pytest.approx(0.1 + 0.9 * (5 - 4) / (9 - 4))
    assert found["high"] == 1
    assert found["none"] is None


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


@pytest.mark.parametrize("view", ["live", "playground", "studies"])
def test_every_control_can_be_reached_by_the_keyboard(
    dashboard: Page, server: TestServer, study: str, view: str
) -> None:
    dashboard.open(f"{server.url}/dashboard#{view}")
    ready = {"live": "#replicas tbody", "playground": "#runs p", "studies": "#front-table tbody"}
    dashboard.until(lambda: dashboard.all(ready[view]), "the view")
    dashboard.until(lambda: dashboard.texts("#model") != [""], "the model's name")
    # What is drawn anew every other second keeps its place, not its elements: told by what it says.
    tell = (
        "const e = arguments[0]; return [e.tagName, e.id, e.getAttribute('aria-label') ?? "
        "e.textContent.trim().slice(0, 40), e.closest('figure')?.querySelector('figcaption')"
        "?.firstChild.textContent ?? ''].join(' | ')"
    )
    wanted = {dashboard.run(tell, each) for each in dashboard.controls()}
    assert len(wanted) > 10
    dashboard.run("document.activeElement.blur(); scrollTo(0, 0)")
    reached = set()
    for _ in range(3 * len(wanted)):
        focused = dashboard.tab()
        name = dashboard.run(tell, focused)
        if name in reached:
            break
        reached.add(name)
        ring = focused.value_of_css_property("outline-style")
        marked = dashboard.run(
            "return arguments[0].type === 'radio' && "
            "getComputedStyle(arguments[0].nextSibling).outlineStyle",
            focused,
        )
        assert "solid" in (ring, marked), f"nothing shows that {name} has the focus"
    assert wanted <= reached


def test_studies_are_shown_without_a_server_and_by_a_proxy(
    page: Page, server: TestServer, info: EngineInfo, study: str
) -> None:
    key = {"FATHOM_API_KEY": KEYS[0]}
    gone = f"http://127.0.0.1:{free_port()}"
    with proxy(["--server", gone, "--mlflow", server.mlflow], key) as link:
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
    with proxy(["--server", server.url], key) as link:
        page.open(link.partition("/login")[0])
        assert page.url.endswith("/login")  # the link alone holds a session
        page.open(link)
        show(page, "studies")
        page.until(lambda: page.all("#front-table button"), "the front, read by the server")
        show(page, "playground")
        page.until(lambda: page.texts("#model") != [""], "the model's name")
        assert info.exit_depth in stream(page, "free")
        assert page.errors() == []
        assert page.hosts() == {urlsplit(link).netloc}


@contextlib.contextmanager
def proxy(options: list[str], environment: dict[str, str]) -> Iterator[str]:
    """``fathom dashboard``; yields the address that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-m", "fathom.cli", "dashboard", "--port", "0", *options],
        env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert process.stderr is not None
        said = process.stderr.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/dashboard\S+", said)
        assert found, said
        wait_for(found[0].partition("/dashboard")[0] + "/dashboard/login")
        yield found[0]
    finally:
        process.terminate()
        process.wait(20)


def test_mlflow_shows_the_runs_of_the_study(
    page: Page, server: TestServer, study: str, mlflow_ui: str
) -> None:
    wait_for(f"{mlflow_ui}/health")
    experiment = connect(server.mlflow).get_run(study).info.experiment_id
    page.open(f"{mlflow_ui}/#/experiments/{experiment}/runs")
    last = f"trial-{TRIALS - 1:05d}"
    page.until(lambda: last in page.run("return document.body.innerText"), "the runs", 60)
    page.screenshot("mlflow-runs")


def wait_for(url: str, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url):
            return
        assert time.monotonic() < deadline, url
        time.sleep(0.2)


def test_the_page_is_made_of_installed_files_alone(server: TestServer) -> None:
    folder = Path(__file__).parents[2] / "platform" / "fathom" / "dashboard" / "static"
    for file in folder.iterdir():
        outside = re.findall(r"https?://[^\s\"'`)]+", file.read_text())
        assert [each for each in outside if "www.w3.org" not in each] == [], file
