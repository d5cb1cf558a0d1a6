"""Makes Earth-observation encoders as small as the task allows, before anyone pays for fine-tuning them.

:func:`select_depth` chooses how many blocks of a vision transformer to keep, and :func:`prune` drops the others.
Importing this package makes ``simpler_<backbone>`` known to TerraTorch; :class:`SimplerCallback` does both before fit.
"""

import importlib
from typing import TYPE_CHECKING, Any

from terratorch_simpler.errors import (
    CheckpointError,
    ComparisonError,
    ConfigurationError,
    DegenerateFeaturesError,
    DepthError,
    DownloadError,
    ExportError,
    FewTilesWarning,
    ImplausibleInputWarning,
    LabelsError,
    NoAnswerError,
    NotCarriedError,
    OutOfMemoryError,
    PlanError,
    ProcessError,
    RecoveryError,
    SettingsError,
    SimplerError,
    SimplerWarning,
    SkippedTilesWarning,
    TilesError,
    TooFewTilesError,
    UnsettledError,
    UnsettledWarning,
    UnsupportedEncoderError,
    UntrainedEncoderWarning,
)
from terratorch_simpler.terratorch.registration import register_source

if TYPE_CHECKING:
    from terratorch_simpler.api import prune, select_depth
    from terratorch_simpler.criteria import (
        Angular,
        BlockInfluence,
        CkaIntervals,
        Criterion,
        Fixed,
        Knee,
        Probe,
        Simpler,
        Sls,
    )
    from terratorch_simpler.criteria import register as register_criterion
    from terratorch_simpler.data import GeoTiffTiles
    from terratorch_simpler.functional.hsic import hsic_matrix, linear_cka
    from terratorch_simpler.lightning.callback import SimplerCallback
    from terratorch_simpler.lightning.slimmable import SlimmableTraining
    from terratorch_simpler.models.backbone import SimplerBackbone
    from terratorch_simpler.plan import SlimmingPlan, Verdict

__version__ = "0.2.0"
__all__ = [
    "Angular",
    "BlockInfluence",
    "CheckpointError",
    "CkaIntervals",
    "ComparisonError",
    "ConfigurationError",
    "Criterion",
    "DegenerateFeaturesError",
    "DepthError",
    "DownloadError",
    "ExportError",
    "FewTilesWarning",
    "Fixed",
    "GeoTiffTiles",
    "ImplausibleInputWarning",
    "Knee",
    "LabelsError",
    "NoAnswerError",
    "NotCarriedError",
    "OutOfMemoryError",
    "PlanError",
    "Probe",
    "ProcessError",
    "RecoveryError",
    "SettingsError",
    "Simpler",
    "SimplerBackbone",
    "SimplerCallback",
    "SimplerError",
    "SimplerWarning",
    "SkippedTilesWarning",
    "SlimmableTraining",
    "SlimmingPlan",
    "Sls",
    "TilesError",
    "TooFewTilesError",
    "UnsettledError",
    "UnsettledWarning",
    "UnsupportedEncoderError",
    "UntrainedEncoderWarning",
    "Verdict",
    "__version__",
    "hsic_matrix",
    "linear_cka",
    "prune",
    "register_criterion",
    "select_depth",
]

_LAZY_NAMES = {
    "api": ("prune", "select_depth"),
    "criteria": (
        "Angular",
        "BlockInfluence",
        "CkaIntervals",
        "Criterion",
        "Fixed",
        "Knee",
        "Simpler",
        "Probe",
        "Sls",
        "register_criterion",
    ),
    "data": ("GeoTiffTiles",),
    "functional.hsic": ("hsic_matrix", "linear_cka"),
    "lightning.callback": ("SimplerCallback",),
    "lightning.slimmable": ("SlimmableTraining",),
    "models.backbone": ("SimplerBackbone",),
    "plan": ("SlimmingPlan", "Verdict"),
}
_MODULE_OF = {name: module for module, names in _LAZY_NAMES.items() for name in names}
_ALIASES = {"register_criterion": "register"}

register_source()


def __getattr__(name: str) -> Any:
    # Matplotlib and rich are imported only by those who use them: importing the package stays cheap.
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), _ALIASES.get(name, name))
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
