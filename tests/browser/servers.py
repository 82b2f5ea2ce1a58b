"""A Jupyter server of the tests' own: JupyterLab, Notebook 7 and Voila on loopback, in a folder that holds all that they write."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path

import nbformat

from tests.notebook.kernels import environment

_SECONDS = 60
# Each notebook has a catalog of its own, in its own folder.
_STARTUP = """
import os
os.environ["EXPSTATE_CATALOG"] = os.path.join(os.getcwd(), ".catalog", "catalog.db")
"""


class JupyterServer:
    """A server with JupyterLab, Notebook 7 and Voila; it ends with the thread that has made it, and its kernels with it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "notebooks"
        self.root.mkdir(parents=True)
        self.token = secrets.token_hex(16)
        self._log = folder / "server.log"
        self._number = 0
        env = environment(folder)
        _write(Path(env["IPYTHONDIR"], "profile_default", "startup", "00-catalog.py"), _STARTUP)
        config = Path(env["JUPYTER_CONFIG_DIR"])
        # Neither asks whether there is news or a newer version.
        _write(config / "labconfig" / "page_config.json", {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}})
        # All cells are in the page, also those out of sight.
        _write(
            config / "labconfig" / "default_setting_overrides.json", {"@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"}}
        )
        self.port = _free_port()
        command = [
            *("setpriv", "--pdeathsig=TERM", sys.executable, "-m", "jupyter", "lab"),
            *("--ip=127.0.0.1", f"--port={self.port}", "--ServerApp.port_retries=0", "--no-browser", "--allow-root"),
            *(f"--IdentityProvider.token={self.token}", f"--ServerApp.root_dir={self.root}"),
            *("--LabApp.expose_app_in_browser=True", "--JupyterNotebookApp.expose_app_in_browser=True"),
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
            "--VoilaConfiguration.show_tracebacks=True",
        ]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, env=env, cwd=folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self._wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _wait(self) -> None:
        until = time.monotonic() + _SECONDS
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            assert self._process.poll() is None, self.log
            assert time.monotonic() < until, f"the server does not answer\n{self.log}"
            time.sleep(0.1)

    @property
    def log(self) -> str:
        """What the server has said."""
        return self._log.read_text()

    def write(self, cells: list[str]) -> Path:
        """Write a notebook with these cells of code into a new folder."""
        self._number += 1
        folder = self.root / f"test-{self._number}"
        folder.mkdir()
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell, id=f"cell-{n}") for n, cell in enumerate(cells)])
        notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
        nbformat.write(notebook, folder / "lesson.ipynb")
        return folder / "lesson.ipynb"

    def close(self) -> None:
        """End it, by its own id; it ends its kernels."""
        self._process.terminate()
        try:
            self._process.wait(_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _write(path: Path, content: str | dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
