"""What the test of canaries runs in a process of its own: takes, searches, comparisons, failures, and everything shown that can be shown.

Gets the canaries in a file, so that nothing but what hands them over has them; the working folder is a git repository.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import traceback
import types
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import expstate
from expstate import Catalog, Snapshot, StateDict, cli, settings
from expstate.catalog import provenance
from expstate.errors import StorageError
from expstate.storage import registry
from expstate.storage.local import LocalStorage

CANARIES: dict[str, str] = {}
MADE = Path(sys.argv[2]) if __name__ == "__main__" else Path()


class KeyedStorage(LocalStorage):
    """A storage that needs a key, and whose URL has more in it than may be shown."""

    def __init__(self, rest: str, options: Mapping[str, Any]) -> None:
        name = rest.rpartition("@")[2].partition("?")[0]
        super().__init__(str(MADE / "bucket" / name.partition("/")[2]))
        self.url = f"keyed://{name}"
        self._options = dict(options)
        assert CANARIES["options"] == self._options["secret"]

    def create(self, name: str, data: bytes, *, token: str) -> None:
        if self._options.get("broken"):
            msg = "the bucket is gone"
            raise StorageError(msg)
        super().create(name, data, token=token)


def url(name: str) -> str:
    return f"keyed://{CANARIES['user']}:{CANARIES['password']}@bucket/{name}?sig={CANARIES['query']}"


def say(thing: object) -> None:
    """Where a person sees it."""
    sys.stdout.write(f"{thing}\n")


def show(thing: object) -> None:
    """All forms in which a person may get to see it."""
    say(repr(thing))
    say(str(thing))
    for name in ("_repr_html_", "to_pandas", "summary", "to_dict"):
        if callable(form := getattr(thing, name, None)):
            say(form())
    if name_values := getattr(thing, "__dict__", None):
        say([str(value) for name, value in name_values.items() if not name.startswith("_")])


def fail(action: Callable[[], object]) -> None:
    """Do what cannot work, and show why it did not, with all that led to it."""
    try:
        result = action()
    except Exception as error:
        show(error)
        traceback.print_exc()
        logging.getLogger("someone").exception("it did not work")
    else:
        show(result)


def as_notebook() -> None:
    """Look like a kernel that runs a cell with a secret in it."""
    source = f"wandb.login(key='{CANARIES['source']}')\nSnapshot.take(path, state)"
    kernel = types.SimpleNamespace(get_parent=lambda: {"metadata": {"cellId": "1"}, "content": {"code": source}})
    shell = types.SimpleNamespace(kernel=kernel, user_ns={}, execution_count=1)
    sys.modules["IPython"] = types.SimpleNamespace(get_ipython=lambda: shell)  # type: ignore[assignment]


def take_all(catalog: Catalog | str | None, folder: str) -> None:
    """Takes of every kind, and what can be done with them."""
    given: dict[str, Any] = {
        "storage_options": {"secret": CANARIES["options"]},
        "params": {"lr": 0.1, "hub_token": CANARIES["param"], "data": f"s3://k:{CANARIES['param']}@bucket/data?x={CANARIES['query']}"},
        "note": f"used password: '{CANARIES['note']}' for this one",
        "tags": [CANARIES["tag"]],
        "metrics": {"loss": 0.5},
        "catalog": catalog,
    }
    first = Snapshot.take(url(f"{folder}/one"), {"model": StateDict(w=torch.ones(3))}, **given)
    pending = Snapshot.async_take(url(f"{folder}/two"), {"model": StateDict(w=torch.zeros(3))}, **given)
    show(pending)
    second = pending.wait()
    for thing in (pending, first, second, first.metadata, first.manifest, first.verify()):
        show(thing)
    fail(lambda: first.diff(second))
    broken = given | {"storage_options": {"secret": CANARIES["options"], "broken": True}}
    fail(lambda: Snapshot.take(url(f"{folder}/three"), {"model": StateDict(w=1)}, **broken))
    fail(lambda: Snapshot.async_take(url(f"{folder}/three"), {"model": StateDict(w=1)}, **broken).wait())
    fail(lambda: Snapshot.take(url(f"{folder}/one"), {"model": StateDict(w=1)}, **given))
    fail(
        lambda: Snapshot.take(
            url(f"{folder}/four"), {"model": StateDict(w=1)}, **given | {"catalog": f"mysql://u:{CANARIES['catalog']}@h/d"}
        )
    )
    fail(lambda: Snapshot.take(url(f"{folder}/four"), {"model": StateDict(w=1)}, **given | {"params": {"a": object()}}))
    show(first.copy(MADE / f"copy-{folder}"))
    # One whose folder a catalog may open, so that edits reach it.
    show(Snapshot.take(MADE / folder / "five", {"model": StateDict(w=1)}, **given | {"storage_options": None}))


def search(catalog: Catalog) -> None:
    """Every question that a catalog answers."""
    show(catalog)
    show(catalog.place)
    for action in (
        catalog.search,
        lambda: catalog.search("loss < 1 and tag = nothing"),
        lambda: catalog.search("loss <"),
        lambda: catalog["latest"],
        lambda: catalog["nothing-like-it"],
        lambda: catalog.lineage("latest"),
        lambda: catalog.packages("latest"),
        lambda: catalog.note("latest", f"api_key = '{CANARIES['note']}'"),
        lambda: catalog.pin("latest"),
        lambda: catalog.delete("latest"),
        lambda: catalog.prune(keep_last=1),
        catalog.check,
        lambda: catalog.gc(dry_run=True),
        lambda: catalog.scan(MADE),
        lambda: Snapshot.find("latest", catalog=catalog),  # type: ignore[attr-defined]
    ):
        fail(action)


def command(*arguments: str) -> None:
    """What is typed at a terminal."""
    try:
        say(cli.main(arguments))
    except SystemExit as ended:
        say(ended.code)


def main() -> None:
    CANARIES.update(json.loads(Path(sys.argv[1]).read_text()))
    warnings.simplefilter("always")
    logging.basicConfig(level=logging.DEBUG, filename=MADE / "log.txt")
    registry.register("keyed", KeyedStorage)
    if sys.argv[3] == "notebook":
        as_notebook()

    def stumble(seen: provenance.Seen) -> None:
        show(seen)
        raise ValueError(CANARIES["gatherer"])

    provenance.register("stumbling", stumble)
    provenance.register("leaking", lambda seen: {"token": CANARIES["gatherer"], "at": f"https://{CANARIES['gatherer']}@host/"})
    show(settings.current())
    work = provenance.Gathering({})
    work.start()
    show(work)
    show(work.result())
    say(provenance.current_project())

    take_all(None, "unreachable")  # by EXPSTATE_CATALOG
    search(Catalog())
    sqlite = Catalog(MADE / "sqlite" / "catalog.db")
    take_all(sqlite, "sqlite")
    with contextlib.closing(sqlite):
        search(sqlite)
    for catalog in ("", str(MADE / "sqlite" / "catalog.db"), f"mysql://me:{CANARIES['catalog']}@host/runs"):
        with settings.override(catalog=catalog) if catalog else contextlib.nullcontext():
            for arguments in (
                ("list", "--all"),
                ("list", "--json"),
                ("show", "latest"),
                ("show", "latest", "--json"),
                ("status",),
                ("check",),
            ):
                command(*arguments)

    fail(lambda: Snapshot(url("x"), storage_options=CANARIES["options"]))  # type: ignore[arg-type]
    fail(lambda: Snapshot(MADE / "x", storage_options={"secret": CANARIES["options"]}))
    fail(lambda: Snapshot(f"other://{CANARIES['user']}:{CANARIES['password']}@bucket/x?{CANARIES['query']}"))
    fail(lambda: Snapshot(f"keyed://{CANARIES['user']}:{CANARIES['password']}@bucket/x\0"))
    fail(lambda: Catalog(f"postgresql://me:{CANARIES['catalog']}@127.0.0.1:{CANARIES['catalog']}/runs"))
    fail(lambda: Catalog(f"postgresql://me:{CANARIES['catalog']}@127.0.0.1/runs\0"))
    fail(lambda: Catalog(f"postgresql://me:{CANARIES['catalog']}/x@127.0.0.1:1/runs"))
    fail(lambda: Catalog(f"postgresql://me@127.0.0.1:1/runs?password={CANARIES['catalog']}").search())
    fail(lambda: Catalog(f"oracle://me:{CANARIES['catalog']}@host/runs"))
    fail(lambda: Catalog(f"sqlite:///runs?password={CANARIES['catalog']}"))
    fail(lambda: expstate.gc(MADE / "bucket"))


if __name__ == "__main__":
    main()
