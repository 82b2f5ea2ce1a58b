"""Tab after ``%snapshot`` offers what may come there, and nothing else, however the catalog fares."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Catalog, Snapshot, StateDict
from expstate.catalog.vocabulary import vocabulary
from expstate.engine import ancestry
from expstate.engine.take import Take
from expstate.errors import CatalogCorruptError
from expstate.notebook import complete
from expstate.notebook.complete import Completer
from expstate.notebook.kernel import Kernel
from expstate.notebook.verbs import TABLE

from .kernels import Kernel as RealKernel
from .shells import Shell


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EXPSTATE_CATALOG", str(tmp_path / "catalog.db"))
    monkeypatch.setenv("EXPSTATE_PROJECT", "tests")
    # The machine may be busy; tests of what is slow have a shorter one.
    monkeypatch.setattr(complete, "WAIT_SECONDS", 30)
    ancestry.forget()
    yield
    ancestry.forget()


def make(**more: Any) -> Kernel:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    found = {"model": model, "losses": [1.0], "lr": 0.1, "_hidden": 1, "torch": torch, "make": make}
    return Kernel(Shell(is_driven=False, **(found | more)))


def offered(kernel: Kernel, line: str) -> list[str]:
    found = Completer(kernel).complete(line)
    assert found is not None, line
    word, completions = found
    assert line.endswith(word)
    return completions


@pytest.fixture
def kernel() -> Kernel:
    """A kernel with two snapshots."""
    kernel = make()
    kernel.take(["model", "lr"], name="first", tags=["a-tag", "with space"], metrics={"loss": 0.5}, params={"width": 3})
    kernel.take(["model"], alias="best", metrics={"accuracy": 0.9})
    return kernel


# Verbs and options


def test_verbs_are_offered() -> None:
    kernel = make()

    assert [*(verb.name for verb in TABLE), "help"] == offered(kernel, "%snapshot ")
    assert ["restore", "redo", "read"] == offered(kernel, "%snapshot re")
    assert ["take", "tag"] == offered(kernel, "x = %snapshot ta")
    assert ["take", "guard"] == offered(kernel, "%%snapshot ")
    assert ["take", "tag"] == offered(kernel, "%snapshot help ta")
    assert [] == offered(kernel, "%snapshot nonsense ")


def test_options_of_the_verb_are_offered_after_a_dash() -> None:
    kernel = make()

    assert ["--dry-run"] == offered(kernel, "%snapshot restore latest --d")
    assert ["-m", "--note", "-t", "--tag", "--metric"] == offered(kernel, "%snapshot take model -")[:5]
    assert ["-h", "--help"] == offered(kernel, "%snapshot wait -")
    assert ["--every", "--keep-last", "--off"] == offered(kernel, "%snapshot watch model --")[:3]
    assert ["cell", "10m", "50steps"] == offered(kernel, "%snapshot watch model --every ")


@pytest.mark.parametrize(
    "line", ["model", "%snapshot", "%snap", "%timeit %snapshot ", "snapshot take ", "a % snapshot ", "%snapshot take -m 'half a", ""]
)
def test_other_lines_are_left_to_others(line: str) -> None:
    assert Completer(make()).complete(line) is None


# Names of the notebook


def test_names_of_the_notebook_are_offered_and_registered_ones_first() -> None:
    kernel = make()
    assert ["model", "losses", "lr"] == offered(kernel, "%snapshot take ")
    kernel.registry.add(kernel.namespace, {"lr": 0.1})

    assert ["lr", "model", "losses"] == offered(kernel, "%snapshot guard ")
    assert ["losses", "lr"][::-1] == offered(kernel, "%%snapshot take model l")
    assert ["model"] == offered(kernel, "%snapshot take --wait --note words mo")


def test_after_a_dot_comes_what_the_object_holds_and_no_code_is_run() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.model = torch.nn.Linear(1, 1)
            self.best = 3

        @property
        def explosive(self) -> None:
            raise AssertionError

        def __getattr__(self, name: str) -> Any:
            raise AssertionError(name)

    kernel = make(trainer=Trainer())

    assert ["trainer.model", "trainer.best"] == offered(kernel, "%snapshot take trainer.")
    assert ["trainer.model.weight"] == offered(kernel, "%snapshot take trainer.model.w")
    assert ["model.0", "model.1"] == [name for name in offered(kernel, "%snapshot take model.") if name[-1].isdigit()]
    assert [] == offered(kernel, "%snapshot take nothing.at.all.")


# What the catalog knows


def test_refs_are_offered_where_they_may_stand(kernel: Kernel) -> None:
    newest, oldest = (record.id[:8] for record in kernel.catalog.search())
    expected = ["latest", "latest~1", "best", "first", newest, oldest]

    for line in ("%snapshot restore ", "%snapshot show ", "%snapshot restore -n --include x ", "%snapshot delete latest "):
        assert expected == offered(kernel, line)
    assert ["best"] == offered(kernel, "%snapshot pin bes")
    assert ["live", *expected, "model"] == offered(kernel, "%snapshot diff --stats best ")[:8]
    assert [newest] == offered(kernel, f"%snapshot restore {newest[:5]}")


def test_keys_of_the_snapshot_are_offered_after_its_ref(kernel: Kernel) -> None:
    assert ["model", "lr", "rng_state"] == offered(kernel, "%snapshot restore first ")
    assert ["lr"] == offered(kernel, "%snapshot restore --atomic first model l")
    assert ["model", "rng_state"] == offered(kernel, "%snapshot diff latest best ")[:2]
    assert [] == offered(kernel, "%snapshot restore nothing-of-this-name ")


def test_entries_of_the_snapshot_are_offered(kernel: Kernel) -> None:
    assert ["first/model/0.weight", "first/model/0.bias"] == offered(kernel, "%snapshot show first/model/0.")
    keys = [entry for entry in offered(kernel, "%snapshot show first/") if entry.count("/") == 1]
    assert ["first/model", "first/lr", "first/rng_state"] == keys
    assert ["model/1.weight", "model/1.bias"] == offered(kernel, "%snapshot restore best --include model/1")
    assert ["model/0.weight"] == offered(kernel, "%snapshot read best model/0.w")
    assert [] == offered(kernel, "%snapshot restore --include ")


def test_tags_metrics_and_params_are_offered(kernel: Kernel) -> None:
    assert ["a-tag"] == offered(kernel, "%snapshot take model --tag ")
    assert ["a-tag"] == offered(kernel, "%snapshot untag first ")
    assert ["accuracy", "loss"] == offered(kernel, "%snapshot take model --metric ")
    assert ["width"] == offered(kernel, "%snapshot take model --param ")
    assert ["loss"] == offered(kernel, "%snapshot metric best lo")
    assert ["best"] == offered(kernel, "%snapshot unalias ")
    assert ["accuracy", "age", "alias"] == sorted(offered(kernel, "%snapshot list --sort a"))
    assert ["width", "world_size", "written"] == sorted(offered(kernel, "%snapshot list loss < 0.2 and w"))


def test_words_of_other_projects_are_not_offered(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPSTATE_PROJECT", "another")

    assert ["latest", "latest~1"] == offered(kernel, "%snapshot restore ")
    assert [] == offered(kernel, "%snapshot take --metric ")
    assert {"id", "name", "alias", "tag", "metric", "param", "field"} == set(vocabulary(kernel.catalog))


def test_a_take_that_goes_on_is_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, may_end, commit = make(), threading.Event(), Take.commit

    def slowly(take: Take) -> Any:
        may_end.wait(30)
        return commit(take)

    monkeypatch.setattr(Take, "commit", slowly)
    pending = Snapshot.async_take(tmp_path / "pending", {"state": StateDict(x=1)}, name="going-on")
    found = offered(kernel, "%snapshot restore ")
    may_end.set()
    pending.wait()

    assert ["going-on", pending.id[:8]] == found[2:]


# A catalog that is in trouble


def test_a_slow_catalog_is_not_waited_for_and_its_words_come_when_they_are_there(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(complete, "WAIT_SECONDS", 0)
    begun, may_answer = threading.Event(), threading.Event()
    asked: list[threading.Thread] = []

    def slowly(catalog: Catalog) -> dict[str, tuple[str, ...]]:
        asked.append(threading.current_thread())
        begun.set()
        may_answer.wait(30)
        return vocabulary(catalog)

    monkeypatch.setattr("expstate.catalog.vocabulary.vocabulary", slowly)
    completer = Completer(kernel)
    signs = ("", ["latest", "latest~1"])
    assert [signs] * 3 == [completer.complete("%snapshot restore ") for _ in range(3)]
    assert begun.wait(30)
    (thread,) = asked
    may_answer.set()
    thread.join()
    found = completer.complete("%snapshot restore bes")

    assert ("bes", ["best"]) == found


def test_a_broken_catalog_offers_what_is_known_without_it(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    completer = Completer(kernel)
    before = completer.complete("%snapshot restore ")

    def fail(_: Catalog) -> None:
        raise CatalogCorruptError

    monkeypatch.setattr("expstate.catalog.vocabulary.vocabulary", fail)
    assert ["latest", "latest~1"] == offered(kernel, "%snapshot restore ")
    assert before == completer.complete("%snapshot restore ")
    assert ["model"] == offered(kernel, "%snapshot take mo")


@pytest.mark.parametrize("trouble", ["off", "no database", "a folder"])
def test_without_a_catalog_verbs_and_names_are_offered(trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").write_text("no database")
    monkeypatch.setenv("EXPSTATE_CATALOG", {"off": "off", "no database": str(tmp_path / "text"), "a folder": str(tmp_path)}[trouble])
    kernel = make()

    assert ["restore"] == offered(kernel, "%snapshot rest")
    assert ["latest", "latest~1"] == offered(kernel, "%snapshot restore ")
    assert [] == offered(kernel, "%snapshot restore latest ")


# In a real kernel

SETUP = """
%load_ext expstate
import torch
model = torch.nn.Linear(3, 2)
p = %snapshot take model --name first --alias best -t good --metric loss=0.5 --wait
from expstate.notebook import complete
complete.WAIT_SECONDS = 30
"""


def test_tab_in_a_notebook_offers_just_that(kernel_with_snapshot: RealKernel) -> None:
    tab = kernel_with_snapshot.complete

    assert ["take", "tag"] == tab("%snapshot ta")
    assert ["latest", "latest~1", "best", "first"] == tab("%snapshot restore ")[:4]
    assert ["best"] == tab("x = %snapshot restore bes")
    assert ["model", "rng_state"] == tab("%snapshot restore best ")
    assert ["best/model/weight"] == tab("%snapshot show best/model/w")
    assert ["--metric"] == tab("%snapshot take model --me")
    assert ["good"] == tab("%snapshot take model --tag ")
    assert ["loss"] == tab("%snapshot take model --metric ")
    assert ["take", "guard"] == tab("%%snapshot ")
    assert ["latest~1"] == tab("1 + 1\n%snapshot restore latest~")


def test_tab_elsewhere_is_as_it_was(kernel_with_snapshot: RealKernel) -> None:
    tab = kernel_with_snapshot.complete

    assert "model" in tab("mod")
    assert any("weight" in found for found in tab("%%snapshot take model\nmodel.wei"))
    assert "%%snapshot" in tab("%%snap")


def test_after_unloading_nothing_is_offered(start_kernel: Callable[..., RealKernel]) -> None:
    kernel = start_kernel()
    kernel.do("%load_ext expstate\n%unload_ext expstate")

    assert "take" not in kernel.complete("%snapshot ta")


@pytest.fixture(scope="module")
def kernel_with_snapshot(shared_kernel: RealKernel) -> RealKernel:
    shared_kernel.do(SETUP)
    return shared_kernel
