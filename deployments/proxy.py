"""What runs in Serve's HTTP proxy, before the application: the checks of API keys and of names.

The application checks them too, but Serve's proxy answers some paths (``/-/routes``,
``/-/healthz``) by itself, and fails on an ``X-Request-Id`` that it cannot read. Serve asks the
function that one of ``deployments.SERVE_ENVIRONMENT`` names for middlewares; the operator of a
cluster sets it on every node, with ``FATHOM_API_KEY``.
"""

from __future__ import annotations

from starlette.middleware import Middleware

from fathom.api.auth import KeyMiddleware, digests_from_env
from fathom.api.caller import RequestIdMiddleware


def middlewares() -> list[Middleware]:
    """Serve's callback: the checks, with the keys of the proxy's own environment."""
    # The last one runs first: a refusal has an id too.
    return [Middleware(KeyMiddleware, digests=digests_from_env()), Middleware(RequestIdMiddleware)]
