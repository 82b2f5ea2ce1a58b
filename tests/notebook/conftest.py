"""Kernels to try the notebook with; no test sees the user's own settings, catalog or folders.

``kernel`` is a fresh one for a test, ``start_kernel()`` makes further ones, ``shared_kernel`` is one for a module.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from expstate.storage import memory

from .kernels import Kernel, environment


@pytest.fixture
def nothing_kept() -> Iterator[None]:
    """What a test has kept for an undo in this process goes with it."""
    yield
    gc.collect()
    for name in tuple(memory._folders):
        memory.forget(name)


@pytest.fixture
def start_kernel(tmp_path: Path) -> Iterator[Callable[..., Kernel]]:
    """A function that starts a kernel; all that a test starts are of one user, but work in folders of their own."""
    with contextlib.ExitStack() as running:
        count = 0

        def start(*, env: dict[str, str] | None = None, work: Path | None = None) -> Kernel:
            nonlocal count
            count += 1
            (tmp_path / f"kernel-{count}").mkdir()
            user = environment(tmp_path / "user")
            return running.enter_context(Kernel(tmp_path / f"kernel-{count}", env=user | (env or {}), work=work))

        yield start


@pytest.fixture
def kernel(start_kernel: Callable[..., Kernel]) -> Kernel:
    """A fresh kernel, nothing imported."""
    return start_kernel()


@pytest.fixture(scope="module")
def shared_kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    """One kernel for the tests of a module."""
    with Kernel(tmp_path_factory.mktemp("shared-kernel")) as kernel:
        yield kernel
