"""Features with labels: rows of tokens after every block, each with the class of the patch or image it stands for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn

from terratorch_simpler.data import Batch
from terratorch_simpler.encoders import Layout, PatchGrid
from terratorch_simpler.errors import LabelsError
from terratorch_simpler.extraction.auto_batch import AutoBatch
from terratorch_simpler.extraction.hooks import EncoderPass
from terratorch_simpler.extraction.token_sampling import TokenSample, sample_tokens, token_masks
from terratorch_simpler.models.backbone import SimplerBackbone

IMAGES = 512
"""Most images that are looked at; 16 patches of each (ours)."""
NO_LABEL = -1

Readout = Callable[[int, Tensor], Tensor]
"""Number of a held block, from 0, and its raw output (B, N, D); gives what is taken for its features (B, N, D')."""


class LabelledRows(NamedTuple):
    """Rows with labels.

    Attributes:
        features: After every held block, (L, N, D), float32, on the CPU.
        labels: Class of every row, (N,), int64.
        images: Number of the image every row is of, (N,), int64.
    """

    features: Tensor
    labels: Tensor
    images: Tensor


def read_targets(batch: Batch, ignore_index: int | None) -> Tensor:
    """Labels of a batch: a class for every image (B,) or every pixel (B, H, W), int64; -1 where there is none.

    Args:
        batch: A batch of a source with labels.
        ignore_index: Class that stands for no label.

    Raises:
        LabelsError: If there are none, or they are no classes.
    """
    target = batch.get("target")
    if not isinstance(target, Tensor):
        msg = "Found no mask and no label in the data, expected one of them: give the datamodule its labels."
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


def check_labels(batches: Iterable[Batch], ignore_index: int | None, what: str) -> None:
    """Raise unless there are labels of two classes at least; the model is not needed for that.

    Args:
        batches: Batches of a source with labels.
        ignore_index: Class that stands for no label.
        what: Name of the source, for messages.

    Raises:
        LabelsError: If there are not.
    """
    seen: set[int] = set()
    for batch in batches:
        seen |= set(read_targets(batch, ignore_index).unique().tolist()) - {NO_LABEL}
        if len(seen) > 1:
            return
    raise _one_class(seen, what)


def _one_class(seen: set[int], what: str) -> LabelsError:
    found = f"only class {next(iter(seen))}" if seen else "no class at all"
    return LabelsError(f"Found {found} in the labels of the {what}, expected two classes at least: check labels and masks.")


def collect_labelled(
    forward: Callable[[Batch], object],
    backbone: SimplerBackbone,
    batches: Iterable[Batch],
    stop_after: nn.Module,
    *,
    what: str,
    ignore_index: int | None = None,
    readout: Readout | None = None,
    class_token: bool = False,
    limit: int = IMAGES,
    seed: int = 0,
) -> LabelledRows:
    """Send labelled images through the encoder and draw rows after every block it holds.

    Labels by pixel: at most 16 patches of every image, each with the most frequent class among its pixels; a patch of
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
        limit: Images with labels after which to stop.
        seed: Seed of the drawn patches.

    Raises:
        LabelsError: If there are no classes, or only one.
    """
    parts: list[LabelledRows] = []
    images = 0
    with (
        torch.compiler.set_stance("force_eager"),
        _LabelledFeatureExtractor(backbone, stop_after, ignore_index, readout, class_token, seed) as extractor,
    ):
        auto_batch = AutoBatch(extractor, forward)
        for rows in chain.from_iterable(map(auto_batch.parts, batches)):
            keep = rows.images.unique(sorted=False)[: limit - images]
            images += len(keep)
            kept = torch.isin(rows.images, keep)
            parts.append(LabelledRows(rows.features[:, kept], rows.labels[kept], rows.images[kept]))
            if images >= limit:
                break
    if not parts:
        raise _one_class(set(), what)
    found = LabelledRows(*(torch.cat(each, dim=dim) for each, dim in zip(zip(*parts, strict=True), (1, 0, 0), strict=True)))
    if len(seen := set(found.labels.unique().tolist())) < 2:
        raise _one_class(seen, what)
    return found


class _LabelledFeatureExtractor(EncoderPass):
    """Draws rows with labels from the output of every block while a batch passes."""

    def __init__(
        self,
        backbone: SimplerBackbone,
        stop_after: nn.Module,
        ignore_index: int | None,
        readout: Readout | None,
        class_token: bool,
        seed: int,
    ) -> None:
        super().__init__(backbone, stop_after)
        self._ignore_index = ignore_index
        self._readout = readout
        self._class_token = class_token
        self._seed = seed
        self._batch: Batch = {}
        self._targets = torch.empty(0)
        self._rows: list[Tensor] = []
        self._drawn: TokenSample | None = None
        self._labels = torch.empty(0)
        self._state = 0

    def run(self, forward: Callable[[Batch], object], batch: Batch) -> LabelledRows:
        """Send a batch through the model; its images count as in the data."""
        self._targets = read_targets(batch, self._ignore_index)
        self._batch, self._rows, self._drawn, self._state = batch, [], None, 0
        self.send(forward, batch)
        assert self._drawn is not None
        counts = torch.tensor(self._drawn.counts)
        images = torch.tensor(batch["index"]).repeat_interleave(counts)
        return LabelledRows(torch.stack(self._rows), self._labels, images)

    def see(self, tokens: Tensor) -> None:
        """Draw the rows."""
        block, self._state = self._state - 1, self._state + 1
        if block < 0:
            return  # what enters the first block
        if self._drawn is None:  # only an output tells how many tokens there are
            self._drawn, self._labels = self._draw(tokens)
        output = tokens if self._readout is None else self._readout(block, tokens)
        self._rows.append(self._drawn.gather(output).float().cpu())

    def _draw(self, tokens: Tensor) -> tuple[TokenSample, Tensor]:
        assert self.inputs is not None
        layout = self.backbone.layout(self.inputs, tokens.shape[-2])
        valid, special = token_masks(self._batch["valid"], tokens.shape[0], layout)
        numbers = self._batch["index"]
        if self._targets.ndim == 1:
            usable = valid & (self._targets != NO_LABEL)[:, None, None]
            token = "cls" if self._class_token and bool(special[0]) else "mean"
            drawn = sample_tokens(usable, special, numbers, token, self._seed, tokens.device)
            return drawn, self._targets.repeat_interleave(torch.tensor(drawn.counts))
        labels = patch_labels(self._targets, valid.shape[1], layout)
        drawn = sample_tokens(valid & (labels != NO_LABEL), special, numbers, "patch", self._seed, tokens.device)
        return drawn, labels.flatten()[drawn.index.cpu()]


def patch_labels(masks: Tensor, images: int, layout: Layout) -> Tensor:
    """Class of every token: the most frequent one among the pixels of its patch, the smaller number of equals (ours).

    Args:
        masks: Class of every pixel, (B, H, W); -1 where there is none.
        images: Images that the encoder sees of one tile.
        layout: What the tokens of an image stand for.

    Returns:
        int64 of shape (B, images, N); -1 for tokens that show no patch, and where half the pixels or more have no class.
    """
    labels = []
    for part in layout:
        if isinstance(part, PatchGrid):
            of_patches = majority(_fit(masks, part), part.patch[1:])
            frames = part.size[0] // part.patch[0]  # all show the same place
            labels.append(of_patches.flatten(1).repeat(1, frames)[:, None].expand(-1, images, -1))
        else:
            labels.append(torch.full((len(masks), images, part), NO_LABEL))
    return torch.cat(labels, dim=2)


def _fit(masks: Tensor, grid: PatchGrid) -> Tensor:
    """Masks of the size of the image, which the model may have padded evenly on both sides, or resized."""
    height, width = grid.size[1:]
    rows, columns = height - masks.shape[1], width - masks.shape[2]
    if min(rows, columns) < 0:
        return nn.functional.interpolate(masks[:, None].double(), size=(height, width))[:, 0].long()
    top, left = rows // 2, columns // 2
    return nn.functional.pad(masks, (left, columns - left, top, rows - top), value=NO_LABEL)


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
