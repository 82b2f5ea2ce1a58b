"""What is watched is taken when it is due, between steps or cells, and nothing that anyone has marked is thrown away for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from expstate import Catalog, Snapshot
from expstate.engine import ancestry, attempt
from expstate.engine.take import Take
from expstate.errors import InvalidArgumentError, NameNotFoundError
from expstate.notebook import watch
from expstate.notebook.kernel import Kernel
from expstate.notebook.watch import Rhythm, Watcher, parse_rhythm

from .kernels import Kernel as RealKernel
from .shells import Shell


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EXPSTATE_CATALOG", str(tmp_path / "catalog.db"))
    monkeypatch.setenv("EXPSTATE_PROJECT", "tests")
    ancestry.forget()
    yield
    ancestry.forget()


class Clock:
    """Minutes pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watch, "time", clock)
    return clock


class Notebook:
    """A kernel whose takes are waited for, unless a person drives it."""

    def __init__(self, *, is_driven: bool = False, **more: Any) -> None:
        model = torch.nn.Linear(3, 2)
        self.kernel = Kernel(
            Shell(is_driven=is_driven, **({"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "lr": 0.1} | more))
        )
        self.watcher = Watcher(self.kernel)

    def step(self, count: int = 1) -> None:
        names = self.kernel.namespace
        for _ in range(count):
            names["optimizer"].zero_grad()
            names["model"](torch.ones(1, 3)).sum().backward()
            names["optimizer"].step()

    def end_cell(self, *, success: bool = True) -> None:
        for callback in tuple(self.kernel.shell.events._callbacks.get("post_run_cell", ())):
            callback(SimpleNamespace(success=success))

    @property
    def taken(self) -> list[Any]:
        """The records, the oldest first."""
        for pending in self.kernel.pending:
            pending.wait()
        return list(self.kernel.catalog.search())[::-1]


@pytest.fixture
def notebook() -> Iterator[Notebook]:
    notebook = Notebook()
    yield notebook
    notebook.watcher.stop()


# Rhythms


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cell", Rhythm()),
        ("50steps", Rhythm(steps=50)),
        ("1 step", Rhythm(steps=1)),
        ("10m", Rhythm(seconds=600)),
        ("1.5h", Rhythm(seconds=5400)),
        (" 30S ", Rhythm(seconds=30)),
        ("2min", Rhythm(seconds=120)),
    ],
)
def test_a_rhythm_is_understood(text: str, expected: Rhythm) -> None:
    assert expected == parse_rhythm(text)


@pytest.mark.parametrize("text", ["", "m", "0steps", "0s", "-1m", "1.5steps", "ten minutes", "5 cells", "1e3s"])
def test_what_is_no_rhythm_is_refused_with_those_that_are(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"10m or 1h.*50steps.*cell"):
        parse_rhythm(text)


# Steps


def test_a_take_comes_at_the_end_of_every_so_many_steps(notebook: Notebook) -> None:
    assert "watching model, optimizer every 3 steps" == notebook.watcher.start(["model", "optimizer"], "3steps")
    notebook.step(2)
    assert [] == notebook.taken
    notebook.step()
    expected = notebook.kernel.namespace["model"].weight.clone()
    notebook.step(5)
    taken = notebook.taken

    assert ["watch, after 3 steps", "watch, after 6 steps"] == [record.note for record in taken]
    assert torch.equal(expected, Snapshot.find(taken[0].id).read_object("model/weight"))


def test_steps_of_other_optimizers_do_not_count(notebook: Notebook) -> None:
    notebook.watcher.start(["model", "optimizer"], "1step")
    other = torch.nn.Parameter(torch.ones(2))
    other.grad = torch.ones(2)
    torch.optim.SGD([other], lr=0.1).step()

    assert [] == notebook.taken
    notebook.step()
    assert 1 == len(notebook.taken)


def test_the_optimizer_is_the_one_that_the_name_stands_for_now(notebook: Notebook) -> None:
    notebook.watcher.start(["model", "optimizer"], "2steps")
    names = notebook.kernel.namespace
    notebook.step()
    names["model"] = torch.nn.Linear(3, 2)
    names["optimizer"] = torch.optim.Adam(names["model"].parameters())
    notebook.step()
    (record,) = notebook.taken

    assert torch.equal(names["model"].weight, Snapshot.find(record.id).read_object("model/weight"))


def test_without_an_optimizer_there_are_no_steps_to_count(notebook: Notebook) -> None:
    with pytest.raises(InvalidArgumentError, match="none of 'model' is one"):
        notebook.watcher.start(["model"], "3steps")
    with pytest.raises(NameNotFoundError, match="scheduler"):
        notebook.watcher.start(["model", "scheduler"], "cell")

    assert notebook.watcher.text is None


def test_a_take_that_fails_lets_the_training_go_on_and_is_tried_again(notebook: Notebook, capsys: pytest.CaptureFixture[str]) -> None:
    notebook.watcher.start(["model", "optimizer", "lr"], "2steps")
    lr = notebook.kernel.namespace.pop("lr")
    notebook.step(3)
    told = capsys.readouterr().err
    notebook.kernel.namespace["lr"] = lr
    notebook.step()

    assert 1 == told.count("watch could not take model, optimizer, lr: ")
    assert "'lr'" in told
    assert ["watch, after 4 steps"] == [record.note for record in notebook.taken]


def test_a_take_waits_for_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = Notebook(is_driven=True)
    may_end = threading.Event()
    commit = Take.commit

    def slowly(take: Take) -> Any:
        may_end.wait(30)
        return commit(take)

    monkeypatch.setattr(Take, "commit", slowly)
    notebook.watcher.start(["model", "optimizer"], "1step")
    notebook.step(3)
    running = len(notebook.kernel.pending)
    may_end.set()
    notebook.kernel.wait()
    notebook.step()
    notebook.watcher.stop()

    assert 1 == running
    assert ["watch, after 1 step", "watch, after 4 steps"] == [record.note for record in notebook.taken]


def test_steps_of_a_training_thread_count(notebook: Notebook) -> None:
    notebook.watcher.start(["model", "optimizer"], "2steps")
    thread = threading.Thread(target=notebook.step, args=(2,))
    thread.start()
    thread.join()

    assert 1 == len(notebook.taken)


# Time


def test_what_is_due_is_taken_at_the_end_of_the_next_step(notebook: Notebook, clock: Clock) -> None:
    notebook.watcher.start(["model", "optimizer"], "10m")
    clock.now += 599
    notebook.step()
    assert [] == notebook.taken
    clock.now += 1
    notebook.step(3)

    assert ["watch, after 2 steps"] == [record.note for record in notebook.taken]


def test_without_a_step_it_is_taken_at_the_end_of_the_cell(notebook: Notebook, clock: Clock) -> None:
    notebook.watcher.start(["model"], "10m")
    notebook.end_cell()
    clock.now += 600
    assert [] == notebook.taken
    notebook.end_cell(success=False)
    notebook.end_cell()

    assert ["watch"] == [record.note for record in notebook.taken]


# Cells


def test_cells_that_fail_are_not_taken(notebook: Notebook) -> None:
    notebook.watcher.start(["model"], "cell")
    notebook.end_cell()
    notebook.end_cell(success=False)
    notebook.end_cell()

    assert 2 == len(notebook.taken)


def test_a_cell_in_a_cell_is_no_cell(notebook: Notebook) -> None:
    notebook.kernel.turns.watch()
    notebook.watcher.start(["model"], "cell")
    notebook.kernel.shell.events.trigger("pre_run_cell")
    notebook.kernel.shell.events.trigger("pre_run_cell")
    notebook.end_cell()
    inner = len(notebook.taken)
    notebook.end_cell()

    assert (0, 1) == (inner, len(notebook.taken))


# Its end


def test_off_is_off(notebook: Notebook) -> None:
    notebook.watcher.start(["model", "optimizer"], "1step", 2)
    notebook.step()

    assert "watching model, optimizer every 1 step, of which the last 2 are kept" == notebook.watcher.text
    assert "no longer watching model, optimizer every 1 step, of which the last 2 are kept; 1 snapshot taken" == notebook.watcher.stop()
    notebook.step()
    notebook.end_cell()
    assert "nothing was watched" == notebook.watcher.stop()
    assert notebook.watcher.text is None
    assert 1 == len(notebook.taken)


def test_a_new_rhythm_takes_the_place_of_the_old(notebook: Notebook) -> None:
    notebook.watcher.start(["model", "optimizer"], "1step")
    notebook.watcher.start(["model"], "cell")
    notebook.step()
    notebook.end_cell()

    assert ["watch"] == [record.note for record in notebook.taken]


def test_without_names_those_of_the_last_take_are_watched(notebook: Notebook) -> None:
    notebook.kernel.take(["lr"])

    assert "watching lr every cell" == notebook.watcher.start([], "cell")


# What is kept


def ids(notebook: Notebook) -> list[str]:
    return [record.id for record in notebook.taken]


def test_only_the_last_are_kept(notebook: Notebook, tmp_path: Path) -> None:
    by_hand = notebook.kernel.take(["model"]).id
    notebook.watcher.start(["model"], "cell", 2)
    seen: list[str] = []
    for _ in range(4):
        notebook.end_cell()
        seen.append(ids(notebook)[-1])

    assert [by_hand, *seen[-2:]] == ids(notebook)
    assert 3 == len(list((tmp_path / "expstate-snapshots").glob("*/snapshot.json")))


def test_all_are_kept_by_default(notebook: Notebook) -> None:
    notebook.watcher.start(["model"], "cell")
    for _ in range(4):
        notebook.end_cell()

    assert 4 == len(ids(notebook))


@pytest.mark.parametrize("mark", ["tag", "alias", "pin", "tagged and untagged"])
def test_what_someone_has_marked_is_kept(notebook: Notebook, mark: str) -> None:
    notebook.watcher.start(["model"], "cell", 1)
    notebook.end_cell()
    (first,) = ids(notebook)
    catalog = notebook.kernel.catalog
    if mark == "alias":
        catalog.alias(first, "good")
    elif mark == "pin":
        catalog.pin(first)
    else:
        catalog.tag(first, "good")
    if mark == "tagged and untagged":
        catalog.untag(first, "good")
    for _ in range(3):
        notebook.end_cell()
    kept = mark != "tagged and untagged"

    assert ([first] if kept else []) + [ids(notebook)[-1]] == ids(notebook)


def test_takes_of_a_watch_before_are_not_its_own(notebook: Notebook) -> None:
    notebook.watcher.start(["model"], "cell")
    notebook.end_cell()
    (first,) = ids(notebook)
    notebook.watcher.start(["model"], "cell", 1)
    for _ in range(3):
        notebook.end_cell()

    assert [first, ids(notebook)[-1]] == ids(notebook)


def test_the_last_are_kept_without_a_catalog_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EXPSTATE_CATALOG", "off")
    notebook = Notebook()
    notebook.watcher.start(["model"], "cell", 1)

    def places() -> list[Path]:
        return sorted(path.parent for path in (tmp_path / "expstate-snapshots").glob("*/snapshot.json"))

    for _ in range(3):
        notebook.end_cell()
    (last,) = places()
    monkeypatch.setenv("EXPSTATE_CATALOG", str(tmp_path / "catalog.db"))
    catalog = Catalog()
    catalog.scan(tmp_path)
    catalog.tag(Snapshot(last).id, "good")
    monkeypatch.setenv("EXPSTATE_CATALOG", "off")
    for _ in range(2):
        notebook.end_cell()
    notebook.watcher.stop()

    assert 2 == len(places())
    assert last in places()


def test_what_cannot_be_removed_now_is_removed_later(notebook: Notebook, monkeypatch: pytest.MonkeyPatch) -> None:
    really = attempt.delete

    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    notebook.watcher.start(["model"], "cell", 1)
    monkeypatch.setattr(attempt, "delete", fail)
    for _ in range(3):
        notebook.end_cell()
    before = len(ids(notebook))
    monkeypatch.setattr(attempt, "delete", really)
    notebook.end_cell()

    assert (3, 1) == (before, len(ids(notebook)))


def test_a_number_to_keep_is_at_least_one(notebook: Notebook) -> None:
    with pytest.raises(InvalidArgumentError, match="at least 1"):
        notebook.watcher.start(["model"], "cell", 0)


# In a real kernel


def test_in_a_notebook_steps_and_cells_are_taken_until_it_is_off(start_kernel: Callable[..., RealKernel]) -> None:
    kernel = start_kernel()
    kernel.do("%load_ext expstate\nimport torch\nmodel = torch.nn.Linear(3, 2)\noptimizer = torch.optim.SGD(model.parameters(), lr=0.1)")
    refused = kernel.run("%snapshot watch model")
    assert "error" == refused.status
    assert "--every 10m, --every 50steps or --every cell" in refused.text
    assert "every 2 steps" in kernel.do("%snapshot watch model optimizer --every 2steps --keep-last 2").text
    kernel.do("for _ in range(10):\n    model(torch.ones(1, 3)).sum().backward()\n    optimizer.step()", allow_stdin=False)
    assert "watching model, optimizer every 2 steps" in kernel.do("%snapshot status").text
    assert 2 == kernel.value("len(get_ipython().run_line_magic('snapshot', 'list'))")
    kernel.do("%snapshot watch model --every cell", allow_stdin=False)
    kernel.run("1 / 0", allow_stdin=False)
    assert "1 snapshot taken" in kernel.do("%snapshot watch --off", allow_stdin=False).text
    kernel.do("1 + 1", allow_stdin=False)
    assert 3 == kernel.value("len(get_ipython().run_line_magic('snapshot', 'list'))")


def test_after_unloading_nothing_is_taken_by_itself(start_kernel: Callable[..., RealKernel]) -> None:
    kernel = start_kernel()
    kernel.do("%load_ext expstate\nimport torch\nmodel = torch.nn.Linear(3, 2)")
    kernel.do("%snapshot watch model --every cell", allow_stdin=False)
    kernel.do("%unload_ext expstate", allow_stdin=False)
    kernel.do("1 + 1", allow_stdin=False)

    assert 1 == len(list(kernel.folder.glob("expstate-snapshots/*/snapshot.json")))


def test_what_a_killed_kernel_had_kept_on_disk_is_removed_by_the_next(start_kernel: Callable[..., RealKernel]) -> None:
    env = {"EXPSTATE_UNDO_BUDGET_BYTES": "1"}
    kernel = start_kernel(env=env)
    kernel.do("%load_ext expstate\nimport torch\nmodel = torch.nn.Linear(3, 2)\np = %snapshot take model --wait")
    assert "kept on disk" in kernel.do("%snapshot restore latest model").text
    kept = list(Path(kernel.env["XDG_CACHE_HOME"]).glob("expstate/undo/*"))
    kernel.restart(now=True)
    told = kernel.do("%load_ext expstate").stderr

    assert 1 == len(kept)
    assert "removed 1 copy that kernels that were killed had kept on disk" in told
    assert [] == list(Path(kernel.env["XDG_CACHE_HOME"]).glob("expstate/undo/*"))
