"""Checkpoints of Lightning are snapshots: kept by its rules, and gone on from to the same bits."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what Lightning imports
    import lightning.pytorch as pl

from expstate import Catalog, Snapshot
from expstate.errors import InvalidArgumentError, SnapshotNotFoundError, StorageError, TakeFailedWarning
from expstate.integrations.lightning import SnapshotCheckpoint, SnapshotIO
from expstate.testing import FaultyStorage

pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore:.*does not have many workers.*",
    "ignore:.*exists and is not empty.*",
    "ignore:.*barrier.*",
    "ignore::FutureWarning:lightning",
    "ignore::DeprecationWarning",
    "ignore:.*isinstance.treespec.*",
    "ignore:.*The number of training batches.*",
    "ignore:.*litlogger.*",
)


class Module(pl.LightningModule):
    """Digits, with a scheduler, and hyperparameters that Lightning keeps."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(6)
        self.layers = torch.nn.Sequential(torch.nn.Linear(64, width), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(width, 10))
        self.losses: list[float] = []

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        inputs, labels = batch
        loss = torch.nn.functional.cross_entropy(self.layers(inputs), labels)
        self.log("loss", loss)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


def loader() -> torch.utils.data.DataLoader[Any]:
    digits = load_digits()
    data = torch.utils.data.TensorDataset(torch.from_numpy(digits.data).float()[:640] / 16, torch.from_numpy(digits.target)[:640])
    return torch.utils.data.DataLoader(data, batch_size=64, shuffle=True)


def fit(root: Path | str, epochs: int, *, ckpt_path: str | None = None, seed: int = 1, **options: Any) -> tuple[Module, SnapshotCheckpoint]:
    checkpoint = SnapshotCheckpoint(root, **{"save_top_k": -1, **options})
    module = Module()
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[checkpoint],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    torch.manual_seed(seed)
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return module, checkpoint


def weights(module: Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def taken(root: Path) -> list[str]:
    return sorted(path.parent.name for path in root.glob("*/snapshot.json"))


def test_a_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """From the last epoch, with its scheduler, its loops and its random numbers."""
    once, _ = fit(tmp_path / "once", 4)
    first, _ = fit(tmp_path / "twice", 2, save_last=True)
    second, _ = fit(tmp_path / "twice", 4, ckpt_path="last", seed=99, save_last=True)

    assert once.losses == first.losses + second.losses
    assert torch.equal(weights(once), weights(second))


def test_the_weights_come_back_without_a_trainer(tmp_path: Path) -> None:
    """And what else is in the checkpoint can be looked at."""
    module, checkpoint = fit(tmp_path, 1)
    snapshot = Snapshot(checkpoint.best_model_path)
    fresh = Module()
    snapshot.restore({"model": fresh})

    assert torch.equal(weights(module), weights(fresh))
    assert (10, 24, 0) == (
        snapshot.metadata.step,
        snapshot.read_object("lightning/hyper_parameters/width"),
        snapshot.read_object("lightning/epoch"),
    )
    assert snapshot.verify().ok


def test_the_best_are_kept(tmp_path: Path) -> None:
    """By Lightning's own rules; the others leave nothing."""
    _, checkpoint = fit(tmp_path, 5, monitor="loss", save_top_k=2)

    assert sorted(Path(path).name for path in checkpoint.best_k_models) == taken(tmp_path)
    assert 2 == len(list(tmp_path.iterdir()))


def test_what_somebody_has_marked_is_kept(tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "catalog.db")

    class Mark(pl.Callback):
        def on_train_epoch_start(self, trainer: Any, _: Any) -> None:
            if trainer.current_epoch == 2:
                first = Snapshot(tmp_path / "runs" / "epoch=0-step=10")
                catalog.tag(first.id, "good")

    checkpoint = SnapshotCheckpoint(tmp_path / "runs", save_top_k=2, monitor="step", mode="max", catalog=catalog)
    trainer = pl.Trainer(
        max_epochs=4, accelerator="cpu", logger=False, callbacks=[checkpoint, Mark()], enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(Module(), loader())

    assert ["epoch=0-step=10", "epoch=2-step=30", "epoch=3-step=40"] == taken(tmp_path / "runs")
    catalog.close()


def test_a_checkpoint_is_not_removed_before_the_next_is_committed(tmp_path: Path) -> None:
    """Nor if that one fails."""
    io = SnapshotIO(catalog=False, base=None)
    checkpoint = {"state_dict": {"weight": torch.ones(3)}, "global_step": 1}
    io.save_checkpoint(checkpoint, tmp_path / "one")
    io.teardown()
    broken = FaultyStorage(_open(tmp_path / "two"))
    broken.fail("write", error=StorageError("the disk is broken"))
    io.save_checkpoint(checkpoint, broken.url)
    io.remove_checkpoint(tmp_path / "one")
    with pytest.warns(TakeFailedWarning, match="was not taken: StorageError: the disk is broken"):
        io.teardown()
    assert Snapshot(tmp_path / "one").verify().ok
    io.save_checkpoint(checkpoint, tmp_path / "two")
    io.remove_checkpoint(tmp_path / "one")
    io.teardown()

    with pytest.raises(SnapshotNotFoundError):
        Snapshot(tmp_path / "one").verify()
    assert Snapshot(tmp_path / "two").verify().ok


def _open(path: Path) -> Any:
    from expstate.storage.registry import open_storage

    return open_storage(path)


def test_checkpoints_of_lightning_itself_are_read_too(tmp_path: Path) -> None:
    """A training that was begun without snapshots goes on with them."""
    module = Module()
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "old.ckpt")
    resumed, _ = fit(tmp_path / "runs", 2, ckpt_path=str(tmp_path / "old.ckpt"))

    assert 10 == len(resumed.losses)
    assert ["epoch=1-step=20"] == taken(tmp_path / "runs")


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    """Whatever is in it, one without optimizers too; what is being taken is waited for."""
    io = SnapshotIO(catalog=False)
    checkpoint = {
        "state_dict": {"layer.weight": torch.ones(3), "layer.bias": torch.zeros(2)},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "global_step": 7,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 1}}}},
    }
    io.save_checkpoint(checkpoint, tmp_path / "one")
    found = io.load_checkpoint(tmp_path / "one")
    io.save_checkpoint({"state_dict": {"x": torch.ones(1)}}, tmp_path / "two")

    assert str(checkpoint) == str({name: found[name] for name in checkpoint})
    assert {"state_dict"} == set(io.load_checkpoint(tmp_path / "two"))
    io.teardown()


def test_options_of_each_checkpoint_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="not with each checkpoint"):
        SnapshotIO().save_checkpoint({"state_dict": {}}, tmp_path / "one", storage_options={"x": 1})
