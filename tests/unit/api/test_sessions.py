from __future__ import annotations

import time

import pytest
from starlette.testclient import TestClient

from fathom.api.auth import digest
from fathom.api.sessions import COOKIE, LIFETIME_S, LINK, issue, owner_of_session

ONE, OTHER = digest("unit-key"), digest("other")
HTML = {"accept": "text/html,application/xhtml+xml"}


@pytest.fixture
def bare(client: TestClient) -> TestClient:
    """A browser that has not logged in."""
    return TestClient(client.app, raise_server_exceptions=False)


@pytest.fixture
def inside(bare: TestClient) -> TestClient:
    """A browser that has."""
    answer = bare.post("/dashboard/login", data={"key": "unit-key"}, headers=own(bare))
    assert answer.history[0].status_code == 303
    return bare


def own(client: TestClient) -> dict[str, str]:
    """What a browser sends along with what the dashboard's own pages ask."""
    return {"origin": str(client.base_url)}


def test_a_session_holds_for_its_key_and_its_time() -> None:
    value = issue(ONE, now=1000)
    assert owner_of_session(value, [OTHER, ONE], now=1000) == ONE
    assert owner_of_session(value, [OTHER, ONE], now=1000 + LIFETIME_S - 1) == ONE
    assert owner_of_session(value, [OTHER, ONE], now=1000 + LIFETIME_S) is None
    assert owner_of_session(value, [OTHER], now=1000) is None
    assert owner_of_session(value, [], now=1000) is None
    assert ONE.hex() not in value
    assert owner_of_session(issue(OTHER), [OTHER, ONE]) == OTHER


@pytest.mark.parametrize(
    "value", ["", ".", "1.", "é.é", "-5.abc", "9" * 400 + ".abc", "99999999999.é", "²." + "0" * 64]
)
def test_what_is_no_session_holds_for_nobody(value: str) -> None:
    assert owner_of_session(value, [ONE], now=0) is None


def test_a_later_end_needs_another_proof() -> None:
    until, _, proof = issue(ONE).partition(".")
    assert owner_of_session(f"{int(until) + 1}.{proof}", [ONE]) is None


def test_a_visitor_is_asked_for_a_key(bare: TestClient) -> None:
    answer = bare.get("/dashboard", headers=HTML, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, "dashboard/login")
    assert bare.get("/dashboard", headers=HTML).url.path == "/dashboard/login"
    # A program is told so.
    assert bare.get("/dashboard").status_code == 401
    assert bare.get("/dashboard/data/studies", headers=HTML).status_code == 401
    refused = bare.post("/dashboard/login", data={"key": "wrong"}, headers=own(bare))
    assert refused.status_code == 403
    assert "set-cookie" not in refused.headers
    assert 'role="alert"' in refused.text


def test_a_session_opens_every_route_until_it_ends(inside: TestClient) -> None:
    for path in ("/dashboard", "/metrics", "/v1/models", "/v1/exits", "/dashboard/data/site"):
        assert inside.get(path).status_code == 200
    assert inside.get("/dashboard/data/site").json()["can_log_out"] is True
    inside.post("/dashboard/logout", headers=own(inside))
    assert inside.get("/metrics").status_code == 401


def test_the_cookie_is_for_this_server_alone(bare: TestClient) -> None:
    def cookie(scheme: str, **headers: str) -> str:
        client = TestClient(bare.app, base_url=f"{scheme}://testserver")
        answer = client.post(
            "/dashboard/login", data={"key": "other"}, follow_redirects=False,
            headers={**own(client), **headers},
        )  # fmt: skip
        return answer.headers["set-cookie"].lower()

    plain = cookie("http")
    for part in ("httponly", "samesite=strict", "path=/", f"max-age={LIFETIME_S}"):
        assert part in plain
    assert "secure" not in plain
    assert "secure" in cookie("https")
    assert "secure" in cookie("http", **{"x-forwarded-proto": "https"})


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://testserver:9999"},
        {"sec-fetch-site": "same-site", "origin": "http://testserver"},
        {"sec-fetch-site": "cross-site"},
    ],
)
def test_another_page_cannot_use_a_session_to_change_anything(
    inside: TestClient, headers: dict[str, str]
) -> None:
    for path in ("/v1/completions", "/v1/operating_points"):
        assert inside.post(path, json={}, headers=headers).status_code == 401
    assert inside.post("/dashboard/logout", headers=headers).status_code in (401, 403)
    assert inside.get("/metrics").status_code == 200  # still logged in
    login = inside.post("/dashboard/login", data={"key": "other"}, headers=headers)
    assert login.status_code == 403


def test_own_pages_can(inside: TestClient) -> None:
    for headers in (own(inside), {"sec-fetch-site": "same-origin"}):
        answer = inside.post("/v1/completions", json={}, headers=headers)
        assert answer.status_code == 400  # it was read


def test_a_key_counts_before_a_cookie(inside: TestClient) -> None:
    answer = inside.get("/metrics", headers={"authorization": "Bearer wrong"})
    assert answer.status_code == 401


def test_a_link_begins_a_session(bare: TestClient) -> None:
    assert bare.get("/dashboard/login", params={"link": "1.0"}).status_code == 200
    # A cookie cannot prolong itself, and a link is no cookie.
    assert bare.get("/dashboard/login", params={"link": issue(ONE)}).status_code == 200
    assert COOKIE not in bare.cookies
    link = issue(ONE, kind=LINK, lifetime_s=5)
    assert owner_of_session(link, [ONE]) is None
    answer = bare.get("/dashboard/login", params={"link": link})
    assert answer.url.path == "/dashboard"
    until = int(bare.cookies[COOKIE].strip('"').partition(".")[0])
    assert until > time.time() + LIFETIME_S - 60
    old = issue(ONE, now=time.time() - 10, kind=LINK, lifetime_s=5)
    fresh = TestClient(bare.app)
    assert fresh.get("/dashboard/login", params={"link": old}).url.path == "/dashboard/login"
