"""A snapshot's entries as a tree that is opened level by level: keys, modules, tensors and values, with their bytes.

Gets the manifest; hands on the rows of one level at a time, and the globs of what was ticked. Modules are the dotted prefixes of names. A
prefix with one thing in it is joined with that; numbered siblings that are alike, such as the layers of a network, stand together in one
row, and a level with very many rows is cut into groups.
"""

from __future__ import annotations

import glob
import itertools
import re
from typing import TYPE_CHECKING, Any

from expstate import collector
from expstate.diff import show
from expstate.engine.report import bytes_text, counted
from expstate.errors import InvalidArgumentError
from expstate.format.manifest import AliasEntry, ContainerEntry, Entry, ObjectEntry, TensorEntry, ValueEntry
from expstate.notebook.browser import texts
from expstate.state import paths

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from expstate.format.manifest import Manifest

_MODULE = re.compile(r"\w+(\.\w+)*\.[^\W\d]\w*")
"""Names with dots that are modules; ``0.1`` and ``a b.c`` are one name."""

_FEW_LEAVES = 24
"""Things that stand in one level under their whole names, such as those of a layer."""

_LEAST_ALIKE = 3
_MOST_ROWS = 200
_GROUP = 100
_TO = " … "


class Node:
    """A row of the tree.

    Attributes
    ----------
    number : int
        What the page calls it.
    label : str
        What stands in the row.
    path : str
        Of the entry, or the prefix that the entries below share.
    kind : str
        ``key``, ``module``, ``container``, ``group``, ``tensor``, ``object``, ``value`` or ``tied``.
    entry : Entry or None
        The leaf or container itself.
    children : list of Node
        What is below.
    nbytes, tensors : int
        Of all below.
    """

    __slots__ = ("children", "entry", "kind", "label", "nbytes", "number", "path", "tensors")

    def __init__(self, label: str, path: str, kind: str, entry: Entry | None = None) -> None:
        self.number = -1
        self.label = label
        self.path = path
        self.kind = kind
        self.entry = entry
        self.children: list[Node] = []
        self.nbytes = 0
        self.tensors = 0


class Tree:
    """The entries of one snapshot.

    Parameters
    ----------
    manifest : Manifest
        Its manifest.
    """

    def __init__(self, manifest: Manifest) -> None:
        self._types = {paths.quote(record.key): record.type for record in manifest.keys}
        self._by_path = {(entry.path, entry.rank): entry for entry in manifest.entries}
        self._nodes: list[Node] = []
        with collector.paused():
            self.keys = _built(manifest)
            self.nbytes = sum(_sum(key) for key in self.keys)
            self._shown: dict[int, list[Node]] = {}

    def level(self, number: int | None) -> list[dict[str, Any]]:
        """The rows below a node, or the keys.

        Raises
        ------
        InvalidArgumentError
            If there is no such node.
        """
        return [self._row(node) for node in (self._numbered(-1, self.keys) if number is None else self._below(self.node(number)))]

    def node(self, number: int) -> Node:
        """The node that the page calls so."""
        if not isinstance(number, int) or not 0 <= number < len(self._nodes):
            msg = f"there is no row {number!r} in the tree"
            raise InvalidArgumentError(msg)
        return self._nodes[number]

    def _below(self, node: Node) -> list[Node]:
        return self._numbered(node.number, node.children)

    def _numbered(self, number: int, children: list[Node]) -> list[Node]:
        """What is shown below a node, each with a number of its own; made when it is first asked for."""
        found = self._shown.get(number)
        if found is None:
            found = self._shown[number] = _cut(_opened(children)) if number < 0 or self._nodes[number].kind != "group" else _cut(children)
            for child in found:
                child.number = len(self._nodes)
                self._nodes.append(child)
        return found

    def _row(self, node: Node) -> dict[str, Any]:
        return {
            "number": node.number,
            "label": texts.clean(node.label),
            "title": texts.clean(node.path, 2000),
            "kind": node.kind,
            "detail": self._detail(node),
            "size": bytes_text(node.nbytes) if node.nbytes or node.tensors else "",
            "share": node.nbytes / self.nbytes if self.nbytes else 0.0,
            "opens": bool(node.children),
            "key": texts.clean(paths.key_of(node.path)),
        }

    def _detail(self, node: Node) -> str:
        entry = node.entry
        if isinstance(entry, TensorEntry):
            return f"{texts.shape(entry.shape)} {texts.dtype(entry.dtype)}"
        if isinstance(entry, ObjectEntry):
            return texts.clean(entry.type.rpartition(".")[2])
        if isinstance(entry, AliasEntry):
            return f"tied to {texts.clean(entry.target)}"
        if isinstance(entry, ValueEntry):
            return texts.value(show.decoded(entry.value))
        if node.kind == "key":
            return texts.clean(self._types.get(node.path, "").rpartition(".")[2])
        return counted(node.tensors, "tensor") if node.tensors and node.kind in {"container", "group"} else ""

    # What was ticked

    def choose(self, ticks: Mapping[int, bool], *, everything: bool = False) -> tuple[list[str], list[str], list[str]]:
        """What is to be put back, by the ticks of the page: each counts for all below it that has none of its own.

        Parameters
        ----------
        ticks : mapping of int to bool
            By the numbers of nodes.
        everything : bool, default False
            Whether what has no tick above it is chosen.

        Returns
        -------
        keys, include, exclude : list of str
            Keys of which anything is chosen, and globs; of the two lists of globs the shorter, the other is empty.
        """
        chosen: list[Node] = []
        left: list[Node] = []
        keys = []
        for key in self._numbered(-1, self.keys):
            inside: tuple[list[Node], list[Node]] = ([], [])
            self._divide(key, everything, ticks, inside)
            if inside[0]:
                keys.append(paths.unquote(key.path))
                chosen += inside[0]
                left += inside[1]
        if not left:
            return keys, [], []
        include, exclude = [list(itertools.chain.from_iterable(map(_globs, nodes))) for nodes in (chosen, left)]
        return (keys, include, []) if len(include) <= len(exclude) else (keys, [], exclude)

    def _divide(self, node: Node, above: bool, ticks: Mapping[int, bool], into: tuple[list[Node], list[Node]]) -> None:
        """Put the largest nodes that are wholly chosen into the first list, and those that are not at all into the second."""
        here = ticks.get(node.number, above)
        shown = self._shown.get(node.number)
        if shown is None or not any(self._has_tick(child, ticks) for child in shown):
            into[0 if here else 1].append(node)
            return
        parts: tuple[list[Node], list[Node]] = ([], [])
        for child in shown:
            self._divide(child, here, ticks, parts)
        for place in (0, 1):
            if not parts[1 - place]:
                into[place].append(node)
                return
        into[0].extend(parts[0])
        into[1].extend(parts[1])

    def _has_tick(self, node: Node, ticks: Mapping[int, bool]) -> bool:
        return node.number in ticks or any(self._has_tick(child, ticks) for child in self._shown.get(node.number, ()))

    def tensor_of(self, node: Node) -> TensorEntry | None:
        """The tensor of a row, that of another name if it is tied to it."""
        entry = node.entry
        if isinstance(entry, AliasEntry):
            entry = self._by_path.get((entry.target, entry.rank)) or self._by_path.get((entry.target, None))
        return entry if isinstance(entry, TensorEntry) else None


# Building


def _built(manifest: Manifest) -> list[Node]:
    """The keys, with all below them."""
    containers: dict[tuple[str, int | None], Node] = {}
    modules: dict[tuple[str, str], Node] = {}
    keys: list[Node] = []
    for entry in manifest.entries:
        above, slash, name = entry.path.rpartition("/")
        kind = _kind(entry)
        rank = entry.rank
        if not slash:
            node = Node(_of_rank(paths.unquote(name), rank), entry.path, "key" if kind == "container" else kind, entry)
            keys.append(node)
        else:
            own = containers.get((above, rank))
            # What all ranks have in containers of their own is shown with the first rank's.
            holder = own or containers.get((above, None)) or containers.get((above, 0))
            if holder is None:  # a manifest has each container before what is in it; this one was not written by us
                holder = containers[above, None] = Node(above, above, "container")
                keys.append(holder)
            if _MODULE.fullmatch(name):
                *prefixes, name = name.split(".")
                holder = _module(modules, holder, above, prefixes)
            node = Node(_of_rank(paths.unquote(name), rank if own is None else None), entry.path, kind, entry)
            holder.children.append(node)
        if kind == "container":
            containers[entry.path, rank] = node
    return keys


def _of_rank(name: str, rank: int | None) -> str:
    """What a node is called: what only one rank has says so."""
    return name if rank is None else f"{name} (rank {rank})"


def _module(modules: dict[tuple[str, str], Node], holder: Node, above: str, prefixes: Iterable[str]) -> Node:
    prefix = ""
    for part in prefixes:
        prefix = f"{prefix}.{part}" if prefix else part
        node = modules.get((above, prefix))
        if node is None:
            node = modules[above, prefix] = Node(part, f"{above}/{prefix}", "module")
            holder.children.append(node)
        holder = node
    return holder


def _kind(entry: Entry) -> str:
    if isinstance(entry, ContainerEntry):
        return "container"
    if isinstance(entry, TensorEntry):
        return "tensor"
    return "object" if isinstance(entry, ObjectEntry) else "tied" if isinstance(entry, AliasEntry) else "value"


def _sum(root: Node) -> int:
    """Fill in bytes and counts, from the leaves up; without recursion, as trees of others may be deep."""
    order = [root]
    for node in order:  # grows as it goes
        order += node.children
    for node in reversed(order):
        if isinstance(node.entry, (TensorEntry, ObjectEntry)):
            node.nbytes = node.entry.nbytes
            node.tensors = int(isinstance(node.entry, TensorEntry))
        else:
            node.nbytes = sum(child.nbytes for child in node.children)
            node.tensors = sum(child.tensors for child in node.children)
    return root.nbytes


# What is shown of a level


def _opened(children: Sequence[Node]) -> list[Node]:
    """The nodes of a level: prefixes with one thing in them are joined with it, those of numbers give way to what is in them."""
    if _leaves(children) <= _FEW_LEAVES:
        return list(_flat(children, ""))
    found: list[Node] = []
    for child in children:
        node = _joined(child)
        if node.kind == "module" and _is_numbered(node.children):
            found += _alike([_named(f"{node.label}.{below.label}", _joined(below)) for below in node.children])
        else:
            found.append(node)
    return _alike(found) if _is_numbered(found) else found


def _leaves(children: Sequence[Node]) -> int:
    """How many rows there would be without modules; no more than are few are counted."""
    count = 0
    for child in children:
        count += _leaves(child.children) if child.kind == "module" else 1
        if count > _FEW_LEAVES:
            break
    return count


def _flat(children: Sequence[Node], prefix: str) -> Iterator[Node]:
    for child in children:
        if child.kind == "module":
            yield from _flat(child.children, f"{prefix}{child.label}.")
        else:
            yield _named(f"{prefix}{child.label}", child) if prefix else child


def _joined(node: Node) -> Node:
    while node.kind == "module" and len(node.children) == 1:
        node = _named(f"{node.label}.{node.children[0].label}", node.children[0])
    return node


def _named(label: str, node: Node) -> Node:
    same = Node(label, node.path, node.kind, node.entry)
    same.children, same.nbytes, same.tensors = node.children, node.nbytes, node.tensors
    return same


def _is_numbered(nodes: Sequence[Node]) -> bool:
    return len(nodes) > 1 and all(node.children and node.label.isdecimal() for node in nodes)


def _alike(nodes: list[Node]) -> list[Node]:
    """The first of neighbours that are alike, and the others in one row."""
    found: list[Node] = []
    for _, run in itertools.groupby(nodes, key=_form):
        alike = list(run)
        if len(alike) > _LEAST_ALIKE:
            found += [alike[0], _grouped(alike[1:])]
        else:
            found += alike
    return found


def _form(node: Node) -> tuple[int, int, tuple[str, ...]]:
    return node.nbytes, node.tensors, tuple(child.label for child in node.children)


def _grouped(nodes: Sequence[Node]) -> Node:
    first, last = nodes[0], nodes[-1]
    begin, end = first.label.partition(_TO)[0], last.label.rpartition(_TO)[2].rpartition(".")[2]
    group = Node(f"{begin}{_TO}{end}", f"{first.path.partition(_TO)[0]}{_TO}{last.path.rpartition(_TO)[2]}", "group")
    group.children = list(nodes)
    group.nbytes, group.tensors = sum(node.nbytes for node in nodes), sum(node.tensors for node in nodes)
    return group


def _cut(nodes: list[Node]) -> list[Node]:
    """The nodes, in groups if they are too many; groups of groups if there are very many."""
    while len(nodes) > _MOST_ROWS:
        nodes = [_grouped(nodes[at : at + _GROUP]) if at + 1 < len(nodes) else nodes[at] for at in range(0, len(nodes), _GROUP)]
    return nodes


def _globs(node: Node) -> Iterator[str]:
    """The globs that match what is in a node, and nothing else."""
    if node.kind == "group":
        for child in node.children:
            yield from _globs(child)
    elif node.kind == "module":
        yield f"{glob.escape(node.path)}.*"
    else:
        yield glob.escape(node.path)
