"""A real browser for tests of the report: headless Chromium, driven over its DevTools pipe."""

import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
]
SECONDS = 60

# Chromium reads commands on descriptor 3 and answers on 4; both are moved there before it starts.
LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3]]
os.dup2(ends[0], 3)
os.dup2(ends[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""

HELPERS = """
const $ = (selector) => [...document.querySelectorAll(selector)];
const visible = (node) => node.checkVisibility();
const shownIds = () => $(".task").filter(visible).map((n) => n.querySelector("h2").textContent);
const frames = () => new Promise((done) =>
  requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done, 50))));
const pixel = (canvas, x, y, w, h) => [...canvas.getContext("2d").getImageData(
  Math.round((x + 0.5) * canvas.width / w), Math.round((y + 0.5) * canvas.height / h), 1, 1,
).data].slice(0, 3);
"""


class Browser:
    """One Chromium and one tab of it; ``problems`` collects errors and network requests."""

    DESKTOP, PHONE = (1280, 900), (390, 844)

    def __init__(self, profile: Path):
        read_command, self.write_fd = os.pipe()
        self.read_fd, write_answer = os.pipe()
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-c", LAUNCH, str(read_command), str(write_answer)),
                *(CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"),
            ],
            pass_fds=(read_command, write_answer),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_command)
        os.close(write_answer)
        self.buffer = b""
        self.last_id = 0
        self.session = None
        self.problems: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params):
        """One command; its result. Events that come before it are looked at on the way."""
        self.last_id += 1
        message = {"id": self.last_id, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write_fd, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.receive(method)
            if answer.get("id") == self.last_id:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]
            self.watch(answer)

    def receive(self, awaited: str):
        deadline = time.monotonic() + SECONDS
        while b"\0" not in self.buffer:
            ready, _, _ = select.select([self.read_fd], [], [], deadline - time.monotonic())
            assert ready, f"no answer to {awaited} in {SECONDS} s"
            chunk = os.read(self.read_fd, 1 << 16)
            assert chunk, f"Chromium ended before it answered {awaited}"
            self.buffer += chunk
        line, self.buffer = self.buffer.split(b"\0", 1)
        return json.loads(line)

    def watch(self, event):
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(params["exceptionDetails"]["text"])
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.problems.append(params["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            url = params["request"]["url"]
            if not url.startswith(("file:", "about:")):
                self.problems.append(f"request for {url}")

    def open(self, page: Path, address: str = "", size=DESKTOP, dark: bool = False):
        """Load ``page`` afresh in a window of ``size`` and wait until it is drawn."""
        self.problems.clear()
        phone = size == self.PHONE
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=size[0],
            height=size[1],
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=page.as_uri() + address)
        deadline = time.monotonic() + SECONDS
        loaded = f"location.href.startsWith({json.dumps(page.as_uri())}) && document.readyState"
        while self.value(loaded) != "complete":
            assert time.monotonic() < deadline, f"{page} did not load in {SECONDS} s"
            time.sleep(0.02)
        self.value("document.fonts.ready.then(() => true)")
        self.ask("await frames(); return true;")

    def value(self, expression: str):
        got = self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in got, got["exceptionDetails"]
        return got["result"].get("value")

    def ask(self, body: str):
        """What the function of this body returns on the page."""
        return self.value(f"(async () => {{ {HELPERS} {body} }})()")

    def press(self, key: str):
        self.call("Input.dispatchKeyEvent", type="keyDown", key=key, text=key)
        self.call("Input.dispatchKeyEvent", type="keyUp", key=key)
        self.ask("await frames(); return true;")

    def click(self, selector: str):
        """A mouse click in the middle of the element, wherever that hits."""
        x, y = self.ask(
            f"const b = $({json.dumps(selector)})[0].getBoundingClientRect();"
            "return [b.x + b.width / 2, b.y + b.height / 2];"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
        self.ask("await frames(); return true;")

    def close(self):
        self.session = None
        self.call("Browser.close")
        self.process.wait(timeout=SECONDS)
        os.close(self.write_fd)
        os.close(self.read_fd)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium for the tests of one file, which are skipped where there is none."""
    if CHROMIUM is None:
        pytest.skip("Chromium is absent: apt-get install -y chromium to run these tests")
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()
