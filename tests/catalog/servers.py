"""A PostgreSQL server of the tests' own: made from the system's packages in a folder of its own, on loopback, without durability."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path

USER = "expstate"
PASSWORD = "CANARY-of-the-server"  # noqa: S105 - of a server that lives for some seconds on loopback
_SECONDS = 60
_SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "shared_buffers": "16MB",
    "max_connections": "60",
    "autovacuum": "off",
    "log_min_messages": "fatal",
}


def programs() -> Path | None:
    """The folder of the newest PostgreSQL that Debian's packages have installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else None


class PostgresServer:
    """A server with nothing in it; it ends with the thread that has made it."""

    def __init__(self, bin_folder: Path) -> None:
        self._bin = bin_folder
        # Not below pytest's folder: that one is closed to the user that the server runs as.
        self._folder = Path(tempfile.mkdtemp(prefix="expstate-postgres-"))
        self._as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--init-groups"] if os.geteuid() == 0 else []
        if self._as_user:
            shutil.chown(self._folder, "postgres", "postgres")
        password = self._folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        self._run(
            "initdb", *("-D", "data", "-U", USER), "--auth=scram-sha-256", f"--pwfile={password}", "-E", "UTF8", "--locale=C", "--no-sync"
        )
        self._numbers = itertools.count()
        self._process: subprocess.Popen[bytes] | None = None
        self.port = _free_port()
        self.start()

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [*self._as_user, str(self._bin / program), *arguments], cwd=self._folder, capture_output=True, check=False, timeout=_SECONDS
        )
        assert done.returncode == 0, done.stderr.decode()

    def start(self) -> None:
        """Start it, on the port that it had before, and wait until it answers."""
        settings = [item for name, value in _SETTINGS.items() for item in ("-c", f"{name}={value}")]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    *(self._as_user or ["setpriv"]),
                    "--pdeathsig=INT",
                    str(self._bin / "postgres"),
                    *("-D", str(self._folder / "data"), "-p", str(self.port), *settings),
                ],
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        until = time.monotonic() + _SECONDS
        while True:
            with contextlib.suppress(Exception):
                return self.execute("SELECT 1")
            assert self._process.poll() is None, (self._folder / "log").read_text()
            assert time.monotonic() < until, "the server does not answer"
            time.sleep(0.02)

    def stop(self, how: signal.Signals = signal.SIGQUIT) -> None:
        """Stop it; SIGQUIT is ``-m immediate``: connections break, and the next start recovers."""
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(_SECONDS)
            self._process = None

    def restart(self) -> None:
        """Stop it at once and start it again."""
        self.stop()
        self.start()

    def execute(self, statement: str, database: str = "postgres") -> None:
        """Run a statement outside any transaction."""
        import psycopg

        with psycopg.connect(self._url("postgresql", database), autocommit=True, connect_timeout=_SECONDS) as connection:
            connection.execute(statement)  # type: ignore[call-overload]

    def new_database(self, template: str = "template0") -> str:
        """Make a database; its URL."""
        name = f"test_{next(self._numbers)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return self._url("postgresql+psycopg", name)

    def drop_database(self, url: str) -> None:
        """Remove a database, whoever is connected to it."""
        self.execute(f"DROP DATABASE IF EXISTS {url.rpartition('/')[2]} WITH (FORCE)")

    def _url(self, scheme: str, database: str) -> str:
        return f"{scheme}://{USER}:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def close(self) -> None:
        """Stop it and remove its folder."""
        self.stop()
        shutil.rmtree(self._folder)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
