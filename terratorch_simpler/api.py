"""Choose a depth for any PyTorch vision transformer and prune it: two functions, without a trainer or a config."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from terratorch_simpler.criteria import Bounds, Criterion, LabelledFeatures, LabelSets, build_criterion
from terratorch_simpler.data import Batch, BatchTiles, num_tiles
from terratorch_simpler.errors import (
    ConfigurationError,
    DepthError,
    FewTilesWarning,
    LabelsError,
    PlanError,
    TooFewTilesError,
)
from terratorch_simpler.extraction import (
    Measurement,
    Tokens,
    as_pretrained,
    collect_label_sets,
    collect_labelled,
    evaluating,
    layer_normed,
    macs_by_block,
    measure,
    on_device,
    progress_bar,
    random_state_kept,
    rows_per_image,
)
from terratorch_simpler.indices import resolve_keep
from terratorch_simpler.models.backbone import SimplerBackbone, find_backbone
from terratorch_simpler.models.plain import Encoder, PlainEncoder
from terratorch_simpler.plan import MIN_GROUP_TILES, SlimmingPlan
from terratorch_simpler.planning import build_plan, describe_tiles, tell_unsettled, warn_not_compared
from terratorch_simpler.selection_config import OnUnsettled, SelectionConfig


@random_state_kept()
def select_depth(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    criterion: str | Criterion = "simpler",
    validation: Iterable[Any] | None = None,
    blocks: str | None = None,
    tokens: Tokens = "patch",
    prefix_tokens: int | None = None,
    device: str | torch.device | None = None,
    min_tiles: int = 256,
    max_tiles: int = 4096,
    min_depth: int | None = None,
    max_depth: int | None = None,
    seed: int = 0,
    progress: bool = True,
    on_unsettled: OnUnsettled = "apply",
) -> SlimmingPlan:
    """Choose how many blocks of a vision transformer to keep, from one pass over unlabeled images.

    The images pass through the model's own forward method, without gradients and in eval mode, up to the last block. The
    outputs of the blocks are compared by streamed linear CKA, and the criterion chooses a depth. Afterwards the model is as
    it was before: modes, gradients, hooks and device; so is the state of the random generators. It is
    :func:`terratorch_simpler.prune` that drops blocks.

    The choice is the one that :class:`terratorch_simpler.SimplerCallback` makes from the same images in the same order.

    Args:
        model: A vision transformer of timm, torchvision, transformers or TerraTorch, or any module that contains one, such
            as a segmentation model. Any other model with a stack of equal blocks needs ``blocks``.
        batches: Iterable of image tensors of shape (B, C, H, W), or (B, C, T, H, W) for models of time series; of
            dictionaries with such a tensor as ``image``; or of (image, label) pairs, for instance a ``DataLoader``. Images
            are floating point and normalized as for training. Pixels that are NaN count as nodata.
        criterion: Name of a criterion, or a criterion; one with a budget is passed as an object, for instance
            ``BlockInfluence(drop_blocks=4)``. Labels are used only by criteria that need them ("sls", "probe"). For "probe"
            they may be several label sets, a dictionary of labels by name in the place of labels, alike in all batches: each
            asks for a depth, and the largest is taken.
        validation: For the criterion "probe": batches with labels of other places, on which depths are judged; by default
            they are judged by cross-validation over ``batches``. Dictionaries may name the file of every image as
            ``path`` or ``filename``, for the argument ``groups`` of :class:`terratorch_simpler.criteria.Probe`.
        blocks: Path of the blocks, as in ``model.get_submodule``, for instance ``"encoder.layers"``. By default they are
            looked for.
        tokens: Rows that are compared: "patch" (16 patch tokens of every image), "cls" (the first token), "mean" (of the
            patch tokens) or "all".
        prefix_tokens: Class and register tokens before the patches in a block's output. By default taken from the model, or
            what remains beside the patches.
        device: Where to run, for instance "cuda"; by default where the model is. The model returns from there.
        min_tiles: Images before the pass may stop early because 95 % of the bootstrap resamples choose one depth.
        max_tiles: Images after which it ends.
        min_depth: Least number of blocks to keep.
        max_depth: Largest number of blocks to keep.
        seed: Seed of the drawn tokens, the bootstrap, and the random generators while ``batches`` are iterated: a shuffling
            ``DataLoader`` gives the same order each time.
        progress: Whether to show a progress bar.
        on_unsettled: What to do where the verdict is unsettled: "apply" takes the choice of the criterion all the same and
            warns with the reasons, "half" keeps half of the blocks, "intact" keeps all of them, "error" raises.

    Returns:
        The plan: ``verdict``, ``depth``, ``kept_blocks``, the ``scores`` of all depths, the ``similarity`` of shape (L, L),
        the bootstrap ``votes``, and parameters and MACs before and after.

    Raises:
        UnsupportedEncoderError: If the model has no recognizable stack of equal blocks, is hierarchical (Swin, ConvNeXt), or
            contains several encoders.
        TilesError: If ``batches`` yields fewer than 32 images (none, with the criterion "probe"), something else
            than images, or images that do not fit.
        ConfigurationError: If arguments contradict each other, the criterion is unknown, or the model holds a ``simpler_``
            encoder and ``blocks`` or ``prefix_tokens`` are given.
        DepthError: If the bounds leave no depth, or the model has too few blocks, or was pruned before.
        DegenerateFeaturesError: If the output of a block is constant or not finite.
        LabelsError: If the criterion needs labels and there are none.
        NoAnswerError: If the criterion has no answer for this encoder.
        UnsettledError: If the verdict is unsettled and ``on_unsettled`` is "error".

    Warns:
        UnsettledWarning: If the verdict is unsettled.
        FewTilesWarning: If there were fewer than ``min_tiles`` images, or with the criterion "probe" fewer than 32: then the
            depth is chosen from the labels alone, and ``similarity`` is None.

    Example:
        >>> import timm, torch
        >>> from terratorch_simpler import prune, select_depth
        >>> model = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=6)
        >>> images = torch.randn(4, 16, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        >>> plan = select_depth(model, images, min_tiles=64, progress=False)
        >>> prune(model, plan) == list(range(plan.depth))
        True
    """
    encoder = _encoder_of(model, blocks, prefix_tokens)
    if encoder.num_blocks < encoder.full_num_blocks:
        msg = (
            f"{encoder.name} was pruned already, to {encoder.num_blocks} of {encoder.full_num_blocks} blocks: build it anew."
        )
        raise DepthError(msg)
    config = SelectionConfig(
        criterion=build_criterion(criterion),
        bounds=Bounds(min_depth, max_depth).at_least(encoder.fewest_blocks),
        width=1.0,
        tokens=tokens,
        min_tiles=min_tiles,
        max_tiles=max_tiles,
        seed=seed,
        on_unsettled=on_unsettled,
    )
    config.bounds.within(config.criterion.depths(encoder.full_num_blocks), encoder.full_num_blocks)  # before streaming
    if validation is not None and not config.criterion.probes_labels:
        msg = f"validation is given to criterion {config.criterion.name!r}, which judges no labels: remove it."
        raise ConfigurationError(msg)
    if not config.needs_tiles:
        return _with_sizes_after(encoder, build_plan(encoder, config, None, None))
    with _moved_to(model, device), evaluating(model, seed):
        labelled = _labelled(model, encoder, config.criterion, batches, validation, seed)
        source = BatchTiles(batches, max_tiles, _fewest(config.criterion))
        measurement: Measurement | None = None
        too_few: TooFewTilesError | None = None
        with (
            as_pretrained(model, encoder),
            progress_bar(
                progress, _num_images(batches, max_tiles), f"Comparing the blocks of {encoder.name}"
            ) as update_progress,
        ):
            try:
                measurement = measure(
                    _forward(encoder),
                    encoder,
                    source,
                    config.extraction(encoder.full_num_blocks),
                    stop_after=_last_called(encoder),
                    progress=update_progress,
                )
                shape, skipped = measurement.input_shape, dict(measurement.skips.counts)
            except TooFewTilesError as err:
                if not config.labels_suffice:
                    raise
                too_few, shape, skipped = err, err.input_shape, err.skipped
        data = describe_tiles(source.describe(), shape, skipped)
        plan = _with_sizes_after(encoder, build_plan(encoder, config, measurement, data, labelled, progress))
    if too_few is not None:
        warn_not_compared(too_few)
    elif measurement is not None and measurement.tiles_seen < min_tiles and not config.labels_suffice:
        warnings.warn(
            f"Only {measurement.tiles_seen} images available (min_tiles is {min_tiles}); the choice may be unstable.",
            FewTilesWarning,
            stacklevel=3,  # beyond the decorator
        )
    tell_unsettled(plan, on_unsettled)
    return plan


def prune(model: nn.Module, plan: SlimmingPlan | int | Sequence[int], *, blocks: str | None = None) -> list[int]:
    """Drop blocks of a vision transformer, in place, and free their memory.

    Final norm, pooling and head follow the last kept block. What describes depth is set: ``config.num_hidden_layers`` and
    the stages of a backbone (transformers), ``feature_info`` (timm), names in the state dict. So the model still runs,
    trains and saves, and its weights load into a model that is built with that depth. Create the optimizer afterwards: an
    earlier one holds the dropped parameters.

    A plain TerraTorch encoder returns the features after each of its kept blocks from then on; one that is built as
    ``simpler_<name>`` keeps the feature indices of the intact encoder, so that necks and decoders need no change.

    Args:
        model: The model, of any kind that :func:`terratorch_simpler.select_depth` takes.
        plan: A plan; or a depth, the number of first blocks to keep; or the block numbers to keep, 0-based.
        blocks: Path of the blocks, if the model needs one; a plan of ``select_depth`` knows it.

    Returns:
        The kept block numbers in ascending order, in the numbering of the intact model.

    Raises:
        PlanError: If the plan is for another number of blocks, or also slims the width or needs a linear recovery, which
            only a ``simpler_<name>`` encoder can do.
        DepthError: If a block does not exist, or no block is kept.
        UnsupportedEncoderError: If there is no recognizable stack of equal blocks.
    """
    path_in_plan = (plan.data or {}).get("blocks") if isinstance(plan, SlimmingPlan) else None
    encoder = _encoder_of(model, blocks, None, path_in_plan)
    if isinstance(encoder, SimplerBackbone):
        if isinstance(plan, SlimmingPlan):
            return list(encoder.slim(plan))
        encoder.prune_depth(resolve_keep(plan, encoder.full_num_blocks))
        return list(encoder.kept)
    if isinstance(plan, SlimmingPlan):
        _check_plan(plan, encoder)
    kept = resolve_keep(plan.kept_blocks if isinstance(plan, SlimmingPlan) else plan, encoder.num_blocks)
    encoder.prune_depth(kept)
    return list(kept)


def _encoder_of(
    model: nn.Module, blocks: str | None, prefix_tokens: int | None, default_blocks: str | None = None
) -> Encoder:
    if any(isinstance(part, SimplerBackbone) for part in model.modules()):
        if blocks is not None or prefix_tokens is not None:
            msg = "blocks and prefix_tokens are for plain models, and a simpler_ encoder knows both: remove them."
            raise ConfigurationError(msg)
        return find_backbone(model)
    return PlainEncoder(model, blocks or default_blocks, prefix_tokens)


def _check_plan(plan: SlimmingPlan, encoder: PlainEncoder) -> None:
    if plan.full_num_blocks != encoder.num_blocks:
        msg = (
            f"The plan is for {plan.full_num_blocks} blocks, and {encoder.name} has {encoder.num_blocks}: use the model "
            "that the plan was made for, before it is pruned."
        )
        raise PlanError(msg)
    if plan.width != 1 or plan.recovery != "none":
        msg = (
            f"The plan has width {plan.width:g} and recovery {plan.recovery!r}, and a plain model can only be pruned in "
            "depth: build the encoder as simpler_<name> and give it the plan."
        )
        raise PlanError(msg)


def _moved_to(model: nn.Module, device: str | torch.device | None) -> AbstractContextManager[None]:
    return nullcontext() if device is None else on_device(model, torch.device(device))


def _forward(encoder: Encoder) -> Callable[[Batch], object]:
    """Send the images of a batch through the model, on its device and in its precision."""
    like = next(parameter for parameter in encoder.parameters() if parameter.is_floating_point())

    def move(image: Any) -> Any:
        return {name: move(part) for name, part in image.items()} if isinstance(image, Mapping) else image.to(like)

    return lambda batch: encoder(move(batch["image"]))


def _last_called(encoder: Encoder) -> nn.Module:
    return encoder if isinstance(encoder, SimplerBackbone) else encoder.last_called


def _labelled(
    model: nn.Module,
    encoder: Encoder,
    criterion: Criterion,
    batches: Iterable[Any],
    validation: Iterable[Any] | None,
    seed: int,
) -> LabelSets | None:
    """What a criterion needs of features with labels: of the model with tuned adapters and prompts, unless it probes."""
    if not criterion.needs_labels:
        return None
    if isinstance(batches, Iterator):
        msg = (
            f"The criterion needs labels and a second pass, and {type(batches).__name__} can be used only once: pass a list."
        )
        raise ConfigurationError(msg)

    def collect(batches: Iterable[Any], what: str, fewest: int) -> dict[str, LabelledFeatures]:
        source = BatchTiles(batches, sys.maxsize, fewest, labels=True, what=what)
        common = (_forward(encoder), encoder, source, _last_called(encoder))
        if not criterion.probes_labels:
            return {"": collect_labelled(*common, what=what, class_token=True, seed=seed).named(source.name_of)}
        with as_pretrained(model, encoder):
            limit = rows_per_image(_num_images(batches, sys.maxsize))
            rows = collect_label_sets(*common, what=what, readout=layer_normed, rows=limit, seed=seed)
        return {name: each.named(source.name_of) for name, each in rows.items()}

    train = collect(batches, "batches", _fewest(criterion))
    if validation is not None and criterion.probes_labels:
        judged = collect(validation, "validation", 1)
        if judged.keys() != train.keys():
            names = [", ".join(each) or "no name" for each in (train, judged)]
            msg = f"batches have the label sets {names[0]}, and validation {names[1]}, expected the same: name them alike."
            raise LabelsError(msg)
        train = {name: replace(each, validation=judged[name]) for name, each in train.items()}
    return train.get("", train)


def _fewest(criterion: Criterion) -> int:
    """Fewest images: labels of any number of them will do, where blocks are compared for information only."""
    return 1 if criterion.probes_labels else MIN_GROUP_TILES


def _num_images(batches: Iterable[Any], max_tiles: int) -> int | None:
    """Number of images that will be streamed, where it is known before."""
    dataset = getattr(batches, "dataset", None)
    if isinstance(batches, Sequence):
        return min(sum(map(num_tiles, batches)), max_tiles)
    return min(len(dataset), max_tiles) if isinstance(dataset, Sized) else None


def _with_sizes_after(encoder: Encoder, plan: SlimmingPlan) -> SlimmingPlan:
    """Add the path of the blocks, and what is left without the dropped blocks."""
    if isinstance(encoder, PlainEncoder):
        plan = replace(plan, data={**(plan.data or {}), "blocks": encoder.path})
    assert plan.parameters is not None
    dropped = sorted(set(range(plan.full_num_blocks)) - set(plan.kept_blocks))
    parameters = sum(parameter.numel() for block in dropped for parameter in encoder.blocks[block].parameters())
    plan = replace(plan, parameters={**plan.parameters, "after": plan.parameters["before"] - parameters})
    if plan.macs is None:
        return plan
    shape = (plan.data or {}).get("input_shape", encoder.input_shape)
    _, macs = macs_by_block(encoder, shape)
    return replace(plan, macs={**plan.macs, "after": plan.macs["before"] - sum(macs[block] for block in dropped)})
