"""A Jupyter server and a browser for the tests here, all of which are ``slow``.

``open_notebook(cells)`` gives a ``NotebookPage``. Where chromium is missing these tests are skipped, but not in CI.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, sync_playwright

from .pages import NotebookPage
from .servers import JupyterServer

# Nothing but loopback is reached, and the browser asks nobody for news.
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder start programs that want much of the machine."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of Debian's browser."""
    found = shutil.which("chromium")
    if found is None:
        reason = "chromium is not installed: run .ci/install-chromium"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture(scope="session")
def jupyter_server(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    """One server for all tests."""
    server = JupyterServer(tmp_path_factory.mktemp("jupyter"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    """One browser for the tests of a module: while it is open, no other event loop can run in this thread."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_notebook(jupyter_server: JupyterServer, browser: Browser, tmp_path: Path) -> Iterator[Callable[..., NotebookPage]]:
    """A function that opens a new notebook with the given cells. At the end no page may have asked for anything from outside, or failed."""
    screenshots = Path(os.environ.get("BROWSER_SCREENSHOTS") or tmp_path)
    screenshots.mkdir(parents=True, exist_ok=True)
    opened: list[NotebookPage] = []

    def open_it(cells: list[str] | Path, *, app: str = "doc/tree", theme: str = "light") -> NotebookPage:
        path = cells if isinstance(cells, Path) else jupyter_server.write(cells)
        opened.append(NotebookPage(browser, jupyter_server, path, screenshots))
        return opened[-1].open_voila() if app == "voila" else opened[-1].open(app=app, theme=theme)

    yield open_it

    for page in opened:
        page.close()
    assert [] == [url for page in opened for url in page.foreign]
    assert [] == [error for page in opened for error in page.errors]
