"""What the user sees of a plan: tables in the terminal, a figure, and a page."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_MODULE_OF = {
    "plan_figure": "charts",
    "save_figure": "charts",
    "report_page": "page",
    "save_page": "page",
    "full_table": "table",
    "plan_markdown": "table",
    "plan_rows": "table",
    "plan_table": "table",
}


def __getattr__(name: str) -> Any:
    # The table in a terminal needs neither Matplotlib nor the criteria that the page explains.
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    msg = f"module {__name__!r} has no attribute {name!r}"
    raise AttributeError(msg)
