"""Diagnostics of blocks against NumPy, which knows nothing of covariances in parts."""

import numpy as np
import pytest
import torch

from terratorch_simpler.criteria import Knee
from terratorch_simpler.extraction import ExtractionConfig, measure
from terratorch_simpler.functional.least_squares import NormalEquations
from terratorch_simpler.sweep.diagnostics import (
    diagnose_blocks,
    effective_dimension,
    explained_variance,
    feature_correlation,
)
from tests.in_memory_tiles import Tiles, land


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
    sums = NormalEquations([(0, 2), (1, 2)])
    for part in rows.split(parts, dim=1):
        judge = range(0, part.shape[1], 3)
        sums.add(part, [row for row in range(part.shape[1]) if row not in judge], judge)
    covariances = [sums.covariance(state) for state in range(3)]
    assert all(covariance.dtype == torch.float64 for covariance in covariances)
    for block, covariance in zip(rows.double().numpy(), covariances, strict=True):
        np.testing.assert_allclose(covariance, np.cov(block.T, bias=True), rtol=1e-6, atol=1e-7)
        assert found(covariance) == pytest.approx(reference(block), rel=1e-6)


def test_known_shapes():
    alike = torch.eye(8, dtype=torch.float64)
    assert found(alike) == {"explained_variance": 0.125, "effective_dimension": 8.0, "feature_correlation": 0.0}
    line = torch.ones(8, 8, dtype=torch.float64)
    assert found(line) == pytest.approx({"explained_variance": 1, "effective_dimension": 1, "feature_correlation": 1})
    line[:, 3] = line[3] = 0  # a feature that does not vary
    assert float(feature_correlation(line)) == pytest.approx(1)


def test_blocks_are_looked_at_over_the_patches_of_the_selection(build):
    backbone, images, outputs = build(embed_dim=48, num_heads=3, depth=6), land(40), []
    spans = [(depth, 6) for depth in range(1, 6)]
    found = measure(lambda batch: backbone(batch["image"]), backbone, Tiles(images), ExtractionConfig(Knee(), spans=spans))
    rows = diagnose_blocks(found.recovery.patch, 6)
    assert [row["block"] for row in rows] == list(range(6))
    hook = backbone.blocks[4].register_forward_hook(lambda m, i, o: outputs.append(o[:, 1:]))
    with torch.no_grad():
        backbone(images)
    hook.remove()
    expected = reference(outputs[0].flatten(0, 1).double().numpy())
    assert {key: rows[4][key] for key in expected} == pytest.approx(expected, rel=1e-3)
