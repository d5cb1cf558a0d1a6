"""Families of encoders: where the blocks are and how to prune them. One file and one registration for each family."""

from terratorch_simpler.encoders.base import (
    HIERARCHICAL,
    EncoderSpec,
    InputShape,
    Layout,
    PatchGrid,
    TerraTorchArguments,
    families,
    known_spec,
    refuse_by_name,
    register_encoder,
    spec_of,
)
from terratorch_simpler.encoders.by_path import BlockPathSpec
from terratorch_simpler.encoders.clay import ClaySpec
from terratorch_simpler.encoders.dinov3 import DinoV3Spec
from terratorch_simpler.encoders.dofa import DofaSpec
from terratorch_simpler.encoders.prithvi import PrithviSpec, PrithviViTAdapterSpec
from terratorch_simpler.encoders.stack import StackSpec
from terratorch_simpler.encoders.terramind import TerraMindSpec
from terratorch_simpler.encoders.timm_vit import TimmModelSpec, TimmViTSpec, TorchGeoViTSpec
from terratorch_simpler.encoders.torchvision_vit import TorchvisionViTSpec
from terratorch_simpler.encoders.transformers_vit import TransformersViTSpec
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

PLAIN_SPECS: tuple[EncoderSpec, ...] = (TimmModelSpec(), TorchvisionViTSpec(), TransformersViTSpec())
"""Models of other packages, which TerraTorch's factories do not take but ``select_depth`` and ``prune`` do."""

__all__ = [
    "HIERARCHICAL",
    "PLAIN_SPECS",
    "BlockPathSpec",
    "EncoderSpec",
    "InputShape",
    "Layout",
    "Narrowing",
    "PatchGrid",
    "StackSpec",
    "TerraTorchArguments",
    "families",
    "known_spec",
    "refuse_by_name",
    "register_encoder",
    "spec_of",
]
