"""The repository of a take: found and described in every state that git knows, without harm to it, and never waited for long."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expstate import Snapshot, StateDict, settings
from expstate.catalog.provenance import current_project, project, redact
from expstate.catalog.provenance import git as git_gatherer
from expstate.catalog.provenance import repository as repositories
from expstate.catalog.provenance.gatherers import Seen
from expstate.errors import ProvenanceWarning

from .repositories import ENVIRONMENT, git

HTTPS = "https://git.example.org/team/resnet.git"


STATE = {"a": StateDict(x=1)}


@pytest.fixture(autouse=True)
def _nobodys_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EXPSTATE_PROJECT")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(git_gatherer, "_warned", False)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a remote and a commit; the working folder."""
    folder = tmp_path / "repository"
    git("init", "-q", "-b", "main", str(folder))
    (folder / "train.py").write_text("lr = 0.1\n")
    git("add", ".", folder=folder)
    git("commit", "-q", "-m", "first", folder=folder)
    git("remote", "add", "origin", HTTPS, folder=folder)
    monkeypatch.chdir(folder)
    return folder


def described(folder: Path | None = None, **changes: Any) -> dict[str, Any] | None:
    """What is recorded of the repository of a folder."""
    with settings.override(**changes) as current:
        return git_gatherer.gather(Seen(str(folder or Path.cwd()), {}, current))


@pytest.fixture
def replace_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a script in the place of ``git``."""

    def replace(script: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "git").write_text(f"#!/bin/sh\n{script}\n")
        (folder / "git").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    return replace


# States of a repository


def test_commit_branch_remote_and_root_are_recorded(repository: Path) -> None:
    (repository / "deep" / "er").mkdir(parents=True)
    expected = {"commit": git("rev-parse", "HEAD"), "branch": "main", "dirty": False, "remote": HTTPS, "root": str(repository)}

    assert expected == described()
    assert expected == described(repository / "deep" / "er")
    assert "git.example.org/team/resnet" == current_project(repository / "deep" / "er")


@pytest.mark.parametrize("staged", [True, False])
def test_changes_of_tracked_files_make_it_dirty_and_new_files_do_not(repository: Path, staged: bool) -> None:
    (repository / "new.txt").write_text("untracked")
    assert described()["dirty"] is False  # type: ignore[index]
    (repository / "train.py").write_text("lr = 0.2\n")
    if staged:
        git("add", "train.py")

    assert described()["dirty"] is True  # type: ignore[index]


def test_a_repository_without_a_commit_has_only_a_branch(tmp_path: Path) -> None:
    git("init", "-q", "-b", "main", str(tmp_path / "new"))
    expected = {"branch": "main", "dirty": False, "root": str(tmp_path / "new")}

    assert expected == described(tmp_path / "new")
    assert expected == described(tmp_path / "new", provenance_diff=True)


def test_a_detached_head_has_no_branch(repository: Path) -> None:
    git("checkout", "-q", "--detach")

    assert {"commit": git("rev-parse", "HEAD"), "dirty": False, "remote": HTTPS, "root": str(repository)} == described()


def test_a_worktree_has_a_branch_of_its_own_and_the_same_project(repository: Path, tmp_path: Path) -> None:
    git("worktree", "add", "-q", "-b", "other", str(tmp_path / "tree"))
    git("commit", "-q", "--allow-empty", "-m", "second", folder=tmp_path / "tree")
    commit = git("rev-parse", "HEAD", folder=tmp_path / "tree")

    assert {"commit": commit, "branch": "other", "dirty": False, "remote": HTTPS, "root": str(tmp_path / "tree")} == described(
        tmp_path / "tree"
    )
    assert current_project(repository) == current_project(tmp_path / "tree")


def test_a_submodule_is_a_repository_of_its_own(repository: Path, tmp_path: Path) -> None:
    outer = tmp_path / "outer"
    git("init", "-q", str(outer))
    git("-c", "protocol.file.allow=always", "submodule", "--quiet", "add", str(repository), "inner", folder=outer)
    found = described(outer / "inner")

    assert (git("rev-parse", "HEAD"), str(outer / "inner")) == (found["commit"], found["root"])  # type: ignore[index]
    assert str(outer / "inner") == current_project(outer / "inner")  # its remote is a folder of this machine
    assert str(outer) == current_project(outer)


def test_a_bare_repository_is_described_as_far_as_it_goes(repository: Path, tmp_path: Path) -> None:
    git("clone", "-q", "--bare", str(repository), str(tmp_path / "bare"))

    assert {
        "commit": git("rev-parse", "HEAD"),
        "branch": "main",
        "remote": str(repository),
        "root": str(tmp_path / "bare"),
    } == described(tmp_path / "bare")


def test_where_there_is_no_repository_the_folder_is_the_project(tmp_path: Path) -> None:
    (tmp_path / ".git").write_text("something else")

    assert described(tmp_path) is None
    assert str(tmp_path) == current_project(tmp_path)


def test_without_a_remote_the_root_is_the_project(repository: Path) -> None:
    git("remote", "remove", "origin")
    (repository / "deep").mkdir()

    assert str(repository) == current_project(repository / "deep")
    assert "remote" not in described()  # type: ignore[operator]


def test_of_several_remotes_origin_names_the_project_and_an_only_one_does_too(repository: Path) -> None:
    git("remote", "add", "fork", "https://git.example.org/me/resnet.git")
    projects = [current_project()]
    git("remote", "remove", "fork")
    git("remote", "rename", "origin", "upstream")
    projects.append(current_project())
    git("remote", "add", "fork", "https://git.example.org/me/resnet.git")
    projects.append(current_project())

    assert ["git.example.org/team/resnet", "git.example.org/team/resnet", str(repository)] == projects


def test_a_remote_that_is_added_later_counts_at_once(repository: Path) -> None:
    git("remote", "set-url", "origin", "git@other.example.org:a/b.git")

    assert "other.example.org/a/b" == current_project()


@pytest.mark.parametrize("packed", [True, False])
def test_without_git_the_files_tell_commit_and_branch(repository: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    commit = git("rev-parse", "HEAD")
    if packed:
        git("pack-refs", "--all")
    monkeypatch.setenv("PATH", "/nowhere")

    assert {"commit": commit, "branch": "main", "remote": HTTPS, "root": str(repository)} == described()
    assert "git.example.org/team/resnet" == current_project()


def test_where_git_refuses_the_files_tell_commit_and_branch(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does in the repository of another user."""
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")

    assert {"commit": git("-c", f"safe.directory={repository}", "rev-parse", "HEAD"), "branch": "main"}.items() <= described().items()  # type: ignore[union-attr]
    assert "dirty" not in described()  # type: ignore[operator]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "HEAD").write_text("ref: ../../../etc/passwd\n"),
        lambda folder: (folder / "HEAD").write_bytes(b"\xff\x00\n"),
        lambda folder: (folder / "HEAD").unlink(),
        lambda folder: ((folder / "HEAD").unlink(), os.mkfifo(folder / "HEAD")),
        lambda folder: ((folder / "config").unlink(), os.mkfifo(folder / "config")),
        lambda folder: (folder / "config").write_bytes(b"[remote \xff"),
        lambda folder: (folder / "config").write_bytes(b'[remote "origin"]\nurl\n'),
        lambda folder: (folder / "refs" / "heads" / "main").write_text("no commit"),
    ],
)
def test_a_damaged_repository_is_no_trouble(
    repository: Path, damage: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(git_gatherer, "SECONDS", 0.3)  # git opens pipes too
    damage(repository / ".git")
    found = Snapshot.take(tmp_path / "run", STATE).metadata.provenance

    assert current_project() == found["project"]
    assert "etc/passwd" not in str(found.get("git"))


# What git is asked


def test_git_is_asked_once_in_a_take(repository: Path, replace_git: Callable[[str], None], tmp_path: Path) -> None:
    replace_git(f'echo "$@" >> {tmp_path}/calls\nexec {shutil.which("git")} "$@"')
    Snapshot.take(tmp_path / "run", STATE)

    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert "status --porcelain=v2 --branch" in call


def test_nothing_is_written_and_nothing_of_the_repository_is_run(repository: Path, tmp_path: Path) -> None:
    """Another status would write the index, whose times are old, and run the hook and the monitor."""
    script = tmp_path / "script"
    script.write_text(f"#!/bin/sh\necho ran >> {tmp_path}/ran\n")
    script.chmod(0o755)
    shutil.copy(script, repository / ".git" / "hooks" / "post-index-change")
    git("config", "core.fsmonitor", str(script))
    git("config", "diff.external", str(script))
    git("config", "core.pager", str(script))
    os.utime(repository / "train.py", (1, 1))
    index = (repository / ".git" / "index").read_bytes()
    (repository / "other.py").write_text("x = 1\n")

    assert described(provenance_diff=True)["dirty"] is False  # type: ignore[index]
    assert index == (repository / ".git" / "index").read_bytes()
    assert not (tmp_path / "ran").exists()
    git("status")
    assert (tmp_path / "ran").exists()  # as it would have


def test_what_a_partial_clone_has_not_got_is_not_fetched(repository: Path, tmp_path: Path) -> None:
    """Git would look into files to tell whether one was renamed."""
    git("config", "uploadpack.allowFilter", "true")
    for number in (1, 2):
        (repository / f"file-{number}").write_text(f"{number}\n" * 1000)
    git("add", ".")
    git("commit", "-q", "-m", "files")
    clone = tmp_path / "clone"
    git("clone", "-q", "--filter=blob:none", "--no-checkout", repository.as_uri(), str(clone))
    git("read-tree", "HEAD", folder=clone)
    git("update-index", "--force-remove", "file-1", folder=clone)
    git("update-index", "--add", "--cacheinfo", f"100644,{git('rev-parse', 'HEAD:file-2')},file-3", folder=clone)
    before = sorted((clone / ".git" / "objects" / "pack").iterdir())
    found = described(clone)

    assert found is not None
    assert (git("rev-parse", "HEAD"), True) == (found["commit"], found["dirty"])
    assert before == sorted((clone / ".git" / "objects" / "pack").iterdir())


def test_variables_that_point_elsewhere_do_not_count(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hook of another repository has them, and what it starts."""
    expected = described()
    git("init", "-q", str(tmp_path / "other"))
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "other"))
    monkeypatch.setenv("GIT_TRACE", str(tmp_path / "trace"))

    assert expected == described()
    assert not (tmp_path / "trace").exists()


# A git that is slow


@pytest.mark.parametrize(
    "hang", ["exec sleep 600", "sleep 600 & echo $! > {pid}; wait", "trap '' TERM INT HUP; echo $$ > {pid}; sleep 600"]
)
def test_a_git_that_hangs_is_ended_with_its_children(
    repository: Path, replace_git: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hang: str
) -> None:
    commit = git("rev-parse", "HEAD")
    monkeypatch.setattr(git_gatherer, "SECONDS", 0.5)
    pid = tmp_path / "pid"
    replace_git(f"echo $$ > {pid}\n" + hang.format(pid=pid))
    with pytest.warns(ProvenanceWarning, match="git took longer"):
        found = described()
    assert {"commit": commit, "branch": "main", "remote": HTTPS, "root": str(repository)} == found
    assert described() == found  # without a second warning

    while is_running(pid.read_text().strip()):
        time.sleep(0.01)


def is_running(pid: str) -> bool:
    """Whether a process has not ended; whoever has adopted it may not have looked yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_git_whose_child_holds_its_output_is_not_waited_for(
    repository: Path, replace_git: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that git leaves behind, in a session of its own."""
    monkeypatch.setattr(git_gatherer, "SECONDS", 0.5)
    replace_git("setsid sleep 5 &\nexit 0")
    with pytest.warns(ProvenanceWarning, match="git took longer"):
        found = described()

    assert "commit" in found  # type: ignore[operator]


def test_an_endless_answer_is_not_read_to_its_end(repository: Path, replace_git: Callable[[str], None]) -> None:
    replace_git("echo '# branch.oid 0123456789012345678901234567890123456789'; echo '# branch.head main'; yes 1 changed")

    assert {"commit": "0123456789" * 4, "branch": "main", "dirty": True}.items() <= described().items()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "script", ["exit 3", "kill -9 $$", "echo nonsense", "printf '\\377\\n# branch.oid \\377\\n'", "exec >&-; exec sleep 600"]
)
def test_a_git_that_answers_nonsense_is_no_trouble(
    repository: Path, replace_git: Callable[[str], None], tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(git_gatherer, "SECONDS", 0.5)
    replace_git(script)

    assert "git.example.org/team/resnet" == Snapshot.take(tmp_path / "run", STATE).metadata.provenance["project"]


# Differences


def test_the_difference_is_recorded_on_demand_alone(repository: Path) -> None:
    (repository / "train.py").write_text("lr = 0.2\n")
    (repository / "new.py").write_text("untracked = 1\n")

    assert "diff" not in described()  # type: ignore[operator]
    diff = described(provenance_diff=True)["diff"]  # type: ignore[index]
    assert "-lr = 0.1\n+lr = 0.2\n" in diff
    assert "untracked" not in diff


def test_a_large_difference_is_cut_at_a_line(repository: Path) -> None:
    (repository / "train.py").write_text("".join(f"x = {number}\n" for number in range(100_000)))
    found = described(provenance_diff=True)
    lines = found["diff"].splitlines()  # type: ignore[index]

    assert found["diff_is_cut"] is True  # type: ignore[index]
    assert git_gatherer.MOST_DIFF_BYTES - 20 < len(found["diff"]) <= git_gatherer.MOST_DIFF_BYTES  # type: ignore[index]
    assert f"+x = {len(lines) - 7}" == lines[-1]


@pytest.mark.parametrize(
    ("name", "line"), [("train.py", 'api_key = "abcdef"\n'), (".env", "A=1\n"), ("deep/.env.local", "A=1\n"), ("server.pem", "x\n")]
)
def test_a_difference_with_a_secret_in_it_is_refused(repository: Path, name: str, line: str) -> None:
    path = repository / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(line)
    git("add", ".")
    (repository / "other.py").write_text("x = 1\n")
    git("add", ".")
    diff = described(provenance_diff=True)["diff"]  # type: ignore[index]

    assert diff.startswith("[secret ")
    assert line.strip() not in diff


# Projects


@pytest.mark.parametrize(
    ("remote", "expected"),
    [
        (HTTPS, "git.example.org/team/resnet"),
        ("https://user:token@Git.Example.org:8443/team/resnet.git/", "git.example.org/team/resnet"),
        ("https://token@git.example.org/team/resnet?x=1#y", "git.example.org/team/resnet"),
        ("https://user:to/ken@git.example.org/team/resnet", "git.example.org/team/resnet"),
        ("git@git.example.org:team/resnet.git", "git.example.org/team/resnet"),
        ("git.example.org:team/resnet.git", "git.example.org/team/resnet"),
        ("user:token@git.example.org:team/resnet.git", "git.example.org/team/resnet"),
        ("git@git.example.org:/team//resnet", "git.example.org/team/resnet"),
        ("ssh://git@git.example.org:2222/team/resnet.git", "git.example.org/team/resnet"),
        ("git://git.example.org/team/group/resnet.git", "git.example.org/team/group/resnet"),
        ("ssh://git@[::1]:22/team/resnet", "[::1]/team/resnet"),
        ("git@[::1]:team/resnet", "[::1]/team/resnet"),
        ("/srv/git/resnet.git", None),
        ("../resnet", None),
        ("file:///srv/git/resnet.git", None),
        ("./odd:name", None),
        ("", None),
    ],
)
def test_a_remote_names_host_owner_and_repository(remote: str, expected: str | None) -> None:
    assert expected == project.from_remote(remote)


@pytest.mark.parametrize(
    "url", [HTTPS, "https://h/a#b", "https://h/a;b", 'https://h/"a"', "https://h/a\\b", "https://h/a b ", " https://h/a", "https://h/é"]
)
def test_a_remote_is_read_as_git_reads_it(repository: Path, url: str) -> None:
    git("config", "remote.origin.url", url)
    found = repositories.find(str(repository))

    assert found is not None
    assert git("config", "--get", "remote.origin.url").strip() == found.remote()


@pytest.mark.parametrize(
    "config",
    [
        f'[remote "origin"] url = {HTTPS}',
        f'[REMOTE "origin"]\n\tfetch = x\n\tURL={HTTPS} ; a comment',
        f'[remote "other"]\nurl = https://h/no\n[remote "origin"]\n# url = https://h/no\npushurl = https://h/no\nurl = "{HTTPS}"',
        f'[remote "Origin"]\nurl = https://h/no\n[remote "origin"]\nurl = {HTTPS}\n[branch "main"]\nurl = https://h/no',
    ],
)
def test_a_configuration_is_understood_in_any_spelling(repository: Path, config: str) -> None:
    (repository / ".git" / "config").write_text(f"[core]\n\trepositoryformatversion = 0\n{config}\n")

    assert HTTPS == git("config", "--get", "remote.origin.url")
    assert "git.example.org/team/resnet" == current_project()


def test_a_project_that_a_person_names_comes_first(repository: Path) -> None:
    with settings.override(project="mine"):
        assert "mine" == current_project() == current_project(repository / ".git")


def test_long_projects_end_in_a_hash_and_stay_distinct() -> None:
    first, second = (project.bounded("é" * 200 + end) for end in ("a", "b"))

    assert first != second
    assert all(len(name.encode()) <= 255 and name.startswith("é" * 100) for name in (first, second))
    assert "é" * 127 == project.bounded("é" * 127)


@given(st.text(max_size=300))
def test_any_text_can_be_a_project(text: str) -> None:
    name = project.bounded(text)

    assert len(name.encode()) <= 255
    assert name == project.bounded(name)


@given(st.text(max_size=60))
def test_any_text_can_stand_where_a_remote_should(text: str) -> None:
    found = project.from_remote(text)

    assert found is None or "/" in found
    assert redact.url(f"https://user:secret@host/{text}").startswith("https://host/") or "@" in text
