"""The plan of a benchmark: operations, what each is compared with, and the records that go to a child process and come back.

Gets nothing; ``run``, ``child`` and ``report`` read it. Nothing here needs PyTorch.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

KIB = 1024
MIB = 1024**2
GIB = 1024**3

BUDGET_BYTES = 256 * MIB
"""Memory budget of the operations that measure peak memory."""

FILLED_PROJECT = "example.org/bench"
"""The project of the records that are searched."""

DISK, CATALOG, NOTEBOOK, OBJECTS, RANKS, INCREMENTAL = "disk", "catalog", "notebook", "objects", "ranks", "incremental"
"""The benchmarks: of a disk, of the catalog, of notebooks, of a bucket, of several ranks and of incremental takes."""

STORAGE_OPTIONS = "EXPSTATE_BENCH_STORAGE_OPTIONS"
"""The variable by which child processes are told, in JSON, how the bucket is reached: command lines are seen by everybody."""

LIMIT = "limit"
SYSTEMS = (LIMIT, "expstate", "torch", "safetensors", "dcp", "torchsnapshot")
MODULES = {"torch": "torch", "safetensors": "safetensors", "dcp": "torch", "torchsnapshot": "torchsnapshot", "expstate": "expstate"}
"""The module that a system needs."""

SNAPSHOT = "snapshot"
"""File or folder that a system writes in the folder given to it; the raw file of the limits has this name too."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a figure of an operation is to reach.

    Attributes
    ----------
    figure : str
        Its name among the figures of an outcome.
    value : float
        What it is to be at least or at most.
    at_least : bool
        Which of the two.
    """

    figure: str
    value: float
    at_least: bool = False

    def is_met(self, found: float) -> bool:
        """Whether this is enough.

        Examples
        --------
        >>> Target("bytes_written", 10).is_met(11), Target("times_as_fast", 3.5, at_least=True).is_met(4)
        (False, True)
        """
        return found >= self.value if self.at_least else found <= self.value


@dataclass(frozen=True, slots=True)
class Operation:
    """What is measured.

    Attributes
    ----------
    name, help : str
        Its name in results, and a line for people.
    limits : tuple of str
        What the machine must do at least, names of ``limits``; the slowest is the limit.
    device_limits : tuple of str
        The same where the state is on an accelerator.
    object_limits : tuple of str
        The same for a bucket; there it is measured if there is any. Of the settings, clients and requests at once, the fastest counts.
    needs_kept : bool
        Whether a snapshot taken beforehand is read.
    benchmark : str
        Which it belongs to: that of a disk, which is also that of a bucket, of the catalog, of notebooks, of several ranks or of
        incremental takes.
    device_only : bool
        Whether it exists only with ``--device``.
    null_on_device : bool
        Whether expstate takes to the null storage where the state is on an accelerator, so that the transfer alone is measured.
    targets : tuple of Target
        What its figures are to reach.
    """

    name: str
    help: str
    limits: tuple[str, ...] = ()
    device_limits: tuple[str, ...] = ()
    object_limits: tuple[str, ...] = ()
    needs_kept: bool = False
    benchmark: str = DISK
    device_only: bool = False
    null_on_device: bool = False
    targets: tuple[Target, ...] = ()


OPERATIONS = {
    operation.name: operation
    for operation in (
        Operation("take", "take, durable when it returns", ("write",), ("write", "to_host"), ("put",)),
        Operation("take_budget", "take within a budget of 256 MiB", ("write",), ("write", "to_host"), ("put",)),
        Operation("async_stall", "until async_take returns, second take of the process", ("copy",), ("to_host",), null_on_device=True),
        Operation(
            "restore_cold",
            "restore, files not cached, verified where the system can",
            ("read",),
            ("read", "to_device"),
            ("get",),
            needs_kept=True,
        ),
        Operation("restore_budget", "restore_cold within a budget of 256 MiB", ("read",), ("read", "to_device"), ("get",), needs_kept=True),
        Operation(
            "restore_warm",
            "restore, files cached, verified",
            ("read_cached_verified",),
            ("read_cached_verified", "to_device"),
            needs_kept=True,
        ),
        Operation(
            "restore_warm_unverified",
            "restore, files cached, not verified",
            ("read_cached",),
            ("read_cached", "to_device"),
            needs_kept=True,
        ),
        Operation(
            "read_one",
            "the 1 MiB tensor, file not cached; on a disk the manifest already read, from a bucket it is read too",
            ("read_one",),
            ("read_one",),
            ("get_one",),
            needs_kept=True,
        ),
        Operation("small_tensors", "take and cold restore of many tensors of 1 KiB"),
        Operation("staging", "take to the null storage", (), ("to_host",), device_only=True, null_on_device=True),
        Operation("copy_device", "copy of the state on the device", (), ("copy_device",), device_only=True),
        Operation("record", "what recording adds to a take of 1 MiB: catalog and provenance", benchmark=CATALOG),
        Operation("search", "the slowest of four common queries, first 50 records", benchmark=CATALOG, needs_kept=True),
        Operation("search_any", "the slowest of all kinds of queries, first 50 records", benchmark=CATALOG, needs_kept=True),
        Operation("to_pandas", "a data frame of a tenth of the records", benchmark=CATALOG, needs_kept=True),
        Operation("diff", "two snapshots of many tensors, manifests cached", benchmark=CATALOG, needs_kept=True),
        Operation("diff_cold", "the same, manifests read from the disk", benchmark=CATALOG, needs_kept=True),
        Operation(
            "diff_stats", "statistics of two snapshots of which all has changed, cold", ("read",), benchmark=CATALOG, needs_kept=True
        ),
        Operation("scan", "a new catalog of many snapshots", benchmark=CATALOG, needs_kept=True),
        Operation("load_ext", "%load_ext expstate, after import torch", benchmark=NOTEBOOK, needs_kept=True),
        Operation("take_cell", "until the cell of %snapshot take ends, second take of the kernel", ("copy",), benchmark=NOTEBOOK),
        Operation("status", "%snapshot status of a model of which nothing has changed", ("digest",), benchmark=NOTEBOOK),
        Operation(
            "browse",
            "from %snapshot browse to rows of a tenth of the records, without the page; widgets not imported before",
            benchmark=NOTEBOOK,
            needs_kept=True,
        ),
        Operation("take_replicated", "take on 2 ranks of a state that both have", ("write",), benchmark=RANKS),
        Operation("take_sharded", "take on 2 ranks of a state in shards, as FSDP2 cuts it", ("write",), benchmark=RANKS),
        Operation("restore_sharded", "restore of such shards on 2 ranks, files not cached", ("read",), benchmark=RANKS, needs_kept=True),
        Operation("reshard_2_to_1", "restore of shards of 2 ranks on 1, files not cached", ("read",), benchmark=RANKS, needs_kept=True),
        Operation("reshard_1_to_2", "restore of shards of 1 rank on 2, files not cached", ("read",), benchmark=RANKS, needs_kept=True),
        Operation("merge_1024", "what many simulated ranks have written, merged into one manifest", benchmark=RANKS),
        Operation(
            "plan_1024",
            "restore on one rank of them: the manifest read and checked, planned, and 4 KiB read of each tensor",
            benchmark=RANKS,
            needs_kept=True,
        ),
        Operation("full", "the first take of a process", ("write",), ("write", "to_host"), benchmark=INCREMENTAL),
        Operation(
            "unchanged",
            "the second take of a state of which nothing has changed, beside the first of the same process",
            benchmark=INCREMENTAL,
            targets=(Target("times_as_fast", 3.5, at_least=True), Target("bytes_written", 2 * MIB)),
        ),
        Operation(
            "one_percent",
            "the same where small tensors have changed that make 1 % of the state, as adapters of low rank do",
            benchmark=INCREMENTAL,
            targets=(Target("of_full", 0.3), Target("of_state", 0.012)),
        ),
        Operation(
            "detect",
            "finding that nothing has changed, beside BLAKE3 of the same memory on all cores, or beside a copy on the accelerator, of "
            "which the bytes that are read and those that are written count",
            benchmark=INCREMENTAL,
            targets=(Target("of_blake3", 0.8, at_least=True), Target("of_device_copy", 0.5, at_least=True)),
        ),
        Operation(
            "stall",
            "until async_take returns, with a base, staging memory warm; beside a copy into warm memory, or on the accelerator",
            benchmark=INCREMENTAL,
            targets=(
                *(Target(f"of_device_copy{base}", 1.2) for base in ("", "_without_base")),
                *(Target(f"of_transfer{base}", 1.1) for base in ("", "_without_base")),
            ),
        ),
        Operation(
            "finetune_disk",
            "50 takes of a fine-tuning run of MiniLM, its backbone frozen: room on the disk, on the host",
            benchmark=INCREMENTAL,
            targets=(Target("of_needed", 1.1),),
        ),
        Operation(
            "autosave",
            "what autosave every 50 steps adds to a training of digits, on the host",
            benchmark=INCREMENTAL,
            targets=(Target("overhead", 0.03),),
        ),
    )
}


_RESTORES = ("restore_cold", "restore_warm_unverified")
_THREADS = ("1 thread", "2 threads", "4 threads")
_SETTINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "expstate": dict.fromkeys(OPERATIONS.keys() - {"copy_device"}, ("",)),
    "torch": {
        **dict.fromkeys(("take", "small_tensors"), ("crc", "no crc")),
        **dict.fromkeys((*_RESTORES, "read_one"), ("mmap",)),
    },
    "safetensors": {
        "take": ("",),
        **dict.fromkeys((*_RESTORES, "read_one", "small_tensors"), ("mmap", "pread")),
    },
    "dcp": {
        **dict.fromkeys(("take", "small_tensors"), _THREADS),
        **dict.fromkeys((*_RESTORES, "read_one", "async_stall"), ("",)),
        **dict.fromkeys(("take_replicated", "take_sharded"), _THREADS),
        **dict.fromkeys(("restore_sharded", "reshard_2_to_1", "reshard_1_to_2"), ("",)),
    },
    "torchsnapshot": dict.fromkeys(("take", *_RESTORES, "read_one", "async_stall", "small_tensors"), ("",)),
}
_STREAMED = {"to_host": ("1 stream", "2 streams"), "to_device": ("1 stream", "2 streams"), "copy_device": ("",), "read_one": ("1 thread",)}
_TRANSPORTS = ("obstore", "fsspec")
_REQUESTS = tuple(f"{transport} {count} requests" for transport in _TRANSPORTS for count in (4, 8, 16))
_ONE_REQUEST = tuple(f"{transport} 1 request" for transport in _TRANSPORTS)
# To read one tensor of a bucket some must fetch all: they do not take part.
_OBJECT_SETTINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "torch": dict.fromkeys(("take", "restore_cold"), ("",)),
    "safetensors": dict.fromkeys(("take", "restore_cold"), ("",)),
    "dcp": {"take": _THREADS, **dict.fromkeys(("restore_cold", "read_one"), ("",))},
    "torchsnapshot": dict.fromkeys(("take", "restore_cold", "read_one"), ("",)),
}


class Workload(msgspec.Struct, frozen=True):
    """What is worked on.

    Attributes
    ----------
    total_bytes, tensors : int
        Of the state that is moved; for the catalog, of the two snapshots that are compared by their statistics.
    small_tensors : int
        Tensors of ``small_tensors``; for the catalog, of each of the two snapshots that are compared by their digests; for notebooks, of
        the snapshot whose tree is opened; for ranks, of each that is simulated.
    device : str
        Where the state is.
    records, snapshots : int
        Records in the catalog that is searched, and snapshots that are scanned.
    ranks : int
        How many are simulated.
    """

    total_bytes: int
    tensors: int
    small_tensors: int
    device: str = "cpu"
    records: int = 0
    snapshots: int = 0
    ranks: int = 0


class Task(msgspec.Struct, frozen=True):
    """One step for one child process.

    Attributes
    ----------
    operation, system : str
        What to measure; beside the operations of the plan ``prepare`` takes a snapshot into ``kept``, and ``describe`` writes the digests
        of the state's tensors to the file ``expected``.
    setting : str
        The system's setting, such as a number of threads; empty where it has one only.
    component : str
        For the limits, which one; for expstate in a bucket, the transport.
    folder : str
        Empty folder for what the step writes, a path or a URL; so is ``kept``.
    """

    operation: str
    system: str
    workload: Workload
    folder: str
    kept: str = ""
    expected: str = ""
    component: str = ""
    setting: str = ""
    memory_budget_bytes: int | None = None


class Outcome(msgspec.Struct):
    """What a child measured, once.

    ``cached_bytes`` were still in the page cache when a cold operation began; ``parts`` are seconds, ``figures`` whatever else was counted.
    ``left_out`` says why nothing could be measured on this machine, ``error`` what has failed.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_extra_bytes: int = 0
    bytes: int = 0
    cached_bytes: int = 0
    parts: dict[str, float] = msgspec.field(default_factory=dict)
    figures: dict[str, float] = msgspec.field(default_factory=dict)
    left_out: str = ""
    error: str = ""


def operation_names(*, device: bool, benchmark: str = DISK) -> list[str]:
    """The operations of a benchmark, for a state on the host or on an accelerator.

    Examples
    --------
    >>> "staging" in operation_names(device=False), "staging" in operation_names(device=True)
    (False, True)
    >>> "search" in operation_names(device=False), "search" in operation_names(device=False, benchmark=CATALOG)
    (False, True)
    """
    if benchmark == OBJECTS:
        return [operation.name for operation in OPERATIONS.values() if operation.object_limits]
    found = [operation for operation in OPERATIONS.values() if operation.benchmark == benchmark]
    return [operation.name for operation in found if device or not operation.device_only]


def contenders(operation: str, system: str, *, device: bool, benchmark: str = DISK) -> list[tuple[str, str]]:
    """Pairs of component and setting in which a system takes part in an operation; none if it cannot.

    A system that never verifies is not compared with a verified restore from the page cache, where the digests cost as much as the reading.

    Examples
    --------
    >>> contenders("take", "limit", device=False)
    [('write', '1 thread'), ('write', '2 threads'), ('write', '4 threads')]
    >>> contenders("restore_warm", "torch", device=False)
    []
    >>> contenders("take", "expstate", device=False, benchmark=OBJECTS)
    [('obstore', ''), ('fsspec', '')]
    """
    if benchmark == OBJECTS:
        return _object_contenders(operation, system)
    if system != LIMIT:
        return [("", setting) for setting in _SETTINGS[system].get(operation, ())]
    described = OPERATIONS[operation]
    components = described.device_limits if device else described.limits
    return [(component, setting) for component in components for setting in _STREAMED.get(component, _THREADS)]


def _object_contenders(operation: str, system: str) -> list[tuple[str, str]]:
    if system == "expstate":
        return [(transport, "") for transport in _TRANSPORTS]
    if system != LIMIT:
        return [("", setting) for setting in _OBJECT_SETTINGS[system].get(operation, ())]
    components = OPERATIONS[operation].object_limits
    return [(component, setting) for component in components for setting in (_ONE_REQUEST if component == "get_one" else _REQUESTS)]
