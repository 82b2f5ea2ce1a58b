"""Reading without live state: whole keys, single entries and rows of tensors into new memory, or into one tensor that the caller gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from expstate.engine import crew, memory
from expstate.engine.devices import usable_device
from expstate.engine.read import PieceReader, Read
from expstate.engine.report import bytes_text
from expstate.errors import InvalidArgumentError, ManifestError, MemoryBudgetError, PickleNotAllowedError, RestoreMismatchError
from expstate.format.manifest import AliasEntry, ContainerEntry, Entry, ObjectEntry, TensorEntry, ValueEntry
from expstate.progress import Progress
from expstate.state import numpy_arrays, tensors, tree
from expstate.state.objects import unpickle_object
from expstate.state.values import decode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from expstate.engine.source import SnapshotSource


def allocate(entry: TensorEntry, device: torch.device, shape: tuple[int, ...] | None = None) -> tuple[Any, torch.Tensor]:
    """New memory for an entry: the object that the caller will see, and the tensor to read into.

    Parameters
    ----------
    entry : TensorEntry
        What will be read.
    device : torch.device
        Where a tensor goes; arrays are on the host.
    shape : tuple of int, optional
        Another shape than the entry's: rows of it.

    Raises
    ------
    ManifestError
        If NumPy does not know the dtype.
    """
    shape = entry.shape if shape is None else shape
    if entry.kind == "numpy":
        try:
            return numpy_arrays.empty(entry.dtype, shape)
        except (TypeError, ValueError, OverflowError) as error:
            msg = f"entry {entry.path!r} is of a dtype that NumPy does not make arrays of: {entry.dtype!r}"
            raise ManifestError(msg) from error
    tensor = torch.empty(shape, dtype=tensors.DTYPES[entry.dtype], device=device)
    if entry.kind == "parameter":
        return torch.nn.Parameter(tensor, requires_grad=entry.requires_grad), tensor
    return tensor.requires_grad_(entry.requires_grad) if entry.requires_grad else tensor, tensor.detach()


def check_room(source: SnapshotSource, nbytes: int) -> None:
    """Refuse what cannot be held: equal tensors are stored once, so that few bytes of files can be many in memory.

    Raises
    ------
    MemoryBudgetError
        If so many bytes are more than the files hold, and more than the memory that is available.
    """
    if nbytes > sum(file.size for file in source.files if file is not None) and nbytes > (available := memory.available_bytes()):
        msg = f"{bytes_text(nbytes)} of new memory are needed, and {bytes_text(available)} are available; read fewer entries at a time"
        raise MemoryBudgetError(msg)


def read_all(source: SnapshotSource, reads: Sequence[Read], budget: int, *, verify: bool) -> None:
    """Do reads outside a restore."""
    threads, budget = memory.means(source.storage, budget)
    pinned_for = next((read.target.tensor.device.type for read in reads if read.target is not None and not read.target.tensor.is_cpu), None)
    staging = memory.Staging(budget, threads, pinned_for)
    try:
        PieceReader(source.files, staging, threads, Progress("read", 0, option=False), crew.Stop(), verify=verify).run(reads)
    finally:
        staging.close()


def read_object_bytes(source: SnapshotSource, entry: ObjectEntry, budget: int) -> bytes:
    """The bytes of an object, always verified: they will be unpickled."""
    data = bytearray(entry.nbytes)
    tensor = torch.frombuffer(data, dtype=torch.uint8)
    read_all(source, list(source.reads(entry, tensor)), budget, verify=True)
    return bytes(data)


def read_tree(source: SnapshotSource, path: str, *, device: torch.device | None, trust: bool, verify: bool, budget: int) -> Any:
    """The value at a path: a tensor, a plain value, or a container with all that is below it.

    Raises
    ------
    EntryNotFoundError
        If there is no such entry.
    PickleNotAllowedError
        If it needs ``trust``; the message names every such entry below the path.
    MemoryBudgetError
        If equal tensors, which are stored once, would need more memory than is available.
    """
    entries = source.subtree(path)
    with source.opened(source.files_of(entries)) as opened:
        arrays = {found.path: found.nbytes for entry in entries if isinstance(found := opened.resolve(entry), TensorEntry)}
        check_room(opened, sum(arrays.values()))
        values = _decode_objects(opened, entries, budget, trust=trust)
        made: dict[str, Any] = {}
        reads: list[Read] = []
        parts = []
        for entry in entries:
            if isinstance(entry, ContainerEntry):
                parts.append(tree.Part(entry.path, entry.type, entry.meta, None))
                continue
            tensor_entry = opened.resolve(entry)
            if isinstance(tensor_entry, TensorEntry):
                if tensor_entry.path not in made:
                    value, tensor = allocate(tensor_entry, device or usable_device(tensor_entry.device))
                    made[tensor_entry.path] = value
                    reads += opened.reads(tensor_entry, tensor)
                value = made[tensor_entry.path]
            else:
                value = decode(entry.value) if isinstance(entry, ValueEntry) else values[entry.path]
            parts.append(tree.Part(entry.path, None, None, value))
        read_all(opened, reads, budget, verify=verify)
    return tree.build(parts, {})


def _decode_objects(source: SnapshotSource, entries: Sequence[Entry], budget: int, *, trust: bool) -> dict[str, Any]:
    values = {}
    refused = []
    for entry in entries:
        if isinstance(entry, ObjectEntry):
            try:
                values[entry.path] = unpickle_object(read_object_bytes(source, entry, budget), trust=trust)
            except PickleNotAllowedError as error:
                refused.append(f"entry {entry.path!r} ({entry.type}): {error}")
    if refused:
        raise PickleNotAllowedError("; ".join(refused))
    return values


def read_tensor(
    source: SnapshotSource,
    entry: TensorEntry | AliasEntry,
    out: Any,
    rows: slice | None,
    *,
    device: torch.device | None,
    verify: bool,
    budget: int,
) -> Any:
    """A tensor or array, or some rows of it, new or into ``out``.

    Raises
    ------
    InvalidArgumentError
        If the rows are not a plain slice of the first dimension.
    RestoreMismatchError
        If ``out`` is of another shape or dtype.
    """
    resolved = source.resolve(entry)
    assert isinstance(resolved, TensorEntry)
    span = _rows(resolved, rows)
    shape = resolved.shape if span is None else (len(span), *resolved.shape[1:])
    given = None if out is None else _checked_out(resolved, out, shape)
    region = (0 if span is None else span.start, *((0,) * (len(shape) - 1)))[: len(shape)], shape
    with source.opened(source.files_of_regions(resolved, [region])) as opened:
        # Only now is it sure that the files are as large as the manifest says, so that memory for their bytes may be asked for.
        value, tensor = (out, given) if given is not None else allocate(resolved, device or usable_device(resolved.device), shape)
        reads = opened.reads(resolved, tensor) if span is None else opened.row_reads(resolved, span, tensor)
        read_all(opened, list(reads), budget, verify=verify)
    return value


def _rows(entry: TensorEntry, rows: slice | None) -> range | None:
    if rows is None:
        return None
    if not isinstance(rows, slice) or not entry.shape:
        msg = f"rows must be a slice of the first dimension, got {rows!r} for shape {entry.shape}"
        raise InvalidArgumentError(msg)
    try:
        span = range(entry.shape[0])[rows]
    except TypeError as error:
        msg = f"rows {rows!r} is not a slice of numbers: {error}"
        raise InvalidArgumentError(msg) from None
    if span.step != 1:
        msg = f"rows must have step 1, got {rows!r}"
        raise InvalidArgumentError(msg)
    return range(span.start, max(span.start, span.stop))


def _checked_out(entry: TensorEntry, out: Any, shape: tuple[int, ...]) -> torch.Tensor:
    if entry.kind == "numpy":
        array = numpy_arrays.as_tensor(out)
        if (
            array is not None
            and out.dtype.str == entry.dtype
            and tuple(out.shape) == shape
            and out.flags.c_contiguous
            and out.flags.writeable
        ):
            return array
        problem = "a contiguous, writable array"
    elif isinstance(out, torch.Tensor) and tensors.NAMES.get(out.dtype) == entry.dtype and tuple(out.shape) == shape:
        if tensors.is_writable_in_place(out) and out.device.type != "meta":
            return out.detach()
        problem = "a tensor whose elements have memory of their own"
    else:
        problem = "a tensor"
    found = f"{getattr(out, 'dtype', type(out).__name__)} {tuple(getattr(out, 'shape', ()))}"
    msg = f"entry {entry.path!r} needs {problem} of dtype {entry.dtype} and shape {shape} to be read into, got {found}"
    raise RestoreMismatchError(msg)
