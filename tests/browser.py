"""A browser for tests: Chromium by chromedriver's HTTP interface, at a width and in a colour scheme
of our choosing. Not there: the test is skipped.
"""

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

import pytest

QUIET = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "hide-scrollbars")
QUIET += ("disable-background-networking", "disable-component-update", "disable-sync")


class Browser:
    def __init__(self, port: int):
        self.root = f"http://127.0.0.1:{port}"

    def ask(self, path: str, **body):
        data = json.dumps(body).encode()
        request = urllib.request.Request(
            self.root + path, data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]

    def start(self, binary: str, profile: Path) -> None:
        arguments = [f"--{name}" for name in (*QUIET, f"user-data-dir={profile}")]
        capabilities = {
            "goog:chromeOptions": dict(binary=binary, args=arguments),
            "goog:loggingPrefs": dict(browser="ALL", performance="ALL"),
        }
        session = self.ask("/session", capabilities=dict(alwaysMatch=capabilities))
        self.root += f"/session/{session['sessionId']}"

    def cdp(self, command: str, **params):
        return self.ask("/goog/cdp/execute", cmd=command, params=params)

    def open(self, page: Path, width: int = 1200, scheme: str = "light", height: int = 900) -> None:
        feature = dict(name="prefers-color-scheme", value=scheme)
        self.cdp("Emulation.setEmulatedMedia", features=[feature])
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.cdp("Emulation.setDeviceMetricsOverride", **size)
        self.ask("/url", url=page.resolve().as_uri())

    def run(self, script: str):
        return self.ask("/execute/sync", script=script, args=[])

    def log(self, kind: str) -> list[dict]:
        """kind: browser (the console) or performance (requests); empties it."""
        return self.ask("/se/log", type=kind)

    def requests(self) -> list[str]:
        """Addresses asked for since the last call."""
        events = (json.loads(entry["message"])["message"] for entry in self.log("performance"))
        sent = (e for e in events if e["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]

    def picture(self, path: Path, height: int | None = None) -> None:
        """The whole page, or its upper part, as png."""
        width = self.run("return innerWidth")
        height = height or self.run("return document.documentElement.scrollHeight")
        clip = dict(x=0, y=0, width=width, height=height, scale=1)
        options = dict(format="png", captureBeyondViewport=True, clip=clip)
        path.write_bytes(b64decode(self.cdp("Page.captureScreenshot", **options)["data"]))


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """folder: where the profile goes."""
    driver = shutil.which("chromedriver")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    if not (driver and binary):
        pytest.skip("no chromium with chromedriver")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        [driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        found = Browser(port)
        deadline = time.monotonic() + 60
        while True:
            try:
                found.start(binary, folder / "profile")
                break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.2)
        yield found
        urllib.request.urlopen(urllib.request.Request(found.root, method="DELETE"), timeout=60)
    finally:
        process.terminate()
        process.wait()
