"""The widget without a page: messages in, answers out; what it does to live state and to the catalog."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Snapshot, settings
from expstate.errors import NotInNotebookError
from expstate.notebook.browser import browse, changes, widget
from expstate.notebook.browser.jobs import Job, Jobs
from expstate.notebook.browser.widget import Browser
from expstate.notebook.kernel import set_current

from .experiment import kernel_of

HOSTILE = "<img src=x onerror=alert(1)>"


class Page:
    """The page's end of a widget: asks, and gets the answers."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser
        self.heard: list[dict[str, Any]] = []
        self._count = 0
        self._some = threading.Condition()
        browser.send = self._hear

    def _hear(self, message: dict[str, Any]) -> None:
        json.dumps(message, allow_nan=False)
        with self._some:
            self.heard.append(message)
            self._some.notify_all()

    def begin(self, name: str, **given: Any) -> str:
        self._count += 1
        number = f"test-{self._count}"
        self.browser._receive(None, {"ask": name, "number": number, **given}, [])
        return number

    def until(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        with self._some:
            assert self._some.wait_for(lambda: any(map(wanted, self.heard)), timeout=30), self.heard
            return next(filter(wanted, self.heard))

    def answer(self, number: str) -> dict[str, Any]:
        return self.until(lambda one: one.get("number") == number and bool({"result", "error", "cancelled"} & one.keys()))

    def ask(self, name: str, **given: Any) -> Any:
        answer = self.answer(self.begin(name, **given))
        assert "result" in answer, answer
        return answer["result"]

    def refused(self, name: str, **given: Any) -> dict[str, Any]:
        error: dict[str, Any] = self.answer(self.begin(name, **given))["error"]
        return error


class Lab:
    """A kernel with a model, its snapshots and a page."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        self.kernel = kernel_of(folder, model=self.model, count=1)
        self.browser = Browser(self.kernel)
        self.page = Page(self.browser)

    def take(self, name: str = "one", **given: Any) -> Snapshot:
        return Snapshot.take(self.folder / name, {"model": self.model}, name=name, catalog=self.kernel.catalog, **given)

    def change(self) -> torch.Tensor:
        """Make the model another; gives what its first weight was."""
        before = self.model[0].weight.detach().clone()
        with torch.no_grad():
            self.model[0].weight.add_(1)
        return before

    def ticks(self, one: Snapshot) -> dict[str, bool]:
        return {str(row["number"]): True for row in self.page.ask("level", snapshot_id=one.id)["rows"]}

    def cell(self, event: str) -> None:
        self.kernel.shell.events.trigger(f"{event}_run_cell")


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with settings.override(project="tests"):
        made = Lab(tmp_path)
        made.kernel.turns.watch()
        yield made
        made.browser.close()
        made.kernel.catalog.close()


# Looking


def test_an_unfinished_query_is_answered_with_its_position(lab: Lab):
    lab.take(metrics={"loss": 1.0})
    error = lab.page.refused("search", query="loss <")
    assert ("InvalidQueryError", 6) == (error["kind"], error["position"])
    assert "\n" not in error["message"]


def test_answers_come_in_the_settings_in_which_the_widget_was_made(lab: Lab):
    lab.take()
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(lab.page.ask("search")))
    thread.start()
    thread.join()
    assert 1 == found[0]["count"]


def test_levels_and_cards_are_read_on_demand(lab: Lab):
    one = lab.take()
    (key,) = lab.page.ask("level", snapshot_id=one.id)["rows"]
    rows = lab.page.ask("level", snapshot_id=one.id, node=key["number"])["rows"]
    assert ["0.weight", "0.bias", "1.weight", "1.bias"] == [row["label"] for row in rows]
    found = lab.page.ask("card", snapshot_id=one.id, node=rows[0]["number"])
    assert ("model/0.weight", 12) == (found["path"], sum(found["bins"]))


def test_what_is_no_tensor_has_no_card(lab: Lab):
    one = lab.take()
    assert (
        "only tensors"
        in lab.page.refused("card", snapshot_id=one.id, node=lab.page.ask("level", snapshot_id=one.id)["rows"][0]["number"])["message"]
    )


def test_two_are_compared_the_older_first(lab: Lab):
    old = lab.take("old")
    lab.change()
    new = lab.take("new")
    for ids in ([old.id, new.id], [new.id, old.id]):
        found = lab.page.ask("diff", ids=ids, stats=True)
        assert ("old → new", 1) == (found["title"], found["counts"]["changed"])


def test_one_is_compared_with_live_state(lab: Lab):
    one = lab.take()
    assert 0 == lab.page.ask("diff", ids=[one.id])["counts"]["changed"]
    lab.change()
    assert 1 == lab.page.ask("diff", ids=[one.id])["counts"]["changed"]


def test_what_nobody_knows_is_refused(lab: Lab):
    assert "nothing called" in lab.page.refused("exec", code="1")["message"]
    assert "TypeError" in lab.page.refused("search", nothing=1)["message"]
    assert "no edit" in lab.page.refused("edit", action="__class__", ids=[])["message"]


def test_a_snapshot_that_is_gone_is_told_where_it_was_asked(lab: Lab):
    assert "RefNotFoundError" == lab.page.refused("level", snapshot_id="0" * 32)["kind"]


# Putting back


def test_a_preview_changes_nothing_and_tells_what_would(lab: Lab):
    one = lab.take()
    lab.change()
    now = lab.model[0].weight.detach().clone()
    found = lab.page.ask("preview", snapshot_id=one.id, ticks=lab.ticks(one))
    assert ([], ["model"]) == (found["problems"], found["keys"])
    assert torch.equal(now, lab.model[0].weight)


def test_a_restore_puts_back_and_undo_takes_it_back(lab: Lab):
    one = lab.take()
    before = lab.change()
    changed = lab.model[0].weight.detach().clone()
    assert "Restored" in lab.page.ask("restore", snapshot_id=one.id, ticks=lab.ticks(one))["lines"][0]
    assert torch.equal(before, lab.model[0].weight)
    assert lab.page.ask("hello")["can_undo"]
    assert "Undone" in lab.page.ask("back", what="undo")["lines"][0]
    assert torch.equal(changed, lab.model[0].weight)
    assert "Redone" in lab.page.ask("back", what="redo")["lines"][0]
    assert torch.equal(before, lab.model[0].weight)


def test_only_what_is_ticked_comes_back(lab: Lab):
    one = lab.take()
    lab.change()
    with torch.no_grad():
        lab.model[1].bias.add_(1)
    changed = lab.model[1].bias.detach().clone()
    (key,) = lab.page.ask("level", snapshot_id=one.id)["rows"]
    bias = next(row for row in lab.page.ask("level", snapshot_id=one.id, node=key["number"])["rows"] if row["label"] == "1.bias")
    lab.page.ask("restore", snapshot_id=one.id, ticks={str(key["number"]): True, str(bias["number"]): False})
    assert torch.equal(one.read_object("model/0.weight"), lab.model[0].weight)
    assert torch.equal(changed, lab.model[1].bias)


def test_a_preview_of_what_does_not_fit_lists_every_problem(lab: Lab):
    one = lab.take()
    lab.kernel.shell.user_ns["model"] = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 9))
    problems = lab.page.ask("preview", snapshot_id=one.id, ticks=lab.ticks(one))["problems"]
    assert len(problems) >= 3


def test_nothing_ticked_is_told(lab: Lab):
    one = lab.take()
    ticks = dict.fromkeys(lab.ticks(one), False)
    assert "nothing is ticked" in lab.page.refused("preview", snapshot_id=one.id, ticks=ticks)["message"]


def test_keys_without_a_name_here_are_no_targets(lab: Lab):
    one = lab.take()
    assert ["model"] == lab.page.ask("targets", snapshot_id=one.id)
    del lab.kernel.shell.user_ns["model"]
    assert [] == lab.page.ask("targets", snapshot_id=one.id)


def test_a_restore_waits_for_the_running_cell(lab: Lab):
    one = lab.take()
    ticks = lab.ticks(one)
    before = lab.change()
    lab.cell("pre")
    number = lab.page.begin("restore", snapshot_id=one.id, ticks=ticks)
    lab.page.until(lambda message: message.get("number") == number and "waits" in message.get("text", ""))
    assert not torch.equal(before, lab.model[0].weight)
    lab.cell("post")
    assert "result" in lab.page.answer(number)
    assert torch.equal(before, lab.model[0].weight)


def test_a_restore_that_waits_can_be_cancelled(lab: Lab):
    one = lab.take()
    ticks = lab.ticks(one)
    before = lab.change()
    lab.cell("pre")
    number = lab.page.begin("restore", snapshot_id=one.id, ticks=ticks)
    lab.page.until(lambda message: message.get("number") == number and "waits" in message.get("text", ""))
    lab.browser._receive(None, {"ask": "cancel", "number": number}, [])
    assert "cancelled" in lab.page.answer(number)
    lab.cell("post")
    assert not torch.equal(before, lab.model[0].weight)


def test_a_restore_that_is_cancelled_while_it_reads_leaves_all_as_it_was(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    one = lab.take()
    ticks = lab.ticks(one)
    lab.change()
    now = lab.model[0].weight.detach().clone()
    told = Job.told

    def cancelled(self: Job, done: int, total: int) -> None:
        self.cancel()
        told(self, done, total)

    monkeypatch.setattr(Job, "told", cancelled)
    assert "cancelled" in lab.page.answer(lab.page.begin("restore", snapshot_id=one.id, ticks=ticks))
    assert torch.equal(now, lab.model[0].weight)


# Editing


def test_labels_notes_and_pins_are_edited(lab: Lab):
    one, other = lab.take("one"), lab.take("other")
    lab.page.ask("edit", action="tag", ids=[one.id, other.id], text="good")
    lab.page.ask("edit", action="alias", ids=[one.id], text="best")
    lab.page.ask("edit", action="note", ids=[one.id], text="two\nlines")
    lab.page.ask("edit", action="pin", ids=[one.id])
    record = lab.kernel.catalog[one.id]
    assert (("good",), ("best",), "two\nlines", True) == (record.tags, record.aliases, record.note, record.pinned)
    for action, text in (("untag", "good"), ("unalias", "best"), ("unpin", ""), ("note", "")):
        lab.page.ask("edit", action=action, ids=[one.id], text=text)
    record = lab.kernel.catalog[one.id]
    assert ((), (), None, False) == (record.tags, record.aliases, record.note, record.pinned)


def test_a_tag_that_refs_cannot_carry_is_refused(lab: Lab):
    assert "InvalidNameError" == lab.page.refused("edit", action="tag", ids=[lab.take().id], text="a/b")["kind"]


def test_an_alias_of_another_is_not_taken_away(lab: Lab):
    one, other = lab.take("one"), lab.take("other")
    lab.kernel.catalog.alias("other", "best")
    assert "does not have" in lab.page.refused("edit", action="unalias", ids=[one.id], text="best")["message"]
    assert ("best",) == lab.kernel.catalog[other.id].aliases


def test_deleting_asks_first_and_then_deletes(lab: Lab):
    one = lab.take()
    assert "1 snapshot" in lab.page.ask("ask_delete", ids=[one.id])["what"]
    assert 1 == len(lab.kernel.catalog.search())
    lab.page.ask("delete", ids=[one.id])
    assert 0 == len(lab.kernel.catalog.search())


@pytest.mark.parametrize("protection", ["pin", "alias"])
def test_what_is_pinned_or_has_an_alias_is_not_deleted(lab: Lab, protection: str):
    one = lab.take()
    lab.page.ask("edit", action=protection, ids=[one.id], text="best")
    for name in ("ask_delete", "delete"):
        assert "SnapshotPinnedError" == lab.page.refused(name, ids=[one.id])["kind"]
    assert 1 == len(lab.kernel.catalog.search())


def test_verify_tells_damage(lab: Lab):
    one = lab.take()
    assert lab.page.ask("verify", snapshot_id=one.id)["ok"]
    (file,) = Path(one.path).glob("*.safetensors")
    file.chmod(0o644)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert not lab.page.ask("verify", snapshot_id=one.id)["ok"]


# What happens elsewhere


def test_takes_of_the_kernel_and_cells_are_told(lab: Lab):
    lab.kernel.take(["model"], to=str(lab.folder / "taken"), wait=True)
    lab.page.until(lambda message: message.get("event") == "changed")
    lab.cell("pre")
    assert lab.page.until(lambda message: message.get("event") == "state")["busy"]


def test_takes_of_others_are_noticed(lab: Lab, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(changes, "EVERY_SECONDS", 0.05)
    lab.take("before")
    lab.page.ask("hello")
    time.sleep(0.1)
    lab.page.heard.clear()
    lab.take("after")
    lab.page.until(lambda message: message.get("event") == "changed")
    assert 2 == lab.page.ask("search")["total"]


def test_a_failed_take_is_told(lab: Lab):
    lab.kernel.taker._failures.append(f"the take failed: {HOSTILE}\u202e")
    lab.kernel.changed()
    assert "\u202e" not in lab.page.until(lambda message: message.get("event") == "changed")["failures"][0]


def test_a_closed_widget_listens_no_more(lab: Lab):
    lab.page.ask("hello")
    lab.browser.close()
    lab.page.heard.clear()
    lab.kernel.changed()
    lab.cell("pre")
    assert [] == lab.page.heard


# In the notebook


@pytest.fixture
def displayed(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    """A function that shows the browser as the last line of a cell would; gives the data of its outputs."""

    def display() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        monkeypatch.setattr(widget, "display", lambda data, **_: found.append(data))
        lab.browser._ipython_display_()
        return found

    return display


def test_a_saved_notebook_shows_a_table_in_which_nothing_is_markup(lab: Lab, displayed: Callable[[], list[dict[str, Any]]]):
    lab.take("one", tags=[HOSTILE.replace("=", "")], metrics={f"{HOSTILE}<b>": 1.0})
    table, live = displayed()
    assert "application/vnd.jupyter.widget-view+json" in live
    assert "text/html" not in live
    assert f'class="{lab.browser.static_class}"' in table["text/html"]
    assert "1 snapshot" in table["text/html"]
    assert "&lt;img" in table["text/html"]
    assert "<img" not in table["text/html"]
    assert "<b>" not in table["text/html"]


def test_the_table_of_a_query_that_fails_is_its_error(lab: Lab, displayed: Callable[[], list[dict[str, Any]]]):
    lab.take()
    lab.browser.query = "<b> <"
    table, _ = displayed()
    assert "cannot be understood" in table["text/html"]
    assert "<b>" not in table["text/html"]


def test_browse_needs_a_notebook(lab: Lab):
    set_current(None)
    with pytest.raises(NotInNotebookError):
        browse()
    set_current(lab.kernel)
    try:
        found = browse("step > 1")
        assert "Browser('step > 1')" == repr(found)
        found.close()
    finally:
        set_current(None)


def test_the_page_loads_nothing_and_sets_no_markup():
    static = Path(widget.__file__).parent / "static"
    for name in ("browser.js", "browser.css"):
        text = (static / name).read_text().replace("http://www.w3.org/2000/svg", "")
        for word in (
            "http://",
            "https://",
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "@import",
            "import(",
        ):
            assert word not in text, (name, word)


# Jobs


def test_a_job_tells_progress_now_and_then_and_its_end():
    told: list[dict[str, Any]] = []
    jobs = Jobs(lambda number, message: told.append({"number": number, **message}), lambda error: {"message": str(error)})

    def work(job: Job) -> str:
        for done in range(1001):
            job.told(done, 1000)
        return "done"

    jobs.start("a", work)
    jobs.wait()
    assert {"number": "a", "result": "done"} == told[-1]
    assert {"number": "a", "done": 1000, "total": 1000} == told[-2]
    assert len(told) < 50


def test_an_error_of_a_job_is_told():
    told: list[dict[str, Any]] = []
    jobs = Jobs(lambda _, message: told.append(message), lambda error: {"message": str(error)})
    jobs.start("a", lambda _: {}["nothing"])
    jobs.wait()
    assert [{"error": {"message": "'nothing'"}}] == told
