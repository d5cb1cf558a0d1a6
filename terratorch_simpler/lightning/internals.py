"""What this package borrows from inside Lightning and TerraTorch, in one place.

Each function says what is borrowed, the versions it was checked with, and what happens if it is gone.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from os import PathLike
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import _TunerExitException
from torch import nn

# Lightning 2.6: an exception that ends a fit as a success, and tells loggers so. If it is gone, the import of the command
# line fails; any exception that `lightning.pytorch.trainer.call` treats alike can take its place.
TunerExitException = _TunerExitException


def checkpoint_to_resume(trainer: Trainer) -> tuple[str | PathLike[str] | None, bool]:
    """The checkpoint this fit resumes from, or None, and whether it may hold tensors and plain values only.

    Borrowed: local variables ``ckpt_path`` and ``weights_only`` of ``Trainer._run`` (Lightning 2.6), which resolves "last",
    "hpc" or a path there and passes neither to a callback before the weights are restored. If they are gone, the encoder is
    measured again for nothing; the result is still right, since a checkpoint brings its own pruned state.
    """
    for frame in _frames(sys._getframe(1)):
        if frame.f_code.co_name == "_run" and frame.f_locals.get("self") is trainer:
            return frame.f_locals.get("ckpt_path"), frame.f_locals.get("weights_only") is not False
    return None, True


def running_cli() -> Any:
    """The LightningCLI that is building callbacks or the model, or None.

    Borrowed: the ``self`` of a calling frame (Lightning 2.6), since the command line passes itself to neither. If it is
    gone, deployment files have to list SimplerCallback by hand, and an unsuitable model factory fails with its own message.
    """
    objects = (frame.f_locals.get("self") for frame in _frames(sys._getframe(1)))
    return next((found for found in objects if isinstance(found, LightningCLI)), None)


def default_callbacks() -> list[Callback] | None:
    """Callbacks that the running command line adds to its trainer, to be appended to; None without a command line.

    Borrowed: ``trainer_defaults["callbacks"]`` as TerraTorch 1.2 sets it. If it is no list, None is returned.
    """
    cli = running_cli()
    callbacks = None if cli is None else cli.trainer_defaults.get("callbacks")
    return callbacks if isinstance(callbacks, list) else None


def cli_config(trainer: Trainer) -> tuple[Any, Any] | None:
    """Parser and config of the command line that runs a trainer, or None.

    Borrowed: ``SaveConfigCallback.parser`` and ``.config`` (Lightning 2.0 and later). If they are gone, this raises
    AttributeError at the end of a fit with ``export: true``; ``terratorch-simpler export`` does not need them.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaveConfigCallback):
            return callback.parser, callback.config
    return None


def fast_dev_run(trainer: Trainer) -> bool:
    """Whether a run is a quick try of a few batches, after which nothing is kept.

    Borrowed: ``Trainer.fast_dev_run``, which Lightning 2 sets without declaring it.
    """
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


def cluster_environment(trainer: Trainer) -> object:
    """The cluster that a trainer runs on, or None.

    Borrowed: ``Trainer._accelerator_connector.cluster_environment`` (Lightning 2.0 and later). If it is gone, a job whose
    time ends during the selection is not queued again.
    """
    return getattr(getattr(trainer, "_accelerator_connector", None), "cluster_environment", None)


def cli_arguments_of_optimizers(module: nn.Module) -> list[Any]:
    """Arguments that a command line has bound to ``configure_optimizers`` of a module, the optimizer among them.

    Borrowed: ``LightningCLI._add_configure_optimizers_method_to_model`` (Lightning 2.6) sets the instance's method to a
    ``functools.partial``. If that changes, the optimizer is not found, and the callback refuses it in ``on_fit_start``.
    """
    method = vars(module).get("configure_optimizers")
    function = getattr(method, "__func__", method)
    return [*function.args, *function.keywords.values()] if isinstance(function, partial) else []


def asked_with_prefix(registry: object, name: str) -> bool:
    """Whether a registry of TerraTorch, which asks our caller, was asked for ``<prefix>_<name>`` and not for ``name``.

    Borrowed: the local variables ``self`` and ``name`` of ``MultiSourceRegistry`` (TerraTorch 1.2), which strips the prefix
    before it asks a source. If they are gone, True is returned: names without a prefix may then build our encoder too.
    """
    frame: FrameType | None = sys._getframe(2)
    for _ in range(3):  # it asks the lazy source, which asks our caller, and may ask in a generator
        if frame is None:
            break
        if frame.f_locals.get("self") is registry:
            return bool(frame.f_locals.get("name") != name)
        frame = frame.f_back
    return True


def _frames(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
