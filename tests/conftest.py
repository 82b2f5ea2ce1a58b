"""What every test gets: fixed seeds, settings of nobody's environment, and a reason where a test cannot run here."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import sys
from pathlib import Path

# Tests compare trainings bit by bit, also those of other processes: MKL is to round alike wherever its operands are. It reads this early.
os.environ.setdefault("MKL_CBWR", "COMPATIBLE")

import pytest
import torch

from tests.campaign import campaign, pytest_runtest_makereport  # noqa: F401 - what pytest finds here, every test has

try:
    import hypothesis
except ImportError:  # a machine that only runs the tests marked gpu
    pass
else:
    # No deadline: time depends on what else the machine does. CI looks at the same examples each time.
    hypothesis.settings.register_profile("local", deadline=None)
    hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
    hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")

# For formats that no test has, jsonschema, which nbformat needs, would build the grammar of URLs for five seconds in each test process.
sys.modules["rfc3987_syntax"] = None  # type: ignore[assignment]

# Before anything imports them: the tests of storages are shipped with the package, and helpers assert too; pytest explains their asserts as
# it does those of the tests.
pytest.register_assert_rewrite("expstate.testing", "tests.engine.crashes", "tests.engine.processes")

for _name in [name for name in os.environ if name.startswith("EXPSTATE_") and not name.startswith("EXPSTATE_TORTURE")]:
    del os.environ[_name]
# The user's own catalog is nobody's business here; tests of catalogs name theirs.
os.environ["EXPSTATE_CATALOG"] = "off"


_LARGE_PAGE = 2 * 1024 * 1024
_MADV_COLLAPSE = 25  # <linux/mman.h>, as of Linux 6.1


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Random numbers of a test do not depend on the tests before it."""
    random.seed(0)
    torch.manual_seed(0)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(0)


def pytest_collection_finish() -> None:
    """Leave what is there for good out of garbage collections: torch, its friends and thousands of tests cost each of them a second."""
    gc.collect()
    gc.freeze()
    _collapse_pages()


def _collapse_pages() -> None:
    """Have what is in memory in pages of 2 MiB, where Linux can: forks, of which there are thousands, then take a third of the time."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in maps.splitlines():
        span, access, _, _, inode, *name = line.split()
        if access == "rw-p" and inode == "0" and name in ([], ["[heap]"]):
            start, stop = (int(end, 16) for end in span.split("-"))
            for page in range(-(-start // _LARGE_PAGE) * _LARGE_PAGE, stop - _LARGE_PAGE + 1, _LARGE_PAGE):
                madvise(page, _LARGE_PAGE, _MADV_COLLAPSE)  # what is refused stays as it is


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs an accelerator or root where there is none; CI has root, so there nothing hides behind that."""
    accelerator = torch.accelerator.is_available()
    root = (hasattr(os, "geteuid") and os.geteuid() == 0) or bool(os.environ.get("CI"))
    for item in items:
        if not accelerator and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs an accelerator"))
        if not root and item.get_closest_marker("root"):
            item.add_marker(pytest.mark.skip(reason="needs root"))
