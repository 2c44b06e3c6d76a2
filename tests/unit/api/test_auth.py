from __future__ import annotations

from pathlib import Path

import pytest
from starlette.testclient import TestClient

from fathom.api.app import create_app
from fathom.api.auth import (
    check_bind,
    check_operators,
    digest,
    digests_from_env,
    is_allowed,
    is_loopback,
    operator_digests_from_env,
)
from fathom.api.promotion import Promotion
from fathom.api.service import Service
from fathom.api.sessions import COOKIE, issue
from fathom.config import ConfigError

ROUTES = [
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/version"),
    ("GET", "/v1/models"),
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/no/such/route"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "header",
    [None, "Bearer wrong", "Bearer ", "Basic unit-key", "unit-key", "Bearer unit-key2", "Bearer é"],
)
def test_every_route_but_health_asks_for_a_key(
    client: TestClient, method: str, path: str, header: str | None
) -> None:
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    client = TestClient(client.app, raise_server_exceptions=False)
    answer = client.request(method, path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["code"] == "invalid_api_key"
    assert "unit-key" not in error["message"]


def test_health_needs_no_key_and_any_key_opens_the_rest(client: TestClient) -> None:
    bare = TestClient(client.app)
    assert bare.get("/health").json() == {"status": "ok"}
    for key in ("unit-key", "other"):
        answer = bare.get("/v1/models", headers={"authorization": f"bearer {key}"})
        assert answer.status_code == 200


def test_without_keys_only_this_machine_is_served(service: Service) -> None:
    app = create_app(service, key_digests=(), max_body_bytes=100)
    assert TestClient(app, client=("127.0.0.1", 1)).get("/version").status_code == 200
    assert TestClient(app, client=("::1", 1)).get("/version").status_code == 200
    refused = TestClient(app, client=("192.0.2.7", 1)).get("/version")
    assert refused.status_code == 401
    assert "FATHOM_API_KEY" in refused.json()["error"]["message"]
    assert TestClient(app, client=("192.0.2.7", 1)).get("/health").status_code == 200


def test_keys_from_the_environment() -> None:
    assert digests_from_env({}) == ()
    assert digests_from_env({"FATHOM_API_KEY": " , "}) == ()
    keys = digests_from_env({"FATHOM_API_KEY": "one, two"})
    assert keys == (digest("one"), digest("two"))
    assert is_allowed("one", keys)
    assert is_allowed("two", keys)
    assert not is_allowed("one, two", keys)
    assert not is_allowed("", keys)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    assert is_loopback(host)
    check_bind(host, ())


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com", ""])
def test_other_hosts_need_a_key(host: str) -> None:
    with pytest.raises(ConfigError, match="set FATHOM_API_KEY, or bind to"):
        check_bind(host, ())
    check_bind(host, (digest("key"),))


def test_operators_keys_are_keys_and_not_the_only_ones() -> None:
    both = {"FATHOM_API_KEY": "one", "FATHOM_OPERATOR_KEY": "op, op2"}
    assert operator_digests_from_env(both) == (digest("op"), digest("op2"))
    assert digests_from_env(both) == (digest("one"), digest("op"), digest("op2"))
    for env in ({}, both, {"FATHOM_API_KEY": "one"}):
        check_operators(env)
    with pytest.raises(ConfigError, match="set FATHOM_API_KEY for clients, or unset"):
        check_operators({"FATHOM_OPERATOR_KEY": "op", "FATHOM_API_KEY": " , "})


class Told:
    """Counts what would reach the server."""

    def __init__(self) -> None:
        self.calls = 0

    async def promote(self, promotion: Promotion) -> None:
        self.calls += 1

    async def rollback(self) -> None:
        self.calls += 1


CHANGES = [
    ("/v1/operating_points", {"points": {}}),
    ("/v1/operating_points/rollback", None),
    ("/dashboard/data/rollback", None),
    ("/dashboard/data/studies/r1/promote", {"point": "p"}),
]


@pytest.mark.parametrize(("path", "body"), CHANGES)
@pytest.mark.parametrize("root", ["", "/mounted"])
def test_where_there_are_operators_they_alone_change_points(
    service: Service, path: str, body: object, root: str, tmp_path: Path
) -> None:
    told = Told()
    app = create_app(
        service,
        key_digests=[digest("client"), digest("op")],
        operator_digests=[digest("op")],
        max_body_bytes=1000,
        takeover=told,
        mlflow=f"sqlite:///{tmp_path}/none.db",
    )
    client = TestClient(app, root_path=root, raise_server_exceptions=False)
    by_key = {"authorization": "Bearer client"}
    by_cookie = {
        "cookie": f"{COOKIE}={issue(digest('client'))}", "sec-fetch-site": "same-origin"
    }  # fmt: skip
    for headers in (by_key, by_cookie):
        answer = client.post(root + path, json=body, headers=headers)
        assert answer.status_code == 403
        error = answer.json()["error"]
        assert error["code"] == "operator_key_required"
        assert "one of FATHOM_OPERATOR_KEY where the server was started" in error["message"]
        assert client.get(f"{root}/v1/operating_points", headers=headers).status_code == 200
        site = client.get(f"{root}/dashboard/data/site", headers=headers).json()
        assert site["can_promote"] is False
    assert not told.calls
    headers = {"authorization": "Bearer op"}
    assert client.post(root + path, json=body, headers=headers).status_code != 403
    site = client.get(f"{root}/dashboard/data/site", headers=headers).json()
    assert site["can_promote"] is True
    assert client.get(f"{root}/v1/models", headers=headers).status_code == 200


def test_without_operators_every_key_changes_points(service: Service) -> None:
    told = Told()
    app = create_app(
        service, key_digests=[digest("client")], max_body_bytes=1000, takeover=told
    )  # fmt: skip
    client = TestClient(app, headers={"authorization": "Bearer client"})
    assert client.get("/dashboard/data/site").json()["can_promote"] is True
    assert client.post("/v1/operating_points/rollback").status_code == 200
    assert told.calls == 1
