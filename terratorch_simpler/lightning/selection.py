"""One selection inside a Lightning run, from trainer to plan: the tiles, the measurement, the choice, the pruning."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from terratorch_simpler.cache import PlanCache, describe_selection, store_plan
from terratorch_simpler.criteria import Bounds, Criterion, LabelledFeatures, Probe
from terratorch_simpler.data import DatamoduleTiles, GeoTiffTiles, TileSource
from terratorch_simpler.distillation import distill, pruned_copy
from terratorch_simpler.distributed import Processes
from terratorch_simpler.errors import (
    ConfigurationError,
    FewTilesWarning,
    SimplerWarning,
    SkippedTilesWarning,
    TilesError,
    TooFewTilesError,
    UntrainedEncoderWarning,
)
from terratorch_simpler.extraction import (
    Measurement,
    PartialResult,
    count_macs,
    evaluating,
    measure,
    on_device,
    progress_bar,
    random_state_kept,
)
from terratorch_simpler.lightning.internals import fast_dev_run
from terratorch_simpler.lightning.labelled_images import labelled_features, probed_features
from terratorch_simpler.lightning.task import batch_normalizer, outermost_encoder, shows_progress, task_forward
from terratorch_simpler.logger import log
from terratorch_simpler.models.backbone import SimplerBackbone
from terratorch_simpler.plan import SlimmingPlan, package_versions
from terratorch_simpler.planning import build_plan, describe_tiles, warn_not_compared
from terratorch_simpler.selection_config import SelectionConfig

WEIGHTS = ("backbone_ckpt_path", "backbone_pretrained")
"""Arguments of an encoder that its weights show."""


@random_state_kept()  # training sees the same random numbers as with a given plan
def select(
    trainer: Trainer,
    pl_module: LightningModule,
    backbone: SimplerBackbone,
    tiles: GeoTiffTiles | None,
    config: SelectionConfig,
    processes: Processes,
    cache: PlanCache | None = None,
) -> SlimmingPlan:
    """Extract features of the intact encoder if the criterion needs them, choose a plan and apply it on all ranks.

    Args:
        trainer: Gives device, precision and progress bar.
        pl_module: The task, on the CPU.
        backbone: The intact encoder inside it.
        tiles: Tiles given by the user; None for the datamodule's training images.
        config: Settings of the selection.
        processes: The ranks of the run: each measures a share of the tiles, rank 0 chooses.
        cache: Plans of earlier runs; the new plan is added.

    Returns:
        The plan that was applied.

    Raises:
        ConfigurationError: If the criterion needs tiles and there are none.
        LabelsError: If the criterion needs labels and there are none.
    """
    config = replace(config, bounds=config.bounds.at_least(backbone.fewest_blocks))
    config.check_target(backbone.full_num_blocks)
    if not config.needs_tiles:
        return _apply(backbone, build_plan(backbone, config, None, None))
    source = _open_source(getattr(trainer, "datamodule", None), tiles, config.seed, processes)
    if config.compare is not None or config.criterion.needs_labels:
        cache = None  # a plan does not hold what is compared, and labels are not part of its key
    labelled: list[LabelledFeatures] = []  # on rank 0 only, which chooses
    if config.criterion.needs_labels:
        collect = probed_features if config.criterion.probes_labels else labelled_features
        processes.broadcast_from_zero(lambda: labelled.append(collect(trainer, pl_module, config.seed)))
    if config.recovery_target == "best":
        blocks = backbone.full_num_blocks
        best = processes.broadcast_from_zero(
            lambda: _best_depth(config.criterion, labelled[0], blocks, config.bounds.min_depth)
        )
        config = replace(config, best_depth=best)
    with ExitStack() as cache_lock:

        def look_up() -> tuple[Path | None, SlimmingPlan | None]:
            if cache is None:
                return None, None
            key = _cache_key(trainer, pl_module, backbone, source, config, cache.every_tile)
            return cache_lock.enter_context(cache.entry(key, backbone))

        path, plan = processes.broadcast_from_zero(look_up)
        if plan is not None:
            log.info(f"Took the plan of an earlier run with the same encoder, tiles and settings from {path}.")
            return _apply(backbone, replace(plan, width=config.width))
        partial_result = None
        if path is not None and not config.spans(backbone.full_num_blocks):  # sums for maps are too large to write often
            partial_result = PartialResult(path.with_suffix(".unfinished.pt"))
        measurement: Measurement | None = None
        try:
            measurement = _stream(trainer, pl_module, backbone, source, config, processes, partial_result)
            shape, skipped = measurement.input_shape, dict(measurement.skips.counts)
        except TooFewTilesError as err:  # on every rank
            if not config.labels_suffice:
                raise
            shape, skipped = err.input_shape, err.skipped
            if processes.first:
                warn_not_compared(err)
        if config.compare is not None and measurement is not None:
            config.compare(measurement)
        data = describe_tiles(source.describe(), shape, skipped)

        def build() -> SlimmingPlan:
            found = labelled[0] if labelled else None
            return build_plan(backbone, config, measurement, data, found, shows_progress(trainer))

        # Rounding may differ between machines: all ranks apply the plan of rank 0.
        plan = processes.broadcast_from_zero(build)
        if plan.recovery == "distill":
            num_files = 0 if measurement is None else len(measurement.evidence.tiles_of_file)
            plan = _distill(trainer, pl_module, backbone, source, config, plan, num_files, processes)
        plan = _apply(backbone, plan)
        if path is not None:
            processes.broadcast_from_zero(lambda: store_plan(plan, path))
        return plan


def _open_source(
    datamodule: LightningDataModule | None, tiles: GeoTiffTiles | None, seed: int, processes: Processes
) -> TileSource:
    """Open the tiles; all ranks see the same ones.

    Raises:
        ConfigurationError: If there are neither tiles nor a datamodule.
        TilesError: If a rank sees other images than rank 0.
    """
    if tiles is not None:
        return processes.broadcast_from_zero(lambda: tiles.index_files())  # rank 0 opens the files
    if datamodule is None:
        msg = "There is neither a datamodule nor tiles, expected one of them to stream: give SimplerCallback tiles."
        raise ConfigurationError(msg)
    source: TileSource = processes.run_all(lambda: DatamoduleTiles(datamodule, seed))
    data = processes.all_gather(lambda: source.describe())
    for rank, other in enumerate(data):
        if other != data[0]:
            msg = (
                f"Found other training images on rank {rank} ({other}) than on rank 0 ({data[0]}), expected the same "
                "files everywhere: look for data that was not copied to every machine."
            )
            raise TilesError(msg)
    return source


def _cache_key(
    trainer: Trainer,
    pl_module: LightningModule,
    backbone: SimplerBackbone,
    source: TileSource,
    config: SelectionConfig,
    every_tile: bool = False,
) -> dict[str, object]:
    normalize = batch_normalizer(trainer, backbone, source)
    return {
        **describe_selection(
            backbone, source, config.criterion, config.bounds, config.max_tiles, normalize, every_tile=every_tile
        ),
        "pass": [config.tokens, config.min_tiles, config.max_tiles, config.seed, *_recovery_key(config, backbone)],
        "encoder": _encoder_key(pl_module),
        "on_unsettled": config.on_unsettled,  # plans of before there was a verdict are made again
        "precision": trainer.precision,
        "task": f"{type(pl_module).__module__}.{type(pl_module).__qualname__}",
        "versions": package_versions(),
    }


def _stream(
    trainer: Trainer,
    pl_module: LightningModule,
    backbone: SimplerBackbone,
    source: TileSource,
    config: SelectionConfig,
    processes: Processes,
    partial_result: PartialResult | None,
) -> Measurement:
    """Stream the tiles through the task up to its encoder, on the trainer's device, and measure the encoder."""
    blocks = backbone.full_num_blocks
    config.bounds.within(config.criterion.depths(blocks), blocks)  # raises before streaming
    if backbone.pretrained is False and processes.first:
        warnings.warn(
            f"'{backbone.name}' was built without pretrained weights; a depth chosen on random weights means nothing: set "
            "backbone_pretrained: true.",
            UntrainedEncoderWarning,
            stacklevel=2,
        )
    planned = min(len(source), config.max_tiles)
    few = planned < config.min_tiles and not config.labels_suffice  # votes are of the other criteria
    if few and not fast_dev_run(trainer) and processes.first:
        warnings.warn(
            f"Only {planned} tiles available ({config.min_tiles} recommended, min_tiles); the choice may be unstable: "
            "give more unlabeled tiles.",
            FewTilesWarning,
            stacklevel=2,
        )
    device = trainer.strategy.root_device
    source.pin_memory = source.pin_memory or device.type == "cuda"
    with (
        on_device(pl_module, device),  # the whole task: something may run before the encoder
        evaluating(pl_module, config.seed),  # the whole task: detection models ask for boxes in training mode
        progress_bar(shows_progress(trainer), planned, f"Comparing the blocks of {backbone.name}") as progress,
    ):
        measurement = measure(
            task_forward(trainer, pl_module, backbone, source),
            backbone,
            source,
            config.extraction(blocks),
            stop_after=outermost_encoder(pl_module, backbone),
            progress=progress,
            processes=processes,
            partial_result=partial_result,
        )
    peak, limit = measurement.peak_bytes, measurement.batch_limit
    log.info(
        f"Compared the blocks over {measurement.tiles_seen:,} tiles"
        + ("" if processes.count == 1 else f" in {processes.count} processes")
        + f" in {measurement.seconds:.1f} s; waited {measurement.data_wait:.1f} s of these "
        + f"({measurement.data_wait / measurement.seconds:.1%}) for tiles"
        + ("" if peak is None else f"; at most {peak / 2**30:.2f} GiB of memory were in use")
        + ("" if limit is None else f"; memory ran out, so {limit} tiles were sent at once")
        + "."
    )
    if measurement.skips.counts and processes.first:
        warnings.warn(f"Skipped tiles: {measurement.skips}.", SkippedTilesWarning, stacklevel=2)
    return measurement


def _encoder_key(pl_module: LightningModule) -> str:
    """Settings of the encoder that its weights do not show, as the wavelengths of DOFA."""
    arguments = getattr(pl_module, "hparams", {}).get("model_args") or {}
    named = arguments.items() if isinstance(arguments, Mapping) else ()
    return repr(sorted((name, repr(value)) for name, value in named if name.startswith("backbone_") and name not in WEIGHTS))


def _recovery_key(config: SelectionConfig, backbone: SimplerBackbone) -> list[object]:
    """What a plan depends on of the settings of the recovery; distilled weights also on the width and on adapters."""
    if config.recovery == "none":
        return [config.recovery]
    of_weights: list[object] = []
    if config.recovery == "distill":
        adapters = getattr(backbone, "peft_config", {})
        plain = [
            sorted(
                (key, sorted(map(str, value)) if isinstance(value, set) else str(value)) for key, value in settings.items()
            )
            for settings in (adapters[name].to_dict() for name in sorted(adapters))
        ]
        of_weights = [config.recovery_steps, config.width, *plain]
    target = [] if config.recovery_target == "last" else [config.recovery_target]
    return [config.recovery, *of_weights, *target]


def _best_depth(criterion: Criterion, labelled: LabelledFeatures, num_blocks: int, min_depth: int | None) -> int:
    """The target of a recovery, which may be the output of a block that is not kept: ``max_depth`` does not limit it."""
    assert isinstance(criterion, Probe)  # the only one that may be combined with this target
    return criterion.best_depth(labelled, num_blocks, Bounds(min_depth))


def _distill(
    trainer: Trainer,
    pl_module: LightningModule,
    backbone: SimplerBackbone,
    source: TileSource,
    config: SelectionConfig,
    plan: SlimmingPlan,
    num_files: int,
    processes: Processes,
) -> SlimmingPlan:
    """Train a pruned copy of the encoder on the tiles, and add its weights to the plan; the encoder is not changed."""
    target = plan.recovery_target or plan.full_num_blocks
    if plan.kept_blocks == tuple(range(target)) and plan.width == 1:
        log.info(f"Nothing to distill: the pruned encoder already gives the output of block {target - 1}.")
        return replace(plan, weights={})
    # Before the task is moved to the device: the copy of the intact encoder needs no room there.
    student = processes.run_all(lambda: pruned_copy(backbone, plan.kept_blocks, plan.width))
    with (
        on_device(pl_module, trainer.strategy.root_device),
        evaluating(pl_module, config.seed),
        progress_bar(shows_progress(trainer), config.recovery_steps, f"Distilling {backbone.name}") as progress,
    ):
        result = distill(
            task_forward(trainer, pl_module, backbone, source),
            backbone,
            student,
            source,
            target=target,
            steps=config.recovery_steps,
            max_tiles=config.max_tiles,
            seed=config.seed,
            stop_after=outermost_encoder(pl_module, backbone),
            processes=processes,
            progress=progress,
            num_files=num_files,
            scale_gradients=trainer.precision in ("16-mixed", "16-true"),
        )
    log.info(
        f"Distilled the output of block {target - 1} in {config.recovery_steps} steps over {result.tiles:,} tiles in "
        f"{result.seconds:.1f} s"
        + ("" if result.peak_bytes is None else f", with at most {result.peak_bytes / 2**30:.2f} GiB of memory")
        + f": it explains {result.explained_after:.1%} of its variance on {result.held_out} held-out tiles, "
        f"{result.explained_before:.1%} before."
    )
    if result.explained_after < 0:
        msg = (
            f"After {config.recovery_steps} steps of distillation the pruned encoder explains less of the output of block "
            f"{target - 1} on held-out tiles than its mean does, and may be worse than without: set more recovery_steps, a "
            "nearer recovery_target, or recovery: none."
        )
        warnings.warn(msg, SimplerWarning, stacklevel=2)
    distilled = {
        "steps": config.recovery_steps,
        "tiles": result.tiles,
        "held_out": result.held_out,
        "explained_before": result.explained_before,
        "explained_after": result.explained_after,
    }
    return replace(plan, weights=result.weights, overview={**(plan.overview or {}), "distilled": distilled})


def _apply(backbone: SimplerBackbone, plan: SlimmingPlan) -> SlimmingPlan:
    """Prune the encoder, and add its size after pruning to the plan."""
    backbone.slim(plan)
    assert plan.parameters is not None
    plan = replace(plan, parameters={**plan.parameters, "after": backbone.num_parameters()})
    shape = (plan.data or {}).get("input_shape", backbone.input_shape)
    if plan.macs is not None and shape is not None:
        plan = replace(plan, macs={**plan.macs, "after": count_macs(backbone, shape)})
    backbone.plan = plan
    return plan
