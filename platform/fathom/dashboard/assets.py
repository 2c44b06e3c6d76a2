"""The files that the dashboard is made of, from the installed packages, and their headers."""

from __future__ import annotations

import gzip
import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from importlib.resources import files
from importlib.resources.abc import Traversable

from starlette.requests import Request
from starlette.responses import Response

KINDS = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}

PLOTLY = f"plotly-{version('plotly')}.js"
"""Name under which the charts' library is served: another one for each version."""

HEADERS = {
    # Nothing is loaded from, or sent to, any other host. plotly.js styles its SVG by attributes.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; "
        "style-src-attr 'unsafe-inline'; img-src 'self' data:; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """A file as it is sent.

    Attributes:
        zipped: its bytes under gzip. etag: of its content, quoted.
    """

    body: bytes
    zipped: bytes
    media_type: str
    etag: str


@lru_cache(maxsize=64)
def asset(name: str) -> Asset:
    """A file by its name; those of the package, and plotly.js.

    Raises:
        FileNotFoundError: for any other name.
    """
    body = _find(name).read_bytes()
    if name == "index.html":
        body = body.replace(b"{{plotly}}", PLOTLY.encode()).replace(b"{{sheets}}", _sheets())
    return Asset(
        body,
        gzip.compress(body, 6, mtime=0),
        KINDS[name.rpartition(".")[2]],
        f'"{hashlib.sha256(body).hexdigest()[:20]}"',
    )


def send(request: Request, name: str, *, status: int = 200) -> Response:
    """The answer to a request for a file.

    Raises:
        FileNotFoundError: if there is none of that name.
    """
    found = asset(name)
    # Only a name that changes with the content can be kept without asking.
    keep = "private, max-age=31536000, immutable" if name == PLOTLY else "no-cache"
    headers = {**HEADERS, "Cache-Control": keep, "ETag": found.etag, "Vary": "Accept-Encoding"}
    if status == 200 and request.headers.get("if-none-match") == found.etag:
        return Response(status_code=304, headers=headers)
    headers["Content-Type"] = found.media_type
    if "gzip" in request.headers.get("accept-encoding", ""):
        return Response(found.zipped, status, {**headers, "Content-Encoding": "gzip"})
    return Response(found.body, status, headers)


def _sheets() -> bytes:
    """Links that stand in for the sheets that plotly.js and its map library would make inline."""
    known = {*re.findall(rb'getElementById\("([0-9a-f]{64})"\)', asset(PLOTLY).body)}
    ids = [b"plotly.js-style-global", *sorted(known)]
    link = b'<link rel="stylesheet" href="dashboard/assets/plotly.css" id="%s">'
    return b"\n  ".join(link % each for each in ids)


def _find(name: str) -> Traversable:
    if name == PLOTLY:
        return files("plotly") / "package_data" / "plotly.min.js"
    folder = files("fathom.dashboard") / "static"
    for each in folder.iterdir():  # no path from a client ever reaches the file system
        if each.name == name and name.rpartition(".")[2] in KINDS:
            return each
    raise FileNotFoundError(name)
