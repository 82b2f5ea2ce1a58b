"""``import_dcp``: a snapshot made of a checkpoint folder, in this process alone.

The checkpoint's files are mapped and never read as a whole: what passes through memory is what is being written.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from expstate import collector
from expstate.engine import memory
from expstate.errors import InvalidArgumentError
from expstate.interop.checkpoint import Checkpoint, Item
from expstate.interop.commit import Given, Shards, add_key, alone
from expstate.interop.names import TOP_KEY, Place, entry_path
from expstate.snapshot import Snapshot
from expstate.state import paths
from expstate.state.sharding import Part

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from expstate.catalog.origin import CatalogOption
    from expstate.engine.part import PartWriter


def import_dcp(
    source: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    *,
    key: str = TOP_KEY,
    trust: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    name: str | None = None,
    tags: Iterable[str] = (),
    params: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    note: str | None = None,
    step: int | None = None,
    overwrite: bool = False,
    force: bool = False,
    memory_budget_bytes: int | None = None,
    catalog: CatalogOption = None,
) -> Snapshot:
    """Make a snapshot of a checkpoint of ``torch.distributed.checkpoint``: its ``.metadata`` and ``.distcp`` files.

    Keys and paths are those that ``expstate.interop.dcp.Writer`` gives to the same state dict. Nothing that the checkpoint holds is run:
    its pickles are read with stand-ins for DCP's own classes.

    Parameters
    ----------
    source : str or os.PathLike
        The checkpoint's folder, on a disk.
    dest : str or os.PathLike
        Where the snapshot goes: a folder to make, or one without a snapshot in it.
    key : str, default "state"
        The key for what stands at the top of the checkpoint's state dict.
    trust : bool, default False
        Whether pickles in the checkpoint may run code, where they hold more than plain values.
    storage_options, name, tags, params, metrics, note, step, overwrite, force, memory_budget_bytes, catalog
        As for ``Snapshot.take``.

    Returns
    -------
    Snapshot
        The committed snapshot.

    Raises
    ------
    SnapshotNotFoundError
        If there is no checkpoint.
    PickleNotAllowedError
        If it needs trust; the message says what for. Nothing was written.
    CheckpointFormatError
        If it is damaged, or not of a known form. Nothing was written.
    SnapshotExistsError
        If a snapshot is there already.

    Examples
    --------
    >>> import tempfile, torch, warnings
    >>> import torch.distributed.checkpoint as dcp
    >>> from expstate.interop import import_dcp
    >>> folder = tempfile.TemporaryDirectory()
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")  # torch warns that this is one process
    ...     _ = dcp.save({"model": {"weight": torch.ones(2)}, "epoch": 3}, checkpoint_id=f"{folder.name}/checkpoint")
    >>> snapshot = import_dcp(f"{folder.name}/checkpoint", f"{folder.name}/imported", name="imported")
    >>> snapshot.read_object("model/weight"), snapshot.read_object("state/epoch")
    (tensor([1., 1.]), 3)
    >>> folder.cleanup()
    """
    if not isinstance(source, (str, os.PathLike)) or "://" in os.fspath(source):
        msg = f"a checkpoint is imported from a folder on a disk, got {source!r}"
        raise InvalidArgumentError(msg)
    memory.budget_bytes(memory_budget_bytes)
    given = Given(
        path=dest,
        key=key,
        storage_options=storage_options,
        name=name,
        tags=tags,
        params=params,
        metrics=metrics,
        note=note,
        step=step,
        overwrite=overwrite,
        force=force,
        memory_budget_bytes=memory_budget_bytes,
        catalog=catalog,
    )
    with collector.paused():
        checkpoint = Checkpoint(source, trust=trust)
        found = {path: _read(checkpoint, item) for item in checkpoint.items for path in [entry_path(item.place, key)]}
        places = [item.place for item in checkpoint.items]

    def fill(part: PartWriter) -> list[Place]:
        for one, of_key in _by_key(found).items():
            wholes = [(path, value) for path, value in of_key.items() if not isinstance(value, Shards)]
            add_key(part, one, wholes, {path: value for path, value in of_key.items() if isinstance(value, Shards)})
        return places

    alone(given, fill)
    return Snapshot(dest, storage_options)


def _read(checkpoint: Checkpoint, item: Item) -> Any:
    """A value, a whole tensor, or a tensor in shards; tensors are only mapped."""
    if item.dtype is None:
        return checkpoint.value(item)
    parts = [Part(chunk.starts, chunk.sizes, checkpoint.tensor(item, chunk)) for chunk in item.chunks]
    return parts[0].tensor if len(parts) == 1 and parts[0].sizes == item.shape else Shards(item.shape, parts)


def _by_key(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    keys: dict[str, dict[str, Any]] = {}
    for path, value in found.items():
        keys.setdefault(paths.key_of(path), {})[path] = value
    return keys
