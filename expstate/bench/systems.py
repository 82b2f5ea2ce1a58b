"""The systems side by side: one small class each, that takes, restores and reads one ``TensorState`` at the system's best setting.

Gets a folder of its own; what it writes there is durable when ``take`` returns, and ``restore`` ends with the values in the live tensors.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from expstate.bench.measure import make_durable
from expstate.bench.plan import BUDGET_BYTES, OPERATIONS, SNAPSHOT
from expstate.bench.state import PROBE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    from expstate.bench.plan import Task
    from expstate.bench.state import TensorState

KEY = "model"


class System(ABC):
    """One way to take and restore.

    Parameters
    ----------
    task : Task
        Setting, device, budget and operation.

    Attributes
    ----------
    maps_files : bool
        Whether it reads files by mapping them.
    """

    maps_files: ClassVar[bool] = False

    def __init__(self, task: Task) -> None:
        self._task = task
        self._setting = task.setting

    @abstractmethod
    def take(self, folder: Path, state: TensorState) -> None:
        """Write the state, durable on return."""

    @abstractmethod
    def restore(self, folder: Path, state: TensorState, *, verify: bool) -> None:
        """Put the values into the live tensors; ``verify`` where the system has a choice."""

    @abstractmethod
    def probe_reader(self, folder: Path) -> Callable[[torch.Tensor], None]:
        """Read what describes the snapshot; the function returned reads the probe into a live tensor."""

    def async_taker(self, state: TensorState) -> Callable[[Path], Callable[[], object]]:
        """A function that begins a take and returns one that waits for its end; called twice, so that staging memory is warm."""
        msg = f"{type(self).__name__} cannot take in the background"
        raise NotImplementedError(msg)

    def count_entries(self, folder: Path) -> int:
        """List the entries of a snapshot that was just opened."""
        msg = f"{type(self).__name__} cannot list entries"
        raise NotImplementedError(msg)


class Expstate(System):
    """expstate itself."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._snapshot: Any = importlib.import_module("expstate").Snapshot
        self._budget = BUDGET_BYTES if task.operation.endswith("_budget") else task.memory_budget_bytes

    def _path(self, folder: Path) -> str:
        operation = OPERATIONS.get(self._task.operation)
        if operation is not None and operation.null_on_device and self._task.workload.device != "cpu":
            importlib.import_module("expstate.testing")  # knows this scheme
            return f"null://{folder.name}"
        return str(folder / SNAPSHOT)

    def take(self, folder: Path, state: TensorState) -> None:
        replicated = ["**"] if self._task.operation == "take_replicated" else None
        budget = self._budget
        self._snapshot.take(
            self._path(folder), {KEY: state}, replicated=replicated, memory_budget_bytes=budget, progress=False, catalog=False
        )

    def restore(self, folder: Path, state: TensorState, *, verify: bool) -> None:
        snapshot = self._snapshot(str(folder / SNAPSHOT))
        snapshot.restore({KEY: state}, verify=verify, memory_budget_bytes=self._budget, progress=False)

    def probe_reader(self, folder: Path) -> Callable[[torch.Tensor], None]:
        snapshot = self._snapshot(str(folder / SNAPSHOT))
        snapshot.metadata  # noqa: B018 - reads the manifest
        return lambda live: snapshot.read_object(f"{KEY}/{PROBE}", obj_out=live)

    def async_taker(self, state: TensorState) -> Callable[[Path], Callable[[], object]]:
        budget = max(self._budget or 0, state.nbytes + state.nbytes // 4 + BUDGET_BYTES)

        def begin(folder: Path) -> Callable[[], object]:
            pending: Any = self._snapshot.async_take(
                self._path(folder), {KEY: state}, memory_budget_bytes=budget, progress=False, catalog=False
            )
            return pending.wait  # type: ignore[no-any-return]

        return begin

    def count_entries(self, folder: Path) -> int:
        return len(list(self._snapshot(str(folder / SNAPSHOT)).entries()))


class Torch(System):
    """``torch.save`` with and without its CRC-32, ``torch.load`` by mapping the file."""

    maps_files = True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._torch: Any = importlib.import_module("torch")
        if self._setting == "no crc":
            self._torch.serialization.set_crc32_options(False)

    def take(self, folder: Path, state: TensorState) -> None:
        self._torch.save(state.state_dict(), folder / SNAPSHOT)
        make_durable(folder)

    def _open(self, folder: Path) -> dict[str, torch.Tensor]:
        opened: dict[str, torch.Tensor] = self._torch.load(folder / SNAPSHOT, mmap=True, map_location="cpu", weights_only=True)
        return opened

    def restore(self, folder: Path, state: TensorState, *, verify: bool) -> None:  # noqa: ARG002 - it never verifies
        state.load_state_dict(self._open(folder))

    def probe_reader(self, folder: Path) -> Callable[[torch.Tensor], None]:
        opened = self._open(folder)

        def read(live: torch.Tensor) -> None:
            live.copy_(opened[PROBE])

        return read


class Safetensors(System):
    """``save_file``, and ``load_file`` with each of its ways to read, then a copy into the live tensors."""

    maps_files = True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._library: Any = importlib.import_module("safetensors")
        self._torch: Any = importlib.import_module("safetensors.torch")
        # Older releases can only map and do not know the argument.
        self._reading = {"backend": self._setting} if self._setting == "pread" else {}

    def take(self, folder: Path, state: TensorState) -> None:
        self._torch.save_file(state.state_dict(), folder / SNAPSHOT)
        make_durable(folder)

    def restore(self, folder: Path, state: TensorState, *, verify: bool) -> None:  # noqa: ARG002 - it never verifies
        state.load_state_dict(self._torch.load_file(folder / SNAPSHOT, device=self._task.workload.device, **self._reading))

    def probe_reader(self, folder: Path) -> Callable[[torch.Tensor], None]:
        opened: Any = self._library.safe_open(folder / SNAPSHOT, framework="pt", device=self._task.workload.device, **self._reading)

        def read(live: torch.Tensor) -> None:
            live.copy_(opened.get_tensor(PROBE))

        return read


class Dcp(System):
    """``torch.distributed.checkpoint`` with one file and one writing thread per setting, one to four."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._dcp: Any = importlib.import_module("torch.distributed.checkpoint")
        self._threads = int(self._setting.partition(" ")[0] or 2)

    def _writer(self, folder: Path) -> Any:
        return self._dcp.FileSystemWriter(folder / SNAPSHOT, thread_count=self._threads, sync_files=True)

    def take(self, folder: Path, state: TensorState) -> None:
        self._dcp.save({KEY: state.state_dict()}, storage_writer=self._writer(folder))
        make_durable(folder)

    def restore(self, folder: Path, state: TensorState, *, verify: bool) -> None:  # noqa: ARG002 - it never verifies
        values = {KEY: state.state_dict()}
        self._dcp.load(values, storage_reader=self._dcp.FileSystemReader(folder / SNAPSHOT))
        state.load_state_dict(values[KEY])

    def probe_reader(self, folder: Path) -> Callable[[torch.Tensor], None]:
        reader = self._dcp.FileSystemReader(folder / SNAPSHOT)
        return lambda live: self._dcp.load({KEY: {PROBE: live}}, storage_reader=reader)

    def async_taker(self, state: TensorState) -> Callable[[Path], Callable[[], object]]:
        staging: Any = importlib.import_module("torch.distributed.checkpoint.staging")
        on_device = self._task.workload.device != "cpu"
        options = staging.StagingOptions(
            use_pinned_memory=on_device, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=on_device
        )
        stager = staging.DefaultStager(options)

        def begin(folder: Path) -> Callable[[], object]:
            values = {KEY: state.state_dict()}
            future: Any = self._dcp.async_save(values, storage_writer=self._writer(folder), async_stager=stager)
            return future.result  # type: ignore[no-any-return]

        return begin


class Torchsnapshot(System):
    """torchsnapshot, its files flushed to the disk by the benchmark."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._snapshot: Any = importlib.import_module("torchsnapshot").Snapshot

    def take(self, folder: Path, state: TensorState) -> None:
        self._snapshot.take(str(folder / SNAPSHOT), {KEY: state})
        make_durable(folder)

    def restore(self, folder: Path, state: TensorState, *, verify: bool) -> None:  # noqa: ARG002 - it never verifies
        self._snapshot(str(folder / SNAPSHOT)).restore({KEY: state})

    def probe_reader(self, folder: Path) -> Callable[[torch.Tensor], None]:
        snapshot = self._snapshot(str(folder / SNAPSHOT))
        snapshot.get_manifest()
        return lambda live: snapshot.read_object(f"0/{KEY}/{PROBE}", obj_out=live)

    def async_taker(self, state: TensorState) -> Callable[[Path], Callable[[], object]]:
        def begin(folder: Path) -> Callable[[], object]:
            pending: Any = self._snapshot.async_take(str(folder / SNAPSHOT), {KEY: state})
            return pending.wait  # type: ignore[no-any-return]

        return begin


CLASSES: dict[str, type[System]] = {
    "expstate": Expstate,
    "torch": Torch,
    "safetensors": Safetensors,
    "dcp": Dcp,
    "torchsnapshot": Torchsnapshot,
}
