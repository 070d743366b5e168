"""A browser without a window, for the tests of pages: Debian's Chromium, through Selenium.

Selenium's wheel has 12 MB and speaks to Debian's own driver. Playwright's has 53 MB, with a Node.js in it,
and expects a Chromium that it downloads.
"""

import base64
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SCREENSHOTS = Path(os.environ.get("WANDA_SCREENSHOTS", ROOT / "build" / "screenshots"))
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
HEIGHT = 900


class Browser:
    """One tab. `logs` and `requests` return what has come since they were last asked."""

    def __init__(self, driver):
        self.driver = driver

    def look(self, width: int, scheme: str) -> None:
        """Set the window's width, and whether the user prefers "light" or "dark" pages."""
        size = {"width": width, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def open(self, file: Path) -> None:
        self.driver.get(file.as_uri())

    def js(self, body: str, *arguments):
        """What the JavaScript returns."""
        return self.driver.execute_script(body, *arguments)

    def next_frame(self) -> None:
        """Wait until what follows the window's size has followed it."""
        self.driver.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")

    def logs(self) -> list[str]:
        """Console messages, uncaught errors and refused requests."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> set[str]:
        """Addresses of what pages asked for, data in the address left out."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [each["params"] for each in messages if each["method"] == "Network.requestWillBeSent"]
        return {each["request"]["url"] for each in sent if not each["request"]["url"].startswith("data:")}

    def screenshot(self, name: str) -> None:
        """Keep a picture of the whole page."""
        width, height = self.js("return [innerWidth, document.documentElement.scrollHeight]")
        whole = {"clip": {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}}
        taken = self.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"captureBeyondViewport": True, **whole}
        )
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        (SCREENSHOTS / f"{name}.png").write_bytes(base64.b64decode(taken["data"]))


@contextmanager
def browser() -> Iterator[Browser]:
    """Context with a browser; the test is skipped where there is none."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no Chromium: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
        started.execute_cdp_cmd("Network.enable", {})
        started.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
        yield Browser(started)
    finally:
        started.quit()
