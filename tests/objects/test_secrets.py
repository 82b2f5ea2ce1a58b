"""What opens a bucket is in no object, no file, no record and no word that comes of using it (H28)."""

from __future__ import annotations

import contextlib
import logging
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from expstate import Catalog, Snapshot, StateDict, cli, configure, errors, gc, settings
from expstate.storage.options import options_of
from expstate.storage.registry import open_storage

from .client_tests import SECRET as CANARY
from .faults import Fault, Reset, Status
from .servers import SECRET
from .stores import Store, few


class Seen:
    """All that a person could see, or find later."""

    def __init__(self, root: Path, caplog: pytest.LogCaptureFixture) -> None:
        self.root = root
        self._caplog = caplog
        self._texts: dict[str, str] = {}

    def show(self, what: str, thing: object) -> None:
        forms = [repr(thing), str(thing)]
        forms += [str(form()) for name in ("_repr_html_", "summary", "to_pandas") if callable(form := getattr(thing, name, None))]
        self._texts[what] = "\n".join(forms)

    def fail(self, what: str, act: Callable[[], object]) -> None:
        """Do what cannot work, and keep all that is said of it."""
        with pytest.raises((errors.ExpstateError, FileNotFoundError)) as caught:
            act()
        self._texts[what] = "".join(traceback.format_exception(caught.value)) + repr(caught.value)

    def holding(self, *secrets: str) -> list[str]:
        """Where one of these is."""
        places = {what: text.encode() for what, text in self._texts.items()}
        places |= {str(path): path.read_bytes() for path in self.root.rglob("*") if path.is_file()}
        places["log"] = self._caplog.text.encode()
        return [place for place, data in places.items() if any(secret.encode() in data for secret in secrets)]


@pytest.fixture
def seen(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Seen:
    caplog.set_level(logging.DEBUG, logger="expstate")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return Seen(tmp_path, caplog)


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    with contextlib.closing(Catalog(tmp_path / "catalog" / "catalog.db")) as opened:
        yield opened


def secret_options(store: Store) -> tuple[dict[str, Any], str]:
    """What opens the store, with a secret in it that the server wants or gets, and that secret."""
    if store.root.startswith("s3"):
        return store.options, SECRET
    import google.oauth2.credentials

    return store.options | {"token": google.oauth2.credentials.Credentials(CANARY)}, CANARY


def test_options_are_in_nothing_that_a_take_leads_to(store: Store, seen: Seen, catalog: Catalog, tmp_path: Path) -> None:
    options, secret = secret_options(store)
    url, state = store.new(), few(1)
    configure(storage_options={store.root: options})
    given: dict[str, Any] = {"catalog": catalog, "name": "run", "params": {"data": store.root}}
    taken = Snapshot.take(url, state, storage_options=options, **given)
    pending = Snapshot.async_take(f"{url}-2", few(2), storage_options=options, **given)
    second = pending.wait()
    copied = taken.copy(tmp_path / "copy", catalog=catalog)
    again = copied.copy(f"{url}-3", storage_options=options, catalog=catalog)
    found = Snapshot.find(taken.id, catalog=catalog, storage_options=options)
    found.restore(few(3))
    shown = (taken, pending, second, copied, again, found, taken.metadata, taken.manifest, taken.verify(), taken.diff(second))
    for number, thing in enumerate(shown):
        seen.show(str(number), thing)
    for number, act in enumerate((catalog.search, lambda: catalog["run"], catalog.status, catalog.check, lambda: catalog.gc(dry_run=True))):
        seen.show(f"catalog {number}", act())
    seen.show("scan", Catalog(tmp_path / "rebuilt.db").scan(url.rpartition("/")[0], storage_options=options))
    seen.show("gc", gc(url))
    storage = store.storage(url)
    seen.show("storage", storage)
    seen.show("client", storage.client)
    seen.show("settings", settings.current())
    folder = tmp_path / "objects"
    folder.mkdir()
    for info in storage.client.list(url.rpartition("/")[0].partition("://")[2].partition("/")[2]):
        (folder / info.key.replace("/", "_")).write_bytes(storage.client.get_whole(info.key)[0])

    assert len(list(folder.iterdir())) >= 6
    assert secret in str(store.options) or secret == CANARY
    assert [] == seen.holding(secret)


@pytest.mark.parametrize("broken", ["refused", "nobody", "repeats", "reset", "wrong"])
def test_options_are_in_no_word_of_what_fails(store: Store, seen: Seen, catalog: Catalog, tmp_path: Path, broken: str) -> None:
    """Whether nobody answers, the keys are wrong, or a server says again what it was told."""
    options, secret = secret_options(store)
    url = store.new()
    here = Snapshot.take(tmp_path / "here", few(1), catalog=catalog)
    if broken == "refused":
        store.proxy.add(Fault(Status(403, b"<Error><Code>AccessDenied</Code></Error>")))
    elif broken == "repeats":
        said = f"the key {secret} of http://me:{secret}@host/x?X-Amz-Signature={secret} does not fit".encode()
        store.proxy.add(Fault(Status(400, b"<Error><Code>InvalidRequest</Code><Message>" + said + b"</Message></Error>")))
    elif broken == "reset":
        store.proxy.add(Fault(Reset()))
    elif broken == "nobody":
        options = options | {"endpoint_url": "http://127.0.0.1:9"}
    elif store.root.startswith("s3"):
        options, secret = options | {"secret": CANARY}, CANARY
    else:
        options = options | {"endpoint_url": f"http://me:{secret}@127.0.0.1:9"}
    configure(storage_options={store.root: options})
    with settings.override(retry_seconds=0.2):
        acts: dict[str, Callable[[], object]] = {
            "take": lambda: Snapshot.take(url, few(1), storage_options=options, catalog=catalog),
            "async_take": lambda: Snapshot.async_take(url, few(1), storage_options=options, catalog=catalog).wait(),
            "open": lambda: Snapshot(url, storage_options=options).keys(),
            "restore": lambda: Snapshot(url, storage_options=options).restore(few(2)),
            "find": lambda: Snapshot.find(url, catalog=catalog, storage_options=options),
            "copy": lambda: here.copy(url, storage_options=options, catalog=catalog),
            "gc": lambda: gc(url),
        }
        for what, act in acts.items():
            seen.fail(what, act)
        with contextlib.suppress(errors.ExpstateError):
            seen.show("scan", catalog.scan(url, storage_options=options))
        seen.show("records", catalog.search(project="*"))
        seen.show("snapshot", Snapshot(url, storage_options=options))

    assert [] == seen.holding(secret)


URLS = [
    "s3://AKIDEXAMPLE:{secret}@bucket/run",
    "s3://{secret}@bucket/run",
    "s3://bucket/run?X-Amz-Credential=AKIDEXAMPLE&X-Amz-Signature={secret}",
    "s3a://me:{secret}@bucket/run",
    "gs://{secret}@bucket/run",
    "gcs://bucket/run?X-Goog-Signature={secret}",
    "https://bucket.s3.amazonaws.com/run?X-Amz-Signature={secret}",
    "https://me:{secret}@storage.googleapis.com/bucket/run",
    "simplecache::s3://me:{secret}@bucket/run",
    "nowhere://me:{secret}@host/run?sig={secret}",
    "file://me:{secret}@host/run",
    "s3://me:{secret}@",
]


@pytest.mark.parametrize("url", URLS)
def test_a_url_with_credentials_is_refused_and_shown_without_them(
    seen: Seen, catalog: Catalog, tmp_path: Path, capsys: pytest.CaptureFixture[str], url: str
) -> None:
    """In its user info or its query, as presigned URLs have it; whatever it is given to."""
    url = url.format(secret=CANARY)
    here = Snapshot.take(tmp_path / "here", few(1), catalog=catalog)
    acts: dict[str, Callable[[], object]] = {
        "open": lambda: Snapshot(url).keys(),
        "take": lambda: Snapshot.take(url, few(1), catalog=catalog),
        "async_take": lambda: Snapshot.async_take(url, few(1), catalog=catalog).wait(),
        "find": lambda: Snapshot.find(url, catalog=catalog),
        "find without a catalog": lambda: Snapshot.find(url, catalog=False),
        "ref": lambda: catalog[url],
        "copy": lambda: here.copy(url, catalog=catalog),
        "scan": lambda: catalog.scan(url),
        "gc": lambda: gc(url),
        "delete": lambda: catalog.delete(url),
        "storage": lambda: open_storage(url),
    }
    for what, act in acts.items():
        seen.fail(what, act)
    for verb in ("show", "verify", "delete", "scan", "gc", "copy"):
        rest = [str(tmp_path / "copy")] if verb == "copy" else []
        assert cli.main([verb, url, *rest]) != 0
    seen.show("records", catalog.search(project="*"))
    seen.show("printed", "".join(capsys.readouterr()))

    assert [] == seen.holding(CANARY)


def test_what_was_configured_is_not_shown_by_what_asks_for_it(seen: Seen) -> None:
    """Options that belong to a URL are found by it, and its own secrets are not needed for that."""
    configure(storage_options={"s3://bucket": {"key": "k", "secret": CANARY}})
    assert CANARY == options_of("s3://bucket/run", None)["secret"]
    for wrong in ({"s3://bucket": CANARY}, {"s3://bucket": [CANARY]}, {CANARY: {}}, [CANARY]):
        seen.fail(str(type(wrong)), lambda wrong=wrong: configure(storage_options=wrong))
    seen.fail("local", lambda: Snapshot("run", storage_options={"secret": CANARY}))
    configure(storage_options={"s3://bucket": {}})

    assert [] == seen.holding(CANARY)


def test_the_search_would_find_a_secret(seen: Seen, tmp_path: Path) -> None:
    """It is the user's own where they put it: into a value of the state."""
    Snapshot.take(tmp_path / "mine", {"mine": StateDict(text=CANARY, weight=torch.ones(2))})

    assert [str(tmp_path / "mine" / "snapshot.json")] == seen.holding(CANARY)
