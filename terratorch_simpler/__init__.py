"""Makes Earth-observation encoders as small as the task allows, before anyone pays for fine-tuning them.

Importing this package makes ``simpler_<backbone>`` known to TerraTorch; :class:`SimplerCallback` chooses the cut.
"""

import importlib
from typing import TYPE_CHECKING, Any

from terratorch_simpler.registry import register_source

if TYPE_CHECKING:
    from terratorch_simpler.backbone import SimplerBackbone
    from terratorch_simpler.callback import SimplerCallback
    from terratorch_simpler.plan import SlimmingPlan
    from terratorch_simpler.slimmable import SlimmableTraining
    from terratorch_simpler.tiles import GeoTiffTiles

__version__ = "0.1.0"
__all__ = ["GeoTiffTiles", "SimplerBackbone", "SimplerCallback", "SlimmableTraining", "SlimmingPlan", "__version__"]

_HOMES = {
    "GeoTiffTiles": "tiles",
    "SimplerBackbone": "backbone",
    "SimplerCallback": "callback",
    "SlimmableTraining": "slimmable",
    "SlimmingPlan": "plan",
}

register_source()


def __getattr__(name: str) -> Any:
    # Matplotlib and rich are imported only by those who use them: importing the package stays cheap.
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
