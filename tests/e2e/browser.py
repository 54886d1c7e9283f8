"""A headless Chromium, told what to do over two pipes.

Chrome's DevTools protocol as JSON messages that end with a NUL, which needs no
library: https://chromedevtools.github.io/devtools-protocol/
"""

import base64
import contextlib
import json
import os
import pathlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

_NAMES = (
  *("chromium-headless-shell", "chromium", "chromium-browser"),
  *("google-chrome", "chrome"),
)
_TIMEOUT_SECONDS = 120.0


def find() -> str | None:
  """The program: `$CHROMIUM`, or what is on PATH."""
  named = os.environ.get("CHROMIUM")
  return named or next(filter(None, map(shutil.which, _NAMES)), None)


class Page:
  """A tab. Whatever is asked of it is waited for, and fails after a while."""

  def __init__(self, commands: Any, answers: Any) -> None:
    self._commands, self._answers = commands, answers
    self._number, self._session = 0, None
    target = self._call("Target.createTarget", url="about:blank")["targetId"]
    self._session = self._call(
      "Target.attachToTarget", targetId=target, flatten=True
    )["sessionId"]
    self._call("Page.enable")

  def open(self, url: str, *, width: int, height: int) -> None:
    """Goes to a page, in a window of that many pixels."""
    self._call(
      "Emulation.setDeviceMetricsOverride",
      **{"width": width, "height": height},
      **{"deviceScaleFactor": 1, "mobile": False},
    )
    self._call("Page.navigate", url=url)

  def value(self, script: str) -> Any:
    """What an expression of JavaScript comes to, as JSON holds it."""
    said = self._call("Runtime.evaluate", expression=script, returnByValue=True)
    assert "exceptionDetails" not in said, said
    return said["result"].get("value")

  def wait_for(self, script: str) -> Any:
    """The value of an expression as soon as it is true to JavaScript."""
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while not (value := self.value(script)):
      assert time.monotonic() < deadline, f"never true: {script}"
      time.sleep(0.2)
    return value

  def screenshot(self) -> bytes:
    """The window as a PNG."""
    said = self._call("Page.captureScreenshot", format="png")
    return base64.b64decode(said["data"])

  def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
    self._number += 1
    message = {"id": self._number, "method": method, "params": parameters}
    if self._session:
      message["sessionId"] = self._session
    self._commands.write(json.dumps(message).encode() + b"\0")
    self._commands.flush()
    while True:
      answer = json.loads(self._read())
      if answer.get("id") == self._number:  # The rest are events.
        assert "error" not in answer, answer
        return answer["result"]

  def _read(self) -> bytes:
    parts = []
    while (part := self._answers.read(1)) != b"\0":
      assert part, "Chromium is gone"
      parts.append(part)
    return b"".join(parts)


@contextlib.contextmanager
def page(program: str, log: pathlib.Path) -> Iterator[Page]:
  """A tab of a browser of its own, which ends with the context.

  Args:
    program: Chromium.
    log: Where its own words go.
  """
  commands_end, commands = os.pipe()
  answers, answers_end = os.pipe()
  with (
    tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
    log.open("wb") as stderr,
  ):
    # Chromium reads at 3 and writes at 4.
    process = subprocess.Popen(
      ["bash", "-c", f'exec "$@" 3<&{commands_end} 4>&{answers_end}', "bash"]
      + [
        *(program, "--headless", "--no-sandbox", "--remote-debugging-pipe"),
        *("--disable-gpu", "--hide-scrollbars", "--no-first-run"),
        f"--user-data-dir={profile}",
      ],
      pass_fds=(commands_end, answers_end),
      stdout=stderr,
      stderr=stderr,
    )
    os.close(commands_end)  # The child's alone, or no end is ever seen.
    os.close(answers_end)
    try:
      with os.fdopen(commands, "wb") as sent, os.fdopen(answers, "rb") as said:
        yield Page(sent, said)
    finally:
      process.kill()
      process.wait()
