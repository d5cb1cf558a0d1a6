"""SlimmableTraining: fine-tunes one encoder at several widths at once, so that it can be used at each of them."""

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
from terratorch_simpler.models.backbone import SimplerBackbone, find_backbone

Step = Callable[..., STEP_OUTPUT]


class SlimmableTraining(Callback):
    """Trains one encoder at several widths with any task of TerraTorch.

    Every training step runs its batch at the largest width, the smallest and a random one in between, and adds the three
    losses (the sandwich rule of arXiv 1903.05134). Narrower passes use slices of the same weights. What is logged, and the
    task's own metrics, are those of the largest width; validation logs its loss at each of the others as well, e.g.
    ``val/loss_width_0.5``. Checkpoints say at which widths they were trained, so that each of these can be loaded
    (``backbone_width``) or exported (``--width``).

    Args:
        widths: Shares of the units of every attention head and MLP, in (0, 1]; the largest is that of the encoder.
        seed: Seed of the random widths, which are the same in all processes.

    Raises:
        ConfigurationError: If there are fewer than two widths, one is repeated, or one is not in (0, 1].
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
        """Record in checkpoints at which widths their weights are trained."""
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
        """Wrap the task's steps to run at several widths; by now the encoder is pruned and on its device."""
        backbone = find_backbone(pl_module)
        self._check_width(backbone)
        # A resumed checkpoint may have recorded other widths, in an averaged copy as well.
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        for each in [backbone, *(copy for callback in callbacks for copy in backbones_of(callback))]:
            each.mark_trained_widths(self.widths)
        self._narrow = {width: backbone.at_width(width) for width in self.widths[:-1]}
        training, validation = pl_module.training_step, pl_module.validation_step
        pl_module.training_step = self._sandwich_step(trainer, pl_module, training)  # type: ignore[method-assign]
        pl_module.validation_step = self._step_at_all_widths(pl_module, validation)  # type: ignore[method-assign]

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:  # noqa: ARG002
        """Restore the task's own steps."""
        self._restore_steps(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Restore the task's own steps."""
        self._restore_steps(pl_module)

    def _restore_steps(self, pl_module: LightningModule) -> None:
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

    def _sandwich_step(self, trainer: Trainer, pl_module: LightningModule, step: Step) -> Step:
        @functools.wraps(step)
        def run(batch: Any, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
            result = step(batch, *args, **kwargs)
            for width in self._narrower_widths(trainer.fit_loop.total_batch_idx):
                with self._narrow[width].applied(), _without_logging(pl_module):
                    result = _add_loss(result, step(_shallow_copy(batch), *args, **kwargs))
            return result

        return run

    def _step_at_all_widths(self, pl_module: LightningModule, step: Step) -> Step:
        @functools.wraps(step)
        def run(batch: Any, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
            original = _shallow_copy(batch)
            result = step(batch, *args, **kwargs)
            for width, narrow in self._narrow.items():
                with narrow.applied(), _without_logging(pl_module, f"_width_{width:g}"):
                    step(_shallow_copy(original), *args, **kwargs)
            return result

        return run

    def _narrower_widths(self, batch: int) -> list[float]:
        """Widths below the largest to train a batch at: the smallest, and a random one in between if there is any."""
        between = self.widths[1:-1]
        sampled = [random.Random(f"{self.seed} {batch}").choice(between)] if between else []
        return [self.widths[0], *sampled]


@contextmanager
def _without_logging(pl_module: LightningModule, suffix: str = "") -> Iterator[None]:
    """Run a step without metrics, plots and logs; with a suffix, its losses are logged under names that end in it."""
    log = pl_module.log

    def log_losses(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if suffix and name.endswith("loss"):
            log(f"{name}{suffix}", value, *args, **kwargs)

    def log_losses_of(values: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        for name, value in values.items():
            log_losses(name, value, *args, **kwargs)

    with ExitStack() as patches:
        patches.enter_context(_replaced_attribute(pl_module, "log", log_losses))
        patches.enter_context(_replaced_attribute(pl_module, "log_dict", log_losses_of))
        if hasattr(pl_module, "plot_sample"):
            patches.enter_context(_replaced_attribute(pl_module, "plot_sample", _do_nothing))
        for part in pl_module.modules():
            if isinstance(part, Metric | MetricCollection):
                for name in ("update", "forward"):
                    patches.enter_context(_replaced_attribute(part, name, _do_nothing))
        yield


@contextmanager
def _replaced_attribute(part: nn.Module, name: str, function: Callable[..., Any]) -> Iterator[None]:
    before = vars(part).get(name)
    setattr(part, name, function)
    try:
        yield
    finally:
        if before is None:
            delattr(part, name)
        else:
            setattr(part, name, before)


def _do_nothing(*_args: Any, **_kwargs: Any) -> None:
    return None


def _shallow_copy(batch: Any) -> Any:
    """A batch whose keys a step may change without effect on the next step."""
    return dict(batch) if isinstance(batch, dict) else batch


def _add_loss(result: STEP_OUTPUT, other: STEP_OUTPUT) -> STEP_OUTPUT:
    """The result of a step (a loss, or a mapping with one) with the loss of another added; None skips a batch."""
    if result is None or other is None:
        return result
    loss = other if isinstance(other, Tensor) else other["loss"]
    return result + loss if isinstance(result, Tensor) else {**result, "loss": result["loss"] + loss}
