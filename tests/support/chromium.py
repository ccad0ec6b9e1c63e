"""A headless Chromium, by the DevTools protocol over a pipe.

For tests of pages: no driver and no package is needed, only the browser, which
is found on the path.
"""

import base64
import contextlib
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

_NAMES = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
  "--headless",
  "--no-sandbox",  # root in a container
  "--disable-gpu",
  "--disable-quic",
  "--disable-dev-shm-usage",
  "--disable-background-networking",
  "--disable-component-update",
  "--disable-extensions",
  "--disable-sync",
  "--hide-scrollbars",
  "--no-first-run",
  "--remote-debugging-pipe",
)
# The browser reads from descriptor 3 and writes to 4.
_LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
_PATIENCE = 60  # seconds; a busy machine starts a browser slowly


def find() -> str | None:
  """The browser's path, None where there is none."""
  return next(filter(None, map(shutil.which, _NAMES)), None)


class Tab:
  """A page in the browser, and all that it said and asked for.

  Attributes:
    requests: The URLs of all requests, `data:` ones too.
    complaints: Console messages, log entries and exceptions.
  """

  def __init__(self, to_browser: int, from_browser: int) -> None:
    self.requests: list[str] = []
    self.complaints: list[str] = []
    self._to, self._from = to_browser, from_browser
    self._buffer, self._number, self._session = b"", 0, None
    self._loaded = False
    target = self.call("Target.createTarget", url="about:blank")["targetId"]
    self._session = self.call(
      "Target.attachToTarget", targetId=target, flatten=True
    )["sessionId"]
    for domain in ("Page", "Network", "Log", "Runtime"):
      self.call(f"{domain}.enable")

  def call(self, method: str, **parameters: Any) -> dict[str, Any]:
    """Calls a method of the protocol and waits for what it returns."""
    self._number += 1
    message = {"id": self._number, "method": method, "params": parameters}
    if self._session is not None:
      message["sessionId"] = self._session
    os.write(self._to, json.dumps(message).encode() + b"\0")
    deadline = time.monotonic() + _PATIENCE
    while True:
      answer = self._read(deadline)
      if answer.get("id") == self._number:
        assert "error" not in answer, (method, answer["error"])
        return answer["result"]

  def _read(self, deadline: float) -> dict[str, Any]:
    """The next message; events are noted."""
    while b"\0" not in self._buffer:
      wait = max(0.0, deadline - time.monotonic())
      ready, _, _ = select.select([self._from], [], [], wait)
      assert ready, "the browser does not answer"
      piece = os.read(self._from, 1 << 20)
      assert piece, "the browser has ended"
      self._buffer += piece
    text, self._buffer = self._buffer.split(b"\0", 1)
    message = json.loads(text)
    found = message.get("params", {})
    match message.get("method"):
      case "Network.requestWillBeSent":
        self.requests.append(found["request"]["url"])
      case "Log.entryAdded":
        self.complaints.append(found["entry"]["text"])
      case "Runtime.consoleAPICalled" | "Runtime.exceptionThrown":
        self.complaints.append(json.dumps(found))
      case "Page.loadEventFired":
        self._loaded = True
    return message

  def open(self, path: pathlib.Path) -> str:
    """Opens a file, waits until it has loaded, and returns its URL."""
    self._loaded = False
    url = path.resolve().as_uri()
    self.call("Page.navigate", url=url)
    deadline = time.monotonic() + _PATIENCE
    while not self._loaded:
      self._read(deadline)
    return url

  def resize(self, width: int, height: int) -> None:
    """Sets the size of the window, in CSS pixels."""
    self.call(
      "Emulation.setDeviceMetricsOverride",
      width=width,
      height=height,
      deviceScaleFactor=1,
      mobile=False,
    )

  def set_scheme(self, scheme: str) -> None:
    """Prefers "dark" or "light"."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    self.call("Emulation.setEmulatedMedia", features=[feature])

  def evaluate(self, expression: str) -> Any:
    """The value of an expression in JavaScript."""
    found = self.call(
      "Runtime.evaluate",
      expression=expression,
      returnByValue=True,
      awaitPromise=True,
    )
    assert "exceptionDetails" not in found, found
    return found["result"]["value"]

  def screenshot(self, *, whole: bool = False) -> bytes:
    """A PNG of the window, or of the whole page."""
    found = self.call("Page.captureScreenshot", captureBeyondViewport=whole)
    return base64.b64decode(found["data"])

  def pdf(self) -> bytes:
    """The page as it would be printed."""
    found = self.call("Page.printToPDF", printBackground=False)
    return base64.b64decode(found["data"])


@contextlib.contextmanager
def tab(profile: pathlib.Path) -> Iterator[Tab]:
  """A fresh browser with one page.

  Args:
    profile: An empty directory for what the browser writes.
  """
  browser = find()
  assert browser is not None
  read_here, write_there = os.pipe()
  read_there, write_here = os.pipe()
  process = subprocess.Popen(
    [
      sys.executable,
      "-c",
      _LAUNCH,
      str(read_there),
      str(write_there),
      browser,
      *_FLAGS,
      f"--user-data-dir={profile}",
    ],
    pass_fds=(read_there, write_there),
    stdin=subprocess.DEVNULL,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  os.close(read_there)
  os.close(write_there)
  try:
    yield Tab(write_here, read_here)
  finally:
    os.close(write_here)  # the browser ends when its pipe does
    try:
      process.wait(10)
    except subprocess.TimeoutExpired:
      process.kill()
      process.wait()
    os.close(read_here)
