"""The kernel that the tests of the notebook drive is a real one, and tells the truth about it."""

from __future__ import annotations

import os
import time
from pathlib import Path

from .kernels import Kernel


def test_cell_gives_streams_result_and_displayed_objects(shared_kernel: Kernel) -> None:
    cell = shared_kernel.do("from IPython.display import HTML, display\nprint('said')\ndisplay(HTML('<b>shown</b>'))\n40 + 2")

    assert "said\n" == cell.stdout
    assert "42" == cell.result["text/plain"]
    assert "<b>shown</b>" == cell.displayed[0]["text/html"]
    assert 42 == shared_kernel.value("40 + 2")


def test_error_is_told_and_the_next_cell_runs(shared_kernel: Kernel) -> None:
    cell = shared_kernel.run("1 / 0")

    assert cell.error is not None
    assert ("ZeroDivisionError", "division by zero", "error") == (cell.error.name, cell.error.message, cell.status)
    assert "2" == shared_kernel.do("1 + 1").result["text/plain"]


def test_front_end_says_whether_someone_is_there(shared_kernel: Kernel) -> None:
    code = "get_ipython().kernel._allow_stdin"

    assert ["True", "False"] == [shared_kernel.do(code, allow_stdin=asks).result["text/plain"] for asks in (True, False)]


def test_completion_and_inspection_are_those_of_the_kernel(shared_kernel: Kernel) -> None:
    shared_kernel.do("import itertools")

    assert "itertools.chain" in [f"itertools.{name.removeprefix('itertools.')}" for name in shared_kernel.complete("itertools.ch")]
    assert "iterables" in shared_kernel.inspect("itertools.chain")


def test_interrupt_stops_a_cell_that_runs_and_restart_forgets(kernel: Kernel) -> None:
    running = kernel.start("import time\nmark = 1\nprint('begun', flush=True)\ntime.sleep(60)")
    kernel.until(lambda: "begun" in kernel.seen(running).stdout)
    begun = time.monotonic()

    kernel.interrupt()
    cell = kernel.wait(running)

    assert cell.error is not None
    assert "KeyboardInterrupt" == cell.error.name
    assert 60 > time.monotonic() - begun
    assert 1 == kernel.value("mark")

    before = kernel.pid
    kernel.restart()

    assert before != kernel.pid
    assert kernel.value("'mark' not in globals()")


def test_kernel_sees_nothing_of_the_user(kernel: Kernel, tmp_path: Path) -> None:
    kernel.do("import os, pathlib")

    assert str(kernel.folder) == kernel.value("os.getcwd()")
    assert str(tmp_path) in kernel.value("os.environ['EXPSTATE_CATALOG']")
    assert kernel.value("str(pathlib.Path.home())") != os.path.expanduser("~")  # noqa: PTH111 - the home of this process
