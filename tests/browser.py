"""A real browser for tests: headless Chromium over its DevTools pipe, with nothing but the standard library."""

import base64
import fcntl
import json
import os
import re
import select
import shutil
import signal
import time
import zlib
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 60.0


def find_chromium() -> str | None:
    """The browser on this machine, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Chromium:
    """One headless browser with one page.

    Args:
        path: The program.
        folder: For its profile.

    Attributes:
        said: Console messages, errors and warnings of the browser.
        requested: Every address that was asked for.
    """

    def __init__(self, path: str, folder: Path):
        ours, theirs = _pipe(), _pipe()
        options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe",
                   "--no-first-run", "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
                   f"--user-data-dir={folder}")  # fmt: skip
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
        # Chromium reads commands from descriptor 3 and answers on 4.
        # The log comes first: it may itself be one of the two.
        places = ((log, 1), (log, 2), (ours[0], 3), (theirs[1], 4))
        actions = [(os.POSIX_SPAWN_DUP2, *place) for place in places]
        environment = {**os.environ, "HOME": str(folder)}
        self._process = os.posix_spawn(path, [path, *options], environment, file_actions=actions, setsid=True)
        for descriptor in (ours[0], theirs[1], log):
            os.close(descriptor)
        self._out, self._in = ours[1], theirs[0]
        self._buffer, self._last = b"", 0
        self._session = None
        self.said: list[str] = []
        self.requested: list[str] = []
        self._seen: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Audits"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params) -> dict:
        """Send a command and return its result."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        os.write(
            self._out, json.dumps({**message, **({"sessionId": self._session} if self._session else {})}).encode() + b"\0"
        )
        while True:
            answer = self._read(method)
            if answer.get("id") == self._last:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _read(self, waiting_for: str) -> dict:
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._in], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the browser did not answer: {waiting_for}"
            part = os.read(self._in, 1 << 20)
            assert part, f"the browser has ended: {waiting_for}"
            self._buffer += part
        first, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(first)
        self._note(message.get("method"), message.get("params", {}))
        return message

    def _note(self, event: str | None, params: dict) -> None:
        self._seen.append(event or "")
        if event == "Runtime.consoleAPICalled":
            self.said.append(f"{params['type']}: {[part.get('value') for part in params['args']]}")
        elif event == "Runtime.exceptionThrown":
            self.said.append(f"exception: {params['exceptionDetails']}")
        elif event == "Log.entryAdded":
            self.said.append(f"{params['entry']['level']}: {params['entry']['text']}")
        elif event == "Audits.issueAdded":
            self.said.append(f"issue: {params['issue']}")
        elif event == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])

    def open(self, path: Path, width: int = 1100, height: int = 900, dark: bool = False, scale: float = 1.0) -> None:
        """Load a file and wait until it is loaded."""
        self.said.clear()
        self.requested.clear()
        self.media(dark=dark)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False)
        self._seen.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while "Page.loadEventFired" not in self._seen:
            self._read("load")

    def media(self, dark: bool = False, kind: str = "") -> None:
        """Ask for light or dark, screen or print."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=kind, features=[scheme])

    def ask(self, expression: str):
        """Value of an expression in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def point(self, selector: str) -> None:
        """Move the mouse over the middle of an element."""
        place = self.ask(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.scrollIntoView({{block: 'center'}});"
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=place[0], y=place[1])

    def press(self, key: str) -> None:
        """Press a key."""
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)

    def picture(self, path: Path, whole: bool = True) -> Path:
        """A screenshot of the page."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]))
        return path

    def pdf(self, path: Path) -> Path:
        """The page as it is printed, on A4."""
        made = self.call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69, printBackground=False)
        path.write_bytes(base64.b64decode(made["data"]))
        return path

    def close(self) -> None:
        """End the browser and everything it has started."""
        os.close(self._out)
        os.close(self._in)
        os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)


def pdf_texts(pdf: bytes) -> list[int]:
    """Number of pieces of text on every page of a PDF that Chromium has written."""
    objects = {int(found[1]): found[2] for found in re.finditer(rb"(?ms)^(\d+) 0 obj\s(.*?)\sendobj", pdf)}
    pages = [each for each in objects.values() if re.search(rb"/Type /Page\b(?!s)", each)]
    found = []
    for page in pages:
        content = objects[int(re.search(rb"/Contents (\d+) 0 R", page)[1])]
        stream = re.search(rb"(?s)stream\r?\n(.*)\r?\nendstream", content)[1]
        found.append(len(re.findall(rb"T[jJ]\b", zlib.decompress(stream))))
    return found


def _pipe() -> tuple[int, int]:
    """A pipe whose descriptors are out of the way of 3 and 4."""
    ends = os.pipe()
    moved = tuple(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return moved
