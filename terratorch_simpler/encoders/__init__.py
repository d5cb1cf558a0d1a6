"""Families of encoders: where each keeps its blocks and how to cut them. One file a family, one line to register."""

from terratorch_simpler.encoders.base import (
    EncoderSpec,
    InputShape,
    Layout,
    PatchGrid,
    TerraTorchArguments,
    families,
    refuse_by_name,
    register_encoder,
    spec_of,
)
from terratorch_simpler.encoders.by_path import BlockPathSpec
from terratorch_simpler.encoders.clay import ClaySpec
from terratorch_simpler.encoders.dinov3 import DinoV3Spec
from terratorch_simpler.encoders.dofa import DofaSpec
from terratorch_simpler.encoders.prithvi import PrithviSpec, PrithviViTAdapterSpec
from terratorch_simpler.encoders.terramind import TerraMindSpec
from terratorch_simpler.encoders.timm_vit import TimmViTSpec, TorchGeoViTSpec
from terratorch_simpler.pruning.width import Narrowing

for _spec in (
    PrithviSpec(),
    PrithviViTAdapterSpec(),
    TerraMindSpec(),
    DofaSpec(),
    TorchGeoViTSpec(),
    ClaySpec(),
    DinoV3Spec(),
    TimmViTSpec(),
):
    register_encoder(_spec)

__all__ = [
    "BlockPathSpec",
    "EncoderSpec",
    "InputShape",
    "Layout",
    "Narrowing",
    "PatchGrid",
    "TerraTorchArguments",
    "families",
    "refuse_by_name",
    "register_encoder",
    "spec_of",
]
