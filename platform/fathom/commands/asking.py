"""Questions of commands to a running server."""

from __future__ import annotations

import http.client
import json
import os
import urllib.parse
from collections.abc import Mapping
from typing import Any

from fathom.commands.options import UsageError

DEFAULT_URL = "http://127.0.0.1:8000"
KEY_VARIABLE, OPERATOR_VARIABLE = "FATHOM_API_KEY", "FATHOM_OPERATOR_KEY"
_TIMEOUT_S = 90
"""Longer than a server takes to tell all its replicas of something (``deployments.takeover``)."""


def ask(
    url: str,
    path: str,
    body: Mapping[str, Any] | None = None,
    *,
    post: bool = False,
    key_variable: str = KEY_VARIABLE,
) -> Any:
    """A server's answer.

    Args:
        url: of the server. path: of the question, as ``/v1/exits``.
        body: sent as JSON by POST; without one it is a GET, unless ``post``.
        key_variable: of the environment, which holds an API key, or several separated by commas.

    Raises:
        UsageError: for what is no URL. RuntimeError: if it does not answer, or refuses, with its
            words.
    """
    address = check_url(url)
    kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    key = first_key(key_variable)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    data = None
    if body is not None:
        data = json.dumps(body).encode()
        headers["Content-Type"] = "application/json"
    connection = kind(address.hostname or "", address.port, timeout=_TIMEOUT_S)
    try:
        method = "POST" if post or data is not None else "GET"
        connection.request(method, address.path.rstrip("/") + path, data, headers)
        answer = connection.getresponse()
        text = answer.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        raise RuntimeError(f"no server answers at {url} ({error}); is that its URL?") from error
    finally:
        connection.close()
    if answer.status != 200:
        hint = f"; {key_variable} must hold its key" if answer.status == 401 else ""
        raise RuntimeError(f"the server at {url} answers {answer.status}{hint}: {_words(text)}")
    return json.loads(text)


def first_key(variable: str) -> str:
    """The first of the keys in a variable of the environment, which commas separate; or empty."""
    return os.environ.get(variable, "").split(",")[0].strip()


def check_url(url: str) -> urllib.parse.SplitResult:
    """The parts of a server's URL.

    Raises:
        UsageError: for what is none.
    """
    address = urllib.parse.urlsplit(url)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise UsageError(f"the server's URL must be as {DEFAULT_URL}, got {url!r}.")
    return address


def _words(text: str) -> str:
    """The message of an error in OpenAI's form; other text cut off."""
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:300]
