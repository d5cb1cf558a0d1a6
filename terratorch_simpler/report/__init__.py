"""What the user sees of a plan: tables in the terminal, a figure, and a page."""

from terratorch_simpler.report.charts import plan_figure, save_figure
from terratorch_simpler.report.page import report_page, save_page
from terratorch_simpler.report.table import full_table, plan_markdown, plan_rows, plan_table

__all__ = [
    "full_table",
    "plan_figure",
    "plan_markdown",
    "plan_rows",
    "plan_table",
    "report_page",
    "save_figure",
    "save_page",
]
