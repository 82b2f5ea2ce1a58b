"""transformers: a callback that has a ``Trainer`` take snapshots by itself, and the checkpoint folder that it goes on from."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers

from expstate.engine import ranks
from expstate.errors import InvalidArgumentError
from expstate.integrations.autosave import autosave
from expstate.state.stateful import RNGState, preserved_rng

if TYPE_CHECKING:
    import os

    from expstate.engine.ranks import Ranks
    from expstate.snapshot import Snapshot

_STATE = "trainer_state.json"
_FILES = {"pytorch_model.bin": "model", "optimizer.pt": "optimizer", "scheduler.pt": "scheduler"}


class SnapshotCallback(transformers.TrainerCallback):
    """Takes snapshots of a ``Trainer``'s training: model, optimizer, scheduler, random generators and the trainer's own state.

    Pass ``save_strategy="no"`` to the trainer if nothing else is to be saved. A training that raises leaves the signals handled, and the
    last takes to their end; pass ``signal=False`` where that is not wanted.

    Parameters
    ----------
    **options
        As for ``expstate.autosave``: ``every`` or ``steps``, ``keep_last``, ``name``, ``root`` and others. Steps are those of the trainer.

    Attributes
    ----------
    saver : Autosave
        What takes; counts the takes, and those that failed.

    Raises
    ------
    InvalidArgumentError
        If an option makes no sense.

    Examples
    --------
    A training that goes on where it was ended::

        callback = SnapshotCallback(every="10m", name="finetune")
        trainer = Trainer(model, args, train_dataset=dataset, callbacks=[callback])
        trainer.train(resume_from_checkpoint=callback.checkpoint(f"{args.output_dir}/resumed"))
    """

    def __init__(self, **options: Any) -> None:
        # The trainer shows the bare module, which does not say that all ranks have the same.
        options.setdefault("replicated", ("model/*", "optimizer/*"))
        self.saver = autosave({}, **options)
        self._pg = options.get("pg")
        self._is_entered = False

    def checkpoint(self, folder: str | os.PathLike[str]) -> str | None:
        """Write the newest whole snapshot as a checkpoint folder of transformers; on several ranks all call it.

        Parameters
        ----------
        folder : str or os.PathLike
            A folder of its own, on a disk that all ranks see. A checkpoint that was written there before is replaced.

        Returns
        -------
        str or None
            What ``trainer.train(resume_from_checkpoint=...)`` takes; None if there is no snapshot, and nothing was written.

        Raises
        ------
        InvalidArgumentError
            If something else is in the folder.
        SnapshotCorruptError
            If all snapshots are damaged.

        Warns
        -----
        ExpstateWarning
            For each snapshot that is damaged: the one before is used.
        """
        target = Path(folder)
        others = sorted(
            {path.name for path in target.glob("*")} - {*_FILES, _STATE} - {path.name for path in target.glob("rng_state*.pth")}
        )
        if others:
            msg = f"{str(target)!r} is to hold a checkpoint and nothing else, and has {others[0]!r}; give another folder"
            raise InvalidArgumentError(msg)
        with ranks.join(self._pg).failing() as joined:
            snapshot = self.saver.series.newest(joined, lambda found: _write(found, target, joined))
            joined.close()
        return None if snapshot is None else str(target)

    # What the trainer calls

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin, at the step that the trainer goes on from."""
        del args
        self._leave()
        self.saver.app_state = {
            "model": kwargs["model"],
            "optimizer": kwargs["optimizer"],
            "scheduler": kwargs["lr_scheduler"],
            "trainer": _TrainerState(state, control),
            "rng": RNGState(),
        }
        self.saver.go_on_from(state.global_step)
        self.saver.__enter__()
        self._is_entered = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take if it is time."""
        del args, control, kwargs
        self.saver.step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take a last one."""
        del args, state, control, kwargs
        self._leave()

    def _leave(self) -> None:
        if self._is_entered:
            self._is_entered = False
            self.saver.__exit__(None, None, None)


class _TrainerState:
    """What a trainer keeps in ``trainer_state.json``."""

    def __init__(self, state: Any, control: Any) -> None:
        self._state = state
        self._control = control

    def state_dict(self) -> dict[str, Any]:
        found = dataclasses.asdict(self._state)
        found["stateful_callbacks"] = {**found["stateful_callbacks"], "TrainerControl": self._control.state()}
        return {"json": json.dumps(found)}

    def load_state_dict(self, _: dict[str, Any]) -> None:
        msg = "a trainer goes on from a checkpoint folder: SnapshotCallback.checkpoint writes one"
        raise InvalidArgumentError(msg)


def _write(snapshot: Snapshot, folder: Path, joined: Ranks) -> None:
    """A checkpoint folder as a trainer writes it; each rank adds its random generators."""
    folder.mkdir(parents=True, exist_ok=True)
    name = "rng_state.pth" if joined.size == 1 else f"rng_state_{joined.rank}.pth"
    torch.save(_generators(snapshot.get_state_dict_for_key("rng"), is_alone=joined.size == 1), folder / name)
    if joined.is_first:
        for file, key in _FILES.items():
            joined.went_on()
            torch.save(snapshot.get_state_dict_for_key(key), folder / file)
        (folder / _STATE).write_text(snapshot.read_object("trainer/json"), "utf-8")


def _generators(state: dict[str, Any], *, is_alone: bool) -> dict[str, Any]:
    """Random generators in the form of a trainer."""
    with preserved_rng():
        RNGState().load_state_dict(state)
        found = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.random.get_rng_state()}  # noqa: NPY002 - the trainer's
        if torch.cuda.is_available():
            found["cuda"] = torch.cuda.random.get_rng_state() if is_alone else torch.cuda.random.get_rng_state_all()
    return found
