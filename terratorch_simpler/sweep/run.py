"""One sweep inside a Lightning run: the selection as ever, then what every way of slimming costs and keeps."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from torch import Tensor

from terratorch_simpler.encoders import InputShape
from terratorch_simpler.errors import ConfigurationError
from terratorch_simpler.extraction import Measurement, RecoveryStatistics, on_device, progress_bar
from terratorch_simpler.lightning.labelled_images import check_split
from terratorch_simpler.lightning.reporting import PAGE_FILE
from terratorch_simpler.lightning.task import precision_of, shows_progress
from terratorch_simpler.logger import log
from terratorch_simpler.models.backbone import SimplerBackbone, find_backbone
from terratorch_simpler.plan import SlimmingPlan
from terratorch_simpler.pruning.recovery import LinearRecovery
from terratorch_simpler.report import report_page, save_figure, save_page
from terratorch_simpler.report.tradeoffs import sweep_figure
from terratorch_simpler.sweep.cost import measure_costs, num_steps
from terratorch_simpler.sweep.diagnostics import BLOCK_COLUMNS, diagnose_blocks
from terratorch_simpler.sweep.probing import Recover, probe_variants
from terratorch_simpler.sweep.rows import Row, columns_of, row_of_control, row_of_variant, sweep_table, write_csv
from terratorch_simpler.sweep.variants import build_controls, build_variants, list_variants

CSV_FILE = "sweep.csv"
BLOCKS_FILE = "blocks.csv"
FIGURE_FILE = "sweep.png"
SEED = 0


@dataclass(frozen=True)
class SweepSettings:
    """What to compare, and how.

    Attributes:
        widths: Kept shares of width.
        probe: Whether probes are fitted to frozen features and the labels.
        repeats: Timed passes of a single tile.

    Raises:
        ConfigurationError: If a width or the number of repeats is impossible.
    """

    widths: tuple[float, ...] = (1.0,)
    probe: bool = False
    repeats: int = 20

    def __post_init__(self) -> None:
        """Check the ranges."""
        if wrong := [width for width in self.widths if not 0 < width <= 1]:
            msg = f"--widths takes shares above 0 and up to 1, but got {wrong}."
            raise ConfigurationError(msg)
        if self.repeats < 1:
            msg = f"--repeats has to be at least 1, but is {self.repeats}."
            raise ConfigurationError(msg)


class Sweep:
    """Compares every way of slimming the encoder of a task; made before its encoder is pruned.

    Args:
        task: The task, with its intact encoder.
        settings: What to compare.
    """

    def __init__(self, task: LightningModule, settings: SweepSettings) -> None:
        self._intact = copy.deepcopy(find_backbone(task))
        self._settings = settings
        self._statistics: RecoveryStatistics | None = None

    def check(self, trainer: Trainer, task: LightningModule) -> None:
        """Refuse to probe without labels, before anything is computed.

        Raises:
            LabelsError: If there are none, or of one class only.
        """
        if self._settings.probe:
            check_split(trainer, task, "train", SEED)
            check_split(trainer, task, "val", SEED)

    def record(self, measurement: Measurement) -> None:
        """Keep the statistics of linear recovery that the selection has measured."""
        self._statistics = measurement.recovery

    def run(self, trainer: Trainer, task: LightningModule, folder: Path) -> list[str]:
        """Measure, and write ``sweep.csv``, ``blocks.csv`` and ``sweep.png`` beside the plan, and its page anew.

        Args:
            trainer: Gives device and precision.
            task: The task, pruned by the plan.
            folder: Where the plan is.

        Returns:
            Names of the files that :func:`~terratorch_simpler.lightning.reporting.write_report` has not written.
        """
        plan = find_backbone(task).plan
        assert plan is not None  # a plan was made, or this would not run
        rows = self._rows(trainer, task, plan)
        blocks = [] if self._statistics is None else diagnose_blocks(self._statistics.patch, plan.full_num_blocks)
        Console().print(sweep_table(rows))
        if (folder / CSV_FILE).exists():
            log.info(f"Replaces the comparison of an earlier sweep in {folder}.")
        write_csv(rows, columns_of(rows), folder / CSV_FILE)
        if blocks:
            write_csv(blocks, BLOCK_COLUMNS, folder / BLOCKS_FILE)
        save_figure(sweep_figure(rows), folder / FIGURE_FILE)
        save_page(report_page(plan, rows, blocks), folder / PAGE_FILE)
        return [CSV_FILE, *([BLOCKS_FILE] if blocks else []), FIGURE_FILE]

    def _rows(self, trainer: Trainer, task: LightningModule, plan: SlimmingPlan) -> list[Row]:
        intact = self._intact
        variants = list_variants(plan, intact.fewest_blocks, self._settings.widths)
        arguments = getattr(task, "hparams", {}).get("model_args") or {}
        controls = list(build_controls(intact, arguments))
        shape = _input_shape(plan, intact)
        with on_device(torch.nn.ModuleList([intact, *controls]), trainer.strategy.root_device):
            encoders = [*build_variants(intact, variants), *controls]
            repeats = self._settings.repeats
            steps = num_steps(len(encoders), repeats)
            what = f"Timing {len(encoders)} encoders"
            with progress_bar(shows_progress(trainer), steps, what, thread=False) as progress:
                costs = measure_costs(encoders, shape, repeats, lambda: precision_of(trainer), SEED, progress)
        probed: list[dict[str, float]] = [{}] * len(variants)
        if self._settings.probe:
            with progress_bar(shows_progress(trainer), len(variants), "Probing depths and widths") as progress:
                probed = probe_variants(trainer, task, intact, variants, SEED, self._recover(), progress)
        slim = [
            row_of_variant(plan, variant, cost, columns)
            for variant, cost, columns in zip(variants, costs, probed, strict=False)
        ]
        others = [
            row_of_control(control.name, control.num_blocks, cost)
            for control, cost in zip(controls, costs[len(variants) :], strict=True)
        ]
        return [*slim, *others]

    def _recover(self) -> Recover | None:
        """The output of the last block, predicted by the linear maps of the selection."""
        if self._statistics is None or not self._statistics.patch.sufficient:
            return None
        total, prefix = self._intact.full_num_blocks, self._intact.prefix_tokens
        solved = self._statistics.solve(self._statistics.patch.spans)
        maps = {before: LinearRecovery(one, prefix) for before, one in solved.items()}

        def recover(depth: int, output: Tensor) -> Tensor:
            return output if depth == total else maps[depth].to(output.device)(output)

        return recover


def _input_shape(plan: SlimmingPlan, backbone: SimplerBackbone) -> InputShape:
    """Shape of one input as it was streamed; the encoder's own if nothing was."""
    shape: Mapping[str, Sequence[int]] | Sequence[int] | None = (plan.data or {}).get("input_shape", backbone.input_shape)
    if shape is None:
        msg = (
            f"The input shape of '{backbone.name}' is not known, and the criterion streams no tiles that would show it: use "
            "a criterion that compares blocks."
        )
        raise ConfigurationError(msg)
    if isinstance(shape, Mapping):
        return {name: tuple(part) for name, part in shape.items()}
    return tuple(shape)
