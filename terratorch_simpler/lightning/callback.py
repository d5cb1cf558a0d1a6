"""SimplerCallback: prunes the encoder in ``setup``, before weights are restored and before training starts."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from matplotlib.figure import Figure
from rich.console import Console
from torch import nn

from terratorch_simpler.cache import PlanCache
from terratorch_simpler.criteria import Bounds, Criterion, build_criterion
from terratorch_simpler.data import GeoTiffTiles
from terratorch_simpler.distributed import Processes
from terratorch_simpler.errors import ConfigurationError, PlanError, SimplerWarning
from terratorch_simpler.extraction import Measurement, Tokens
from terratorch_simpler.files import below, check_folder, folder_of, written_to
from terratorch_simpler.indices import resolve_width
from terratorch_simpler.lightning.optimizers import ParameterChange, dropped_parameters, updated_optimizers
from terratorch_simpler.lightning.selection import SelectionConfig, find_backbone, select
from terratorch_simpler.lightning.signals import StoppedForRequeue, StopSignals, requeue_job
from terratorch_simpler.models.backbone import SimplerBackbone
from terratorch_simpler.models.checkpoint import read_pruned_state
from terratorch_simpler.plan import RECOVERIES, SlimmingPlan
from terratorch_simpler.report import (
    plan_figure,
    plan_markdown,
    plan_rows,
    plan_table,
    report_page,
    save_figure,
    save_page,
)
from terratorch_simpler.terratorch.deployment import command_at_work
from terratorch_simpler.terratorch.factories import check_factory

PLAN_FILE = "plan.json"
FIGURE_FILE = "report.png"
PAGE_FILE = "report.html"
INDEX_FILE = "tiles.json"
PLAIN_FOLDER = "plain"
FAST_DEV_RUN_TILES = 64


class SimplerCallback(Callback):
    """Chooses how much of the encoder to keep from unlabeled tiles, and cuts it, before fit.

    The choice is made once. A run that resumes takes the shape of its checkpoint; an encoder that is cut already
    (``backbone_keep``, ``backbone_plan``) is left as it is.

    Args:
        tiles: Unlabeled tiles to stream; by default the datamodule's training images, without labels or augmentation.
        criterion: Name of a rule ("simpler", "knee", "block_influence", "angular", "cka_intervals", "sls", "fixed"), or a
            rule.
        drop_blocks: Number of blocks to drop, for rules that need a budget.
        min_depth: Least number of blocks to keep.
        max_depth: Largest number of blocks to keep.
        width: Share of the units of every attention head and MLP to keep, in (0, 1], whatever depth is chosen.
        recovery: "linear" puts a linear map in the place of what is dropped, found in the same pass; "none" does not.
        tokens: Rows used for similarity: "patch", "cls", "mean" (of the patch tokens) or "all".
        min_tiles: Tiles before the stream may stop early because one depth has won.
        max_tiles: Tiles after which it ends.
        plan: A plan.json to apply; nothing is streamed.
        plan_cache: Folder of plans that runs share: one that asks for the same encoder, tiles and settings again takes the
            plan from there, and one that was ended during the selection goes on where it was.
        plan_cache_every_tile: Recognise the data by the contents of every tile, which are read for it, instead of by those
            of 64 tiles spread over the stream and the sizes and times of the files.
        output_dir: Folder for plan.json, report.html and report.png, or a URL that fsspec knows (``s3://...``); by default
            ``<trainer.log_dir>/simpler``.
        seed: Same data and seed give the same plan.
        export: At the end of fit, write the best checkpoint as plain TerraTorch config and checkpoint into the subfolder
            ``plain`` of that folder.

    Attributes:
        written: Folder that holds plan.json, once it was written: a path, or the URL of a remote one.

    Raises:
        ConfigurationError: If options contradict each other.
    """

    def __init__(
        self,
        tiles: GeoTiffTiles | None = None,
        criterion: str | Criterion = "simpler",
        drop_blocks: int | None = None,
        min_depth: int | None = None,
        max_depth: int | None = None,
        width: float | str = 1.0,
        recovery: str = "none",
        tokens: Tokens = "patch",
        min_tiles: int = 256,
        max_tiles: int = 4096,
        plan: str | None = None,
        plan_cache: str | None = None,
        plan_cache_every_tile: bool = False,
        output_dir: str | None = None,
        seed: int = 0,
        export: bool = False,
    ) -> None:
        """Check the options; nothing is read yet."""
        if (command := command_at_work()) is not None:  # which builds callbacks before the model
            check_factory(command.config.get(command.subcommand, command.config))
        if not 1 <= min_tiles <= max_tiles:
            msg = (
                f"Found min_tiles {min_tiles} and max_tiles {max_tiles}, expected 1 <= min_tiles <= max_tiles: change them."
            )
            raise ConfigurationError(msg)
        if min_depth is not None and max_depth is not None and min_depth > max_depth:
            msg = f"Found min_depth {min_depth} above max_depth {max_depth}, expected at most that: change one of them."
            raise ConfigurationError(msg)
        if recovery not in RECOVERIES:
            msg = f"Found recovery {recovery!r}, expected one of {', '.join(RECOVERIES)}: change it."
            raise ConfigurationError(msg)
        if recovery != "none" and tokens != "patch":
            msg = f"Found recovery {recovery} with tokens {tokens!r}, expected 'patch', which maps are for: change one."
            raise ConfigurationError(msg)
        width = resolve_width(width)
        if recovery != "none" and width != 1:
            msg = (
                f"Found recovery {recovery} with width {width:g}, expected one of them, since a map is found in the encoder "
                "at full width: remove one."
            )
            raise ConfigurationError(msg)
        if plan is not None and width != 1:
            msg = f"Found both width {width:g} and a plan, expected one of them, since a plan has its own: remove width."
            raise ConfigurationError(msg)
        self.tiles = tiles
        self.plan = plan
        self.plan_cache = plan_cache
        self.plan_cache_every_tile = plan_cache_every_tile
        self.output_dir = output_dir
        self.export = export
        self.written: str | Path | None = None
        self._backbone: SimplerBackbone | None = None
        self._signals: StopSignals | None = None
        self._optimizer_changes: list[ParameterChange] = []
        self._how = SelectionConfig(
            criterion=build_criterion(criterion, drop_blocks),
            bounds=Bounds(min_depth, max_depth),
            width=width,
            tokens=tokens,
            min_tiles=min_tiles,
            max_tiles=max_tiles,
            seed=seed,
            recovery=recovery,
        )

    def compare(self, seen: Callable[[Measurement], None]) -> None:
        """Measure whatever the choice would be, and what tells every depth apart as well.

        Args:
            seen: Told what was measured.
        """
        self._how = replace(self._how, compare=seen)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose and cut, or take the shape of the checkpoint to resume from."""
        if stage != "fit":
            return
        self._signals = StopSignals(trainer)
        self._signals.catch()
        backbone = find_backbone(pl_module)
        refuse_copies(self, trainer, backbone)
        if self.export and not trainer.fast_dev_run:
            _check_export(trainer, backbone, min(self._how.width, backbone.width))  # before hours of training
        with updated_optimizers(pl_module) as changes:
            self._prune(trainer, pl_module, backbone)
        self._optimizer_changes = changes
        if self.export and not trainer.fast_dev_run:
            _check_export(trainer, backbone, backbone.width)  # a plan or a checkpoint has brought a width
        self._backbone = backbone

    def _prune(self, trainer: Trainer, pl_module: LightningModule, backbone: SimplerBackbone) -> None:
        """Take the shape of the checkpoint to resume from, or that which the encoder has already, or choose one."""
        checkpoint, weights_only = _checkpoint_to_resume(trainer)
        if checkpoint is not None:
            with Processes.of_run() as processes:
                shape = processes.broadcast_from_zero(
                    lambda: read_pruned_state(checkpoint, trainer.strategy.checkpoint_io, weights_only)
                )
            backbone.match_checkpoint(shape)
            rank_zero_info(f"Resuming with {_held(backbone)} as in {checkpoint}; nothing is selected again.")
        elif backbone.num_blocks < backbone.full_num_blocks or backbone.width < 1:
            backbone.set_width(min(self._how.width, backbone.width))
            rank_zero_info(f"{backbone.name} is cut already to {_held(backbone)}; nothing is selected.")
        else:
            if self._how.width != 1:
                backbone.at_width(self._how.width)  # refuses layers that cannot be narrowed, before anything is streamed
            self._cut(trainer, pl_module, backbone)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Fit the state of the optimizers to the pruned model."""
        states = checkpoint.get("optimizer_states") or []
        if len(states) == len(self._optimizer_changes):
            for change, state in zip(self._optimizer_changes, states, strict=True):
                change.convert_state(state)

    def state_dict(self) -> dict[str, Any]:
        """The shape, for strategies whose checkpoints hold the weights elsewhere; other checkpoints need it not."""
        return {} if self._backbone is None else self._backbone.pruned_state.as_plain()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the signals back, since Lightning's own handlers come next, and look at the optimizers."""
        self._release_signals()
        _check_optimizers(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export the best checkpoint, if asked to."""
        folder = trainer.log_dir  # a collective call, so on every rank
        if not self.export or trainer.fast_dev_run or not trainer.is_global_zero:
            return
        from terratorch_simpler.export import export_plain, load_trained

        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if not best:
            warnings.warn("Found no checkpoint to export, expected one at the end of fit.", SimplerWarning, stacklevel=2)
            return
        config = _config_of_run(trainer, pl_module)
        target = below(self._output(trainer, folder), PLAIN_FOLDER)
        with written_to(folder_of(target)) as plain:
            trained = load_trained(config, best, known=[type(getattr(trainer, "datamodule", None)).__qualname__])
            written, weights, _ = export_plain(trained, config, plain)
        rank_zero_info(f"Plain TerraTorch, without terratorch_simpler: {written.name} and {weights.name} in {target}.")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Have the job queued again, if that is why it ends before training."""
        self._release_signals()
        if isinstance(exception, StoppedForRequeue) and trainer.is_global_zero:
            requeue_job()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Give the signals back."""
        self._release_signals()

    def _release_signals(self) -> None:
        if self._signals is not None:
            self._signals.release()
            self._signals = None

    def _output(self, trainer: Trainer, folder: str | None) -> str | Path:
        return (
            folder_of(self.output_dir)
            if self.output_dir
            else below(folder_of(folder or trainer.default_root_dir), "simpler")
        )

    def _check_folders(self, trainer: Trainer, folder: str | None) -> None:
        """Refuse what cannot be written to before anything is streamed."""
        if trainer.fast_dev_run:
            return
        check_folder("output_dir", self.output_dir or self._output(trainer, folder))
        if self.plan_cache:
            check_folder("plan_cache", self.plan_cache, local=True)
        if self.tiles is not None and self.tiles.index_cache:
            check_folder("index_cache", os.path.dirname(self.tiles.index_cache) or os.curdir, local=True)

    def _cut(self, trainer: Trainer, pl_module: LightningModule, backbone: SimplerBackbone) -> None:
        folder = trainer.log_dir  # a collective call, so on every rank
        with Processes.of_run() as processes:
            if self.plan is not None:
                path = self.plan
                plan = processes.broadcast_from_zero(lambda: SlimmingPlan.load(path))
                backbone.slim(plan)
            else:
                processes.broadcast_from_zero(lambda: self._check_folders(trainer, folder))
                plan = self._select(trainer, pl_module, backbone, processes)
            processes.broadcast_from_zero(lambda: self._report(trainer, plan, folder))

    def _select(
        self, trainer: Trainer, pl_module: LightningModule, backbone: SimplerBackbone, processes: Processes
    ) -> SlimmingPlan:
        how = self._how
        if trainer.fast_dev_run:
            how = replace(how, max_tiles=min(how.max_tiles, FAST_DEV_RUN_TILES))
        elif self.tiles is not None and self.tiles.index_cache is None and self.output_dir:
            output = folder_of(self.output_dir)
            self.tiles.index_cache = str(output / INDEX_FILE) if isinstance(output, Path) else None
        cache = None
        if self.plan_cache and not trainer.fast_dev_run:
            cache = PlanCache(self.plan_cache, every_tile=self.plan_cache_every_tile)
        return select(trainer, pl_module, backbone, self.tiles, how, processes, cache)

    def _report(self, trainer: Trainer, plan: SlimmingPlan, folder: str | None) -> None:
        Console().print(plan_table(plan))
        if trainer.fast_dev_run:
            rank_zero_info(
                f"fast_dev_run: nothing is written, and at most {FAST_DEV_RUN_TILES} tiles were compared; this model stays "
                "pruned, so build it anew for a real fit."
            )
            return
        output = self._output(trainer, folder)
        if isinstance(output, Path) and _holds_another(output / PLAN_FILE, plan):
            rank_zero_info(f"Replaces the plan of an earlier fit in {output}; give output_dir to keep both.")
        with written_to(output) as written:
            plan.save(written / PLAN_FILE)
            page = save_page(report_page(plan), written / PAGE_FILE)
            _log_page(trainer, plan, page)
            if plan.similarity is not None:
                figure = plan_figure(plan)
                _log_figure(trainer, figure, save_figure(figure, written / FIGURE_FILE))
        self.written = output
        rank_zero_info(f"The plan is in {below(output, PLAN_FILE)}, what led to it in {below(output, PAGE_FILE)}.")


def _holds_another(path: Path, plan: SlimmingPlan) -> bool:
    try:
        return path.is_file() and SlimmingPlan.load(path).to_json() != plan.to_json()
    except PlanError:
        return True


def refuse_copies(own: Callback, trainer: Trainer, backbone: SimplerBackbone) -> None:
    """Refuse callbacks that have copied the model in their own setup (weight averaging), before it is changed in ours.

    Raises:
        ConfigurationError: If there is one.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    name = type(own).__name__
    for callback in callbacks[: callbacks.index(own)]:
        if any(part is not backbone for part in backbones_of(callback)):
            msg = (
                f"Found {type(callback).__name__}, which has copied the uncut model, before {name}, expected it after: list "
                f"{name} first."
            )
            raise ConfigurationError(msg)


def backbones_of(callback: Callback) -> list[SimplerBackbone]:
    """Backbones in the modules that a callback holds, such as the averaged model of WeightAveraging."""
    modules = [value for value in vars(callback).values() if isinstance(value, nn.Module)]
    return [part for module in modules for part in module.modules() if isinstance(part, SimplerBackbone)]


def _check_optimizers(trainer: Trainer, pl_module: LightningModule) -> None:
    """Refuse an optimizer that was made before the encoder was pruned, and where nobody finds it.

    Raises:
        ConfigurationError: If there is one.
    """
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        return  # parameters are other objects there
    if dropped := dropped_parameters(trainer.optimizers, pl_module):
        msg = (
            f"The optimizer holds {dropped} tensors that are no part of the pruned {type(pl_module).__name__}, since it was "
            "made before the encoder was pruned: make it in configure_optimizers."
        )
        raise ConfigurationError(msg)


def _check_export(trainer: Trainer, backbone: SimplerBackbone, width: float) -> None:
    if width != 1:
        msg = (
            "Found export: true with a width below 1.0, expected 1.0, since TerraTorch has no setting for the width of "
            "attention heads: remove export, and use terratorch-simpler export --formats onnx or pt2 afterwards."
        )
        raise ConfigurationError(msg)
    if backbone.terratorch_kwargs() is None:
        msg = (
            f"Found export: true for '{backbone.name}', expected an encoder whose depth TerraTorch can set, which "
            f"{backbone.family} is not: remove export, and use terratorch-simpler export --formats onnx or pt2 afterwards."
        )
        raise ConfigurationError(msg)
    if trainer.checkpoint_callback is None:
        msg = "Found export: true without checkpoints, expected some to export the best: set enable_checkpointing: true."
        raise ConfigurationError(msg)


def _config_of_run(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """The config that TerraTorch's command line was given, or at least the task."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, SaveConfigCallback):
            return yaml.safe_load(callback.parser.dump(callback.config, skip_none=False))  # type: ignore[no-any-return]
    task = type(pl_module)
    return {"model": {"class_path": f"{task.__module__}.{task.__qualname__}"}}


def _held(backbone: SimplerBackbone) -> str:
    width = "" if backbone.width == 1 else f" at width {backbone.width:g}"
    return f"{backbone.num_blocks} of {backbone.full_num_blocks} blocks{width}"


def _checkpoint_to_resume(trainer: Trainer) -> tuple[str | os.PathLike[str] | None, bool]:
    """The checkpoint this fit resumes from, or None, and whether it may hold tensors and plain values only.

    Lightning resolves ``ckpt_path`` ("last", "hpc", a file) into a local variable of ``Trainer._run`` and tells no
    callback before the weights are restored. Without it the encoder would be measured again for nothing; the result
    would still be right, since loading a checkpoint brings its own shape.
    """
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "_run" and frame.f_locals.get("self") is trainer:
            return frame.f_locals.get("ckpt_path"), frame.f_locals.get("weights_only") is not False
        frame = frame.f_back  # type: ignore[assignment]
    return None, True


def _log_page(trainer: Trainer, plan: SlimmingPlan, page: Path) -> None:
    """Hand what matters of the report to every logger in the form it takes: text, a file, or a table."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("simpler/report", plan_markdown(plan))
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_artifact(logger.run_id, str(page), "simpler")
        elif hasattr(logger, "log_table"):
            columns, *rows = plan_rows(plan)
            logger.log_table(key="simpler/plan", columns=columns, data=rows)


def _log_figure(trainer: Trainer, figure: Figure, path: Path) -> None:
    """Hand the figure to every logger that takes one."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure("simpler/report", figure)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_figure(logger.run_id, figure, "simpler/report.png")
        elif hasattr(logger, "log_image"):
            logger.log_image(key="simpler/report", images=[str(path)])
