from __future__ import annotations

import gzip
import json
import re
from importlib.resources import files

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from fathom.dashboard.assets import PLOTLY, asset
from fathom.dashboard.routes import add_dashboard_routes


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()
    add_dashboard_routes(app, digests=[])
    return TestClient(app)


def test_every_file_that_a_page_names_is_served(client: TestClient) -> None:
    page = client.get("/dashboard")
    names = set(re.findall(r'dashboard/assets/([^"]+)"', page.text))
    assert PLOTLY in names
    scripts = {name for name in names if name.endswith(".js")}
    while scripts:
        text = client.get(f"/dashboard/assets/{scripts.pop()}")
        assert text.status_code == 200
        if len(text.content) < 100_000:  # plotly.js imports nothing
            more = set(re.findall(r'from "\./([^"]+)"', text.text)) - names
            scripts |= more
            names |= more
    kinds = {
        name: client.get(f"/dashboard/assets/{name}").headers["content-type"] for name in names
    }
    assert {kind.partition(";")[0] for kind in kinds.values()} == {
        "text/css", "text/javascript", "image/svg+xml",
    }  # fmt: skip
    # And nothing is shipped that no page needs.
    shipped = {each.name for each in (files("fathom.dashboard") / "static").iterdir()}
    assert shipped == (names - {PLOTLY}) | {"index.html", "login.html"}


def test_the_charts_come_from_the_installed_package(client: TestClient) -> None:
    answer = client.get(f"/dashboard/assets/{PLOTLY}")
    assert answer.headers["content-encoding"] == "gzip"
    assert b"plotly.js v" in answer.content[:200]
    assert int(answer.headers["content-length"]) < 2_000_000
    assert "immutable" in answer.headers["cache-control"]
    plain = client.get(f"/dashboard/assets/{PLOTLY}", headers={"accept-encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.content == answer.content == gzip.decompress(asset(PLOTLY).zipped)


def test_no_other_host_and_no_inline_script_is_allowed(client: TestClient) -> None:
    for path in ("/dashboard", "/dashboard/assets/main.js"):
        policy = client.get(path).headers["content-security-policy"]
        parts = dict(each.strip().split(" ", 1) for each in policy.split(";"))
        assert parts["default-src"] == "'none'"
        assert parts["script-src"] == parts["style-src"] == parts["connect-src"] == "'self'"
        assert parts["frame-ancestors"] == parts["base-uri"] == "'none'"
    for page in ("index.html", "login.html"):
        text = asset(page).body.decode()
        assert not re.search(r"<script(?![^>]*src=)|<style|\son\w+=|\sstyle=", text)


def test_what_has_not_changed_is_not_sent_again(client: TestClient) -> None:
    first = client.get("/dashboard/assets/style.css")
    again = client.get(
        "/dashboard/assets/style.css", headers={"if-none-match": first.headers["etag"]}
    )
    assert (again.status_code, again.content) == (304, b"")
    assert first.headers["cache-control"] == "no-cache"


@pytest.mark.parametrize(
    "name", ["nothing.js", "..%2Froutes.py", "%2e%2e/routes.py", "routes.py", ""]
)
def test_no_other_file_is_served(client: TestClient, name: str) -> None:
    assert client.get(f"/dashboard/assets/{name}").status_code == 404


def test_without_keys_and_studies(client: TestClient) -> None:
    assert client.get("/dashboard/login").url.path == "/dashboard"
    assert client.get("/dashboard/").url.path == "/dashboard"
    assert client.get("/dashboard/data/site").json()["can_log_out"] is False
    listed = client.get("/dashboard/data/studies").json()
    assert listed["studies"] == []
    assert "--mlflow" in listed["why"]
    assert client.post("/dashboard/data/rollback", json={}).status_code == 404
    headers = {"origin": "http://testserver"}
    assert client.post("/dashboard/login", data={"key": ""}, headers=headers).status_code == 403


def test_links_lead_to_mlflow_where_it_has_pages() -> None:
    for uri, links in (("http://host:5000/", {"MLflow": "http://host:5000"}), ("sqlite:///a", {})):
        app = FastAPI()
        add_dashboard_routes(app, digests=[], mlflow=uri, links={"Ray dashboard": "http://ray"})
        site = TestClient(app).get("/dashboard/data/site").json()
        assert site["links"] == {**links, "Ray dashboard": "http://ray"}
        json.dumps(site)
