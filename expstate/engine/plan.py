"""The plan of a restore: what goes where, and everything that stands in the way, found before a live byte changes.

``plan_key`` matches the entries of one key with the live state of its stateful and gives a ``KeyPlan``: the parts to build the
new state dict from, with a ``Placement`` for each tensor that must be read, into live memory or new. Problems are collected, not
raised.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from expstate.engine import match, meta, optimizers
from expstate.engine.devices import usable_device
from expstate.errors import ExpstateError
from expstate.format.manifest import AliasEntry, ContainerEntry, Entry, ObjectEntry, TensorEntry, ValueEntry
from expstate.state import codecs, paths, sharding, tensors, tree
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
    position: tuple[int, int] = (0, 1)
    """This rank, and how many there are."""
    is_part: bool = False
    """Whether the snapshot was meant to hold only some names of a module, so that none is missing from it."""


class Placement(msgspec.Struct, eq=False):
    """A tensor or array to read: the entry (aliases resolved), and the live one to read it into or where to make a new one."""

    path: str
    stored_path: str
    entry: TensorEntry
    live: tree.Array | tree.Sharded | None
    device: torch.device
    like: torch.Tensor | None = None
    """The sharded parameter that new memory is to be sharded like."""
    parts: tuple[sharding.Part, ...] | None = None
    """Of a sharded tensor, what is read into."""
    value: Any = None
    tensor: torch.Tensor | None = None
    array: Any = None
    """The live NumPy array of another dtype that the values are converted to when they have been read."""

    @property
    def is_new(self) -> bool:
        """Whether it is read into memory that does not exist yet."""
        return self.live is None or self.live.tensor.is_meta

    def parts_here(self) -> tuple[sharding.Part, ...] | None:
        """What is here, or will be, of a sharded tensor; None of another."""
        if self.parts is not None:
            return self.parts
        if isinstance(self.live, tree.Sharded):
            return self.live.parts
        return None if self.like is None else sharding.sharding_of(self.like).parts

    @property
    def nbytes(self) -> int:
        """Bytes of the stored form that are needed here."""
        parts = self.parts_here()
        return self.entry.nbytes if parts is None else sum(part.tensor.numel() for part in parts) * self.entry.itemsize

    @property
    def is_cast(self) -> bool:
        """Whether values are converted."""
        return self.array is not None or (self.live is not None and self.live.dtype != self.entry.dtype)


@dataclass(slots=True)
class KeyPlan:
    """How one key comes back.

    ``items`` are, in order, paths with a container entry, a ``Placement``, an ``ObjectEntry`` still to be decoded, or a finished
    value in a one-tuple; without any, nothing of the key comes back and its stateful is left alone.
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
    on_meta: dict[str, torch.Tensor] = field(default_factory=dict)
    is_full: bool = True

    def sharing(self, placement: Placement) -> tuple[str, int]:
        """Equal for placements that are one tensor in new memory: tied in the live module, else in the snapshot."""
        live = self.on_meta.get(placement.path)
        return ("stored", id(placement.entry)) if live is None else ("live", id(live))


class _KeyPlanner:
    def __init__(self, source: SnapshotSource, key: str, stateful: Stateful, live_state: Any, options: RestoreOptions) -> None:
        self._source = source
        self._options = options
        self._root = paths.quote(key)
        self._is_module = isinstance(stateful, torch.nn.Module)
        self._plan = KeyPlan(key, stateful, live_state, on_meta=meta.on_meta(stateful, self._root), is_full=not options.is_part)
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
        if self._is_module and not _is_dict(entries[0]):
            self._plan.problems.append(f"key {self._plan.key!r} is not the state of a module in the snapshot, and a module live")
            return self._plan
        owners = _owners(entries)
        chosen = self._choose(entries, owners, selected)
        if not chosen:
            return self._plan
        mapped = self._map(entries, chosen)
        partial = _containers_of(entry.path for entry in entries if entry.path not in chosen)
        if selected is not None:
            # A container that is not chosen itself keeps what is live in it and not in the snapshot.
            partial |= {entry.path for entry in entries if _keeps_items(entry) and not selected(entry.path)} - owners.keys()
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
        self._check_merges(partial)
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
            # A prefix that ends where a container does takes the container along.
            inner = {entry.path for entry in entries if isinstance(entry, ContainerEntry)}
            targets = {
                path: match.renamed(f"{path}/", options.rename).removesuffix("/") if path in inner else match.renamed(path, options.rename)
                for path in targets
            }
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
        if options.rename:
            self._check_rename(entries, targets)
        return targets

    def _check_rename(self, entries: list[Entry], targets: Mapping[str, str]) -> None:
        """Renamed entries must be items of something that has names."""
        containers = {targets[entry.path]: entry for entry in entries if isinstance(entry, ContainerEntry) and entry.path in targets}
        for path, target in targets.items():
            if path in {target, self._root}:
                continue
            container = containers.get(paths.parent(target))
            what = f"entry {path!r} would be renamed to {target!r}"
            if container is None:
                self._plan.problems.append(f"{what}, and nothing of the snapshot is above that")
            elif path.rpartition("/")[2] != target.rpartition("/")[2] and not (
                _is_dict(container) and codecs.has_plain_keys(container.meta)
            ):
                self._plan.problems.append(f"{what}, and the items of {container.path!r} have no names")

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
                plan.problems.append(f"key {plan.key!r}: the snapshot {what} {some(found)}")
        rename = match.suggest_rename([name for name in live if name not in matched], unexpected)
        if rename and "" in rename:
            rename = {f"{self._root}/": f"{self._root}/{rename['']}"}  # a prefix for all names is for this key's alone
        if rename:
            plan.problems.append(f"key {plan.key!r}: only a prefix differs; pass rename={rename!r}")

    # What goes where

    def _add_container(self, entry: ContainerEntry, path: str, *, is_partial: bool) -> None:
        plan = self._plan
        plan.items.append((path, entry))
        try:
            codecs.by_name(entry.type).check(entry.meta)
        except Exception as error:  # noqa: BLE001 - the metadata comes from a file
            plan.problems.append(f"entry {entry.path!r}: {error}")
        live = self._live.get(path)
        if isinstance(live, tree.Container):
            plan.live_values[path] = live.value
        if not is_partial or live is None or (self._is_module and path == self._root):
            return
        # A list of plain values alone is one value, and still a list.
        codec = codecs.find(live.value)
        if codec is not None and codec.name == entry.type:
            plan.live_values[path] = live.value
            plan.kept[path] = tree.Part(path, entry.type, entry.meta, live.value)
        else:
            found = type(live.value).__name__
            plan.problems.append(f"entry {entry.path!r}, a {entry.type} and live a {found}, cannot be restored in part")

    def _check_merges(self, partial: set[str]) -> None:
        """Containers of which only a part comes back must be whole afterwards."""
        if not partial:
            return
        plan = self._plan
        children: dict[str, codecs.Parts] = {}
        for path, _ in plan.items:
            children.setdefault(paths.parent(path), {})[path.rpartition("/")[2]] = None
        for path, item in plan.items:
            if not isinstance(item, ContainerEntry) or item.path not in partial or (self._is_module and path == self._root):
                continue
            codec = codecs.by_name(item.type)
            live_meta, live_parts = codec.flatten(plan.kept[path].value) if path in plan.kept else (item.meta, {})
            try:
                codec.merge(item.meta, children.get(path, {}), live_meta, live_parts)
            except Exception as error:  # noqa: BLE001 - the metadata comes from a file
                plan.problems.append(f"entry {item.path!r} cannot be restored in part: {error}")

    def _fits(self, entry: ContainerEntry, path: str) -> bool:
        live = self._live.get(path)
        return isinstance(live, tree.Container) and (live.type, live.meta) == (entry.type, entry.meta)

    def _add_leaf(self, entry: Entry, path: str, *, in_place: bool) -> None:
        plan = self._plan
        plan.stored_paths.append(entry.path)
        if isinstance(entry, (TensorEntry, AliasEntry)):
            tensor = self._source.resolve(entry)
            assert isinstance(tensor, TensorEntry)
            live = self._live_array(entry.path, tensor, path) if in_place else None
            placement = Placement(path, entry.path, tensor, live, self._device_of(path, tensor.device))
            if live is None:
                placement.like = self._like(path, tensor)
            if live is not None and live.kind == "numpy" and live.dtype != tensor.dtype:
                placement.live, placement.array = None, live.value
            plan.placements.append(placement)
            plan.items.append((path, placement))
        elif isinstance(entry, ObjectEntry):
            plan.items.append((path, entry))
        elif isinstance(entry, ValueEntry):
            try:
                plan.items.append((path, (decode(entry.value),)))
            except ExpstateError as error:
                plan.problems.append(f"entry {entry.path!r}: {error}")

    def _like(self, path: str, entry: TensorEntry) -> torch.Tensor | None:
        """The sharded parameter that a state of this path belongs to, if it has its shape."""
        if not isinstance(self._plan.stateful, torch.optim.Optimizer):
            return None
        parameter = optimizers.parameter_of(self._plan.stateful, path, self._root)
        fits = parameter is not None and sharding.is_sharded(parameter) and tuple(parameter.shape) == entry.shape and entry.kind != "numpy"
        return parameter if fits else None

    def _leaf(self, path: str) -> tree.Leaf | None:
        """What is live at a path; a tied tensor as if it were not."""
        leaf = self._live.get(path)
        if not isinstance(leaf, tree.Alias):
            return leaf
        target = self._live[leaf.target]
        assert isinstance(target, (tree.Array, tree.Sharded))
        if isinstance(target, tree.Sharded):
            return msgspec.structs.replace(target, path=path, value=leaf.value)
        return tree.Array(path, target.kind, target.dtype, target.shape, target.tensor, leaf.value, target.requires_grad)

    def _live_array(self, stored_path: str, entry: TensorEntry, path: str) -> tree.Array | tree.Sharded | None:
        """The live tensor or array that the entry can be read into; problems where there is one that should fit and does not."""
        leaf = self._leaf(path)
        if not isinstance(leaf, (tree.Array, tree.Sharded)) or (leaf.kind == "numpy") != (entry.kind == "numpy"):
            if self._is_module and leaf is not None:
                self._plan.problems.append(f"entry {stored_path!r} is a tensor in the snapshot and none in the live module")
            return None
        if leaf.shape != entry.shape:
            if self._is_module or optimizers.must_fit(self._plan.stateful, path):
                self._plan.problems.append(f"entry {stored_path!r} has shape {entry.shape} in the snapshot and {leaf.shape} live")
            return None
        if leaf.dtype != entry.dtype and _is_text(leaf.dtype, entry.dtype):
            return None
        if leaf.dtype != entry.dtype and not self._options.cast:
            hint = "pass cast=True to convert"
            self._plan.problems.append(f"entry {stored_path!r} has dtype {entry.dtype} in the snapshot and {leaf.dtype} live; {hint}")
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
    if not any(isinstance(entry, ContainerEntry) and codecs.by_name(entry.type).opaque for entry in entries):
        return owners
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


def _is_dict(entry: Entry) -> bool:
    return isinstance(entry, ContainerEntry) and entry.type in {"dict", "OrderedDict", "defaultdict", "Counter"}


def _keeps_items(entry: Entry) -> bool:
    return isinstance(entry, ContainerEntry) and entry.type not in {"set", "frozenset"}


def _is_text(one: str, other: str) -> bool:
    """Whether both are NumPy dtypes of texts, which differ as soon as the longest of them does."""
    return one[1:2] == other[1:2] and one[1:2] in {"U", "S"} and one[0] in "<>|="


def _is_in_place(leaf: tree.Array | tree.Sharded) -> bool:
    if isinstance(leaf, tree.Sharded):
        return all(tensors.is_writable_in_place(part.tensor) for part in leaf.parts)
    if leaf.kind == "numpy":
        return bool(leaf.value.flags.c_contiguous and leaf.value.flags.writeable)
    return leaf.address is not None or tensors.is_writable_in_place(leaf.tensor)


def some(found: list[str], most: int = 10) -> str:
    """The first of some names, and how many more there are."""
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
