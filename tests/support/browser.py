"""A headless Chromium under test control, over its own debugging pipe: no driver, no socket, no package.

Import the fixture ``browser`` where a test file needs it; it skips where no Chromium is installed. Every ``Tab`` keeps
what the page wrote to the console, what it threw and what it asked the network for.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
#: A machine under load may take long to start a browser; none takes this long to answer.
SECONDS = 60.0
FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    # Tests run as root in containers, where the sandbox cannot start; the pages are our own.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-default-apps",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35, "PageUp": 33}
KEYS |= {"PageDown": 34, "Escape": 27, "Tab": 9, "Enter": 13}


def find_chromium() -> str | None:
    """The browser named by ``CHROMIUM``, or the first one installed."""
    given = os.environ.get("CHROMIUM")
    return given or next((found for name in NAMES if (found := shutil.which(name))), None)


class BrowserError(RuntimeError):
    """The browser refused a command, threw, or died."""


class Browser:
    """A running Chromium.

    Args:
        executable: The program.
        profile: An empty directory for its profile and its standard error.
    """

    def __init__(self, executable: str, profile: Path) -> None:
        commands, self._commands = os.pipe()
        self._answers, answers = os.pipe()
        # Chromium reads commands from descriptor 3 and writes answers to 4; the pipes' own ends must not be in the way.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (commands, answers)]
        self._log = profile / "stderr.log"
        self._pid: int | None = os.posix_spawn(
            executable,
            [executable, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            os.environ | {"HOME": str(profile)},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_OPEN, 2, str(self._log), os.O_WRONLY | os.O_CREAT, 0o600),
                (os.POSIX_SPAWN_DUP2, ends[0], 3),
                (os.POSIX_SPAWN_DUP2, ends[1], 4),
            ],
            # Its own group, so that its children end with it.
            setpgroup=0,
        )
        for end in (commands, answers, *ends):
            os.close(end)
        self._buffer = b""
        self._number = 0
        self.tabs: dict[str, Tab] = {}
        self.call("Browser.getVersion")

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Send a command of the DevTools protocol and wait for its answer; events on the way go to their tabs."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        self._send(json.dumps(message).encode() + b"\0")
        end = time.monotonic() + SECONDS
        while True:
            answer = self._read(end - time.monotonic())
            if answer is None:
                raise BrowserError(f"{method}: no answer within {SECONDS:.0f} s\n{self._said()}")
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def listen(self, seconds: float) -> None:
        """Take what the browser has to say; returns after one message, or when it stays silent."""
        self._read(seconds)

    @contextlib.contextmanager
    def tab(self) -> Iterator[Tab]:
        """A new tab with nothing of earlier ones, closed afterwards."""
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        tab = self.tabs[session] = Tab(self, session)
        try:
            for domain in ("Page", "Runtime", "Network", "Log"):
                tab.call(f"{domain}.enable")
            yield tab
        finally:
            del self.tabs[session]
            self.call("Target.disposeBrowserContext", browserContextId=context)

    def close(self) -> None:
        """End the browser and its children."""
        if self._pid is None:
            return
        with contextlib.suppress(BrowserError, OSError):
            self.call("Browser.close")
        end = time.monotonic() + 5
        while time.monotonic() < end and not os.waitpid(self._pid, os.WNOHANG)[0]:
            time.sleep(0.02)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self._pid, 0)
        os.close(self._commands)
        os.close(self._answers)
        self._pid = None

    def _send(self, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self._commands, data) :]
        except BrokenPipeError:
            raise BrowserError(f"the browser has ended\n{self._said()}") from None

    def _read(self, seconds: float) -> dict[str, Any] | None:
        end = time.monotonic() + seconds
        while b"\0" not in self._buffer:
            if not select.select([self._answers], [], [], max(0.0, end - time.monotonic()))[0]:
                return None
            data = os.read(self._answers, 1 << 20)
            if not data:
                raise BrowserError(f"the browser has ended\n{self._said()}")
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        if "method" in message and message.get("sessionId") in self.tabs:
            self.tabs[message["sessionId"]].took(message["method"], message["params"])
        return message

    def _said(self) -> str:
        return self._log.read_text(errors="replace")[-2000:] if self._log.exists() else ""


class Tab:
    """A page and what it did.

    Attributes:
        complaints: Console errors and warnings, refused content, and exceptions, in words.
        requests: Every URL asked for, the document itself first.
    """

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser = browser
        self._session = session
        self._loaded = False
        self.complaints: list[str] = []
        self.requests: list[str] = []

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command to this tab."""
        return self._browser.call(method, self._session, **parameters)

    def took(self, method: str, parameters: dict[str, Any]) -> None:
        """Note an event."""
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self.requests.append(parameters["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = parameters["exceptionDetails"]
            self.complaints.append((details.get("exception") or {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and parameters["type"] in ("error", "warning", "assert"):
            self.complaints.append(" ".join(str(a.get("value", a.get("description"))) for a in parameters["args"]))
        elif method == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
            self.complaints.append(parameters["entry"]["text"])

    def open(self, path: Path) -> None:
        """Load a file and wait until it is there."""
        self._loaded = False
        self.call("Page.navigate", url=path.resolve().as_uri())
        end = time.monotonic() + SECONDS
        while not self._loaded:
            if time.monotonic() > end:
                raise BrowserError(f"{path} did not load within {SECONDS:.0f} s")
            self._browser.listen(0.5)
        self.settle()

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression, through JSON."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise BrowserError(f"{expression}: {answer['exceptionDetails']['exception']['description']}")
        return answer["result"].get("value")

    def settle(self) -> None:
        """Wait until what was asked of the page is drawn."""
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(0))))")

    def size(self, width: int, height: int, *, phone: bool = False) -> None:
        """Set the window; a phone has touch and its own layout viewport."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.settle()

    def media(self, kind: str = "screen", *, dark: bool = False) -> None:
        """Set ``screen`` or ``print``, light or dark."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=kind, features=[scheme])
        self.settle()

    def centre(self, selector: str) -> tuple[float, float]:
        """Where the middle of the first match is in the window, scrolled into view."""
        found = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); if (!e) return null;"
            " e.scrollIntoView({block: 'center', behavior: 'instant'}); const b = e.getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        if found is None:
            raise BrowserError(f"nothing matches {selector}")
        return found[0], found[1]

    def point(self, selector: str) -> None:
        """Move the mouse onto an element."""
        x, y = self.centre(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.settle()

    def click(self, selector: str) -> None:
        """Click an element with the mouse."""
        x, y = self.centre(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.settle()

    def tap(self, selector: str) -> None:
        """Touch an element; the window must be a phone's."""
        x, y = self.centre(selector)
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        self.settle()

    def press(self, key: str) -> None:
        """Press a key that has a name."""
        about = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        self.call("Input.dispatchKeyEvent", type="rawKeyDown", **about)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)
        self.settle()

    def choose(self, selector: str, value: str) -> None:
        """Choose an option of a ``<select>``, as a reader would."""
        self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); e.value = {json.dumps(value)};"
            " e.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )
        self.settle()

    def text(self, selector: str) -> str:
        """The text of the first match as it is shown."""
        return self.run(f"document.querySelector({json.dumps(selector)}).innerText")

    def overflow(self) -> int:
        """By how many pixels the page is wider than the window."""
        return self.run("document.documentElement.scrollWidth - window.innerWidth")

    def screenshot(self, path: Path, *, whole: bool = True) -> bytes:
        """The page as PNG, written to a file."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        data = base64.b64decode(answer["data"])
        path.write_bytes(data)
        return data


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """One Chromium for all tests of a run; a test opens tabs of its own."""
    executable = find_chromium()
    if executable is None:
        pytest.skip("needs Chromium: apt install chromium, or set CHROMIUM to one")
    running = Browser(executable, tmp_path_factory.mktemp("chromium"))
    yield running
    running.close()
