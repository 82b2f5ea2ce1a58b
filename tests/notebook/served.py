"""The browser in a plain page, without Jupyter: a small server between the page's model and a real widget.

``python -m tests.notebook.served`` from the project's folder shows one with made-up snapshots. After the URL ``?dark`` gives a dark page,
``?width=600`` a narrow one, ``?jupyter`` the colours of JupyterLab's theme.
"""

from __future__ import annotations

import json
import queue
import tempfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import expstate.notebook.browser as package

STATIC = Path(package.__file__).parent / "static"

PAGE = """<!doctype html><meta charset="utf-8"><title>browser</title><link rel="icon" href="data:,">
<link rel="stylesheet" href="browser.css">
<body><div id="here"></div>
<script type="module">
import widget from "./browser.js";
const asked = new URLSearchParams(location.search);
document.body.style.cssText = `margin:24px;background:${asked.has("dark") ? "#15171b" : "#eceef1"}`;
if (asked.has("jupyter")) {
  const dark = asked.has("dark");
  const names = {"layout-color1": ["#fff", "#212121"], "layout-color2": ["#eee", "#424242"], "border-color2": ["#e0e0e0", "#616161"],
    "ui-font-color1": ["rgba(0,0,0,.87)", "rgba(255,255,255,1)"], "ui-font-color2": ["rgba(0,0,0,.54)", "rgba(255,255,255,.7)"]};
  for (const [name, values] of Object.entries(names)) document.documentElement.style.setProperty(`--jp-${name}`, values[Number(dark)]);
}
const here = document.getElementById("here");
here.style.width = `${asked.get("width") ?? 1120}px`;
const listeners = new Set();
const state = {query: asked.get("query") ?? "", selected: []};
const model = {
  get: (name) => state[name], set: (name, value) => { state[name] = value; }, save_changes: () => { window.saved = {...state}; },
  on: (_, callback) => listeners.add(callback), off: (_, callback) => listeners.delete(callback),
  send: (message) => fetch("send", {method: "POST", body: JSON.stringify(message)}),
};
const events = new EventSource("events");
events.onmessage = (event) => { const message = JSON.parse(event.data); listeners.forEach((callback) => callback(message, [])); };
events.onopen = () => { if (!window.stop_) window.stop_ = widget.render({model, el: here}); };
</script>"""


class Served:
    """A widget on a page at ``url``."""

    def __init__(self, widget: Any, port: int = 0) -> None:
        self._widget = widget
        self._outgoing: list[queue.Queue[str | None]] = []
        self.sent: list[dict[str, Any]] = []
        widget.send = self._send
        served = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                name = self.path.partition("?")[0].strip("/")
                if name == "events":
                    served._stream(self)
                elif name in {"browser.js", "browser.css"}:
                    self._answer((STATIC / name).read_bytes(), "text/javascript" if name.endswith("js") else "text/css")
                else:
                    self._answer(PAGE.encode(), "text/html")

            def do_POST(self) -> None:
                message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                served._widget._receive(None, message, [])
                self._answer(b"{}", "application/json")

            def _answer(self, body: bytes, kind: str) -> None:
                self.send_response(200)
                self.send_header("Content-Type", f"{kind}; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _send(self, message: dict[str, Any]) -> None:
        text = json.dumps(message, allow_nan=False)
        self.sent.append(message)
        for one in tuple(self._outgoing):
            one.put(text)

    def _stream(self, handler: BaseHTTPRequestHandler) -> None:
        mine: queue.Queue[str | None] = queue.Queue()
        self._outgoing.append(mine)
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.send_header("Cache-Control", "no-store")
        handler.end_headers()
        handler.wfile.write(b": begin\n\n")
        handler.wfile.flush()
        try:
            while (text := mine.get()) is not None:
                handler.wfile.write(f"data: {text}\n\n".encode())
                handler.wfile.flush()
        except OSError:
            pass
        finally:
            self._outgoing.remove(mine)

    def close(self) -> None:
        for one in self._outgoing:
            one.put(None)
        self._server.shutdown()
        self._server.server_close()


def main() -> None:
    from expstate import settings

    from .experiment import made

    folder = tempfile.mkdtemp()
    with settings.override(project="tests"):
        widget = made(Path(folder))
        print(Served(widget, 8765).url, flush=True)  # noqa: T201 - for the person who opens it
        while True:
            time.sleep(3600)


if __name__ == "__main__":
    main()
