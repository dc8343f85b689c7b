"""A headless Chromium, spoken to through a pipe in its DevTools protocol. Nothing it opens reaches a network."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from pathlib import Path
from types import TracebackType
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 60.0
"""Seconds that an answer may take, on a machine with much else to do."""
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--disable-dev-shm-usage", "--remote-debugging-pipe", "--window-size=1000,900", "about:blank",
)  # fmt: skip

CONTRAST = """
(() => {
  const parts = c => c.match(/[\\d.]+/g).map(Number);
  const light = c => parts(c).slice(0, 3).map(v => v / 255)
    .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if ((parts(c)[3] ?? 1) > 0) return c;
    }
    return "rgb(255, 255, 255)";
  };
  const poor = [];
  for (const e of document.querySelectorAll("body *")) {
    if (e.closest("script") || ![...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())) continue;
    if (e.matches(".on, title")) continue;  // on an area of its own
    const style = getComputedStyle(e), svg = e instanceof SVGElement;
    const [a, b] = [light(svg ? style.fill : style.color), light(behind(svg ? e.closest("figure") : e))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push([e.outerHTML.slice(0, 80), ratio]);
  }
  return poor;
})()
"""
"""A script that lists text that stands out from what is behind it by less than WCAG 2.2 asks (1.4.3)."""


class Browser:
    """One page; what it writes to its console, and what it asks of a network, is noted."""

    def __enter__(self) -> Browser:
        assert CHROMIUM is not None
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # Chromium reads descriptor 3 and writes 4; from above them, so that neither is closed by the other.
        theirs = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 20) for descriptor in (to_read, to_write)]
        moved = f"import os, sys; os.dup2({theirs[0]}, 3); os.dup2({theirs[1]}, 4); os.execv(sys.argv[1], sys.argv[1:])"
        command = [sys.executable, "-c", moved, CHROMIUM, *OPTIONS]
        command.insert(-1, f"--user-data-dir={self._profile.name}")
        self._process = subprocess.Popen(
            command, pass_fds=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        for descriptor in (to_read, to_write, *theirs):
            os.close(descriptor)
        self._number, self._rest, self._session = 0, b"", ""
        self.events: list[dict[str, Any]] = []
        target = next(each for each in self.ask("Target.getTargets")["targetInfos"] if each["type"] == "page")
        attached = self.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._read)
        os.close(self._write)
        self._profile.cleanup()

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command; events that come before it are kept."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def open(self, path: Path) -> None:
        """Open a file, and wait until it is there."""
        self.events.clear()
        self.ask("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._next())

    def run(self, script: str) -> Any:
        """The value of a script's last expression."""
        answer = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press a key: Tab or Enter."""
        code = {"Tab": 9, "Enter": 13}[key]
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    def scheme(self, name: str) -> None:
        """Prefer ``light`` or ``dark``."""
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def picture(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        shot = self.ask("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def printed(self) -> bytes:
        """The page as a PDF, of the size that the page's own style asks for."""
        answer = self.ask("Page.printToPDF", preferCSSPageSize=True, printBackground=False)
        return base64.b64decode(answer["data"])

    def said(self) -> list[dict[str, Any]]:
        """What was written to the console, errors among it."""
        kinds = ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded")
        return [event for event in self.events if event.get("method") in kinds]

    def requests(self) -> list[str]:
        """The addresses that were asked for."""
        sent = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]

    def _next(self) -> dict[str, Any]:
        end = time.monotonic() + PATIENCE
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, end - time.monotonic()))
            assert ready, "Chromium does not answer"
            found = os.read(self._read, 1 << 20)
            assert found, "Chromium has ended"
            self._rest += found
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        return message


def text_of_pages(pdf: bytes) -> list[str]:
    """What each page of Chromium's PDF says, in the order in which it is painted."""
    objects = {int(n): body for n, body in re.findall(rb"(?:^|\n)(\d+) 0 obj\n(.*?)\nendobj", pdf, re.DOTALL)}

    def referred(body: bytes, name: bytes) -> int:
        found = re.search(name + rb" (\d+) 0 R", body)
        assert found is not None
        return int(found[1])

    def stream(body: bytes) -> str:
        found = re.search(rb"stream\n(.*?)\nendstream", body, re.DOTALL)
        assert found is not None
        return zlib.decompress(found[1]).decode("latin-1")

    def letters(font: int) -> dict[str, str]:
        """Glyph -> what it stands for."""
        table = stream(objects[referred(objects[font], b"/ToUnicode")])
        found = {glyph: chr(int(code, 16)) for glyph, code in re.findall(r"^<(\w{4})> <(\w{4})>$", table, re.MULTILINE)}
        for first, last, code in re.findall(r"^<(\w{4})> <(\w{4})> <(\w{4})>$", table, re.MULTILINE):
            for n in range(int(last, 16) - int(first, 16) + 1):
                found[f"{int(first, 16) + n:04X}"] = chr(int(code, 16) + n)
        return found

    pages = []
    for body in objects.values():
        if re.search(rb"/Type\s*/Page\b", body):
            fonts = {
                f"F{int(n)}": letters(int(n)) for n in re.findall(rb"/F\d+ (\d+) 0 R", body.partition(b"/Font")[2])
            }
            said, font = [], {}
            for name, glyphs, end in re.findall(
                r"/(F\d+) \S+ Tf|<(\w+)> Tj|\b(ET)\b", stream(objects[referred(body, b"/Contents")])
            ):
                font = fonts[name] if name else font
                said += [font.get(glyphs[at : at + 4], "?") for at in range(0, len(glyphs), 4)]
                said += ["\n"] if end else []
            pages.append("".join(said))
    return pages
