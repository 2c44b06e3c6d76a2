"""What a user does on the dashboard, step by step."""

from __future__ import annotations

import contextlib
import time
import urllib.error
import urllib.request

from tests.browser.page import Page
from tests.ray_fixtures import KEYS, TestServer


def log_in(page: Page, server: TestServer, key: str = KEYS[1]) -> None:
    page.open(f"{server.url}/dashboard")
    page.one("#key").send_keys(key)
    page.one("button.primary").click()
    page.until(lambda: page.all("#status, [role=alert]"), "the answer to the login")


def show(page: Page, view: str) -> None:
    page.one(f"nav a[href='#{view}']").click()
    page.until(lambda: page.one(f"#view-{view}").is_displayed(), f"the view {view}")


def choose(page: Page, select: str, value: str) -> None:
    page.one(f"{select} option[value='{value}']").click()


def stream(page: Page, mode: str, tokens: int = 48) -> list[int]:
    """Ask in a mode, and wait for the answer's end; returns the depths of its tokens."""
    page.one(f"#modes input[value='{mode}']").click()
    field = page.one("#max-tokens")
    field.clear()
    field.send_keys(str(tokens))
    before = len(page.all("#runs tbody tr"))
    page.one("#send").click()
    page.until(lambda: len(page.all("#runs tbody tr")) > before, f"the answer in mode {mode}", 60)
    return [int(each) for each in page.run(
        "return [...document.querySelectorAll('#answer .tok')].map((e) => e.dataset.depth)"
    )]  # fmt: skip


def wait_for(url: str, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url):
            return
        assert time.monotonic() < deadline, url
        time.sleep(0.2)
