"""Entries of two sides compared by their digests alone: no tensor is read.

Gets two listings of entries in the manifest's form, the older and the newer; hands on which were added, removed and changed, and in what.
Whatever is the same costs one look.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from expstate.format.manifest import AliasEntry, Box, ContainerEntry, Entry, ObjectEntry, TensorEntry, ValueEntry
from expstate.state import paths

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence


class Listing(msgspec.Struct, frozen=True):
    """The entries of one side, in order, and each by its path."""

    entries: Sequence[Entry]
    by_path: Mapping[str, Entry]

    def resolve(self, entry: Entry) -> Entry:
        """The entry itself, or the tensor that an alias is tied to."""
        return self.by_path[entry.target] if isinstance(entry, AliasEntry) else entry


class Change(msgspec.Struct, frozen=True, gc=False):
    """An entry that both sides have, and in what they differ; aliases are resolved."""

    path: str
    old: Entry
    new: Entry
    differs: tuple[str, ...]


class Comparison(msgspec.Struct, frozen=True):
    """What came of comparing two listings; aliases among ``added`` and ``removed`` are as they are.

    ``same`` holds the newer side's entries. Containers are among ``changed``, and among ``added`` and ``removed`` if nothing is in them.
    ``otherwise_cut`` names those of ``same`` that were read because their boxes are other ones.
    """

    added: list[Entry]
    removed: list[Entry]
    changed: list[Change]
    same: list[Entry]
    otherwise_cut: frozenset[str] = frozenset()


def compare(old: Listing, new: Listing) -> Comparison:
    """Compare two sides.

    Parameters
    ----------
    old, new : Listing
        The older and the newer side.
    """
    added: list[Entry] = []
    changed: list[Change] = []
    same: list[Entry] = []
    before_at = old.by_path
    for entry in new.entries:
        path = entry.path
        before = before_at.get(path)
        if before is None:
            added.append(entry)
            continue
        if type(entry) is TensorEntry and type(before) is TensorEntry:
            # By far the most entries are tensors that lie in one box, so their case is spelled out.
            one, other = entry.boxes[0], before.boxes[0]
            if (
                one.digest == other.digest
                and one.starts is None is other.starts
                and entry.dtype == before.dtype
                and entry.shape == before.shape
                and entry.kind == before.kind
                and entry.requires_grad == before.requires_grad
            ):
                same.append(entry)
                continue
        resolved, resolved_before = new.resolve(entry), old.resolve(before)
        differs = differences(resolved_before, resolved)
        if type(entry) is ContainerEntry and type(before) is ContainerEntry and differs == ("metadata",):
            differs = () if is_same_meta(before.meta, entry.meta, _both_have(path, old, new)) else differs
        if differs:
            changed.append(Change(path, resolved_before, resolved, differs))
        elif type(entry) is not ContainerEntry:  # what is in a container is compared one by one
            same.append(entry)
    added = _without_filled_containers(added)
    removed = _without_filled_containers([entry for entry in old.entries if entry.path not in new.by_path])
    return Comparison(added, removed, changed, same)


def _without_filled_containers(entries: list[Entry]) -> list[Entry]:
    """All but containers that something is in: that says enough."""
    filled = {entry.path.rpartition("/")[0] for entry in entries}
    return [entry for entry in entries if type(entry) is not ContainerEntry or entry.path not in filled]


# In what two entries of one path differ


def differences(old: Entry, new: Entry) -> tuple[str, ...]:
    """In what two entries differ; empty if in nothing.

    ``content`` of a tensor is compared where dtype and shape are the same; ``layout`` says that it cannot be, by digests, because the
    boxes are other ones.
    """
    if isinstance(old, TensorEntry) and isinstance(new, TensorEntry):
        return _tensor_differences(old, new)
    if isinstance(old, ValueEntry) and isinstance(new, ValueEntry):
        return () if is_same_json(old.value, new.value) else ("value",)
    if isinstance(old, ObjectEntry) and isinstance(new, ObjectEntry):
        found = () if old.type == new.type else ("class",)
        return found if (old.boxes[0].digest, old.nbytes) == (new.boxes[0].digest, new.nbytes) else (*found, "content")
    if isinstance(old, ContainerEntry) and isinstance(new, ContainerEntry):
        if old.type != new.type:
            return ("codec",)
        return () if is_same_json(old.meta, new.meta) else ("metadata",)
    return ("kind",)


def _tensor_differences(old: TensorEntry, new: TensorEntry) -> tuple[str, ...]:
    found = [name for name in ("dtype", "shape", "kind", "requires_grad") if getattr(old, name) != getattr(new, name)]
    if old.dtype == new.dtype and old.shape == new.shape:
        one, other = placed(old), placed(new)
        if one.keys() != other.keys():
            found.append("layout")
        elif any(box.digest != other[place].digest for place, box in one.items()):
            found.append("content")
    return tuple(found)


Place = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a box begins in the global shape, and its sizes."""


def placed(entry: TensorEntry) -> dict[Place, Box]:
    """The boxes of an entry by their place, those without elements left out."""
    if len(entry.boxes) == 1:
        return {((0,) * len(entry.shape), entry.shape): entry.boxes[0]}
    return {(box.starts or (), box.sizes or ()): box for box in entry.boxes if 0 not in (box.sizes or ())}


def is_same_json(one: Any, other: Any) -> bool:
    """Whether two values in JSON form are the same; 1, 1.0 and True are not, nor 0.0 and -0.0.

    >>> is_same_json([1, "a"], [1, "a"]), is_same_json(1, True), is_same_json(0.0, -0.0)
    (True, False, False)
    """
    if one is other:
        return True
    if type(one) is not type(other) or one != other:
        return False
    return type(one) is str or msgspec.json.encode(one) == msgspec.json.encode(other)


def _both_have(path: str, old: Listing, new: Listing) -> Callable[[str], bool]:
    return lambda part: f"{path}/{part}" in old.by_path and f"{path}/{part}" in new.by_path


def is_same_meta(old: Any, new: Any, both_have: Callable[[str], bool]) -> bool:
    """Whether the metadata of two containers of one type is the same, as far as it speaks of what both have.

    Dicts name their keys in it, and modules the versions of their parts: those that only one side has are told by its entries.
    """
    if is_same_json(old, new):
        return True
    if isinstance(old, dict) and isinstance(new, dict) and "keys" in old and old.keys() == new.keys():
        return all(
            is_same_meta(value, new[name], both_have)
            if name == "keys"
            else is_same_json(value, new[name]) or (name == "versions" and _agree(_pairs(value), _pairs(new[name])))
            for name, value in old.items()
        )
    keys, new_keys = _pairs(old), _pairs(new)
    if keys is None or new_keys is None:
        return False
    parts = {part: paths.unquote(part) for part in keys.keys() | new_keys.keys() if both_have(part)}
    # A key that is not named is the text that its part stands for.
    return all(is_same_json(keys.get(part, text), new_keys.get(part, text)) for part, text in parts.items())


def _agree(one: dict[str, Any] | None, other: dict[str, Any] | None) -> bool:
    return one is not None and other is not None and all(is_same_json(one[name], other[name]) for name in one.keys() & other.keys())


def _pairs(meta: Any) -> dict[str, Any] | None:
    """A list of names and values as a dict, None as an empty one; None for anything else."""
    if meta is None:
        return {}
    is_pairs = isinstance(meta, list) and all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in meta)  # noqa: PLR2004 - a pair
    return dict(meta) if is_pairs else None


# Equal content under another name


def content_of(entry: Entry) -> tuple[Any, ...] | None:
    """What tells that two tensors or objects hold the same; None for what is neither, is empty, or was not digested."""
    if isinstance(entry, ObjectEntry):
        return "object", entry.boxes[0].digest
    if not isinstance(entry, TensorEntry) or 0 in entry.shape or not entry.boxes[0].digest:
        return None
    if len(entry.boxes) == 1:
        return entry.dtype, entry.shape, entry.boxes[0].digest
    boxes = placed(entry)
    if len(boxes) == 1:
        return entry.dtype, entry.shape, *(box.digest for box in boxes.values())
    return entry.dtype, entry.shape, *sorted((place, box.digest) for place, box in boxes.items())


class Twins(msgspec.Struct, frozen=True):
    """Equal content under other names.

    ``renamed`` maps added paths to removed ones, ``renamed_to`` the other way; ``elsewhere`` maps the other added and removed paths to
    one that both sides have.
    """

    renamed: dict[str, str]
    renamed_to: dict[str, str]
    elsewhere: dict[str, str]


def find_twins(comparison: Comparison, old: Listing, new: Listing) -> Twins:
    """Recognise what was renamed, and what is there under another name too."""
    gone: dict[tuple[Any, ...], list[str]] = {}
    come: dict[tuple[Any, ...], list[str]] = {}
    for entries, listing, found in ((comparison.removed, old, gone), (comparison.added, new, come)):
        for entry in entries:
            content = content_of(listing.resolve(entry))
            if content is not None:
                found.setdefault(content, []).append(entry.path)
    if not gone and not come:
        return Twins({}, {}, {})
    renamed: dict[str, str] = {}
    for content in gone.keys() & come.keys():
        renamed |= _matched(gone[content], come[content])
    renamed_to = {path: name for name, path in renamed.items()}
    kept: dict[tuple[Any, ...], str] = {}
    for entry in (*comparison.same, *(change.new for change in comparison.changed)):
        if type(entry) is not AliasEntry and (content := content_of(entry)) is not None and (content in gone or content in come):
            kept.setdefault(content, entry.path)
    elsewhere = {path: kept[content] for content, paths in come.items() if content in kept for path in paths if path not in renamed}
    elsewhere |= {path: kept[content] for content, paths in gone.items() if content in kept for path in paths if path not in renamed_to}
    for entry in comparison.added:
        if isinstance(entry, AliasEntry) and entry.path in elsewhere and entry.target in old.by_path:
            elsewhere[entry.path] = entry.target
    order = {entry.path: number for number, entry in enumerate(comparison.added)}
    return Twins(dict(sorted(renamed.items(), key=lambda pair: order[pair[0]])), renamed_to, elsewhere)


def _matched(gone: Sequence[str], come: Sequence[str]) -> dict[str, str]:
    """Removed and added paths of one content in pairs, new to old: those whose names end alike first."""
    if len(gone) == len(come) == 1:
        return {come[0]: gone[0]}
    by_ending: dict[str, list[str]] = {}
    for path in reversed(gone):
        for ending in _endings(path):
            by_ending.setdefault(ending, []).append(path)
    wanted = sorted((-len(ending), number, ending) for number, path in enumerate(come) for ending in _endings(path))
    matched: dict[str, str] = {}
    used: set[str] = set()
    for _, number, ending in wanted:
        path, candidates = come[number], by_ending.get(ending, [])
        while candidates and candidates[-1] in used:
            candidates.pop()
        if candidates and path not in matched:
            matched[path] = candidates.pop()
            used.add(matched[path])
    return matched


def _endings(path: str) -> Iterable[str]:
    """The ends of a path that begin where a name in it begins, the whole and the empty one among them."""
    yield path
    for position, character in enumerate(path):
        if character in "./":
            yield path[position + 1 :]
    yield ""
