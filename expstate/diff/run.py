"""A comparison from beginning to end: entries by digests, then what must be read, then the report.

``diff_snapshots`` and ``diff_live`` get sources and checked options, and hand on a ``SnapshotDiff``.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import msgspec

from expstate import collector
from expstate.diff.compare import Change, Comparison, Listing, compare, find_twins
from expstate.diff.facts import FactDiff, compare_classes, compare_facts
from expstate.diff.live import LiveState
from expstate.diff.report import DiffSide, SnapshotDiff
from expstate.diff.stats import Statistics, Sums, torch_dtype
from expstate.diff.stream import Pair, PairReader
from expstate.engine import memory
from expstate.format.manifest import TensorEntry
from expstate.progress import Progress, ProgressOption
from expstate.state import paths
from expstate.state.stateful import RNGState

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from expstate.engine.source import SnapshotSource
    from expstate.state import tree
    from expstate.state.stateful import Stateful


_GENERATORS = f"{RNGState.__module__}.{RNGState.__qualname__}"
"""The class of the keys that hold random generators."""


class DiffOptions(msgspec.Struct, frozen=True):
    """What to read besides the manifests, the budget for it in bytes, and who is told how far it is."""

    content: bool
    stats: bool
    budget: int
    progress: ProgressOption


def diff_snapshots(old: SnapshotSource, new: SnapshotSource, options: DiffOptions) -> SnapshotDiff:
    """Compare two snapshots, as ``Snapshot.diff`` documents it."""
    with collector.paused():
        listings = (_listing(old), _listing(new))
        comparison = compare(*listings)
        facts = compare_facts(old.manifest, new.manifest)
    work = _Reading(old, new, {}, options)
    comparison = work.read(comparison, listings[1])
    classes = {record.key: record.type for record in (*old.manifest.keys, *new.manifest.keys)}
    return _report(_side(old), _side(new), facts, listings, comparison, work, classes)


def diff_live(old: SnapshotSource, app_state: Mapping[str, Stateful], options: DiffOptions) -> SnapshotDiff:
    """Compare a snapshot with live state: of the snapshot what lies under the keys of the app state."""
    live = LiveState(app_state)
    before = _listing(old, {paths.quote(key) for key in app_state})
    listings = (before, live.listing(before, old.manifest.fingerprint_key, budget=options.budget, progress=options.progress))
    with collector.paused():
        comparison = compare(*listings)
    facts = compare_classes({record.key: record.type for record in old.manifest.keys}, live.classes)
    work = _Reading(old, None, live.arrays, options)
    comparison = work.read(comparison, listings[1])
    return _report(_side(old), DiffSide(), facts, listings, comparison, work, live.classes)


def _listing(source: SnapshotSource, roots: set[str] | None = None) -> Listing:
    entries = source.entries
    if roots is None:
        return Listing(entries, source.by_path)
    entries = tuple(entry for entry in entries if entry.path.partition("/")[0] in roots)
    return Listing(entries, {entry.path: entry for entry in entries})


def _side(source: SnapshotSource) -> DiffSide:
    return DiffSide(source.manifest.id, source.storage.url, source.manifest.metadata.name)


def _report(
    old: DiffSide,
    new: DiffSide,
    facts: tuple[FactDiff, ...],
    listings: tuple[Listing, Listing],
    comparison: Comparison,
    work: _Reading,
    classes: Mapping[str, str],
) -> SnapshotDiff:
    with collector.paused():
        twins = find_twins(comparison, *listings)
        changes = {change.path: change for change in comparison.changed}
    generators = frozenset(paths.quote(key) for key, name in classes.items() if name == _GENERATORS)
    return SnapshotDiff(old, new, facts, work.has_statistics, listings, comparison, twins, work.found, changes, generators)


class _Reading:
    """Reads the tensors that must be read.

    Parameters
    ----------
    old : SnapshotSource
        The older side.
    new : SnapshotSource or None
        The newer side; None if it is live.
    arrays : mapping of str to tree.Array
        What is live, by path.
    options : DiffOptions
        What to read.

    Attributes
    ----------
    found : dict of str to Statistics
        By path.
    """

    def __init__(self, old: SnapshotSource, new: SnapshotSource | None, arrays: Mapping[str, tree.Array], options: DiffOptions) -> None:
        self._old = old
        self._new = new
        self._arrays = arrays
        self._options = options
        self.has_statistics = options.stats
        self.found: dict[str, Statistics] = {}

    def read(self, comparison: Comparison, new: Listing) -> Comparison:
        """Fill ``found``, and tell of tensors in other boxes whether their content differs."""
        pairs = self._pairs(comparison.changed)
        if not pairs:
            return comparison
        self._stream(list(pairs.values()))
        changed: list[Change] = []
        alike: list[str] = []
        for change in comparison.changed:
            pair = pairs.get(_paths(change))
            if pair is not None and pair.sums is not None:
                self.found[change.path] = pair.sums.statistics()
            if pair is None or "layout" not in change.differs:
                changed.append(change)
            elif not pair.is_same:
                changed.append(msgspec.structs.replace(change, differs=(*change.differs, "content")))
            elif change.differs != ("layout",):
                changed.append(change)
            else:
                alike.append(change.path)
        same = [*comparison.same, *(new.by_path[path] for path in alike)]
        return msgspec.structs.replace(comparison, changed=changed, same=same, otherwise_cut=frozenset(alike))

    def _pairs(self, changes: Iterable[Change]) -> dict[tuple[str, str], Pair]:
        """What to read, once for all names that tied tensors have."""
        pairs: dict[tuple[str, str], Pair] = {}
        for change in changes:
            old, new = change.old, change.new
            if not (isinstance(old, TensorEntry) and isinstance(new, TensorEntry)) or old.shape != new.shape:
                continue
            dtypes = torch_dtype(old.kind, old.dtype), torch_dtype(new.kind, new.dtype)
            array = self._arrays.get(new.path)
            if self._options.stats and dtypes[0] is not None and dtypes[1] is not None:
                known = dtypes[0], dtypes[1]
                pairs.setdefault(_paths(change), Pair(old, new, array, known, Sums(*known)))
            elif "layout" in change.differs and (self._options.stats or self._options.content):
                pairs.setdefault(_paths(change), Pair(old, new, array))
        return pairs

    def _stream(self, pairs: list[Pair]) -> None:
        with contextlib.ExitStack() as stack:
            old = stack.enter_context(self._old.opened(self._old.files_of(pair.old for pair in pairs)))
            new = self._new
            if new is not None:
                new = stack.enter_context(new.opened(new.files_of(pair.new for pair in pairs)))
            bar = Progress("diff", sum(pair.nbytes for pair in pairs), self._options.progress)
            try:
                threads, budget = memory.means(self._old.storage, self._options.budget)
                PairReader(old, new, pairs, budget, threads, bar).run()
            finally:
                bar.close()


def _paths(change: Change) -> tuple[str, str]:
    return change.old.path, change.new.path
