"""Exit statuses and errors: one line for people, a document for programs, no traceback."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable

import pytest

from expstate import Catalog
from expstate.cli import main
from expstate.errors import CatalogWarning

from .conftest import Done, Project

Run = Callable[[str], Done]
EXPSTATE = [sys.executable, "-m", "expstate"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("show nosuch", "no snapshot goes by 'nosuch'"),
        ("show epoch", "the nearest are 'epoch-4'"),
        ("unalias bets", "the nearest is 'best'"),
        ("list 'loss <'", "character 7"),
        ("read best model/0.weigh", "did you mean 'model/0.weight'"),
        ("read best model/0.weight --rows a:b", "FIRST:LAST"),
        ("read best model/0.weight --out x.txt", "must end in .npy"),
        ("read best progress --out x.npy", "no tensor or array"),
        ("show best nosuch*", "matches no entry"),
        ("prune", "give --keep-last, --keep-best, --keep-every or --older-than"),
        ("prune --keep-best loss", "METRIC:min"),
        ("prune --keep-last 0", "--keep-last must be"),
        ("tag best a/b", "a/b"),
        ("unalias nosuch", "nosuch"),
        ("export best all.safetensors --include nosuch", "matches no entry"),
        ("scan nosuch", "no folder"),
        ("gc nosuch", "no folder"),
        ("delete best", "unalias it, or pass --force"),
        ("delete best --project other", "--project 'digits' or its id finds"),
        ("prune --older-than 3x", "--older-than must be a duration such as '7d' or '12h', got '3x'"),
        ("copy best epoch-1", "already at"),
        ("copy best epoch-1", "; copy to another path"),
        ("list --catalog mysql://host/db", "SQLite"),
        ("status --catalog off", "--catalog PATH"),
    ],
)
@pytest.mark.parametrize("as_json", [False, True])
def test_an_error_is_one_line_and_status_1(kept: Project, run: Run, line: str, message: str, as_json: bool) -> None:
    done = run(f"{line} --json" if as_json else line)

    assert 1 == done.status
    assert message in done.err
    assert done.err.startswith("expstate: error: ")
    assert all(line.startswith("  ") for line in done.err.splitlines()[1:])
    assert "Traceback" not in done.err
    if as_json:
        assert message in done.json["error"]
        assert done.json["type"].endswith("Error")
        assert {"error", "type"} == set(done.json)
    else:
        assert "" == done.out


def test_a_column_that_is_not_there_is_an_error_naming_those_that_are(kept: Project, run: Run) -> None:
    done = run("list --columns id,nosuch")

    assert (1, "") == (done.status, done.out)
    assert "no column 'nosuch'" in done.err
    assert "aliases" in done.err


def test_an_error_in_a_query_points_at_the_place(kept: Project, run: Run) -> None:
    _, query, mark = run("list 'loss < 0.2 and and'").err.splitlines()

    assert "loss < 0.2 and and" == query.strip()
    assert query.index("and and") + 4 == mark.index("^")


@pytest.mark.parametrize("line", ["nonsense", "show", "list --limit x", "list --limit -1", "metric best loss much", "list --nonsense"])
def test_a_command_line_that_is_not_understood_is_status_2(kept: Project, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(line.split())

    assert 2 == exit_info.value.code
    complaint = capsys.readouterr().err
    assert "usage: expstate" in complaint
    assert " _" not in complaint


def test_damage_is_status_1_and_named(project: Project, run: Run) -> None:
    assert 0 == run("verify best latest").status
    file = next(project.path(3).glob("model*.safetensors"))
    file.chmod(0o644)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    done = run("verify latest best")

    assert 1 == done.status
    assert "entry 'model/" in done.out
    assert [True, False] == [one["report"]["ok"] for one in run("verify latest best --json").json]
    assert 1 == run("check --deep").status
    assert 0 == run("check").status


def test_a_damaged_manifest_does_not_keep_the_others_from_being_verified(project: Project, run: Run) -> None:
    file = project.path(2) / "snapshot.json"
    file.chmod(0o644)
    file.write_bytes(file.read_bytes().replace(b'"world_size":1', b'"world_size":2'))
    for ref in ("epoch-2", project.catalog["epoch-2"].id):
        done = run(f"verify {ref} best")
        assert (1, "") == (done.status, done.err)
        first, second = done.out.splitlines()
        assert "the manifest is damaged" in first
        assert f"{project.path(3)}: whole" in second
        damaged, whole = run(f"verify {ref} best --json").json
        assert (None, True) == (damaged["report"], whole["report"]["ok"])
        assert "the manifest is damaged" in damaged["problem"]


def test_a_missing_snapshot_is_found_by_check_with_how_to_mend_it(project: Project, run: Run) -> None:
    for file in project.path(2).iterdir():
        file.unlink()
    done = run("check")

    assert 1 == done.status
    assert project.catalog["epoch-2"].id[:8] in done.out
    assert "expstate scan" in done.out
    assert run("check --json").json["ok"] is False
    assert 0 == run("scan").status


def test_a_difference_is_status_1_only_when_it_is_asked_for(kept: Project, run: Run) -> None:
    assert 0 == run("diff first best").status
    assert 1 == run("diff first best --exit-code").status
    assert 0 == run("diff best best --exit-code").status


def test_an_interrupt_is_status_130(kept: Project, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Catalog, "search", interrupt)
    done = run("list")

    assert (130, "", "expstate: interrupted\n") == (done.status, done.out, done.err)


def test_an_error_that_is_no_one_elses_is_not_hidden(kept: Project, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake of ours shows where it is."""

    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Catalog, "search", fail)
    with pytest.raises(ZeroDivisionError):
        run("list")


def test_errors_of_the_system_are_one_line(kept: Project, run: Run) -> None:
    done = run("read best model/0.weight --out nosuch/x.npy")

    assert 1 == done.status
    assert "expstate: error: No such file or directory: 'nosuch/x.npy'\n" == done.err


def test_a_warning_is_one_line_without_our_code(kept: Project, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    search = Catalog.search

    def warning(self: Catalog, *args: object, **options: object) -> object:
        warnings.warn("the catalog is \x1b[31mslow", CatalogWarning, stacklevel=2)
        return search(self, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Catalog, "search", warning)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        done = run("list")

    assert (0, "expstate: warning: the catalog is %1B[31mslow\n") == (done.status, done.err)
    assert "epoch-4" in done.out


def test_the_program_gives_the_status_to_the_shell(kept: Project) -> None:
    statuses = [
        subprocess.run([*EXPSTATE, *line.split()], capture_output=True, check=False).returncode
        for line in ("list --limit 1", "show nosuch", "show")
    ]

    assert [0, 1, 2] == statuses


@pytest.mark.parametrize("line", ["list", "list --json"])
def test_a_full_disk_is_one_line_and_status_1(kept: Project, line: str) -> None:
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run([*EXPSTATE, *line.split()], stdout=full, stderr=subprocess.PIPE, text=True, check=False)

    assert (1, "expstate: error: [Errno 28] No space left on device\n") == (done.returncode, done.stderr)


def test_a_reader_that_leaves_is_no_error(kept: Project) -> None:
    with subprocess.Popen([*EXPSTATE, "list", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        complaint = process.stderr.read()

    assert (141, b"") == (process.returncode, complaint)


def test_control_c_ends_the_program_in_one_line(kept: Project) -> None:
    """Whatever it is doing: here it waits for a query that nobody has written yet."""
    os.mkfifo(kept.folder / "pipe")
    code = "import builtins, sys; from expstate import Catalog, cli\n"
    code += "Catalog.search = lambda *_, **__: print('waiting', flush=True) or open('pipe')\n"
    code += "sys.exit(cli.main(['list']))"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "waiting\n" == process.stdout.readline()
        assert process.stderr is not None
        process.send_signal(signal.SIGINT)
        while not select.select([process.stderr], [], [], 1)[0]:  # it came just before the waiting began
            process.send_signal(signal.SIGINT)
        complaint = process.stderr.read()
    (kept.folder / "pipe").unlink()

    assert (130, "expstate: interrupted\n") == (process.returncode, complaint)
