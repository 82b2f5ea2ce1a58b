"""The benchmark's command line, and the loop that gives every system its turn.

Gets options; starts one child process for each step, in turn, and hands the outcomes to ``report``. Its files live in one folder of their
own below PATH, removed at the end.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from expstate.bench import report
from expstate.bench.plan import (
    CATALOG,
    DISK,
    GIB,
    KIB,
    LIMIT,
    MIB,
    MODULES,
    NOTEBOOK,
    OPERATIONS,
    SYSTEMS,
    Outcome,
    Task,
    Workload,
    contenders,
    operation_names,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Sequence

    from expstate.bench.plan import Operation

DESCRIPTION = (
    "Measure take, restore and read beside the limits of this machine and beside other libraries, in turn, each step in a fresh process. "
    "Prints progress to stderr and a table to stdout."
)
_CHILD_SECONDS = 3600
_HOPELESS = 2
_SPARE_STATES = 3
_FEWEST_TENSORS = 2


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure.

    Attributes
    ----------
    path : Path
        Folder on the disk to measure.
    workload : Workload
        The state, and where it is.
    operations, systems : sequence of str
        Which of the plan.
    repeat : int
        How often each is measured.
    slow_seconds : float
        What takes longer is not repeated.
    memory_budget_bytes : int, optional
        For takes and restores of expstate.
    """

    path: Path
    workload: Workload
    operations: Sequence[str]
    systems: Sequence[str]
    repeat: int = 5
    slow_seconds: float = 60.0
    memory_budget_bytes: int | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options to a parser."""
    parser.add_argument(
        "path",
        metavar="PATH",
        help="folder on the disk to measure, with room for several copies of the state; "
        "or the word catalog, to measure the catalog and comparisons in the current folder, or the word notebook, to measure what a "
        "notebook's user waits for (a folder of such a name is ./catalog)",
    )
    parser.add_argument(
        "--gib",
        type=float,
        metavar="N",
        help="size of the state, or of the two that are compared (default: 2; for notebooks 1)",
    )
    parser.add_argument("--tensors", type=int, default=100, metavar="N", help="number of its tensors (default: 100)")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="times that each is measured (default: 5)")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, metavar="SYSTEM", help=f"of {', '.join(SYSTEMS)} (default: all installed)")
    of_disk, of_catalog, of_notebook = (", ".join(operation_names(device=True, benchmark=one)) for one in (DISK, CATALOG, NOTEBOOK))
    parser.add_argument(
        "--operations",
        nargs="+",
        choices=tuple(OPERATIONS),
        metavar="OPERATION",
        help=f"of a disk: {of_disk}; of the catalog: {of_catalog}; of notebooks: {of_notebook} (default: all)",
    )
    parser.add_argument("--device", default="cpu", metavar="D", help="where the state is, any device that torch names (default: cpu)")
    parser.add_argument(
        "--small-tensors",
        type=int,
        metavar="N",
        help="tensors of 1 KiB in small_tensors (default: 100000), or in each snapshot of diff and browse (default: 10000)",
    )
    parser.add_argument(
        "--records", type=int, default=100_000, metavar="N", help="records of the catalog that is searched (default: 100000)"
    )
    parser.add_argument("--snapshots", type=int, default=1000, metavar="N", help="snapshots that are scanned (default: 1000)")
    parser.add_argument("--memory-budget-mib", type=int, metavar="N", help="memory budget of expstate (default: its own)")
    parser.add_argument(
        "--slow-seconds", type=float, default=60.0, metavar="S", help="what takes longer than this is not repeated (default: 60)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")


def _check_device(device: str) -> None:
    import torch  # the parent needs it for nothing else

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None or found.type != device.partition(":")[0]:
        msg = f"--device {device}: this PyTorch finds {found.type if found else 'no accelerator'} here"
        raise ValueError(msg)


def options_from(arguments: argparse.Namespace) -> Options:
    """The options that a command line asks for.

    Raises
    ------
    ValueError
        If they cannot be met: a size that cannot be laid out, a folder or device that is missing, a disk that is too small.
    """
    on_device = arguments.device != "cpu"
    benchmark = arguments.path if arguments.path in {CATALOG, NOTEBOOK} else DISK
    of_disk = benchmark == DISK
    if on_device and not of_disk:
        msg = f"--device {arguments.device}: this benchmark measures on the host"
        raise ValueError(msg)
    if on_device:
        _check_device(arguments.device)
    path = Path(arguments.path) if of_disk else Path()
    gib = arguments.gib if arguments.gib is not None else 1.0 if benchmark == NOTEBOOK else 2.0
    total_bytes = int(gib * GIB) // 16 * 16
    if not path.is_dir():
        msg = f"{str(path)!r} is no folder: name an existing one on the disk to measure"
        raise ValueError(msg)
    if arguments.json is not None and not arguments.json.resolve().parent.is_dir():
        msg = f"--json {arguments.json}: its folder does not exist"
        raise ValueError(msg)
    small_tensors = arguments.small_tensors if arguments.small_tensors is not None else 100_000 if of_disk else 10_000
    if min(arguments.repeat, small_tensors, arguments.records, arguments.snapshots) < 1:
        msg = "--repeat, --small-tensors, --records and --snapshots must be at least 1"
        raise ValueError(msg)
    if not _FEWEST_TENSORS <= arguments.tensors <= 1 + (total_bytes - MIB) // KIB:
        msg = f"--gib {gib:g} --tensors {arguments.tensors}: expected at least 2 tensors, one of 1 MiB and 1 KiB for each other"
        raise ValueError(msg)
    possible = operation_names(device=on_device, benchmark=benchmark)
    operations = [name for name in possible if name in (arguments.operations or possible)]
    if len(operations) < len(set(arguments.operations or operations)):
        others = sorted(set(arguments.operations) - set(possible))
        its = OPERATIONS[others[0]].benchmark
        only = "with --device" if its == benchmark else "with PATH" if its == DISK else f"with `bench {its}`"
        msg = f"{', '.join(others)}: only {only}"
        raise ValueError(msg)
    installed = [system for system in SYSTEMS if system == LIMIT or importlib.util.find_spec(MODULES[system])]
    systems = [system for system in SYSTEMS if system in (arguments.systems or installed)]
    if not of_disk:
        systems = [system for system in systems if system in {LIMIT, "expstate"}]
    needed = (len(systems) + _SPARE_STATES) * total_bytes
    free = shutil.disk_usage(path).free
    if free < needed:
        msg = f"{str(path)!r} has {free / GIB:.1f} GiB free, needed are {needed / GIB:.1f}: lower --gib or choose --systems"
        raise ValueError(msg)
    budget = arguments.memory_budget_mib * MIB if arguments.memory_budget_mib else None
    workload = Workload(total_bytes, arguments.tensors, small_tensors, arguments.device, arguments.records, arguments.snapshots)
    return Options(path, workload, operations, systems, arguments.repeat, arguments.slow_seconds, budget)


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

    def __init__(self, options: Options, folder: Path, execute: Callable[[Task], Outcome]) -> None:
        self._options = options
        self._folder = folder
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
            folder=str(self._folder / "now"),
            kept=str(self._folder / f"kept-{system}"),
            expected=str(self._folder / "expected.json"),
            component=component,
            setting=setting,
            memory_budget_bytes=self._options.memory_budget_bytes,
        )

    def _perform(self, task: Task) -> Outcome:
        folder = Path(task.folder)
        folder.mkdir()
        try:
            return self._execute(task)
        finally:
            shutil.rmtree(folder)

    def _prepare(self, wanted: Sequence[Operation]) -> None:
        """Keep what is read later: a snapshot of every system for the restores, and the digests that these must reach."""
        for system in self._options.systems:
            Path(self._task("", system).kept).mkdir()
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
            if operation.benchmark != DISK and operation.needs_kept and "expstate" in self._options.systems:
                self._prepare_one(f"prepare_{operation.name}", "expstate")

    def _prepare_one(self, step: str, system: str, described: str = "") -> None:
        outcome = self._perform(self._task(step, system))
        error = described or outcome.error
        self._failed[system] = self._failed.get(system) or error
        _progress(f"{step}: {system} {error or 'done'}")

    def _measure(self, operation: str) -> None:
        active = [
            (operation, system, component, setting)
            for system in self._options.systems
            for component, setting in contenders(operation, system, device=self._on_device)
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
        else:
            speed = f", {outcome.bytes / GIB / outcome.seconds:.3g} GiB/s" if outcome.bytes else ""
            _progress(f"{what}: {outcome.seconds:.4g} s{speed}")

    def _goes_on(self, contender: tuple[str, str, str, str], active: Sequence[tuple[str, str, str, str]]) -> bool:
        """Whether another repeat can change the result: not after a failure, a very long run, or far behind the system's best setting."""
        outcomes = self.results[contender]
        if any(outcome.error for outcome in outcomes) or outcomes[-1].seconds > self._options.slow_seconds:
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
    folder = Path(tempfile.mkdtemp(prefix="expstate-bench-", dir=options.path))
    benchmark = _Benchmark(options, folder, execute)
    try:
        benchmark.run()
    finally:
        shutil.rmtree(folder)
    return report.records(benchmark.results)


def main(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> int:
    """Run the benchmark that a command line asks for, and print its table; the exit status."""
    try:
        options = options_from(arguments)
    except ValueError as error:
        parser.error(str(error))
    found = run(options)
    if arguments.json is not None:
        arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    sys.stdout.write(report.table(found))
    return 0
