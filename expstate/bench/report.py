"""Results: one record for each operation and system, as JSON and as a table.

Gets the outcomes of every repeat; hands on records with the median of the best setting, compared with the limit and the best peer.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import msgspec

from expstate.bench.plan import GIB, LIMIT, MIB, OPERATIONS, SYSTEMS, Outcome, Target

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence


class Record(msgspec.Struct):
    """One row of the result.

    Attributes
    ----------
    operation, system : str
        What was measured.
    seconds : list of float
        Wall seconds of every repeat, of the setting with the best median.
    gib_per_s, ratio_to_limit : float or None
        From the medians; a ratio of 1 is the limit, less is slower. None where there is no such thing.
    peak_extra_bytes : int
        The highest of the repeats.
    cpu_seconds : float or None
        Median of user and system time.
    setting : str
        The setting that was best; for a limit also which one it is.
    ratio_to_best_peer : float or None
        How many times as fast as the fastest other library.
    cached_bytes : int
        The most that was still in the page cache when a cold operation began.
    parts : dict of str to list of float
        Seconds of the parts of an operation.
    figures : dict of str to list of float
        What else was counted, such as bytes.
    left_out : str
        Why it was not measured on this machine, or empty.
    error : str
        Why there is no result, or empty.
    """

    operation: str
    system: str
    seconds: list[float] = msgspec.field(default_factory=list)
    gib_per_s: float | None = None
    ratio_to_limit: float | None = None
    peak_extra_bytes: int = 0
    cpu_seconds: float | None = None
    setting: str = ""
    ratio_to_best_peer: float | None = None
    cached_bytes: int = 0
    parts: dict[str, list[float]] = msgspec.field(default_factory=dict)
    figures: dict[str, list[float]] = msgspec.field(default_factory=dict)
    left_out: str = ""
    error: str = ""


def _record(operation: str, system: str, setting: str, outcomes: Sequence[Outcome]) -> Record:
    errors = [outcome.error for outcome in outcomes if outcome.error]
    if errors:
        return Record(operation, system, setting=setting, error=errors[0])
    if outcomes[0].left_out:
        return Record(operation, system, setting=setting, left_out=outcomes[0].left_out)
    seconds = [outcome.seconds for outcome in outcomes]
    return Record(
        operation,
        system,
        seconds=seconds,
        gib_per_s=outcomes[0].bytes / GIB / statistics.median(seconds) if outcomes[0].bytes else None,
        peak_extra_bytes=max(outcome.peak_extra_bytes for outcome in outcomes),
        cpu_seconds=statistics.median(outcome.cpu_seconds for outcome in outcomes),
        setting=setting,
        cached_bytes=max(outcome.cached_bytes for outcome in outcomes),
        parts={part: [outcome.parts[part] for outcome in outcomes] for part in outcomes[0].parts},
        figures={name: [outcome.figures[name] for outcome in outcomes] for name in outcomes[0].figures},
    )


def _median(record: Record) -> float:
    return statistics.median(record.seconds) if record.seconds else float("inf")


def _rank(record: Record) -> tuple[bool, int, float]:
    # A setting that was given up early has too few repeats to be compared by its median.
    return not record.seconds, -len(record.seconds), _median(record)


def records(results: Mapping[tuple[str, str, str, str], Sequence[Outcome]]) -> list[Record]:
    """Make one record of each operation and system.

    Parameters
    ----------
    results : mapping
        Outcomes of every repeat by operation, system, component of the limit, and setting.

    Returns
    -------
    list of Record
        In the order of the plan; of several settings the one with the best median, of several components of a limit the slowest. Another
        system has a record of each component.

    Examples
    --------
    >>> outcomes = {
    ...     ("take", "limit", "write", "1 thread"): [Outcome(1.0, bytes=2**30)],
    ...     ("take", "torch", "", ""): [Outcome(4.0, bytes=2**30)],
    ... }
    >>> [(record.system, record.ratio_to_limit, record.gib_per_s) for record in records(outcomes)]
    [('limit', 1.0, 1.0), ('torch', 0.25, 0.25)]
    """
    best: dict[tuple[str, str, str], Record] = {}
    for (operation, system, component, setting), outcomes in results.items():
        record = _record(operation, system, " ".join(filter(None, (component, setting))), outcomes)
        key = operation, system, component
        if key not in best or _rank(record) < _rank(best[key]):
            best[key] = record
    rows: dict[tuple[str, str, str], Record] = {}
    for (operation, system, component), record in best.items():
        row = operation, system, "" if system == LIMIT else component
        # A component that failed leaves no limit at all: the slowest is unknown then.
        if row not in rows or _median(record) > _median(rows[row]):
            rows[row] = record
    order = list(OPERATIONS)
    found = sorted(rows.values(), key=lambda record: (order.index(record.operation), SYSTEMS.index(record.system)))
    _compare(found)
    return found


def _compare(found: Iterable[Record]) -> None:
    found = list(found)
    for operation in {record.operation for record in found}:
        row = [record for record in found if record.operation == operation and record.seconds]
        limit = next((_median(record) for record in row if record.system == LIMIT), None)
        peer = min((_median(record) for record in row if record.system not in {LIMIT, "expstate"}), default=None)
        for record in row:
            record.ratio_to_limit = limit / _median(record) if limit is not None else None
            if record.system == "expstate" and peer is not None:
                record.ratio_to_best_peer = peer / _median(record)


_COLUMNS = ("operation", "system", "setting", "seconds", "from", "to", "GiB/s", "of limit", "x best peer", "peak MiB", "CPU s")
_TEXT_COLUMNS = 3
_FINE = 0.1
"""Figures below it have four decimals."""


def _seconds(value: float) -> str:
    return f"{value:.4f}" if value < 1 else f"{value:.2f}"


def _number(value: float | None, pattern: str) -> str:
    return "-" if value is None else format(value, pattern)


def _cells(record: Record) -> list[str]:
    return [
        record.operation,
        record.system,
        record.setting,
        _seconds(_median(record)),
        _seconds(min(record.seconds)),
        _seconds(max(record.seconds)),
        _number(record.gib_per_s, ".2f"),
        _number(record.ratio_to_limit, ".2f"),
        _number(record.ratio_to_best_peer, ".2f"),
        f"{record.peak_extra_bytes / MIB:.0f}",
        _number(record.cpu_seconds, ".2f"),
    ]


def _cells_of_none(record: Record) -> list[str]:
    return [record.operation, record.system, record.setting, "left out" if record.left_out else "failed"]


def table(found: Sequence[Record]) -> str:
    """The records as aligned text, with what failed, what was left out and what else was measured below, beside its targets."""
    rows = [
        list(_COLUMNS),
        *(_cells(record) if record.seconds else _cells_of_none(record) for record in found),
    ]
    widths = [max(len(row[column]) for row in rows if column < len(row)) for column in range(len(_COLUMNS))]
    lines: list[str] = []
    previous = ""
    for row in rows:
        if row[0] != previous and lines:
            lines.append("")
        previous = row[0]
        cells = [
            cell.ljust(width) if column < _TEXT_COLUMNS else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(cells).rstrip())
    notes = [f"{record.operation} {record.system}: {note}" for record in found for note in _notes(record)]
    return "\n".join([*lines, "", *notes]).rstrip() + "\n"


def _notes(record: Record) -> list[str]:
    notes = [f"{what}: {why}" for what, why in (("failed", record.error), ("left out", record.left_out)) if why]
    if record.cached_bytes:
        notes.append(f"{record.cached_bytes / MIB:.1f} MiB were still in the page cache")
    if record.parts:
        notes.append(", ".join(f"{part} {_seconds(statistics.median(seconds))} s" for part, seconds in record.parts.items()))
    if record.figures:
        targets = {target.figure: target for target in OPERATIONS[record.operation].targets}
        medians = {name: statistics.median(values) for name, values in record.figures.items()}
        notes.append(", ".join(f"{name} {_figure(value)}{_beside(value, targets.get(name))}" for name, value in medians.items()))
    return notes


def _beside(value: float, target: Target | None) -> str:
    if target is None:
        return ""
    return f" (target: at {'least' if target.at_least else 'most'} {target.value:,}, {'met' if target.is_met(value) else 'missed'})"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:.3f}" if abs(value) >= _FINE else f"{value:.4f}"
