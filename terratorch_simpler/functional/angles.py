"""How far each block turns the tokens: cosines and angles between the same token before and after blocks.

Sources: block influence is one minus the mean token cosine (ShortGPT, arXiv 2403.03853, section 2); the angular distance
arccos(cos) / pi is that of Gromov et al. (arXiv 2403.17887, section 3).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ROWS_AT_ONCE = 256
"""Rows converted to float64 at once: 25 states of width 1024 are 52 MB."""


def angle_sums(features: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and angular distance between all pairs of states of a token, summed over the tokens.

    In float64: an angle near zero is the square root of what is lost in a cosine, 2e-4 in float32.

    Args:
        features: States of shape (S, m, D): S states, m rows, width D. The same rows for every state.

    Returns:
        Sums of cosines and of arccos(cosine) / pi, each (S, S), float64, on the device of the features. A row of zeros has
        the cosine 0 with every other.

    Example:
        >>> x = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
        >>> angle_sums(x)[1]
        tensor([[0.0000, 0.5000],
                [0.5000, 0.0000]], dtype=torch.float64)
    """
    states = features.shape[0]
    cosines = features.new_zeros(states, states, dtype=torch.float64)
    angles = torch.zeros_like(cosines)
    with torch.autocast(features.device.type, enabled=False):
        for chunk in torch.split(features, ROWS_AT_ONCE, dim=1):
            rows = chunk.transpose(0, 1).double()  # (m, S, D)
            products = rows @ rows.mT
            # Dividing the products costs S x S per token; dividing the rows before would cost S x D.
            length = products.diagonal(dim1=1, dim2=2).sqrt().clamp_min(1e-12)
            cosine = (products / (length[:, :, None] * length[:, None])).clamp(-1, 1)
            cosine.diagonal(dim1=1, dim2=2).fill_(1.0)
            cosines += cosine.sum(dim=0)
            angles += cosine.arccos().sum(dim=0) / math.pi
    return cosines, angles
