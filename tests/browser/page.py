"""A browser as the tests need it: waits, sizes, schemes, screenshots, and what it has logged."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

HEIGHT = 800
_OPTIONS = (
    "--headless=new",
    "--no-sandbox",  # tests may run as root
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--hide-scrollbars",
    # The browser's own calls home.
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
)

# Elements that the Tab key must reach: what is seen and can be used, a group of radios once.
_CONTROLS = """
const seen = (e) => e.checkVisibility({visibilityProperty: true});
const all = 'a[href], button, input, select, textarea, summary, [tabindex]';
return [...document.querySelectorAll(all)]
  .filter((e) => seen(e) && !e.disabled && e.tabIndex >= 0)
  .filter((e) => e.type !== 'radio' || e.checked);
"""

# Texts whose contrast with what is behind them is below WCAG 2.2's AA (1.4.3).
_FAINT = """
const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
  .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const parse = (text) => {
  const values = text.match(/[\\d.]+/g).map(Number);
  return [...values.slice(0, 3), values[3] ?? 1];
};
const behind = (e) => {
  for (; e; e = e.parentElement) {
    const found = parse(getComputedStyle(e).backgroundColor);
    if (found[3] === 1) return found;
  }
  return [255, 255, 255, 1];
};
const found = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const e = walk.currentNode.parentElement, text = walk.currentNode.textContent.trim();
  if (!text || e.closest('svg, .visually-hidden, .skip, script, :disabled')) continue;
  if (!e.checkVisibility({visibilityProperty: true})) continue;
  if (e.closest('label')?.querySelector(':disabled')) continue;
  const style = getComputedStyle(e), size = parseFloat(style.fontSize);
  const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
  const [one, two] = [luminance(parse(style.color)), luminance(behind(e))].sort((a, b) => b - a);
  const contrast = (one + 0.05) / (two + 0.05);
  if (contrast < (large ? 3 : 4.5)) found.push(`${text.slice(0, 30)}: ${contrast.toFixed(2)}`);
}
return found;
"""


class Page:
    """One window of Chromium.

    Args:
        binary, driver: paths of the browser and of its chromedriver.
        artifacts: where screenshots go.
    """

    def __init__(self, binary: str, driver: str, artifacts: Path) -> None:
        options = webdriver.ChromeOptions()
        options.binary_location = binary
        for option in _OPTIONS:
            options.add_argument(option)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self._driver = webdriver.Chrome(options=options, service=Service(driver))
        self._driver.set_page_load_timeout(30)
        self._driver.set_script_timeout(30)
        self._artifacts = artifacts
        self._width = 0

    def open(self, url: str) -> None:
        """Go to an address; a change of the part after # alone loads nothing."""
        self._driver.get(url)

    @property
    def url(self) -> str:
        """The address that is shown."""
        return self._driver.current_url

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function's body in JavaScript returns."""
        return self._driver.execute_script(script, *arguments)

    def run_async(self, script: str, *arguments: Any) -> Any:
        """What an async function's body in JavaScript returns, or its error."""
        found = self._driver.execute_async_script(
            "const done = arguments[arguments.length - 1];"
            f"(async (...args) => {{ {script} }})(...[...arguments].slice(0, -1)).then("
            "(value) => done({value}), (error) => done({error: String(error)}));",
            *arguments,
        )
        assert "error" not in found, found["error"]
        return found.get("value")

    def one(self, selector: str) -> WebElement:
        """The element of a CSS selector."""
        return self._driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        """All elements of a CSS selector."""
        return self._driver.find_elements(By.CSS_SELECTOR, selector)

    def texts(self, selector: str) -> list[str]:
        """Texts of all elements of a CSS selector, read at one moment."""
        found: list[str] = self.run(
            "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)",
            selector,
        )
        return found

    def until(self, true: Callable[[], Any], what: str, seconds: float = 30) -> Any:
        """Wait until something holds; returns it. A picture is kept of what never did."""
        deadline = time.monotonic() + seconds
        while not (found := true()):
            if time.monotonic() > deadline:
                self.screenshot("failure")
                raise AssertionError(f"still waiting for {what}")
            time.sleep(0.05)
        return found

    def resize(self, width: int, height: int = HEIGHT) -> None:
        """Set the size of what is shown, in CSS pixels."""
        self._width = width
        self._emulate(width, height)

    def prefer(self, scheme: str) -> None:
        """Have the system ask for a colour scheme, and for no motion: what is seen is there."""
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": "reduce"},
        ]
        self._driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        # Pages are told a moment later; one that has no scheme of its own needs no wait.
        there = "return [undefined, arguments[0]].includes(document.documentElement.dataset.scheme)"
        self.until(lambda: self.run(there, scheme), f"the {scheme} scheme")

    def screenshot(self, name: str) -> None:
        """Keep a picture of the whole page, however long."""
        height = self.run("return document.documentElement.scrollHeight")
        self._emulate(self._width, max(height, HEIGHT))
        self._driver.save_screenshot(str(self._artifacts / f"{name}.png"))
        self._emulate(self._width, HEIGHT)

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        found: int = self.run(
            "return document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        return found

    def faint(self) -> list[str]:
        """Texts with too little contrast."""
        found: list[str] = self.run(_FAINT)
        return found

    def controls(self) -> list[WebElement]:
        """What the Tab key must reach."""
        found: list[WebElement] = self.run(_CONTROLS)
        return found

    def tab(self) -> WebElement:
        """Press Tab; returns what has the focus then."""
        ActionChains(self._driver, duration=0).send_keys(Keys.TAB).perform()
        return self._driver.switch_to.active_element

    def cookies(self) -> list[dict[str, Any]]:
        """All cookies, those that scripts cannot see among them."""
        found: list[dict[str, Any]] = self._driver.get_cookies()
        return found

    def errors(self) -> list[str]:
        """Errors and warnings of the console since the last call."""
        entries = self._driver.get_log("browser")
        return [e["message"] for e in entries if e["level"] in ("SEVERE", "WARNING")]

    def hosts(self) -> set[str]:
        """Hosts that pages have asked for anything since the last call."""
        asked = set()
        for entry in self._driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated"):
                params = message["params"]
                address = params.get("url") or params["request"]["url"]
                asked.add(address)
        return {
            urlsplit(url).netloc for url in asked if urlsplit(url).scheme not in ("data", "blob")
        }

    def forget(self) -> None:
        """Drop what was logged, and the session."""
        self.open("about:blank")
        self._driver.execute_cdp_cmd("Network.clearBrowserCookies", {})
        self.errors()
        self.hosts()

    def close(self) -> None:
        """End the browser."""
        self._driver.quit()

    def _emulate(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self._driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
