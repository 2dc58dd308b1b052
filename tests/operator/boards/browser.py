"""Headless Chromium, led over its DevTools protocol."""

from __future__ import annotations

import base64
import itertools
import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import websocket

from tests.runtime.server_process import wait_until

__all__ = ["Page", "browser"]

Object = dict[str, Any]
_FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-port=0")


class Page:
    """One tab. `complaints` collects what its console and the network said: errors, warnings, exceptions, files that are missing."""

    def __init__(self, address: str) -> None:
        self._socket = websocket.create_connection(address, timeout=30, suppress_origin=True)
        self._numbers = itertools.count(1)
        self.complaints: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> Object:
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message: Object = json.loads(self._socket.recv())
            if message.get("id") == number:
                assert "error" not in message, (method, message["error"])
                result: Object = message["result"]
                return result
            self._note(message)

    def _note(self, message: Object) -> None:
        method, about = message.get("method"), message.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = about["exceptionDetails"]
            self.complaints.append(f"exception: {details.get('exception', {}).get('description', details['text'])}")
        elif method == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            said = " ".join(str(item.get("value", item.get("description", ""))) for item in about["args"])
            self.complaints.append(f"console, {about['type']}: {said}")
        elif method == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{about['entry']['level']}: {about['entry']['text']} {about['entry'].get('url', '')}")

    def open(self, url: str, width: int, height: int) -> None:
        """In a window of this many pixels: some components draw only what is inside."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=url)

    def wait_value(self, expression: str, timeout_s: float = 120.0) -> Any:
        """The expression's first value that is not undefined."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"]
            if result["type"] != "undefined":
                return result["value"]
            time.sleep(0.2)
        raise AssertionError(f"{expression} has no value after {timeout_s:.0f} s; {self.complaints}")

    def screenshot(self, path: Path) -> None:
        """Down to the end of what the page shows, however long that is."""
        bottom = self.wait_value("document.querySelector('.grid')?.getBoundingClientRect().bottom ?? innerHeight")
        clip = {"x": 0, "y": 0, "scale": 1, "width": self.wait_value("innerWidth"), "height": bottom + 16}
        image = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(image))

    def close(self) -> None:
        self._socket.close()


@contextmanager
def browser(program: str, folder: Path) -> Iterator[Page]:
    """A page of a browser of its own, whose profile lies in `folder`."""
    profile = folder / "profile"
    with (folder / "browser.log").open("w") as log:
        process = subprocess.Popen([program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"], stdout=log, stderr=log)
    port = profile / "DevToolsActivePort"
    try:
        wait_until(lambda: port.exists() and bool(port.read_text().strip()), timeout_s=60, what="the browser is up")
        pages = httpx.get(f"http://127.0.0.1:{port.read_text().split()[0]}/json").json()
        page = Page(next(item["webSocketDebuggerUrl"] for item in pages if item["type"] == "page"))
        yield page
        page.close()
    finally:
        process.terminate()
        process.wait(20)
