"""TerraTorch's deployment file, which drops every callback and with it the import that makes ``simpler_`` names known."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback

from terratorch_simpler.files import atomic_write

DEPLOY_CONFIG = "config_deploy.yaml"
IMPORT = {"class_path": "terratorch_simpler.SimplerCallback"}
"""Leaves an encoder that is cut already as it is."""


class KeepImport(Callback):
    """Lists our callback in the deployment file of a command line, whichever command has written it.

    TerraTorch writes the file in setup, in ``fit``, ``validate``, ``test`` and ``predict`` alike; these hooks come next.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """After ``terratorch fit`` has written it."""
        _list_import(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """After ``terratorch validate`` has written it; an epoch of fit validates as well."""
        if trainer.state.fn == "validate":
            _list_import(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """After ``terratorch test`` has written it."""
        _list_import(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: ARG002
        """After ``terratorch predict`` has written it."""
        _list_import(trainer)


def keep_import() -> None:
    """If a command line builds the model just now, have its trainer keep the deployment file loadable.

    A backbone of ours is in the model, however the package came to be imported: by a callback, by ``custom_modules_path``
    or by hand.
    """
    cli = command_at_work()
    callbacks = None if cli is None else cli.trainer_defaults.get("callbacks")
    if isinstance(callbacks, list) and not any(isinstance(callback, KeepImport) for callback in callbacks):
        callbacks.append(KeepImport())


def command_at_work() -> Any:
    """The LightningCLI that builds callbacks or the model just now, which it tells neither of them; or None."""
    frame = sys._getframe()
    while frame is not None:
        if isinstance(frame.f_locals.get("self"), LightningCLI):
            return frame.f_locals["self"]
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _list_import(trainer: Trainer) -> None:
    folder = trainer.log_dir  # a collective call, so on every rank
    path = Path(folder or trainer.default_root_dir) / DEPLOY_CONFIG
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    written_now = any(isinstance(callback, SaveConfigCallback) for callback in callbacks)
    if trainer.is_global_zero and written_now and path.is_file():
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        listed = config["trainer"].setdefault("callbacks", [])
        if any(IMPORT["class_path"] == callback.get("class_path") for callback in listed):
            return  # the command read this very file
        listed.append(IMPORT)
        with atomic_write(path) as part:
            part.write_text(yaml.safe_dump(config), encoding="utf-8")
