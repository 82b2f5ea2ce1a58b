"""The steps of the benchmark of several ranks.

Gets a ``Task``, gives an ``Outcome``; ``step`` is what ``child`` performs. It starts the ranks, each a process of its own that does what
``rank`` says, and puts together what they have measured.
"""

from __future__ import annotations

import multiprocessing
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any

import msgspec
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from expstate.bench import rank, simulated
from expstate.bench.plan import LIMIT, Outcome, Task

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

_PATIENCE_SECONDS = 3000.0
_AFTER_FAILURE_SECONDS = 30.0
"""So long others are waited for when one has failed: they fail too, or hang."""
_SIZES = {"reshard_2_to_1": 1, "prepare_reshard_1_to_2": 1}
_RANKS = 2


class _Started:
    """Rank processes of one step; they end with the ``with`` block, whatever they do."""

    def __init__(self, task: Task, places: list[rank.Place], port: int) -> None:
        context: Any = multiprocessing.get_context("forkserver")
        # What each would have to import; the second is what the first DTensor needs.
        context.set_forkserver_preload(["expstate.bench.rank", "torch._dynamo"])
        self.processes: list[Any] = []
        self.connections: list[Connection] = []
        for place in places:
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=rank.main, args=(msgspec.json.encode(task), place, port, there), daemon=True)
            process.start()
            there.close()
            self.processes.append(process)
            self.connections.append(here)

    def __enter__(self) -> list[Connection]:
        return self.connections

    def __exit__(self, *error: object) -> None:
        for process, connection in zip(self.processes, self.connections, strict=True):
            connection.close()
            process.join(_AFTER_FAILURE_SECONDS if error[0] is None else 0)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()


def _run(task: Task, places: list[rank.Place], port: int) -> list[Outcome]:
    """What each rank has measured; a rank that does not tell has failed."""
    found: dict[int, Outcome] = {}
    patience = _PATIENCE_SECONDS
    with _Started(task, places, port) as connections:
        while len(found) < len(places):
            waiting = {connection: number for number, connection in enumerate(connections) if number not in found}
            ready = wait(list(waiting), patience)
            if not ready:
                found |= dict.fromkeys(waiting.values(), Outcome(error="has told nothing"))
            for connection in ready:
                number = waiting[connection]  # type: ignore[index]
                try:
                    found[number] = msgspec.json.decode(connection.recv_bytes(), type=Outcome)  # type: ignore[union-attr]
                except EOFError:
                    found[number] = Outcome(error="has died")
                if found[number].error:
                    patience = _AFTER_FAILURE_SECONDS
    return [found[number] for number in range(len(places))]


def _together(task: Task) -> Outcome:
    """A step of ranks that meet in a store."""
    size = _SIZES.get(task.operation, _RANKS)
    prepares = task.operation.startswith("prepare_")
    if prepares:
        kept = rank.kept_of(task, size)
        if kept.exists():
            return Outcome()
        kept.mkdir()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    of_ranks = _run(task, [rank.Place(number, size) for number in range(size)], store.port)
    errors = [f"rank {number}: {outcome.error}" for number, outcome in enumerate(of_ranks) if outcome.error]
    return Outcome(
        seconds=max(outcome.seconds for outcome in of_ranks),
        cpu_seconds=sum(outcome.cpu_seconds for outcome in of_ranks),
        peak_extra_bytes=sum(outcome.peak_extra_bytes for outcome in of_ranks),
        bytes=0 if prepares else task.workload.total_bytes,
        cached_bytes=max(outcome.cached_bytes for outcome in of_ranks),
        figures=_figures(task, [outcome.figures for outcome in of_ranks]),
        error=errors[0] if errors else "",
    )


def _figures(task: Task, of_ranks: list[dict[str, float]]) -> dict[str, float]:
    if task.system == LIMIT or not all(of_ranks):
        return {}
    # As much as the state has is needed, in whatever shares.
    moved = "written_bytes" if task.operation.startswith("take") else "read_bytes"
    total = sum(figures[moved] for figures in of_ranks)
    shares = {f"share_of_rank_{number}": figures[moved] / total for number, figures in enumerate(of_ranks)}
    return {moved: total, "of_needed": total / task.workload.total_bytes, **shares}


def _plan(task: Task) -> Outcome:
    size = task.workload.ranks
    return _run(task, [rank.Place(size // 2, size)], 0)[0]


_ALONE: dict[str, Callable[[Task], Outcome]] = {
    "merge_1024": simulated.merge,
    "prepare_plan_1024": simulated.prepare,
    "plan_1024": _plan,
}


def step(task: Task) -> Callable[[Task], Outcome]:
    """What measures a task."""
    return _ALONE.get(task.operation, _together)
