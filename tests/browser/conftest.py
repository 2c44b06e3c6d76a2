"""A real Chromium before a real server."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser.page import Page
from tests.ray_fixtures import server

__all__ = ["server"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
REMEDY = "install Chromium and its driver (Debian: apt-get install chromium chromium-driver)"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.browser)


@pytest.fixture(scope="session")
def artifacts() -> Path:
    """Where screenshots go."""
    folder = Path(os.environ.get("FATHOM_TEST_ARTIFACTS", "test-artifacts"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def browser(artifacts: Path) -> Iterator[Page]:
    """One browser for all tests; each begins with empty logs."""
    binary = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        missing = "Chromium" if binary is None else "chromedriver"
        message = f"no {missing} on PATH: {REMEDY}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    page = Page(binary, driver, artifacts)
    yield page
    page.close()


@pytest.fixture
def page(browser: Page) -> Page:
    """The browser, at 1280 pixels in the light scheme."""
    browser.forget()
    browser.resize(1280)
    browser.prefer("light")
    return browser
