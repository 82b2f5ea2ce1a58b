"""What throws data away shows it first, does it when told to, and names the command that does."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expstate import Catalog, Record, Snapshot
from expstate.catalog import removal
from expstate.commands import VERBS, build_parser
from expstate.commands.verb import command_line
from expstate.errors import StorageError

from .conftest import Done, Project

Run = Callable[[str], Done]


def contents(project: Project) -> dict[str, bytes]:
    """Every file of the snapshots."""
    return {str(path): path.read_bytes() for epoch in range(1, 5) for path in sorted(project.path(epoch).glob("*"))}


@pytest.fixture
def leftovers(project: Project) -> Path:
    """What a take has left whose process is gone."""
    folder = project.folder / "epoch-5"
    pid = os.fork()
    if pid == 0:
        from expstate.engine.attempt import Attempt
        from expstate.storage.local import LocalStorage

        Attempt(LocalStorage(str(folder)), "0123456789abcdef" * 2, "take").begin(overwrite=False)
        (folder / "model-00001-01234567.safetensors").write_bytes(b"half")
        os._exit(0)
    os.waitpid(pid, 0)
    return folder


@pytest.mark.parametrize("line", ["delete latest epoch-2", "prune --keep-last 1", "delete latest --json", "prune --keep-last 1 --json"])
def test_nothing_is_touched_without_yes(project: Project, run: Run, line: str) -> None:
    before, records = contents(project), list(project.catalog.search())
    done = run(line)

    assert (0, "") == (done.status, done.err)
    assert before == contents(project)
    assert records == list(project.catalog.search())
    assert "--yes" in done.out


def test_the_command_that_is_named_does_what_was_shown(project: Project, run: Run) -> None:
    """By id: latest is another one when the newest is gone."""
    shown = run("delete latest latest~2")
    assert "would delete 2 snapshots" in shown.out
    assert "epoch-4" in shown.out
    assert "epoch-2" in shown.out
    command = shown.out.splitlines()[-1].strip()
    done = run(command.removeprefix("expstate "))

    assert (0, "") == (done.status, done.err)
    assert "deleted 2 snapshots" in done.out
    assert [3, 1] == [record.step for record in project.catalog.search()]
    assert [True, False, True, False] == [project.path(epoch).exists() for epoch in range(1, 5)]


def test_prune_shows_why_each_stays_and_then_does_it(project: Project, run: Run) -> None:
    shown = run("prune --keep-best accuracy:max:1")
    lines = {line.split()[0]: line for line in shown.out.splitlines() if line.startswith("epoch-")}

    assert "stays" in lines["epoch-1"]
    assert "alias 'best'" in lines["epoch-3"]
    assert ["epoch-2", "epoch-4"] == sorted(name for name, line in lines.items() if "would go" in line)
    done = run(shown.out.splitlines()[-1].strip().removeprefix("expstate "))
    assert "deleted 2 snapshots" in done.out
    assert [3, 1] == [record.step for record in project.catalog.search()]


def test_prune_may_take_what_is_tagged_and_aliased(project: Project, run: Run) -> None:
    assert "would delete 3" in run("prune --keep-last 1 --tagged --force").out
    assert "would delete 2" in run("prune --keep-last 1 --force").out


def test_what_is_protected_is_refused_in_the_dry_run_already(project: Project, run: Run) -> None:
    for line in ("rm best", "rm best --yes"):
        done = run(line)
        assert 1 == done.status
        assert "has the alias 'best'" in done.err
        assert "--force" in done.err
    assert project.path(3).exists()
    assert 0 == run("rm best --yes --force").status
    assert not project.path(3).exists()


def test_gc_shows_and_then_removes_what_the_dead_left(project: Project, run: Run, leftovers: Path) -> None:
    shown = run("gc")
    assert 0 == shown.status
    assert str(leftovers) in shown.out
    assert (leftovers / "model-00001-01234567.safetensors").exists()
    (found,) = run(f"gc {shlex.quote(str(project.folder))} --json").json["report"]["removed"]
    assert ("take", "01234567") == (found["action"], found["attempt"])

    assert "removed 2 files" in run("gc --yes").out
    assert not leftovers.exists()
    assert 4 == len(list(project.folder.glob("epoch-*/snapshot.json")))


def test_gc_of_a_folder_needs_no_catalog(project: Project, run: Run, leftovers: Path) -> None:
    done = run(f"gc {shlex.quote(str(project.folder))} --catalog off --yes")

    assert (0, "") == (done.status, done.err)
    assert not leftovers.exists()


def test_other_projects_are_left_alone_unless_they_are_named(project: Project, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    found = project.catalog["epoch-4"].id
    monkeypatch.setenv("EXPSTATE_PROJECT", "other")
    done = run(f"delete {found} --yes")
    assert 1 == done.status
    assert "--project 'digits'" in done.err
    assert "would delete 0" in run("prune --keep-last 1").out

    assert 0 == run(f"delete {found} --yes --project digits").status
    assert not project.path(4).exists()


def test_what_was_deleted_before_an_error_is_told(project: Project, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    delete = Catalog.delete

    def failing(self: Catalog, ref: str, **options: object) -> object:
        if not options.get("dry_run") and not project.path(4).exists():
            msg = "the disk is gone"
            raise StorageError(msg)
        return delete(self, ref, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Catalog, "delete", failing)
    done = run("delete epoch-4 epoch-2 --yes")

    assert 1 == done.status
    assert "the disk is gone (1 snapshot of 2 were deleted before it: epoch-4" in done.err
    assert [False, True] == [project.path(4).exists(), project.path(2).exists()]


def test_a_prune_that_leaves_something_is_status_1(project: Project, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are gone, and what stays is shown with the reason."""
    remove = removal.remove

    def failing(catalog: Catalog, record: Record, **options: bool) -> object:
        if record.step == 2:
            msg = "the disk is read-only"
            raise StorageError(msg)
        return remove(catalog, record, **options)

    monkeypatch.setattr(removal, "remove", failing)
    assert 0 == run("prune --keep-best accuracy:max:1").status
    done = run("prune --keep-best accuracy:max:1 --yes")

    assert 1 == done.status
    assert "left alone: the disk is read-only" in done.out
    assert "deleted 1 snapshot " in done.out
    assert [True, True, True, False] == [project.path(epoch).exists() for epoch in range(1, 5)]


def test_removals_as_json_tell_what_was_done(project: Project, run: Run) -> None:
    found = run("delete latest --json").json
    assert (False, ["epoch-4"]) == (found["done"], [record["name"] for record in found["records"]])
    done = run(f"{found['command'].removeprefix('expstate ')}").json
    assert (True, None, ["epoch-4"]) == (done["done"], done["command"], [record["name"] for record in done["records"]])


def test_a_snapshot_that_was_pinned_in_its_folder_alone_stays(project: Project, run: Run) -> None:
    """The catalog may not know: what lies beside the snapshot counts when it is to go."""
    project.catalog.pin("epoch-2")
    text = (project.path(2) / "annotations.json").read_bytes()
    project.catalog.unpin("epoch-2")
    (project.path(2) / "annotations.json").chmod(0o644)
    (project.path(2) / "annotations.json").write_bytes(text)
    done = run("delete epoch-2 --yes")

    assert 1 == done.status
    assert Snapshot(project.path(2)).verify().ok


WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=8)
PROJECTS = WORDS.filter(lambda text: text[0] != "-")


@given(
    st.lists(WORDS, min_size=1, max_size=3),
    st.fixed_dictionaries({"force": st.booleans(), "json": st.booleans(), "project": st.none() | PROJECTS}),
)
def test_a_command_that_is_told_means_what_it_was_made_of(refs: list[str], options: dict[str, object]) -> None:
    """Whatever the refs are called, also like an option."""
    (verb,) = [verb for verb in VERBS if verb.name == "delete"]
    parser = build_parser()
    bare = vars(parser.parse_args(["delete", "x"]))
    wanted = bare | options | {"refs": refs}
    line = command_line(verb, argparse.Namespace(**wanted), "expstate", yes=True)

    assert wanted | {"yes": True} | {"parser": None} == vars(parser.parse_args(shlex.split(line)[1:])) | {"parser": None}


def test_json_of_a_removal_names_the_command_with_json(project: Project, run: Run) -> None:
    assert "--json" in json.loads(run("prune --keep-last 1 --json").out)["command"]
