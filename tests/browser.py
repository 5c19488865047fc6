"""Headless Chromium for tests, driven over its DevTools protocol by two pipes: no driver program, no port, no package.

with browser(folder) as page:
    page.open(url)
    page.wait("document.querySelector('h1')")
    page.type("#input", "hi")
    page.press("Enter")
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

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --remote-debugging-pipe --window-size=1200,800 about:blank"
).split()
SECONDS = 20.0  # for what must come true
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, "")}


def find_browser() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A page of a browser that keeps its profile in `folder` and is gone at the end."""
    # Chromium reads commands from descriptor 3 and writes to 4. Ours lie above both, so that neither is overwritten.
    low = [*os.pipe(), *os.pipe()]
    commands_in, commands, answers, answers_out = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in low)
    for end in low:
        os.close(end)
    actions = [(os.POSIX_SPAWN_DUP2, commands_in, 3), (os.POSIX_SPAWN_DUP2, answers_out, 4)]
    actions += [(os.POSIX_SPAWN_OPEN, number, os.devnull, os.O_WRONLY, 0) for number in (1, 2)]
    program = find_browser()
    told = [program, f"--user-data-dir={folder}", *FLAGS]
    process = os.posix_spawn(program, told, os.environ, file_actions=actions, setsid=True)
    os.close(commands_in)
    os.close(answers_out)
    try:
        yield Page(commands, answers)
    finally:
        os.close(commands)
        os.close(answers)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)


class Page:
    """The one page of a browser. Everything is asked over the pipe, and answered in order."""

    def __init__(self, commands: int, answers: int):
        self._commands, self._answers = commands, answers
        self._read = b""
        self._count = 0
        self._session: str | None = None
        self.events: list[dict] = []  # of the protocol, not yet looked at
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict:
        """The result of a command of the protocol. Raises RuntimeError where it is refused."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._commands, data) :]
        while (answer := self._next(method)).get("id") != self._count:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def event(self, method: str) -> dict:
        """What the browser tells with an event, which may still have to come."""
        while (found := next((each for each in self.events if each["method"] == method), None)) is None:
            self.events.append(self._next(method))
        self.events.remove(found)
        return found["params"]

    def _next(self, waiting_for: str) -> dict:
        while b"\0" not in self._read:
            if not select.select([self._answers], [], [], SECONDS)[0]:
                raise TimeoutError(f"the browser did not answer {waiting_for} in {SECONDS:g} seconds")
            if not (data := os.read(self._answers, 1 << 20)):
                raise RuntimeError(f"the browser ended before it answered {waiting_for}")
            self._read += data
        message, _, self._read = self._read.partition(b"\0")
        return json.loads(message)

    def evaluate(self, expression: str) -> Any:
        """The value of an expression (a promise is awaited). Raises RuntimeError with what it threw."""
        found = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in found:
            details = found["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description", details["text"]))
        return found["result"].get("value")

    def wait(self, condition: str) -> Any:
        """Waits until an expression is true, and returns its value. The page itself looks, at every frame and timer."""
        script = f"""new Promise((resolve) => {{
            const end = performance.now() + {1000 * SECONDS / 2};
            const look = () => {{
              let value = false;
              try {{ value = {condition}; }} catch {{}}
              if (value || performance.now() > end) resolve(value instanceof Node || value); else setTimeout(look, 10);
            }};
            look();
        }})"""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            try:
                value = self.evaluate(script)
            except RuntimeError as error:  # the page was left while it looked
                if "navigat" not in str(error) and "context" not in str(error):
                    raise
                continue
            if value:
                return value
            break
        shown = self.evaluate("document.body.innerText")
        raise AssertionError(f"it did not come true: {condition}\nThe page shows:\n{shown}")

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def reload(self) -> None:
        """Loads the page anew; returns when the old one is gone."""
        self.evaluate("window.isOld = true")
        self.call("Page.reload")
        self.wait("!window.isOld && document.readyState === 'complete'")

    def click(self, selector: str) -> None:
        """Clicks an element where it is seen: what covers it would get the click."""
        found = self.wait(f"""(() => {{
            const element = document.querySelector({json.dumps(selector)});
            element.scrollIntoView({{block: "nearest"}});
            const box = element.getBoundingClientRect();
            const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
            const top = document.elementFromPoint(x, y);
            return element.contains(top) && !element.disabled && [x, y];
        }})()""")
        self.click_at(*found)

    def click_at(self, x: float, y: float) -> None:
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            button = "none" if kind == "mouseMoved" else "left"
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button=button, clickCount=1)

    def type(self, selector: str, text: str) -> None:
        """Puts a text where the one of a field was, as a keyboard does."""
        field = f"document.querySelector({json.dumps(selector)})"
        self.wait(f"({field}.focus(), {field}.select(), document.activeElement === {field})")
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False, ctrl: bool = False) -> None:
        code, text = KEYS.get(key, (ord(key.upper()[0]), ""))
        held = {"key": key, "modifiers": 8 * shift + 2 * ctrl, "windowsVirtualKeyCode": code}
        held["code"] = key if key in KEYS else f"Key{key.upper()}"
        self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", text=text, **held)
        self.call("Input.dispatchKeyEvent", type="keyUp", **held)

    def resize(self, width: int, height: int) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def prefer(self, scheme: str) -> None:
        """The system's colours: light or dark. Nothing moves: what does is drawn at every frame."""
        wanted = {"prefers-color-scheme": scheme, "prefers-reduced-motion": "reduce"}
        features = [{"name": name, "value": value} for name, value in wanted.items()]
        self.call("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def faults(self) -> list[str]:
        """What the page has thrown or the browser has complained of since it was last asked."""
        self.evaluate("0")
        found = []
        for event in self.events:
            match event["method"], event["params"]:
                case "Runtime.exceptionThrown", {"exceptionDetails": details}:
                    found.append(details.get("exception", {}).get("description", details["text"]))
                case "Log.entryAdded", {"entry": entry} if entry["level"] == "error":
                    found.append(f"{entry['text']} {entry.get('url', '')}")
        self.events.clear()
        return found
