"""Makes ``simpler_<backbone>`` known to TerraTorch as soon as that is imported, and imports it for nobody.

TerraTorch takes seconds to import, which commands that only read a plan need not wait for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from terratorch_simpler.terratorch.source import SimplerSource

SOURCE = "simpler"
TERRATORCH = "terratorch"


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
    from terratorch_simpler.terratorch.source import SimplerSource

    return SimplerSource()


class _AfterImport(MetaPathFinder):
    """Finds TerraTorch as the other finders do, and adds the source at the end of its import."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != TERRATORCH:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next((found for finder in others if (found := finder.find_spec(name, path, target))), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _add_source()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register_source() -> None:
    """Add the source to TerraTorch's backbones, once: now, or when TerraTorch is imported."""
    if TERRATORCH in sys.modules:
        _add_source()
    elif not any(type(finder).__name__ == _AfterImport.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _add_source() -> None:
    from terratorch.registry import BACKBONE_REGISTRY

    if SOURCE not in BACKBONE_REGISTRY.keys():  # noqa: SIM118 (this registry iterates over names, not keys)
        BACKBONE_REGISTRY.register_source(SOURCE, LazySource())
