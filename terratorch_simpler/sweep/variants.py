"""Encoders that a sweep compares: every variant of the intact one, sharing weights, and small official models."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from terratorch.registry import BACKBONE_REGISTRY
from torch import nn

from terratorch_simpler.models.backbone import SimplerBackbone, find_backbone
from terratorch_simpler.plan import SlimmingPlan

CONTROLS = {
    "Prithvi": ("prithvi_eo_v2_tiny_tl", "prithvi_eo_v2_100_tl"),
    "TerraMind": ("terramind_v1_tiny", "terramind_v1_small"),
}
INPUT_SETTINGS = ("bands", "modalities", "num_frames")
"""What says which input an encoder takes."""


@dataclass(frozen=True)
class Variant:
    """One way to slim an encoder.

    Attributes:
        kept: Kept blocks, 0-based, ascending.
        width: Kept share of attention and MLP width.
        chosen_by: Names of the criteria that pick exactly this.
    """

    kept: tuple[int, ...]
    width: float = 1.0
    chosen_by: tuple[str, ...] = ()

    @property
    def first_blocks(self) -> bool:
        """Whether the first blocks are kept, without gaps."""
        return self.kept == tuple(range(len(self.kept)))


def list_variants(plan: SlimmingPlan, fewest_blocks: int, widths: Sequence[float]) -> list[Variant]:
    """Every depth and every other set of blocks that a criterion picks, at every width, the widest first.

    Args:
        plan: The plan of the intact encoder; its overview says what each criterion picks.
        fewest_blocks: Fewest blocks that the encoder works with.
        widths: Kept shares of width.
    """
    picked = {name: tuple(choice["kept_blocks"]) for name, choice in _criteria(plan).items()}
    picked.setdefault(plan.criterion["name"], tuple(plan.kept_blocks))  # on_unsettled may keep others than it picks
    depths = [tuple(range(depth)) for depth in range(fewest_blocks, plan.full_num_blocks + 1)]
    others = sorted({kept for kept in picked.values() if len(kept) >= fewest_blocks} - set(depths))
    return [
        Variant(kept, width, tuple(sorted(name for name in picked if picked[name] == kept and width == plan.width)))
        for width in sorted(set(widths), reverse=True)
        for kept in [*depths, *others]
    ]


def _criteria(plan: SlimmingPlan) -> Mapping[str, Any]:
    overview = plan.overview or {}
    return overview.get("criteria") or {}


def build_variants(intact: SimplerBackbone, variants: Sequence[Variant]) -> list[SimplerBackbone]:
    """The encoder in every variant; those of one width share their weights, those of full width with the intact one.

    Args:
        intact: The intact encoder.
        variants: What to make of it.
    """
    of_width: dict[float, SimplerBackbone] = {1.0: intact}
    encoders = []
    for variant in variants:
        if variant.width not in of_width:
            of_width[variant.width] = copy.deepcopy(intact)
            of_width[variant.width].set_width(variant.width)
        encoder = _sharing_weights(of_width[variant.width])
        encoder.prune_depth(variant.kept)
        encoders.append(encoder.eval())
    return encoders


def _sharing_weights(encoder: SimplerBackbone) -> SimplerBackbone:
    # a copy of the modules around the same tensors
    tensors: chain[torch.Tensor] = chain(encoder.parameters(), encoder.buffers())
    return copy.deepcopy(encoder, {id(tensor): tensor for tensor in tensors})


@contextmanager
def replace_encoder(task: nn.Module, encoder: SimplerBackbone) -> Iterator[None]:
    """Put another encoder into a task, then restore its own."""
    own = find_backbone(task)
    path, _, name = next(path for path, part in task.named_modules() if part is own).rpartition(".")
    parent = task.get_submodule(path)
    setattr(parent, name, encoder)
    try:
        yield
    finally:
        setattr(parent, name, own)


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
