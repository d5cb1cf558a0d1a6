"""Writes plan.json and the report of a fit, and passes the report to the loggers of the trainer."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from matplotlib.figure import Figure

from terratorch_simpler.errors import PlanError
from terratorch_simpler.files import written_to
from terratorch_simpler.logger import log
from terratorch_simpler.plan import PLAN_FILE, SlimmingPlan
from terratorch_simpler.report import plan_figure, plan_markdown, plan_rows, report_page, save_figure, save_page

FIGURE_FILE = "report.png"
PAGE_FILE = "report.html"


def write_report(trainer: Trainer, plan: SlimmingPlan, output: str | Path, report_only: bool = False) -> list[str]:
    """Write plan.json, report.html and report.png, and pass the report to the loggers.

    Args:
        trainer: Its loggers get the report.
        plan: The plan that was applied.
        output: A folder, or a URL that fsspec knows.
        report_only: Leave out plan.json, since the plan is not used.

    Returns:
        Names of the files.
    """
    if not report_only and isinstance(output, Path) and _is_another_plan(output / PLAN_FILE, plan):
        log.info(f"Replaces the plan of an earlier fit in {output}; give output_dir to keep both.")
    names = [PAGE_FILE] if report_only else [PLAN_FILE, PAGE_FILE]
    with written_to(output) as folder:
        if not report_only:
            plan.save(folder / PLAN_FILE)
        page = save_page(report_page(plan), folder / PAGE_FILE)
        _log_page(trainer, plan, page)
        if plan.similarity is not None or plan.scores:
            figure = plan_figure(plan)
            _log_figure(trainer, figure, save_figure(figure, folder / FIGURE_FILE))
            names.append(FIGURE_FILE)
    return names


def _is_another_plan(path: Path, plan: SlimmingPlan) -> bool:
    try:
        return path.is_file() and SlimmingPlan.load(path).to_json() != plan.to_json()
    except PlanError:
        return True


def _log_page(trainer: Trainer, plan: SlimmingPlan, page: Path) -> None:
    """Log the report as text, file or table, whichever a logger takes."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("simpler/report", plan_markdown(plan))
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_artifact(logger.run_id, str(page), "simpler")
            if plan.verdict is not None:
                logger.experiment.set_tag(logger.run_id, "simpler.verdict", str(plan.verdict))
        elif hasattr(logger, "log_table"):
            columns, *rows = plan_rows(plan)
            if plan.verdict is not None:
                rows.insert(0, ["verdict", "", str(plan.verdict), ""])
            logger.log_table(key="simpler/plan", columns=columns, data=rows)


def _log_figure(trainer: Trainer, figure: Figure, path: Path) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure("simpler/report", figure)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_figure(logger.run_id, figure, "simpler/report.png")
        elif hasattr(logger, "log_image"):
            logger.log_image(key="simpler/report", images=[str(path)])
