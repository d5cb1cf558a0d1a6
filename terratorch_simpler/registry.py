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

SOURCE = "simpler"


class SimplerSource:
    """A registry source over all other sources of TerraTorch's backbone registry."""

    @staticmethod
    def _others() -> MultiSourceRegistry[Any]:
        return MultiSourceRegistry(**{key: BACKBONE_REGISTRY[key] for key in BACKBONE_REGISTRY.keys() if key != SOURCE})  # noqa: SIM118 (this registry iterates over names, not keys)

    def __contains__(self, name: object) -> bool:
        """Whether TerraTorch can build the encoder ``name``."""
        return name in self._others()

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
        out_indices: list[int] | None = None,
        **kwargs: Any,
    ) -> SimplerBackbone:
        """Build an encoder with all its blocks, wrap it, and cut it if asked to.

        Args:
            name: Name of the encoder without ``simpler_``.
            *args: For the encoder.
            plan: Path of a plan.json to apply.
            keep: First n blocks, or block numbers, to keep.
            out_indices: Blocks whose features are returned, numbered as in the intact encoder.
            **kwargs: For the encoder.

        Raises:
            InvalidModelError: If no other source knows the name, as TerraTorch's registry expects.
            UnsupportedEncoderError: If the encoder cannot be cut.
        """
        others = self._others()
        if name not in others:
            msg = f"Found no backbone '{name}' behind 'simpler_{name}', expected a name that TerraTorch can build."
            raise InvalidModelError(msg)
        refuse_by_name(name)
        if isinstance(keep, str):  # settings of model_args given on the command line arrive as text
            keep = yaml.safe_load(keep)
        encoder = others.build(name, *args, **kwargs)
        return SimplerBackbone(
            encoder,
            name=name,
            out_indices=out_indices,
            keep=keep,
            plan=plan,
            pretrained=bool(kwargs.get("pretrained", False)),
        )


def register_source() -> None:
    """Add the source once; importing the package does it."""
    if SOURCE not in BACKBONE_REGISTRY.keys():  # noqa: SIM118 (see above)
        BACKBONE_REGISTRY.register_source(SOURCE, SimplerSource())
