"""The pretrained encoder, and where its weights are from."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import numpy as np
import timm
import torch
from timm.models.vision_transformer import LayerScale
from torch import Tensor, nn

MODEL = "vit_small_patch14_dinov2"
DIGEST = "910182e589e3f71704dfe834552066e54fc9d43c1a30f819c79e8066ab3e2046"
"""SHA-256 of the tensors of DINOv2 ViT-S/14 as ``tests/dinov2.py`` converts them: see :func:`digest`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Data, weights and name of the model."""
    parser.add_argument("data", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--model", default=MODEL, help="name of a ViT of timm")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The state dict in a file.

    Raises:
        SystemExit: If there is no such file.
    """
    if not path.is_file():
        raise SystemExit(
            f"There is no file {path}, expected a state dict with the keys of timm's {MODEL}: see tests/dinov2.py."
        )
    state: dict[str, Tensor] = torch.load(path, weights_only=True)
    return state


def digest(state: dict[str, Tensor]) -> str:
    """SHA-256 of names and values; that of the file depends on the PyTorch that wrote it."""
    total = hashlib.sha256()
    for name, value in sorted(state.items()):
        total.update(name.encode())
        total.update(np.ascontiguousarray(value.numpy()).tobytes())
    return total.hexdigest()


def load(model: str, state: dict[str, Tensor] | None, size: int) -> nn.Module:
    """A ViT of timm, in eval mode.

    Args:
        model: Its name.
        state: Its weights, whose position embedding is resized; None for random weights, with LayerScale at 1: at its
            initial 1e-5 no block would change anything.
        size: Side of the images in pixels.
    """
    torch.manual_seed(0)
    vit: nn.Module = timm.create_model(model, img_size=size, num_classes=0)
    if state is None:
        for part in vit.modules():
            if isinstance(part, LayerScale):
                nn.init.ones_(part.gamma)
    else:
        vit.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(dict(state), vit))
    return vit.eval()
