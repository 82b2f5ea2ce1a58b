"""Names of a distributed checkpoint and paths of a snapshot: one made of the other, both ways.

``torch.distributed.checkpoint`` takes nested dicts and lists apart and joins what leads to a value by dots: its name. What leads there is a
``Place``: texts in dicts, numbers in lists. The first text of a place is the key of the app state; what stands at the top of the state
dict itself, in no dict, goes under one key that is given.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from expstate.errors import ExpstateError, InvalidArgumentError, SnapshotWriteError
from expstate.format.manifest import AliasEntry, ContainerEntry, Entry, KeyRecord, TensorEntry, ValueEntry
from expstate.state import paths
from expstate.state.values import decode

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

Place = tuple[str | int, ...]
"""What leads to a value in nested dicts and lists."""

TOP_KEY = "state"
"""The key of what stands at the top of a state dict, if no other is given."""
TOP_TYPE = "torch.distributed.checkpoint.TopLevel"
"""What the manifest says of that key in the place of a stateful's class."""
_DICT_TYPE = "builtins.dict"
_MOST_DEPTH = 300
_MOST_HOLES = 1000
_DICTS = frozenset({"dict", "OrderedDict", "defaultdict", "Counter"})


def place_of(name: str, mapping: object) -> Place:
    """The place that a planner's mapping gives a name; the name alone where there is none.

    >>> place_of("model.0.weight", {"model.0.weight": ("model", "0.weight")}), place_of("lr", None)
    (('model', '0.weight'), ('lr',))
    """
    found = mapping.get(name) if isinstance(mapping, dict) else None
    if isinstance(found, (tuple, list)) and found and all(isinstance(part, (str, int)) and not isinstance(part, bool) for part in found):
        return (str(found[0]), *found[1:])
    return (name,)


def entry_path(place: Place, top: str) -> str:
    """The path of the entry at a place.

    >>> entry_path(("optim", "param_groups", 0, "lr"), "state"), entry_path(("0.weight",), "state")
    ('optim/param_groups/0/lr', 'state/0.weight')
    """
    whole = (top, *place) if len(place) == 1 else place
    return "/".join(paths.quote(str(part)) for part in whole)


# From places to the entries of a manifest


@dataclass(slots=True)
class _Node:
    """A dict or list that is to be, or an item of it that has entries of its own."""

    path: str
    children: dict[str | int, _Node] = field(default_factory=dict)
    is_item: bool = False


def assemble(places: Sequence[Place], entries: Iterable[Entry], top: str) -> tuple[tuple[KeyRecord, ...], tuple[Entry, ...]]:
    """The keys of a snapshot and its entries in order, with the dicts and lists around them.

    Parameters
    ----------
    places : sequence of Place
        Of all values, in the order of the state dict.
    entries : iterable of Entry
        Of all values: each at the path of its place, what it is made of right below it.
    top : str
        The key of what stands at the top.

    Raises
    ------
    InvalidArgumentError
        If two values would have one path.
    SnapshotWriteError
        If a value has no entry.
    """
    root = _Node("")
    for place in places:
        if len(place) > _MOST_DEPTH:
            msg = f"the state dict is nested more than {_MOST_DEPTH} deep"
            raise InvalidArgumentError(msg)
        _grow(root, (top, *place) if len(place) == 1 else place)
    has_top = any(len(place) == 1 for place in places)
    if has_top and any(len(place) > 1 and place[0] == top for place in places):
        msg = f"the state dict has a dict {top!r}, and values beside it that would go under the key {top!r}; pass another key="
        raise InvalidArgumentError(msg)
    keys = tuple(KeyRecord(str(name), TOP_TYPE if has_top and name == top else _DICT_TYPE) for name in root.children)
    of_items = _by_item(root, entries)
    found: list[Entry] = []
    for node in root.children.values():
        _emit(node, of_items, found)
    return keys, tuple(found)


def _grow(root: _Node, whole: Place) -> None:
    node = root
    for part in whole:
        if node.is_item:
            msg = f"the state dict has a value at {node.path!r}, and others below it"
            raise InvalidArgumentError(msg)
        child = node.children.get(part)
        if child is None:
            name = paths.quote(str(part))
            child = node.children[part] = _Node(f"{node.path}/{name}" if node.path else name)
        node = child
    if node.children or node.is_item:
        msg = f"the state dict has several values at {node.path!r}"
        raise InvalidArgumentError(msg)
    node.is_item = True


def _items(node: _Node) -> Iterator[_Node]:
    if node.is_item:
        yield node
    for child in node.children.values():
        yield from _items(child)


def _by_item(root: _Node, entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """The entries of each item."""
    found: dict[str, list[Entry]] = {item.path: [] for item in _items(root)}
    for entry in entries:
        path = entry.path
        while path and path not in found:
            path = paths.parent(path)
        if path:
            found[path].append(entry)
    return found


def _emit(node: _Node, of_items: Mapping[str, list[Entry]], found: list[Entry]) -> None:
    if node.is_item:
        if not of_items[node.path]:
            msg = f"no rank has written entry {node.path!r}"
            raise SnapshotWriteError(msg)
        found += of_items[node.path]
        return
    numbers = [part for part in node.children if isinstance(part, int)]
    if len(numbers) < len(node.children):
        found.append(ContainerEntry(node.path, "dict", _whole_numbers(node, of_items)))
        for child in node.children.values():
            _emit(child, of_items, found)
        return
    found.append(ContainerEntry(node.path, "list"))
    count = max(numbers) + 1
    if min(numbers) < 0 or count > 2 * len(numbers) + _MOST_HOLES:
        msg = f"of the list at {node.path!r} with {count:,} items {len(numbers):,} are there"
        raise InvalidArgumentError(msg)
    for number in range(count):
        item = node.children.get(number)
        if item is None:  # it was empty, and the checkpoint knows nothing of it
            found.append(ValueEntry(f"{node.path}/{number}", None))
        else:
            _emit(item, of_items, found)


def _whole_numbers(node: _Node, of_items: Mapping[str, list[Entry]]) -> list[list[Any]] | None:
    """The keys of a dict where they are no texts: those of an optimizer's state, which are its parameters' numbers.

    Checkpoints make texts of all keys; what the parameters are called is told by the groups beside the state.
    """
    above, _, name = node.path.rpartition("/")
    parts = [str(part) for part in node.children]
    if name != "state" or not all(part.isdecimal() and str(int(part)) == part for part in parts):
        return None
    groups = [
        entry.value
        for path, entries in of_items.items()
        for entry in entries[:1]
        if path.startswith(f"{above}/param_groups/") and path.endswith("/params") and isinstance(entry, ValueEntry)
    ]
    known = {number for group in groups if isinstance(group, list) for number in group if type(number) is int}
    return [[part, int(part)] for part in parts] if known.issuperset(map(int, parts)) else None


# From entries to names


@dataclass(frozen=True, slots=True)
class Named:
    """What a name stands for in a snapshot.

    Attributes
    ----------
    place : Place
        What leads to it.
    entry : Entry
        The tensor (of an alias, the one that it is tied to), or the value, object or container.
    """

    place: Place
    entry: Entry

    @property
    def is_tensor(self) -> bool:
        """Whether it is a tensor that can be read in boxes."""
        return isinstance(self.entry, TensorEntry) and self.entry.kind != "numpy"


class Names:
    """The names that a checkpoint of the same state would have.

    Parameters
    ----------
    entries : sequence of Entry
        As one rank sees them.
    top : str or None
        The key whose contents stand at the top of the state dict.

    Attributes
    ----------
    found : dict of str to Named
        What each name stands for.
    ambiguous : set of str
        Names that would stand for several things.
    """

    def __init__(self, entries: Iterable[Entry], top: str | None) -> None:
        self.found: dict[str, Named] = {}
        self.ambiguous: set[str] = set()
        self._children: dict[str, list[Entry]] = {}
        self._by_path: dict[str, Entry] = {}
        for entry in entries:
            self._children.setdefault(paths.parent(entry.path), []).append(entry)
            self._by_path[entry.path] = entry
        for entry in self._children.get("", []):
            key = paths.unquote(entry.path)
            is_top = key == top and isinstance(entry, ContainerEntry) and entry.type in _DICTS
            self._visit(entry, () if is_top else (key,))

    def _visit(self, entry: Entry, place: Place) -> None:
        below = self._children.get(entry.path, [])
        if isinstance(entry, ContainerEntry) and entry.type in _DICTS:
            for child, name in zip(below, _names_in(entry, below), strict=True):
                self._visit(child, (*place, name))
        elif self._is_nested_list(entry):
            for number, child in enumerate(below):
                self._visit(child, (*place, number))
        else:
            self._add(entry, place)

    def _add(self, entry: Entry, place: Place) -> None:
        name = ".".join(map(str, place))
        if name in self.found:
            self.ambiguous.add(name)
        self.found[name] = Named(place, self._by_path[entry.target] if isinstance(entry, AliasEntry) else entry)

    def _is_nested_list(self, entry: Entry) -> bool:
        """Whether a checkpoint takes a list apart: where there are tensors or dicts in it."""
        return (
            isinstance(entry, ContainerEntry)
            and entry.type == "list"
            and any(
                isinstance(child, AliasEntry)
                or (isinstance(child, TensorEntry) and child.kind != "numpy")
                or (isinstance(child, ContainerEntry) and child.type in _DICTS)
                or self._is_nested_list(child)
                for child in self._children.get(entry.path, [])
            )
        )


def _names_in(entry: ContainerEntry, below: Iterable[Entry]) -> list[str]:
    """The keys of a dict as texts."""
    meta = entry.meta.get("keys") if isinstance(entry.meta, dict) else entry.meta
    parts = [child.path.rpartition("/")[2] for child in below]
    if meta is None:
        return [paths.unquote(part) for part in parts]
    try:
        keys = {part: str(decode(key)) for part, key in meta}
    except (ExpstateError, TypeError, ValueError):
        keys = {}
    return [keys.get(part, paths.unquote(part)) for part in parts]
