"""What frozen features know: a logistic regression on patches, judged on the test split."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, jaccard_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from benchmarks.study.data import IGNORED, Setup, labelled, read_split
from terratorch_simpler.backbone import SimplerBackbone

PATCH = 16
STEPS = 1000
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
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=STEPS))
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(*train)
        told = model.predict(test[0])
    return {
        "test_miou": float(jaccard_score(test[1], told, average="macro", labels=np.unique(test[1]))),
        "test_accuracy": float(accuracy_score(test[1], told)),
    }


def _rows(
    backbone: SimplerBackbone, root: Path, names: list[str], study: dict[str, Any]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Features of all patches whose most frequent class is a class, (N, D), and that class, (N,)."""
    device = next(backbone.parameters()).device
    backbone.eval()
    mean, std = (np.array(study[key], dtype=np.float32)[:, None, None] for key in ("means", "stds"))
    features, labels = [], []
    for start in range(0, len(names), BATCH):
        part = names[start : start + BATCH]
        images = np.stack([(_read(root / f"images/{name}_image.tif") - mean) / std for name in part])
        with torch.inference_mode():
            tokens = backbone(torch.from_numpy(images).to(device))[-1][:, backbone.prefix_tokens :]
        features.append(tokens.flatten(0, 1).float().cpu().numpy())
        labels += [_majority(_read(root / f"masks/{name}_mask.tif")[0]) for name in part]
    label = np.concatenate(labels)
    known = label != IGNORED
    return np.concatenate(features)[known], label[known]


def _majority(mask: NDArray[Any]) -> NDArray[np.int64]:
    """Most frequent class of every patch, row by row; of equals the smaller number."""
    rows, columns = (side // PATCH for side in mask.shape)
    patches = mask.reshape(rows, PATCH, columns, PATCH).swapaxes(1, 2).reshape(rows * columns, -1).astype(np.int64)
    values = np.arange(IGNORED, patches.max() + 1)
    return values[(patches[:, :, None] == values).sum(axis=1).argmax(axis=1)]


def _read(path: Path) -> NDArray[np.float32]:
    with rasterio.open(path) as source:
        pixels: NDArray[np.float32] = source.read().astype(np.float32)
        return pixels
