"""What every client of an object store must do, on a server that works and through a proxy that breaks things.

A subclass says how its clients are opened and how its server words an error; the tests are then run for it.
"""

from __future__ import annotations

import array
import contextlib
import gc
import mmap
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from expstate.errors import ManifestTooLargeError, StorageError, StoragePermissionError
from expstate.storage.objects.client import ABSENT, ObjectClient, TransientError

from .faults import Delay, Fault, Hang, Lost, Reset, Shrink, Status, Truncate
from .proxy import FaultProxy

MIB = 1 << 20
SECRET = "CANARYCANARY-it-must-not-be-seen"  # noqa: S105 - nobody's
KEYS = [
    "folder/name.safetensors",
    "a b/c  d",
    "plus+plus/100%/%41/hash#1/quest?ion=1&2",
    "ünïcode/雪/🐍",
    "quotes'\"/semi;colon:at@/star*/[x]/{y}/tilde~/=",
]


def fails(action: Callable[[], Any], kind: type[BaseException]) -> Any:
    """The error that an action raises, which must be of this very kind and name no secret."""

    def act() -> None:
        result = action()
        if hasattr(result, "__next__"):
            list(result)

    with pytest.raises(kind) as caught:
        act()
    assert type(caught.value) is kind
    assert SECRET not in "".join(traceback.format_exception(caught.value))
    return caught.value


def interrupted(action: Callable[[], object], seconds: float = 0.5) -> None:
    """Interrupt an action of this thread after some time, as Ctrl-C does."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            action()
    finally:
        timer.join()


class ClientTests:
    """A client of a server that works."""

    keeps_write_ids = True
    compares_versions = True
    """Whether the server keeps the condition that an object has a version."""
    has_buckets = True
    makes_buckets = False
    """Whether the server makes a bucket that is written to."""
    many_objects = 1100
    """How many objects are listed: more than a server gives at once."""
    lists_missing_buckets = False
    """Whether a bucket that is not there is listed as an empty one."""
    opens_in = """
        raise NotImplementedError
    """
    """Lines of Python that make a client named ``client``; ``{options}`` and ``{bucket}`` are filled in."""

    @pytest.fixture
    def bucket(self) -> str:
        raise NotImplementedError

    @pytest.fixture
    def options(self) -> dict[str, Any]:
        """What opens the server."""
        raise NotImplementedError

    def open(self, bucket: str, options: dict[str, Any]) -> ObjectClient:
        raise NotImplementedError

    @pytest.fixture
    def client(self, bucket: str, options: dict[str, Any]) -> Iterator[ObjectClient]:
        with contextlib.closing(self.open(bucket, options)) as client:
            yield client

    # Whole objects

    @pytest.mark.parametrize("key", KEYS)
    def test_a_key_may_have_any_characters(self, client: ObjectClient, key: str) -> None:
        client.put(key, [key.encode()])
        assert client.get_whole(key)[0] == key.encode()
        assert client.head(key).key == key
        assert [info.key for info in client.list(key[:3])] == [key]
        assert list(client.folders("")) == [key.partition("/")[0]]
        assert client.copy(client, key, f"{key}-2")
        client.delete(key)
        assert [info.key for info in client.list("")] == [f"{key}-2"]

    def test_buffers_of_all_kinds_are_put_one_after_the_other(self, client: ObjectClient) -> None:
        numbers = array.array("I", range(1000))
        with mmap.mmap(-1, 3 * MIB) as memory:
            memory[:] = os.urandom(len(memory))
            view = memoryview(memory)
            buffers = [b"bytes", bytearray(b"bytearray"), b"", memoryview(numbers), view[MIB : 2 * MIB + 1], view[:0], view[5:9]]
            expected = b"".join(buffers)
            client.put("key", buffers)
            del buffers, view
            # The memory can be closed: nobody holds on to it.
        assert expected == client.get_whole("key")[0]
        assert expected[100 : 2 * MIB] == bytes(client.get("key", 100, 2 * MIB))

    def test_thousands_of_small_buffers_are_one_object(self, client: ObjectClient) -> None:
        buffers = [bytes([number % 251]) * (number % 97) for number in range(20_000)]
        client.put("key", buffers)
        assert client.get_whole("key")[0] == b"".join(buffers)

    def test_buffers_are_not_read_after_the_return(self, client: ObjectClient) -> None:
        data = bytearray(b"before" * 100_000)
        client.put("key", [data])
        data[:] = b"behind" * 100_000
        assert client.get_whole("key")[0] == b"before" * 100_000

    def test_an_object_may_be_empty(self, client: ObjectClient) -> None:
        client.put("key", [])
        assert client.head("key").size == 0
        assert client.get_whole("key")[0] == b""
        assert client.get_whole("key", 0)[0] == b""
        assert bytes(client.get("key", 0, 10)) == b""

    def test_a_range_ends_where_the_object_does(self, client: ObjectClient) -> None:
        client.put("key", [b"0123456789"])
        assert bytes(client.get("key", 0, 10)) == b"0123456789"
        assert bytes(client.get("key", 0, 1)) == b"0"
        assert bytes(client.get("key", 9, 10)) == b"9"
        assert bytes(client.get("key", 7, 100)) == b"789"
        assert bytes(client.get("key", 10, 20)) == b""
        assert bytes(client.get("key", 1000, 2000)) == b""
        assert bytes(client.get("key", 5, 5)) == b""

    def test_no_more_than_the_limit_is_read(self, client: ObjectClient) -> None:
        client.put("key", [b"0123456789"])
        assert client.get_whole("key", 10)[0] == b"0123456789"
        error = fails(lambda: client.get_whole("key", 9), ManifestTooLargeError)
        assert "key" in str(error)
        assert client.get_whole("key", 11)[0] == b"0123456789"  # and goes on after that

    def test_large_objects_come_back_as_they_were(self, client: ObjectClient) -> None:
        data = os.urandom(20 * MIB)
        client.put("key", [memoryview(data)[: 7 * MIB], memoryview(data)[7 * MIB :]])
        assert bytes(client.get("key", 0, len(data))) == data
        assert bytes(client.get("key", 3 * MIB - 1, 19 * MIB + 1)) == data[3 * MIB - 1 : 19 * MIB + 1]

    def test_what_is_known_of_an_object_is_the_same_from_everywhere(self, client: ObjectClient) -> None:
        before = time.time()
        client.put("folder/key", [b"data"])
        info = client.head("folder/key")
        assert (info.key, info.size) == ("folder/key", 4)
        assert before - 2 <= info.modified_at <= time.time() + 2
        assert info.version
        assert list(client.list("folder/")) == [info]
        assert client.get_whole("folder/key")[1] == info.version
        client.put("folder/key", [b"other"])
        assert client.head("folder/key").version != info.version

    def test_the_write_id_is_kept(self, client: ObjectClient) -> None:
        client.put("key", [b"data"], condition=ABSENT, write_id="id-of-this-write")
        assert client.write_id("key") == ("id-of-this-write" if self.keeps_write_ids else None)
        client.put("key", [b"data"])
        assert client.write_id("key") is None

    def test_what_is_not_there_is_not_found(self, client: ObjectClient) -> None:
        for action in (
            lambda: client.get("no/thing", 0, 1),
            lambda: client.get_whole("no/thing"),
            lambda: client.head("no/thing"),
            lambda: client.write_id("no/thing"),
            lambda: client.copy(client, "no/thing", "no/copy"),
        ):
            assert "no/" in str(fails(action, FileNotFoundError))
        assert list(client.list("no/")) == []
        assert list(client.folders("no/")) == []
        client.delete("no/thing")

    def test_a_bucket_that_is_not_there_is_not_found(self, options: dict[str, Any]) -> None:
        if not self.has_buckets:
            pytest.skip("every bucket is there")
        with contextlib.closing(self.open("no-such-bucket", options)) as client:
            actions: list[Callable[[], Any]] = [
                lambda: client.get("key", 0, 1),
                lambda: client.get_whole("key"),
                lambda: client.head("key"),
            ]
            if not self.makes_buckets:
                actions += [lambda: client.put("key", [b"data"]), lambda: client.put("key", [b"data"], condition=ABSENT)]
            if not self.lists_missing_buckets:
                actions += [lambda: client.list(""), lambda: client.folders("")]
            for action in actions:
                assert "no-such-bucket" in str(fails(action, FileNotFoundError))

    # Conditions

    def test_only_what_is_absent_is_created(self, client: ObjectClient) -> None:
        client.put("key", [b"first"], condition=ABSENT)
        assert "key" in str(fails(lambda: client.put("key", [b"second"], condition=ABSENT), FileExistsError))
        fails(lambda: client.put("key", [], condition=ABSENT), FileExistsError)
        fails(lambda: client.put("key", [bytes(5 * MIB)], condition=ABSENT), FileExistsError)
        assert client.get_whole("key")[0] == b"first"
        client.delete("key")
        client.put("key", [], condition=ABSENT)

    def test_of_six_threads_exactly_one_creates(self, client: ObjectClient) -> None:
        if not client.is_conditional:
            pytest.skip("this store has no conditions")
        for turn in range(10):
            barrier = threading.Barrier(6)

            def create(number: int, turn: int = turn, barrier: threading.Barrier = barrier) -> int | None:
                barrier.wait(30)
                try:
                    client.put(f"key-{turn}", [b"x" * (1 + number)], condition=ABSENT, write_id=f"id-{number}")
                except FileExistsError:
                    return None
                return number

            with ThreadPoolExecutor(6) as pool:
                winners = [number for number in pool.map(create, range(6)) if number is not None]
            assert len(winners) == 1
            assert client.head(f"key-{turn}").size == 1 + winners[0]

    def test_only_the_version_that_was_seen_is_replaced(self, client: ObjectClient) -> None:
        if not self.compares_versions:
            pytest.skip("this server does not compare versions")
        client.put("key", [b"first"])
        old = client.head("key").version
        client.put("key", [b"second"], condition=old)
        fails(lambda: client.put("key", [b"third"], condition=old), FileExistsError)
        fails(lambda: client.put("absent", [b"data"], condition=old), FileExistsError)
        assert client.get_whole("key")[0] == b"second"
        assert not list(client.list("absent"))

    def test_only_the_version_that_was_seen_is_removed(self, client: ObjectClient) -> None:
        if not self.compares_versions:
            pytest.skip("this server does not compare versions")
        client.put("key", [b"first"])
        old = client.head("key").version
        client.put("key", [b"second"])
        fails(lambda: client.delete("key", version=old), FileExistsError)
        client.delete("key", version=client.head("key").version)
        client.delete("key", version=old)  # nothing there
        assert list(client.list("")) == []

    def test_only_the_version_that_was_seen_is_read(self, client: ObjectClient) -> None:
        client.put("key", [b"first"])
        old = client.head("key").version
        assert bytes(client.get("key", 0, 5, version=old)) == b"first"
        client.put("key", [b"other"])
        fails(lambda: client.get("key", 0, 5, version=old), FileExistsError)

    # Many objects

    def test_all_objects_are_listed_at_any_depth(self, client: ObjectClient) -> None:
        keys = sorted(f"run/{number % 7}/{number:04d}" if number % 2 else f"run/{number:04d}" for number in range(self.many_objects))
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda key: client.put(key, [key.encode()]), [*keys, "run-2/x", "other"]))
        infos = list(client.list("run/"))
        assert keys == sorted(info.key for info in infos)
        assert {len(key) for key in keys} == {info.size for info in infos}
        some = [key for key in keys if key.startswith("run/01")]
        assert 0 < len(some) < len(keys)
        assert some == sorted(info.key for info in client.list("run/01"))
        assert len(keys) + 1 == len(list(client.list("run")))
        assert len(keys) + 2 == len(list(client.list("")))
        assert {"run", "run-2"} == set(client.folders(""))
        assert {str(number) for number in range(7)} == set(client.folders("run/"))
        for key in keys[:50]:
            client.delete(key)
        assert keys[50:] == sorted(info.key for info in client.list("run/"))

    def test_objects_of_others_are_seen_at_once(self, client: ObjectClient, bucket: str, options: dict[str, Any]) -> None:
        with contextlib.closing(self.open(bucket, options)) as other:
            for number in range(3):
                assert len(list(client.list(""))) == number
                other.put(f"key-{number}", [b"data"])
                assert client.head(f"key-{number}").size == 4
                assert len(list(client.list(""))) == number + 1
            other.delete("key-0")
            fails(lambda: client.head("key-0"), FileNotFoundError)
            assert len(list(client.list(""))) == 2

    def test_the_server_copies_within_its_store(self, client: ObjectClient, bucket: str, options: dict[str, Any]) -> None:
        data = os.urandom(3 * MIB)
        client.put("from here", [data], write_id="id")
        with contextlib.closing(self.open(bucket, options)) as other:
            assert other.store == client.store
            assert other.copy(client, "from here", "to/there")
            assert other.get_whole("to/there")[0] == data
        with contextlib.closing(self.open(bucket, {**options, "default_block_size": 5 * MIB})) as stranger:
            assert stranger.store != client.store
            assert not stranger.copy(client, "from here", "to/elsewhere")

    def test_a_thousand_small_calls_of_eight_threads(self, client: ObjectClient) -> None:
        def work(number: int) -> bytes:
            key = f"key-{number % 100}-{number % 8}"
            if number % 3 == 0:
                client.put(f"own-{number}", [b"data-%d" % number])
                return bytes(client.get(f"own-{number}", 5, 100))
            with contextlib.suppress(FileNotFoundError):
                client.head(key)
            client.put(key, [b"data"])
            return b"%d" % number

        with ThreadPoolExecutor(8) as pool:
            assert [b"%d" % number for number in range(400)] == list(pool.map(work, range(400)))

    # Life and death

    def test_nothing_works_after_the_end(self, client: ObjectClient) -> None:
        client.put("key", [b"data"])
        client.close()
        client.close()
        for action in (lambda: client.get("key", 0, 1), lambda: client.put("key", [b"x"]), lambda: client.list("")):
            assert "closed" in str(fails(action, StorageError))

    def test_a_client_that_is_not_closed_leaves_no_thread_and_no_warning(self, bucket: str, options: dict[str, Any]) -> None:
        before = set(threading.enumerate())
        client = self.open(bucket, options)
        client.put("key", [b"data"])
        del client
        gc.collect()
        deadline = time.monotonic() + 10
        while set(threading.enumerate()) - before and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not set(threading.enumerate()) - before

    def test_a_process_ends_though_a_client_is_open(self, bucket: str, options: dict[str, Any]) -> None:
        lines = textwrap.dedent(self.opens_in).format(bucket=bucket, options=options)
        program = f"{lines}\nclient.put('key', [b'data'])\nprint(bytes(client.get('key', 0, 9)).decode(), flush=True)\n"
        warnings = ["-W", "error", "-W", "ignore:You are using a non-supported Python version:FutureWarning"]  # of Google's packages
        done = subprocess.run([sys.executable, *warnings, "-c", program], capture_output=True, text=True, timeout=60, check=False)
        assert (done.stdout, done.stderr, done.returncode) == ("data\n", "", 0)

    def test_no_secret_is_shown(self, bucket: str, options: dict[str, Any]) -> None:
        with contextlib.closing(self.open(bucket, {**options, "password_for_nobody": SECRET})) as client:
            assert SECRET not in f"{client!r} {client} {client.url} {client.store}"
            try:
                client.put("key", [b"data"])
            except Exception as error:  # noqa: BLE001 - whatever it is
                assert SECRET not in "".join(traceback.format_exception(error))


class FaultTests:
    """A client whose server cannot be relied on. ``bucket`` and ``open`` are those of ``ClientTests``."""

    def error(self, code: int, name: str) -> Status:
        """An error as the server says it."""
        raise NotImplementedError

    def impatient(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options with which a reply is waited for a second."""
        raise NotImplementedError

    @pytest.fixture
    def proxy(self) -> FaultProxy:
        raise NotImplementedError

    @pytest.fixture
    def proxied(self, bucket: str, options: dict[str, Any], proxy: FaultProxy) -> Iterator[ObjectClient]:
        """A client whose requests go through the proxy, over a connection that has been used before."""
        with contextlib.closing(self.open(bucket, {**options, "endpoint_url": proxy.url})) as client:
            client.put("key", [b"0123456789"], write_id="id")
            proxy.requests.clear()
            yield client

    def actions(self, client: ObjectClient) -> dict[str, Callable[[], Any]]:
        """All that makes one request."""
        return {
            "put": lambda: client.put("new", [b"data"]),
            "create": lambda: client.put("new", [b"data"], condition=ABSENT, write_id="id"),
            "get": lambda: client.get("key", 0, 5),
            "get_whole": lambda: client.get_whole("key"),
            "head": lambda: client.head("key"),
            "write_id": lambda: client.write_id("key"),
            "list": lambda: client.list(""),
            "folders": lambda: client.folders(""),
            "delete": lambda: client.delete("key"),
            "copy": lambda: client.copy(client, "key", "copy"),
        }

    @pytest.mark.parametrize(
        ("code", "name", "kind", "throttled"),
        [
            (500, "InternalError", TransientError, False),
            (502, "BadGateway", TransientError, False),
            (503, "SlowDown", TransientError, True),
            (429, "TooManyRequests", TransientError, True),
            (409, "ConditionalRequestConflict", TransientError, False),
            (408, "RequestTimeout", TransientError, False),
            (403, "AccessDenied", StoragePermissionError, None),
            (401, "Unauthorized", StoragePermissionError, None),
            (404, "NoSuchBucket", FileNotFoundError, None),
            (400, "InvalidRequest", StorageError, None),
        ],
    )
    def test_each_request_is_made_once(
        self, proxied: ObjectClient, proxy: FaultProxy, code: int, name: str, kind: type[Exception], throttled: bool | None
    ) -> None:
        proxy.add(Fault(self.error(code, name)))
        for what, action in self.actions(proxied).items():
            proxy.requests.clear()
            if (what, code) == ("copy", 400) and proxied.least_part_bytes:
                assert action() is False
            elif (what, code, name) == ("delete", 404, "NoSuchBucket") and not self.tells_buckets:
                action()
            else:
                error = fails(action, kind)
                assert str(code) in str(error)
                assert throttled is None or error.throttled is throttled
            # botocore takes a HEAD that is refused so for one to a bucket of another region, and asks for that.
            assert len(proxy.requests) == 1 or (code, proxy.requests[0].method) == (400, "HEAD"), what

    tells_buckets = True

    def test_a_broken_connection_may_be_tried_again(self, proxied: ObjectClient, proxy: FaultProxy) -> None:
        for what, action in self.actions(proxied).items():
            next(proxied.list(""))  # so that the connection was used before
            fault = proxy.add(Fault(Reset()))
            proxy.requests.clear()
            fails(action, TransientError)
            assert len(proxy.requests) == 1, what
            assert fault.hits == 1
            proxy.clear()
            for info in proxied.list(""):
                assert info.key == "key"

    def test_what_the_caller_is_handling_is_not_taken_for_the_answer(self, proxied: ObjectClient, proxy: FaultProxy) -> None:
        try:
            proxied.put("key", [b"data"], condition=ABSENT)
        except FileExistsError:
            proxy.add(Fault(Reset()))
            for action in self.actions(proxied).values():
                fails(action, TransientError)
        proxy.clear()

    def test_after_a_lost_reply_the_object_is_there_and_says_who_wrote_it(self, proxied: ObjectClient, proxy: FaultProxy) -> None:
        proxy.add(Fault(Lost(), method="PUT|POST"))
        fails(lambda: proxied.put("new", [b"data"], condition=ABSENT, write_id="mine"), TransientError)
        assert len(proxy.requests) == 1
        proxy.clear()
        assert proxied.write_id("new") == "mine"
        fails(lambda: proxied.put("new", [b"data"], condition=ABSENT, write_id="mine-2"), FileExistsError)

    def test_a_server_that_says_nothing_is_not_waited_for(self, bucket: str, options: dict[str, Any], proxy: FaultProxy) -> None:
        impatient = {**self.impatient(options), "endpoint_url": proxy.url}
        with contextlib.closing(self.open(bucket, impatient)) as client:
            client.put("key", [b"0123456789"])
            proxy.add(Fault(Hang()))
            for action in (lambda: client.get("key", 0, 5), lambda: client.put("new", [bytes(8 * MIB)]), lambda: client.list("")):
                begun = time.monotonic()
                fails(action, TransientError)
                assert time.monotonic() - begun < 20
            proxy.clear()
            assert bytes(client.get("key", 0, 5)) == b"01234"

    def test_a_range_may_end_anywhere(self, proxied: ObjectClient) -> None:
        assert bytes(proxied.get("key", 7, 1 << 50)) == b"789"

    def test_fewer_bytes_than_asked_for_are_handed_on(self, proxied: ObjectClient, proxy: FaultProxy) -> None:
        proxy.add(Fault(Shrink(keep=3), method="GET"))
        assert bytes(proxied.get("key", 0, 8)) == b"012"

    def test_a_reply_that_ends_early_may_be_tried_again(self, proxied: ObjectClient, proxy: FaultProxy) -> None:
        proxy.add(Fault(Truncate(keep=3), method="GET"))
        fails(lambda: proxied.get("key", 0, 8), TransientError)
        fails(lambda: proxied.get_whole("key"), TransientError)
        fails(lambda: proxied.list(""), TransientError)
        proxy.clear()
        assert bytes(proxied.get("key", 0, 8)) == b"01234567"

    @pytest.mark.parametrize("size", [10, 32 * MIB])
    def test_nothing_appears_after_an_interrupt(self, proxied: ObjectClient, proxy: FaultProxy, size: int) -> None:
        proxy.add(Fault(Delay(1.5), method="PUT|POST"))
        interrupted(lambda: proxied.put("new", [bytes(size)], condition=ABSENT, write_id="id"))
        proxy.clear()
        time.sleep(2)
        assert [info.key for info in proxied.list("")] == ["key"]
        proxied.put("new", [bytes(size)])

    def test_an_interrupt_while_a_reply_is_waited_for_ends_at_once(self, proxied: ObjectClient, proxy: FaultProxy) -> None:
        proxy.add(Fault(Hang()))
        for action in (lambda: proxied.get("key", 0, 5), lambda: list(proxied.list("")), lambda: proxied.head("key")):
            begun = time.monotonic()
            interrupted(action, 0.3)
            assert time.monotonic() - begun < 10
        proxy.clear()
        assert bytes(proxied.get("key", 0, 5)) == b"01234"

    def test_requests_that_run_are_ended_by_close(self, proxied: ObjectClient, proxy: FaultProxy) -> None:
        proxy.add(Fault(Hang()))
        with ThreadPoolExecutor(3) as pool:
            futures = [pool.submit(proxied.get, "key", 0, 5) for _ in range(3)]
            deadline = time.monotonic() + 30
            while len(proxy.requests) < 3 and time.monotonic() < deadline:
                time.sleep(0.02)
            proxied.close()
            assert {type(future.exception(30)) for future in futures} == {StorageError}
