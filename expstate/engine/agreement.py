"""What the ranks of one take agree on: where it goes and what it is called, what they have alike, and what all of them have written."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
from blake3 import blake3

from expstate.engine import merge
from expstate.engine.lease import boot_id
from expstate.errors import AppStateError, InvalidArgumentError
from expstate.format import names
from expstate.state import tree
from expstate.state.tensors import NAMES, memory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from expstate.engine.ranks import Ranks
    from expstate.engine.share import Held, Holdings
    from expstate.engine.take import TakeRequest
    from expstate.format.manifest import Entry, FileRecord


def wait_for_first(ranks: Ranks, what: str) -> None:
    """Wait until the first rank has come here too."""
    ranks.spread(what, b"" if ranks.is_first else None)


def agree(request: TakeRequest, fingerprint_key: str) -> tuple[str, str]:
    """The id of the snapshot that all ranks take, and the key of its fingerprints: that of the first rank.

    Raises
    ------
    InvalidArgumentError
        On the first rank, if they were not given the same.
    """
    ranks = request.ranks
    if ranks.size == 1:
        return names.new_id(), fingerprint_key
    given = {
        "path": request.storage.url,
        "keys of the app state": list(request.app_state),
        "replicated globs": list(request.replicated),
        "overwrite": request.overwrite,
        "check_replicated": request.check_replicated,
        "dedup": request.dedup,
        "trust_fingerprint": request.trust_fingerprint,
    }
    host = boot_id() or socket.gethostname()
    of_ranks = [msgspec.json.decode(data) for data in ranks.gather("given", msgspec.json.encode((given, host)))]
    for rank, (other, _) in enumerate(of_ranks):
        for what, value in of_ranks[0][0].items():
            if other[what] != value:
                msg = f"all ranks must take the same: {what} is {value!r} on rank 0, and {other[what]!r} on rank {rank}"
                raise InvalidArgumentError(msg)
    agreed = msgspec.json.encode((names.new_id(), fingerprint_key, [host for _, host in of_ranks])) if ranks.is_first else None
    snapshot_id, key, hosts = msgspec.json.decode(ranks.spread("id", agreed), type=tuple[str, str, list[str]])
    ranks.local_size = hosts.count(host)
    return snapshot_id, key


Told: TypeAlias = tuple[str, str, str]
"""What a rank tells of an entry that should be the same on all: its path, what it is, and a digest of its values or nothing."""


def check_alike(ranks: Ranks, holdings: Holdings, others: Iterable[Told], *, digests: bool) -> None:
    """See that what is said to be the same on all ranks is there under the same names, with the same dtypes and shapes.

    Parameters
    ----------
    ranks : Ranks
        All that take.
    holdings : Holdings
        The arrays that this one has.
    others : iterable of Told
        What it has besides.
    digests : bool
        Whether to compare the values of arrays too.

    Raises
    ------
    AppStateError
        On the first rank, naming the first difference.
    """
    if ranks.size == 1:
        return
    held = holdings.of(range(ranks.size))
    own = msgspec.json.encode([*(_describe(box, digest=digests) for box in held), *sorted(others)])
    found = ranks.gather("alike", blake3(own).digest())
    if ranks.spread("alike?", None if not ranks.is_first else b"yes" if len(set(found)) == 1 else b"no") == b"yes":
        return
    told = ranks.gather("difference", own)
    if ranks.is_first:
        raise AppStateError(_difference([msgspec.json.decode(data, type=list[Told]) for data in told]))
    wait_for_first(ranks, "never")  # raises what the first rank says


def tell(leaf: tree.Leaf) -> Told:
    """What is told of what is no array."""
    if isinstance(leaf, tree.Value):
        return leaf.path, "a value", blake3(msgspec.json.encode(leaf.encoded)).hexdigest()
    if isinstance(leaf, tree.Container):
        return leaf.path, f"a {leaf.type}", blake3(msgspec.json.encode(leaf.meta)).hexdigest()
    return leaf.path, f"a {type(leaf.value).__name__}", ""  # what pickle makes of equal objects may differ


def _describe(box: Held, *, digest: bool) -> Told:
    values = ""
    if digest:
        host = box.tensor.detach().cpu().contiguous()
        values = blake3(memory(host.data_ptr(), host.nbytes)).hexdigest() if host.numel() else ""
    return box.path, f"{NAMES[box.tensor.dtype]} {box.shape} from {box.starts}", values


def _difference(of_ranks: Sequence[Sequence[Told]]) -> str:
    first = {path: rest for path, *rest in of_ranks[0]}
    for rank, other in enumerate(of_ranks):
        here: Mapping[str, Any] = {path: rest for path, *rest in other}
        for path in (*first, *here):
            one, two = first.get(path), here.get(path)
            if one is None or two is None:
                there, missing = (rank, 0) if one is None else (0, rank)
                return f"entry {path!r} should be the same on all ranks: rank {there} has it, rank {missing} has not"
            if one[0] != two[0]:
                return f"entry {path!r} should be the same on all ranks: it is {one[0]} on rank 0, and {two[0]} on rank {rank}"
            if one[1] != two[1]:
                differing = [
                    number for number, rows in enumerate(of_ranks) if {name: digest for name, _, digest in rows}.get(path) != one[1]
                ]
                return f"entry {path!r} should be the same on all ranks: its values on rank 0 are not those on ranks {differing}"
    msg = "the digests differ, and nothing that they are of"
    raise AssertionError(msg)


def merge_parts(ranks: Ranks, part: merge.RankPart, idle: Callable[[], object]) -> tuple[tuple[FileRecord, ...], tuple[Entry, ...]] | None:
    """On the first rank, the files and entries of all; elsewhere None."""
    found = ranks.gather("part", merge.encode(part), idle)
    return merge.merge(map(merge.decode, found)) if ranks.is_first else None
