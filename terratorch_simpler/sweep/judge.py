"""The probes of every way of slimming: all depths of one width from one pass over the images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from terratorch_simpler.extraction import LabelledRows, Readout
from terratorch_simpler.lightning.selection import labelled_rows
from terratorch_simpler.models.backbone import SimplerBackbone
from terratorch_simpler.sweep.probe import Accuracy, Rows, probe
from terratorch_simpler.sweep.variants import Variant, exchanged, slimmed

Recover = Callable[[int, Tensor], Tensor]
"""Depth c and the raw output of block c (B, N, D) at full width; gives what the last block would have answered, so far as
it is recovered without training."""


def judge(
    trainer: Trainer,
    task: LightningModule,
    intact: SimplerBackbone,
    variants: Sequence[Variant],
    seed: int,
    recover: Recover | None = None,
) -> list[dict[str, float]]:
    """Probe every variant: trained on the training images, judged on the validation images.

    The features of a depth are the output of its last block behind the encoder's final norm, which is what the encoder
    cut there answers.

    Args:
        trainer: Gives device, precision and datamodule.
        task: The task; its encoder is exchanged meanwhile.
        intact: The intact encoder.
        variants: What to judge.
        seed: Seed of images, patches and resamples.
        recover: How the first blocks at full width are recovered, if they are: they are judged with it as well.

    Returns:
        For every variant its columns of a sweep.
    """
    found: dict[Variant, dict[str, float]] = {}

    def features(encoder: SimplerBackbone, recover: Recover | None = None) -> list[tuple[Rows, Rows]]:
        with exchanged(task, encoder):
            readout = _as_cut(encoder, recover)
            train = labelled_rows(trainer, task, "train", seed, readout=readout)
            test = labelled_rows(trainer, task, "val", seed, readout=readout)
        return list(zip(_by_block(train), _by_block(test), strict=True))

    prefixes = [variant for variant in variants if variant.first_blocks]
    for width, of_width in groupby(prefixes, key=lambda variant: variant.width):
        depths = list(of_width)
        (encoder,) = slimmed(intact, [Variant(max((variant.kept for variant in depths), key=len), width)])
        by_depth = features(encoder)
        for variant in depths:
            found[variant] = _columns(probe(*by_depth[len(variant.kept) - 1], seed))
        if recover is not None and width == 1.0:
            recovered = features(encoder, recover)
            for variant in depths:
                accuracies = probe(*recovered[len(variant.kept) - 1], seed)
                found[variant] |= {f"{name}_recovered": accuracy.value for name, accuracy in accuracies.items()}
    for variant in variants:
        if variant not in found:
            (encoder,) = slimmed(intact, [variant])
            found[variant] = _columns(probe(*features(encoder)[-1], seed))
    return [found[variant] for variant in variants]


def _as_cut(encoder: SimplerBackbone, recover: Recover | None) -> Readout:
    """What an encoder answers that is cut after a block."""
    norm = encoder.final_norm or nn.Identity()

    def readout(block: int, output: Tensor) -> Tensor:
        return norm(output if recover is None else recover(block + 1, output))  # type: ignore[no-any-return]

    return readout


def _by_block(rows: LabelledRows) -> list[Rows]:
    return [Rows(features, rows.labels, rows.images) for features in rows.features]


def _columns(accuracies: dict[str, Accuracy]) -> dict[str, float]:
    columns = {}
    for name, found in accuracies.items():
        columns |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
    return columns
