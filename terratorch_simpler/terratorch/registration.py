"""Makes ``simpler_<backbone>`` known to TerraTorch as soon as that is imported, and imports it for nobody.

TerraTorch takes seconds to import, which commands that only read a plan need not wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Any

from wrapt import register_post_import_hook

if TYPE_CHECKING:
    from terratorch_simpler.terratorch.backbone_source import SimplerSource

SOURCE = "simpler"
TERRATORCH = "terratorch"
COMMAND_LINE = "lightning.pytorch.cli"


class LazySource:
    """The :class:`SimplerSource`, imported when the registry first asks: it imports modules that import TerraTorch."""

    def __contains__(self, name: object) -> bool:
        return name in _source()

    def __iter__(self) -> Iterator[str]:
        return iter(_source())

    def __len__(self) -> int:
        return len(_source())

    def __getitem__(self, name: str) -> Callable[..., Any]:
        return _source()[name]

    def build(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Build ``simpler_<name>``."""
        return _source().build(name, *args, **kwargs)


def _source() -> SimplerSource:
    from terratorch_simpler.terratorch.backbone_source import SimplerSource

    return SimplerSource()


def register_source() -> None:
    """Add the source to TerraTorch's backbones, now or when TerraTorch has been imported, and prepare the command line."""
    register_post_import_hook(_add_source, TERRATORCH)
    register_post_import_hook(_keep_config_width, COMMAND_LINE)


def _keep_config_width(lightning_cli: ModuleType) -> None:
    from terratorch_simpler.terratorch.config_width import keep_config_width

    keep_config_width(lightning_cli)


def _add_source(_terratorch: ModuleType) -> None:
    from terratorch.registry import BACKBONE_REGISTRY

    if SOURCE not in BACKBONE_REGISTRY.keys():  # noqa: SIM118 (this registry iterates over names, not keys)
        BACKBONE_REGISTRY.register_source(SOURCE, LazySource())
