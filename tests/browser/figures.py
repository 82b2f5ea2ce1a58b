"""How long a person waits for the browser in JupyterLab: ``python -m tests.browser.figures``, on a quiet machine.

Prints the seconds of each repeat and their median. What the kernel alone needs is measured by ``expstate bench notebook``.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from playwright.sync_api import Browser, sync_playwright

from expstate import Catalog, Snapshot, StateDict, settings
from expstate.bench.catalog_fill import fill

from .conftest import FLAGS
from .pages import NotebookPage
from .servers import JupyterServer

RECORDS = 10_000
TENSORS = 10_000
REPEATS = 5
_SETUP = """
import os
import torch
os.environ["EXPSTATE_CATALOG"] = {catalog!r}
os.environ["EXPSTATE_PROJECT"] = "figures"
%load_ext expstate
"""
# Each gives seconds, from what a person does to what they then see drawn.
_UNTIL = """async ([act, seen]) => {
    const root = document.querySelector("[data-testid=expstate-browser]");
    const begin = performance.now();
    (new Function("root", act))(root);
    const isSeen = new Function("root", `return (${seen})`);
    while (!isSeen(root)) {
        if (performance.now() - begin > 20000) throw new Error(`not seen: ${seen} in ${root.textContent.slice(0, 300)}`);
        await new Promise((done) => requestAnimationFrame(done));
    }
    await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
    return (performance.now() - begin) / 1000;
}"""
_TYPE = """const input = root.querySelector("[data-testid=query]");
input.value = {query!r};
input.dispatchEvent(new Event("input"));"""
_LAST = """[...root.querySelectorAll("[data-testid=row]")]
    .some((row) => row.dataset.id && Number(row.getAttribute("aria-rowindex")) === {count})"""
_FIRST_RUN = """async () => {
    const begin = performance.now();
    window.jupyterapp.commands.execute("notebook:run-cell");
    while (!document.querySelector("[data-testid=row]")) await new Promise((done) => requestAnimationFrame(done));
    return (performance.now() - begin) / 1000;
}"""


def _prepared(folder: Path) -> Path:
    """A catalog of many records, and a snapshot of many tensors."""
    catalog = Catalog(folder / "catalog.db")
    fill(catalog, RECORDS, project="figures")
    state = StateDict({f"layers.{number}.weight": torch.full((256,), float(number)) for number in range(TENSORS)})
    with settings.override(project="figures"):
        Snapshot.take(folder / "wide", {"model": state}, name="wide", metrics={"loss": -1.0}, catalog=catalog, progress=False)
    catalog.close()
    return folder / "catalog.db"


def _one(browser: Browser, server: JupyterServer, catalog: Path, screenshots: Path) -> dict[str, float]:
    """All of them once, in a kernel of its own."""
    page = NotebookPage(browser, server, server.write([_SETUP.format(catalog=str(catalog))]), screenshots).open()
    page.run_all()
    page.page.evaluate(
        """() => { const notebook = window.jupyterapp.shell.currentWidget.content, cells = notebook.model.sharedModel;
        cells.insertCell(1, {cell_type: "code", source: "%snapshot browse"}); notebook.activeCellIndex = 1; }"""
    )

    def until(act: str, seen: str) -> float:
        found: float = page.page.evaluate(_UNTIL, [act, seen])
        return found

    count = 'root.querySelector("[data-testid=count]").textContent'
    found = {"from run to rows": page.page.evaluate(_FIRST_RUN)}
    page.wait_idle()
    found["filter"] = until(_TYPE.format(query="loss < 0.5"), f'{count}.includes(" of 10,001")')
    found["filter taken away"] = until(_TYPE.format(query=""), f'{count}.startsWith("10,001")')
    found["sort"] = until(
        "root.querySelector(\"[data-testid='sort-metric.loss']\").click()",
        'root.querySelector("[data-testid=\'sort-metric.loss\']").getAttribute("aria-sort") === "ascending" '
        '&& root.querySelector("[data-testid=row]")?.textContent.includes("wide")',
    )
    found["scroll to the last row"] = until('root.querySelector("[data-testid=table]").scrollTop = 1e9', _LAST.format(count=RECORDS + 1))
    page.page.evaluate("document.querySelector('[data-testid=table]').scrollTop = 0")
    page.page.locator("[data-testid=row]").first.click()
    page.page.locator("[data-testid=pane] dl").first.wait_for()
    found["open 10,000 tensors"] = until(
        'root.querySelector("[data-testid=tab-objects]").click()', 'root.querySelectorAll("[data-testid=tree-row]").length > 1'
    )
    page.screenshot("figures")
    page.close()
    return found


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    server = JupyterServer(folder)
    try:
        catalog = _prepared(folder)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
            rounds = [_one(browser, server, catalog, folder) for _ in range(REPEATS)]
            browser.close()
    finally:
        server.close()
    for name in rounds[0]:
        seconds = [one[name] for one in rounds]
        sys.stdout.write(f"{name:24} {statistics.median(seconds):6.3f}   {'  '.join(f'{one:.3f}' for one in seconds)}\n")
    sys.stdout.write(f"the page at the end: {folder / 'figures.png'}\n")


if __name__ == "__main__":
    main()
