"""Cost and quality of every depth and width, before anything is trained."""

from terratorch_simpler.sweep.rows import COLUMNS
from terratorch_simpler.sweep.run import Sweep, SweepSettings

__all__ = ["COLUMNS", "Sweep", "SweepSettings"]
