"""What to measure: the benchmark's command line, and what it asks for, checked.

Gets words; hands on ``Options`` that can be met, or says why they cannot.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expstate.bench.plan import (
    CATALOG,
    DISK,
    GIB,
    INCREMENTAL,
    KIB,
    LIMIT,
    MIB,
    MODULES,
    NOTEBOOK,
    OBJECTS,
    OPERATIONS,
    RANKS,
    SYSTEMS,
    Workload,
    operation_names,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence

DESCRIPTION = (
    "Measure take, restore and read beside the limits of this machine and beside other libraries, in turn, each step in a fresh process. "
    "Prints progress to stderr and a table to stdout."
)
_SPARE_STATES = 3
_FEWEST_TENSORS = 2
_GIB = {NOTEBOOK: 1.0, OBJECTS: 1.0}
_SMALL_TENSORS = {DISK: 100_000, RANKS: 1000}
_TAKING_PART = {
    CATALOG: {LIMIT, "expstate"},
    NOTEBOOK: {LIMIT, "expstate"},
    RANKS: {LIMIT, "expstate", "dcp"},
    INCREMENTAL: {LIMIT, "expstate"},
}
_NAME_A_FOLDER = (RANKS, INCREMENTAL)
_ON_DEVICE = (DISK, INCREMENTAL)
_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
"""What reaches a bucket by fsspec; the limits need it, and so does whoever cleans up."""


@dataclass(frozen=True, slots=True)
class Options:
    """What to measure.

    Attributes
    ----------
    path : Path
        Folder on the disk to measure.
    url : str
        Folder in a bucket to measure, in place of that.
    benchmark : str
        Which it is.
    workload : Workload
        The state, and where it is.
    operations, systems : sequence of str
        Which of the plan.
    repeat : int
        How often each is measured.
    slow_seconds : float
        What takes longer is not repeated.
    memory_budget_bytes : int, optional
        For takes and restores of expstate.
    storage_options : mapping
        With which fsspec and expstate reach the bucket.
    """

    path: Path
    workload: Workload
    operations: Sequence[str]
    systems: Sequence[str]
    repeat: int = 5
    slow_seconds: float = 60.0
    memory_budget_bytes: int | None = None
    url: str = ""
    benchmark: str = DISK
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)  # they may hold secrets


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options to a parser."""
    parser.add_argument(
        "path",
        metavar="PATH",
        help="folder on the disk to measure, with room for several copies of the state; "
        "or a folder in a bucket, as s3://bucket/folder or gs://bucket/folder; "
        "or the word catalog, to measure the catalog and comparisons in the current folder, or the word notebook, to measure what a "
        "notebook's user waits for (a folder of such a name is ./catalog); or the word ranks and a folder, to measure two ranks that work "
        "on one snapshot there, and plans of many more; or the word incremental and a folder, to measure takes that go on from earlier "
        "ones (with --device, the search for changes counts as a share of what the device reads and writes when it copies the state)",
    )
    parser.add_argument(
        "folder",
        nargs="?",
        metavar="PATH",
        help=f"after the word {' or '.join(_NAME_A_FOLDER)}, the folder on the disk to measure (default: this one)",
    )
    parser.add_argument(
        "--gib",
        type=float,
        metavar="N",
        help="size of the state, or of the two that are compared (default: 2; for notebooks and buckets 1)",
    )
    parser.add_argument("--tensors", type=int, default=100, metavar="N", help="number of its tensors (default: 100)")
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="times that each is measured (default: 5)")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, metavar="SYSTEM", help=f"of {', '.join(SYSTEMS)} (default: all installed)")
    of_disk, of_catalog, of_notebook, of_bucket, of_ranks, of_incremental = (
        ", ".join(operation_names(device=True, benchmark=one)) for one in (DISK, CATALOG, NOTEBOOK, OBJECTS, RANKS, INCREMENTAL)
    )
    parser.add_argument(
        "--operations",
        nargs="+",
        choices=tuple(OPERATIONS),
        metavar="OPERATION",
        help=f"of a disk: {of_disk}; of a bucket: {of_bucket}; of the catalog: {of_catalog}; of notebooks: {of_notebook}; "
        f"of ranks: {of_ranks}; of incremental takes: {of_incremental} (default: all)",
    )
    parser.add_argument("--device", default="cpu", metavar="D", help="where the state is, any device that torch names (default: cpu)")
    parser.add_argument(
        "--small-tensors",
        type=int,
        metavar="N",
        help="tensors of 1 KiB in small_tensors (default: 100000), in each snapshot of diff and browse (default: 10000), or of each "
        "rank that is simulated (default: 1000)",
    )
    parser.add_argument(
        "--records", type=int, default=100_000, metavar="N", help="records of the catalog that is searched (default: 100000)"
    )
    parser.add_argument("--snapshots", type=int, default=1000, metavar="N", help="snapshots that are scanned (default: 1000)")
    parser.add_argument("--ranks", type=int, default=1024, metavar="N", help="ranks that are simulated (default: 1024)")
    parser.add_argument("--memory-budget-mib", type=int, metavar="N", help="memory budget of expstate (default: its own)")
    parser.add_argument(
        "--slow-seconds", type=float, default=60.0, metavar="S", help="what takes longer than this is not repeated (default: 60)"
    )
    parser.add_argument(
        "--storage-options",
        metavar="JSON",
        help="how the bucket is reached, an object as fsspec's storage_options; what is not said is found in the environment and in files, "
        "as s3fs and gcsfs find it, which is the place for secrets",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here")


def _check_device(device: str) -> None:
    import torch  # the parent needs it for nothing else

    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if found is None or found.type != device.partition(":")[0]:
        msg = f"--device {device}: this PyTorch finds {found.type if found else 'no accelerator'} here"
        raise ValueError(msg)


def _storage_options(text: str | None, url: str) -> dict[str, Any]:
    """The storage options of a bucket, after a look at whether it can be reached by them. Nothing is asked of the network."""
    try:
        found: object = json.loads(text) if text is not None else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        # Not shown: it may hold a secret.
        msg = '--storage-options must be an object in JSON, such as {"endpoint_url": "http://127.0.0.1:8333"}'
        raise ValueError(msg)  # noqa: TRY004 - the words of a command line are of one type
    if not url:
        if text is not None:
            msg = "--storage-options: only for a bucket"
            raise ValueError(msg)
        return found
    scheme = url.partition("://")[0]
    package = _PACKAGES.get(scheme)
    if package is None:
        msg = f"{scheme}:// is not measured; a bucket is named as s3://bucket/folder or gs://bucket/folder"
        raise ValueError(msg)
    if importlib.util.find_spec(package) is None:
        msg = f"{scheme}:// needs the package {package}"
        raise ValueError(msg)
    from expstate.storage.registry import open_storage

    open_storage(url, found)
    return found


def _folder(arguments: argparse.Namespace, benchmark: str) -> Path:
    """Where on a disk it works, for a bucket and for what needs no special disk the current folder."""
    if arguments.folder is not None and benchmark not in _NAME_A_FOLDER:
        msg = f"{arguments.folder!r}: a second word only follows the word {' or '.join(_NAME_A_FOLDER)}"
        raise ValueError(msg)
    path = Path(arguments.path if benchmark == DISK else arguments.folder or "")
    if not path.is_dir():
        msg = f"{str(path)!r} is no folder: name an existing one on the disk to measure"
        raise ValueError(msg)
    return path


def _check_operations(asked: Sequence[str], possible: Sequence[str], benchmark: str) -> None:
    others = sorted(set(asked) - set(possible))
    if others:
        its = OPERATIONS[others[0]].benchmark
        its_place = "a folder on a disk" if benchmark == OBJECTS else "PATH"
        only = "with --device" if its == benchmark else f"with {its_place}" if its == DISK else f"with `bench {its}`"
        msg = f"{', '.join(others)}: only {only}"
        raise ValueError(msg)


def options_from(arguments: argparse.Namespace) -> Options:
    """The options that a command line asks for.

    Raises
    ------
    ValueError
        If they cannot be met: a size that cannot be laid out, a folder, device or package that is missing, a disk that is too small.
    """
    on_device = arguments.device != "cpu"
    in_bucket = "://" in arguments.path
    benchmark = OBJECTS if in_bucket else arguments.path if arguments.path in _TAKING_PART else DISK
    if on_device and benchmark not in _ON_DEVICE:
        msg = f"--device {arguments.device}: this benchmark measures on the host"
        raise ValueError(msg)
    if on_device:
        _check_device(arguments.device)
    path = _folder(arguments, benchmark)
    url = arguments.path.rstrip("/") if in_bucket else ""
    storage_options = _storage_options(arguments.storage_options, url)
    gib = arguments.gib if arguments.gib is not None else _GIB.get(benchmark, 2.0)
    total_bytes = int(gib * GIB) // 16 * 16
    if arguments.json is not None and not arguments.json.resolve().parent.is_dir():
        msg = f"--json {arguments.json}: its folder does not exist"
        raise ValueError(msg)
    small_tensors = arguments.small_tensors if arguments.small_tensors is not None else _SMALL_TENSORS.get(benchmark, 10_000)
    if min(arguments.repeat, small_tensors, arguments.records, arguments.snapshots, arguments.ranks) < 1:
        msg = "--repeat, --small-tensors, --records, --snapshots and --ranks must be at least 1"
        raise ValueError(msg)
    if not _FEWEST_TENSORS <= arguments.tensors <= 1 + (total_bytes - MIB) // KIB:
        msg = f"--gib {gib:g} --tensors {arguments.tensors}: expected at least 2 tensors, one of 1 MiB and 1 KiB for each other"
        raise ValueError(msg)
    possible = operation_names(device=on_device, benchmark=benchmark)
    _check_operations(arguments.operations or possible, possible, benchmark)
    operations = [name for name in possible if name in (arguments.operations or possible)]
    installed = [system for system in SYSTEMS if system == LIMIT or importlib.util.find_spec(MODULES[system])]
    systems = [system for system in SYSTEMS if system in (arguments.systems or installed)]
    if benchmark in _TAKING_PART:
        systems = [system for system in systems if system in _TAKING_PART[benchmark]]
    disk = Path(tempfile.gettempdir()) if in_bucket else path
    # One file at a time where all else is in a bucket.
    needed = total_bytes if in_bucket else (len(systems) + _SPARE_STATES) * total_bytes
    free = shutil.disk_usage(disk).free
    if free < needed:
        msg = f"{str(disk)!r} has {free / GIB:.1f} GiB free, needed are {needed / GIB:.1f}: lower --gib or choose --systems"
        raise ValueError(msg)
    budget = arguments.memory_budget_mib * MIB if arguments.memory_budget_mib else None
    counts = arguments.records, arguments.snapshots, arguments.ranks
    workload = Workload(total_bytes, arguments.tensors, small_tensors, arguments.device, *counts)
    return Options(path, workload, operations, systems, arguments.repeat, arguments.slow_seconds, budget, url, benchmark, storage_options)
