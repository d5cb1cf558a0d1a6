"""The commands that build what ``terratorch fit`` would train: ``plan``, ``sweep`` and ``export``."""

from __future__ import annotations

import logging
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from terratorch_simpler import export
from terratorch_simpler.distributed import Processes
from terratorch_simpler.errors import ConfigurationError, ExportError, SettingsError
from terratorch_simpler.extraction import progress_bar
from terratorch_simpler.files import atomic_folder, below, written_to
from terratorch_simpler.lightning.callback import SimplerCallback
from terratorch_simpler.lightning.internals import TunerExitException
from terratorch_simpler.logger import log
from terratorch_simpler.models.backbone import find_backbone
from terratorch_simpler.models.checkpoint import load_at_full_depth
from terratorch_simpler.plan import PLAN_FILE
from terratorch_simpler.sweep import Sweep, SweepSettings
from terratorch_simpler.terratorch.command_line import build_run, read_settings

LONGEST_SWEEP = timedelta(days=7)
"""How long the other ranks wait for the one that measures."""


class _Planned(TunerExitException):
    """Ends a fit once the plan is made; Lightning takes this kind for a success and tells the loggers so."""


class _InSetup(Callback):
    """Does something in setup, where SimplerCallback works as well."""

    def __init__(self, work: Callable[[Trainer, LightningModule], None]) -> None:
        self._work = work

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        self._work(trainer, pl_module)


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out what Lightning says of devices and its own products, and the source lines of warnings."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            mock.patch.object(warnings, "formatwarning", lambda message, *_args, **_kwargs: f"Warning: {message}\n"),
        ):
            warnings.filterwarnings("ignore", module=r"lightning\.")  # of a training that is not to come
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def run_plan(arguments: Namespace, settings: Sequence[str]) -> None:
    """Choose a plan with the setup that ``terratorch fit`` would use, and stop before training.

    Args:
        arguments: ``output_dir``, ``ckpt_path`` and ``on_unsettled``.
        settings: What follows ``terratorch fit``, such as ``--config c.yaml --data.init_args.batch_size 4``.
    """
    cli = build_run(settings)
    if arguments.ckpt_path:
        load_at_full_depth(cli.model, arguments.ckpt_path)
        find_backbone(cli.model).pretrained = None  # whatever it was built with
    _choose(cli, arguments)


def run_sweep(arguments: Namespace, settings: Sequence[str]) -> None:
    """Choose a plan as ``plan`` does, and compare cost and quality of every other depth and width.

    Args:
        arguments: ``output_dir``, ``widths``, ``probe``, ``repeats`` and ``on_unsettled``.
        settings: As for ``plan``.
    """
    try:
        wanted = SweepSettings(tuple(arguments.widths), arguments.probe, arguments.repeats)
    except ConfigurationError as err:
        raise SettingsError(str(err)) from err
    cli = build_run(settings)
    _choose(cli, arguments, Sweep(cli.model, wanted))


def _choose(cli: Any, arguments: Namespace, sweep: Sweep | None = None) -> None:
    """Fit up to the point where the plan is chosen, and say what was written, the plan last."""
    callbacks: list[Callback] = cli.trainer.callbacks
    ours = next((callback for callback in callbacks if isinstance(callback, SimplerCallback)), None)
    if ours is None:
        ours = SimplerCallback()
        callbacks.insert(0, ours)
    ours.output_dir = arguments.output_dir or ours.output_dir
    ours.on_unsettled = arguments.on_unsettled or ours.on_unsettled
    ours.announces = False

    def stop(trainer: Trainer, task: LightningModule) -> None:
        if sweep is not None and (output := ours.written) is not None:
            # A launcher ends all ranks as soon as one of them has ended, so all wait for rank 0.
            with Processes.of_run(LONGEST_SWEEP) as processes:
                ours.written_files += processes.broadcast_from_zero(lambda: _swept(sweep, trainer, task, output))
        raise _Planned

    callbacks.insert(callbacks.index(ours) + 1, _InSetup(stop))
    if sweep is not None:
        ours.compare(sweep.record)
        callbacks.insert(callbacks.index(ours), _InSetup(sweep.check))
    given = find_backbone(cli.model).is_given
    if not is_overridden("training_step", cli.model):  # tasks that only predict can be pruned as well
        cli.model.training_step = lambda *_args: None
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    if given:
        msg = (
            "Blocks or width of the encoder are given, expected an intact one to choose from: remove backbone_keep, "
            "backbone_plan, backbone_width and a pruned backbone_ckpt_path."
        )
        raise ConfigurationError(msg)
    if ours.written is None or not cli.trainer.is_global_zero:  # fast_dev_run writes nothing
        return
    for name in sorted(ours.written_files, key=lambda name: (name == PLAN_FILE, name)):
        print(below(ours.written, name))


def _swept(sweep: Sweep, trainer: Trainer, task: LightningModule, output: str | Path) -> list[str]:
    with written_to(output) as folder:
        return sweep.run(trainer, task, folder)


def run_export(arguments: Namespace, settings: Sequence[str]) -> None:
    """Write a pruned model so that it runs without this package.

    Args:
        arguments: ``ckpt_path``, ``output_dir``, ``formats``, ``image_size`` and ``width``.
        settings: As for ``plan``; those of the fit.
    """
    config, datamodule = read_settings(settings)
    plain, graphs = "plain" in arguments.formats, [name for name in export.GRAPH_FORMATS if name in arguments.formats]
    files = [
        *(export.GRAPH_FORMATS[name] for name in graphs),
        *([export.CONFIG_FILE, export.CHECKPOINT_FILE] if plain else []),
    ]
    folder = Path(arguments.output_dir)
    if there := [name for name in files if (folder / name).exists()]:
        log.info(f"Replaces {', '.join(there)} of an earlier export in {folder}.")
    written: list[tuple[Path, float]] = []
    shown = (config.get("trainer") or {}).get("enable_progress_bar") is not False
    with progress_bar(shown, 1 + len(graphs) + plain, f"Exporting {arguments.ckpt_path}") as progress:
        trained = export.load_trained(config, arguments.ckpt_path, arguments.width)
        if plain:  # before anything is written
            try:
                export.check_expressible(trained.backbone)
            except ExportError as err:  # what --formats asks for
                raise SettingsError(str(err)) from err
        plan = export.find_plan(trained, config, arguments.ckpt_path)
        description = export.describe(trained, datamodule, plan, arguments.image_size if graphs else None)
        progress(1)
        with atomic_folder(folder) as part:  # all formats, or none
            for format_ in graphs:
                written.append(export.export_graph(trained, format_, part, arguments.image_size, description))
                progress(1 + len(written))
            if plain:  # last, since it takes the model apart
                _, weights, gap = export.export_plain(trained, config, part)
                written.append((weights, gap))
                progress(1 + len(written))
    for path, gap in written:
        print(f"{folder / path.name} (outputs differ by at most {gap:.1g} of the largest value)")
    if plain:
        print(folder / export.CONFIG_FILE)
    if export.may_write_card(folder):
        print(export.write_card(description, folder, arguments.formats))
