"""SlimmableTraining: fine-tunes one encoder at several widths at once, which then works at each of them."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from terratorch_simpler.encoders import Narrowing
from terratorch_simpler.errors import ConfigurationError
from terratorch_simpler.indices import resolve_width
from terratorch_simpler.lightning.callback import backbones_of, refuse_copies
from terratorch_simpler.lightning.selection import find_backbone
from terratorch_simpler.models.backbone import SimplerBackbone

Step = Callable[..., STEP_OUTPUT]


class SlimmableTraining(Callback):
    """Trains one encoder at several widths with any task of TerraTorch.

    Every training step runs its batch at the largest width, the smallest and one in between that is drawn at random, and
    adds the three losses (sandwich rule, arXiv 1903.05134). Narrower passes use slices of the same weights. What is logged,
    and the task's own metrics, are those of the largest width; validation logs its loss at each of the others as well, e.g.
    ``val/loss_width_0.5``. Checkpoints say at which widths they were trained, so that each of these can be loaded
    (``backbone_width``) or exported (``--width``).

    Args:
        widths: Shares of the units of every attention head and MLP, in (0, 1]; the largest is that of the encoder.
        seed: Same seed: same widths drawn, in all processes.

    Raises:
        ConfigurationError: If there are fewer than two widths, one is repeated, or one is none.
    """

    def __init__(self, widths: Sequence[float] = (0.25, 0.5, 1.0), seed: int = 0) -> None:
        """Check the widths."""
        self.widths = sorted(map(resolve_width, widths))
        if len(set(self.widths)) < 2 or len(set(self.widths)) < len(self.widths):
            msg = f"Found widths {list(widths)}, expected at least two and each only once: change them."
            raise ConfigurationError(msg)
        self.seed = seed
        self._narrow: dict[float, Narrowing] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have checkpoints say at which widths their weights were trained."""
        if stage != "fit":
            return
        backbone = find_backbone(pl_module)
        refuse_copies(self, trainer, backbone)
        self._check_width(backbone)
        if isinstance(trainer.strategy, FSDPStrategy | DeepSpeedStrategy | ModelParallelStrategy):
            msg = (
                f"Found strategy {type(trainer.strategy).__name__}, expected one that keeps weights whole in every process, "
                "since narrower ones are slices of them: use ddp or a single device."
            )
            raise ConfigurationError(msg)
        backbone.mark_trained_widths(self.widths)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Have the task's steps run at several widths; by now the encoder is cut and on its device."""
        backbone = find_backbone(pl_module)
        self._check_width(backbone)
        # A checkpoint that was resumed from may have said otherwise, to an averaged copy as well.
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for one in [backbone, *(copy for callback in callbacks for copy in backbones_of(callback))]:
            one.mark_trained_widths(self.widths)
        self._narrow = {width: backbone.at_width(width) for width in self.widths[:-1]}
        training, validation = pl_module.training_step, pl_module.validation_step
        pl_module.training_step = self._several(trainer, pl_module, training)  # type: ignore[method-assign]
        pl_module.validation_step = self._each(pl_module, validation)  # type: ignore[method-assign]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Give the task its steps back."""
        self._release(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Give the task its steps back."""
        self._release(pl_module)

    def _release(self, pl_module: LightningModule) -> None:
        for name in ("training_step", "validation_step"):
            vars(pl_module).pop(name, None)
        self._narrow = {}

    def _check_width(self, backbone: SimplerBackbone) -> None:
        if backbone.width != self.widths[-1]:
            msg = (
                f"Found widths up to {self.widths[-1]:g} for an encoder of width {backbone.width:g}, expected its own as "
                "the largest: change the widths, or remove width from SimplerCallback and backbone_width."
            )
            raise ConfigurationError(msg)

    def _several(self, trainer: Trainer, pl_module: LightningModule, step: Step) -> Step:
        """A training step at the largest width, the smallest and one in between; the losses are added."""

        @functools.wraps(step)
        def steps(batch: Any, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
            result = step(batch, *args, **kwargs)
            for width in self._drawn(trainer.fit_loop.total_batch_idx):
                with self._narrow[width].lent(), _unseen(pl_module):
                    result = _added(result, step(_copied(batch), *args, **kwargs))
            return result

        return steps

    def _each(self, pl_module: LightningModule, step: Step) -> Step:
        """A validation step at all widths."""

        @functools.wraps(step)
        def steps(batch: Any, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
            apart = _copied(batch)
            result = step(batch, *args, **kwargs)
            for width, narrow in self._narrow.items():
                with narrow.lent(), _unseen(pl_module, f"_width_{width:g}"):
                    step(_copied(apart), *args, **kwargs)
            return result

        return steps

    def _drawn(self, batch: int) -> list[float]:
        """Narrower widths of a training batch: the smallest, and another if there are any."""
        between = self.widths[1:-1]
        drawn = [random.Random(f"{self.seed} {batch}").choice(between)] if between else []
        return [self.widths[0], *drawn]


@contextmanager
def _unseen(pl_module: LightningModule, ending: str = "") -> Iterator[None]:
    """Let a step leave metrics, plots and logs alone; of the latter only losses pass, under names with an ending."""
    log = pl_module.log

    def only_losses(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if ending and name.endswith("loss"):
            log(f"{name}{ending}", value, *args, **kwargs)

    def all_of(values: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        for name, value in values.items():
            only_losses(name, value, *args, **kwargs)

    with ExitStack() as hidden:
        hidden.enter_context(_instead(pl_module, "log", only_losses))
        hidden.enter_context(_instead(pl_module, "log_dict", all_of))
        if hasattr(pl_module, "plot_sample"):
            hidden.enter_context(_instead(pl_module, "plot_sample", _nothing))
        for part in pl_module.modules():
            if isinstance(part, Metric | MetricCollection):
                for name in ("update", "forward"):
                    hidden.enter_context(_instead(part, name, _nothing))
        yield


@contextmanager
def _instead(part: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    before = vars(part).get(name)
    setattr(part, name, function)
    try:
        yield
    finally:
        if before is None:
            delattr(part, name)
        else:
            setattr(part, name, before)


def _nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


def _copied(batch: Any) -> Any:
    """A batch whose keys a step may change."""
    return dict(batch) if isinstance(batch, dict) else batch


def _added(result: STEP_OUTPUT, other: STEP_OUTPUT) -> STEP_OUTPUT:
    """A step's answer with the loss of another added: a tensor, or a mapping with a loss; None skips a batch."""
    if result is None or other is None:
        return result
    loss = other if isinstance(other, Tensor) else other["loss"]
    return result + loss if isinstance(result, Tensor) else {**result, "loss": result["loss"] + loss}
