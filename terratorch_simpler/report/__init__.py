"""What the user sees of a plan: tables in the terminal, a figure, and a page."""

from terratorch_simpler.report.figure import plan_figure, save_figure
from terratorch_simpler.report.page import report_page, save_page
from terratorch_simpler.report.table import plan_table

__all__ = ["plan_figure", "plan_table", "report_page", "save_figure", "save_page"]
