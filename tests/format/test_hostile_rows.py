"""The rows of hostile inputs H1 to H33, and which tests show that each is met rightly; and the rows that belong nowhere else.

Beside each row stands what is right: this is the table to read.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

import expstate
from expstate import Catalog, Snapshot, StateDict
from expstate.errors import ExpstateError, PickleNotAllowedError, SnapshotCorruptError
from expstate.state.objects import safe_mode_holds
from tests.campaign import Campaign
from tests.catalog.forging import forge
from tests.format.forging import Forged, archive, guarded
from tests.format.test_hostile_objects import put_object

TESTS = Path(__file__).parent.parent
PACKAGE = Path(expstate.__file__).parent

ROWS: dict[str, tuple[str, list[str]]] = {
    "H1": ("paths with .. in them are refused", ["format/test_hostile.py::test_a_file_outside_the_folder_is_never_opened"]),
    "H2": ("absolute paths are refused", ["format/test_hostile.py::test_a_file_outside_the_folder_is_never_deleted"]),
    "H3": (
        "URLs, home folders, control characters and the like are refused",
        [
            "format/test_hostile.py::test_a_file_outside_the_folder_is_never_opened",
            "format/test_hostile_shared.py::test_nothing_outside_the_folder_of_a_base_is_linked",
        ],
    ),
    "H4": (
        "a manifest chooses no protocol, host or options",
        [
            "format/test_hostile.py::test_a_url_with_options_cannot_come_from_a_manifest",
            "objects/test_hostile.py::test_a_manifest_chooses_no_server_and_no_options",
        ],
    ),
    "H5": (
        "a snapshot refers to no other; a base is what the caller names",
        [
            "format/test_hostile.py::test_a_url_with_options_cannot_come_from_a_manifest",
            "format/test_hostile_shared.py::test_what_a_base_has_not_is_written",
        ],
    ),
    "H6": (
        "links, pipes and devices are refused without waiting",
        [
            "format/test_hostile.py::test_what_is_no_regular_file_is_not_read",
            "format/test_hostile.py::test_a_folder_of_shared_files_that_is_a_link_is_not_followed",
            "format/test_hostile_shared.py::test_a_delete_goes_through_no_link",
        ],
    ),
    "H7": (
        "no memory is asked for that the files do not hold",
        [
            "format/test_hostile_tensors.py::test_a_huge_entry_of_a_small_file_is_refused",
            "format/test_hostile_shared.py::test_very_many_entries_of_one_box_are_no_more_than_it",
        ],
    ),
    "H8": ("shapes that cannot be are refused", ["format/test_hostile_tensors.py::test_a_shape_that_is_not_possible_is_refused"]),
    "H9": ("there are no strides", ["format/test_hostile_tensors.py::test_there_are_no_strides_to_forge"]),
    "H10": (
        "boxes tile their tensor, and lie over each other only as equals",
        [
            "format/test_hostile_tensors.py::test_boxes_that_do_not_tile_their_tensor_are_refused",
            "format/test_hostile_shared.py::test_boxes_that_share_a_place_are_the_same",
        ],
    ),
    "H11": (
        "nothing is compressed; compressed records of objects are not unpacked",
        ["format/test_hostile_objects.py::test_an_object_that_would_run_code_is_refused"],
    ),
    "H12": (
        "manifests and entries are capped by the reader",
        [
            "format/test_hostile.py::test_a_sparse_manifest_of_terabytes_is_not_read",
            "format/test_hostile.py::test_a_manifest_of_too_many_entries_is_refused",
        ],
    ),
    "H13": (
        "JSON that no take writes is one kind of error",
        [
            "format/test_hostile.py::test_json_that_no_take_writes_is_refused",
            "format/test_hostile.py::test_of_a_field_that_is_there_twice_the_last_counts_for_everyone",
        ],
    ),
    "H14": ("a manifest that was changed is damage", ["format/test_hostile.py::test_a_manifest_that_was_changed_is_damaged"]),
    "H15": ("names of dtypes and kinds are looked up in tables", ["format/test_hostile_names.py::test_a_dtype_is_one_of_a_fixed_table"]),
    "H16": ("pickles do not run without trust", ["format/test_hostile_objects.py::test_an_object_that_would_run_code_is_refused"]),
    "H17": (
        "the safe loader is used where it holds",
        ["format/test_hostile_objects.py::test_a_torch_whose_safe_mode_is_broken_reads_no_object"],
    ),
    "H18": (
        "no list of bad names stands between a pickle and running",
        ["format/test_hostile_rows.py::test_pickles_that_scanners_call_harmless_do_not_run"],
    ),
    "H19": ("there is no YAML", ["format/test_hostile_rows.py::test_what_could_run_a_text_is_called_nowhere"]),
    "H20": ("other files in the folder are left alone", ["format/test_hostile.py::test_files_that_are_not_of_the_snapshot_are_left_alone"]),
    "H21": (
        "what is shown on a page is only text",
        [
            "snapshot/test_repr.py::test_html_of_hostile_names_holds_no_tags_of_theirs",
            "diff/test_page.py::test_hostile_names_are_only_text",
            "catalog/test_records.py::test_nothing_in_a_record_is_more_than_text_on_a_page",
            "browser/test_widget.py::test_hostile_names_are_text_in_the_browser",
            "browser/test_tables.py::test_hostile_names_are_text_in_every_table",
        ],
    ),
    "H22": (
        "nothing acts on a terminal",
        [
            "commands/test_output.py::test_nothing_of_a_name_acts_on_a_terminal",
            "catalog/test_records.py::test_nothing_in_a_record_acts_on_a_terminal",
            "format/test_hostile_names.py::test_a_name_that_refs_cannot_carry_is_not_taken",
        ],
    ),
    "H23": (
        "a query is a question and nothing more",
        [
            "catalog/test_query_search.py::test_no_query_is_more_than_a_question",
            "catalog/test_query_search.py::test_no_sort_is_more_than_a_name",
        ],
    ),
    "H24": (
        "there are no wildcards and no patterns to run away",
        ["catalog/test_query_search.py::test_contains_takes_every_character_as_it_is"],
    ),
    "H25": (
        "a database from somebody else runs nothing",
        [
            "catalog/test_database_damage.py::test_triggers_and_views_are_refused",
            "catalog/test_database_damage.py::test_functions_in_the_schema_do_not_run",
        ],
    ),
    "H26": (
        "a record opens only what may be trusted",
        [
            "catalog/test_opening.py::test_what_a_record_may_not_open",
            "objects/test_hostile.py::test_a_record_makes_nobody_connect_elsewhere",
        ],
    ),
    "H27": (
        "values that a database cannot hold come back or are refused",
        [
            "catalog/test_database_rows.py::test_what_only_a_stranger_writes_does_not_break_it",
            "catalog/test_database_rows.py::test_values_of_every_kind_come_back",
        ],
    ),
    "H28": (
        "secrets of connections are in nothing that is written or said",
        [
            "objects/test_secrets.py::test_options_are_in_nothing_that_a_take_leads_to",
            "objects/test_secrets.py::test_a_url_with_credentials_is_refused_and_shown_without_them",
        ],
    ),
    "H29": (
        "secrets of the surroundings are not recorded",
        [
            "catalog/test_canaries.py::test_a_secret_is_in_no_byte_that_is_produced",
            "catalog/test_provenance_git.py::test_a_difference_with_a_secret_in_it_is_refused",
        ],
    ),
    "H30": (
        "odd names get files of their own, or are refused",
        [
            "format/test_hostile_names.py::test_keys_that_disks_cannot_tell_apart_get_files_of_their_own",
            "format/test_hostile_names.py::test_names_that_look_alike_are_one_name",
        ],
    ),
    "H31": ("each path is there once, below a container", ["format/test_hostile_names.py::test_paths_that_no_take_writes_are_refused"]),
    "H32": (
        "newer formats and features are refused by name",
        ["format/test_hostile.py::test_a_newer_format_is_refused", "format/test_hostile.py::test_a_feature_that_is_not_known_is_refused"],
    ),
    "H33": ("a page asks for nothing but what the kernel offers", ["notebook/test_browser_widget.py::test_what_nobody_knows_is_refused"]),
}
"""Hostile inputs: the right behaviour, and the tests that show it."""


@functools.cache
def _tests_in(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_row_has_tests_that_exist() -> None:
    """A test that is renamed or removed takes its row with it, and that is noticed."""
    named = [name for _, found in ROWS.values() for name in found]

    assert [f"H{number}" for number in range(1, 34)] == list(ROWS)
    assert all(found for _, found in ROWS.values())
    assert [] == [name for name in named if name.partition("::")[2] not in _tests_in(name.partition("::")[0])]


# H18


def _called(module: str, name: str, argument: str) -> bytes:
    """A pickle that calls something with a text."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"X" + len(argument).to_bytes(4, "little") + argument.encode() + b"\x85R."


HARMLESS_TO_SCANNERS = {
    "locate": _called("pydoc", "locate", "os.system"),
    "timeit": _called("timeit", "timeit", "import os"),
    "profile": _called("cProfile", "run", "import os"),
    "runpy": _called("runpy", "run_path", "evil.py"),
    "pip": _called("pip._internal.main", "main", "install"),
    "torch": _called("torch.utils.cpp_extension", "load", "evil"),
    "testing": _called("torch.testing._internal.inductor_utils", "skip", "x"),
    "collect": _called("torch.utils.collect_env", "run", "true"),
    "methodcaller": b"\x80\x02coperator\nmethodcaller\nX\x06\x00\x00\x00system\x85Rcposix\n__dict__\n\x85R.",
    "getattr": b"\x80\x02c__builtin__\ngetattr\ncposix\n__class__\nX\x06\x00\x00\x00system\x86R.",
    "stack global": b"\x80\x04X\x05\x00\x00\x00posixX\x06\x00\x00\x00system\x93X\x04\x00\x00\x00true\x85R.",
    "extension": b"\x80\x02\x82\x01.",
    "memo": b"\x80\x02X\x05\x00\x00\x00posixq\x00X\x06\x00\x00\x00systemq\x010h\x00h\x01\x93X\x04\x00\x00\x00true\x85R.",
    "broken end": _called("posix", "system", "true")[:-1] + b"\xff",
}


@pytest.mark.usefixtures("imported")
@pytest.mark.skipif(not safe_mode_holds(), reason="this torch reads no pickled object without trust")
@pytest.mark.parametrize("name", HARMLESS_TO_SCANNERS)
def test_pickles_that_scanners_call_harmless_do_not_run(forged: Forged, name: str) -> None:
    """Of all names only those are read that the safe loader knows: what nobody has thought of is refused as well (H18)."""
    put_object(forged, archive(HARMLESS_TO_SCANNERS[name]))
    with guarded(forged.folder), pytest.raises((PickleNotAllowedError, SnapshotCorruptError)):
        Snapshot(forged.folder).read_object("call/call")


# H19


RUNS = {"eval", "exec", "compile", "__import__"}
LOADS = {"pickle", "marshal", "shelve", "yaml", "dill", "cloudpickle", "joblib"}


def _running(tree: ast.AST) -> set[str]:
    """Calls in a module that make code or objects of what they are given."""
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name) and node.func.id in RUNS:
            found.add(node.func.id)
        elif isinstance(node.func, ast.Attribute) and node.func.attr in {
            "load",
            "loads",
            "Unpickler",
            "safe_load",
            "import_module",
            "run_cell",
        }:
            above = ast.unparse(node.func.value)
            if above in LOADS | {"torch", "importlib", "runpy", "hub"}:
                found.add(f"{above}.{node.func.attr}")
    return found


MAY_RUN = {
    "state/objects.py": {"torch.load"},  # of objects, by the safe loader or with trust
    "interop/checkpoint.py": {"pickle.loads"},  # of a checkpoint of DCP, with trust
    "state/pandas_codecs.py": {"importlib.import_module"},  # of pandas, of NumPy and of our own modules: constants
    "state/stateful.py": {"importlib.import_module"},
    "storage/objects/connections.py": {"importlib.import_module"},
}


def test_what_could_run_a_text_is_called_nowhere() -> None:
    """No module on the way of a snapshot makes code or objects of bytes, but for those that are named here (H19)."""
    found = {}
    for floor in ("format", "state", "engine", "storage", "catalog", "diff", "interop"):
        for path in sorted((PACKAGE / floor).rglob("*.py")):
            calls = _running(ast.parse(path.read_text(encoding="utf-8")))
            if calls:
                found[path.relative_to(PACKAGE).as_posix()] = calls

    assert MAY_RUN == found


def test_what_could_run_a_text_would_be_seen() -> None:
    assert {"eval", "yaml.load", "pickle.loads"} == _running(ast.parse("eval('1'); yaml.load(x); pickle.loads(y); json.loads(z)"))


# H21 to H23, H27: all the way through a catalog, under the guard

ACTING = [
    '"><img src=x onerror=alert(1)>',
    "</script><script>alert(1)</script>",
    "[x](javascript:alert(1))",
    "\x1b[31m\x1b]8;;http://evil\x07",
    "\u202eabc\u200b",
    "a\nb\r",
    "'; DROP TABLE records; --",
    "=cmd|' /C calc'!A0",
    "%(id)s {0} {{7*7}} ${jndi}",
    "\0",
]


@pytest.mark.campaign("Safe to open", "names and texts that act where they are shown")
@pytest.mark.parametrize("text", ACTING, ids=ascii)
def test_nothing_of_a_stranger_acts_where_it_is_found_and_shown(
    tmp_path: Path, campaign: Campaign, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """Scanned, listed, searched for, named by and shown, nothing is run or connected to, and nothing is more than text (H21 to H23)."""
    monkeypatch.chdir(tmp_path)  # a text may be a path too, from here
    folder = tmp_path / "runs"
    snapshot = Snapshot.take(folder / "one", {"model": StateDict(w=1)}, name="seed", tags=["seed"])
    catalog = Catalog(tmp_path / "catalog.db")
    shown = _all_shown(catalog, folder, "seed")  # imports what is needed, so that the guard sees what is the snapshot's doing
    forge(snapshot, metadata={"name": text, "tags": [text], "note": text, "params": {text: text}, "metrics": {"loss": 1}})
    catalog.close()
    catalog = Catalog(tmp_path / "other.db")
    with guarded(tmp_path):
        shown = _all_shown(catalog, folder, text)
    catalog.close()

    assert shown
    assert not [page for page in shown if any(character in page for character in "\x1b\u202e\u200b\0\r\x07")]
    assert not [page for page in shown if ("<b>" in page or "<table" in page) and ("<img" in page or "<script" in page)]
    campaign.tried()


def _all_shown(catalog: Catalog, folder: Path, text: str) -> list[str]:
    """What people see of the snapshots in a folder, and the words of errors."""
    report = catalog.scan(folder)
    shown = [str(report), repr(report), Snapshot(folder / "one")._repr_html_(), repr(Snapshot(folder / "one"))]
    records = catalog.search(project="*")
    shown += [repr(records), records._repr_html_(), *map(repr, records)]
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    for query in (f'name = "{quoted}"', f'tag = "{quoted}"', f'note ~ "{quoted}"', f'param."{quoted}" = x', text):
        try:
            shown.append(repr(catalog.search(query, project="*")))
        except ExpstateError as error:
            shown.append(str(error))
    try:
        Snapshot.find(text, catalog=catalog, project="*")
    except ExpstateError as error:
        shown.append(str(error))
    return shown
