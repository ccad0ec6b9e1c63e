"""A headless Chromium for tests of pages, by Selenium.

Needs the browser and its driver on the path; nothing is downloaded.
"""

import base64
import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

os.environ["SE_OFFLINE"] = "true"
os.environ["SE_AVOID_STATS"] = "true"

_OWN_PAGES = ("chrome:", "chrome-untrusted:", "about:")
_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
  "--headless",
  "--no-sandbox",  # root in a container
  "--disable-gpu",
  "--disable-dev-shm-usage",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-extensions",
  "--disable-sync",
  "--hide-scrollbars",
  "--no-first-run",
)


class Tab:
  """The page in a browser.

  Attributes:
    driver: The browser, for all that is not here.
  """

  def __init__(self, driver: webdriver.Chrome) -> None:
    self.driver = driver

  def open(self, path: pathlib.Path) -> str:
    """Opens a file, waits until it has loaded, and returns its URL."""
    self.requests()
    self.complaints()
    url = path.resolve().as_uri()
    self.driver.get(url)
    return url

  def requests(self) -> list[str]:
    """Returns the URLs requested since the last call, `data:` ones too."""
    messages = [
      json.loads(entry["message"])["message"]
      for entry in self.driver.get_log("performance")
    ]
    return [
      message["params"]["request"]["url"]
      for message in messages
      if message["method"] == "Network.requestWillBeSent"
      # The browser's own first page does not count.
      and not message["params"]["documentURL"].startswith(_OWN_PAGES)
    ]

  def complaints(self) -> list[str]:
    """Returns the console messages and errors since the last call."""
    return [entry["message"] for entry in self.driver.get_log("browser")]

  def resize(self, width: int, height: int) -> None:
    """Sets the size of the window, in CSS pixels; any width, unlike Chrome."""
    self._call(
      "Emulation.setDeviceMetricsOverride",
      width=width,
      height=height,
      deviceScaleFactor=1,
      mobile=False,
    )

  def set_scheme(self, scheme: str) -> None:
    """Makes the page prefer "dark" or "light"."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    self._call("Emulation.setEmulatedMedia", features=[feature])

  def evaluate(self, expression: str) -> Any:
    """Returns the value of an expression in JavaScript."""
    return self.driver.execute_script(f"return {expression.strip()}")

  def screenshot(self, *, whole: bool = False) -> bytes:
    """Returns a PNG of the window, or of the whole page."""
    found = self._call("Page.captureScreenshot", captureBeyondViewport=whole)
    return base64.b64decode(found["data"])

  def pdf(self) -> bytes:
    """Returns the page as it would be printed."""
    return base64.b64decode(self.driver.print_page())

  def _call(self, command: str, **parameters: Any) -> Any:
    return self.driver.execute_cdp_cmd(command, parameters)


@contextlib.contextmanager
def tab(profile: pathlib.Path) -> Iterator[Tab]:
  """Starts a browser with one page, or skips the test where there is none.

  Args:
    profile: Empty directory for what the browser writes.

  Yields:
    The page.
  """
  browser = next(filter(None, map(shutil.which, _NAMES)), None)
  driver = shutil.which("chromedriver")
  if browser is None or driver is None:
    missing = "Chromium" if browser is None else "chromedriver"
    pytest.skip(f"no {missing} on the path: nobody has looked at the page")
  options = webdriver.ChromeOptions()
  options.binary_location = browser
  for flag in (*_FLAGS, f"--user-data-dir={profile}"):
    options.add_argument(flag)
  options.set_capability(
    "goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"}
  )
  chrome = webdriver.Chrome(options, Service(executable_path=driver))
  try:
    chrome.get("about:blank")  # leaves the first page, which goes on loading
    yield Tab(chrome)
  finally:
    chrome.quit()
