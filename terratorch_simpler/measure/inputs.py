"""Whether the tiles are what the encoder takes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from terratorch_simpler.backbone import SimplerBackbone
from terratorch_simpler.errors import SimplerWarning, TilesError


def check_input(backbone: SimplerBackbone, image: Tensor | Mapping[str, Any]) -> None:
    """Refuse tiles whose modalities or bands are not those of the encoder.

    Args:
        backbone: The encoder.
        image: A batch of tiles, (B, C, ...), or of each modality by name.

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
