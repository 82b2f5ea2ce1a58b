"""A training run that is killed in the middle of a take, and what is left of it: everything.

Run ``make demo``, or ``python notebooks/demo.py``. A small network learns scikit-learn's handwritten digits, with a snapshot after each
epoch. One process trains without a break. Another is killed by SIGKILL half way; a third resumes from its last snapshot and must end with
the same bits. At last the catalog tells the best weights, which are restored into a fresh model, and the command line what it remembers.
"""

from __future__ import annotations

import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn

import expstate
from expstate import Catalog, RNGState, Snapshot, StateDict
from expstate.errors import SnapshotNotFoundError

EPOCHS = 12
KILLED_AT = 7
BATCH = 64
FOLDER = Path("demo-run")
MARK = FOLDER / "made-by-expstate-demo"

# A catalog of its own, here and in the processes that this one starts: yours is left alone.
os.environ.update(EXPSTATE_CATALOG=str(FOLDER / "catalog.db"), EXPSTATE_PROJECT="digits")


# The training script: this much of expstate is in it.


class Training:
    """A network, what trains it, and every random number that it uses: one app state."""

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.3), nn.Linear(256, 10))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=3e-3)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, T_max=EPOCHS)
        self.progress = StateDict(epoch=0)

    @property
    def app_state(self) -> dict[str, expstate.Stateful]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "progress": self.progress,
            "rng": RNGState(),
        }


def train(folder: Path, *, killed_at: int | None = None) -> None:
    """Train from the last snapshot in ``folder``, or from the beginning, to the end; die in the take of epoch ``killed_at``."""
    torch.set_num_threads(1)  # sums in one order, on any number of cores
    seed_everything(7)
    training = Training()

    earlier = committed_snapshots(folder)
    if earlier:
        earlier[-1].restore(training.app_state)
        print(f"  resumed from {earlier[-1].metadata.name}, in a new process")

    train_images, train_labels, test_images, test_labels = digits()
    while training.progress["epoch"] < EPOCHS:
        epoch = training.progress["epoch"] + 1
        loss = train_one_epoch(training, train_images, train_labels)
        training.progress["epoch"] = epoch
        accuracy = measure(training.model, test_images, test_labels)
        Snapshot.take(
            folder / f"epoch-{epoch:02}",
            training.app_state,
            name=f"epoch-{epoch:02}",
            tags=[folder.name],
            step=epoch,
            params={"lr": 3e-3, "batch": BATCH},
            metrics={"loss": loss, "accuracy": accuracy},
            progress=die if epoch == killed_at else None,
        )
        print(f"  epoch {epoch:2}/{EPOCHS}   {bar(epoch)}   loss {loss:.4f}   accuracy {accuracy:.2%}   snapshot taken", flush=True)


def train_one_epoch(training: Training, images: torch.Tensor, labels: torch.Tensor) -> float:
    """One pass over the images in random order, each shifted and made noisy at random; gives the mean loss."""
    training.model.train()
    total = 0.0
    for batch in torch.randperm(len(images)).split(BATCH):
        noise = torch.from_numpy(np.random.normal(0, 0.1, (len(batch), 64)))  # noqa: NPY002 - the generator that RNGState must bring back
        shift = random.randint(-1, 1)  # noqa: S311 - likewise
        seen = images[batch].view(-1, 8, 8).roll(shift, dims=2).flatten(1) + noise.float()
        loss = nn.functional.cross_entropy(training.model(seen), labels[batch])
        training.optimizer.zero_grad()
        loss.backward()
        training.optimizer.step()
        total += loss.item() * len(batch)
    training.scheduler.step()
    return total / len(images)


def committed_snapshots(folder: Path) -> list[Snapshot]:
    """The snapshots below ``folder``, oldest first. What a killed take left is no snapshot."""
    found = []
    for path in sorted(folder.glob("epoch-*")):
        snapshot = Snapshot(path)
        try:
            snapshot.metadata  # noqa: B018 - reads the manifest
        except SnapshotNotFoundError:
            continue
        found.append(snapshot)
    return found


# What is trained on, and how well.


def digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The 1,797 images of 8 x 8 pixels and their labels, to train on and to test on."""
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    return images[:1200], labels[:1200], images[1200:], labels[1200:]


def measure(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The fraction of images that are recognised."""
    model.eval()
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


def seed_everything(seed: int) -> None:
    """All the generators that the training uses."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the generator that RNGState must bring back
    torch.manual_seed(seed)


def die(_: expstate.ProgressUpdate) -> None:
    """Leave no time for anything: the first bytes of the take are written, the manifest is not."""
    print(f"  epoch {KILLED_AT:2}/{EPOCHS}   {bar(KILLED_AT)}   killed in the take", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


# The show.

LOOK_BACK = (
    'expstate list "tag = broken and accuracy > 0.9" --sort accuracy:desc --limit 5',
    'expstate diff epoch-01 best --stats --only "model/*" --only "progress/*"',
)


def main() -> None:
    """Train, be killed, resume, compare, restore the best, look back."""
    make_folder()
    straight, broken = FOLDER / "straight", FOLDER / "broken"

    heading(1, "train without a break")
    run("train", straight)

    heading(2, "the same again, killed by SIGKILL in the middle of a take")
    status = run("train", broken, str(KILLED_AT))
    if status != -signal.SIGKILL:
        fail(f"the process was to be killed, and ended with status {status}")
    left = sorted(path.name for path in (broken / f"epoch-{KILLED_AT:02}").iterdir())
    whole = committed_snapshots(broken)
    print(f"  left behind by the dead take: {len(left)} files and no snapshot")
    print(f"  snapshots before it: {len(whole)}, damaged: {sum(not snapshot.verify().ok for snapshot in whole)}")
    removed = sum(len(leftover.files) for leftover in expstate.gc(broken).removed)
    print(f"  expstate.gc removed {removed} of the files left behind")

    heading(3, "resume in a new process")
    if run("train", broken) != 0:
        fail("the resumed run failed")

    heading(4, "compare the two runs, bit for bit")
    one, other = committed_snapshots(straight), committed_snapshots(broken)
    if len(one) != EPOCHS or len(other) != EPOCHS:
        fail(f"{len(one)} and {len(other)} snapshots instead of {EPOCHS}")
    for key in one[-1].keys():
        same = is_same(one[-1].get_state_dict_for_key(key), other[-1].get_state_dict_for_key(key))
        print(f"  {key:<10}{'the same' if same else 'DIFFERENT'}")
        if not same:
            fail(f"the resumed run did not end with the same {key}")

    heading(5, "restore the best weights into a fresh model")
    catalog = Catalog()
    best = catalog.search("tag = broken", sort="accuracy:desc", limit=1)[0]
    catalog.alias(best.id, "best")
    model = Training().model
    Snapshot.find("best").restore({"model": model})
    accuracy = measure(model, *digits()[2:])
    print(f"  {best.name}: accuracy {best.metrics['accuracy']:.2%} when it was taken, {accuracy:.2%} now")
    if accuracy != best.metrics["accuracy"]:
        fail("the restored weights are not those that were taken")

    heading(6, "look back from the command line")
    if any(show(command) for command in LOOK_BACK):
        fail("the command line failed")

    print(f"\nThe snapshots are in {FOLDER}/: folders of safetensors files and a snapshot.json each.")


def run(command: str, *arguments: str | Path) -> int:
    """Run a command of this script in a process of its own; gives its exit status."""
    return subprocess.run([sys.executable, __file__, command, *arguments], check=False).returncode  # noqa: S603 - our own script


def show(command: str) -> int:
    """Show a command and what it prints; gives its exit status."""
    print(f"\n  $ {command}", flush=True)
    words = [sys.executable, "-m", *shlex.split(command)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    print("".join(f"  {line}".rstrip() + "\n" for line in (done.stdout + done.stderr).splitlines()), end="", flush=True)
    return done.returncode


def is_same(one: object, other: object) -> bool:
    """Whether two states are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(is_same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(is_same, one, other))
    return type(one) is type(other) and one == other


def make_folder() -> None:
    """An empty folder for this run; only one that an earlier run made is removed."""
    if FOLDER.exists() and not MARK.exists():
        sys.exit(f"{FOLDER}/ is there and was not made by this demo; move it away")
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    MARK.touch()


def bar(epoch: int) -> str:
    """How far the training is."""
    return "#" * epoch + "." * (EPOCHS - epoch)


def heading(number: int, text: str) -> None:
    """Say what comes next."""
    print(f"\n{number}. {text}", flush=True)


def fail(reason: str) -> NoReturn:
    """Say what is wrong, and end."""
    sys.exit(f"\nthe demo failed: {reason}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["train"]:
        train(Path(sys.argv[2]), killed_at=int(sys.argv[3]) if sys.argv[3:] else None)
    else:
        main()
