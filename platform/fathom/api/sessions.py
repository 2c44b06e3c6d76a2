"""Sessions of browsers: a cookie that proves knowledge of an API key without holding it.

A browser cannot send ``Authorization`` with a navigation. Whoever shows a key once gets a cookie
that says until when it holds, and an HMAC-SHA256 (RFC 2104) of that under the key's digest. Every
ingress knows the digests, so each can check it, and nothing is kept anywhere. A copied cookie holds
until its time is over; a key that is taken from the server takes its sessions along.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import Scope

COOKIE = "fathom_session"
LIFETIME_S = 12 * 3600

SESSION, LINK = "session", "link"
"""What is issued: a cookie's value, or what an address holds that begins a session. Neither passes
for the other, so that no cookie can prolong itself."""

_SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


def issue(
    key_digest: bytes,
    now: float | None = None,
    *,
    kind: str = SESSION,
    lifetime_s: float = LIFETIME_S,
) -> str:
    """The value of a cookie, or of a link, for whoever has shown the key with this digest.

    Args:
        now: seconds since the epoch.
    """
    until = str(int((time.time() if now is None else now) + lifetime_s))
    return f"{until}.{_proof(kind, key_digest, until)}"


def owner_of_session(
    value: str, digests: Sequence[bytes], now: float | None = None, *, kind: str = SESSION
) -> bytes | None:
    """The digest of the key that a value was issued for; None if it holds for none.

    The time taken does not tell which, or how nearly.
    """
    until, _, proof = value.partition(".")
    if not (until.isascii() and until.isdigit() and len(until) < 16 and proof.isascii()):
        return None
    found = None
    for known in digests:
        if hmac.compare_digest(proof, _proof(kind, known, until)):
            found = known
    return found if (time.time() if now is None else now) < int(until) else None


def session_of(scope: Scope) -> str:
    """The value of a request's cookie; empty without one."""
    return HTTPConnection(scope).cookies.get(COOKIE, "")


def is_own_page(scope: Scope) -> bool:
    """Whether a request that a cookie lets in changes nothing, or comes from a page of this server.

    ``SameSite`` holds other sites off, but another port of the same host is no other site.
    """
    if scope["method"] in _SAFE_METHODS:
        return True
    headers = HTTPConnection(scope).headers
    # Browsers say it themselves, but not to every plain http address.
    if (site := headers.get("sec-fetch-site")) is not None:
        return site == "same-origin"
    return urlsplit(headers.get("origin", "")).netloc == headers.get("host")


def begin(response: Response, scope: Scope, value: str) -> None:
    """Set the cookie."""
    response.set_cookie(
        COOKIE, value, max_age=LIFETIME_S, path="/", httponly=True, samesite="strict",
        secure=_is_https(scope),
    )  # fmt: skip


def end(response: Response, scope: Scope) -> None:
    """Take the cookie away."""
    response.delete_cookie(
        COOKIE, path="/", httponly=True, samesite="strict", secure=_is_https(scope)
    )


def _is_https(scope: Scope) -> bool:
    # Behind a proxy that ends TLS, its word; whoever lies there only loses a cookie.
    forwarded = HTTPConnection(scope).headers.get("x-forwarded-proto", "")
    return "https" in (scope["scheme"], forwarded.partition(",")[0].strip())


def _proof(kind: str, key_digest: bytes, until: str) -> str:
    said = f"fathom {kind} until {until}".encode()
    return hmac.new(key_digest, said, hashlib.sha256).hexdigest()
