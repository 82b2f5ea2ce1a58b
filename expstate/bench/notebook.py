"""The steps of the notebook's benchmark: what a person waits for, as cells of a shell run it.

Gets a ``Task``, gives an ``Outcome``; ``STEPS`` names what ``child`` performs, each in a process of its own. All is reached as people reach
it, by ``%load_ext expstate``.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from expstate import settings
from expstate.bench import state
from expstate.bench.catalog import SHARE_OF_FRAME
from expstate.bench.measure import Meter
from expstate.bench.plan import FILLED_PROJECT, Outcome, Task
from expstate.bench.state import TensorState
from expstate.bench.systems import KEY
from expstate.catalog.catalog import Catalog
from expstate.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SNAPSHOTS_THERE = 100
"""Snapshots that are beside the notebook when the extension is loaded: it looks there for what was left behind."""
FILTERS = ("loss < 0.1", "loss < 0.12", "loss < 0.1 and tag = ablation", "lr = 0.001", "acc > 0.5 or pinned")
_ANSWER_SECONDS = 60
_LOAD = """
import sys, time
import torch
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell(ipython_dir=sys.argv[1])
start = time.perf_counter()
shell.run_line_magic("load_ext", "expstate")
seconds = time.perf_counter() - start
assert "snapshot" in shell.magics_manager.magics["line"]
print(seconds)
"""


@contextlib.contextmanager
def _shell(folder: Path, **names: Any) -> Iterator[tuple[Callable[[str], None], dict[str, Any]]]:
    """A shell with the extension, as a function that runs a cell, and its namespace; snapshots and catalog are in the folder."""
    from IPython.core import interactiveshell

    make_shell: Any = interactiveshell.InteractiveShell
    shell = make_shell(ipython_dir=str(folder / "ipython"))
    shell.user_ns.update(names)

    def run(cell: str) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            shell.run_cell(cell, store_history=False).raise_error()

    with settings.override(root=str(folder / "snapshots"), catalog=str(folder / "catalog.db"), progress=False, project=FILLED_PROJECT):
        run("%load_ext expstate")
        try:
            yield run, shell.user_ns
        finally:
            run("%unload_ext expstate")
            shell.history_manager.end_session()


# load_ext


def _prepare_load(task: Task) -> Outcome:
    folder = Path(task.kept) / "expstate-snapshots"
    live = TensorState({"weight": torch.zeros(16)})
    for number in range(SNAPSHOTS_THERE):
        Snapshot.take(folder / f"run-{number}", {KEY: live}, catalog=False, progress=False)
    return Outcome()


def _load(task: Task) -> Outcome:
    """In a process of its own once more: this one has imported what is to be imported."""
    environment = {**os.environ, "EXPSTATE_CATALOG": f"{task.folder}/catalog.db"}
    command = [sys.executable, "-c", _LOAD, f"{task.folder}/ipython"]
    done = subprocess.run(command, cwd=task.kept, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        return Outcome(error=done.stderr.strip().rpartition("\n")[2])
    return Outcome(seconds=float(done.stdout))


# take_cell, status


def _take_cell(task: Task) -> Outcome:
    live = state.random_state(task.workload)
    with _shell(Path(task.folder), model=live) as (run, names):
        run("%snapshot take model --wait")
        state.overwrite(live)
        meter = Meter()
        with meter:
            run("pending = %snapshot take model")
        taken = names["pending"].wait()
    error = "" if taken.nbytes == live.nbytes else f"{taken.nbytes} bytes were taken instead of {live.nbytes}"
    return Outcome(meter.seconds, meter.cpu_seconds, meter.peak_extra_bytes, live.nbytes, error=error)


def _status(task: Task) -> Outcome:
    live = state.random_state(task.workload)
    with _shell(Path(task.folder), model=live) as (run, names):
        run("%snapshot take model --wait")
        meter = Meter()
        with meter:
            run("found = %snapshot status\nprint(found)")
        error = f"changed: {names['found'].changed}" if names["found"].changed else ""
        next(iter(live.tensors.values())).fill_(1)
        run("found = %snapshot status")
        error = error or ("" if names["found"].changed else "a change was not noticed")
    return Outcome(meter.seconds, meter.cpu_seconds, meter.peak_extra_bytes, live.nbytes, error=error)


# browse


class _Page:
    """What a page asks of a browser, and how long the answers take."""

    def __init__(self, browser: Any) -> None:
        self._browser = browser
        self._answers: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        browser.send = self._answers.put

    def ask(self, name: str, **arguments: Any) -> Any:
        """The answer to a question; events that come between are passed over."""
        self._browser._receive(None, {"ask": name, "number": name, **arguments}, [])  # noqa: SLF001 - as a message of the page comes in
        while True:
            message = self._answers.get(timeout=_ANSWER_SECONDS)
            if "error" in message:
                raise RuntimeError(message["error"]["message"])
            if message.get("number") == name and "result" in message:
                return message["result"]

    def seconds(self, name: str, **arguments: Any) -> float:
        """The time of an answer."""
        start = time.perf_counter()
        self.ask(name, **arguments)
        return time.perf_counter() - start


def _prepare_browse(task: Task) -> Outcome:
    from expstate.bench.catalog_fill import fill  # SQLAlchemy's import is part of what `browse` measures

    folder = Path(task.kept)
    catalog = Catalog(folder / "catalog.db")
    fill(catalog, max(1, task.workload.records // SHARE_OF_FRAME))
    with settings.override(project=FILLED_PROJECT):
        Snapshot.take(folder / "wide", {KEY: state.random_small_state(task.workload)}, name="wide", catalog=catalog, progress=False)
    catalog.close()
    return Outcome()


def _browse(task: Task) -> Outcome:
    with _shell(Path(task.kept)) as (run, names):
        meter = Meter()
        with meter:
            run("browser = %snapshot browse")
            page = _Page(names["browser"])
            page.ask("hello")
            found = page.ask("search")
        parts = {
            "filter": statistics.median(page.seconds("search", query=query) for query in FILTERS),
            "sort": page.seconds("search", sort="acc:desc"),
            "last row": page.seconds("window", question=page.ask("search")["question"], start=found["count"] - 1),
            "tree": _open_tree(page),
        }
        names["browser"].close()
    expected = max(1, task.workload.records // SHARE_OF_FRAME) + 1
    error = "" if found["count"] == expected else f"{found['count']} rows instead of {expected}"
    return Outcome(meter.seconds, meter.cpu_seconds, meter.peak_extra_bytes, parts=parts, error=error)


def _open_tree(page: _Page) -> float:
    """Seconds until all tensors of the wide snapshot are listed: the key, and each level below that has one node only."""
    (row,) = page.ask("search", query="name = wide")["rows"]
    start = time.perf_counter()
    rows = page.ask("level", snapshot_id=row["id"])["rows"]
    while len(rows) == 1:
        rows = page.ask("level", snapshot_id=row["id"], node=rows[0]["number"])["rows"]
    return time.perf_counter() - start


STEPS: dict[str, Callable[[Task], Outcome]] = {
    "prepare_load_ext": _prepare_load,
    "load_ext": _load,
    "take_cell": _take_cell,
    "status": _status,
    "prepare_browse": _prepare_browse,
    "browse": _browse,
}
