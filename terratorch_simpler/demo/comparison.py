"""Intact against pruned in one table: what an encoder costs and what it scores, measured in the same run."""

from __future__ import annotations

import logging
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import partial
from os import devnull
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from rich.box import SIMPLE_HEAD
from rich.table import Table

from terratorch_simpler.models.backbone import find_backbone
from terratorch_simpler.plan import SlimmingPlan
from terratorch_simpler.sweep.cost import medians_in_turn, timed_run

SCORE = "test/mIoU"
REPEATS = 15
"""Timed steps and tiles of each model."""
SEED = 0


@dataclass(frozen=True)
class Times:
    """Medians of a whole model, in milliseconds.

    Attributes:
        step: A training step: forward, backward and optimizer, for one batch.
        tile: Inference for one tile.
    """

    step: float
    tile: float


@dataclass(frozen=True)
class Compared:
    """One line of the table.

    Attributes:
        name: Name of the model.
        num_blocks: Blocks of its encoder.
        parameters: Parameters of its encoder.
        times: What it takes.
        scores: Test score after the fit with each seed.
    """

    name: str
    num_blocks: int
    parameters: int
    times: Times
    scores: tuple[float, ...]


def compare(models: Mapping[str, tuple[LightningModule, Sequence[float]]], batch: Mapping[str, Any]) -> list[Compared]:
    """Measure what models cost, in turn, beside what they score.

    Args:
        models: By name a task and its test scores.
        batch: Normalized images (B, C, H, W) and masks (B, H, W), under ``image`` and ``mask``.
    """
    times = measure_times([task for task, _ in models.values()], batch)
    return [
        Compared(name, len(find_backbone(task).blocks), find_backbone(task).num_parameters(), found, tuple(scores))
        for (name, (task, scores)), found in zip(models.items(), times, strict=True)
    ]


def measure_times(tasks: Sequence[LightningModule], batch: Mapping[str, Any], repeats: int = REPEATS) -> list[Times]:
    """Time training steps and inference of segmentation tasks in turn; their weights stay as they are.

    Args:
        tasks: The tasks, on one device.
        batch: As for :func:`compare`.
        repeats: Timed turns.
    """
    device = next(tasks[0].parameters()).device
    images, masks = batch["image"].to(device), batch["mask"].to(device)
    # Without rate and decay a step costs the same and changes no weight.
    optimizers = [torch.optim.AdamW(task.parameters(), lr=0.0, weight_decay=0.0) for task in tasks]

    def step(task: Any, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        task.criterion(task(images).output, masks).backward()
        optimizer.step()

    random = np.random.default_rng(SEED)
    for task in tasks:
        task.train()
    steps = [partial(timed_run, partial(step, *one), device) for one in zip(tasks, optimizers, strict=True)]
    by_step = medians_in_turn(steps, repeats, random)
    for task in tasks:
        task.eval()
    with torch.no_grad():
        by_tile = medians_in_turn([partial(timed_run, partial(task, images[:1]), device) for task in tasks], repeats, random)
    return [Times(1000 * step, 1000 * tile) for step, tile in zip(by_step, by_tile, strict=True)]


def comparison_table(intact: Compared, pruned: Compared, batch_size: int) -> Table:
    """Two models and what the second gains, with the spread of the scores.

    Args:
        intact: The model at full depth.
        pruned: The same, pruned.
        batch_size: Tiles in a training step.
    """
    seeds = len(intact.scores)
    table = Table(
        box=SIMPLE_HEAD, caption=f"mIoU: mean ± standard deviation over {seeds} seeds of the fine-tuning, the same for both."
    )
    table.add_column("")
    for model in (intact, pruned):
        table.add_column(model.name, justify="right")
    table.add_column("change", justify="right")
    rows = [
        ("blocks", intact.num_blocks, pruned.num_blocks, "{:d}"),
        ("encoder parameters", intact.parameters, pruned.parameters, "{:,d}"),
        (f"training step of {batch_size} tiles", intact.times.step, pruned.times.step, "{:.0f} ms"),
        ("inference, one tile", intact.times.tile, pruned.times.tile, "{:.1f} ms"),
    ]
    for name, before, after, shape in rows:
        table.add_row(name, shape.format(before), shape.format(after), f"{after / before - 1:+.0%}")
    pairs = [after - before for before, after in zip(intact.scores, pruned.scores, strict=True)]
    table.add_row("test mIoU", *map(_spread, (intact.scores, pruned.scores)), _spread(pairs, "{:+.3f}"))
    return table


def _spread(scores: Sequence[float], shape: str = "{:.3f}") -> str:
    return f"{shape.format(statistics.mean(scores))} ± {statistics.stdev(scores):.3f}"


def choices(plan: SlimmingPlan) -> list[str]:
    """One line on the choice of a plan, and one on what SIMPLER would have chosen from the same tiles, with the verdicts.

    Args:
        plan: A plan by criterion probe.
    """
    total = plan.full_num_blocks
    lines = [
        f"By labels (probe):  {plan.depth} of {total} blocks; verdict {plan.verdict.level if plan.verdict else 'none'}."
    ]
    if (simpler := (plan.overview or {"criteria": {}})["criteria"].get("simpler")) is not None:
        verdict = simpler.get("verdict") or {"level": "none", "reasons": ()}
        depth, reasons = len(simpler["kept_blocks"]), " ".join(verdict["reasons"])
        lines.append(f"Without (SIMPLER):  {depth} of {total} blocks; verdict {verdict['level']}. {reasons}".rstrip())
    return lines


def run_terratorch(*arguments: str | Path) -> Any:
    """Run a ``terratorch`` command in this process, whose import of TerraTorch is worth several fits here.

    Args:
        *arguments: Those of the command.

    Returns:
        TerraTorch's command line, with trainer, model and datamodule.
    """
    from terratorch.cli_tools import build_lightning_cli

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return build_lightning_cli(list(map(str, arguments)))


def fit_and_test(config: Path, seed: int, *settings: str | Path) -> tuple[Any, float]:
    """Run ``terratorch fit`` without a word and without files, and test what it has trained.

    Args:
        config: Its config.
        seed: Seed of decoder and order.
        *settings: Further settings.

    Returns:
        TerraTorch's command line and the test score.
    """
    brief = ["--trainer.logger", "false", "--trainer.enable_checkpointing", "false", "--trainer.limit_val_batches", "0"]
    with _silent():
        cli = run_terratorch("fit", "--config", config, "--seed_everything", str(seed), *brief, *settings)
        return cli, score_on_test(cli)


def score_on_test(cli: Any) -> float:
    """Test score of what a command line has trained."""
    with warnings.catch_warnings(), _silent():
        warnings.simplefilter("ignore")
        [scores] = cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    return float(scores[SCORE])


@contextmanager
def _silent() -> Iterator[None]:
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with open(devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
    finally:
        logging.disable(disabled)


def training_batch(cli: Any) -> dict[str, Any]:
    """The first training batch as the model gets it."""
    datamodule = cli.datamodule
    datamodule.setup("fit")
    # Not on_after_batch_transfer, which asks the trainer what it is doing.
    batch: dict[str, Any] = datamodule.aug(next(iter(datamodule.train_dataloader())))
    return batch
