"""What the table asks: queries, windows, columns, the plot; and what is known of one snapshot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Catalog, Snapshot, StateDict, settings
from expstate.bench.catalog_fill import fill
from expstate.errors import InvalidQueryError, RefNotFoundError
from expstate.notebook.browser import difference, overview
from expstate.notebook.browser.data import WINDOW, Table
from expstate.notebook.browser.entries import Tree

HOSTILE = '<img src=x onerror="window.hacked=1">'


@pytest.fixture
def catalog(tmp_path: Path) -> Any:
    with settings.override(project="tests"):
        made = Catalog(tmp_path / "catalog.db")
        yield made
        made.close()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Any:
    made = Catalog(tmp_path_factory.mktemp("large") / "catalog.db")
    fill(made, 10_000, project="sweep")
    yield Table(made, "sweep")
    made.close()


def take(catalog: Catalog, folder: Path, state: dict[str, Any] | None = None, **given: Any) -> Snapshot:
    return Snapshot.take(folder, state or {"values": StateDict(one=torch.arange(3.0))}, catalog=catalog, **given)


def test_a_question_finds_all_records_and_brings_the_first_rows(large: Table):
    found = large.search()
    assert (10_000, 10_000, WINDOW) == (found["count"], found["total"], len(found["rows"]))


def test_filter_and_sort_act_on_all_rows_and_the_last_is_reached(large: Table):
    found = large.search("loss < 0.5", "metric.loss:desc")
    last = large.window(found["question"], found["count"] - 1)["rows"]
    assert 1 == len(last)
    values = [float(row["cells"][0]) for row in (found["rows"][0], last[0])]
    assert 0.4 < values[0] <= 0.5
    assert values[1] < 0.01


def test_a_window_of_a_question_of_long_ago_says_that_it_is_gone(large: Table):
    first = large.search()["question"]
    assert large.window(first, 200)["rows"] is not None
    for _ in range(10):
        large.search()
    assert large.window(first, 200)["rows"] is None


def test_an_unfinished_query_raises_with_its_position_and_the_old_question_stays(large: Table):
    found = large.search("loss < 0.5")
    with pytest.raises(InvalidQueryError) as raised:
        large.search("loss < 0.5 and")
    assert 14 == raised.value.position
    assert large.window(found["question"], 0, 1)["rows"]


def test_the_places_of_selected_records_are_told(large: Table):
    by_loss = large.search("", "metric.loss:asc")
    one = by_loss["rows"][7]["id"]
    again = large.search("", "metric.loss:asc", selected=[one, "0" * 32])
    assert ({one: 7}, ["0" * 32]) == (again["places"], again["gone"])


def test_metrics_of_the_query_are_columns(large: Table):
    assert "metric.metric-3" in [column["name"] for column in large.search("metric-3 < 0.5")["columns"]]


def test_the_series_has_points_by_rising_step(large: Table):
    found = large.search("loss < 0.5")
    points = large.series(found["question"], "loss")["points"]
    assert 1000 < len(points) <= 3000
    assert sorted(point[0] for point in points) == [point[0] for point in points]


def test_lines_of_the_plot_go_from_parent_to_child_past_what_is_not_shown(catalog: Catalog, tmp_path: Path):
    state = {"values": StateDict(one=torch.arange(3.0))}
    for step in range(4):
        take(catalog, tmp_path / str(step), state, step=step, metrics={"loss": 1.0 / (step + 1)})
    table = Table(catalog)
    found = table.search("not step = 2")
    series = table.series(found["question"], "loss")
    assert [0, 1, 3] == [point[0] for point in series["points"]]
    assert [[0, 1], [1, 2]] == sorted(series["lines"])


def test_names_of_columns_may_hold_anything(catalog: Catalog, tmp_path: Path):
    name = 'a "quoted" \\ name'
    for value in (2.0, 1.0):
        take(catalog, tmp_path / str(value), metrics={name: value})
    found = Table(catalog).search("", f"metric.{name}:asc")
    assert ["1.0000", "2.0000"] == [row["cells"][0] for row in found["rows"]]


def test_a_deleted_record_leaves_a_gap(catalog: Catalog, tmp_path: Path):
    kept, deleted = take(catalog, tmp_path / "a"), take(catalog, tmp_path / "b")
    table = Table(catalog)
    question = table.search()["question"]
    catalog.delete(deleted.id)
    assert [None, kept.id] == [row and row["id"] for row in table.window(question, 0)["rows"]]


def test_all_that_goes_to_the_page_is_plain_json(catalog: Catalog, tmp_path: Path):
    state = {"values": StateDict({HOSTILE: torch.ones(2), "nan": float("nan"), "turned\u202e": 1})}
    one = take(
        catalog, tmp_path / "a", state, name=HOSTILE.replace("/", "").replace("=", "").replace(":", ""), note=f"{HOSTILE}\n\u202e",
        metrics={"loss": float("nan"), "up": float("inf")}, params={"weird": [float("-inf"), {"a": HOSTILE}]}, step=1,
    )  # fmt: skip
    table = Table(catalog)
    found = table.search(columns=["metric.loss", "metric.up", "param.weird", "note", "created"])
    answers = [
        found, table.series(found["question"], "loss"), table.columns(), overview.overview(catalog, one.id),
        overview.packages(catalog, one.id), overview.lineage(catalog, one.id),
        Tree(one.manifest).level(None), difference.as_json(one.diff(one)),
    ]  # fmt: skip
    for answer in answers:
        assert json.loads(json.dumps(answer, allow_nan=False)) == answer
    assert "\u202e" not in json.dumps(found, ensure_ascii=False)


def test_what_is_called_like_an_id_is_not_taken_for_it(catalog: Catalog, tmp_path: Path):
    one = take(catalog, tmp_path / "a")
    take(catalog, tmp_path / "b", name=one.id)
    with pytest.raises(RefNotFoundError, match="name or alias"):
        overview.overview(catalog, one.id)


def test_the_overview_tells_note_labels_values_and_source(catalog: Catalog, tmp_path: Path):
    one = take(catalog, tmp_path / "a", name="first", note="two\nlines", tags=["x"], metrics={"loss": 0.5}, params={"lr": 0.1})
    catalog.alias("first", "best")
    found = overview.overview(catalog, one.id)
    assert ("two\nlines", [{"text": "x", "value": "x"}], [{"text": "best", "value": "best"}]) == (
        found["note"],
        found["tags"],
        found["aliases"],
    )
    assert ([["loss", "0.5"]], [["lr", "0.1"]]) == (found["metrics"], found["params"])
    assert dict(found["facts"])["id"] == one.id


def test_python_of_a_selection_runs(catalog: Catalog, tmp_path: Path):
    ones = [take(catalog, tmp_path / name, name=name) for name in ("a", "b")]
    text = overview.as_python([catalog[one.id] for one in ones])
    with settings.override(catalog=str(catalog.place.path)):
        exec(compile(text, "copied", "exec"), {})  # noqa: S102 - that it runs is what is tested
    assert "old.diff(new" in text
    assert "Catalog().search('loss < 1', sort='metric.loss:asc')" in overview.as_python([], "loss < 1", "metric.loss:asc")


# The tree


def layers(count: int, names: tuple[str, ...] = ("query.weight", "query.bias", "out.weight", "out.bias")) -> dict[str, torch.Tensor]:
    return {f"encoder.layer.{number}.{name}": torch.zeros(2) for number in range(count) for name in names}


def labels(rows: list[dict[str, Any]]) -> list[str]:
    return [row["label"] for row in rows]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    state = {"model": StateDict({"embeddings.weight": torch.zeros(8), **layers(12)}), "lr": StateDict({"0.1": 1, "a b.c": 2})}
    return Tree(Snapshot.take(tmp_path / "tree", state, catalog=False).manifest)


def test_layers_that_are_alike_stand_together(tree: Tree):
    keys = tree.level(None)
    assert ["model", "lr"] == labels(keys)
    assert ["embeddings.weight", "encoder.layer.0", "encoder.layer.1 … 11"] == labels(tree.level(keys[0]["number"]))
    group = tree.level(keys[0]["number"])[2]
    assert [f"encoder.layer.{number}" for number in range(1, 12)] == labels(tree.level(group["number"]))
    assert ["query.weight", "query.bias", "out.weight", "out.bias"] == labels(tree.level(tree.level(group["number"])[0]["number"]))


def test_shares_are_of_the_whole_snapshot(tree: Tree):
    model = tree.level(None)[0]
    assert pytest.approx(1.0) == model["share"]
    assert pytest.approx(1.0) == sum(row["share"] for row in tree.level(model["number"]))


def test_names_that_are_no_modules_stay_whole(tree: Tree):
    assert ["0.1", "a b.c"] == labels(tree.level(tree.level(None)[1]["number"]))


def test_very_many_rows_are_cut_into_groups_that_hold_all(tmp_path: Path):
    state = {"values": StateDict({f"t{number}": number for number in range(25_000)})}
    tree = Tree(Snapshot.take(tmp_path / "many", state, catalog=False).manifest)
    waiting, leaves, widest = [tree.level(None)[0]["number"]], 0, 0
    while waiting:
        rows = tree.level(waiting.pop())
        widest = max(widest, len(rows))
        leaves += sum(not row["opens"] for row in rows)
        waiting += [row["number"] for row in rows if row["opens"]]
    assert 25_000 == leaves
    assert widest <= 200


def test_ticks_become_the_shorter_list_of_globs(tree: Tree):
    keys = tree.level(None)
    rows = tree.level(keys[0]["number"])
    model, lr, layer = keys[0]["number"], keys[1]["number"], rows[1]["number"]
    assert (["model", "lr"], [], []) == tree.choose({model: True, lr: True})
    assert (["model"], [], []) == tree.choose({model: True, lr: False})
    assert (["model"], [], ["model/encoder.layer.0.*"]) == tree.choose({model: True, lr: False, layer: False})
    assert (["model"], ["model/encoder.layer.0.*"], []) == tree.choose({model: False, lr: False, layer: True})
    assert ([], [], []) == tree.choose({model: False, lr: False})


def test_globs_of_ticks_match_names_that_look_like_globs(tmp_path: Path):
    snapshot = Snapshot.take(tmp_path / "globs", {"values": StateDict({"a*": 1, "ab": 2, "[x]": 3})}, catalog=False)
    tree = Tree(snapshot.manifest)
    key = tree.level(None)[0]["number"]
    star = tree.level(key)[0]["number"]
    (glob,) = tree.choose({key: False, star: True})[1]
    assert ["values/a*"] == [entry.path for entry in snapshot.entries(glob)]


# Differences


def test_a_difference_tells_counts_facts_and_the_heat_of_layers(tmp_path: Path):
    values = layers(12)
    old = Snapshot.take(tmp_path / "old", {"model": StateDict(values)}, params={"lr": 0.1}, catalog=False)
    changed = {name: tensor + (1 if ".11." in name else 0) for name, tensor in values.items()}
    new = Snapshot.take(tmp_path / "new", {"model": StateDict(changed)}, params={"lr": 0.2}, catalog=False)
    found = difference.as_json(old.diff(new, stats=True))
    assert {"added": 0, "removed": 0, "changed": 4, "same": 44} == found["counts"]
    assert ["param.lr", "0.1", "0.2"] in found["facts"]
    assert ["same"] * 11 == [line["summary"] for line in found["lines"][:11]]
    assert [["zero", "zero"]] == [[level for level, _ in line["cells"]] for line in found["lines"][11:]]
    assert {"at": 0, "names": ["query", "out"]} == found["heads"]
