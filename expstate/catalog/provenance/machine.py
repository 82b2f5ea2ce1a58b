"""Who and what a take ran on: user, host, Python, packages, PyTorch, accelerators, and a few variables. Nothing is initialised or started.

What cannot change in a process is looked up once.
"""

from __future__ import annotations

import contextlib
import functools
import getpass
import importlib.metadata
import os
import platform
import re
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from expstate.catalog.provenance.gatherers import Seen

PREFIXES = ("CUDA_", "OMP_")
VARIABLES = frozenset(
    (
        "CUBLAS_WORKSPACE_CONFIG",
        "HIP_VISIBLE_DEVICES",
        "MKL_NUM_THREADS",
        "NVIDIA_TF32_OVERRIDE",
        "PYTHONHASHSEED",
        "PYTORCH_ALLOC_CONF",
        "PYTORCH_CUDA_ALLOC_CONF",
        "SLURM_JOB_ID",
        "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    )
)
_LONGEST_VALUE = 1000
_FOLDER = re.compile(r"([A-Za-z0-9][\w.]*)-(\d[^-]*)(?:-py[\d.]+)?\.(?:dist|egg)-info")
_NVIDIA = Path("/proc/driver/nvidia/gpus")


def current_user() -> str | None:
    """The user of this process, as records name it."""
    try:
        return getpass.getuser() or None
    except (ImportError, KeyError, OSError):
        return None


def user(seen: Seen) -> str | None:  # noqa: ARG001 - a gatherer
    """The user's name."""
    return current_user()


def host(seen: Seen) -> str:  # noqa: ARG001 - a gatherer
    """The name of this machine."""
    return socket.gethostname()


def python(seen: Seen) -> dict[str, str]:  # noqa: ARG001 - a gatherer
    """Version, implementation and platform of this Python."""
    system = os.uname()
    words = [system.sysname, system.release, system.machine]
    with contextlib.suppress(ValueError, OSError):  # another C library
        words.append((os.confstr("CS_GNU_LIBC_VERSION") or "").replace(" ", ""))
    return {
        "version": platform.python_version(),
        "implementation": platform.python_implementation(),
        "platform": "-".join(filter(None, words)),
    }


def packages(seen: Seen) -> dict[str, str]:  # noqa: ARG001 - a gatherer
    """Versions of all installed distributions by name; looked up again when something was installed."""
    places = []
    for folder in sys.path:
        try:
            places.append((folder, Path(folder).stat().st_mtime_ns))
        except OSError:
            places.append((folder, 0))
    return _packages(tuple(places))


@functools.lru_cache(1)
def _packages(places: tuple[tuple[str, int], ...]) -> dict[str, str]:  # noqa: ARG001 - what the answer depends on
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name, version = _name_and_version(distribution)
        if name:
            found.setdefault(re.sub(r"[-_.]+", "-", name).lower(), version or "")
    return dict(sorted(found.items()))


def _name_and_version(distribution: importlib.metadata.Distribution) -> tuple[str, str]:
    # The name of the folder says both; to parse the metadata takes ten times as long.
    folder = getattr(getattr(distribution, "_path", None), "name", "")
    match = _FOLDER.fullmatch(folder if isinstance(folder, str) else "")
    if match is not None:
        return match[1], match[2]
    metadata = distribution.metadata
    return str(metadata["Name"] or ""), str(metadata["Version"] or "")


def versions_of_torch(seen: Seen) -> dict[str, Any]:  # noqa: ARG001 - a gatherer
    """Version of PyTorch, and the accelerators; no context is made on one that was not used yet."""
    found: dict[str, Any] = {"version": str(torch.__version__), "cuda": torch.version.cuda, "hip": torch.version.hip}
    found |= _accelerators(_kind_in_use())
    return {name: value for name, value in found.items() if value}


def _kind_in_use() -> str | None:
    """The kind of accelerator that this process has used."""
    try:
        kind = torch.accelerator.current_accelerator()
    except RuntimeError:  # what PyTorch 2.6 says where there is none
        return None
    module = None if kind is None else getattr(torch, kind.type, None)
    is_initialized = getattr(module, "is_initialized", None)
    return kind.type if kind is not None and is_initialized is not None and is_initialized() else None


@functools.lru_cache(2)
def _accelerators(kind: str | None) -> dict[str, Any]:
    if kind is None:
        names = _from_driver() if torch.version.cuda else []
    else:
        module = getattr(torch, kind)
        names = [str(module.get_device_name(index)) for index in range(module.device_count())]
    return {"accelerators": sorted(set(names)), "accelerator_count": len(names)}


def _from_driver() -> list[str]:
    """The names of NVIDIA's accelerators as the driver's own files have them; they may be more than this process can see."""
    texts = [path.read_text(errors="replace") for path in sorted(_NVIDIA.glob("*/information"))]
    matches = [re.search(r"^Model:\s*(.+)$", text, re.MULTILINE) for text in texts]
    return [match[1].strip() if match else "unknown" for match in matches]


def environment(seen: Seen) -> dict[str, str]:  # noqa: ARG001 - a gatherer
    """Variables that change what a training does; no others."""
    chosen = {name: value for name, value in os.environ.items() if name in VARIABLES or name.startswith(PREFIXES)}
    return {name: value[:_LONGEST_VALUE] for name, value in sorted(chosen.items())}
