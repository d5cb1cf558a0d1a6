"""Small official models of the same family, to compare what a slimmed one costs with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from terratorch.registry import BACKBONE_REGISTRY

from terratorch_simpler.models.backbone import SimplerBackbone

CONTROLS = {
    "Prithvi": ("prithvi_eo_v2_tiny_tl", "prithvi_eo_v2_100_tl"),
    "TerraMind": ("terramind_v1_tiny", "terramind_v1_small"),
}
INPUT_SETTINGS = ("bands", "modalities", "num_frames")
"""What says which input an encoder takes."""


def build_controls(backbone: SimplerBackbone, model_args: Mapping[str, Any]) -> Iterator[SimplerBackbone]:
    """The smallest official models of the encoder's family, for the same input, with random weights.

    Args:
        backbone: The encoder; it is not a control of itself.
        model_args: Arguments of the task's model.
    """
    settings = {
        **(model_args.get("backbone_kwargs") or {}),
        **{key.removeprefix("backbone_"): value for key, value in model_args.items() if key.startswith("backbone_")},
    }
    same_input = {key: settings[key] for key in INPUT_SETTINGS if key in settings}
    for name in CONTROLS.get(backbone.family, ()):
        if name != backbone.name:
            yield BACKBONE_REGISTRY.build(f"simpler_{name}", pretrained=False, **same_input).eval()
