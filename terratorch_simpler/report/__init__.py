"""What the user sees of a plan: a table in the terminal and a figure."""

from terratorch_simpler.report.figure import plan_figure, save_figure
from terratorch_simpler.report.table import plan_table

__all__ = ["plan_figure", "plan_table", "save_figure"]
