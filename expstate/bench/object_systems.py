"""The systems side by side in a bucket: each takes, restores and reads one ``TensorState`` by its own way to object stores.

Gets a folder as a URL; what is written there is stored when ``take`` returns, and ``restore`` ends with the values in the live tensors.
"""

from __future__ import annotations

import contextlib
import importlib
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from expstate import settings
from expstate.bench.places import filesystem, storage_options
from expstate.bench.plan import BUDGET_BYTES, SNAPSHOT
from expstate.bench.state import PROBE
from expstate.bench.systems import KEY
from expstate.storage.registry import open_storage

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from expstate.bench.plan import Task
    from expstate.bench.state import TensorState


class ObjectSystem(ABC):
    """One way to take to a bucket and to restore from it.

    Parameters
    ----------
    task : Task
        Transport, setting, budget and operation.

    Attributes
    ----------
    maps_files : bool
        Whether it reads files by mapping them.
    """

    maps_files: ClassVar[bool] = False

    def __init__(self, task: Task) -> None:
        self._task = task
        self._options = storage_options()

    def open(self, folder: str) -> None:
        """Import and connect by one small request, which is not measured."""
        self._files = filesystem(folder)
        self._files.exists(f"{folder}/nothing")

    @abstractmethod
    def take(self, folder: str, state: TensorState) -> None:
        """Store the state."""

    @abstractmethod
    def restore(self, folder: str, state: TensorState) -> None:
        """Put the values into the live tensors, verified where the system can."""

    def read_one(self, folder: str, live: torch.Tensor) -> None:
        """Read the probe into a live tensor; nothing is known of the snapshot before."""
        raise NotImplementedError(folder, live)


class ObjectExpstate(ObjectSystem):
    """expstate itself, by the transport that the component names."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._snapshot: Any = importlib.import_module("expstate").Snapshot
        self._budget = BUDGET_BYTES if task.operation.endswith("_budget") else task.memory_budget_bytes

    def _transport(self) -> contextlib.AbstractContextManager[object]:
        return settings.override(transport=self._task.component)

    def open(self, folder: str) -> None:
        with self._transport(), contextlib.suppress(FileNotFoundError):
            open_storage(folder, self._options).stat("nothing")

    def _opened(self, folder: str) -> Any:
        with self._transport():
            return self._snapshot(f"{folder}/{SNAPSHOT}", self._options)

    def take(self, folder: str, state: TensorState) -> None:
        with self._transport():
            self._snapshot.take(
                f"{folder}/{SNAPSHOT}",
                {KEY: state},
                storage_options=self._options,
                memory_budget_bytes=self._budget,
                progress=False,
                catalog=False,
            )

    def restore(self, folder: str, state: TensorState) -> None:
        self._opened(folder).restore({KEY: state}, verify=True, memory_budget_bytes=self._budget, progress=False)

    def read_one(self, folder: str, live: torch.Tensor) -> None:
        self._opened(folder).read_object(f"{KEY}/{PROBE}", obj_out=live)


class ObjectTorch(ObjectSystem):
    """``torch.save`` and ``torch.load`` by a file of fsspec's."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._torch: Any = importlib.import_module("torch")

    def take(self, folder: str, state: TensorState) -> None:
        with self._files.open(f"{folder}/{SNAPSHOT}", "wb") as file:
            self._torch.save(state.state_dict(), file)

    def restore(self, folder: str, state: TensorState) -> None:
        with self._files.open(f"{folder}/{SNAPSHOT}", "rb") as file:
            state.load_state_dict(self._torch.load(file, map_location="cpu", weights_only=True))


class ObjectSafetensors(ObjectSystem):
    """``save_file`` to the disk for temporary files, then an upload; a download to it, then ``load_file``."""

    maps_files = True

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._torch: Any = importlib.import_module("safetensors.torch")

    @contextlib.contextmanager
    def _local(self) -> Iterator[str]:
        # Where the parent removes what a process leaves that dies.
        with tempfile.TemporaryDirectory(dir=Path(self._task.expected).parent) as folder:
            yield f"{folder}/{SNAPSHOT}"

    def take(self, folder: str, state: TensorState) -> None:
        with self._local() as file:
            self._torch.save_file(state.state_dict(), file)
            self._files.put_file(file, f"{folder}/{SNAPSHOT}")

    def restore(self, folder: str, state: TensorState) -> None:
        with self._local() as file:
            self._files.get_file(f"{folder}/{SNAPSHOT}", file)
            state.load_state_dict(self._torch.load_file(file))


class ObjectDcp(ObjectSystem):
    """``torch.distributed.checkpoint`` by fsspec, with one file and one writing thread per setting."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._dcp: Any = importlib.import_module("torch.distributed.checkpoint")
        self._fsspec: Any = importlib.import_module("torch.distributed.checkpoint._fsspec_filesystem")
        self._more = {"use_listings_cache": False, **self._options}
        self._threads = int(task.setting.partition(" ")[0] or 2)

    def take(self, folder: str, state: TensorState) -> None:
        # Not synced: what is in a bucket is stored, and this would flush the disks of the machine.
        writer = self._fsspec.FsspecWriter(f"{folder}/{SNAPSHOT}", thread_count=self._threads, sync_files=False, **self._more)
        self._dcp.save({KEY: state.state_dict()}, storage_writer=writer)

    def _load(self, folder: str, values: dict[str, Any]) -> None:
        self._dcp.load(values, storage_reader=self._fsspec.FsspecReader(f"{folder}/{SNAPSHOT}", **self._more))

    def restore(self, folder: str, state: TensorState) -> None:
        values = {KEY: state.state_dict()}
        self._load(folder, values)
        state.load_state_dict(values[KEY])

    def read_one(self, folder: str, live: torch.Tensor) -> None:
        self._load(folder, {KEY: {PROBE: live}})


class ObjectTorchsnapshot(ObjectSystem):
    """torchsnapshot by its own storage plugins, which find all that they need in the environment."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._snapshot: Any = importlib.import_module("torchsnapshot").Snapshot
        if self._options:
            msg = "torchsnapshot takes no storage options of fsspec's: say them in the environment"
            raise ValueError(msg)

    def take(self, folder: str, state: TensorState) -> None:
        self._snapshot.take(f"{folder}/{SNAPSHOT}", {KEY: state})

    def restore(self, folder: str, state: TensorState) -> None:
        self._snapshot(f"{folder}/{SNAPSHOT}").restore({KEY: state})

    def read_one(self, folder: str, live: torch.Tensor) -> None:
        self._snapshot(f"{folder}/{SNAPSHOT}").read_object(f"0/{KEY}/{PROBE}", obj_out=live)


CLASSES: dict[str, type[ObjectSystem]] = {
    "expstate": ObjectExpstate,
    "torch": ObjectTorch,
    "safetensors": ObjectSafetensors,
    "dcp": ObjectDcp,
    "torchsnapshot": ObjectTorchsnapshot,
}
