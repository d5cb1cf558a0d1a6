"""Features with labels: rows of tokens after every block, each with the class of the patch or image it stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from terratorch_simpler.criteria import LabelledFeatures, naming
from terratorch_simpler.data import Batch
from terratorch_simpler.encoders import Layout, PatchGrid
from terratorch_simpler.errors import LabelsError
from terratorch_simpler.extraction.auto_batch import AutoBatch
from terratorch_simpler.extraction.hooks import FeatureExtractor, Readout
from terratorch_simpler.extraction.token_sampling import ROWS_PER_TILE, Tokens, TokenSample, TokenSampler, token_masks
from terratorch_simpler.functional import hsic
from terratorch_simpler.functional.scores import LabelKind
from terratorch_simpler.models.plain import Encoder

IMAGES = 512
"""Most images that are read; 16 patches of each (ours)."""
FEATURE_ROWS = IMAGES * ROWS_PER_TILE
"""Rows that fewer images share: of these, more patches are taken each."""
NO_LABEL = -1
MOST_LABEL_SETS, LONGEST_NAME = 16, 100
"""What a plan holds."""


class LabelledSample(NamedTuple):
    """Which rows of a block's output have labels of one set."""

    tokens: TokenSample
    labels: Tensor  # (R,) or (R, K)
    images: Tensor  # (R,), the number of the image that each row is of
    kind: LabelKind


class LabelSetSamples:
    """Rows for several label sets; those that are the same for two sets are gathered once.

    Args:
        sets: Rows of every label set by its name.
    """

    def __init__(self, sets: Mapping[str, LabelledSample]) -> None:
        self.sets = sets
        self._key = {name: (one.tokens.weights is None, *one.tokens.rows.tolist()) for name, one in sets.items()}
        self._distinct = {self._key[name]: one.tokens for name, one in sets.items()}

    def gather(self, output: Tensor) -> Tensor:
        """Rows (R, D) of a block's output (B * T, N, D), one label set after the other."""
        return torch.cat([tokens.gather(output) for tokens in self._distinct.values()])

    def split(self, features: Tensor) -> dict[str, Tensor]:
        """Rows of every label set by its name, (L, R, D) each: one tensor for sets with the same rows."""
        rows = [len(tokens.rows) for tokens in self._distinct.values()]
        parts = dict(zip(self._distinct, features.split(rows, dim=1), strict=True))
        return {name: parts[key] for name, key in self._key.items()}


class LabelledRows(NamedTuple):
    """Rows with labels.

    Attributes:
        features: After every kept block, (L, N, D), float32, on the CPU.
        labels: Class of every row, (N,), int64; its value, float32; or its labels that are 0 or 1, (N, K).
        images: Number of the image every row is of, (N,), int64.
        kind: What the labels are.
    """

    features: Tensor
    labels: Tensor
    images: Tensor
    kind: LabelKind

    def named(self, name_of: Callable[[int], str]) -> LabelledFeatures:
        """The rows for a criterion, with the names of their images in the order in which they come.

        Args:
            name_of: Gives the name of an image by its number.
        """
        positions = {number: position for position, number in enumerate(dict.fromkeys(self.images.tolist()))}
        images = torch.tensor([positions[number] for number in self.images.tolist()], dtype=torch.int64)
        return LabelledFeatures(self.features, self.labels, images, tuple(map(name_of, positions)), self.kind)


def layer_normed(_block: int, output: Tensor) -> Tensor:
    """Readout: every token with mean 0 and variance 1, as before a head; float32."""
    return hsic.layer_normed(output)


def read_labels(batch: Batch, ignore_index: int | None, kind: LabelKind | None) -> tuple[Tensor, LabelKind]:
    """Labels of any kind of a batch, and their kind.

    Args:
        batch: A batch of a source with labels.
        ignore_index: Class or value that stands for no label.
        kind: Kind of labels; None for what they look like: floating-point labels are values, and whole numbers classes,
            unless an image has several of them.

    Returns:
        Classes (B,) or (B, H, W), int64, -1 where there is none; values (B,) or (B, H, W), float32, NaN where there is none;
        or labels (B, K), int64, a row of -1 where there are none.

    Raises:
        LabelsError: If there are none, or they are of another kind.
    """
    target = batch.get("target")
    if isinstance(target, Tensor) and kind in (None, "multilabel") and target.ndim == 2 and target.shape[1] > 1:
        target = target.nan_to_num(NO_LABEL) if target.is_floating_point() else target
        if not ((target == 0) | (target == 1) | (target == NO_LABEL)).all():
            msg = "Labels of an image are not all 0 or 1, expected one column for each label: encode them so."
            raise LabelsError(msg)
        return target.long(), "multilabel"
    if isinstance(target, Tensor) and (kind == "regression" or (kind is None and target.is_floating_point())):
        if target.ndim in (2, 4) and target.shape[1] == 1:
            target = target[:, 0]
        if target.ndim not in (1, 3):
            msg = f"Values have shape {tuple(target.shape[1:])} for an image, expected one for every image or every pixel."
            raise LabelsError(msg)
        values = target.float()
        missing = ~values.isfinite() if ignore_index is None else ~values.isfinite() | (values == ignore_index)
        return values.masked_fill(missing, torch.nan), "regression"
    if isinstance(target, Tensor) and kind is not None and target.is_floating_point():
        batch = {**batch, "target": target.nan_to_num(NO_LABEL)}  # tasks of classes round masks of floating point as well
        batch["target"] = batch["target"].long()
    classes = read_targets(batch, ignore_index)
    return classes, "classification" if classes.ndim == 1 else "segmentation"


def read_targets(batch: Batch, ignore_index: int | None) -> Tensor:
    """Labels of a batch: a class for every image (B,) or every pixel (B, H, W), int64; -1 where there is none.

    Args:
        batch: A batch of a source with labels.
        ignore_index: Class that stands for no label.

    Raises:
        LabelsError: If there are none, or they are no classes.
    """
    target = batch.get("target")
    if isinstance(target, Mapping):
        msg = (
            f"Labels come by name ({', '.join(map(str, target))}), expected a tensor: several label sets are for the "
            "criterion 'probe' of select_depth alone."
        )
        raise LabelsError(msg)
    if not isinstance(target, Tensor):
        msg = "There is no mask and no label in the data, expected one of them: give the datamodule its labels."
        raise LabelsError(msg)
    if target.ndim in (2, 4) and target.shape[1] == 1:
        target = target[:, 0]
    if target.ndim not in (1, 3):
        msg = (
            f"Found labels of shape {tuple(target.shape[1:])} for an image (multi-label, or several masks), expected one "
            "class for every image or every pixel: they cannot be probed."
        )
        raise LabelsError(msg)
    if target.is_floating_point():
        msg = "Found labels that are no whole numbers (regression), expected classes: they cannot be probed."
        raise LabelsError(msg)
    target = target.long()
    missing = target < 0 if ignore_index is None else (target < 0) | (target == ignore_index)
    return target.masked_fill(missing, NO_LABEL)


def rows_per_image(num_images: int | None) -> int:
    """How many patches of an image are taken: 16 of many images, more where few have labels.

    Args:
        num_images: Number of images; None if it is not known.

    Example:
        >>> rows_per_image(34), rows_per_image(100_000), rows_per_image(None)
        (240, 16, 16)
    """
    return FEATURE_ROWS // min(max(num_images or IMAGES, 1), IMAGES)


def check_labels(batches: Iterable[Batch], ignore_index: int | None, what: str) -> None:
    """Raise unless there are labels of at least two classes; the model is not needed for that.

    Args:
        batches: Batches of a source with labels.
        ignore_index: Class that stands for no label.
        what: Name of the source, for messages.

    Raises:
        LabelsError: If there are not.
    """
    classes: set[int] = set()
    for batch in batches:
        classes |= set(read_targets(batch, ignore_index).unique().tolist()) - {NO_LABEL}
        if len(classes) > 1:
            return
    raise _one_class(classes, what)


def _one_class(classes: set[int], what: str) -> LabelsError:
    found = f"Found only class {next(iter(classes))}" if classes else "There is no class at all"
    return LabelsError(f"{found} in the labels of the {what}, expected two classes at least: check labels and masks.")


def collect_labelled(
    forward: Callable[[Batch], object],
    backbone: Encoder,
    batches: Iterable[Batch],
    stop_after: nn.Module,
    *,
    what: str,
    ignore_index: int | None = None,
    readout: Readout | None = None,
    class_token: bool = False,
    kind: LabelKind | Literal["classes", "any"] = "classes",
    rows: int = ROWS_PER_TILE,
    limit: int = IMAGES,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> LabelledRows:
    """Send labelled images through the encoder and sample rows after every block it keeps.

    Labels by pixel: some patches of every image, each with the most frequent class among its pixels; a patch of
    which half the pixels or more have no label is left out. Labels by image: one row, the mean of its patch tokens.

    Args:
        forward: Sends one batch through the model, on the model's device.
        backbone: The encoder, somewhere inside the model.
        batches: The images, with their labels under ``target``.
        stop_after: Module after which the rest of the model need not run.
        what: Name of the images, for messages.
        ignore_index: Class that stands for no label.
        readout: What is taken for the features of a block; by default its raw output.
        class_token: With labels by image, take the class token instead, if the encoder has one.
        kind: Kind of labels: "classes" takes no other; "any" takes what they look like. A patch has the mean of its values.
        rows: Most patches of an image.
        limit: Images with labels after which to stop.
        seed: Seed of the sampled patches.
        progress: Called with the number of images so far.

    Raises:
        LabelsError: If there are no classes, or only one.
    """
    [found] = _collect(
        forward, backbone, batches, stop_after, _LabelledTokenSampler(kind, seed, rows, ignore_index, class_token),
        what=what, readout=readout, limit=limit, progress=progress,
    ).values()  # fmt: skip
    return found


def collect_label_sets(
    forward: Callable[[Batch], object],
    backbone: Encoder,
    batches: Iterable[Batch],
    stop_after: nn.Module,
    *,
    what: str,
    readout: Readout | None = None,
    rows: int = ROWS_PER_TILE,
    limit: int = IMAGES,
    seed: int = 0,
) -> dict[str, LabelledRows]:
    """As :func:`collect_labelled`, for labels of any kind, of which there may be several sets: images pass only once.

    Every label set has the rows that it would have alone. An image, or a patch, without a label in one set serves the
    others.

    Args:
        forward: Sends one batch through the model, on the model's device.
        backbone: The encoder, somewhere inside the model.
        batches: The images, with their labels under ``target``: a tensor, or a mapping of tensors.
        stop_after: Module after which the rest of the model need not run.
        what: Name of the images, for messages.
        readout: What is taken for the features of a block; by default its raw output.
        rows: Most patches of an image.
        limit: Images with labels after which a label set is complete.
        seed: Seed of the sampled patches.

    Returns:
        Rows by the name of the label set, which is empty if ``target`` is a tensor.

    Raises:
        LabelsError: If there are no labels, or of one class only, or batches differ in their label sets.
    """
    sampler = _LabelledTokenSampler("any", seed, rows, several=True)
    return _collect(forward, backbone, batches, stop_after, sampler, what=what, readout=readout, limit=limit)


def _collect(
    forward: Callable[[Batch], object],
    backbone: Encoder,
    batches: Iterable[Batch],
    stop_after: nn.Module,
    sampler: _LabelledTokenSampler,
    *,
    what: str,
    readout: Readout | None,
    limit: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, LabelledRows]:
    found: dict[str, _Rows] = {}
    with (
        torch.compiler.set_stance("force_eager"),
        FeatureExtractor(backbone, stop_after, sampler, readout=readout, include_input=False) as extractor,
    ):
        for features, samples in chain.from_iterable(map(AutoBatch(extractor, forward).parts, batches)):
            found = found or {name: _Rows(limit, sample.kind) for name, sample in samples.sets.items()}
            if found.keys() != samples.sets.keys():
                msg = (
                    f"A batch of the {what} has the label sets {', '.join(samples.sets)}, and the first one "
                    f"{', '.join(found)}, expected the same in all: mark what has no label by -1, or NaN for values."
                )
                raise LabelsError(msg)
            for name, part in samples.split(features.float().cpu()).items():
                found[name].add(part, samples.sets[name])
            if progress is not None:
                progress(min(rows.num_images for rows in found.values()))
            if all(rows.num_images >= limit for rows in found.values()):
                break
    if not found:
        raise _one_class(set(), what)
    shared: dict[tuple[int, ...], Tensor] = {}
    return {name: rows.joined(shared, f"{what}, label set '{name}'" if name else what) for name, rows in found.items()}


class _Rows:
    """Rows of one label set, of at most so many images."""

    def __init__(self, limit: int, kind: LabelKind) -> None:
        self.num_images = 0
        self._limit = limit
        self._kind = kind
        self._features: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._images: list[Tensor] = []

    def add(self, features: Tensor, sample: LabelledSample) -> None:
        wanted = sample.images.unique(sorted=False)[: self._limit - self.num_images]
        self.num_images += len(wanted)
        keep = torch.isin(sample.images, wanted)
        self._features.append(features if keep.all() else features[:, keep])
        self._labels.append(sample.labels[keep])
        self._images.append(sample.images[keep])

    def joined(self, shared: dict[tuple[int, ...], Tensor], what: str) -> LabelledRows:
        """All rows; ``shared`` holds the features of sets with the same rows, by what they are joined from."""
        labels = torch.cat(self._labels)
        if labels.unique().numel() < (2 if labels.ndim == 1 else 1):  # labels of an image may be the same for all
            raise _one_class(set(labels.unique().tolist()), what)
        key = tuple(map(id, self._features))
        if key not in shared:
            shared[key] = torch.cat(self._features, dim=1)
        return LabelledRows(shared[key], labels, torch.cat(self._images), self._kind)


@dataclass(frozen=True)
class _LabelledTokenSampler:
    """Samples among tokens with a label."""

    kind: LabelKind | Literal["classes", "any"] = "classes"
    seed: int = 0
    rows: int = ROWS_PER_TILE
    ignore_index: int | None = None
    class_token: bool = False
    several: bool = False  # whether labels may come as several sets

    def sample(self, batch: Batch, images: int, layout: Layout, device: torch.device) -> LabelSetSamples:
        targets = batch.get("target")
        by_name = {"": targets}
        if self.several and isinstance(targets, Mapping):
            by_name = _checked_names(targets)
        samples = {}
        for name, target in by_name.items():
            with naming(name):
                samples[name] = self._sample({**batch, "target": target}, images, layout, device)
        return LabelSetSamples(samples)

    def _sample(self, batch: Batch, images: int, layout: Layout, device: torch.device) -> LabelledSample:
        if self.kind == "classes":
            targets = read_targets(batch, self.ignore_index)
            kind: LabelKind = "classification" if targets.ndim == 1 else "segmentation"
        else:
            targets, kind = read_labels(batch, self.ignore_index, None if self.kind == "any" else self.kind)
        valid, special = token_masks(batch["valid"], images, layout)
        numbers = batch["index"]
        if targets.ndim < 3:
            known = _known(targets) if targets.ndim == 1 else _known(targets).all(dim=1)
            valid = valid & known[:, None, None]
            token: Tokens = "cls" if self.class_token and bool(special[0]) else "mean"
            tokens = TokenSampler(token, self.seed)._draw(valid, special, numbers, device)
            labels = targets.repeat_interleave(torch.tensor(tokens.counts), dim=0)
        else:
            of_tokens = patch_labels(targets, valid.shape[1], layout)
            sampler = TokenSampler("patch", self.seed, rows_per_tile=self.rows)
            tokens = sampler._draw(valid & _known(of_tokens), special, numbers, device)
            labels = of_tokens.flatten()[tokens.rows.cpu()]
        rows = torch.tensor(numbers).repeat_interleave(torch.tensor(tokens.counts))
        return LabelledSample(tokens, labels, rows, kind)


def _checked_names(targets: Mapping[str, Any]) -> dict[str, Any]:
    good = all(isinstance(name, str) and 1 <= len(name) <= LONGEST_NAME for name in targets)
    if not (good and 1 <= len(targets) <= MOST_LABEL_SETS):
        msg = (
            f"Found {len(targets)} label sets ({', '.join(map(repr, targets))}), expected 1 to {MOST_LABEL_SETS}, named "
            f"by 1 to {LONGEST_NAME} characters: give fewer, or rename them."
        )
        raise LabelsError(msg)
    return dict(targets)


def _known(targets: Tensor) -> Tensor:
    return ~targets.isnan() if targets.is_floating_point() else targets != NO_LABEL


def patch_labels(masks: Tensor, images: int, layout: Layout) -> Tensor:
    """Class of every token: the most frequent one among the pixels of its patch, the smaller number of equals (ours).

    Of values it is the mean.

    Args:
        masks: Class of every pixel, (B, H, W), int64; -1 where there is none. Or values, float32; NaN where there is none.
        images: Images that the encoder sees of one tile.
        layout: What the tokens of an image stand for.

    Returns:
        As ``masks``, (B, images, N); -1 or NaN for tokens that show no patch, and where half the pixels or more have none.
    """
    labels = []
    missing, of_patch = (torch.nan, patch_means) if masks.is_floating_point() else (NO_LABEL, majority)
    for part in layout:
        if isinstance(part, PatchGrid):
            of_patches = of_patch(_fit(masks, part, missing), part.patch[1:])
            frames = part.size[0] // part.patch[0]  # all show the same place
            labels.append(of_patches.flatten(1).repeat(1, frames)[:, None].expand(-1, images, -1))
        else:
            labels.append(torch.full((len(masks), images, part), missing))
    return torch.cat(labels, dim=2)


def _fit(masks: Tensor, grid: PatchGrid, missing: float) -> Tensor:
    """Masks of the size of the image, which the model may have padded evenly on both sides, or resized."""
    height, width = grid.size[1:]
    rows, columns = height - masks.shape[1], width - masks.shape[2]
    if min(rows, columns) < 0:
        return nn.functional.interpolate(masks[:, None].double(), size=(height, width))[:, 0].to(masks.dtype)
    top, left = rows // 2, columns // 2
    return nn.functional.pad(masks, (left, columns - left, top, rows - top), value=missing)


def majority(masks: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Most frequent class of every patch; of equals the smaller number, and -1 where half of the pixels or more have none.

    Args:
        masks: Classes of shape (B, H, W), int64, -1 where there is none.
        patch: Height and width of a patch.

    Returns:
        Shape (B, rows, columns).
    """
    height, width = patch
    patches = masks.unfold(1, height, height).unfold(2, width, width).flatten(3)  # (B, rows, columns, pixels)
    classes = int(masks.max()) + 1
    counts = torch.zeros(*patches.shape[:3], classes + 1, dtype=torch.int64)  # the last one counts what has none
    index = torch.where(patches == NO_LABEL, classes, patches)
    counts.scatter_add_(3, index, torch.ones_like(index))
    known = counts[..., :classes]
    enough = 2 * known.sum(dim=3) > height * width
    return torch.where(enough, known.argmax(dim=3), NO_LABEL) if classes else torch.full(patches.shape[:3], NO_LABEL)


def patch_means(masks: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Mean value of every patch, and NaN where half of the pixels or more have none.

    Args:
        masks: Values of shape (B, H, W), NaN where there is none.
        patch: Height and width of a patch.

    Returns:
        Shape (B, rows, columns).
    """
    height, width = patch
    patches = masks.unfold(1, height, height).unfold(2, width, width).flatten(3)
    enough = 2 * (~patches.isnan()).sum(dim=3) > height * width
    return patches.nanmean(dim=3).masked_fill(~enough, torch.nan)
