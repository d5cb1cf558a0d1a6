"""Diagnostics of blocks against NumPy, which knows nothing of covariances in parts."""

import copy

import numpy as np
import pytest
import torch

from terratorch_simpler.selection import find_backbone
from terratorch_simpler.sweep.diagnostics import (
    Covariances,
    diagnose_blocks,
    effective_dimension,
    explained_variance,
    feature_correlation,
)
from tests.test_probe import run_of

pytestmark = pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.UntrainedEncoderWarning")


def reference(rows):
    """By singular values of centred rows and NumPy's correlation."""
    values = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False) ** 2
    correlation = np.abs(np.corrcoef(rows.T))
    return {
        "explained_variance": values[0] / values.sum(),
        "effective_dimension": values.sum() ** 2 / (values**2).sum(),
        "feature_correlation": correlation[~np.eye(len(correlation), dtype=bool)].mean(),
    }


def found(covariance):
    return {
        "explained_variance": float(explained_variance(covariance)),
        "effective_dimension": float(effective_dimension(covariance)),
        "feature_correlation": float(feature_correlation(covariance)),
    }


@pytest.mark.parametrize("parts", [[300], [7, 200, 93]])
def test_covariances_in_parts_are_those_of_all_rows(parts):
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(3, 12, 12, generator=generator)
    rows = torch.randn(3, 300, 12, generator=generator) @ mixed + 1000  # far from zero, as some features are
    sums = Covariances()
    for part in rows.split(parts, dim=1):
        sums.add(part)
    covariances = sums.compute()
    assert covariances.dtype == torch.float64
    for block, covariance in zip(rows.double().numpy(), covariances, strict=True):
        np.testing.assert_allclose(covariance, np.cov(block.T, bias=True), rtol=1e-8, atol=1e-8)
        assert found(covariance) == pytest.approx(reference(block), rel=1e-8)


def test_known_shapes():
    alike = torch.eye(8, dtype=torch.float64)
    assert found(alike) == {"explained_variance": 0.125, "effective_dimension": 8.0, "feature_correlation": 0.0}
    line = torch.ones(8, 8, dtype=torch.float64)
    assert found(line) == pytest.approx({"explained_variance": 1, "effective_dimension": 1, "feature_correlation": 1})
    line[:, 3] = line[3] = 0  # a feature that does not vary
    assert float(feature_correlation(line)) == pytest.approx(1)


def test_blocks_are_looked_at_over_the_patches_of_the_training_images(datamodule, trainer, task):
    model, data = task(), datamodule()
    intact = copy.deepcopy(find_backbone(model))
    find_backbone(model).keep_blocks(range(2))
    rows = diagnose_blocks(run_of(trainer, data), model, intact, None, 0)
    assert [row["block"] for row in rows] == list(range(1, 13))
    images = torch.stack([data.train_dataset[i]["image"] for i in range(48)])
    valid = torch.stack([torch.from_numpy(~np.isnan(gaps_of(data, i))) for i in range(48)])
    outputs = []
    hook = intact.blocks[4].register_forward_hook(lambda m, i, o: outputs.append(o[:, 1:]))
    with torch.no_grad():
        intact(data.aug({"image": images})["image"])
    hook.remove()
    shown = torch.nn.functional.max_pool2d(valid.float()[:, None], 16).flatten(1) > 0
    expected = reference(outputs[0][shown].double().numpy())
    assert {key: rows[4][key] for key in expected} == pytest.approx(expected, rel=1e-3)


def gaps_of(data, index):
    dataset = copy.copy(data.train_dataset)
    dataset.no_data_replace = None
    return dataset[index]["image"].sum(dim=0).numpy()
