"""What runs in Serve's HTTP proxy, before the application: the check of API keys.

The application checks keys too, but Serve's proxy answers some paths (``/-/routes``,
``/-/healthz``) by itself. Serve asks the function that ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH``
names for middlewares; the variable must be set where Ray starts its processes, so ``start_ray``
sets it, and an operator of a cluster sets it with ``FATHOM_API_KEY`` on every node.
"""

from __future__ import annotations

from starlette.middleware import Middleware

from fathom.api.auth import KeyMiddleware, digests_from_env

CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "deployments.proxy.middlewares"


def middlewares() -> list[Middleware]:
    """Serve's callback: the key check, with the keys of the proxy's own environment."""
    return [Middleware(KeyMiddleware, digests=digests_from_env())]
