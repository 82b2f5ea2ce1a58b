"""A take to an object store that is killed at any of its requests is whole or not there, and gc removes what it left."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from expstate import Snapshot, StateDict, errors, gc, settings
from expstate.engine.lease import LEASE_SECONDS
from expstate.storage.objects.storage import ObjectStorage
from tests.campaign import Campaign

from .stores import MIB, Store, files

# Imports once what a take needs, and forks a process for each of them: that costs a tenth of starting one.
_TAKERS = """
import json, os, signal, sys, threading
import torch
from expstate import Snapshot, StateDict, configure, settings
from expstate.storage.objects import gcsfs, obstore, s3fs, storage as objects

root, options, transport, shape, count, base = json.loads(sys.argv[1])
configure(storage_options={root: options})
state = {"model": StateDict(**{f"w{n}": torch.full(shape, float(n)) for n in range(count)})}

def kill_at(stop):
    passed = 0
    lock = threading.Lock()
    def step():
        nonlocal passed
        with lock:
            passed += 1
            if passed == stop:
                os.kill(os.getpid(), signal.SIGKILL)
    persist = objects.persist
    def call(what, action):
        step()  # the server knows nothing of this request
        result = persist(what, action)
        step()  # it has done what it was asked for
        return result
    objects.persist = call

for line in sys.stdin:
    url, stop = json.loads(line)
    pid = os.fork()
    if pid == 0:
        kill_at(stop)
        with settings.override(object_file_bytes=2**20, transport=transport):
            Snapshot.take(url, state, catalog=False, base=base)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Takers:
    """Takes in processes of their own."""

    def __init__(self, store: Store, transport: str, shape: tuple[int, ...], count: int, base: str | None = None) -> None:
        self.in_parts = shape[0] == 1
        self.shape = shape
        self.count = count
        # Past the proxy, which would know more of a killed one's requests than a server does.
        given = json.dumps([store.root, store.direct, transport, shape, count, base])
        self._process = subprocess.Popen([sys.executable, "-c", _TAKERS, given], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def take(self, url: str, stop: int) -> int:
        """Take, and be killed at a point counted from 1; gives the exit status."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([url, stop]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def uploads(storage: ObjectStorage) -> list[str]:
    return [upload.key for upload in storage.client.uploads(f"{storage.prefix}/")]


def check_killed(store: Store, takers: Takers, campaign: Campaign, every: int = 1) -> None:
    """Kill a take at each point, or every so many, and look at what is there then, and after gc."""
    campaign.count("visible halves", 0)
    campaign.count("leftovers after gc", 0)
    seen = set()
    had_files = had_uploads = False
    for stop in itertools.count(every, every):
        url = store.new()
        ended = takers.take(url, stop)
        try:
            found = Snapshot(url).get_state_dict_for_key("model")
        except errors.SnapshotNotFoundError:
            is_whole = False
        else:
            is_whole = True
            assert Snapshot(url).verify().ok
            assert all(torch.equal(torch.full(takers.shape, float(n)), found[f"w{n}"]) for n in range(takers.count))
        if ended == 0:
            break
        assert -signal.SIGKILL == ended
        seen.add(is_whole)
        storage = store.storage(url)
        had_files |= not is_whole and len(files(url)) > 1
        had_uploads |= bool(uploads(storage))
        gc(url)
        # A request that the server was still busy with may leave a data file after that, which nothing leads to.
        assert ["snapshot.json"] * is_whole == [name for name in files(url) if not name.endswith(".safetensors")]
        # What is taken for a lease or an upload of two days ago then is one of now.
        ahead = storage.clock() + 2 * LEASE_SECONDS
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ObjectStorage, "clock", lambda _, ahead=ahead: ahead)
            gc(url)
        assert [] == uploads(storage)
        campaign.tried()

    assert is_whole
    assert stop >= 15
    assert {False, True} == seen or every > 1
    assert had_files or takers.in_parts
    assert had_uploads == takers.in_parts


@pytest.fixture
def takers(store: Store, request: pytest.FixtureRequest) -> Iterator[Takers]:
    """Takes of several small data files, in each of the ways."""
    started = Takers(store, settings.current().transport, (200_000,), 6)
    yield started
    started.close()


KILLED = pytest.mark.campaign("All or nothing", "SIGKILL at each request to an object store")


@KILLED
@pytest.mark.slow
def test_a_take_that_is_killed_at_any_request_is_whole_or_not_there(store: Store, takers: Takers, campaign: Campaign) -> None:
    check_killed(store, takers, campaign)


@KILLED
@pytest.mark.slow
def test_an_incremental_take_that_is_killed_at_any_request_is_whole_or_not_there(store: Store, campaign: Campaign) -> None:
    """What it has from its base stays there, whatever becomes of it."""
    state = {"model": StateDict(**{f"w{n}": torch.full((200_000,), float(n if n < 4 else -n)) for n in range(6)})}
    base = Snapshot.take(store.new(), state)
    takers = Takers(store, settings.current().transport, (200_000,), 6, base.path)
    try:
        check_killed(store, takers, campaign, every=campaign.choose(8, 1))
    finally:
        takers.close()
    assert base.verify().ok


@KILLED
@pytest.mark.slow
def test_a_take_in_parts_that_is_killed_at_any_request_is_whole_or_not_there(s3: Store, campaign: Campaign) -> None:
    """The parts of an upload that nobody will end are thrown away when they are old."""
    with settings.override(transport="fsspec"):
        takers = Takers(s3, "fsspec", (1, 3 * MIB), 1)
        try:
            check_killed(s3, takers, campaign)
        finally:
            takers.close()
