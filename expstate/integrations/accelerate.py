"""accelerate: the app state of an ``Accelerator``, to be taken, restored or given to ``autosave``."""

from __future__ import annotations

from typing import Any

from expstate.errors import AppStateError, InvalidArgumentError
from expstate.state.stateful import RNGState, Stateful

_KEPT = {
    "model": "_models",
    "optimizer": "_optimizers",
    "scheduler": "_schedulers",
    "dataloader": "_dataloaders",
    "custom": "_custom_objects",
}


def app_state(accelerator: Any, **more: Stateful) -> dict[str, Any]:
    """All that an accelerator has prepared or was told to keep, and the random generators.

    Parameters
    ----------
    accelerator : accelerate.Accelerator
        After ``prepare()``. Models, optimizers and schedulers are taken, dataloaders with a state of their own
        (``use_stateful_dataloader``), the scaler of mixed precision, and what ``register_for_checkpointing`` was given.
    **more : Stateful
        Besides, by their keys: ``progress=StateDict(...)``.

    Returns
    -------
    dict of str to Stateful
        With the keys ``model``, ``optimizer``, ``scheduler``, ``dataloader``, ``custom`` (``model-1`` and so on for further ones),
        ``scaler`` and ``rng``.

    Raises
    ------
    InvalidArgumentError
        If it is no accelerator, or has prepared nothing yet.
    AppStateError
        If a key is used twice.

    Examples
    --------
    >>> import torch, tempfile
    >>> from accelerate import Accelerator
    >>> from expstate import Snapshot
    >>> from expstate.integrations.accelerate import app_state
    >>> accelerator = Accelerator(cpu=True)
    >>> model = torch.nn.Linear(2, 1)
    >>> model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    >>> state = app_state(accelerator)
    >>> sorted(state)
    ['model', 'optimizer', 'rng']
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     snapshot = Snapshot.take(f"{folder}/step-1", state)
    ...     report = snapshot.restore(state)
    """
    if not all(hasattr(accelerator, name) for name in _KEPT.values()):
        msg = f"app_state needs an accelerate.Accelerator, got {type(accelerator).__name__}"
        raise InvalidArgumentError(msg)
    state: dict[str, Any] = {}
    for key, name in _KEPT.items():
        found = getattr(accelerator, name)  # private, and the same for years: its own save_state is all that is public
        if key == "dataloader":
            found = [loader for loader in found if getattr(loader, "use_stateful_dataloader", False)]
        state |= {f"{key}-{number}" if number else key: one for number, one in enumerate(found)}
    if not state:
        msg = "the accelerator has prepared nothing yet: call app_state after accelerator.prepare(...)"
        raise InvalidArgumentError(msg)
    if accelerator.scaler is not None:
        state["scaler"] = accelerator.scaler
    state["rng"] = RNGState()
    twice = sorted(set(state) & set(more))
    if twice:
        msg = f"the keys {', '.join(map(repr, twice))} are those of the accelerator's own; choose others"
        raise AppStateError(msg)
    return state | more
