"""Fixtures that several tests share: where the real tiles are, and small encoders."""

from pathlib import Path

import pytest
import torch
from terratorch.registry import BACKBONE_REGISTRY

import terratorch_simpler  # noqa: F401  registers simpler_
from terratorch_simpler.backbone import SimplerBackbone


@pytest.fixture(autouse=True)
def _offline(monkeypatch):
    """No test reaches the network: what tries to load from the Hub fails at once."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def shared_data():
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"the folder of real tiles is not beside the repository: {folder}")
    return folder


@pytest.fixture
def build():
    """Build a small randomly initialised backbone from a seed."""

    def build_backbone(name: str = "simpler_prithvi_eo_v2_tiny_tl", seed: int = 0, **kwargs) -> SimplerBackbone:
        torch.manual_seed(seed)
        return BACKBONE_REGISTRY.build(name, pretrained=False, **kwargs).eval()

    return build_backbone
