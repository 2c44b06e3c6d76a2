"""Who may talk to the server: API keys, and which addresses a server without keys may bind.

Some keys may be operators': where there are any, they alone change what the server serves.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Mapping, Sequence

from starlette.requests import HTTPConnection
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fathom.api.errors import missing_or_wrong_key, operators_only
from fathom.api.sessions import is_own_page, owner_of_session, session_of
from fathom.config import ConfigError

KEY_VARIABLE = "FATHOM_API_KEY"
OPERATOR_VARIABLE = "FATHOM_OPERATOR_KEY"
OPEN_PATHS = frozenset({"/health"})
DASHBOARD, LOGIN, ASSETS = "/dashboard", "/dashboard/login", "/dashboard/assets/"
OPERATED = ("/v1/operating_points", "/dashboard/data")
"""Paths, with all below them, where whatever is no mere question is for operators."""
_OWNER = "fathom_owner"
_QUESTIONS = frozenset({"GET", "HEAD", "OPTIONS"})


def digest(key: str) -> bytes:
    """SHA-256 of a key: what travels to the ingress and is compared, so no key is stored."""
    return hashlib.sha256(key.encode()).digest()


def digests_from_env(env: Mapping[str, str] | None = None) -> tuple[bytes, ...]:
    """The digests of all keys: those in ``FATHOM_API_KEY`` and ``FATHOM_OPERATOR_KEY``.

    Several keys of a variable are separated by commas. Empty without any.
    """
    return _digests(KEY_VARIABLE, env) + operator_digests_from_env(env)


def operator_digests_from_env(env: Mapping[str, str] | None = None) -> tuple[bytes, ...]:
    """The digests of the keys in ``FATHOM_OPERATOR_KEY``, empty without any."""
    return _digests(OPERATOR_VARIABLE, env)


def _digests(variable: str, env: Mapping[str, str] | None) -> tuple[bytes, ...]:
    value = (os.environ if env is None else env).get(variable, "")
    return tuple(digest(key.strip()) for key in value.split(",") if key.strip())


def check_operators(env: Mapping[str, str] | None = None) -> None:
    """Refuse operators' keys alone: every client would need one, and so be an operator.

    Raises:
        ConfigError: if there are operators' keys and no others.
    """
    if operator_digests_from_env(env) and not _digests(KEY_VARIABLE, env):
        raise ConfigError(
            f"{OPERATOR_VARIABLE} is set and {KEY_VARIABLE} is not, so every client would need an "
            f"operator's key: set {KEY_VARIABLE} for clients, or unset {OPERATOR_VARIABLE}."
        )


def may_operate(scope: Scope, operators: Sequence[bytes]) -> bool:
    """Whether a request that ``KeyMiddleware`` let in may change what the server serves.

    Args:
        operators: digests of the operators' keys; without any, everybody may.
    """
    return not operators or owner_of(scope) in operators


def is_allowed(key: str, digests: Sequence[bytes]) -> bool:
    """Whether ``key`` is one of the keys; the time taken does not tell which, or how nearly."""
    presented = hashlib.sha256(key.encode(errors="surrogateescape")).digest()
    found = False
    for known in digests:
        found |= hmac.compare_digest(presented, known)
    return found


def is_loopback(host: str) -> bool:
    """Whether ``host`` can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_bind(host: str, digests: Sequence[bytes]) -> None:
    """Refuse to open a server without keys to other machines.

    Raises:
        ConfigError: if ``host`` is not a loopback address and there is no key.
    """
    if not digests and not is_loopback(host):
        raise ConfigError(
            f"host {host!r} can be reached from other machines, and no API key is set: "
            f"set {KEY_VARIABLE}, or bind to 127.0.0.1."
        )


def owner_of(scope: Scope) -> bytes:
    """The digest of the key that ``KeyMiddleware`` let a request in with; empty without keys."""
    owner: bytes = scope.get("state", {}).get(_OWNER, b"")
    return owner


class KeyMiddleware:
    """Checks the key before anything else is done, on every path but ``/health``.

    A browser shows it once at the dashboard's login, which is open like the files that it is made
    of, and has a cookie from then on (``api.sessions``).

    A server without keys serves clients on this machine only, however it was bound: a Serve
    config file sets the address apart from the application, so ``check_bind`` may not see it.

    Args:
        digests: of all keys. operators: of those that are operators' (``OPERATED``); without any,
            all are.
    """

    def __init__(
        self, app: ASGIApp, digests: Sequence[bytes], operators: Sequence[bytes] = ()
    ) -> None:
        self._app = app
        self._digests = tuple(digests)
        self._operators = tuple(operators)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket") and not self._is_open(_path(scope)):
            refusal = self._refusal(scope)
            if refusal is not None:
                if self._digests and _is_visit(scope):
                    # Relative: a proxy may have put the server under a path of its own.
                    answer = RedirectResponse("dashboard/login", 303)
                    await answer(scope, receive, send)
                    return
                await missing_or_wrong_key(refusal).response()(scope, receive, send)
                return
            if is_operation(scope) and not may_operate(scope, self._operators):
                await operators_only(OPERATOR_VARIABLE).response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _is_open(self, path: str) -> bool:
        if path in OPEN_PATHS:
            return True
        return bool(self._digests) and (path == LOGIN or path.startswith(ASSETS))

    def _refusal(self, scope: Scope) -> str | None:
        if not self._digests:
            client = scope.get("client")
            if client and is_loopback(client[0]):
                return None
            return f"This server has no API key and serves its own machine only; {_REMEDY}"
        header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        if not header and (session := session_of(scope)):
            return self._refusal_of_session(scope, session)
        scheme, _, key = header.decode("latin-1").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            return "No API key was given; send the header 'Authorization: Bearer KEY'."
        if not is_allowed(key.strip(), self._digests):
            return "The API key is not valid."
        scope.setdefault("state", {})[_OWNER] = digest(key.strip())
        return None

    def _refusal_of_session(self, scope: Scope, session: str) -> str | None:
        owner = owner_of_session(session, self._digests)
        if owner is None:
            return f"The session is over, or was never one: log in again at {LOGIN}."
        if scope["type"] != "http" or not is_own_page(scope):
            return "A session's cookie lets in what this server's own pages ask for, nothing else."
        scope.setdefault("state", {})[_OWNER] = owner
        return None


def _path(scope: Scope) -> str:
    """The path of a request within the application, wherever that is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def is_operation(scope: Scope) -> bool:
    """Whether a request is to change what the server serves."""
    if scope["type"] != "http" or scope["method"] in _QUESTIONS:
        return False
    path = _path(scope)
    return any(path == own or path.startswith(f"{own}/") for own in OPERATED)


def _is_visit(scope: Scope) -> bool:
    """Whether a person opens the dashboard."""
    return (
        scope["type"] == "http"
        and _path(scope) == DASHBOARD
        and "text/html" in HTTPConnection(scope).headers.get("accept", "")
    )


_REMEDY = f"its operator can set {KEY_VARIABLE}."
