"""The page itself in a real browser, with a real widget behind it, but without Jupyter."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser as Chromium
from playwright.sync_api import expect

from expstate import Catalog, Snapshot, StateDict, settings
from expstate.bench.catalog_fill import fill
from expstate.notebook.browser.widget import Browser
from tests.notebook.experiment import kernel_of, made
from tests.notebook.served import Served

HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'


class Opened:
    """A page with the widget on it."""

    def __init__(self, page: Any, widget: Browser, screenshots: Path) -> None:
        self.page = page
        self.widget = widget
        self._screenshots = screenshots

    def part(self, name: str) -> Any:
        return self.page.locator(f"[data-testid='{name}']")

    def row(self, text: str) -> Any:
        return self.part("row").filter(has_text=text).first

    def names(self) -> list[str]:
        found: list[str] = self.page.locator("[data-testid=row] .name > :first-child").all_text_contents()
        return found

    def ask(self, query: str) -> None:
        self.part("query").fill(query)

    def screenshot(self, name: str) -> None:
        """A picture of the widget; where it goes is said by ``BROWSER_SCREENSHOTS``. Those in the README are made so."""
        self.page.mouse.move(0, 0)
        self.page.locator(".exps").screenshot(path=self._screenshots / f"{name}.png")


@pytest.fixture
def show(browser: Chromium, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    """Open a page with a widget; what goes wrong in its scripts fails the test."""
    screenshots = Path(os.environ.get("BROWSER_SCREENSHOTS") or tmp_path)
    with settings.override(project="tests"):
        opened: list[tuple[Any, Served, list[str]]] = []

        def begin(widget: Browser, asked: str = "", width: int = 1180) -> Opened:
            served, errors = Served(widget), []
            page = browser.new_page(viewport={"width": width, "height": 700}, device_scale_factor=1.5)
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.set_default_timeout(15_000)
            opened.append((page, served, errors))
            page.goto(served.url + asked)
            page.wait_for_selector("[data-testid=row]")
            return Opened(page, widget, screenshots)

        yield begin
        for page, served, errors in opened:
            page.close()
            served.close()
            served._widget.close()
            assert [] == errors


@pytest.fixture
def experiment(tmp_path: Path) -> Browser:
    with settings.override(project="tests"):
        return made(tmp_path)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    catalog = Catalog(tmp_path_factory.mktemp("sweep") / "catalog.db")
    fill(catalog, 10_000, project="tests")
    return catalog


@pytest.fixture
def large(sweep: Catalog, tmp_path: Path) -> Browser:
    kernel = kernel_of(tmp_path)
    kernel._catalog = sweep
    with settings.override(project="tests"):
        return Browser(kernel)


def test_filter_sort_and_scroll_to_the_last_of_ten_thousand(show: Callable[..., Opened], large: Browser):
    opened = show(large)
    expect(opened.part("count")).to_contain_text("10,000")
    opened.part("sort-metric.loss").click()
    expect(opened.part("sort-metric.loss")).to_have_attribute("aria-sort", "ascending")
    opened.ask("loss < 0.5")
    expect(opened.part("count")).to_contain_text("of 10,000")
    opened.page.evaluate("document.querySelector('[data-testid=table]').scrollTop = 1e9")
    opened.page.wait_for_function(
        """() => { const last = [...document.querySelectorAll('[data-testid=row]')].pop();
        return last && last.dataset.id && Number(last.getAttribute('aria-rowindex')) > 5000; }"""
    )
    assert opened.page.evaluate("[...document.querySelectorAll('[data-testid=row]')].pop().children[1].textContent").startswith("0.")


def test_an_unfinished_query_keeps_the_rows_and_marks_the_place(show: Callable[..., Opened], experiment: Browser):
    opened = show(experiment)
    before = opened.names()
    opened.ask("loss < 0.05 and")
    expect(opened.part("query-error")).to_contain_text("character 16")
    assert before == opened.names()
    assert 1 == opened.page.locator(".mirror u").count()
    opened.ask("loss < 0.05 and step > 700")
    expect(opened.part("query-error")).to_be_hidden()
    expect(opened.part("row")).to_have_count(3)
    assert ["loss", "step"] == opened.page.locator(".mirror b").all_text_contents()


def test_a_snapshot_is_opened_down_to_the_card_of_a_tensor(show: Callable[..., Opened], experiment: Browser):
    opened = show(experiment)
    opened.row("step-900").click()
    opened.part("tab-objects").click()
    opened.part("tree-row").filter(has_text="encoder.layer.0").first.click()
    opened.part("tree-row").filter(has_text="attention.query.weight").first.click()
    expect(opened.part("card")).to_contain_text("32\N{MULTIPLICATION SIGN}32 float32")
    expect(opened.part("card").locator("rect")).to_have_count(48)
    expect(opened.part("card")).to_contain_text("std")
    opened.screenshot("objects")


def test_keys_alone_are_enough(show: Callable[..., Opened], experiment: Browser):
    opened = show(experiment)
    keyboard = opened.page.keyboard
    opened.part("query").focus()
    keyboard.press("ArrowDown")
    expect(opened.row("before surgery")).to_have_attribute("aria-selected", "true")
    keyboard.press("ArrowDown")
    keyboard.press("Shift+ArrowDown")
    expect(opened.page.locator("[data-testid=row][aria-selected=true]")).to_have_count(2)
    keyboard.press("End")
    expect(opened.row("step-400")).to_have_attribute("aria-selected", "true")
    keyboard.press("Enter")
    expect(opened.part("tree-row").first).to_be_focused()
    keyboard.press("ArrowDown")
    keyboard.press("ArrowDown")
    keyboard.press("ArrowRight")
    expect(opened.part("tree-row").nth(3)).to_have_attribute("aria-level", "3")
    keyboard.press("ArrowRight")
    keyboard.press("Enter")
    expect(opened.part("card")).to_contain_text("model/encoder.layer.0")
    assert opened.page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_two_are_compared(show: Callable[..., Opened], experiment: Browser):
    opened = show(experiment, "?dark")
    opened.row("step-900").click()
    opened.row("step-500").click(modifiers=["Control"])
    opened.part("diff").click()
    expect(opened.part("diff-counts")).to_contain_text("changed")
    expect(opened.part("heatmap")).to_contain_text("%")
    expect(opened.part("diff-facts")).to_contain_text("metric.loss")
    opened.screenshot("diff")


def test_a_restore_is_previewed_done_and_undone(show: Callable[..., Opened], experiment: Browser):
    model = experiment._kernel.shell.user_ns["model"]
    with torch.no_grad():
        model.pooler.weight.fill_(7)
    opened = show(experiment)
    opened.row("baseline").click()
    opened.part("restore").click()
    expect(opened.part("restore-preview")).to_contain_text("No shape or dtype differs")
    box = opened.part("tree-row").filter(has_text="optimizer").locator("input")
    box.click()
    expect(opened.part("restore-preview")).to_contain_text("optimizer stays")
    opened.screenshot("restore")
    opened.part("restore-run").click()
    expect(opened.part("restore-preview")).to_contain_text("Restored")
    assert float(model.pooler.weight.detach().max()) < 7
    opened.part("restore-undo").click()
    expect(opened.part("restore-preview")).to_contain_text("Undone")
    assert 7 == float(model.pooler.weight.detach().min())


def test_a_restore_shows_that_it_waits_for_a_cell(show: Callable[..., Opened], experiment: Browser):
    kernel = experiment._kernel
    opened = show(experiment)
    opened.row("baseline").click()
    opened.part("restore").click()
    expect(opened.part("restore-preview")).to_contain_text("come back")
    kernel.turns.begin()
    opened.part("restore-run").click()
    expect(opened.part("restore-progress")).to_contain_text("waits for the running cell")
    opened.part("restore-cancel").click()
    expect(opened.part("restore-preview")).to_contain_text("Cancelled")
    kernel.turns.end()


def test_labels_are_given_and_shown(show: Callable[..., Opened], experiment: Browser):
    opened = show(experiment)
    opened.row("step-700").click()
    opened.part("pin").click()
    expect(opened.row("step-700")).to_contain_text("pinned")
    opened.part("tag").click()
    opened.part("tag-input").fill("fine")
    opened.part("tag-input").press("Enter")
    expect(opened.row("step-700")).to_contain_text("fine")
    opened.part("note").fill("a new note")
    opened.part("note-save").click()
    expect(opened.part("note-save")).to_be_hidden()
    assert "a new note" == experiment._kernel.catalog["step-700"].note


def test_deleting_takes_two_clicks_and_spares_what_is_pinned(show: Callable[..., Opened], experiment: Browser):
    opened = show(experiment)
    opened.row("before surgery").click()
    opened.part("delete").click()
    expect(opened.part("notice")).to_contain_text("pinned")
    opened.row("step-700").click()
    opened.part("delete").click()
    expect(opened.part("delete")).to_contain_text("1 snapshot")
    expect(opened.row("step-700")).to_be_visible()
    opened.part("delete").click()
    expect(opened.row("step-700")).to_be_hidden()


def test_new_takes_appear_by_themselves(show: Callable[..., Opened], experiment: Browser):
    kernel = experiment._kernel
    opened = show(experiment)
    expect(opened.part("row")).to_have_count(7)
    state = {"model": kernel.shell.user_ns["model"]}
    Snapshot.take(Path(kernel.catalog.place.path).parent / "another", state, name="another", catalog=kernel.catalog)
    kernel.changed()
    expect(opened.row("another")).to_be_visible()


def test_labels_are_typed_one_after_the_other(show: Callable[..., Opened], experiment: Browser):
    """The cursor stays in its field, though that is drawn anew; so does what is half typed in it."""
    opened = show(experiment)
    opened.row("step-700").click()
    opened.part("tag-add").click()
    for word in ("first", "second"):
        opened.page.keyboard.type(word)
        opened.page.keyboard.press("Enter")
        expect(opened.row("step-700")).to_contain_text(word)
        expect(opened.part("tag-remove")).to_have_count(1 if word == "first" else 2)
        expect(opened.part("tag-add")).to_be_focused()
        expect(opened.part("tag-add")).to_have_value("")
    opened.part("pin").evaluate("button => button.click()")
    opened.page.keyboard.type("half")
    expect(opened.part("pane")).to_contain_text("pinned")
    expect(opened.part("tag-add")).to_have_value("half")
    opened.page.keyboard.type(" typed")
    expect(opened.part("tag-add")).to_have_value("half typed")


def test_a_row_that_is_pressed_is_there_to_be_clicked(show: Callable[..., Opened], experiment: Browser):
    """One that is drawn anew meanwhile would get no click."""
    opened = show(experiment)
    opened.row("step-700").hover()
    opened.page.mouse.down()
    experiment._kernel.catalog.tag("step-700", "meanwhile")
    experiment._kernel.changed()
    opened.page.wait_for_timeout(350)
    opened.page.mouse.up()
    expect(opened.row("step-700")).to_contain_text("meanwhile")
    expect(opened.row("step-700")).to_have_attribute("aria-selected", "true")


def test_a_pointer_that_stays_down_does_not_stop_the_news(show: Callable[..., Opened], experiment: Browser):
    """As that of a scroll bar, whose end nobody tells."""
    opened = show(experiment)
    opened.row("step-700").hover()
    opened.page.mouse.down()
    experiment._kernel.catalog.tag("step-400", "meanwhile")
    experiment._kernel.changed()
    expect(opened.row("step-400")).to_contain_text("meanwhile")
    opened.page.mouse.up()


def test_the_plot_selects(show: Callable[..., Opened], experiment: Browser):
    opened = show(experiment)
    expect(opened.part("plot")).to_be_visible()
    dots = opened.page.locator(".dot-rim").get_attribute("d")
    x, y = map(float, dots.split("h0")[0].removeprefix("M").split())
    opened.part("plot").click(position={"x": x, "y": y})
    expect(opened.row("step-400")).to_have_attribute("aria-selected", "true")
    expect(opened.page.locator(".chosen")).to_have_count(1)


@pytest.mark.parametrize(("asked", "dark"), [("", False), ("?dark", True), ("?jupyter", False), ("?jupyter&dark", True)])
def test_colours_follow_the_ground_and_are_readable(show: Callable[..., Opened], experiment: Browser, asked: str, dark: bool):
    opened = show(experiment, asked)
    opened.page.wait_for_function(f"document.querySelector('.exps').classList.contains('dark') === {str(dark).lower()}")
    opened.row("step-900").click()
    expect(opened.part("note")).to_be_visible()
    contrasts = opened.page.evaluate(
        """() => {
        const rgb = (text) => text.match(/[\\d.]+/g).map((v, i) => Number(v) * (text.startsWith('color(') && i < 3 ? 255 : 1));
        const light = ([r, g, b]) => { const f = (v) => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
          return .2126 * f(r) + .7152 * f(g) + .0722 * f(b); };
        const ground = (one) => { for (; one; one = one.parentElement) { const c = rgb(getComputedStyle(one).backgroundColor);
          if (c.length < 4 || c[3] > .9) return c; } };
        const found = [];
        for (const one of document.querySelectorAll('.exps .tr span, .exps button, .exps dt, .exps dd, .exps .tag, .exps .h')) {
          if (!one.textContent.trim() || one.disabled || !one.offsetParent) continue;
          const back = ground(one), color = rgb(getComputedStyle(one).color), alpha = color[3] ?? 1;
          const mixed = color.slice(0, 3).map((v, i) => v * alpha + back[i] * (1 - alpha));
          const [a, b] = [light(mixed), light(back)].sort((x, y) => y - x);
          found.push([(a + .05) / (b + .05), one.className + ' ' + one.textContent]);
        }
        return found.sort((x, y) => x[0] - y[0]).slice(0, 3); }"""
    )
    assert contrasts[0][0] >= 4.5, contrasts


def test_a_narrow_cell_has_the_right_side_below(show: Callable[..., Opened], experiment: Browser):
    opened = show(experiment, "?width=560")
    table, pane = opened.part("table").bounding_box(), opened.part("pane").bounding_box()
    assert pane["y"] >= table["y"] + table["height"]
    assert pane["width"] <= 560


def test_nothing_from_disk_is_more_than_text(show: Callable[..., Opened], tmp_path: Path):
    label = "".join(letter for letter in HOSTILE if letter not in "@:=/")
    with settings.override(project="tests"):
        kernel = kernel_of(tmp_path)
        state = {HOSTILE: StateDict({HOSTILE: torch.ones(3), "value": HOSTILE})}
        given: dict[str, Any] = {
            "name": label,
            "tags": [label],
            "note": HOSTILE,
            "params": {HOSTILE: HOSTILE},
            "metrics": {HOSTILE: 1.0},
            "step": 1,
        }
        for name in ("one", "two"):
            Snapshot.take(tmp_path / name, state, catalog=kernel.catalog, **given)
            state[HOSTILE]["value"] += "!"
        opened = show(Browser(kernel))
    opened.part("row").first.click()
    expect(opened.part("pane")).to_contain_text("onerror")
    opened.part("columns").click()
    expect(opened.part("columns-list")).to_contain_text("onerror")
    opened.page.keyboard.press("Escape")
    opened.part("tab-objects").click()
    opened.part("tree-row").nth(1).click()
    expect(opened.part("card")).to_contain_text("onerror")
    opened.part("row").nth(1).click(modifiers=["Control"])
    opened.part("diff").click()
    expect(opened.part("diff-counts")).to_contain_text("1 changed")
    expect(opened.part("diff-entries")).to_contain_text("onerror")
    opened.part("copy").click()
    expect(opened.part("notice")).to_contain_text("Snapshot.find")
    opened.ask(f"{HOSTILE} <")
    expect(opened.part("query-error")).to_be_visible()
    assert opened.page.evaluate("window.hacked === undefined && document.querySelectorAll('.exps img, .exps script').length === 0")


def test_an_unmounted_view_leaves_nothing(show: Callable[..., Opened], experiment: Browser):
    opened = show(experiment)
    opened.page.evaluate("window.stop_()")
    experiment._kernel.changed()
    assert 0 == opened.page.locator(".exps").count()


def test_a_page_without_a_kernel_says_so(browser: Chromium, experiment: Browser):
    experiment._receive = lambda *_: None  # nobody is there
    served = Served(experiment)
    page = browser.new_page()
    page.goto(served.url)
    expect(page.locator(".empty").first).to_contain_text("does not answer", timeout=10_000)
    page.close()
    served.close()
