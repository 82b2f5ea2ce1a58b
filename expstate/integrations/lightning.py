"""Lightning: a ``ModelCheckpoint`` whose checkpoints are snapshots, taken in the background; a trainer goes on from them as from its own.

``SnapshotIO`` is what the trainer writes and reads its checkpoints by; the callback puts it into the trainer.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

import torch

from expstate.errors import ExpstateError, InvalidArgumentError, SnapshotPinnedError, TakeFailedWarning
from expstate.integrations.keeping import Keeper
from expstate.snapshot import Snapshot
from expstate.state.stateful import RNGState, StateDict
from expstate.storage import registry

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.plugins.io import CheckpointIO, TorchCheckpointIO

    from expstate.catalog.origin import CatalogOption
    from expstate.pending import PendingSnapshot
else:
    # Two packages have them: the one that is in use counts.
    _name = "pytorch_lightning" if "lightning" not in sys.modules and "pytorch_lightning" in sys.modules else "lightning.pytorch"
    ModelCheckpoint = importlib.import_module(f"{_name}.callbacks").ModelCheckpoint
    CheckpointIO = importlib.import_module(f"{_name}.plugins.io").CheckpointIO
    TorchCheckpointIO = importlib.import_module(f"{_name}.plugins.io").TorchCheckpointIO

_KEYS = {"state_dict": "model", "optimizer_states": "optimizer"}
_REST = "lightning"


class SnapshotIO(CheckpointIO):
    """Writes checkpoints of a trainer as snapshots, in the background, and reads them.

    A checkpoint's ``state_dict`` is the key ``model``, its ``optimizer_states`` are ``optimizer``, and what else is in it is ``lightning``;
    the random generators are added as ``rng``. So ``Snapshot(path).restore({"model": module})`` brings the weights back without a trainer.

    Parameters
    ----------
    storage_options : dict, optional
        What the storage needs to connect.
    catalog : Catalog, str, os.PathLike or False, optional
        Where the takes are recorded, as for ``Snapshot.take``.
    base : {"auto", None}, default "auto"
        Whether a take goes on from the one before and writes what has changed since, or all.
    trust : bool, default False
        Load objects that only pickle brings back.
    pg : torch.distributed.ProcessGroup, optional
        One of the first rank alone, which writes for all; ``SnapshotCheckpoint`` makes it.
    """

    def __init__(
        self,
        *,
        storage_options: Mapping[str, Any] | None = None,
        catalog: CatalogOption = None,
        base: str | None = "auto",
        trust: bool = False,
        pg: Any = None,
    ) -> None:
        if base not in {"auto", None}:
            msg = f"base must be 'auto', for what has changed, or None, for all; got {base!r}"
            raise InvalidArgumentError(msg)
        self.pg = pg
        self._base = base
        self.generators: dict[str, Any] | None = None
        self._storage_options = storage_options
        self._catalog = catalog
        self._keeper = Keeper(catalog)
        self._trust = trust
        self._pending: dict[str, PendingSnapshot] = {}

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None) -> None:
        """Take a snapshot; returns when the checkpoint is copied.

        Raises
        ------
        InvalidArgumentError
            If storage options are given here: they belong to the constructor.

        Warns
        -----
        TakeFailedWarning
            If a take has failed since the last one.
        """
        if storage_options is not None:
            msg = "storage_options are given to SnapshotIO or SnapshotCheckpoint, not with each checkpoint"
            raise InvalidArgumentError(msg)
        self._tell_failures()
        state: dict[str, Any] = {key: StateDict(checkpoint=checkpoint[name]) for name, key in _KEYS.items() if name in checkpoint}
        if "model" in state:
            state["model"] = StateDict(checkpoint["state_dict"])
        state[_REST] = StateDict({name: value for name, value in checkpoint.items() if name not in _KEYS})
        state["rng"] = RNGState()
        url = os.fspath(path)
        self._pending[url] = Snapshot.async_take(
            url,
            state,
            pg=self.pg,
            storage_options=self._storage_options,
            step=checkpoint.get("global_step"),
            overwrite=True,
            base=self._base,
            progress=False,
            catalog=self._catalog,
        )

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint that a snapshot holds, or a file of Lightning's own."""
        url = os.fspath(path)
        if "://" not in url and os.path.isfile(url):  # noqa: PTH113 - may be a URL
            return TorchCheckpointIO().load_checkpoint(url, map_location, weights_only)
        if url in self._pending:
            self._pending[url].exception()
        snapshot = Snapshot(url, self._storage_options)
        keys = snapshot.keys()
        checkpoint: dict[str, Any] = snapshot.get_state_dict_for_key(_REST, trust=self._trust)
        if "model" in keys:
            checkpoint["state_dict"] = snapshot.get_state_dict_for_key("model", trust=self._trust)
        if "optimizer" in keys:
            checkpoint["optimizer_states"] = snapshot.get_state_dict_for_key("optimizer", trust=self._trust)["checkpoint"]
        self.generators = snapshot.get_state_dict_for_key("rng")
        return checkpoint

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Remove a snapshot that has neither tag nor alias nor pin, once the one that was begun last is committed."""
        url = os.fspath(path)
        if "://" not in url and os.path.isfile(url):  # noqa: PTH113 - as above
            TorchCheckpointIO().remove_checkpoint(url)
        elif self._pending:
            newest = next(reversed(self._pending.values()))
            newest.add_done_callback(lambda ended: None if ended._error is not None else self._remove(url))  # noqa: SLF001 - not told by this
        else:
            self._remove(url)

    def _remove(self, url: str) -> None:
        pending = self._pending.get(url)
        if pending is not None:
            pending.cancel()
        try:
            self._keeper.remove(registry.open_storage(url, self._storage_options))
        except (SnapshotPinnedError, FileNotFoundError):
            pass
        except (ExpstateError, OSError) as error:
            warnings.warn(f"the snapshot at {url!r} was not removed: {error}", TakeFailedWarning, stacklevel=2)

    def teardown(self) -> None:
        """Wait for the takes that go on.

        Warns
        -----
        TakeFailedWarning
            For each that failed.
        """
        for pending in self._pending.values():
            pending.exception()
            pending._thread.join()  # noqa: SLF001 - what is to be removed after it is gone then
        self._tell_failures()

    def _tell_failures(self) -> None:
        for url, pending in list(self._pending.items()):
            if not pending.done():
                continue
            del self._pending[url]
            error = pending.exception()
            if error is not None:
                message = f"the snapshot at {url!r} was not taken: {type(error).__name__}: {error}"
                warnings.warn(message, TakeFailedWarning, stacklevel=3)


class SnapshotCheckpoint(ModelCheckpoint):
    """``ModelCheckpoint`` with snapshots: the same options, the same rules of what is kept, and folders in the place of files.

    A trainer goes on by ``trainer.fit(model, ckpt_path=path)``, ``"last"`` or ``"best"`` as from any checkpoint. Random generators go on
    too, so that a training resumed after an epoch comes to the same bits. A snapshot with a tag, an alias or a pin is not removed.

    Parameters
    ----------
    dirpath, filename
        As for ``ModelCheckpoint``; a URL will do.
    storage_options, catalog, base, trust
        As for ``SnapshotIO``.
    **options
        As for ``ModelCheckpoint``: ``monitor``, ``save_top_k``, ``save_last``, ``every_n_train_steps``, ``train_time_interval`` and others.

    Examples
    --------
    A training that goes on where it was ended::

        trainer = Trainer(callbacks=[SnapshotCheckpoint("runs", every_n_epochs=1, save_last=True)])
        trainer.fit(model, loader, ckpt_path="last")
    """

    FILE_EXTENSION = ""

    def __init__(
        self,
        dirpath: str | os.PathLike[str] | None = None,
        filename: str | None = None,
        *,
        storage_options: Mapping[str, Any] | None = None,
        catalog: CatalogOption = None,
        base: str | None = "auto",
        trust: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(None if dirpath is None else os.fspath(dirpath), filename, **options)
        self._io = SnapshotIO(storage_options=storage_options, catalog=catalog, base=base, trust=trust)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have the trainer write and read its checkpoints as snapshots."""
        super().setup(trainer, pl_module, stage)
        if trainer.world_size > 1 and self._io.pg is None:
            group = torch.distributed.new_group([0])  # all ranks have to call it
            self._io.pg = group if trainer.is_global_zero else None
        trainer.strategy.checkpoint_io = self._io

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the random generators back, if the trainer goes on from a snapshot."""
        super().on_fit_start(trainer, pl_module)
        if self._io.generators is not None:
            RNGState().load_state_dict(self._io.generators)
            self._io.generators = None
