"""On which kind of file system a file lies: SQLite's write-ahead log needs memory that all processes share, which networks do not give."""

from __future__ import annotations

import os
import re
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")
_OF_NETWORKS = {
    "9p",
    "acfs",
    "afs",
    "beegfs",
    "ceph",
    "cifs",
    "coda",
    "fuse",
    "gfs2",
    "glusterfs",
    "gpfs",
    "lustre",
    "ncpfs",
    "nfs",
    "nfs4",
    "ocfs2",
    "orangefs",
    "panfs",
    "prl_fs",
    "pvfs2",
    "smb3",
    "smbfs",
    "vboxsf",
    "virtiofs",
    "vmhgfs",
    "wekafs",
}
# These are layers over a disk of this machine.
_LOCAL_FUSE = {"fuse.fuse-overlayfs", "fuse.gocryptfs", "fuse.ntfs-3g", "fuse.bindfs", "fuse.mergerfs"}
_ESCAPED = re.compile(rb"\\([0-7]{3})")


def kind_of(path: Path) -> str:
    """The type of the file system that a path lies on, as the system calls it; empty where it does not say."""
    try:
        lines = _MOUNTS.read_bytes().splitlines()
    except OSError:
        return ""
    wanted = os.fsencode(os.path.realpath(path))
    found, length = "", -1
    for line in lines:
        fields, _, rest = line.partition(b" - ")
        parts = fields.split(b" ")
        if len(parts) > 4:  # noqa: PLR2004 - the mount point is the fifth field
            point = _ESCAPED.sub(lambda match: bytes([int(match[1], 8)]), parts[4])
            inside = wanted == point or wanted.startswith(point.rstrip(b"/") + b"/")
            if inside and len(point) >= length:  # of several at one point, the last hides the others
                found, length = rest.split(b" ")[0].decode("ascii", "replace"), len(point)
    return found


def is_network(path: Path) -> bool:
    """Whether other machines may have the file open too, or the file system is one that only seems to be a disk."""
    kind = kind_of(path)
    return kind in _OF_NETWORKS or (kind.startswith("fuse.") and kind not in _LOCAL_FUSE)
