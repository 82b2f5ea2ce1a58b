"""A notebook open in a browser: what a person does with it, and what the page and the kernel then say."""

from __future__ import annotations

import ast
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
from playwright.sync_api import Browser, Locator, Page, Request

from .servers import JupyterServer

_OF_VOILA = (
    "https://cdn.jsdelivr.net/npm/@fortawesome/",
    "https://cdnjs.cloudflare.com/ajax/libs/mathjax/",
    "https://cdn.jsdelivr.net/npm/mathjax",
)
_MILLISECONDS = 30_000
# The page's own mark lies before the kernel is attached.
_READY = """() => {
    const panel = window.jupyterapp?.shell?.currentWidget;
    const kernel = panel?.sessionContext?.session?.kernel;
    return kernel?.connectionStatus === "connected" && kernel.status === "idle" && panel.content.model !== null;
}"""
_VALUE = """async (expression) => {
    const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
    const content = {code: "", silent: true, user_expressions: {value: expression}, allow_stdin: false};
    return (await kernel.requestExecute(content).done).content.user_expressions.value;
}"""
_APPEND = """(source) => {
    const notebook = window.jupyterapp.shell.currentWidget.content;
    const cells = notebook.model.sharedModel;
    cells.insertCell(cells.cells.length, {cell_type: "code", source});
    return cells.cells.length - 1;
}"""
# The texts of an element, and of those in it, whose contrast with what lies behind them is too small, as WCAG counts it.
_FAINT = """([root, wanted]) => {
    const paint = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
    const channels = (text) => {  // whatever the notation, color-mix included
        paint.clearRect(0, 0, 1, 1);
        paint.fillStyle = text;
        paint.fillRect(0, 0, 1, 1);
        const [r, g, b, alpha] = paint.getImageData(0, 0, 1, 1).data;
        return [r, g, b, alpha / 255];
    };
    const over = (top, below) => {
        const share = top[3] ?? 1;
        return [0, 1, 2].map((n) => top[n] * share + below[n] * (1 - share));
    };
    const behind = (element) => {
        if (element === null) return [255, 255, 255];
        const own = channels(getComputedStyle(element).backgroundColor);
        return (own[3] ?? 1) === 1 ? own.slice(0, 3) : over(own, behind(element.parentElement));
    };
    const luminance = (color) => {
        const [r, g, b] = color.map((c) => (c / 255 <= 0.03928 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const found = [];
    for (const element of [root, ...root.querySelectorAll("*")]) {
        if (![...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.textContent.trim())) continue;
        if (element.getClientRects().length === 0) continue;
        const below = behind(element);
        const style = getComputedStyle(element);
        const own = channels(element instanceof SVGElement ? style.fill : style.color);
        own[3] = (own[3] ?? 1) * (element instanceof SVGElement ? Number(style.fillOpacity) : 1) * Number(style.opacity);
        const lights = [luminance(over(own, below)), luminance(below)].sort((a, b) => b - a);
        const contrast = (lights[0] + 0.05) / (lights[1] + 0.05);
        if (contrast < wanted && !element.disabled) found.push(`${contrast.toFixed(2)} ${element.textContent.trim().slice(0, 60)}`);
    }
    return found;
}"""
_SELECT = "(index) => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = index; }"
_COMMAND = "async ([command, wait]) => { const done = window.jupyterapp.commands.execute(command); if (wait) await done; }"
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}


class NotebookPage:
    """A notebook in JupyterLab, or in Notebook 7 with ``app="notebooks"``.

    Attributes
    ----------
    page : playwright.sync_api.Page
        For all that is not here.
    path : pathlib.Path
        The notebook on the disk; its folder is the kernel's working folder, and the catalog is in it.
    foreign : list of str
        What the page asked of other machines, but for what Voila's own template asks. Nothing is answered.
    errors : list of str
        Errors of scripts in the page since it was opened.
    """

    def __init__(self, browser: Browser, server: JupyterServer, path: Path, screenshots: Path) -> None:
        self._screenshots = screenshots
        self._server = server
        self.path = path
        self.foreign: list[str] = []
        self.errors: list[str] = []
        # Drawn twice as fine, as on most screens of today.
        self._context = browser.new_context(viewport={"width": 1280, "height": 1000}, device_scale_factor=2)
        self.page: Page = self._context.new_page()
        self.page.set_default_timeout(_MILLISECONDS)
        self.page.on("request", self._note_request)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _note_request(self, request: Request) -> None:
        if not request.url.startswith((self._server.url, self._server.url.replace("http", "ws", 1), "data:", "blob:", *_OF_VOILA)):
            self.foreign.append(request.url)

    def open(self, *, app: str = "doc/tree", theme: str = "light") -> NotebookPage:
        """Open the notebook and wait until its kernel is attached."""
        relative = self.path.relative_to(self._server.root).as_posix()
        self.page.goto(f"{self._server.url}/{app}/{relative}?token={self._server.token}&reset")
        self.wait_idle()
        self.theme(theme)
        self.errors.clear()  # those of the app's own beginning are its own
        return self

    def open_voila(self) -> NotebookPage:
        """Open the notebook as an app: all cells are run, only what they show is there."""
        relative = self.path.relative_to(self._server.root).as_posix()
        self.page.goto(f"{self._server.url}/voila/render/{relative}?token={self._server.token}")
        return self

    def close(self) -> None:
        self._context.close()

    # What a person does.

    def theme(self, name: str) -> None:
        """Change to the ``light`` or the ``dark`` theme."""
        self.page.evaluate("(theme) => window.jupyterapp.commands.execute('apputils:change-theme', {theme})", THEMES[name])
        # Not at once: the style sheet of the theme is loaded first.
        self.page.wait_for_selector(f"body[data-jp-theme-name='{THEMES[name]}']", state="attached")

    def run_all(self, *, wait: bool = True) -> None:
        """Run all cells, and wait until the last has ended."""
        self._execute("notebook:run-all-cells", wait=wait)

    def run(self, source: str, *, wait: bool = True) -> int:
        """Add a cell at the end and run it; gives its number, from 0."""
        index: int = self.page.evaluate(_APPEND, source)
        self.page.evaluate(_SELECT, index)
        self._execute("notebook:run-cell", wait=wait)
        return index

    def save(self) -> nbformat.NotebookNode:
        """Save the notebook; gives what is then on the disk."""
        self._execute("docmanager:save", wait=True)
        return nbformat.read(self.path, as_version=4)

    def shut_down(self) -> None:
        """End the kernel, and with it all that widgets hold."""
        self.page.evaluate("async () => { await window.jupyterapp.shell.currentWidget.sessionContext.shutdown(); }")

    def _execute(self, command: str, *, wait: bool) -> None:
        self.page.evaluate(_COMMAND, [command, wait])
        if wait:
            self.wait_idle()

    def wait_idle(self) -> None:
        """Wait until the kernel has nothing to do."""
        self.page.wait_for_function(_READY)

    # What is then there.

    def output(self, index: int) -> Locator:
        """What a cell has shown."""
        return self.page.locator(".jp-Notebook .jp-Cell").nth(index).locator(".jp-OutputArea").first

    def output_text(self, index: int) -> str:
        """The text of what a cell has shown, as a person sees it."""
        return self.output(index).inner_text()

    def value(self, expression: str) -> Any:
        """The value in the kernel of an expression that is a literal; waits for the cell that runs, and is no cell itself."""
        answer = self.page.evaluate(_VALUE, expression)
        assert "ok" == answer["status"], answer.get("evalue")
        return ast.literal_eval(answer["data"]["text/plain"])

    def faint(self, part: Locator, contrast: float = 4.5) -> list[str]:
        """The texts in this part of the page with less contrast than people need; it goes from 1 to 21."""
        found: list[str] = part.evaluate(f"(root) => ({_FAINT})([root, {contrast}])")
        return found

    def script(self, expression: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        return self.page.evaluate(expression)

    def until(self, condition: Callable[[], object], *, seconds: float = 20) -> None:
        """Let the page go on until ``condition`` holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"the condition did not come to hold within {seconds} s"
            self.page.wait_for_timeout(50)

    def screenshot(self, name: str, part: Locator | None = None) -> Path:
        """A picture of the page, or of a part of it; where it goes is said by ``BROWSER_SCREENSHOTS``."""
        file = self._screenshots / f"{name}.png"
        if part is None:
            self.page.screenshot(path=file)
        else:
            part.screenshot(path=file)
        return file
