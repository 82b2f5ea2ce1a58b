"""No secret that expstate comes across is in any byte that it produces.

A canary is put wherever secrets may be: a process of its own takes, searches, compares and fails with them, and everything that it wrote or
said is searched. What a person types as a tag is theirs: that canary is found, so the search would find the others.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from .repositories import ENVIRONMENT, git

ROOT = Path(__file__).parents[2]
NAMES = [
    *("options", "user", "password", "query", "catalog", "remote", "argv", "environment", "source", "diff", "param", "note", "gatherer"),
]


def forms(canary: str) -> Iterator[bytes]:
    """The canary as it may stand in bytes: plain, in UTF-16, in hexadecimal digits, in base64 at any place."""
    data = canary.encode()
    yield data
    yield canary.encode("utf-16-le")
    yield data.hex().encode()
    for shift in range(3):
        # Characters that depend on what is before or after it are left out.
        yield base64.b64encode(b"\0" * shift + data)[4 if shift else 0 : -4]


@dataclass(frozen=True, slots=True)
class Produced:
    """Everything that one process wrote and said, by where."""

    canaries: dict[str, str]
    places: dict[str, bytes]

    def holding(self, name: str) -> list[str]:
        """Where a canary is."""
        return [place for place, data in self.places.items() if any(form in data for form in forms(self.canaries[name]))]


@pytest.fixture(scope="module", params=["script", "notebook"])
def produced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Produced:
    mode: str = request.param
    folder = tmp_path_factory.mktemp(mode)
    repository, made = folder / "repository", folder / "made"
    made.mkdir()
    canaries = {name: f"{name}Zq7v3{os.urandom(6).hex()}" for name in [*NAMES, "tag"]}
    (folder / "canaries.json").write_text(json.dumps(canaries))
    git("init", "-q", str(repository))
    git(
        "remote",
        "add",
        "origin",
        f"https://me:{canaries['remote']}@git.example.org/team/resnet.git?{canaries['remote']}",
        folder=repository,
    )
    (repository / "train.py").write_text("lr = 0.1\n")
    git("add", ".", folder=repository)
    git("commit", "-q", "-m", "first", folder=repository)
    (repository / "train.py").write_text(f'api_key = "{canaries["diff"]}"\n')
    given = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    variables = {
        "EXPSTATE_CATALOG": f"postgresql+psycopg://me:{canaries['catalog']}@127.0.0.1:1/runs?application_name={canaries['catalog']}",
        "EXPSTATE_CATALOG_TIMEOUT_SECONDS": "1",
        "EXPSTATE_PROVENANCE_DIFF": "1",
        "XDG_DATA_HOME": str(made / "home"),
        "HOME": str(made / "home"),
        "TMPDIR": str(made),
        "PYTHONPATH": str(ROOT),
        "AWS_SECRET_ACCESS_KEY": canaries["environment"],
        "HTTPS_PROXY": f"http://me:{canaries['environment']}@proxy/",
        "CUDA_AUTH_TOKEN": canaries["environment"],
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.catalog.canaries", str(folder / "canaries.json"), str(made), mode]
    command += ["--api-key", canaries["argv"], f"--token={canaries['argv']}", f"data=https://me:{canaries['argv']}@host/"]
    command += [f"https://host/x?sig={canaries['argv']}#{canaries['argv']}"]
    answer = subprocess.run(
        command, capture_output=True, cwd=repository, env=os.environ | ENVIRONMENT | variables, timeout=240, check=False
    )
    assert answer.returncode == 0, answer.stderr.decode()[-3000:]
    # What is not there before, or not any more as it was.
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    places = {str(path.relative_to(folder)): data for path, data in files.items() if given.get(path) != data}
    places |= {f"name of {path.relative_to(folder)}": os.fsencode(path) for path in folder.rglob("*")}
    return Produced(canaries, places | {"stdout": answer.stdout, "stderr": answer.stderr})


@pytest.mark.parametrize("name", NAMES)
def test_a_secret_is_in_no_byte_that_is_produced(produced: Produced, name: str) -> None:
    assert [] == produced.holding(name)


def test_what_a_person_types_is_theirs_and_the_search_would_find_it(produced: Produced) -> None:
    found = produced.holding("tag")

    assert {"made/bucket/sqlite/one/snapshot.json", "made/sqlite/catalog.db", "stdout"} <= set(found)
    assert [place for place in found if "spool" in place]


def test_everything_that_should_be_produced_was(produced: Produced) -> None:
    """A process that does nothing betrays nothing."""
    ends = ("spool-", "roots.txt", "log.txt", "catalog.db", "snapshot.json", "annotations.json", ".safetensors")
    assert [] == [end for end in ends if not any(end in place for place in produced.places)]
    said = produced.places["stderr"] + produced.places["stdout"]
    warned = (b"CatalogWarning", b"ProvenanceWarning", b"InvalidMetadataError", b"InvalidQueryError", b"the bucket is gone", b"[secret ")
    assert [] == [words for words in warned if words not in said]
    assert b"git.example.org/team/resnet" in produced.places["made/bucket/sqlite/one/snapshot.json"]


@pytest.mark.parametrize("shift", range(4))
def test_the_search_finds_a_canary_in_other_clothes(shift: int) -> None:
    canary, around = "optionsZq7v3abcdef", b"-" * shift

    assert any(form in base64.b64encode(around + canary.encode() + b"-" * 5) for form in forms(canary))
    assert any(form in (around + canary.encode()).hex().encode() for form in forms(canary))
    assert not any(form in base64.b64encode(around + canary[:-6].encode() + b"-" * 11) for form in forms(canary))
