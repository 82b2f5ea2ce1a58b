"""Staging memory: how much may be used, and buffers that stay warm from one take to the next.

``budget_bytes`` works out the budget. ``Staging`` lends an operation its buffers within it and waits when all are in use; idle
buffers are kept by one pool of the process and given back to the system after a while.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
from typing import TYPE_CHECKING

import torch

from expstate import settings
from expstate.errors import MemoryBudgetError
from expstate.format.manifest import BLOCK_BYTES
from expstate.settings import GIB, MIB

if TYPE_CHECKING:
    from collections.abc import Iterator

    from expstate.engine.crew import Stop
    from expstate.storage.base import Storage

WINDOW_BYTES = 16 * MIB
SLACK_BYTES = 2 * 4096
"""Room in a buffer for the parts of pages at both ends of a window."""

_WIPE_ON_FORK = 18  # MADV_WIPEONFORK of Linux, which Python has no name for
_ADVICE = (mmap.MADV_HUGEPAGE, _WIPE_ON_FORK) if hasattr(mmap, "MADV_HUGEPAGE") else ()
"""Large pages; and pages that a forked child gets empty: else this process would write to a copy of them, and a device to the old ones."""

_DEFAULT_SHARE = 0.5
_DEFAULT_MOST = 32 * GIB
_CGROUP_FILES = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file",
    ),
)


def _read(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.read()
    except OSError:
        return ""


def available_bytes() -> int:
    """Host memory that could be used now, in bytes: what the system has left, and what the process's cgroup allows."""
    available = 8 * GIB
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    for limit_file, usage_file, stat_file, reclaimable in _CGROUP_FILES:
        limit, usage = _read(limit_file).strip(), _read(usage_file).strip()
        if limit.isdigit() and usage.isdigit():
            cache = next((int(line.split()[1]) for line in _read(stat_file).splitlines() if line.startswith(f"{reclaimable} ")), 0)
            available = min(available, max(0, int(limit) - int(usage) + cache))
    return available


def budget_bytes(asked: int | None, local_ranks: int | None = None) -> int:
    """The memory budget of an operation, in bytes.

    Parameters
    ----------
    asked : int or None
        What the caller gave; None for the setting or, without one, half of the available memory divided by the ranks of this host, at most
        32 GiB.
    local_ranks : int, optional
        How many ranks there are on this host; without it, what the launcher has put into the environment.

    Raises
    ------
    MemoryBudgetError
        If it does not hold one buffer of one block.
    """
    budget = settings.current().memory_budget_bytes if asked is None else asked
    if budget == 0 and asked is None:
        ranks = max(local_ranks or 1, _launched_here())
        idle = _pool.idle_bytes  # counted as in use by the system, but ours to use again
        budget = min(int(_DEFAULT_SHARE * (available_bytes() + idle)) // ranks, _DEFAULT_MOST)
        return max(budget, 2 * MIB)
    if isinstance(budget, bool) or not isinstance(budget, int) or budget < 2 * MIB:
        msg = f"the memory budget must be a number of bytes, at least {2 * MIB:,} (2 MiB), got {budget!r}"
        raise MemoryBudgetError(msg)
    return budget


class Buffer:
    """A page-aligned piece of host memory, optionally pinned for copies to and from an accelerator.

    Attributes
    ----------
    address : int
        Of its first byte.
    view : memoryview
        All of it.
    tensor : torch.Tensor
        All of it as flat uint8; made when first asked for.
    """

    def __init__(self, size: int, pinned_for: str | None) -> None:
        self.size = size
        self.pinned_for = pinned_for
        self._map: mmap.mmap | None = None
        self._tensor: torch.Tensor | None = None
        self._registered = False
        self._device = 0
        if pinned_for is not None and pinned_for != "cuda":
            self._tensor = _pinned_tensor(size)
        if self._tensor is not None:
            self.address = self._tensor.data_ptr()
            self.view = memoryview((ctypes.c_ubyte * size).from_address(self.address)).cast("B")
            return
        try:
            self._map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:  # a limit of the process, or a system that lends no more than it has
            reason = f"the system gives no memory for a buffer of {size:,} bytes ({error.strerror})"
            msg = f"{reason}; free some, or give a smaller memory_budget_bytes"
            raise MemoryBudgetError(msg) from error
        for advice in _ADVICE:
            with contextlib.suppress(OSError):  # a kernel without it
                self._map.madvise(advice)
        self.address = ctypes.addressof(ctypes.c_ubyte.from_buffer(self._map))
        self.view = memoryview(self._map)
        if pinned_for == "cuda":
            # Our own pages are pinned: torch's pinned allocator rounds sizes up to powers of two and keeps what it has.
            self._device = torch.cuda.current_device()
            self._registered = int(torch.cuda.cudart().cudaHostRegister(self.address, size, 0)) == 0
            if not self._registered:
                _forget_failure()

    @property
    def tensor(self) -> torch.Tensor:
        """All of the buffer as a flat uint8 tensor."""
        if self._tensor is None:
            assert self._map is not None
            self._tensor = torch.frombuffer(self._map, dtype=torch.uint8)
        return self._tensor

    def free(self) -> None:
        """Unpin it; the memory goes back to the system with the last reference."""
        if self._registered:
            self._registered = False
            # In whichever thread this is: asked from device 0, the driver would make a context there.
            with torch.cuda.device(self._device):
                torch.cuda.cudart().cudaHostUnregister(self.address)


def _forget_failure() -> None:
    """Copies do without pinned memory, but CUDA remembers the failure and blames the thread's next kernel: let it be this one."""
    with contextlib.suppress(RuntimeError):
        torch.ones(1, device="cuda")


def _pinned_tensor(size: int) -> torch.Tensor | None:
    try:
        tensor = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
    except (RuntimeError, NotImplementedError):
        return None  # an accelerator without pinned memory
    return tensor if tensor.data_ptr() % mmap.PAGESIZE == 0 else None


class _Pool:
    """Idle buffers of the process, freed when nothing has used the pool for a while."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Buffer] = []
        self._timer: threading.Timer | None = None
        self._uses = 0
        self.idle_bytes = 0

    def take(self, size: int, pinned_for: str | None) -> Buffer | None:
        with self._lock:
            self._uses += 1
            for index in range(len(self._idle) - 1, -1, -1):
                if self._idle[index].size == size and self._idle[index].pinned_for == pinned_for:
                    self.idle_bytes -= size
                    return self._idle.pop(index)
        return None

    def give(self, buffer: Buffer) -> None:
        with self._lock:
            self._uses += 1
            self._idle.append(buffer)
            self.idle_bytes += buffer.size

    def trim(self, most_bytes: int, *, size: int = 0, pinned_for: str | None = None) -> None:
        """Free idle buffers until ``most_bytes`` are left, those of another size or kind than the given first."""
        freed = []
        with self._lock:
            self._idle.sort(key=lambda buffer: buffer.size == size and buffer.pinned_for == pinned_for)
            while self._idle and self.idle_bytes > most_bytes:
                buffer = self._idle.pop(0)
                self.idle_bytes -= buffer.size
                freed.append(buffer)
        for buffer in freed:
            buffer.free()

    def free_when_idle(self, seconds: float) -> None:
        """Free everything when nothing has used the pool for ``seconds``."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if not self._idle:
                return
            uses = self._uses
            if seconds > 0:
                self._timer = threading.Timer(seconds, self._free_if_unused, [uses])
                self._timer.daemon = True
                with contextlib.suppress(RuntimeError):  # no new threads while the interpreter ends; its memory ends with it
                    self._timer.start()
                return
        self.trim(0)

    def _free_if_unused(self, uses: int) -> None:
        if self._uses == uses:
            self.trim(0)


_pool = _Pool()


def _forget_pool() -> None:
    # In a forked child the parent's timer does not run, its lock may be held for ever, and its pinned memory is not ours to unpin.
    global _pool  # noqa: PLW0603 - one for the process
    _pool = _Pool()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_pool)


def _launched_here() -> int:
    """How many ranks the launcher has started on this machine, as it has put it into the environment."""
    launched = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, int(launched)) if launched.isdigit() else 1


def means(storage: Storage, budget: int, local_ranks: int | None = None) -> tuple[int, int]:
    """Threads that should work on a storage at once, and the bytes that their buffers may have of a budget.

    What the storage holds of a write or read besides, it has from the same budget. Ranks of one machine share its threads.
    """
    threads = storage.thread_count or settings.current().thread_count
    if not settings.current().io_threads:
        threads = max(2, threads // max(local_ranks or 1, _launched_here()))
    if storage.copies:
        budget //= 1 + storage.copies
        threads = max(1, min(threads, budget // WINDOW_BYTES))
    return threads, budget


class Staging:
    """The buffers of one operation: at most as many as its budget holds.

    Parameters
    ----------
    budget : int
        Bytes.
    threads : int
        Threads that will hold a buffer at the same time; the buffers are made smaller where that lets more of them work.
    pinned_for : str or None
        Type of the accelerator that copies from and to them.
    """

    def __init__(self, budget: int, threads: int, pinned_for: str | None = None) -> None:
        whole = WINDOW_BYTES + SLACK_BYTES
        if budget >= whole:
            self.buffer_bytes = whole
        else:
            blocks = max(1, (budget // max(1, min(threads, 2)) - SLACK_BYTES) // BLOCK_BYTES)
            self.buffer_bytes = blocks * BLOCK_BYTES + SLACK_BYTES
        self.window_bytes = self.buffer_bytes - SLACK_BYTES
        self.count = max(1, budget // self.buffer_bytes)
        self._pinned_for = pinned_for
        self._free = threading.Semaphore(self.count)
        _pool.trim(budget, size=self.buffer_bytes, pinned_for=pinned_for)

    def acquire(self, stop: Stop) -> Buffer:
        """A buffer, as soon as there is one; leaves the job if the operation is over before that."""
        while not self._free.acquire(timeout=0.2):
            stop.check()
        try:
            return _pool.take(self.buffer_bytes, self._pinned_for) or Buffer(self.buffer_bytes, self._pinned_for)
        except BaseException:
            self._free.release()
            raise

    def release(self, buffer: Buffer) -> None:
        """Give a buffer back."""
        _pool.give(buffer)
        self._free.release()

    @contextlib.contextmanager
    def lend(self, stop: Stop) -> Iterator[Buffer]:
        """A buffer for the length of a ``with`` block."""
        buffer = self.acquire(stop)
        try:
            yield buffer
        finally:
            self.release(buffer)

    @staticmethod
    def close() -> None:
        """The operation is over: idle memory is freed after ``staging_idle_seconds``."""
        _pool.free_when_idle(settings.current().staging_idle_seconds)


def whole(size: int, budget: int) -> Buffer:
    """A buffer of another size, such as holds a whole state: one that is idle, or a new one; with the idle ones within ``budget``."""
    found = _pool.take(size, None)  # before others make room: it may be the one that would have to go
    _pool.trim(max(0, budget - size))
    return found or Buffer(size, None)


def give_back(buffer: Buffer) -> None:
    """Put a buffer of ``whole`` with the idle ones, which are freed after ``staging_idle_seconds``."""
    _pool.give(buffer)
    Staging.close()


def free_idle() -> None:
    """Give all idle staging memory back to the system now."""
    _pool.trim(0)
