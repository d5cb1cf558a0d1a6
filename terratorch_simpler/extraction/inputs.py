"""Whether the tiles have the modalities and bands of the encoder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from terratorch_simpler.errors import SimplerError, SimplerWarning, TilesError
from terratorch_simpler.models.plain import Encoder


def check_input(backbone: Encoder, image: Tensor | Mapping[str, Any]) -> None:
    """Refuse an input whose modalities or bands are not those of the encoder.

    Args:
        backbone: The encoder.
        image: What reaches it, (B, C, ...), or that of each modality by name.

    Raises:
        TilesError: If they are not.
    """
    expected = backbone.input_shape
    if expected is None:
        return
    if isinstance(image, Mapping):
        if not isinstance(expected, Mapping):
            msg = (
                f"Found tiles with the modalities {', '.join(image)}, expected one image for '{backbone.name}': choose an "
                "encoder of several modalities, or set concat_bands in the datamodule."
            )
            raise TilesError(msg)
        _check_modalities(backbone.name, image, expected)
    elif isinstance(expected, Mapping):
        if len(expected) > 1:
            msg = (
                f"Found tiles of one image, expected the modalities {', '.join(expected)} of '{backbone.name}': stream the "
                "datamodule's images instead of tiles, or name one modality in backbone_modalities."
            )
            raise TilesError(msg)
        _check_bands(backbone.name, image, next(iter(expected.values()))[0])
    else:
        _check_bands(backbone.name, image, expected[0])


def explain(error: Exception, backbone: Encoder, image: Tensor | Mapping[str, Any]) -> None:
    """Explain an error before the encoder, in normalisation or a layer, by the bands of the tiles if these are wrong.

    Tiles are not refused earlier: a layer before the encoder may turn their bands into the expected ones.

    Args:
        error: What was raised before the encoder was reached.
        backbone: The encoder.
        image: A batch of tiles as they were read.

    Raises:
        TilesError: If the tiles have not the modalities or bands of the encoder.
    """
    if isinstance(error, SimplerError | torch.OutOfMemoryError):
        return
    try:
        check_input(backbone, image)
    except TilesError as refusal:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        msg = f"{refusal} What comes before the encoder does not take them either ({what})."
        raise TilesError(msg) from error


def _check_modalities(backbone: str, image: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]) -> None:
    missing = [name for name in expected if name not in image]
    if len(missing) == len(expected):
        msg = (
            f"Found tiles with the modalities {', '.join(image)}, expected {', '.join(expected)} of '{backbone}': give "
            "datamodule and backbone_modalities the same names."
        )
        raise TilesError(msg)
    if missing:
        warnings.warn(
            f"Found tiles without {', '.join(missing)}, expected all modalities of '{backbone}': the depth is chosen from "
            "what is there; remove them from backbone_modalities if they are never there.",
            SimplerWarning,
            stacklevel=2,
        )
    for name, shape in expected.items():
        if name in image:
            _check_bands(f"{backbone}' for modality '{name}", image[name], shape[0])


def _check_bands(backbone: str, image: Tensor, expected: int) -> None:
    found = image.shape[1]
    if found != expected:
        msg = (
            f"Found tiles with {found} bands, expected the {expected} bands of '{backbone}': choose bands "
            "with output_bands in the datamodule or bands in GeoTiffTiles, or set backbone_bands."
        )
        raise TilesError(msg)
