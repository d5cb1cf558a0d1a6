"""Width slimming: a narrow encoder computes what the whole one does with the dropped units at zero, in every family."""

import contextlib
import copy
import math
import random
from fractions import Fraction

import pytest
import timm.layers
import torch

from terratorch_simpler.backbone import SimplerBackbone
from terratorch_simpler.similarity import full_float32
from tests.families import FAMILIES, wrapped

WIDTHS = ("1/2", "3/10", "1/100")
PARTS = {"fc1": "fc2", "fc1_g": "fc2", "fc1_x": "fc2", "fc3": "fc2", "w1": "w3", "w2": "w3", "net.1": "net.3"}
"""Layers into the hidden units of an MLP, and the one out of them."""


def layers(block):
    """Attention and MLP of a block."""
    return (block.attn, block.mlp) if hasattr(block, "attn") else tuple(block)


def kept(size: int, width: Fraction) -> int:
    return max(1, math.floor(width * size))


def kept_of_head(attention, size: int, width: Fraction) -> torch.Tensor:
    """Which dimensions of a head are kept; those that a rotation turns, in pairs."""
    mask = torch.zeros(size, dtype=torch.bool)
    if hasattr(attention, "rotate_half"):
        pairs = mask.view(2, -1).T if attention.rotate_half else mask.view(-1, 2)
        pairs[: kept(size // 2, width)] = True
    else:
        mask[: kept(size, width)] = True
    return mask


@torch.no_grad()
def masked(backbone: SimplerBackbone, width: Fraction) -> SimplerBackbone:
    """The whole encoder with units at zero, and queries that undo its softmax scale."""
    whole = copy.deepcopy(backbone)
    for block in whole.blocks:
        attention, mlp = layers(block)
        heads = getattr(attention, "num_heads", None) or attention.heads
        out = getattr(attention, "proj", None) or attention.to_out
        size = out.in_features // heads
        mask = kept_of_head(attention, size, width)
        louder = math.sqrt(size / int(mask.sum()))
        joined = getattr(attention, "qkv", None) or attention.to_qkv
        for values in (joined.weight, joined.bias):
            if values is not None:
                apart = values.view(3, heads, size, -1)
                apart[:, :, ~mask] = 0
                apart[0] *= louder
        for number, name in enumerate(("q_bias", "k_bias", "v_bias")):
            if getattr(attention, name, None) is not None:
                apart = getattr(attention, name).view(heads, size)
                apart[:, ~mask] = 0
                apart *= louder if number == 0 else 1
        out.weight.view(-1, heads, size)[:, :, ~mask] = 0
        named = dict(mlp.named_modules())
        for into, back in PARTS.items():
            if into in named:
                hidden = kept(named[back].in_features, width)
                named[into].weight[hidden:] = 0
                if named[into].bias is not None:
                    named[into].bias[hidden:] = 0
                named[back].weight[:, hidden:] = 0
    return whole


@contextlib.contextmanager
def attention_of(fused: bool):
    before = timm.layers.config._USE_FUSED_ATTN
    timm.layers.set_fused_attn(fused)
    try:
        yield
    finally:
        timm.layers.config._USE_FUSED_ATTN = before


def flat(features):
    for feature in features:
        yield from flat(feature.values()) if isinstance(feature, dict) else [feature]


def answers(backbone, images):
    random.seed(0)
    torch.manual_seed(0)
    with torch.no_grad(), full_float32():  # TerraTorch allows less
        return [feature.double() for feature in flat(backbone(copy.copy(images)))]


def assert_alike(found, expected, tolerance=1e-6):
    assert [part.shape for part in found] == [part.shape for part in expected]
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.key)
def test_a_narrow_encoder_is_the_whole_one_with_units_at_zero(family, fused):
    with attention_of(fused):
        backbone = wrapped(family)
        with torch.no_grad():  # biases start at zero in most
            for name, value in [*backbone.encoder.named_parameters(), *backbone.encoder.named_buffers()]:
                if name.endswith("bias") and value.is_floating_point():
                    value.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
        images = family.image()
        intact = answers(backbone, images)
        for text in WIDTHS:
            width = Fraction(text)
            narrow = copy.deepcopy(backbone)
            narrow.set_width(float(width))
            found = answers(narrow, images)
            assert_alike(found, answers(masked(backbone, width), images))
            assert not all(torch.equal(a, b) for a, b in zip(found, intact, strict=True))
        with backbone.at_width(float(width)).lent():
            assert all(torch.equal(a, b) for a, b in zip(answers(backbone, images), found, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(answers(backbone, images), intact, strict=True))
