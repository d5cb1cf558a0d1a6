"""The source ``simpler`` in TerraTorch's backbone registry: ``simpler_<name>`` builds <name> inside a SimplerBackbone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from terratorch.registry import BACKBONE_REGISTRY, MultiSourceRegistry
from terratorch.utils import InvalidModelError

from terratorch_simpler.backbone import SimplerBackbone
from terratorch_simpler.encoders import refuse_by_name
from terratorch_simpler.errors import ConfigurationError

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
        width: float | None = None,
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
            width: Width slimming, which this version does not do: only 1.0.
            block_path: Path of the blocks of an encoder of no known family.
            out_indices: Blocks whose features are returned, numbered as in the intact encoder.
            **kwargs: For the encoder.

        Raises:
            InvalidModelError: If no other source knows the name, as TerraTorch's registry expects.
            UnsupportedEncoderError: If the encoder cannot be cut.
            ConfigurationError: If ``width`` is not 1.0.
        """
        if name not in self:
            msg = f"Found no backbone '{name}' behind 'simpler_{name}', expected a name that TerraTorch can build."
            raise InvalidModelError(msg)
        refuse_by_name(name)
        # Settings of model_args given on the command line arrive as text.
        keep, width, out_indices = (
            yaml.safe_load(value) if isinstance(value, str) else value for value in (keep, width, out_indices)
        )
        if width not in (None, 1, 1.0):
            msg = f"Found backbone_width {width}, expected 1.0, since only depth can be cut: remove backbone_width."
            raise ConfigurationError(msg)
        if isinstance(kwargs.get("pretrained"), str):
            kwargs["pretrained"] = yaml.safe_load(kwargs["pretrained"])  # 'false' would be taken for true
        encoder = self._others().build(name, *args, **kwargs)
        return SimplerBackbone(
            encoder,
            name=name,
            out_indices=out_indices,
            keep=keep,
            plan=plan,
            # DINOv3 takes its weights from ckpt_path alone; whether they are any good is not known here.
            pretrained=None if "pretrained" not in kwargs and kwargs.get("ckpt_path") else bool(kwargs.get("pretrained")),
            block_path=block_path,
        )


def register_source() -> None:
    """Add the source once; importing the package does it."""
    if SOURCE not in BACKBONE_REGISTRY.keys():  # noqa: SIM118 (see above)
        BACKBONE_REGISTRY.register_source(SOURCE, SimplerSource())
