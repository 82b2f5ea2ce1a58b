"""The notebook that the tests open is a real one in a real browser, and what it is asked is true."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .pages import NotebookPage


@pytest.mark.parametrize("app", ["doc/tree", "notebooks"])
def test_cells_run_and_their_output_is_seen(open_notebook: Callable[..., NotebookPage], app: str) -> None:
    page = open_notebook(["import os\nnumber = 40 + 2\nprint('said', number)", "os.getcwd()"], app=app)

    page.run_all()

    assert "said 42" == page.output_text(0).strip()
    assert str(page.path.parent) in page.output_text(1)
    assert 42 == page.value("number")
    assert "84" in page.output_text(page.run("number * 2"))
    assert str(page.path.parent) == page.value("os.path.dirname(os.path.dirname(os.environ['EXPSTATE_CATALOG']))")
    assert "said 42\n" == page.save().cells[0].outputs[0].text


def test_notebook_runs_as_an_app(open_notebook: Callable[..., NotebookPage]) -> None:
    page = open_notebook(["print('said', 40 + 2)"], app="voila")

    page.page.get_by_text("said 42").wait_for()


def test_scripts_of_strangers_would_be_noticed(open_notebook: Callable[..., NotebookPage]) -> None:
    """The negative control of all tests that look for ``window.__pwned``."""
    page = open_notebook(["from IPython.display import HTML\nHTML('<img src=x onerror=\"window.__pwned = 1\"><b>drawn</b>')"])
    page.run("from IPython.display import Javascript\nJavascript('window.__pwned = 1')")

    page.until(lambda: page.script("window.__pwned === 1"))
