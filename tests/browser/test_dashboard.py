"""The dashboard in a real browser, before a real Serve with the default model."""

from __future__ import annotations

import re
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from fathom.engine.info import EngineInfo
from fathom.observability.shadow import ShadowMetrics
from tests.browser.page import Page
from tests.browser.steps import choose, log_in, show, stream
from tests.ray_fixtures import KEYS, TestServer

# Values and notes of the tiles, by their labels.
_TILES = """
return Object.fromEntries([...document.querySelectorAll('#tiles > div')]
  .map((tile) => [...tile.children].map((each) => each.textContent))
  .map(([label, value, note]) => [label, [value, note]]));
"""
PROMPT = "Explain in three sentences why the sky is blue."


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


def test_the_shadow_is_shown_where_there_is_one(dashboard: Page) -> None:
    dashboard.until(lambda: dashboard.all("#tiles > div"), "the live figures")
    assert not dashboard.one("#shadow-card").is_displayed()
    figures = {"wrong": 0, "asked": 0, "decided": 900, "exited": 500, "layer_tokens": 9000}
    point = {
        "alert": True, "agreement": 0.9321, "exit_rate": 0.55, "layers_per_token": 10.0,
        "psi": None, "alarms": 1, "completions": 30, "check_layer_tokens": 0, **figures,
        "expected": {"least_agreement": 0.95}, "evidence": {},
    }  # fmt: skip
    registry = CollectorRegistry()
    registry.register(ShadowMetrics("a", {"points": {"fast": point}}))
    cells = dashboard.run_async(
        """
        const { parse } = await import('./dashboard/assets/metrics.js');
        const { showShadow } = await import('./dashboard/assets/shadow.js');
        showShadow(parse(args[0]));
        return [...document.querySelectorAll('#shadow td')].map((each) => each.textContent);
        """,
        generate_latest(registry).decode(),
    )
    drift = "drifted: run the study again"
    assert cells == ["fast", "93.21 %", "95.00 %", "55.0 %", "10", "–", "30", drift]


@pytest.mark.parametrize("view", ["live", "playground", "studies"])
def test_every_control_can_be_reached_by_the_keyboard(
    dashboard: Page, server: TestServer, study: str, view: str
) -> None:
    # A page of its own, so that Tab begins at its top.
    dashboard.open(f"{server.url}/dashboard?{view}#{view}")
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
    reached = set()
    for _ in range(2 * len(wanted)):
        focused = dashboard.tab()
        if focused.tag_name == "body":  # after the last one
            break
        name = dashboard.run(tell, focused)
        reached.add(name)
        ring = focused.value_of_css_property("outline-style")
        marked = dashboard.run(
            "return arguments[0].type === 'radio' && "
            "getComputedStyle(arguments[0].nextSibling).outlineStyle",
            focused,
        )
        assert "solid" in (ring, marked), f"nothing shows that {name} has the focus"
    assert wanted <= reached


def test_the_page_is_made_of_installed_files_alone(server: TestServer) -> None:
    folder = Path(__file__).parents[2] / "platform" / "fathom" / "dashboard" / "static"
    for file in folder.iterdir():
        outside = re.findall(r"https?://[^\s\"'`)]+", file.read_text())
        assert [each for each in outside if "www.w3.org" not in each] == [], file
