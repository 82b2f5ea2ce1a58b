"""What reaches a terminal is harmless and whole; what reaches a program is JSON to the last value."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expstate import Snapshot, StateDict
from expstate.catalog import rows
from expstate.catalog.model import Body, KeySummary, RecordData, this_host
from expstate.cli import main
from expstate.commands import VERBS
from expstate.commands.plain import plain
from expstate.commands.view import Column, View, clean

from .conftest import Done, Project

Run = Callable[[str], Done]
# A colour, a title of the window, a newline that forges a line, eight-bit controls, writing direction, nothing to see, a mark of order.
HOSTILE = "a\x1b[31mred\x1b]0;t\x07\nforged\r\x9b2J\u202egnp\u2066\u200b\u2060\ufeff\u200f\u2028\x00\x7f"
HARM = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")
COLOURS = re.compile("\x1b\\[[0-9;]*m")


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def hostile(project: Project) -> Project:
    """A catalog with a record that somebody forged: each text in it is meant for the terminal."""
    body = Body(
        tags=(HOSTILE,),
        note=HOSTILE,
        params={HOSTILE: HOSTILE, "depth": 7},
        metrics={HOSTILE: 1.0},
        keys=(KeySummary(HOSTILE, HOSTILE, 1, 4),),
        provenance={HOSTILE: HOSTILE, "git": {"branch": HOSTILE, "commit": HOSTILE}, "host": HOSTILE},
    )
    data = RecordData(
        id="f" * 32,
        digest="0" * 64,
        url=f"/nowhere/{HOSTILE}",
        host=this_host(),
        project="digits",
        user=HOSTILE,
        name=HOSTILE,
        step=9,
        created_at=2**50,
        nbytes=4,
        written_bytes=4,
        world_size=1,
        parent="e" * 32,
        body=body,
        packages={HOSTILE: HOSTILE},
    )
    catalog = project.catalog
    with catalog.database.writing() as connection:
        rows.put(connection, data)
    catalog.close()
    return project


LINES = [
    "list",
    "list --columns name,tags,note,branch,commit,url,user,host",
    "list 'nonsense \x1b[31m'",
    "show ffff",
    "log ffff",
    "read ffff model",
    "diff ffff best",
    "tag ffff more",
    "note ffff '\x1b[31mnew\n\x07'",
    "metric ffff '\x1b[31m' 1",
    "alias ffff other",
    "delete ffff --any-user",
    "delete ffff --any-user --yes",
    "prune --keep-last 1 --tagged --any-user",
    "verify ffff",
    "check",
    "show '\x1b[31mnosuch'",
    "copy best '/proc/\x1b[31m/x'",
    "export best '/proc/\x1b[31m/x'",
    "gc",
    "status",
    "scan",
]


@pytest.mark.filterwarnings("default::expstate.errors.CatalogWarning")
@pytest.mark.parametrize("as_json", [False, True])
@pytest.mark.parametrize("line", LINES)
def test_nothing_of_a_name_acts_on_a_terminal(hostile: Project, run: Run, line: str, as_json: bool) -> None:
    done = run(f"{line} --json" if as_json else line)

    assert None is HARM.search(done.out + done.err)
    assert "forged" not in [text.strip() for text in done.out.splitlines()]
    if as_json:
        json.loads(done.out)


def test_rich_tables_are_as_harmless(hostile: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # nothing is folded
    for line in (["list"], ["show", "ffff"], ["prune", "--keep-last", "1", "--any-user"]):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        assert 0 == main(line)
        text = COLOURS.sub("", terminal.getvalue())
        assert "%1B[31mred" in text
        assert None is HARM.search(text)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_narrow_terminal_folds_and_loses_nothing(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    name, note = "n" * 70, "".join(f"[bold]{number}" for number in range(20))
    monkeypatch.setenv("COLUMNS", str(width))
    terminal = Terminal()
    View(terminal).table([Column("name"), Column("id"), Column("note")], [[name, "12345678", note]])
    text = COLOURS.sub("", terminal.getvalue())

    assert max(map(len, text.splitlines())) <= width
    assert "12345678" in text
    assert 70 == text.partition("\n")[2].count("n")
    assert 20 == len(re.findall("b(?:\\s*)o(?:\\s*)l", "".join(line[-(width // 2) :] for line in text.splitlines()))) or "bold" in text
    assert "…" not in text


@pytest.mark.parametrize("width", [10, 30])
def test_a_terminal_too_narrow_for_the_columns_gets_pairs(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns that have no room would be cut off, digits of numbers among them."""
    monkeypatch.setenv("COLUMNS", str(width))
    terminal = Terminal()
    titles = [Column("name"), Column("size", is_number=True), Column("step", is_number=True), Column("loss", is_number=True)]
    View(terminal).table(titles, [["first", "113 KiB", "10", "0.0350021"], ["second", "113 KiB", "", "0.0344524"]])
    lines = COLOURS.sub("", terminal.getvalue()).splitlines()

    assert ["name  first", "size  113 KiB", "step  10", "loss  0.0350021", "", "name  second", "size  113 KiB", "loss  0.0344524"] == lines


def test_a_list_leaves_out_what_a_terminal_has_no_room_for_and_says_so(kept: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first metric comes before marks, and is shown to its last digit; columns that were asked for stay."""
    shown = {}
    for width, line in ((200, ["list"]), (60, ["list"]), (60, ["list", "--columns", "name,accuracy,aliases,tags,loss,created,id"])):
        monkeypatch.setenv("COLUMNS", str(width))
        terminal = Terminal()
        monkeypatch.setattr(sys, "stdout", terminal)
        assert 0 == main(line)
        shown[width, len(line)] = COLOURS.sub("", terminal.getvalue())

    assert "no room" not in shown[200, 1]
    assert "accuracy" in shown[200, 1].splitlines()[0]
    assert ["name", "id", "age", "step", "size", "tags", "loss"] == shown[60, 1].splitlines()[0].split()
    assert "0.312346" in shown[60, 1]
    assert "no room for accuracy, aliases; --columns" in shown[60, 1]
    assert "no room" not in shown[60, 3]
    assert "aliases   first" in shown[60, 3]


@pytest.mark.parametrize("width", ["60", "80"])
def test_help_fits_the_terminal(width: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """All but the usage, which argparse folds between options, and the example, which is there to be copied."""
    monkeypatch.setenv("COLUMNS", width)
    for line in ([], *([verb.name, "--help"] for verb in VERBS)):
        with contextlib.suppress(SystemExit):
            main(line)
        text = capsys.readouterr().out.partition("example:")[0].partition("\n\n")[2]
        assert int(width) >= max(map(len, text.splitlines())), line


def test_what_is_no_terminal_gets_neither_colours_nor_folds(kept: Project, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setenv("FORCE_COLOR", "1")
    done = run("list")

    assert "\x1b" not in done.out
    assert 5 == len(done.out.splitlines())


def test_a_terminal_without_rich_gets_plain_text(kept: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)

    assert 0 == main(["list"])
    assert terminal.getvalue().startswith("name  ")


def test_wide_characters_keep_columns_in_line() -> None:
    stream = io.StringIO()
    View(stream).table([Column("name"), Column("n", is_number=True)], [["実験", "1"], ["e\u0301a", "22"]])

    assert ["name   n", "実験   1", "e\u0301a    22"] == stream.getvalue().splitlines()


@given(st.text())
def test_clean_texts_are_harmless_and_clean_again(text: str) -> None:
    assert None is HARM.search(clean(text).replace("\n", "\x00"))
    assert clean(text) == clean(clean(text))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.datetimes(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | st.integers(), inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_every_value_is_json(value: object) -> None:
    text = json.dumps(plain(value), allow_nan=False)

    assert plain(value) == json.loads(text)


@given(st.integers() | st.floats(allow_nan=False) | st.text())
def test_numbers_and_texts_survive_json(value: object) -> None:
    found = json.loads(json.dumps(plain(value)))

    assert value == (float(found) if isinstance(value, float) else found)


def test_metrics_of_every_kind_survive_json(project: Project, run: Run) -> None:
    metrics = {"nan": float("nan"), "inf": float("-inf"), "big": 2**70, "small": 5e-324}
    Snapshot.take(project.folder / "odd", {"s": StateDict(x=1)}, name="odd", metrics=metrics, params={"list": [1, None, "é"]})
    found = run("list 'name = odd' --json").json[0]

    assert {"nan": "nan", "inf": "-inf", "big": 2**70, "small": 5e-324} == found["metrics"]
    assert {"list": [1, None, "é"]} == found["params"]


def test_a_table_of_a_million_digits_is_short(project: Project, run: Run) -> None:
    """Python refuses to write such a number out, and a table need not."""
    Snapshot.take(project.folder / "odd", {"s": StateDict(x=1)}, name="odd", metrics={"huge": 10**5000})

    assert 0 == run("list").status
    assert 0 == run("show odd").status
    assert hex(10**5000) == run("list 'name = odd' --json").json[0]["metrics"]["huge"]


def test_output_folder_with_an_odd_name_is_shown_clean(project: Project, run: Run, tmp_path: Path) -> None:
    odd = tmp_path / "\x1b[31mred"
    done = run(f"export best '{odd}'")

    assert 0 == done.status
    assert "%1B[31mred" in done.out
    assert odd.is_dir()
