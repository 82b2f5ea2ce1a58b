"""The browser of snapshots as people use it: looked at in the page, and checked in the kernel."""

from __future__ import annotations

from collections.abc import Callable

import nbformat
import pytest
from playwright.sync_api import Locator

from .pages import NotebookPage

_HOSTILE = "<img src=x onerror='window.__pwned=1'><script>window.__pwned=2</script>\"><svg onload=window.__pwned=3>"
_HOSTILE_LABEL = "<script>window.__defineGetter__('__pwned',Boolean)<b>"
_SETUP = """
%load_ext expstate
import torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

def total():
    return round(float(sum(p.detach().double().sum() for p in model.parameters())), 6)

def train():
    optimizer.zero_grad()
    loss = model(torch.randn(32, 8)).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()
"""
_TAKES = """
totals = []
for step in range(6):
    %snapshot take model optimizer --step step --metric loss=1/(step+1) --wait
    totals.append(total())
    train()
"""


def widget(page: NotebookPage) -> Locator:
    return page.page.get_by_test_id("expstate-browser").last


def rows(page: NotebookPage) -> Locator:
    return widget(page).get_by_test_id("row")


def part(page: NotebookPage, name: str) -> Locator:
    return widget(page).get_by_test_id(name)


def open_tensor(page: NotebookPage) -> None:
    """Go to the first tensor in the tree by the keyboard: right opens, and goes into what is open; enter looks into the rest."""
    part(page, "tree-row").first.focus()
    looked_into: list[str] = []

    def is_shown() -> bool:
        card = part(page, "card")
        if card.count() and "mean" in card.inner_text():
            return True
        row = widget(page).locator("[data-testid=tree-row]:focus")
        if not row.count():
            part(page, "tree-row").first.focus()
        elif row.get_attribute("aria-expanded") is not None:
            page.page.keyboard.press("ArrowRight")
        elif row.get_attribute("title") not in looked_into:
            looked_into.append(row.get_attribute("title") or "")
            page.page.keyboard.press("Enter")
            page.page.wait_for_timeout(1000)
        else:
            page.page.keyboard.press("ArrowDown")
        page.page.wait_for_timeout(100)
        return False

    page.until(is_shown)


@pytest.fixture
def browsing(open_notebook: Callable[..., NotebookPage]) -> Callable[..., NotebookPage]:
    """A function that opens a notebook with six takes and the browser below them."""

    def browse(*cells: str, takes: str = _TAKES, count: int = 6, **options: str) -> NotebookPage:
        page = open_notebook([_SETUP, takes, *cells, "%snapshot browse"], **options)
        page.run_all()
        page.until(lambda: rows(page).count() == count)
        return page

    return browse


@pytest.mark.parametrize(("app", "theme"), [("doc/tree", "light"), ("doc/tree", "dark"), ("notebooks", "light")])
def test_snapshots_are_filtered_sorted_selected_and_looked_into(browsing: Callable[..., NotebookPage], app: str, theme: str) -> None:
    page = browsing(app=app, theme=theme)

    part(page, "query").fill("loss < 0.3")
    page.until(lambda: rows(page).count() == 3)
    # An unfinished query keeps the rows and is marked.
    part(page, "query").fill("loss < ")
    part(page, "query-error").wait_for()
    assert 3 == rows(page).count()
    part(page, "query").fill("")
    page.until(lambda: rows(page).count() == 6)

    first = rows(page).first.inner_text()
    widget(page).get_by_role("columnheader").filter(has_text="loss").click()
    page.until(lambda: rows(page).first.inner_text() != first or rows(page).last.inner_text() != first)
    assert {"0.166667", "1"} & set(rows(page).first.inner_text().replace("\t", " ").split()) or "0.1667" in rows(page).first.inner_text()

    rows(page).first.click()
    part(page, "tab-objects").click()
    open_tensor(page)
    assert "mean" in part(page, "card").inner_text()
    page.screenshot(f"browser-{app.partition('/')[0]}-{theme}", widget(page))
    assert [] == page.faint(widget(page))


def test_two_are_compared(browsing: Callable[..., NotebookPage]) -> None:
    page = browsing()

    rows(page).nth(0).click()
    rows(page).nth(2).click(modifiers=["Control"])
    part(page, "diff").click()

    part(page, "diff-entries").wait_for()
    assert "model/0.weight" in part(page, "diff-entries").inner_text()
    part(page, "diff-facts").wait_for()
    page.screenshot("browser-diff", widget(page))


def test_restore_is_rehearsed_done_and_taken_back(browsing: Callable[..., NotebookPage]) -> None:
    page = browsing()
    before = page.value("total()")

    widget(page).get_by_role("columnheader").filter(has_text="step").click()
    page.page.wait_for_timeout(300)
    order = rows(page).first.inner_text()
    rows(page).first.click()
    part(page, "restore").click()
    page.until(lambda: part(page, "restore-run").is_enabled())
    assert "model" in part(page, "restore-preview").inner_text()
    assert before == page.value("total()")
    page.screenshot("browser-restore", widget(page))

    part(page, "restore-run").click()
    page.until(lambda: page.value("total()") != before)
    assert page.value("total() in totals"), order

    page.until(lambda: part(page, "restore-undo").is_enabled())
    part(page, "restore-undo").click()
    page.until(lambda: page.value("total()") == before)


def test_take_appears_by_itself(browsing: Callable[..., NotebookPage]) -> None:
    page = browsing()

    page.run("%snapshot take model --name newest --wait")

    page.until(lambda: "newest" in rows(page).first.inner_text())


def test_hostile_names_are_text_in_the_browser(browsing: Callable[..., NotebookPage]) -> None:
    takes = f"""
from expstate import Snapshot, StateDict
evil, label = {_HOSTILE!r}, {_HOSTILE_LABEL!r}
for value in (0, 1):
    state = StateDict(**{{evil: torch.zeros(100) + value, "plain": torch.ones(10), "text": evil}})
    labels = {{"name": label, "tags": [label], "note": evil}}
    Snapshot.take(f"snapshot-{{value}}", {{"state": state}}, metrics={{"loss": 0.5}}, params={{"lr": evil}}, **labels)
"""
    page = browsing(takes=takes, count=2)

    rows(page).nth(0).click()
    for tab in ("overview", "objects", "restore"):
        part(page, f"tab-{tab}").click()
        page.page.wait_for_timeout(400)
    rows(page).nth(1).click(modifiers=["Control"])
    part(page, "tab-diff").click()
    part(page, "diff-entries").wait_for()

    assert "<script>window.__defineGetter__" in rows(page).first.inner_text()
    assert 0 == widget(page).locator("img, script, iframe").count()
    assert page.script("window.__pwned === undefined")
    page.save()
    page.page.reload()
    page.wait_idle()
    page.page.wait_for_timeout(500)
    assert page.script("window.__pwned === undefined")


@pytest.mark.parametrize("whose", ["own", "someone else's"])
def test_saved_notebook_shows_the_table(
    browsing: Callable[..., NotebookPage], open_notebook: Callable[..., NotebookPage], whose: str
) -> None:
    page = browsing()
    assert not page.output(2).get_by_text("6 snapshots", exact=True).first.is_visible()  # the widget stands in its place
    saved = page.save()

    page.shut_down()  # the kernel is gone
    if whose != "own":  # another hand was at the file, so Jupyter does not trust it
        saved.cells[0].source += "\n# changed"
        nbformat.write(saved, page.path)
    again = open_notebook(page.path)
    table = again.output(2).locator(".expstate-browser-static table tbody tr")
    table.first.wait_for()
    assert 6 == table.count()
    again.screenshot(f"browser-saved-{whose.partition(' ')[0]}")


def test_restore_during_a_busy_cell_waits_for_its_end(browsing: Callable[..., NotebookPage]) -> None:
    page = browsing()
    rows(page).last.click()
    part(page, "restore").click()
    page.until(lambda: part(page, "restore-run").is_enabled())

    cell = page.run("import time\nbefore = total()\ntime.sleep(3)\nafter = total()\nprint('end')", wait=False)
    page.page.wait_for_timeout(700)
    part(page, "restore-run").click()
    page.until(lambda: "end" in page.output_text(cell))

    assert page.value("before == after")
    page.until(lambda: page.value("total() != after"))
    assert page.value("total() in totals")


def test_browser_is_an_app(open_notebook: Callable[..., NotebookPage]) -> None:
    page = open_notebook([_SETUP, _TAKES, "%snapshot browse"], app="voila")

    page.until(lambda: rows(page).count() == 6, seconds=40)
    page.screenshot("browser-voila")
