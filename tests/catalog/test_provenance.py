"""Where a take came from is recorded completely, cheaply, and never at the take's expense."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Catalog, Snapshot, StateDict, settings
from expstate.catalog import provenance
from expstate.catalog.provenance import gatherers, gathering, machine
from expstate.catalog.provenance.gathering import Gathering
from expstate.errors import InvalidArgumentError, InvalidSettingError, ProvenanceWarning
from expstate.format import names
from expstate.storage import registry
from expstate.storage.local import LocalStorage

from .repositories import git

STATE = {"model": StateDict(x=1)}


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working folder of the test's own, whose project nobody has named."""
    monkeypatch.delenv("EXPSTATE_PROJECT")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def extra() -> Iterator[Callable[..., None]]:
    """``register``, undone after the test."""
    names: list[str] = []

    def register(name: str, gatherer: Callable[[provenance.Seen], Any]) -> None:
        names.append(name)
        provenance.register(name, gatherer)

    yield register
    for name in names:
        provenance.unregister(name)
    gathering._warned.clear()


def gathered(given: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """What a take records here."""
    with settings.override(**changes):
        work = Gathering(given or {})
        work.start()
        return work.result()


def test_a_take_records_where_it_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "0.1", "--token", "abcdef"])
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("SOMETHING_ELSE", "3")
    git("init", "-q", "-b", "main", ".")
    git("remote", "add", "origin", "https://me:secret@git.example.org/team/resnet.git")
    git("commit", "-q", "--allow-empty", "-m", "first")

    found = Snapshot.take(tmp_path / "run", STATE, replicated=["model/*"]).metadata.provenance

    assert ["replicated", "project", "user", "host", "git", "python", "packages", "torch", "run", "environment"] == list(found)
    assert "git.example.org/team/resnet" == found["project"]
    assert provenance.current_user() == found["user"]
    assert {
        "commit": git("rev-parse", "HEAD"),
        "branch": "main",
        "dirty": False,
        "remote": "https://git.example.org/team/resnet.git",
        "root": str(tmp_path / "work"),
    } == found["git"]
    assert sys.version.split()[0] == found["python"]["version"]
    assert found["packages"].keys() >= {"torch", "typing-extensions", "expstate"}
    assert str(torch.__version__) == found["torch"]["version"]
    assert {"argv": ["train.py", "--lr", "0.1", "--token", provenance.redact.hashed("abcdef")]} == found["run"]
    assert "2" == found["environment"]["OMP_NUM_THREADS"]
    assert "SOMETHING_ELSE" not in found["environment"]


def test_versions_of_packages_are_those_that_python_says() -> None:
    from importlib.metadata import version

    packages = gathered()["packages"]

    assert {
        name: version(name) for name in ("torch", "sqlalchemy", "pytest-xdist", "typing-extensions", "expstate")
    }.items() <= packages.items()


def test_packages_are_looked_up_again_when_something_was_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    before = gathered()["packages"]
    (tmp_path / "new_thing-1.5.dist-info").mkdir()
    (tmp_path / "unversioned.egg-info").mkdir()
    (tmp_path / "unversioned.egg-info" / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: Unversioned\nVersion: 3\n")

    assert before | {"new-thing": "1.5", "unversioned": "3"} == gathered()["packages"]


def test_minimal_keeps_the_little_that_is_needed_to_find_the_code() -> None:
    git("init", "-q", ".")
    git("commit", "-q", "--allow-empty", "-m", "first")

    assert {
        "replicated": ["a"],
        "project": str(Path.cwd()),
        "git": {"commit": git("rev-parse", "HEAD"), "dirty": False},
        "python": {"version": sys.version.split()[0]},
        "torch": {"version": str(torch.__version__)},
    } == gathered({"replicated": ["a"]}, provenance="minimal")


def test_off_gathers_nothing_and_a_project_that_was_typed_is_still_recorded() -> None:
    assert {} == gathered(provenance="off")
    assert {"project": "resnet"} == gathered(provenance="off", project="resnet")


@pytest.mark.parametrize("level", ["full", "minimal", "off"])
def test_the_record_of_a_take_has_project_and_user_whatever_the_level(tmp_path: Path, catalog: Catalog, level: str) -> None:
    with settings.override(provenance=level):
        taken = Snapshot.take(tmp_path / "run", STATE, catalog=catalog)
    (record,) = catalog.search(project="*")

    assert (str(Path.cwd()), provenance.current_user()) == (record.project, record.user)
    assert ("user" in taken.metadata.provenance) == (level == "full")


def test_a_search_in_the_folder_of_a_take_finds_it_and_one_elsewhere_does_not(
    tmp_path: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = Snapshot.take(tmp_path / "run", STATE, catalog=catalog)

    assert [taken.id] == [record.id for record in catalog.search()]
    monkeypatch.chdir(tmp_path)
    assert [] == list(catalog.search())


def test_a_setting_that_cannot_be_read_stops_the_take_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPSTATE_PROVENANCE", "some")
    with pytest.raises(InvalidSettingError, match="provenance"):
        Snapshot.take(tmp_path / "run", STATE, catalog=False)

    assert not (tmp_path / "run").exists()


def test_no_project_stands_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cleaning up would reach all of them."""
    monkeypatch.setenv("EXPSTATE_PROJECT", "*")
    with pytest.raises(InvalidSettingError, match="one project"):
        Snapshot.take(tmp_path / "run", STATE, catalog=False)
    with pytest.raises(InvalidSettingError, match="one project"):
        provenance.current_project()


def test_the_catalog_gets_urls_without_secrets_from_a_storage_that_is_careless_too(
    tmp_path: Path, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = LocalStorage(str(tmp_path / "run"))
    storage.url = "careless://me:secret@bucket/run?sig=secret"
    registry.register("careless", lambda rest, options: storage)
    started, go_on = threading.Event(), threading.Event()
    create = storage.create

    def wait_and_create(name: str, data: Any, *, token: str) -> None:
        if name == names.MANIFEST:
            started.set()
            go_on.wait(60)
        create(name, data, token=token)

    monkeypatch.setattr(storage, "create", wait_and_create)
    pending = Snapshot.async_take("careless://bucket/run", STATE, catalog=catalog)
    assert started.wait(60)
    meanwhile = catalog[pending.id]
    go_on.set()
    pending.wait()

    assert ("pending", "careless://bucket/run") == (meanwhile.status, meanwhile.url)
    assert ("present", "careless://bucket/run") == (catalog[pending.id].status, catalog[pending.id].url)


# Gatherers


def test_users_register_gatherers_of_their_own(extra: Callable[..., None]) -> None:
    extra("cluster", lambda seen: {"folder": seen.folder, "queue": {3}, "odd": "a\udce9", "password": "abcdef"})

    assert {"folder": str(Path.cwd()), "queue": [3], "odd": "a\\udce9", "password": provenance.redact.hashed("abcdef")} == gathered()[
        "cluster"
    ]
    assert "cluster" not in gathered(provenance="minimal")


def test_a_gatherer_that_gives_nothing_leaves_no_trace(extra: Callable[..., None]) -> None:
    extra("cluster", lambda seen: None)

    assert "cluster" not in gathered()


def test_a_gatherer_that_fails_leaves_its_part_out_and_is_told_of_once(extra: Callable[..., None], tmp_path: Path) -> None:
    def fail(seen: provenance.Seen) -> None:
        msg = "something secret"
        raise ValueError(msg)

    extra("cluster", fail)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        first, second = gathered(), gathered()

    assert "cluster" not in first.keys() | second.keys()
    assert "python" in first
    assert ["the gatherer 'cluster' failed with ValueError: its part of the provenance is left out"] == [
        str(item.message) for item in warned
    ]
    assert [ProvenanceWarning] == [item.category for item in warned]


def test_a_take_does_not_fail_where_warnings_are_errors(extra: Callable[..., None], tmp_path: Path) -> None:
    extra("cluster", lambda seen: 1 / 0)

    assert "cluster" not in Snapshot.take(tmp_path / "run", STATE).metadata.provenance


@pytest.mark.parametrize("name", ["project", "replicated", "two words", "", 3])
def test_names_of_gatherers_are_checked(name: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="name is an identifier"):
        provenance.register(name, lambda seen: None)
    with pytest.raises(InvalidArgumentError, match="function of one argument"):
        provenance.register("cluster", None)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(gatherers.OWN))
def test_each_gatherer_may_fail_without_harm_to_the_others(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(seen: provenance.Seen) -> None:
        raise RuntimeError

    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    git("init", "-q", ".")
    monkeypatch.setitem(gatherers.OWN, name, fail)
    found = Snapshot.take(tmp_path / "run", STATE).metadata.provenance

    assert gatherers.OWN.keys() - {name} == found.keys()


def test_a_gatherer_that_hangs_delays_a_take_for_a_limited_time(extra: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on by itself; nothing waits for it."""
    monkeypatch.setattr(gathering, "SECONDS", 0.2)
    go_on, ended = threading.Event(), threading.Event()

    def hang(seen: provenance.Seen) -> str:
        go_on.wait(60)
        ended.set()
        return "too late"

    extra("cluster", hang)
    found = gathered()
    assert "cluster" not in found
    assert not ended.is_set()
    go_on.set()
    assert ended.wait(60)
    assert "cluster" not in found


def test_a_gatherer_that_hangs_does_not_keep_the_interpreter_from_ending(tmp_path: Path) -> None:
    script = f"""
import threading
from expstate import Snapshot, StateDict
from expstate.catalog import provenance
from expstate.catalog.provenance import gathering
gathering.SECONDS = 0.2
provenance.register("cluster", lambda seen: threading.Event().wait())
Snapshot.take({str(tmp_path / "run")!r}, {{"a": StateDict(x=1)}})
"""
    ended = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False, timeout=60)

    assert (0, "") == (ended.returncode, ended.stderr)
    assert "cluster" not in Snapshot(tmp_path / "run").metadata.provenance
    assert "user" in Snapshot(tmp_path / "run").metadata.provenance


def test_a_take_that_fails_leaves_no_thread(tmp_path: Path) -> None:
    Snapshot.take(tmp_path / "run", STATE)
    with pytest.raises(FileExistsError):
        Snapshot.take(tmp_path / "run", STATE)
    for thread in threading.enumerate():
        if thread.name == "expstate-provenance":
            thread.join(60)

    assert [] == [thread.name for thread in threading.enumerate() if thread.name == "expstate-provenance"]


# Odd places


def test_a_take_in_a_folder_that_was_removed_is_of_an_unknown_project(tmp_path: Path, catalog: Catalog) -> None:
    (tmp_path / "gone").mkdir()
    os.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    try:
        taken = Snapshot.take(tmp_path / "run", STATE, catalog=catalog)
        found = [record.id for record in catalog.search()]
    finally:
        os.chdir(tmp_path / "work")

    assert "unknown" == taken.metadata.provenance["project"]
    assert [taken.id] == found


def test_a_path_that_is_no_text_is_recorded_in_a_form_that_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, catalog: Catalog) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9\x1b[31m")
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", [str(folder / "train.py")])
    monkeypatch.setenv("OMP_PLACES", os.fsdecode(b"\xff"))
    taken = Snapshot.take(tmp_path / "run", STATE, catalog=catalog)

    assert f"{tmp_path}/caf\\udce9%1B[31m" == taken.metadata.provenance["project"]
    assert [f"{tmp_path}/caf\\udce9\x1b[31m/train.py"] == taken.metadata.provenance["run"]["argv"]
    assert [taken.id] == [record.id for record in catalog.search()]


def test_a_user_without_a_name_is_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that runs under a number."""
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])

    assert provenance.current_user() is None
    assert "user" not in gathered()


def test_long_command_lines_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *(f"data/{number:010}" for number in range(5000))])
    argv = gathered()["run"]["argv"]

    assert ["train.py", "data/0000000000"] == argv[:2]
    assert f"... {5001 - len(argv) + 1} more" == argv[-1]
    assert sum(map(len, argv)) < 20_000


def test_long_values_of_variables_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_PATH", "x" * 5000)

    assert "x" * 1000 == gathered()["environment"]["CUDA_PATH"]


# Accelerators


def test_no_accelerator_is_initialised() -> None:
    """In a process of its own, which has not used one."""
    code = (
        "import torch\nfrom expstate.catalog.provenance.gathering import Gathering\n"
        "work = Gathering({})\nwork.start()\nassert work.result()['torch']['version'] == torch.__version__\n"
        "print(torch.cuda.is_initialized(), torch.cuda._is_in_bad_fork())"
    )
    answer = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert "False False\n" == answer.stdout


def test_accelerators_that_were_not_used_are_known_by_the_files_of_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, model in enumerate(("NVIDIA H200", "NVIDIA H200", None)):
        (tmp_path / f"0000:0{number}:00.0").mkdir()
        (tmp_path / f"0000:0{number}:00.0" / "information").write_text(f"Model: \t\t {model}\nIRQ: 7\n" if model else "")
    monkeypatch.setattr(machine, "_NVIDIA", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    machine._accelerators.cache_clear()
    found = gathered()["torch"]
    machine._accelerators.cache_clear()

    assert {"version": str(torch.__version__), "cuda": "13.0", "accelerators": ["NVIDIA H200", "unknown"], "accelerator_count": 3} == found


@pytest.mark.gpu
def test_an_accelerator_that_is_in_use_is_named() -> None:
    torch.ones(1, device=torch.accelerator.current_accelerator())
    found = gathered()["torch"]

    assert torch.accelerator.device_count() == found["accelerator_count"]
    assert torch.cuda.get_device_name(0) in found["accelerators"]


@pytest.mark.gpu
def test_an_accelerator_has_one_name_whether_it_is_in_use_or_not() -> None:
    code = (
        "import torch\nfrom expstate.catalog.provenance.machine import versions_of_torch as look\n"
        "before = look(None)\nassert not torch.cuda.is_initialized()\ntorch.ones(1, device='cuda')\n"
        "assert before == look(None), (before, look(None))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Notebooks: IPython is not needed for expstate, so that what it offers is put in its place here.


class Kernel:
    def __init__(self, code: str) -> None:
        self._code = code

    def get_parent(self) -> dict[str, Any]:
        return {"metadata": {"cellId": "cell-7"}, "content": {"code": self._code}}


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make this process look like one in which a cell runs."""

    def become(code: str, **names: Any) -> None:
        shell = types.SimpleNamespace(execution_count=12, kernel=Kernel(code), user_ns=names)
        module = types.ModuleType("IPython")
        module.get_ipython = lambda: shell  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "IPython", module)

    return become


def test_a_notebook_is_recorded_with_its_cell(notebook: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    notebook("Snapshot.take(path, state)")
    monkeypatch.setenv("JPY_SESSION_NAME", "/home/me/train.ipynb")

    assert {
        "notebook": "/home/me/train.ipynb",
        "cell": "cell-7",
        "execution_count": 12,
        "source": "Snapshot.take(path, state)",
    } == Snapshot.take(tmp_path / "run", STATE).metadata.provenance["run"]


def test_the_source_of_a_cell_is_left_out_on_demand(notebook: Callable[..., None]) -> None:
    notebook("Snapshot.take(path, state)", __vsc_ipynb_file__="/home/me/vs.ipynb")

    assert {"notebook": "/home/me/vs.ipynb", "cell": "cell-7", "execution_count": 12} == gathered(provenance_source=False)["run"]


def test_a_cell_with_a_secret_is_recorded_by_its_hash_and_long_ones_are_cut(notebook: Callable[..., None]) -> None:
    code = 'client = Client(api_key="abcdef")'
    notebook(code)
    assert provenance.redact.hashed(code) == gathered()["run"]["source"]
    notebook("x = 1\n" * 100_000)
    assert 64 * 1024 == len(gathered()["run"]["source"])
    filling = "x = 1\n" * (64 * 1024 // 6 - 3)
    notebook(filling + code)  # the cut goes through the secret
    assert provenance.redact.hashed(filling + code) == gathered()["run"]["source"]


def test_what_is_seen_is_that_of_the_moment_when_the_take_began(notebook: Callable[..., None], tmp_path: Path) -> None:
    notebook("first")
    work = Gathering({})
    work.start()
    notebook("second")
    os.chdir(tmp_path)

    assert ("first", str(tmp_path / "work")) == (work.result()["run"]["source"], work.result()["project"])


@pytest.mark.parametrize("shell", [None, types.SimpleNamespace(), types.SimpleNamespace(kernel=None, user_ns={}, execution_count=1)])
def test_an_ipython_that_says_little_is_no_trouble(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))

    assert "python" in gathered()


def test_ipython_at_a_terminal_is_recorded_with_its_command_line_and_input(monkeypatch: pytest.MonkeyPatch) -> None:
    history = types.SimpleNamespace(input_hist_raw=["", "a = 1", "take()"])
    shell = types.SimpleNamespace(execution_count=2, user_ns={}, history_manager=history)
    monkeypatch.setitem(sys.modules, "IPython", types.SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(sys, "argv", ["ipython"])
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)

    assert {"argv": ["ipython"], "execution_count": 2, "source": "take()"} == gathered()["run"]


# Takes in the background, and at the end of the interpreter


def test_a_take_in_the_background_is_recorded_as_well(tmp_path: Path) -> None:
    taken = Snapshot.async_take(tmp_path / "run", STATE).wait()

    assert str(tmp_path / "work") == taken.metadata.provenance["project"]
    assert "packages" in taken.metadata.provenance


def test_where_no_thread_can_be_started_it_is_gathered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        msg = "can't start new thread at interpreter shutdown"
        raise RuntimeError(msg)

    monkeypatch.setattr(threading.Thread, "start", refuse)

    assert "packages" in gathered()


def test_a_take_at_the_end_of_the_interpreter_knows_where_it_came_from(tmp_path: Path) -> None:
    code = (
        "import atexit, sys\nfrom expstate import Snapshot, StateDict\n"
        f"atexit.register(lambda: Snapshot.take({str(tmp_path / 'run')!r}, {{'a': StateDict(x=1)}}))"
    )
    answer = subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True, text=True)

    assert "" == answer.stderr
    assert {"argv": ["-c"]} == Snapshot(tmp_path / "run").metadata.provenance["run"]


# Copies without


def test_a_copy_without_provenance_is_the_same_snapshot_and_tells_nothing(tmp_path: Path) -> None:
    first = Snapshot.take(tmp_path / "first", STATE)
    second = Snapshot.take(
        tmp_path / "second", {"model": StateDict(x=torch.arange(5), y=None)}, note="mine", metrics={"loss": float("nan")}
    )
    copied = second.copy(tmp_path / "copy", provenance=False)

    assert {} == copied.metadata.provenance
    assert str(tmp_path / "work").encode() not in (tmp_path / "copy" / "snapshot.json").read_bytes()
    assert (second.id, first.id) == (copied.id, copied.manifest.parent)
    assert second.metadata.digest != copied.metadata.digest
    assert second.manifest.entries == copied.manifest.entries
    assert second.manifest.metadata == copied.manifest.metadata
    assert copied.verify().ok
    assert torch.equal(torch.arange(5), copied.read_object("model/x"))


def test_a_copy_is_the_same_bytes_unless_something_else_is_asked_for(tmp_path: Path) -> None:
    Snapshot.take(tmp_path / "first", STATE).copy(tmp_path / "copy")

    assert (tmp_path / "first" / "snapshot.json").read_bytes() == (tmp_path / "copy" / "snapshot.json").read_bytes()
    assert json.loads((tmp_path / "copy" / "snapshot.json").read_bytes())["provenance"]["project"] == str(tmp_path / "work")
