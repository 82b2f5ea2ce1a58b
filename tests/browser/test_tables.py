"""What the library's objects show in a notebook, with and without the magic: tables that a person reads and nothing that acts."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .pages import NotebookPage

_HOSTILE = "<img src=x onerror='window.__pwned=1'><script>window.__pwned=2</script>\"><svg onload=window.__pwned=3>"
# What has to be a ref holds none of @ : = /
_HOSTILE_LABEL = "<script>window.__defineGetter__('__pwned',Boolean)<b>"
_TAKE_TWO = f"""
import torch, expstate
from expstate import Snapshot, StateDict, Catalog
evil, label = {_HOSTILE!r}, {_HOSTILE_LABEL!r}
state = StateDict(**{{evil: torch.zeros(100), "plain": torch.ones(10), "text": evil}})
Snapshot.take("one", {{"state": state}}, name=label, note=evil, tags=[label], metrics={{"loss": 0.5}}, params={{"lr": evil}})
state[evil] += 1
state["text"] = evil + "!"
two = Snapshot.take("two", {{"state": state}}, name="second " + label, metrics={{"loss": 0.25}})
"""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_hostile_names_are_text_in_every_table(open_notebook: Callable[..., NotebookPage], theme: str) -> None:
    cells = [
        _TAKE_TWO,
        "records = Catalog().search()\nrecords",
        "Snapshot('one').diff(Snapshot('two'), stats=True)",
        "two",
        "two.restore({'state': state}, dry_run=True)",
        "two.verify()",
        "Catalog().lineage('latest')",
    ]
    page = open_notebook(cells, theme=theme)

    page.run_all()

    assert "<script>window.__defineGetter__" in page.output_text(1)
    assert "onerror='window.__pwned=1'" in page.output_text(2)
    for index in range(1, len(cells)):
        assert page.output_text(index).strip(), cells[index]
        assert 0 == page.output(index).locator("img, script, svg[onload], iframe").count()
    page.page.wait_for_timeout(300)
    assert page.script("window.__pwned === undefined")
    assert 2 == page.output(1).locator("table tbody tr").count()
    page.screenshot(f"tables-{theme}")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_of_tables_can_be_read_in_the_theme(open_notebook: Callable[..., NotebookPage], theme: str) -> None:
    page = open_notebook([_TAKE_TWO, "Catalog().search()", "Snapshot('one').diff(Snapshot('two'))"], theme=theme)

    page.run_all()

    for index in (1, 2):
        assert 1 <= page.output(index).locator("table").count()
        assert [] == page.faint(page.output(index).locator(".jp-OutputArea-output").first)


def test_long_take_shows_a_progress_widget_which_goes(open_notebook: Callable[..., NotebookPage]) -> None:
    slow = """
import os, time, torch
from expstate import Snapshot, StateDict
from expstate.storage import local
os.environ["EXPSTATE_PROGRESS_DELAY_SECONDS"] = "0"
from expstate.progress import Progress
add = Progress.add
def slowly(self, nbytes):
    time.sleep(0.5)
    add(self, nbytes)
Progress.add = slowly
Snapshot.take("slow", {"state": StateDict(x=torch.zeros(8 << 20))})
print("end")
"""
    page = open_notebook([slow])

    page.run_all(wait=False)

    page.output(0).locator(".widget-hprogress, .jupyter-widget-hprogress, .progress-bar").first.wait_for()
    assert "take" in page.output_text(0)
    page.until(lambda: "end" in page.output_text(0))
    page.wait_idle()
    page.until(lambda: "B/s" not in page.output_text(0))


def test_magic_takes_lists_compares_and_puts_back(open_notebook: Callable[..., NotebookPage]) -> None:
    cells = [
        "%load_ext expstate\nimport torch\nmodel = torch.nn.Linear(4, 2)\nloss = 0.5",
        "%snapshot take model --metric loss -m 'before' --wait",
        "with torch.no_grad():\n    model.weight += 1\nchanged = float(model.weight.sum())",
        "%snapshot diff latest --stats",
        "%snapshot restore latest --dry-run",
        "between = float(model.weight.sum())",
        "%snapshot restore latest",
        "back = float(model.weight.sum())",
        "%snapshot undo",
        "%snapshot list",
        "%snapshot restore nothing-of-this-name",
    ]
    page = open_notebook(cells)

    page.run_all()

    changed, between, back = page.value("(changed, between, back)")
    assert (changed, 8) == (between, round(changed - back))
    assert changed == page.value("float(model.weight.sum())")
    assert "model/weight" in page.output_text(3)
    assert "loss=0.5" in page.output(9).locator("table").inner_text()
    # One line, no traceback.
    assert "UsageError" in page.output_text(10)
    assert "Traceback" not in page.output_text(10)
