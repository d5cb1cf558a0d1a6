"""Families of encoders: where each keeps its blocks and how to cut them. One file a family, one line to register."""

from terratorch_simpler.encoders.base import (
    EncoderAdapter,
    HostSettings,
    InputShape,
    Layout,
    PatchGrid,
    families,
    find_adapter,
    refuse_by_name,
    register_adapter,
)
from terratorch_simpler.encoders.by_path import BlockPathAdapter
from terratorch_simpler.encoders.clay import ClayAdapter
from terratorch_simpler.encoders.dinov3 import DinoV3Adapter
from terratorch_simpler.encoders.dofa import DofaAdapter
from terratorch_simpler.encoders.prithvi import PrithviAdapter, PrithviViTAdapterAdapter
from terratorch_simpler.encoders.terramind import TerraMindAdapter
from terratorch_simpler.encoders.timm_vit import TimmViTAdapter, TorchGeoViTAdapter
from terratorch_simpler.encoders.width import Narrowing

for _adapter in (
    PrithviAdapter(),
    PrithviViTAdapterAdapter(),
    TerraMindAdapter(),
    DofaAdapter(),
    TorchGeoViTAdapter(),
    ClayAdapter(),
    DinoV3Adapter(),
    TimmViTAdapter(),
):
    register_adapter(_adapter)

__all__ = [
    "BlockPathAdapter",
    "EncoderAdapter",
    "HostSettings",
    "InputShape",
    "Layout",
    "Narrowing",
    "PatchGrid",
    "families",
    "find_adapter",
    "refuse_by_name",
    "register_adapter",
]
