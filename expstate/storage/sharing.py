"""One file in two folders of a local disk: a second name for it, or a copy that shares its blocks, without its bytes being moved.

Gets open folders and names in them, which ``local`` has opened without a step through a link.
"""

from __future__ import annotations

import errno
import os
import stat

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None  # type: ignore[assignment]

_READ_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_FICLONE = 0x40049409  # <linux/fs.h>
_NOT_HERE = {
    errno.EPERM,  # no links on this file system, or of this file for this user
    errno.EXDEV,
    errno.EMLINK,
    errno.EOPNOTSUPP,
    errno.ENOTSUP,
    errno.ENOSYS,
    errno.EINVAL,
    errno.ENOENT,
}
_NO_CLONES = _NOT_HERE | {errno.ENOTTY, errno.EBADF, errno.EISDIR, errno.ETXTBSY}


def share(source_folder: int, source: str, folder: int, name: str) -> bool:
    """Give a regular file of one open folder a name in another; False, and nothing left, if it is gone or the disk cannot.

    Raises
    ------
    FileExistsError
        If the name is taken.
    FileNotFoundError
        If the folder that it is to be in was removed.
    """
    try:
        os.link(source, name, src_dir_fd=source_folder, dst_dir_fd=folder, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
        return fcntl is not None and _clone(source_folder, source, folder, name)
    if not is_regular(folder, name):  # put in its place since the caller looked
        os.unlink(name, dir_fd=folder)
        return False
    return True


def is_regular(folder: int, name: str) -> bool:
    """Whether this is a regular file of an open folder, and neither a link nor anything else."""
    try:
        return stat.S_ISREG(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _clone(source_folder: int, source: str, folder: int, name: str) -> bool:
    """Make a new file of the same blocks, which the file system copies when one of both is written to; False where it cannot."""
    try:
        source_fd = os.open(source, _READ_FLAGS, dir_fd=source_folder)
    except OSError as error:
        if error.errno in {errno.ENOENT, errno.ELOOP, errno.EACCES}:
            return False
        raise
    try:
        fd = os.open(name, _CREATE_FLAGS, 0o444, dir_fd=folder)
        try:
            fcntl.ioctl(fd, _FICLONE, source_fd)
            os.fsync(fd)
        except BaseException as error:
            os.unlink(name, dir_fd=folder)
            if isinstance(error, OSError) and error.errno in _NO_CLONES:
                return False
            raise
        finally:
            os.close(fd)
    finally:
        os.close(source_fd)
    return True
