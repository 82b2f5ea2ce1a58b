"""The plan of a restore: what goes where, and everything that stands in the way, found before a live byte changes.

``plan_key`` matches the entries of one key with the live state of its stateful and gives a ``KeyPlan``: the parts to build the
new state dict from, with a ``Placement`` for each tensor that must be read, into live memory or new. Problems are collected, not
raised.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from expstate.engine import match, optimizers
from expstate.engine.devices import usable_device
from expstate.errors import ExpstateError
from expstate.format.manifest import AliasEntry, ContainerEntry, Entry, ObjectEntry, TensorEntry, ValueEntry
from expstate.state import codecs, paths, tensors, tree
from expstate.state.values import decode

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from expstate.engine.source import SnapshotSource
    from expstate.state.stateful import Stateful


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """How to restore, as ``Snapshot.restore`` documents it."""

    include: tuple[str, ...] | None
    exclude: tuple[str, ...]
    rename: Mapping[str, str]
    strict: bool
    cast: bool
    trust: bool
    device: torch.device | None


@dataclass(slots=True)
class Placement:
    """A tensor or array to read: the entry (aliases resolved), and the live one to read it into or where to make a new one."""

    path: str
    stored_path: str
    entry: TensorEntry
    live: tree.Array | None
    device: torch.device
    value: Any = None
    tensor: torch.Tensor | None = None

    @property
    def is_cast(self) -> bool:
        """Whether values are converted."""
        return self.live is not None and self.live.dtype != self.entry.dtype


@dataclass(slots=True)
class KeyPlan:
    """How one key comes back.

    ``items`` are, in order, paths with a container entry, a ``Placement``, an ``ObjectEntry`` still to be decoded, or a finished
    value in a one-tuple.
    """

    key: str
    stateful: Stateful
    live_state: Any
    items: list[tuple[str, ContainerEntry | Placement | ObjectEntry | tuple[Any]]] = field(default_factory=list)
    stored_paths: list[str] = field(default_factory=list)
    live_values: dict[str, Any] = field(default_factory=dict)
    kept: dict[str, tree.Part] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    placements: list[Placement] = field(default_factory=list)
    is_full: bool = True


class _KeyPlanner:
    def __init__(self, source: SnapshotSource, key: str, stateful: Stateful, live_state: Any, options: RestoreOptions) -> None:
        self._source = source
        self._options = options
        self._root = paths.quote(key)
        self._is_module = isinstance(stateful, torch.nn.Module)
        self._plan = KeyPlan(key, stateful, live_state)
        self._live: dict[str, tree.Leaf] = {leaf.path: leaf for leaf in tree.flatten(key, live_state, allow_meta=True)}
        self._device_of = self._device_rule(stateful)

    def _device_rule(self, stateful: Stateful) -> Callable[[str, str | None], torch.device]:
        """Where a tensor without a live counterpart is made, by its path and the device it was taken from."""
        if self._options.device is not None:
            device = self._options.device
            return lambda path, recorded: device  # noqa: ARG005 - one device for all
        if isinstance(stateful, torch.optim.Optimizer):
            return optimizers.state_devices(stateful, self._root)
        return lambda path, recorded: usable_device(recorded)  # noqa: ARG005 - the recorded one

    def plan(self, selected: Callable[[str], bool] | None) -> KeyPlan:
        """Match every entry; the plan with its problems."""
        entries = self._source.subtree(self._root)
        owners = _owners(entries)
        chosen = self._choose(entries, owners, selected)
        mapped = self._map(entries, chosen)
        partial = _containers_of(entry.path for entry in entries if entry.path not in chosen)
        misfits: set[str] = set()
        for entry in entries:
            path = mapped.get(entry.path)
            if path is None:
                continue
            if isinstance(entry, ContainerEntry):
                self._add_container(entry, path, is_partial=entry.path in partial)
                if owners.get(entry.path) == entry.path and not self._fits(entry, path):
                    misfits.add(entry.path)
            else:
                self._add_leaf(entry, path, in_place=owners.get(entry.path) not in misfits)
        self._plan.problems += self._check_optimizer(entries)
        return self._plan

    # Which entries, and under which names

    def _choose(self, entries: list[Entry], owners: Mapping[str, str], selected: Callable[[str], bool] | None) -> set[str]:
        """Paths of the entries that come back, with the containers around them."""
        if selected is None:
            return {entry.path for entry in entries}
        inner = _containers_of(entry.path for entry in entries)
        picked = {entry.path for entry in entries if entry.path not in inner and selected(entry.path)}
        # An object of several parts comes back as a whole or not at all.
        whole = {owners[path] for path in picked if path in owners}
        picked |= {entry.path for entry in entries if owners.get(entry.path) in whole}
        chosen = picked | _containers_of(picked)
        self._plan.is_full = len(chosen) == len(entries)
        return chosen

    def _map(self, entries: list[Entry], chosen: set[str]) -> dict[str, str]:
        """Snapshot paths of the chosen entries to the live paths they go to."""
        plan, options = self._plan, self._options
        targets = {entry.path: entry.path for entry in entries if entry.path in chosen}
        if options.rename:
            targets = {path: match.renamed(path, options.rename) for path in targets}
        targets[self._root] = self._root
        if self._is_module:
            stored = list(dict.fromkeys(match.name_of(path) for path in targets.values() if path != self._root))
            live = list(dict.fromkeys(match.name_of(path) for path in self._live if path != self._root))
            names = match.through_wrappers(stored, live)
            self._report_names(stored, live, names)
            targets = {path: moved for path, target in targets.items() if (moved := self._moved(target, names)) is not None}
        clashes = len(targets) - len(set(targets.values()))
        if clashes:
            plan.problems.append(f"key {plan.key!r}: the rename gives {clashes:,} entries a name that another has already")
        return targets

    def _moved(self, path: str, names: Mapping[str, str]) -> str | None:
        if path == self._root:
            return path
        name = names.get(match.name_of(path))
        rest = path.split("/", 2)[2:]
        return None if name is None else "/".join([self._root, paths.quote(name), *rest])

    def _report_names(self, stored: list[str], live: list[str], names: Mapping[str, str]) -> None:
        plan = self._plan
        matched = set(names.values())
        plan.missing = [name for name in live if name not in matched] if plan.is_full else []
        unexpected = [name for name in stored if name not in names]
        plan.unexpected = [f"{self._root}/{paths.quote(name)}" for name in unexpected]
        if not self._options.strict:
            return
        for what, found in (("lacks", plan.missing), ("has names that the live module has not:", unexpected)):
            if found:
                plan.problems.append(f"key {plan.key!r}: the snapshot {what} {_some(found)}")
        rename = match.suggest_rename([name for name in live if name not in matched], unexpected)
        if rename:
            plan.problems.append(f"key {plan.key!r}: only a prefix differs; pass rename={rename!r}")

    # What goes where

    def _add_container(self, entry: ContainerEntry, path: str, *, is_partial: bool) -> None:
        plan = self._plan
        plan.items.append((path, entry))
        live = self._live.get(path)
        if not isinstance(live, tree.Container):
            return
        plan.live_values[path] = live.value
        if is_partial and not (self._is_module and path == self._root):
            if live.type != entry.type:
                plan.problems.append(
                    f"entry {entry.path!r} is a {entry.type} in the snapshot and a {live.type} live: it cannot be restored in part"
                )
            plan.kept[path] = tree.Part(path, entry.type, entry.meta, live.value)

    def _fits(self, entry: ContainerEntry, path: str) -> bool:
        live = self._live.get(path)
        return isinstance(live, tree.Container) and (live.type, live.meta) == (entry.type, entry.meta)

    def _add_leaf(self, entry: Entry, path: str, *, in_place: bool) -> None:
        plan = self._plan
        plan.stored_paths.append(entry.path)
        if isinstance(entry, ValueEntry):
            try:
                plan.items.append((path, (decode(entry.value),)))
            except ExpstateError as error:
                plan.problems.append(f"entry {entry.path!r}: {error}")
        elif isinstance(entry, ObjectEntry):
            plan.items.append((path, entry))
        elif isinstance(entry, (TensorEntry, AliasEntry)):
            tensor = self._source.resolve(entry)
            assert isinstance(tensor, TensorEntry)
            live = self._live_array(entry.path, tensor, path) if in_place else None
            placement = Placement(path, entry.path, tensor, live, self._device_of(path, tensor.device))
            plan.placements.append(placement)
            plan.items.append((path, placement))

    def _live_array(self, stored_path: str, entry: TensorEntry, path: str) -> tree.Array | None:
        """The live tensor or array that the entry can be read into; problems where there is one that should fit and does not."""
        leaf = self._live.get(path)
        if isinstance(leaf, tree.Alias):
            target = self._live[leaf.target]
            assert isinstance(target, tree.Array)
            leaf = tree.Array(path, target.kind, target.dtype, target.shape, target.tensor, leaf.value, target.requires_grad)
        if not isinstance(leaf, tree.Array) or (leaf.kind == "numpy") != (entry.kind == "numpy"):
            if self._is_module and leaf is not None:
                self._plan.problems.append(f"entry {stored_path!r} is a tensor in the snapshot and none in the live module")
            return None
        if leaf.shape != entry.shape:
            if self._is_module or optimizers.must_fit(self._plan.stateful, path):
                self._plan.problems.append(f"entry {stored_path!r} has shape {entry.shape} in the snapshot and {leaf.shape} live")
            return None
        if leaf.dtype != entry.dtype and not (self._options.cast and entry.kind != "numpy"):
            hint = "" if entry.kind == "numpy" else "; pass cast=True to convert"
            self._plan.problems.append(f"entry {stored_path!r} has dtype {entry.dtype} in the snapshot and {leaf.dtype} live{hint}")
            return None
        if not _is_in_place(leaf):
            if self._is_module:
                self._plan.problems.append(
                    f"entry {stored_path!r}: the live tensor's elements share memory, so values cannot be read into it"
                )
            return None
        return leaf

    def _check_optimizer(self, entries: list[Entry]) -> list[str]:
        if not isinstance(self._plan.stateful, torch.optim.Optimizer):
            return []
        return optimizers.check(self._plan.stateful, self._plan.live_state, entries, self._root)


def _owners(entries: list[Entry]) -> dict[str, str]:
    """For each entry that is, or is part of, an object stored in parts: the path of the outermost such object."""
    owners: dict[str, str] = {}
    for entry in entries:
        owner = owners.get(paths.parent(entry.path))
        if owner is None and isinstance(entry, ContainerEntry) and codecs.by_name(entry.type).opaque:
            owner = entry.path
        if owner is not None:
            owners[entry.path] = owner
    return owners


def _containers_of(found: Iterable[str]) -> set[str]:
    """The paths above these."""
    above: set[str] = set()
    for path in found:
        container = paths.parent(path)
        while container and container not in above:
            above.add(container)
            container = paths.parent(container)
    return above


def _is_in_place(leaf: tree.Array) -> bool:
    if leaf.kind == "numpy":
        return bool(leaf.value.flags.c_contiguous and leaf.value.flags.writeable)
    return leaf.address is not None or tensors.is_writable_in_place(leaf.tensor)


def _some(found: list[str], most: int = 10) -> str:
    shown = ", ".join(map(repr, found[:most]))
    return shown if len(found) <= most else f"{shown} and {len(found) - most:,} more"


def plan_key(
    source: SnapshotSource, key: str, stateful: Stateful, live_state: Any, options: RestoreOptions, selected: Callable[[str], bool] | None
) -> KeyPlan:
    """Plan the restore of one key.

    Parameters
    ----------
    source : SnapshotSource
        The snapshot.
    key, stateful, live_state : str, Stateful, Any
        What is live: the stateful and its state dict.
    options : RestoreOptions
        How.
    selected : callable or None
        Whether an entry path comes back; None for all.

    Returns
    -------
    KeyPlan
        With the problems found.
    """
    return _KeyPlanner(source, key, stateful, live_state, options).plan(selected)


def aim(plans: list[KeyPlan]) -> tuple[list[Placement], list[str]]:
    """What to read, and problems where two different entries aim at one live memory.

    Entries with equal bytes that go to the very same memory (tied tensors that were taken untied) are read once.
    """
    found = [placement for plan in plans for placement in plan.placements]
    spans = []
    for number, placement in enumerate(found):
        tensor = placement.live.tensor if placement.live is not None else None
        if tensor is None or tensor.is_meta or not tensor.numel():
            continue
        assert placement.live is not None
        at = placement.live.address
        if at is not None:
            spans.append((0, at, at + placement.live.nbytes, number))
        else:
            start = tensor.data_ptr()
            spans.append((0 if tensor.is_cpu else 1 + (tensor.device.index or 0), start, start + _extent(tensor), number))
    spans.sort()
    twice: set[int] = set()
    problems = []
    for (device, start, stop, first), (other_device, other_start, other_stop, second) in itertools.pairwise(spans):
        if device != other_device or other_start >= stop:
            continue
        one, other = found[first], found[second]
        assert one.live is not None
        assert other.live is not None
        same_place = (start, stop) == (other_start, other_stop) and one.live.tensor.stride() == other.live.tensor.stride()
        if same_place and _same_bytes(one.entry, other.entry):
            twice.add(second)
        # Views that interleave, such as the columns of one matrix, have overlapping extents and no element in common.
        elif same_place or (one.live.tensor.is_contiguous() and other.live.tensor.is_contiguous()):
            problems.append(f"entries {one.stored_path!r} and {other.stored_path!r} differ, and their live tensors are the same memory")
    return [placement for number, placement in enumerate(found) if number not in twice], problems


def _extent(tensor: torch.Tensor) -> int:
    """Bytes from a tensor's first element to its last."""
    if tensor.is_contiguous():
        return tensor.nbytes
    last = sum((count - 1) * stride for count, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + last) * tensor.element_size()


def _same_bytes(one: TensorEntry, other: TensorEntry) -> bool:
    return one is other or (one.dtype == other.dtype and [box.digest for box in one.boxes] == [box.digest for box in other.boxes])
