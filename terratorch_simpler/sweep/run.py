"""One sweep inside a Lightning run: the selection as ever, then what every way of slimming costs and keeps."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from lightning.fabric.utilities.rank_zero import rank_zero_info
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from torch import Tensor

from terratorch_simpler.encoders import InputShape
from terratorch_simpler.errors import ConfigurationError
from terratorch_simpler.extraction import Measurement, RecoverySums
from terratorch_simpler.lightning.callback import PAGE_FILE
from terratorch_simpler.lightning.selection import check_split, find_backbone, on_device, precision_of
from terratorch_simpler.models.backbone import SimplerBackbone
from terratorch_simpler.plan import SlimmingPlan
from terratorch_simpler.pruning.recovery import LinearRecovery
from terratorch_simpler.report import report_page, save_figure, save_page
from terratorch_simpler.sweep.controls import build_controls
from terratorch_simpler.sweep.cost import measure_costs
from terratorch_simpler.sweep.diagnostics import BLOCK_COLUMNS, diagnose_blocks
from terratorch_simpler.sweep.figure import sweep_figure
from terratorch_simpler.sweep.judge import Recover, judge
from terratorch_simpler.sweep.rows import Row, columns_of, row_of_control, row_of_variant, write_csv
from terratorch_simpler.sweep.table import sweep_table
from terratorch_simpler.sweep.variants import list_variants, slimmed

CSV_FILE = "sweep.csv"
BLOCKS_FILE = "blocks.csv"
FIGURE_FILE = "sweep.png"
SEED = 0
NARROWEST = 110
"""Columns of the terminal that the table needs; in a narrower one its lines are folded, but whole."""


@dataclass(frozen=True)
class SweepSettings:
    """What to compare, and how.

    Attributes:
        widths: Kept shares of width.
        probe: Whether frozen features are judged by their labels.
        repeats: Timed passes of a single tile.

    Raises:
        ConfigurationError: If a width or the number of repeats is impossible.
    """

    widths: tuple[float, ...] = (1.0,)
    probe: bool = False
    repeats: int = 20

    def __post_init__(self) -> None:
        """Refuse what is impossible."""
        if wrong := [width for width in self.widths if not 0 < width <= 1]:
            msg = f"Found widths {wrong}, expected shares above 0 and up to 1: change --widths."
            raise ConfigurationError(msg)
        if self.repeats < 1:
            msg = f"Found repeats {self.repeats}, expected at least 1: change --repeats."
            raise ConfigurationError(msg)


class Sweep:
    """Compares every way of slimming the encoder of a task; made before the task is cut.

    Args:
        task: The task, with its intact encoder.
        settings: What to compare.
    """

    def __init__(self, task: LightningModule, settings: SweepSettings) -> None:
        self._intact = copy.deepcopy(find_backbone(task))
        self._settings = settings
        self._repairs: RecoverySums | None = None

    def check(self, trainer: Trainer, task: LightningModule) -> None:
        """Refuse to probe without labels, before anything is computed.

        Raises:
            LabelsError: If there are none, or of one class only.
        """
        if self._settings.probe:
            check_split(trainer, task, "train", SEED)
            check_split(trainer, task, "val", SEED)

    def take(self, found: Measurement) -> None:
        """Take over what the selection has measured."""
        self._repairs = found.repairs

    def run(self, trainer: Trainer, task: LightningModule, folder: Path) -> None:
        """Measure, and write ``sweep.csv``, ``blocks.csv`` and ``sweep.png`` beside the plan, and its page anew.

        Args:
            trainer: Gives device and precision.
            task: The task, cut by the plan.
            folder: Where the plan is.
        """
        plan = find_backbone(task).plan
        assert plan is not None  # a plan was made, or this would not run
        rows = self._rows(trainer, task, plan)
        blocks = [] if self._repairs is None else diagnose_blocks(self._repairs.patch, plan.full_num_blocks)
        Console(width=max(Console().width, NARROWEST)).print(sweep_table(rows))
        path = write_csv(rows, columns_of(rows), folder / CSV_FILE)
        if blocks:
            write_csv(blocks, BLOCK_COLUMNS, folder / BLOCKS_FILE)
        save_figure(sweep_figure(rows), folder / FIGURE_FILE)
        save_page(report_page(plan, rows, blocks), folder / PAGE_FILE)
        rank_zero_info(f"The comparison is in {path}.")

    def _rows(self, trainer: Trainer, task: LightningModule, plan: SlimmingPlan) -> list[Row]:
        intact = self._intact
        variants = list_variants(plan, intact.fewest_blocks, self._settings.widths)
        arguments = getattr(task, "hparams", {}).get("model_args") or {}
        controls = list(build_controls(intact, arguments))
        shape = _input_shape(plan, intact)
        with on_device(torch.nn.ModuleList([intact, *controls]), trainer.strategy.root_device):
            encoders = [*slimmed(intact, variants), *controls]
            costs = measure_costs(encoders, shape, self._settings.repeats, lambda: precision_of(trainer), SEED)
        probed = (
            judge(trainer, task, intact, variants, SEED, self._recover()) if self._settings.probe else [{}] * len(variants)
        )
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
        """What the last block would have answered, by the linear maps of the selection."""
        if self._repairs is None or not self._repairs.patch.enough:
            return None
        total, prefix = self._intact.full_num_blocks, self._intact.prefix_tokens
        maps = {before: LinearRecovery(one, prefix) for before, one in self._repairs.maps(self._repairs.patch.spans).items()}

        def recover(depth: int, output: Tensor) -> Tensor:
            return output if depth == total else maps[depth].to(output.device)(output)  # type: ignore[no-any-return]

        return recover


def _input_shape(plan: SlimmingPlan, backbone: SimplerBackbone) -> InputShape:
    """Shape of one input as it was streamed; the encoder's own if nothing was."""
    found: Mapping[str, Sequence[int]] | Sequence[int] | None = (plan.data or {}).get("input_shape", backbone.input_shape)
    if found is None:
        msg = (
            f"Found no input shape for '{backbone.name}' and a criterion that streams no tiles, expected one of them: use a "
            "criterion that compares blocks."
        )
        raise ConfigurationError(msg)
    if isinstance(found, Mapping):
        return {name: tuple(part) for name, part in found.items()}
    return tuple(found)
