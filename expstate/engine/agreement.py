"""What the ranks of one take agree on: where it goes and what it is called, what they have alike, and what all of them have written."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import msgspec
from blake3 import blake3

from expstate.engine import merge
from expstate.engine.lease import boot_id
from expstate.errors import AppStateError, InvalidArgumentError
from expstate.format import names
from expstate.state.tensors import NAMES, memory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from expstate.engine.ranks import Ranks
    from expstate.engine.share import Held, Holdings
    from expstate.engine.take import TakeRequest
    from expstate.format.manifest import Entry, FileRecord


def wait_for_first(ranks: Ranks, what: str) -> None:
    """Wait until the first rank has come here too."""
    ranks.spread(what, b"" if ranks.is_first else None)


def agree_on_id(request: TakeRequest) -> str:
    """The id of the snapshot that all ranks take.

    Raises
    ------
    InvalidArgumentError
        On the first rank, if they were not given the same.
    """
    ranks = request.ranks
    if ranks.size == 1:
        return names.new_id()
    given = {
        "path": request.storage.url,
        "keys of the app state": list(request.app_state),
        "replicated globs": list(request.replicated),
        "overwrite": request.overwrite,
        "check_replicated": request.check_replicated,
    }
    host = boot_id() or socket.gethostname()
    of_ranks = [msgspec.json.decode(data) for data in ranks.gather("given", msgspec.json.encode((given, host)))]
    for rank, (other, _) in enumerate(of_ranks):
        for what, value in of_ranks[0][0].items():
            if other[what] != value:
                msg = f"all ranks must take the same: {what} is {value!r} on rank 0, and {other[what]!r} on rank {rank}"
                raise InvalidArgumentError(msg)
    agreed = msgspec.json.encode((names.new_id(), [host for _, host in of_ranks])) if ranks.is_first else None
    snapshot_id, hosts = msgspec.json.decode(ranks.spread("id", agreed))
    ranks.local_size = hosts.count(host)
    found: str = snapshot_id
    return found


def check_alike(ranks: Ranks, holdings: Holdings, *, digests: bool) -> None:
    """See that what is said to be the same on all ranks is there under the same names, with the same dtypes and shapes.

    Parameters
    ----------
    ranks : Ranks
        All that take.
    holdings : Holdings
        What this one has.
    digests : bool
        Whether to compare the values too.

    Raises
    ------
    AppStateError
        On the first rank, naming the first difference.
    """
    if ranks.size == 1:
        return
    held = holdings.groups.get(tuple(range(ranks.size)), [])
    described = [_describe(box, digest=digests) for box in held]
    own = msgspec.json.encode(described)
    found = ranks.gather("alike", blake3(own).digest())
    if ranks.spread("alike?", None if not ranks.is_first else b"yes" if len(set(found)) == 1 else b"no") == b"yes":
        return
    told = ranks.gather("difference", own)
    if ranks.is_first:
        raise AppStateError(_difference([msgspec.json.decode(data, type=list[tuple[str, str, str]]) for data in told]))
    wait_for_first(ranks, "never")  # raises what the first rank says


def _describe(box: Held, *, digest: bool) -> tuple[str, str, str]:
    values = ""
    if digest:
        host = box.tensor.detach().cpu().contiguous()
        values = blake3(memory(host.data_ptr(), host.nbytes)).hexdigest() if host.numel() else ""
    return box.path, f"{NAMES[box.tensor.dtype]} {box.shape} from {box.starts}", values


def _difference(of_ranks: Sequence[Sequence[tuple[str, str, str]]]) -> str:
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
    return "what should be the same on all ranks comes in another order on some of them"


def merge_parts(ranks: Ranks, part: merge.RankPart, idle: Callable[[], object]) -> tuple[tuple[FileRecord, ...], tuple[Entry, ...]] | None:
    """On the first rank, the files and entries of all; elsewhere None."""
    found = ranks.gather("part", merge.encode(part), idle)
    return merge.merge(map(merge.decode, found)) if ranks.is_first else None
