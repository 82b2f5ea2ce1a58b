"""The steps of the catalog's benchmark: takes recorded, records searched, snapshots compared and scanned.

Gets a ``Task``, gives an ``Outcome``; ``STEPS`` names what ``child`` performs, each in a process of its own. What a step reads was left in
``kept`` by the step that prepares it.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import statistics
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from expstate import settings
from expstate.bench import measure, state
from expstate.bench.measure import Meter
from expstate.bench.plan import BUDGET_BYTES, FILLED_PROJECT, MIB, Outcome, Task
from expstate.bench.state import TensorState
from expstate.bench.systems import KEY
from expstate.catalog.catalog import Catalog
from expstate.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from expstate.diff.stats import Statistics
    from expstate.state.stateful import Stateful

TAKES = 50
CALLS = 9
FIRST = 50
SHARE_OF_FRAME = 10
TENSORS_SCANNED = 100
SHARE_CHANGED = 10
SCALE = 1.001
OLD, NEW = "old", "new"

COMMON = (
    ("loss < 0.01", "acc"),
    ("loss < 0.2", "acc"),
    ("loss < 0.9", "acc"),
    ("loss < 0.2 and tag = ablation and not pinned", None),
)
"""Queries, and what they are sorted by."""

ANY = (
    ("", None),
    ("", "metric-3:desc"),
    ("", "param.seed"),
    ("", "name"),
    ("not loss < 0.5", "size:desc"),
    ("loss > 0.5 or tag = debug", "acc:desc"),
    ('name ~ "net-99"', None),
    ('note ~ "number 777"', None),
    ("comment ~ ffff", "lr"),
    ("optimizer = adam and depth > 18 and lr < 0.05", "loss"),
    ("lr = 0.001 and not (tag = ablation or tag = baseline)", "acc"),
    ("size > 4GB and age > 1d and created > 2026-01-01", "step"),
    ("step = 50000 and user = bench", "created"),
    ("metric-1 < 0.5 and metric-2 < 0.5 and metric-3 < 0.5 and metric-4 < 0.5", "metric-5"),
    ("loss < 0.00001 or (acc > 0.99999 and pinned)", "loss"),
    ("metric.metric-7 >= 0 or param.lr != 0.1", "acc"),
)


def _calls(work: Callable[[], object], count: int = CALLS) -> float:
    """The median of the seconds of several calls."""
    return statistics.median(_seconds(work) for _ in range(count))


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# record


@contextlib.contextmanager
def _repository(folder: Path) -> Iterator[None]:
    """Be in a git repository, where there is git: most takes are made in one."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        if shutil.which("git"):
            Path("train.py").write_text("print('training')\n")
            author = ("-c", "user.name=bench", "-c", "user.email=bench@localhost")
            for words in (["init", "-q"], ["add", "train.py"], [*author, "commit", "-q", "-m", "begin"]):
                subprocess.run(["git", *words], check=True, capture_output=True)  # noqa: S607 - whichever git takes would ask
        yield
    finally:
        os.chdir(here)


def _record(task: Task) -> Outcome:
    """In turn with a take that is neither recorded nor looks around, so that the disk's moods meet both."""
    folder = Path(task.folder).resolve()
    live: dict[str, Stateful] = {KEY: TensorState({"weight": torch.zeros(MIB // 4)})}
    numbers = iter(range(2 * TAKES + 4))

    def recorded() -> None:
        with settings.override(provenance="full"):
            Snapshot.take(folder / f"run-{next(numbers)}", live, catalog=folder / "catalog.db", progress=False)

    def bare() -> None:
        with settings.override(provenance="off"):
            Snapshot.take(folder / f"run-{next(numbers)}", live, catalog=False, progress=False)

    with _repository(folder):
        bare()
        first = _seconds(recorded)
        meter = Meter()
        with meter:
            pairs = [(_seconds(bare), _seconds(recorded)) for _ in range(TAKES)]
    without, with_record = (statistics.median(side) for side in zip(*pairs, strict=True))
    missing = TAKES + 1 - len(Catalog(folder / "catalog.db").search(project="*"))
    return Outcome(
        seconds=statistics.median(recorded_seconds - bare_seconds for bare_seconds, recorded_seconds in pairs),
        cpu_seconds=meter.cpu_seconds,
        peak_extra_bytes=meter.peak_extra_bytes,
        parts={"first": first - without, "with": with_record, "without": without},
        error=f"{missing} takes were not recorded" if missing else "",
    )


# search, to_pandas


def _prepare_records(name: str, share: int) -> Callable[[Task], Outcome]:
    def prepare(task: Task) -> Outcome:
        path = Path(task.kept) / name
        if not path.exists():
            from expstate.bench.catalog_fill import fill  # SQLAlchemy's import is part of what `record` measures

            catalog = Catalog(path)
            fill(catalog, max(1, task.workload.records // share))
            catalog.close()
        return Outcome()

    return prepare


def _search(queries: tuple[tuple[str, str | None], ...]) -> Callable[[Task], Outcome]:
    def search(task: Task) -> Outcome:
        catalog = Catalog(Path(task.kept) / "catalog.db")

        def ask(query: str, sort: str | None) -> None:
            list(catalog.search(query, project=FILLED_PROJECT, sort=sort, limit=FIRST))

        ask("loss < 2", None)  # what is imported and made once
        meter = Meter()
        with meter:
            found = {f"{query or 'all'}{f' by {sort}' if sort else ''}": _calls(lambda: ask(query, sort)) for query, sort in queries}  # noqa: B023 - called at once
        slowest = max(found.values())
        return Outcome(slowest, meter.cpu_seconds, meter.peak_extra_bytes, parts=found)

    return search


def _to_pandas(task: Task) -> Outcome:
    catalog = Catalog(Path(task.kept) / "frame.db")
    catalog.search(project=FILLED_PROJECT, limit=1).to_pandas()  # pandas is imported once
    meter = Meter()
    with meter:
        frame = catalog.search(project=FILLED_PROJECT).to_pandas()
    expected = max(1, task.workload.records // SHARE_OF_FRAME)
    return Outcome(
        meter.seconds,
        meter.cpu_seconds,
        meter.peak_extra_bytes,
        error="" if len(frame) == expected else f"{len(frame)} rows instead of {expected}",
    )


# diff, diff_stats


def _take(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    Snapshot.take(path, {KEY: TensorState(dict(tensors))}, catalog=False, progress=False)


def _prepare_wide(task: Task) -> Outcome:
    folder = Path(task.kept) / "wide"
    if not folder.exists():
        tensors = state.random_small_state(task.workload).tensors
        _take(folder / OLD, tensors)
        for tensor in list(tensors.values())[::SHARE_CHANGED]:
            tensor.zero_()
        _take(folder / NEW, tensors)
    return Outcome()


def _changed_error(diff: Any, expected: int) -> str:
    return "" if len(diff.changed) == expected else f"{len(diff.changed)} entries changed instead of {expected}"


def _diff(task: Task) -> Outcome:
    folder = Path(task.kept) / "wide"
    is_cold = task.operation == "diff_cold"
    old, new = Snapshot(folder / OLD), Snapshot(folder / NEW)
    diff = old.diff(new)
    seconds = []
    left = 0
    meter = Meter()
    with meter:
        for _ in range(CALLS):
            if is_cold:
                left = max(left, measure.evict(folder))
                old, new = Snapshot(folder / OLD), Snapshot(folder / NEW)
            seconds.append(_seconds(lambda: old.diff(new)))  # noqa: B023 - called at once
    expected = -(-task.workload.small_tensors // SHARE_CHANGED)
    return Outcome(
        statistics.median(seconds),
        meter.cpu_seconds,
        meter.peak_extra_bytes,
        cached_bytes=left,
        error=_changed_error(diff, expected),
    )


def _large_count(task: Task) -> int:
    """Tensors of 1 MiB in each of the two."""
    return max(1, task.workload.total_bytes // 2 // MIB)


def _prepare_large(task: Task) -> Outcome:
    folder = Path(task.kept) / "large"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"layers.{number}.weight": torch.empty(MIB // 4).uniform_(-1, 1, generator=generator) for number in range(_large_count(task))
    }
    _take(folder / OLD, tensors)
    for tensor in tensors.values():
        tensor.mul_(SCALE)
    _take(folder / NEW, tensors)
    return Outcome()


def _is_as_made(found: Statistics | None) -> bool:
    return found is not None and math.isclose(found.relative, SCALE - 1, rel_tol=0.01) and found.changed > 0.9  # noqa: PLR2004 - of nearly all


def _diff_stats(task: Task) -> Outcome:
    folder = Path(task.kept) / "large"
    old, new = Snapshot(folder / OLD), Snapshot(folder / NEW)
    budget = task.memory_budget_bytes or BUDGET_BYTES
    total = old.nbytes + new.nbytes
    left = measure.evict(folder)
    meter = Meter()
    with meter:
        diff = old.diff(new, stats=True, memory_budget_bytes=budget, progress=False)
    wrong = [path for path in diff.changed if not _is_as_made(diff[path].statistics)]
    error = _changed_error(diff, _large_count(task)) or (f"wrong statistics of {wrong[0]}" if wrong else "")
    if meter.peak_extra_bytes > budget:
        error = error or f"{meter.peak_extra_bytes / MIB:.0f} MiB were used, of a budget of {budget / MIB:.0f}"
    return Outcome(meter.seconds, meter.cpu_seconds, meter.peak_extra_bytes, total, cached_bytes=left, error=error)


# scan


def _prepare_scan(task: Task) -> Outcome:
    folder = Path(task.kept) / "many"
    tensors = {f"layers.{number}.weight": torch.zeros(16) for number in range(TENSORS_SCANNED)}
    for number in range(task.workload.snapshots):
        tensors["layers.0.weight"] += 1
        live: dict[str, Stateful] = {KEY: TensorState(dict(tensors))}
        path = folder / f"run-{number // 100}" / f"step-{number}"
        Snapshot.take(path, live, step=number, metrics={"loss": 1 / (number + 1)}, params={"lr": 0.1}, catalog=False, progress=False)
    return Outcome()


def _scan(task: Task) -> Outcome:
    catalog = Catalog(Path(task.folder) / "catalog.db")
    catalog.search(project="*")  # what is imported and made once
    meter = Meter()
    with meter:
        catalog.scan(Path(task.kept) / "many")
    found = len(catalog.search(project="*"))
    return Outcome(
        meter.seconds,
        meter.cpu_seconds,
        meter.peak_extra_bytes,
        error="" if found == task.workload.snapshots else f"{found} snapshots instead of {task.workload.snapshots}",
    )


STEPS: dict[str, Callable[[Task], Outcome]] = {
    "record": _record,
    "prepare_search": _prepare_records("catalog.db", 1),
    "search": _search(COMMON),
    "prepare_search_any": _prepare_records("catalog.db", 1),
    "search_any": _search(ANY),
    "prepare_to_pandas": _prepare_records("frame.db", SHARE_OF_FRAME),
    "to_pandas": _to_pandas,
    "prepare_diff": _prepare_wide,
    "diff": _diff,
    "prepare_diff_cold": _prepare_wide,
    "diff_cold": _diff,
    "prepare_diff_stats": _prepare_large,
    "diff_stats": _diff_stats,
    "prepare_scan": _prepare_scan,
    "scan": _scan,
}
