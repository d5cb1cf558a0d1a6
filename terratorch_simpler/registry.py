"""The source ``simpler`` in TerraTorch's backbone registry: ``simpler_<name>`` builds <name> inside a SimplerBackbone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from terratorch.models import peft_utils
from terratorch.registry import BACKBONE_REGISTRY, MultiSourceRegistry
from terratorch.utils import InvalidModelError
from torch import nn

from terratorch_simpler.backbone import SimplerBackbone
from terratorch_simpler.deployment import keep_import
from terratorch_simpler.encoders import refuse_by_name
from terratorch_simpler.plan import resolve_width

SOURCE = "simpler"


class SimplerSource:
    """A registry source over all other sources of TerraTorch's backbone registry."""

    @staticmethod
    def _others() -> MultiSourceRegistry[Any]:
        return MultiSourceRegistry(**{key: BACKBONE_REGISTRY[key] for key in BACKBONE_REGISTRY.keys() if key != SOURCE})  # noqa: SIM118 (this registry iterates over names, not keys)

    def __contains__(self, name: object) -> bool:
        """Whether TerraTorch can build the encoder ``name``, also with weights after a dot (``.mae``), as in timm."""
        others = self._others()
        return name in others or (isinstance(name, str) and name.partition(".")[0] in others)

    def __iter__(self) -> Iterator[str]:
        """Names without ``simpler_``."""
        return iter(self._others())

    def __len__(self) -> int:
        """Number of names."""
        return len(self._others())

    def build(
        self,
        name: str,
        *args: Any,
        plan: str | Path | None = None,
        keep: int | list[int] | str | None = None,
        width: float | str | None = None,
        block_path: str | None = None,
        out_indices: list[int] | str | None = None,
        **kwargs: Any,
    ) -> SimplerBackbone:
        """Build an encoder with all its blocks, wrap it, and cut it if asked to.

        Args:
            name: Name of the encoder without ``simpler_``.
            *args: For the encoder.
            plan: Path of a plan.json to apply.
            keep: First n blocks, or block numbers, to keep.
            width: Share of the units of every attention head and MLP to keep.
            block_path: Path of the blocks of an encoder of no known family.
            out_indices: Blocks whose features are returned, numbered as in the intact encoder.
            **kwargs: For the encoder.

        Raises:
            InvalidModelError: If no other source knows the name, as TerraTorch's registry expects.
            UnsupportedEncoderError: If the encoder cannot be cut.
            ConfigurationError: If ``width`` is no number above 0 and at most 1.
        """
        if name not in self:
            msg = f"Found no backbone '{name}' behind 'simpler_{name}', expected a name that TerraTorch can build."
            raise InvalidModelError(msg)
        refuse_by_name(name)
        keep_import()
        # Settings of model_args given on the command line arrive as text.
        keep, width, out_indices = (
            yaml.safe_load(value) if isinstance(value, str) else value for value in (keep, width, out_indices)
        )
        width = 1.0 if width is None else resolve_width(width)  # before weights are fetched
        if isinstance(kwargs.get("pretrained"), str):
            kwargs["pretrained"] = yaml.safe_load(kwargs["pretrained"])  # 'false' would be taken for true
        encoder = self._others().build(name, *args, **kwargs)
        return SimplerBackbone(
            encoder,
            name=name,
            out_indices=out_indices,
            keep=keep,
            plan=plan,
            width=width,
            # DINOv3 takes its weights from ckpt_path alone; whether they are any good is not known here.
            pretrained=None if "pretrained" not in kwargs and kwargs.get("ckpt_path") else bool(kwargs.get("pretrained")),
            block_path=block_path,
        )


class NarrowQKVSep(peft_utils.QKVSep):
    """TerraTorch's split of query, key and value for LoRA, which it refuses where heads were narrowed at build."""

    def __init__(self, original_qkv: nn.Linear) -> None:
        """Split into three layers; without narrow heads this is TerraTorch's own."""
        if original_qkv.out_features % 3 or original_qkv.out_features >= 3 * original_qkv.in_features:
            super().__init__(original_qkv)
            return
        nn.Module.__init__(self)
        self.in_features, self.out_features = original_qkv.in_features, original_qkv.out_features
        for number, name in enumerate(("q_linear", "k_linear", "v_linear")):
            part = nn.Linear(self.in_features, self.out_features // 3, bias=original_qkv.bias is not None)
            with torch.no_grad():
                for key, value in part.named_parameters():
                    value.copy_(getattr(original_qkv, key).chunk(3)[number])
            self.add_module(name, part)


def register_source() -> None:
    """Add the source, and the split that narrow heads need, once; importing the package does it."""
    peft_utils.QKVSep = NarrowQKVSep
    if SOURCE not in BACKBONE_REGISTRY.keys():  # noqa: SIM118 (see above)
        BACKBONE_REGISTRY.register_source(SOURCE, SimplerSource())
