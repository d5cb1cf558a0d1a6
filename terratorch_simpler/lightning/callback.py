"""SimplerCallback: prunes the encoder in ``setup``, before weights are restored and before training starts."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from rich.console import Console
from torch import nn

from terratorch_simpler.cache import PlanCache
from terratorch_simpler.criteria import Bounds, Criterion, build_criterion
from terratorch_simpler.data import GeoTiffTiles
from terratorch_simpler.distributed import Processes
from terratorch_simpler.errors import ConfigurationError, SimplerWarning
from terratorch_simpler.extraction import Measurement, Tokens
from terratorch_simpler.files import below, check_folder, folder_of, written_to
from terratorch_simpler.indices import resolve_width
from terratorch_simpler.lightning.internals import checkpoint_to_resume, cli_config, fast_dev_run, running_cli
from terratorch_simpler.lightning.optimizers import ParameterChange, dropped_parameters, updated_optimizers
from terratorch_simpler.lightning.reporting import PAGE_FILE, write_report
from terratorch_simpler.lightning.selection import select
from terratorch_simpler.lightning.signals import StoppedForRequeue, StopSignals, requeue_job
from terratorch_simpler.logger import log
from terratorch_simpler.models.backbone import SimplerBackbone, find_backbone
from terratorch_simpler.models.checkpoint import read_pruned_state
from terratorch_simpler.plan import PLAN_FILE, SlimmingPlan
from terratorch_simpler.planning import is_unsettled, tell_unsettled
from terratorch_simpler.report import plan_table
from terratorch_simpler.selection_config import OnUnsettled, SelectionConfig
from terratorch_simpler.terratorch.factories import check_factory

INDEX_FILE = "tiles.json"
PLAIN_FOLDER = "plain"
FAST_DEV_RUN_TILES = 64
FAST_DEV_RUN_TILES_OF_MAPS = 256
"""A linear map needs more tokens than its width: 16 of each tile, three in four of which it is fitted to, are 3072."""
FAST_DEV_RUN_STEPS = 2
"""Of a distillation."""


class SimplerCallback(Callback):
    """Chooses from unlabeled tiles how much of the encoder to keep, and prunes it, before fit.

    The choice is made once. A run that resumes takes the blocks and width of its checkpoint. For an encoder that is pruned
    already (``backbone_keep``, ``backbone_plan``, ``backbone_width``, a pruned ``backbone_ckpt_path``) no depth is chosen;
    only ``width`` is applied.

    Args:
        tiles: Unlabeled tiles to stream; by default the datamodule's training images, without labels or augmentation.
        criterion: Name of a criterion ("simpler", "knee", "block_influence", "angular", "cka_intervals", "sls", "probe",
            "fixed"), or a criterion.
        drop_blocks: Number of blocks to drop, for criteria that need a budget.
        min_depth: Least number of blocks to keep.
        max_depth: Largest number of blocks to keep.
        width: Share of the units of every attention head and MLP to keep, in (0, 1], whatever depth is chosen.
        recovery: What makes up for dropped blocks, without labels: "linear" puts a linear map in their place, fitted in the
            same pass; "distill" trains the pruned encoder, all of it or only its adapters (LoRA), before fit, to give the
            output of the intact one on the same tiles; "none" leaves it as it is.
        recovery_target: Whose output the recovery is for: "last", the last block of the intact encoder, a poor target where
            the last blocks suit the task worse than earlier ones; a number n, its first n blocks; or "best", the block where
            criterion "probe" scores best.
        recovery_steps: Training steps of 32 tiles with recovery "distill".
        tokens: Tokens used for similarity: "patch", "cls", "mean" (of the patch tokens) or "all".
        min_tiles: Tiles before the stream may stop early because the bootstrap agrees on a depth.
        max_tiles: Tiles after which it ends.
        plan: A plan.json to apply; nothing is streamed.
        plan_cache: Folder of plans that runs share: a run with the same encoder, tiles and settings takes the plan from
            there, and one that was interrupted during the selection is resumed.
        plan_cache_every_tile: Identify the data by a hash of every tile, for which all are read, instead of by 64 tiles
            spread over the stream and the sizes and times of the files.
        output_dir: Folder for plan.json, report.html and report.png, or a URL that fsspec knows (``s3://...``); by default
            the subfolder ``simpler`` of ``trainer.log_dir``, or of ``default_root_dir`` where no logger has a folder.
        seed: Same data and seed give the same plan.
        on_unsettled: What to do where the verdict is unsettled, which means that the data support no depth: "apply" takes
            the choice all the same and warns with the reasons, "half" keeps half of the blocks, "intact" all of them,
            whatever ``max_depth`` says, and "error" writes the report and ends the run.
        export: At the end of fit, write the best checkpoint as plain TerraTorch config and checkpoint into the subfolder
            ``plain`` of that folder.

    Attributes:
        written: Folder that holds plan.json, once it was written: a path, or the URL of a remote one.
        written_files: Names of the files in it.
        announces: Whether the log says where they are; the commands of this package say it at their end.

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
        recovery_target: int | str = "last",
        recovery_steps: int = 500,
        tokens: Tokens = "patch",
        min_tiles: int = 256,
        max_tiles: int = 4096,
        plan: str | None = None,
        plan_cache: str | None = None,
        plan_cache_every_tile: bool = False,
        output_dir: str | None = None,
        seed: int = 0,
        export: bool = False,
        on_unsettled: OnUnsettled = "apply",
    ) -> None:
        """Check the options; nothing is read yet."""
        if (cli := running_cli()) is not None:  # it builds callbacks before the model
            check_factory(cli.config.get(cli.subcommand, cli.config))
        if min_depth is not None and max_depth is not None and min_depth > max_depth:
            msg = f"Found min_depth {min_depth} above max_depth {max_depth}, expected at most that: change one of them."
            raise ConfigurationError(msg)
        width = resolve_width(width)
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
        self.written_files: list[str] = []
        self.announces = True
        self._backbone: SimplerBackbone | None = None
        self._signals: StopSignals | None = None
        self._optimizer_changes: list[ParameterChange] = []
        self._config = SelectionConfig(
            criterion=build_criterion(criterion, drop_blocks),
            bounds=Bounds(min_depth, max_depth),
            width=width,
            tokens=tokens,
            min_tiles=min_tiles,
            max_tiles=max_tiles,
            seed=seed,
            recovery=recovery,
            recovery_target=recovery_target,
            recovery_steps=recovery_steps,
            on_unsettled=on_unsettled,
        )

    @property
    def on_unsettled(self) -> OnUnsettled:
        """What to do where the verdict is unsettled."""
        return self._config.on_unsettled

    @on_unsettled.setter
    def on_unsettled(self, value: OnUnsettled) -> None:
        self._config = replace(self._config, on_unsettled=value)

    def compare(self, report: Callable[[Measurement], None]) -> None:
        """Measure every depth, whether the criterion needs it or not.

        Args:
            report: Called with the measurement.
        """
        self._config = replace(self._config, compare=report)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prune the encoder: as in the checkpoint to resume from, as planned, or as chosen now."""
        if stage != "fit":
            return
        self._signals = StopSignals(trainer)
        self._signals.catch()
        backbone = find_backbone(pl_module)
        refuse_copies(self, trainer, backbone)
        self._check_export(trainer, backbone, min(self._config.width, backbone.width))  # before hours of training
        with updated_optimizers(pl_module) as changes:
            self._prune(trainer, pl_module, backbone)
        self._optimizer_changes = changes
        self._check_export(trainer, backbone, backbone.width)  # that of a plan or a checkpoint
        self._backbone = backbone

    def _check_export(self, trainer: Trainer, backbone: SimplerBackbone, width: float, recovery: str = "none") -> None:
        if self.export and not fast_dev_run(trainer):
            from terratorch_simpler.export import check_export_option

            check_export_option(backbone, width, recovery, has_checkpoints=trainer.checkpoint_callback is not None)

    def _prune(self, trainer: Trainer, pl_module: LightningModule, backbone: SimplerBackbone) -> None:
        checkpoint, weights_only = checkpoint_to_resume(trainer)
        if checkpoint is not None:
            with Processes.of_run() as processes:
                state = processes.broadcast_from_zero(
                    lambda: read_pruned_state(checkpoint, trainer.strategy.checkpoint_io, weights_only)
                )
            backbone.match_checkpoint(state)
            log.info(f"Resuming with {_size(backbone)} as in {checkpoint}; nothing is selected again.")
        elif backbone.is_given:
            self._check_plan(backbone)
            backbone.set_width(min(self._config.width, backbone.width))
            log.info(f"{backbone.name} is built with {_size(backbone)}; nothing is selected.")
        else:
            if self._config.width != 1:
                backbone.at_width(self._config.width)  # refuses layers that cannot be slimmed, before anything is streamed
            if self.plan is None:
                self._check_export(trainer, backbone, self._config.width, self._config.recovery)
            self._apply_plan(trainer, pl_module, backbone)

    def _check_plan(self, backbone: SimplerBackbone) -> None:
        """Refuse a plan for an encoder whose blocks or width are given otherwise."""
        if self.plan is None:
            return
        with Processes.of_run() as processes:
            path = self.plan
            plan = processes.broadcast_from_zero(lambda: SlimmingPlan.load(path))
        as_planned = (plan.kept_blocks, plan.width) == (backbone.kept, backbone.width)
        if plan.recovery == "linear":
            as_planned &= set(plan.maps or {}) == {before for before, *_ in backbone.pruned_state.recovered}
        elif plan.recovery == "distill":
            as_planned &= backbone.plan is not None and backbone.plan.recovery == "distill"
        if not as_planned:
            msg = (
                f"Found both plan {self.plan} ({len(plan.kept_blocks)} blocks at width {plan.width:g}, recovery "
                f"{plan.recovery}) and an encoder that is built with {_size(backbone)}, expected one of them: remove plan, "
                "or backbone_keep, backbone_plan, backbone_width and the pruned backbone_ckpt_path."
            )
            raise ConfigurationError(msg)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Fit the state of the optimizers to the pruned model."""
        states = checkpoint.get("optimizer_states") or []
        if len(states) == len(self._optimizer_changes):
            for change, state in zip(self._optimizer_changes, states, strict=True):
                change.convert_state(state)

    def state_dict(self) -> dict[str, Any]:
        """The pruned state, for strategies that keep the weights elsewhere; in other checkpoints the weights hold it."""
        return {} if self._backbone is None else self._backbone.pruned_state.as_plain()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore Lightning's own signal handlers, and check the optimizers."""
        self._release_signals()
        _check_optimizers(trainer, pl_module)
        _forget_trained_widths(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export the best checkpoint, if asked to."""
        folder = trainer.log_dir  # a collective call, so on every rank
        if not self.export or fast_dev_run(trainer) or not trainer.is_global_zero:
            return
        from terratorch_simpler.export import describe, export_plain, find_plan, load_trained, may_write_card, write_card

        best = getattr(trainer.checkpoint_callback, "best_model_path", "")
        if not best:
            warnings.warn("No checkpoint to export: fit has written none.", SimplerWarning, stacklevel=2)
            return
        config = _config_of_run(trainer, pl_module)
        target = below(self._output(trainer, folder), PLAIN_FOLDER)
        with written_to(folder_of(target)) as plain:
            datamodule = getattr(trainer, "datamodule", None)
            trained = load_trained(config, best, known=[type(datamodule).__qualname__])
            plan = (self._backbone and self._backbone.plan) or find_plan(trained, config, best)
            description = describe(trained, datamodule, plan)
            written, weights, _ = export_plain(trained, config, plain)
            if may_write_card(target):
                write_card(description, plain, ["plain"])
        log.info(f"Plain TerraTorch, without terratorch_simpler: {written.name} and {weights.name} in {target}.")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Requeue the job if its time has ended during the selection."""
        self._release_signals()
        if isinstance(exception, StoppedForRequeue) and trainer.is_global_zero:
            requeue_job()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Restore the signal handlers."""
        self._release_signals()

    def _release_signals(self) -> None:
        if self._signals is not None:
            self._signals.release()
            self._signals = None

    def _output(self, trainer: Trainer, log_dir: str | None) -> str | Path:
        if self.output_dir:
            return folder_of(self.output_dir)
        return below(folder_of(log_dir or trainer.default_root_dir), "simpler")

    def _check_folders(self, trainer: Trainer, log_dir: str | None) -> None:
        """Refuse folders that cannot be written to before anything is streamed."""
        if fast_dev_run(trainer):
            return
        check_folder("output_dir", self.output_dir or self._output(trainer, log_dir))
        if self.plan_cache:
            check_folder("plan_cache", self.plan_cache, local=True)
        if self.tiles is not None and self.tiles.index_cache:
            check_folder("index_cache", os.path.dirname(self.tiles.index_cache) or os.curdir, local=True)

    def _apply_plan(self, trainer: Trainer, pl_module: LightningModule, backbone: SimplerBackbone) -> None:
        """Apply the given plan, or select one."""
        log_dir = trainer.log_dir  # a collective call, so on every rank
        with Processes.of_run() as processes:
            if (path := self.plan) is not None:
                plan = processes.broadcast_from_zero(lambda: SlimmingPlan.load(path))
                backbone.slim(plan)
            else:
                processes.broadcast_from_zero(lambda: self._check_folders(trainer, log_dir))
                plan = self._select(trainer, pl_module, backbone, processes)
            # A plan that was given is not judged again.
            reported = processes.broadcast_from_zero(lambda: self._report(trainer, plan, log_dir, judge=path is None))
            self.written, self.written_files = reported

    def _select(
        self, trainer: Trainer, pl_module: LightningModule, backbone: SimplerBackbone, processes: Processes
    ) -> SlimmingPlan:
        config, cache = self._config, None
        if fast_dev_run(trainer):
            enough = FAST_DEV_RUN_TILES_OF_MAPS if config.recovery == "linear" else FAST_DEV_RUN_TILES
            fewest, most = (min(tiles, enough) for tiles in (config.min_tiles, config.max_tiles))
            steps = min(config.recovery_steps, FAST_DEV_RUN_STEPS)
            config = replace(config, min_tiles=fewest, max_tiles=most, recovery_steps=steps)
        elif self.tiles is not None and self.tiles.index_cache is None and self.output_dir:
            output = folder_of(self.output_dir)
            self.tiles.index_cache = str(output / INDEX_FILE) if isinstance(output, Path) else None
        if self.plan_cache and not fast_dev_run(trainer):
            cache = PlanCache(self.plan_cache, every_tile=self.plan_cache_every_tile)
        return select(trainer, pl_module, backbone, self.tiles, config, processes, cache)

    def _report(
        self, trainer: Trainer, plan: SlimmingPlan, log_dir: str | None, judge: bool
    ) -> tuple[str | Path | None, list[str]]:
        """Show and write it; the folder, or None, and the names of the files."""
        output, files = None, []
        refused = judge and self.on_unsettled == "error" and is_unsettled(plan)
        shown = log.isEnabledFor(logging.INFO)
        if shown:
            Console().print(plan_table(plan))
        if fast_dev_run(trainer):
            log.info(
                "fast_dev_run: nothing is written, and few tiles were compared; this model stays pruned, so build it again "
                "for a real fit."
            )
        else:
            output = self._output(trainer, log_dir)
            files = write_report(trainer, plan, output, report_only=refused)
            page = below(output, PAGE_FILE)
            if refused:
                log.info(f"The report is in {page}.")
            elif self.announces:
                log.info(f"The plan is in {below(output, PLAN_FILE)}, what led to it in {page}.")
        if judge:
            tell_unsettled(plan, self.on_unsettled, reasons_shown=shown)
        return output, files


def _forget_trained_widths(trainer: Trainer, pl_module: LightningModule) -> None:
    """Weights that were trained at several widths, and are now trained at one, no longer hold narrower encoders."""
    from terratorch_simpler.lightning.slimmable import SlimmableTraining  # which imports this module

    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if not any(isinstance(callback, SlimmableTraining) for callback in callbacks):
        for each in [find_backbone(pl_module), *(copy for callback in callbacks for copy in backbones_of(callback))]:
            each.mark_trained_widths(())


def refuse_copies(own: Callback, trainer: Trainer, backbone: SimplerBackbone) -> None:
    """Refuse callbacks that copy the model in their own setup (weight averaging) before ours changes it.

    Raises:
        ConfigurationError: If there is one.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    name = type(own).__name__
    for callback in callbacks[: callbacks.index(own)]:
        if any(part is not backbone for part in backbones_of(callback)):
            msg = (
                f"Found {type(callback).__name__}, which has copied the intact model, before {name}, expected it after: "
                f"list {name} first."
            )
            raise ConfigurationError(msg)


def backbones_of(callback: Callback) -> list[SimplerBackbone]:
    """Backbones in the modules of a callback, such as the averaged model of WeightAveraging."""
    modules = [value for value in vars(callback).values() if isinstance(value, nn.Module)]
    return [part for module in modules for part in module.modules() if isinstance(part, SimplerBackbone)]


def _check_optimizers(trainer: Trainer, pl_module: LightningModule) -> None:
    if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
        return  # parameters are other objects there
    if dropped := dropped_parameters(trainer.optimizers, pl_module):
        msg = (
            f"The optimizer holds {dropped} tensors that are no part of the pruned {type(pl_module).__name__}, since it was "
            "made before the encoder was pruned: make it in configure_optimizers."
        )
        raise ConfigurationError(msg)


def _config_of_run(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """The config of the command line that runs the trainer, or else at least the class of the task."""
    if (parsed := cli_config(trainer)) is not None:
        from terratorch_simpler.terratorch.command_line import dump

        return dump(*parsed)
    task = type(pl_module)
    return {"model": {"class_path": f"{task.__module__}.{task.__qualname__}"}}


def _size(backbone: SimplerBackbone) -> str:
    width = "" if backbone.width == 1 else f" at width {backbone.width:g}"
    return f"{backbone.num_blocks} of {backbone.full_num_blocks} blocks{width}"
