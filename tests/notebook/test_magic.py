"""``%snapshot`` in a real kernel: what is typed is done, what comes of it shows itself, and errors are one line."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .kernels import Cell, Kernel

SETUP = """
%reload_ext expstate
import torch
torch.manual_seed(0)
model = torch.nn.Linear(3, 2)
losses, lr, loss, right, total, epoch = [1.0], 0.1, 0.5, 9, 10, 3
"""
WEIGHTS = "model.weight.tolist()"
CHANGE = "with torch.no_grad():\n    model.weight.add_(1)\nlosses.append(2.0)\nlr = 7"


@pytest.fixture
def notebook(shared_kernel: Kernel, request: pytest.FixtureRequest) -> Kernel:
    """A kernel with the extension, something to take, and a project without snapshots."""
    shared_kernel.do(f"import os\nos.environ['EXPSTATE_PROJECT'] = {request.node.name!r}\n{SETUP}")
    return shared_kernel


def refused(cell: Cell) -> str:
    """The one line that a cell was refused with."""
    assert "error" == cell.status
    assert "Traceback" not in cell.text
    (line,) = [line for line in cell.text.splitlines() if "UsageError" in line]
    return line


def test_a_session_from_the_first_take_to_the_last_undo(notebook: Kernel) -> None:
    assert "(here are: model)" in refused(notebook.run("%snapshot take"))
    notebook.do(
        "p = %snapshot take model losses lr --metric loss --metric acc=right/total --step epoch --name first -t a -m 'a note' --alias best"
    )
    assert "PendingSnapshot" == notebook.value("type(p).__name__")
    before = notebook.value(WEIGHTS)
    notebook.do(CHANGE)
    changed = notebook.value(WEIGHTS)
    status = notebook.do("%snapshot status")
    assert "changed since: model, losses, lr" in status.text
    diff = notebook.do("%snapshot diff best model")
    assert "1 changed" in diff.text
    assert 5 == notebook.value("get_ipython().run_line_magic('snapshot', 'diff best model --top 5').top")
    restored = notebook.do("%snapshot restore best")
    assert "bound anew: lr" in restored.text
    assert (before, [1.0], 0.1) == (notebook.value(WEIGHTS), notebook.value("losses"), notebook.value("lr"))
    notebook.do("%snapshot undo")
    assert (changed, [1.0, 2.0], 7) == (notebook.value(WEIGHTS), notebook.value("losses"), notebook.value("lr"))
    notebook.do("%snapshot redo")
    assert before == notebook.value(WEIGHTS)

    record = json.loads(
        notebook.do("import json; print(json.dumps(" + "get_ipython().run_line_magic('snapshot', 'show best --json')))").stdout
    )
    assert ("first", 3, {"loss": 0.5, "acc": 0.9}, ["a"], "a note") == tuple(
        record[name] for name in ("name", "step", "metrics", "tags", "note")
    )


def test_results_are_objects_that_show_themselves(notebook: Kernel) -> None:
    notebook.do("%snapshot take model --name first --metric loss --wait")
    found = notebook.do("%snapshot list loss < 0.9 --sort loss -n 3")
    assert "<table" in found.html
    assert "first" in found.html
    assert 1 == notebook.value("len(get_ipython().run_line_magic('snapshot', 'list'))")
    for line in (
        "status",
        "log",
        "show first",
        "show first/model",
        "verify first",
        "check",
        "gc",
        "scan",
        "tag first good",
        "prune --keep-last 1",
    ):
        cell = notebook.do(f"%snapshot {line}")
        assert "<" in cell.html, line
        assert "" == cell.stdout, line
    assert not notebook.do("%snapshot status;").displayed


def test_every_verb_has_help(notebook: Kernel) -> None:
    assert "%snapshot help VERB" in notebook.do("%snapshot").text
    for verb in ("take", "restore", "diff", "undo", "guard", "delete", "metric"):
        text = notebook.do(f"%snapshot help {verb}").text
        assert f"usage: %snapshot {verb}" in text
        assert f"%snapshot {verb}" in text.partition("example:")[2]
        assert text == notebook.do(f"%snapshot {verb} --help").text
    assert "restore" in str(notebook.do("%snapshot?").payload)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "invalid choice"),
        ("help nonsense", "there is no verb 'nonsense'"),
        ("restore", "REF"),
        ("restore nosuch", "`%snapshot list` shows those that are there"),
        ("take modle", "'modle' stands for nothing"),
        ("take 1x", "no Python name"),
        ("take model --metric nosuch", "NameError"),
        ("take model --metric acc=1/0", "ZeroDivisionError"),
        ("take model --alias a/b", "alias"),
        ("use runs --option api_key=1", "secret"),
        ("undo", "nothing to undo"),
        ("list loss <", "at character"),
        ("guard model", "stands above a cell"),
        ("take model --before", "for a cell"),
    ],
)
def test_errors_are_one_line(notebook: Kernel, line: str, message: str) -> None:
    cell = notebook.run(f"%snapshot {line}")
    refused(cell)

    assert message in cell.text


def test_run_all_stops_at_an_error(notebook: Kernel) -> None:
    assert "error" == notebook.run("%snapshot restore nosuch\nreached = True").status
    assert notebook.value("'reached' not in globals()")


# Above a cell


def test_a_cell_is_run_and_then_taken_with_its_time(notebook: Kernel) -> None:
    notebook.do("%%snapshot take model lr --name after --wait\nlr = 5\nprint('trained')")

    assert 5 == notebook.value("get_ipython().run_line_magic('snapshot', 'read after lr/value').result.value")
    assert notebook.value("0 <= get_ipython().run_line_magic('snapshot', 'show after').result.record.params['cell_seconds'] < 60")


def test_a_cell_that_raises_is_not_taken(notebook: Kernel) -> None:
    cell = notebook.run("%%snapshot take model\nlr = 5\n1/0")

    assert "error" == cell.status
    assert "ZeroDivisionError" in cell.text
    assert "nothing was taken" in cell.text
    assert 0 == notebook.value("len(get_ipython().run_line_magic('snapshot', 'list'))")


def test_before_and_both_take_before_the_cell(notebook: Kernel) -> None:
    notebook.do("%%snapshot take lr --before --wait\nlr = 5")
    assert 0.1 == notebook.value("get_ipython().run_line_magic('snapshot', 'read latest lr/value').result.value")
    notebook.do("%%snapshot take lr --both --wait\nlr = 6")
    assert [6, 5] == notebook.value(
        "[get_ipython().run_line_magic('snapshot', f'read {ref} lr/value').result.value for ref in ('latest', 'latest~1')]"
    )


def test_a_guarded_cell_that_fails_leaves_everything_as_it_was(notebook: Kernel) -> None:
    before = notebook.value(WEIGHTS)
    cell = notebook.run(f"%%snapshot guard model losses lr\n{CHANGE}\nmodel = None\n1/0")

    assert "everything named was put back" in cell.text
    assert (before, [1.0], 0.1) == (notebook.value(WEIGHTS), notebook.value("losses"), notebook.value("lr"))
    notebook.do(f"%%snapshot guard model losses lr\n{CHANGE}")
    assert 7 == notebook.value("lr")


def test_a_guarded_cell_that_is_interrupted_leaves_everything_as_it_was(notebook: Kernel) -> None:
    before = notebook.value(WEIGHTS)
    started = notebook.start(f"%%snapshot guard model losses lr\n{CHANGE}\nprint('waiting', flush=True)\nimport time; time.sleep(60)")
    notebook.until(lambda: "waiting" in notebook.seen(started).stdout)
    notebook.interrupt()
    cell = notebook.wait(started)

    assert "error" == cell.status
    assert (before, [1.0], 0.1) == (notebook.value(WEIGHTS), notebook.value("losses"), notebook.value("lr"))


@pytest.mark.parametrize("form", ["%snapshot take big --wait", "%%snapshot take big --wait\nlr = 1"])
def test_a_take_that_is_interrupted_leaves_nothing(notebook: Kernel, form: str) -> None:
    notebook.do(
        "import time, pathlib\npathlib.Path('moving').unlink(missing_ok=True)\n"
        "from expstate.engine.take import Take\nmoved = Take._written\n"
        "def slowly(self, *given):\n    pathlib.Path('moving').touch()\n    time.sleep(0.1)\n    return moved(self, *given)\n"
        "big, Take._written = torch.zeros(80_000_000), slowly"
    )
    before = sorted(notebook.folder.glob("expstate-snapshots/*"))
    started = notebook.start(form)
    notebook.until((notebook.folder / "moving").exists)
    notebook.interrupt()
    cell = notebook.wait(started)
    after = notebook.do("Take._written = moved")

    assert cell.error is not None
    assert "KeyboardInterrupt" == cell.error.name
    assert before == sorted(path for path in notebook.folder.glob("expstate-snapshots/*") if path.name != ".gitignore" or path in before)
    assert "failed" not in after.text
    assert "all is well" in notebook.do("%snapshot check").html


def test_await_in_a_cell_is_refused_before_anything_runs(notebook: Kernel) -> None:
    cell = notebook.run("%%snapshot take model\nlr = 5\nimport asyncio\nawait asyncio.sleep(0)")

    assert "await" in refused(cell)
    assert 0.1 == notebook.value("lr")


def test_other_verbs_do_not_stand_above_a_cell(notebook: Kernel) -> None:
    cell = notebook.run("%%snapshot list\nlr = 5")

    assert "does not stand above a cell" in refused(cell)
    assert 0.1 == notebook.value("lr")


# The kernel


def test_nobody_at_the_kernel_means_that_the_last_take_is_committed(notebook: Kernel) -> None:
    notebook.do("p = %snapshot take model --to run", allow_stdin=False)

    assert "Snapshot" == notebook.value("type(p).__name__")
    assert (notebook.folder / "run" / "snapshot.json").exists()


def test_the_line_of_a_take_tells_what_became_of_it(notebook: Kernel) -> None:
    """In the cell that took, though that has ended long since."""
    cell = notebook.do("%snapshot take model losses --name first")
    assert re.match(r"(taking|took) first \([0-9a-f]{8}\) of model, losses, rng_state: ", cell.text)
    notebook.do("%snapshot wait")
    notebook.until(lambda: cell.text.startswith("took first ("))


def test_a_take_that_fails_is_told_after_the_next_cell(notebook: Kernel) -> None:
    notebook.do(
        "from expstate.engine.take import Take\nfrom expstate.errors import StorageError\nreally = Take.commit\n"
        "def fail(self): raise StorageError('the disk is gone')\nTake.commit = fail\np = %snapshot take model"
    )
    notebook.do("p.exception(); p._thread.join(); Take.commit = really")
    told = notebook.do("1")
    notebook.do("2")

    shown = told.stderr + "".join(message["content"].get("text", "") for message in notebook.messages if message["msg_type"] == "stream")
    assert "the disk is gone" in shown
    assert "the disk is gone" not in notebook.do("3").text


def test_what_a_killed_take_left_is_told_when_the_extension_is_loaded(start_kernel: Callable[..., Kernel], tmp_path: Path) -> None:
    work = tmp_path / "work"
    first = start_kernel(work=work)
    first.do(SETUP)
    started = first.start(
        "import os, signal\nfrom expstate import Snapshot, StateDict\n"
        "def die(_): os.kill(os.getpid(), signal.SIGKILL)\n"
        "Snapshot.take('expstate-snapshots/torn', {'s': StateDict(w=torch.zeros(100))}, progress=die)"
    )
    del started
    torn = work / "expstate-snapshots" / "torn"
    for _ in range(600):
        if torn.is_dir() and any(torn.glob(".attempt-*")) and not first.is_alive:
            break
        time.sleep(0.1)
    second = start_kernel(work=work)
    told = second.do("%load_ext expstate").stderr

    assert "1 take in" in told
    assert "did not come to an end" in told
    second.do("%snapshot gc expstate-snapshots -y")
    assert not list(torn.glob("*")) if torn.exists() else True


def test_registered_names_are_taken(notebook: Kernel) -> None:
    notebook.do("import expstate\nexpstate.register(model=model)\np = %snapshot take --wait")

    assert ("model", "rng_state") == notebook.value("p.keys()")
    assert notebook.value("expstate.lock().__enter__() in (True, None) and (expstate.lock().__exit__(None, None, None) is None)")


def test_the_extension_can_be_loaded_again_and_unloaded(notebook: Kernel) -> None:
    notebook.do("%reload_ext expstate")
    notebook.do("%snapshot take model --wait")
    notebook.do("%unload_ext expstate")

    assert "UsageError" in str(notebook.run("%snapshot status").text) or "not found" in notebook.run("%snapshot status").text
    gone = notebook.run("import expstate; expstate.register(model=model)")
    assert gone.error is not None
    assert "NotInNotebookError" == gone.error.name


def test_loading_imports_no_database_and_no_widgets(kernel: Kernel) -> None:
    kernel.do("import torch, sys; before = set(sys.modules)\n%load_ext expstate")

    assert [] == kernel.value(
        "sorted({name.partition('.')[0] for name in set(sys.modules) - before} & {'sqlalchemy', 'alembic', 'pandas', 'ipywidgets'})"
    )


def test_hostile_names_are_inert(notebook: Kernel) -> None:
    hostile = '"><img src=x onerror=alert(1)></script>'
    notebook.do(f"model_2 = model\np = %snapshot take model_2 --wait -m '{hostile}'")
    for line in ("list", "show latest", "status", "diff latest", "restore latest -n"):
        assert "<img" not in notebook.do(f"%snapshot {line}").html
