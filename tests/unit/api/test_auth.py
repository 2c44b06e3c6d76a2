from __future__ import annotations

import pytest
from starlette.testclient import TestClient

from fathom.api.app import create_app
from fathom.api.auth import check_bind, digest, digests_from_env, is_allowed, is_loopback
from fathom.api.service import Service
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
