"""Worlds of several ranks: a function run in that many forked processes, which are one gloo process group, with a hard time limit.

The processes are forked from this one, which has imported what they need; a world of four is there in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import faulthandler
import functools
import inspect
import os
import pickle
import selectors
import signal
import socket
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo  # this and the next three are imported once, here, and not by every rank: it takes seconds
import torch.distributed as dist
import torch.distributed.checkpoint.state_dict
import torch.distributed.fsdp
import torch.distributed.tensor.parallel

from tests.engine.processes import Ended

LIMIT_SECONDS = 60.0
NEEDS_FSDP = pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="FSDP of this torch does not do this on a CPU")
_LONG = dt.timedelta(seconds=60)


class Untold(Exception):  # noqa: N818 - it stands for another one
    """An error of a rank that cannot be pickled, in words."""


def run(size: int, function: Callable[[int], Any], *, limit: float = LIMIT_SECONDS, keep_store: bool = False) -> list[Ended]:
    """Run ``function`` on each of ``size`` ranks, given its number; how each ended.

    Whatever is not done after ``limit`` seconds is aborted, with a traceback on stderr. A rank that is done stays until all are, as the
    store of the process group lives in the first; with ``keep_store`` in this process, as under a launcher.
    """
    store = None
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
        hold, let_go = os.pipe()
        keeper = None if keep_store else 0
        children = [_start(rank, size, function, server, (hold, let_go), is_keeper=rank == keeper) for rank in range(size)]
        os.close(hold)
        if keep_store:
            store = _store(server, is_keeper=True)
    try:
        told = _wait(children, limit)
    finally:
        os.close(let_go)
        del store
    return [_end_of(child, data) for (child, _), data in zip(children, told, strict=True)]


def results(size: int, function: Callable[[int], Any], *, limit: float = LIMIT_SECONDS) -> list[Any]:
    """What ``function`` gives on each rank; all must end well."""
    ended = run(size, function, limit=limit)
    failed = {rank: one.error or one.signal for rank, one in enumerate(ended) if one.error is not None or one.signal is not None}
    assert not failed, failed
    return [one.value for one in ended]


def errors(size: int, function: Callable[[int], Any], *, limit: float = LIMIT_SECONDS) -> list[BaseException]:
    """What ``function`` raises on each rank; all must."""
    ended = run(size, function, limit=limit)
    assert all(isinstance(one.error, BaseException) for one in ended), ended
    return [one.error for one in ended]  # type: ignore[misc]


def distribute(full: torch.Tensor, mesh: Any, placements: Any) -> torch.distributed.tensor.DTensor:
    """A DTensor of what all ranks have; nobody talks, but with torch 2.6."""
    from torch.distributed.tensor import distribute_tensor

    silently = {"src_data_rank": None} if "src_data_rank" in inspect.signature(distribute_tensor).parameters else {}
    return distribute_tensor(full, mesh, placements, **silently)


def _start(
    rank: int, size: int, function: Callable[[int], Any], server: socket.socket, held: tuple[int, int], *, is_keeper: bool
) -> tuple[int, int]:
    """Fork one rank; its process id, and the pipe that its result comes out of."""
    result, give = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking while threads run: those of this process only wait
        child = os.fork()
    if child:
        os.close(give)
        return child, result
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.close(held[1])
        with os.fdopen(give, "wb") as pipe:
            pipe.write(_told(rank, size, function, server, is_keeper=is_keeper))
        os.read(held[0], 1)
    finally:
        os._exit(0)  # the threads of gloo may abort a process that ends in an orderly way


def _told(rank: int, size: int, function: Callable[[int], Any], server: socket.socket, *, is_keeper: bool) -> bytes:
    try:
        torch.set_num_threads(1)  # the threads of torch's pool are not in the child
        warnings.filterwarnings("default", module="torch")
        warnings.filterwarnings("default", category=FutureWarning)
        store = _store(server, is_keeper=is_keeper)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_LONG)
        ended = Ended(function(rank))
    except BaseException as error:  # noqa: BLE001 - handed to the parent
        traceback.print_exc()
        ended = Ended(error=error)
    try:
        data = pickle.dumps(ended)
        pickle.loads(data)  # noqa: S301 - its own
    except Exception:  # noqa: BLE001 - whatever it holds that cannot be pickled
        words = f"a {type(ended.value).__name__}, which cannot be pickled" if ended.error is None else f"{ended.error!r}"
        data = pickle.dumps(Ended(error=Untold(words)))
    return data


def _store(server: socket.socket, *, is_keeper: bool) -> dist.TCPStore:
    """The store of the process group; whoever keeps it listens at a port that is taken already, so that nobody can come between."""
    port = server.getsockname()[1]
    if is_keeper:
        make = functools.partial(dist.TCPStore, "127.0.0.1", port, None, is_master=True, timeout=_LONG, wait_for_workers=False)
        listening = server.detach()
        try:
            return make(master_listen_fd=listening)
        except NotImplementedError:  # torch 2.6 can take over a socket with its older server alone
            return make(master_listen_fd=listening, use_libuv=False)
    server.close()
    return dist.TCPStore("127.0.0.1", port, None, is_master=False, timeout=_LONG, wait_for_workers=False)


def _wait(children: list[tuple[int, int]], limit: float) -> list[bytes]:
    """What each child has to say, until all have said it or are gone, or the time is over."""
    until = time.monotonic() + limit
    told = [b""] * len(children)
    with selectors.DefaultSelector() as selector:
        for rank, (_, result) in enumerate(children):
            selector.register(result, selectors.EVENT_READ, rank)
        while selector.get_map() and (left := until - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                data = os.read(key.fd, 1 << 20)
                told[key.data] += data
                if not data:
                    selector.unregister(key.fd)
                    # Nothing is left of one that was killed: others look whether its process lives.
                    with contextlib.suppress(ChildProcessError):
                        os.waitid(os.P_PID, children[key.data][0], os.WEXITED | os.WNOHANG | os.WNOWAIT)
        late = [key.data for key in selector.get_map().values()]
    for rank in late:
        print(f"rank {rank} is not done after {limit} s", file=sys.stderr)  # noqa: T201 - beside the traceback
        os.kill(children[rank][0], signal.SIGABRT if faulthandler.is_enabled() else signal.SIGKILL)
        os.kill(children[rank][0], signal.SIGCONT)
    for _, result in children:
        os.close(result)
    return told


def _end_of(child: int, data: bytes) -> Ended:
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return Ended(signal=os.WTERMSIG(status))
    return pickle.loads(data)  # noqa: S301 - of a child of ours
