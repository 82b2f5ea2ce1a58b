"""Documentation is under test: each verb is described, and its example does what it says, for people and as JSON."""

from __future__ import annotations

import json
import re
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from expstate.cli import main
from expstate.commands import VERBS, Verb, build_parser

from .conftest import Project, enter, make_project

# Those of the library's documentation, in its words.
EXPECTED = {
    "list": "catalog.search",
    "show": "catalog[ref]",
    "read": "snapshot.read_object",
    "diff": "snapshot.diff",
    "tag": "catalog.tag",
    "untag": "catalog.untag",
    "alias": "catalog.alias",
    "unalias": "catalog.unalias",
    "pin": "catalog.pin",
    "unpin": "catalog.unpin",
    "note": "catalog.note",
    "metric": "catalog.log_metric",
    "log": "catalog.lineage",
    "delete": "catalog.delete",
    "prune": "catalog.prune",
    "gc": "catalog.gc",
    "verify": "snapshot.verify",
    "check": "catalog.check",
    "scan": "catalog.scan",
    "status": "catalog.status",
    "copy": "snapshot.copy",
    "export": "snapshot.export",
    "import": "interop.import_dcp",
}
RUN = [verb for verb in VERBS if verb.prepare is None]


@pytest.fixture(scope="module", params=["for people", "as JSON"])
def example_project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Project, bool]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPSTATE_PROJECT", "digits")
        project = make_project(tmp_path_factory.mktemp("examples"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns that this is one process
            dcp.save({"model": {"weight": torch.ones(2)}}, checkpoint_id=project.folder / "checkpoint")
        yield project, request.param == "as JSON"


def test_every_verb_is_in_the_table_once() -> None:
    names = [name for verb in VERBS for name in verb.names]

    assert sorted(set(names)) == sorted(names)
    assert EXPECTED == {verb.name: verb.library for verb in VERBS if verb.name in EXPECTED}
    assert "bench" in names
    assert "rm" in names


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_every_verb_and_argument_is_documented(verb: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([*verb.name.split(), "--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)

    assert 0 == exit_info.value.code
    assert verb.help in text
    assert verb.example in text
    assert shlex.split(verb.example)[:2] == ["expstate", verb.name.split()[0]]
    assert [] == [item.flags for item in (*verb.arguments, *verb.common_arguments) if not item.options.get("help")]
    if verb.prepare is None:
        assert "--json" in text


def test_help_lists_every_verb_in_one_line_and_says_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert 0 == main([])
    lines = capsys.readouterr().out.splitlines()

    for verb in VERBS:
        assert len(verb.help) < 66
        assert any(re.match(rf"    {verb.name}( \(.*\))?( |$)", line) for line in lines)
    assert all(any(re.match(rf"  {status}  ", line) for line in lines) for status in (0, 1, 2, 130))


@pytest.mark.parametrize("verb", RUN, ids=lambda verb: verb.name)
def test_example_runs(
    verb: Verb, example_project: tuple[Project, bool], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project, as_json = example_project
    enter(project, monkeypatch)
    status = main([*shlex.split(verb.example)[1:], *(["--json"] if as_json else [])])
    done = capsys.readouterr()

    assert (0, "") == (status, done.err)
    assert done.out.strip()
    if as_json:
        json.loads(done.out, parse_constant=pytest.fail)


@pytest.mark.slow
def test_example_of_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    (example,) = [verb.example for verb in VERBS if verb.name == "bench"]

    assert 0 == main(shlex.split(example)[1:])
    assert capsys.readouterr().out.startswith("operation")
    assert [] == list(tmp_path.iterdir())


def test_parser_may_be_of_another_class() -> None:
    """As a notebook's magic makes it, whose errors are not to end the process."""
    import argparse

    class Raising(argparse.ArgumentParser):
        def error(self, message: str) -> None:  # type: ignore[override]
            raise LookupError(message)

    parser = build_parser(Raising, program="%snapshot")

    assert "%snapshot" in parser.format_help()
    assert ("delete", ["best"]) == (parser.parse_args(["rm", "best"]).verb, parser.parse_args(["rm", "best"]).refs)
    with pytest.raises(LookupError, match="REF"):
        parser.parse_args(["show"])
    with pytest.raises(LookupError, match="invalid choice"):
        parser.parse_args(["nonsense"])
