r"""Similarity of the blocks of an encoder: streamed linear CKA with the unbiased HSIC estimator.

Rows are tokens. Rows of many tiles are pooled into groups, each group is one HSIC batch, and the block-by-block
numerators of all groups add up, so memory does not grow with the number of tiles and shares of the data can be summed:

.. math:: S_{ij} = \frac{\sum_g \mathrm{HSIC}_1(K_i^g, K_j^g)}
                   {\sqrt{\sum_g \mathrm{HSIC}_1(K_i^g, K_i^g)\,\sum_g \mathrm{HSIC}_1(K_j^g, K_j^g)}}

Sources: HSIC_1 is the unbiased estimator of Song et al. 2012 (JMLR 13, "Feature Selection via Dependence
Maximization", theorem 2); summing it over minibatches before taking the ratio is minibatch CKA, Nguyen et al. 2021
(arXiv 2010.15327, section 3). How tokens are sampled and grouped is a decision of this package (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from terratorch_simpler.errors import DegenerateFeaturesError

MIN_ROWS = 4
"""HSIC_1 divides by m (m - 3): fewer rows have no unbiased estimate."""

CONSTANT_RATIO = 1e-12
"""A block whose variance is below this share of its mean square is constant up to float32 rounding."""


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute matrix products in full float32, then restore all settings, of either of PyTorch's two interfaces.

    Importing TerraTorch allows TF32 on GPUs and bfloat16 on some CPUs, whose short mantissa shows in the third digit.
    """
    backends = _matmul_backends()
    before = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "ieee"
    # PyTorch refuses to report the older setting beside newer ones that it would not have set itself.
    legacy = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(legacy)
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def _matmul_backends() -> list[Any]:
    """Backends with a precision of their own; none before PyTorch 2.9."""
    backends = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    return [backend for backend in backends if hasattr(backend, "fp32_precision")]


def _centred(features: Tensor) -> Tensor:
    """Centre the rows of each block in float32 or wider; HSIC_1 does not need it, float32 does."""
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    return features - features.mean(dim=1, keepdim=True)


def hsic_matrix(features: Tensor) -> Tensor:
    """Unbiased HSIC_1 between the linear kernels of all pairs of blocks, all pairs at once.

    With K the Gram matrix of a block, its diagonal set to zero, and 1 a vector of ones,
    HSIC_1(K, M) = [tr(K M) + (1'K1)(1'M1) / ((m-1)(m-2)) - 2/(m-2) 1'KM1] / (m (m-3)); Song et al. 2012, theorem 2.

    Args:
        features: Block outputs of shape (L, m, D): L blocks, m rows, width D. The same rows for every block.

    Returns:
        Symmetric matrix of shape (L, L), float64, on the device of the features.

    Raises:
        DegenerateFeaturesError: If there are fewer than four rows.

    Example:
        >>> x = torch.eye(6)[None]
        >>> hsic_matrix(torch.cat([x, 2 * x])).shape
        torch.Size([2, 2])
    """
    m = features.shape[1]
    if m < MIN_ROWS:
        msg = f"Only {m} rows of tokens; HSIC needs at least {MIN_ROWS}: give more tiles or a larger tile_size."
        raise DegenerateFeaturesError(msg)
    with full_float32(), torch.autocast(features.device.type, enabled=False):
        x = _centred(features)
        gram = x @ x.mT  # (L, m, m)
        gram.diagonal(dim1=1, dim2=2).zero_()
        # One batched GEMM for every tr(K M), split into m float32 sums of m terms that are added in float64.
        flat = gram.transpose(0, 1)  # (m, L, m)
        traces = (flat @ flat.mT).sum(dim=0, dtype=torch.float64)
        row_sums = gram.sum(dim=2).double()  # K 1, (L, m)
        totals = row_sums.sum(dim=1)  # 1' K 1
        products = row_sums @ row_sums.mT  # 1' K M 1
    hsic = traces + totals[:, None] * totals[None, :] / ((m - 1) * (m - 2)) - products * (2 / (m - 2))
    return (hsic + hsic.T) / (2 * m * (m - 3))  # a GEMM rounds (i, j) and (j, i) differently


def layer_normed(features: Tensor) -> Tensor:
    """Tokens with zero mean and unit variance over their width, as LayerNorm without its affine part leaves them.

    Args:
        features: Block outputs of shape (..., D).

    Returns:
        The same shape, float32 or wider.
    """
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return nn.functional.layer_norm(wide, wide.shape[-1:], eps=1e-6)


def tile_means(features: Tensor, offsets: Sequence[int]) -> Tensor:
    """Mean of the rows of every tile.

    Args:
        features: Block outputs of shape (L, m, D), the rows of one tile after those of another.
        offsets: First row of each of T tiles, and m at the end.

    Returns:
        Means of shape (L, T, D), float32 or wider.
    """
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    weights = torch.zeros(len(offsets) - 1, wide.shape[1], dtype=wide.dtype)
    for tile, (first, end) in enumerate(pairwise(offsets)):
        weights[tile, first:end] = 1 / max(end - first, 1)
    with full_float32(), torch.autocast(features.device.type, enabled=False):
        return weights.to(features.device, non_blocking=features.is_cuda) @ wide


def normalise_hsic(hsic: Tensor) -> Tensor:
    """Turn HSIC numerators into CKA: S_ij = H_ij / sqrt(H_ii H_jj).

    Args:
        hsic: Numerators of shape (..., L, L), summed over groups.

    Returns:
        Similarity of the same shape, with a diagonal of exactly 1.

    Raises:
        DegenerateFeaturesError: If a block's own numerator is not positive: its rows do not vary more than noise.
    """
    own = hsic.diagonal(dim1=-2, dim2=-1)
    flat = ~(own > 0)
    if flat.any():
        raise _degenerate(flat.reshape(-1, own.shape[-1]).any(dim=0), "an output that is constant over all tokens")
    scale = own.rsqrt()
    similarity = hsic * (scale[..., :, None] * scale[..., None, :])
    similarity.diagonal(dim1=-2, dim2=-1).fill_(1.0)
    return similarity


def linear_cka(features: Tensor) -> Tensor:
    """Linear CKA with unbiased HSIC between all pairs of blocks over one batch of rows.

    Args:
        features: Block outputs of shape (L, m, D).

    Returns:
        Similarity matrix of shape (L, L), float64.

    Raises:
        DegenerateFeaturesError: If a block is constant or not finite, or there are fewer than four rows.

    Example:
        >>> x = torch.randn(1, 50, 8, generator=torch.Generator().manual_seed(0))
        >>> linear_cka(torch.cat([x, 3 * x.flip(-1)])).round(decimals=4)
        tensor([[1., 1.],
                [1., 1.]], dtype=torch.float64)
    """
    hsic = hsic_matrix(features)
    check_features(*moments(features))
    return normalise_hsic(hsic)


def draw_groups(groups: int, resamples: int, seed: int) -> Tensor:
    """Bootstrap over groups: resample as many as there are, with replacement.

    Args:
        groups: Number of groups G.
        resamples: Number of draws R.
        seed: Seed of the draws.

    Returns:
        How often each group was drawn, (R, G), float64.
    """
    drawn = torch.randint(groups, (resamples, groups), generator=torch.Generator().manual_seed(seed))
    ones = torch.ones(drawn.shape, dtype=torch.float64)
    return torch.zeros_like(ones).scatter_add_(1, drawn, ones)


def moments(features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics that reveal features which cannot be compared.

    Args:
        features: Block outputs of shape (L, m, D).

    Returns:
        Number of values that are not finite, mean square, and variance of each block; (L,) each.
    """
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    mean_square = wide.square().mean(dim=(1, 2), dtype=torch.float64)
    variance = _centred(wide).square().mean(dim=(1, 2), dtype=torch.float64)
    return (~torch.isfinite(wide)).sum(dim=(1, 2)), mean_square, variance


def check_features(not_finite: Tensor, mean_square: Tensor, variance: Tensor) -> None:
    """Refuse blocks whose outputs cannot be compared.

    Args:
        not_finite: Number of values that are not finite, (L,).
        mean_square: Mean square, (L,), or its sum over groups.
        variance: Variance, (L,), or its sum over groups.

    Raises:
        DegenerateFeaturesError: If a block is not finite or does not vary; it is named.
    """
    if (not_finite > 0).any():
        raise _degenerate(not_finite > 0, "NaN or Inf")
    constant = variance <= CONSTANT_RATIO * mean_square
    if constant.any():
        raise _degenerate(constant, "an output that is constant over all tokens")


def _degenerate(blocks: Tensor, what: str) -> DegenerateFeaturesError:
    names = ", ".join(str(i) for i in blocks.nonzero().flatten().tolist())
    return DegenerateFeaturesError(
        f"Found {what} after encoder block {names} (0-based), expected finite features that vary: check the pretrained "
        "weights, the means and stds of the data, and the precision."
    )
