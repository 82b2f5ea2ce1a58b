"""The loop that gives every system its turn.

Gets options; starts one child process for each step, in turn, and hands the outcomes to ``report``. Its files live in one folder of their
own below PATH, removed at the end.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from expstate.bench import places, report
from expstate.bench.options import options_from
from expstate.bench.plan import DISK, GIB, LIMIT, OPERATIONS, Outcome, Task, contenders

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from expstate.bench.options import Options
    from expstate.bench.places import Place
    from expstate.bench.plan import Operation

_CHILD_SECONDS = 3600
_HOPELESS = 2


def in_child(task: Task) -> Outcome:
    """Perform a task in a fresh process."""
    root = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    command = [sys.executable, "-m", "expstate.bench.child", msgspec.json.encode(task).decode()]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=_CHILD_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Outcome(error=f"not done after {_CHILD_SECONDS} s")
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        last = done.stderr.strip().splitlines() or ["no output"]
        return Outcome(error=f"exit status {done.returncode}: {last[-1]}")
    return msgspec.json.decode(lines[-1], type=Outcome)


class _Benchmark:
    """One run: the folder it works in and the outcomes so far."""

    def __init__(self, options: Options, place: Place, execute: Callable[[Task], Outcome]) -> None:
        self._options = options
        self._place = place
        self._steps = itertools.count(1)
        self._execute = execute
        self._failed: dict[str, str] = {}
        self.results: dict[tuple[str, str, str, str], list[Outcome]] = {}
        self._on_device = options.workload.device != "cpu"

    def run(self) -> None:
        wanted = [OPERATIONS[name] for name in self._options.operations]
        if any(operation.needs_kept for operation in wanted):
            self._prepare(wanted)
        for operation in wanted:
            self._measure(operation.name)

    def _task(self, operation: str, system: str, component: str = "", setting: str = "") -> Task:
        return Task(
            operation=operation,
            system=system,
            workload=self._options.workload,
            # Another each time: some stores keep a folder that is empty, and take no file of its name.
            folder=self._place.address(f"step-{next(self._steps)}"),
            kept=self._place.address(f"kept-{system}"),
            expected=str(self._place.local / "expected.json"),
            component=component,
            setting=setting,
            memory_budget_bytes=self._options.memory_budget_bytes,
        )

    def _perform(self, task: Task) -> Outcome:
        self._place.make(task.folder)
        try:
            return self._execute(task)
        finally:
            self._place.remove(task.folder)

    def _prepare(self, wanted: Sequence[Operation]) -> None:
        """Keep what is read later: a snapshot of every system for the restores, and the digests that these must reach."""
        for system in self._options.systems:
            self._place.make(self._task("", system).kept)
        of_disk = [operation for operation in wanted if operation.needs_kept and operation.benchmark == DISK]
        is_read = any(limit.startswith("read") for operation in wanted for limit in operation.limits)
        described = ""
        if of_disk:
            _progress("prepare: digests of the state")
            described = self._perform(self._task("describe", "")).error
        for system in self._options.systems:
            if of_disk or (system == LIMIT and is_read):
                self._prepare_one("prepare", system, described)
        for operation in wanted:
            if operation.benchmark != DISK and operation.needs_kept:
                for system in self._options.systems:
                    if system != LIMIT and contenders(operation.name, system, device=False):
                        self._prepare_one(f"prepare_{operation.name}", system)

    def _prepare_one(self, step: str, system: str, described: str = "") -> None:
        outcome = self._perform(self._task(step, system))
        error = described or outcome.error
        self._failed[system] = self._failed.get(system) or error
        _progress(f"{step}: {system} {error or 'done'}")

    def _measure(self, operation: str) -> None:
        active = [
            (operation, system, component, setting)
            for system in self._options.systems
            for component, setting in contenders(operation, system, device=self._on_device, benchmark=self._options.benchmark)
        ]
        for repeat in range(self._options.repeat):
            # Begun by another each time, so that nobody always follows the same neighbour.
            first = repeat % len(active) if active else 0
            for contender in active[first:] + active[:first]:
                self._measure_once(contender, repeat)
            active = [contender for contender in active if self._goes_on(contender, active)]

    def _measure_once(self, contender: tuple[str, str, str, str], repeat: int) -> None:
        operation, system, component, setting = contender
        failed = self._failed.get(system, "") if OPERATIONS[operation].needs_kept else ""
        outcome = Outcome(error=failed) if failed else self._perform(self._task(operation, system, component, setting))
        self.results.setdefault(contender, []).append(outcome)
        what = f"{operation} {repeat + 1}/{self._options.repeat} {' '.join(filter(None, contender[1:]))}"
        if outcome.error:
            _progress(f"{what}: failed: {outcome.error}")
        elif outcome.left_out:
            _progress(f"{what}: left out: {outcome.left_out}")
        else:
            speed = f", {outcome.bytes / GIB / outcome.seconds:.3g} GiB/s" if outcome.bytes else ""
            _progress(f"{what}: {outcome.seconds:.4g} s{speed}")

    def _goes_on(self, contender: tuple[str, str, str, str], active: Sequence[tuple[str, str, str, str]]) -> bool:
        """Whether another repeat can change the result: not where none comes, after a very long run, or far behind the best setting."""
        outcomes = self.results[contender]
        if any(outcome.error or outcome.left_out for outcome in outcomes) or outcomes[-1].seconds > self._options.slow_seconds:
            return False
        if contender[1] == LIMIT:
            # Noise must not lower the mark that everybody is measured by.
            return True
        rivals = [self.results[other] for other in active if other[:3] == contender[:3]]
        best = min(_median_seconds(rival) for rival in rivals if not any(outcome.error for outcome in rival))
        return _median_seconds(outcomes) <= _HOPELESS * best


def _median_seconds(outcomes: Sequence[Outcome]) -> float:
    return statistics.median(outcome.seconds for outcome in outcomes)


def _progress(line: str) -> None:
    sys.stderr.write(f"bench: {line}\n")
    sys.stderr.flush()


def run(options: Options, execute: Callable[[Task], Outcome] = in_child) -> list[report.Record]:
    """Measure.

    Parameters
    ----------
    options : Options
        What to measure.
    execute : callable, optional
        Performs a task; a fresh process for each unless told otherwise.

    Returns
    -------
    list of Record
        One for each operation and system.
    """
    with contextlib.closing(places.make_place(options)) as place:
        benchmark = _Benchmark(options, place, execute)
        benchmark.run()
    return report.records(benchmark.results)


def main(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Run the benchmark that a command line asks for, and print its table; the exit status."""
    try:
        options = options_from(arguments)
    except ValueError as error:
        parser.error(str(error))
    try:
        found = run(options)
    except places.UnreachableError as error:
        parser.error(str(error))
    if arguments.json is not None:
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    sys.stdout.write(report.table(found))
    return 0
