"""Makes Earth-observation encoders as small as the task allows, before anyone pays for fine-tuning them.

Importing this package makes ``simpler_<backbone>`` known to TerraTorch; :class:`SimplerCallback` chooses the cut.
"""

import importlib
from typing import TYPE_CHECKING, Any

from terratorch_simpler.terratorch.source import register_source

if TYPE_CHECKING:
    from terratorch_simpler.data import GeoTiffTiles
    from terratorch_simpler.lightning.callback import SimplerCallback
    from terratorch_simpler.lightning.slimmable import SlimmableTraining
    from terratorch_simpler.models.backbone import SimplerBackbone
    from terratorch_simpler.plan import SlimmingPlan

__version__ = "0.1.0"
__all__ = ["GeoTiffTiles", "SimplerBackbone", "SimplerCallback", "SlimmableTraining", "SlimmingPlan", "__version__"]

_HOMES = {
    "GeoTiffTiles": "data",
    "SimplerBackbone": "models.backbone",
    "SimplerCallback": "lightning.callback",
    "SlimmableTraining": "lightning.slimmable",
    "SlimmingPlan": "plan",
}

register_source()


def __getattr__(name: str) -> Any:
    # Matplotlib and rich are imported only by those who use them: importing the package stays cheap.
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
