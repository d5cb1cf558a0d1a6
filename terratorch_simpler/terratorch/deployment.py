"""TerraTorch's deployment file, which drops every callback and with it the import that makes ``simpler_`` names known."""

from __future__ import annotations

from pathlib import Path

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from terratorch_simpler.files import atomic_write
from terratorch_simpler.lightning.internals import default_callbacks

DEPLOY_CONFIG = "config_deploy.yaml"
IMPORT = {"class_path": "terratorch_simpler.SimplerCallback"}
"""Leaves an encoder that is pruned already as it is."""


class KeepImport(Callback):
    """Lists SimplerCallback in the deployment file, whichever command has written it.

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
    """If a command line is building the model, add :class:`KeepImport` to its trainer.

    Called when a SimplerBackbone is built, however the package was imported: by a callback, by ``custom_modules_path`` or by
    hand.
    """
    callbacks = default_callbacks()
    if callbacks is not None and not any(isinstance(callback, KeepImport) for callback in callbacks):
        callbacks.append(KeepImport())


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
