"""The application's own certificates: a client that trusts the authority gets in, no other does."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.flight as flight
import pytest

from deployments.certificates import Authority, issue, make_authority


class Listener(flight.FlightServerBase):
    def list_actions(self, context: flight.ServerCallContext) -> list[tuple[str, str]]:
        return [("hello", "")]


def actions(server: Listener, authority: Authority, host: str = "127.0.0.1") -> list[str]:
    address = f"grpc+tls://{host}:{server.port}"
    with flight.FlightClient(address, tls_root_certs=authority.certificate) as client:
        call = flight.FlightCallOptions(timeout=5)
        return [action.type for action in client.list_actions(call)]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_who_trusts_the_authority_gets_in_and_nobody_else(host: str) -> None:
    authority, another = make_authority(), make_authority()
    with Listener(f"grpc+tls://{host}:0", tls_certificates=[issue(authority, host)]) as server:
        assert actions(server, authority, host) == ["hello"]
        with pytest.raises(pa.ArrowException):
            actions(server, another, host)


def test_a_certificate_is_for_one_host() -> None:
    authority = make_authority()
    certificate = issue(authority, "10.1.2.3")
    with (
        Listener("grpc+tls://127.0.0.1:0", tls_certificates=[certificate]) as server,
        pytest.raises(pa.ArrowException),
    ):
        actions(server, authority)


def test_an_authority_shows_no_key() -> None:
    authority = make_authority()
    assert b"PRIVATE KEY" in authority.key
    assert "PRIVATE" not in repr(authority)
