"""``fathom dashboard``: the dashboard of a server, from this machine."""

from __future__ import annotations

import argparse
import socket
import sys
import threading
import urllib.parse
from typing import Any

from fathom.commands.asking import DEFAULT_URL, KEY_VARIABLE, OPERATOR_VARIABLE, first_key
from fathom.commands.options import UsageError, add_command

_LINK_S = 300.0
_OPEN_AFTER_S = 1.0

_EXAMPLES = """\
  fathom dashboard                                  of the server at http://127.0.0.1:8000
  fathom dashboard --open                           the same, in a browser
  FATHOM_API_KEY=secret fathom dashboard --server http://10.0.0.5:9000
  fathom dashboard --mlflow sqlite:///tune-study/mlflow.db    studies from here; needs no server

A server shows the same pages by itself, at /dashboard. This command is for one that cannot be
reached by a browser, and for studies that are here. It does with the server what the keys of
FATHOM_API_KEY allow, and promotes by one of FATHOM_OPERATOR_KEY where the server has operators; so
it asks for those keys too. The address that it prints begins a session, for 5 minutes.
"""


def add_parser(commands: Any) -> None:
    """Declare the options."""
    parser = add_command(
        commands, "dashboard", run, about="show a server's dashboard", examples=_EXAMPLES
    )
    parser.add_argument(
        "--server", default=DEFAULT_URL, metavar="URL", help=f"(default: {DEFAULT_URL})"
    )
    parser.add_argument(
        "--mlflow", default="", metavar="URI", help="read studies from this tracking server"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to bind (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8500, help="port to bind (default: 8500)")
    parser.add_argument("--open", action="store_true", help="open a browser")


def run(args: argparse.Namespace) -> int:
    """Serve the dashboard until Ctrl-C."""
    address = urllib.parse.urlsplit(args.server)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise UsageError(f"--server must be as {DEFAULT_URL}, got {args.server!r}.")
    import uvicorn

    from fathom.api.auth import check_bind, digests_from_env, operator_digests_from_env
    from fathom.api.sessions import LINK, issue
    from fathom.dashboard.proxy import Upstream, create_proxy

    digests, operators = digests_from_env(), operator_digests_from_env()
    check_bind(args.host, digests)
    listening = _bind(args.host, args.port)
    operator_key = first_key(OPERATOR_VARIABLE)
    app = create_proxy(
        Upstream(args.server, first_key(KEY_VARIABLE) or operator_key, operator_key),
        host=args.host,
        digests=digests,
        operators=operators,
        mlflow=args.mlflow,
    )
    shown = f"[{args.host}]" if ":" in args.host else args.host
    url = f"http://{shown}:{listening.getsockname()[1]}/dashboard"
    if digests:
        owner = (operators or digests)[0]  # whoever reads this has all the keys
        url += f"/login?link={issue(owner, kind=LINK, lifetime_s=_LINK_S)}"
    print(f"dashboard of {args.server}: {url} (Ctrl-C stops)", file=sys.stderr, flush=True)
    if args.open:
        import webbrowser

        timer = threading.Timer(_OPEN_AFTER_S, webbrowser.open, (url,))
        timer.daemon = True
        timer.start()
    config = uvicorn.Config(app, log_level="warning", access_log=False)
    uvicorn.Server(config).run(sockets=[listening])
    return 0


def _bind(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any that is free.

    Raises:
        UsageError: if it cannot be had, with the system's reason.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(
            f"cannot bind {host}:{port}: {reason}; choose another --host or --port."
        ) from error
