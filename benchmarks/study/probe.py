"""What frozen features know: a logistic regression on patches, judged on the test split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, jaccard_score

from benchmarks.study.data import Setup, labelled, read_split
from terratorch_simpler.extraction.labelled import NO_LABEL, majority
from terratorch_simpler.models.backbone import SimplerBackbone
from terratorch_simpler.sweep.probing import ProbeSamples, fit_predict, linear_probe

PATCH = (16, 16)
BATCH = 32


def probe(
    backbone: SimplerBackbone, data: Path, root: Path, setup: Setup, seed: int, study: dict[str, Any]
) -> dict[str, float]:
    """Fit on the labelled training tiles, judge on the test tiles.

    Args:
        backbone: The encoder as it is now.
        data: Folder ``hls_water``.
        root: Prepared tiles.
        setup: The set-up.
        seed: Of the labels that are drawn.
        study: The study's settings.

    Returns:
        Mean IoU over the classes, and accuracy, over patches.
    """
    train = _rows(backbone, root, labelled(data, setup.labels, seed), study)
    test = _rows(backbone, root, read_split(data, "test"), study)
    found, known = fit_predict(linear_probe(), train, test), test.labels.numpy()
    return {
        "test_miou": float(jaccard_score(known, found, average="macro", labels=np.unique(known))),
        "test_accuracy": float(accuracy_score(known, found)),
    }


def _rows(backbone: SimplerBackbone, root: Path, names: list[str], study: dict[str, Any]) -> ProbeSamples:
    """Features of all patches that have a class."""
    device = next(backbone.parameters()).device
    backbone.eval()
    mean, std = (np.array(study[key], dtype=np.float32)[:, None, None] for key in ("means", "stds"))
    features, labels = [], []
    for start in range(0, len(names), BATCH):
        part = names[start : start + BATCH]
        images = np.stack([(_read(root / f"images/{name}_image.tif") - mean) / std for name in part])
        masks = np.concatenate([_read(root / f"masks/{name}_mask.tif") for name in part])
        with torch.inference_mode():
            tokens = backbone(torch.from_numpy(images).to(device))[-1][:, backbone.prefix_tokens :]
        features.append(tokens.float().cpu())
        labels.append(majority(torch.from_numpy(masks).long(), PATCH).flatten(1))
    label = torch.cat(labels)
    known = label != NO_LABEL
    image = torch.arange(len(names))[:, None].expand_as(label)
    return ProbeSamples(torch.cat(features)[known], label[known], image[known])


def _read(path: Path) -> NDArray[np.float32]:
    with rasterio.open(path) as source:
        pixels: NDArray[np.float32] = source.read().astype(np.float32)
        return pixels
