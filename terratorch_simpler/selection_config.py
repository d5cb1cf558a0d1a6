"""Settings of one selection, whoever gives them: the callback, a command or the Python functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

from terratorch_simpler.criteria import Bounds, Criterion
from terratorch_simpler.errors import ConfigurationError, DepthError
from terratorch_simpler.extraction import ExtractionConfig, Measurement, Tokens
from terratorch_simpler.indices import Span
from terratorch_simpler.plan import RECOVERIES

OnUnsettled = Literal["apply", "half", "intact", "error"]
"""Take the choice of the criterion and warn; keep half of the blocks; keep all of them; or end the run."""


@dataclass(frozen=True)
class SelectionConfig:
    """Settings of one selection: the arguments of :class:`~terratorch_simpler.SimplerCallback`, which says what they mean.

    Raises:
        ConfigurationError: If one is none of what it can be, or they contradict each other.
    """

    criterion: Criterion
    bounds: Bounds
    width: float  # not chosen, only applied
    tokens: Tokens
    min_tiles: int
    max_tiles: int
    seed: int
    recovery: str = "none"
    recovery_target: int | str = "last"
    recovery_steps: int = 500
    best_depth: int | None = None  # of the probe, where that is the recovery target
    on_unsettled: OnUnsettled = "apply"
    compare: Callable[[Measurement], None] | None = None  # called with the measurement, which then covers every depth

    def __post_init__(self) -> None:
        """Check the settings that no criterion and no encoder is needed for."""
        if self.tokens not in get_args(Tokens):
            msg = f"Found tokens {self.tokens!r}, expected one of {', '.join(get_args(Tokens))}: change it."
            raise ConfigurationError(msg)
        if not 1 <= self.min_tiles <= self.max_tiles:
            msg = (
                f"Found min_tiles {self.min_tiles} and max_tiles {self.max_tiles}, expected 1 <= min_tiles <= max_tiles: "
                "change them."
            )
            raise ConfigurationError(msg)
        if self.on_unsettled not in get_args(OnUnsettled):
            msg = f"Found on_unsettled {self.on_unsettled!r}, expected one of {', '.join(get_args(OnUnsettled))}: change it."
            raise ConfigurationError(msg)
        self._check_recovery()

    def _check_recovery(self) -> None:
        recovery, target, steps = self.recovery, self.recovery_target, self.recovery_steps
        if recovery not in RECOVERIES:
            msg = f"Found recovery {recovery!r}, expected one of {', '.join(RECOVERIES)}: change it."
            raise ConfigurationError(msg)
        if target not in ("last", "best") and (isinstance(target, str | bool) or target < 1):
            msg = f"Found recovery_target {target!r}, expected 'last', 'best' or a number of blocks: change it."
            raise ConfigurationError(msg)
        if recovery == "none" and target != "last":
            msg = f"Found recovery_target {target!r} with recovery none, expected linear or distill: change one of them."
            raise ConfigurationError(msg)
        if target == "best" and not self.criterion.probes_labels:
            msg = (
                f"Found recovery_target 'best' with criterion {self.criterion.name!r}, expected 'probe', which finds the "
                "best block by labels: change one of them."
            )
            raise ConfigurationError(msg)
        if steps < 1:
            msg = f"Found recovery_steps {steps}, expected at least 1: change it."
            raise ConfigurationError(msg)
        if recovery == "linear" and self.tokens != "patch":
            msg = f"Found recovery {recovery} with tokens {self.tokens!r}, expected 'patch', which maps are for: change one."
            raise ConfigurationError(msg)
        if recovery == "linear" and self.width != 1:
            msg = (
                f"Found recovery {recovery} with width {self.width:g}, expected one of them, since maps are fitted at full "
                "width: remove one."
            )
            raise ConfigurationError(msg)

    @property
    def needs_tiles(self) -> bool:
        """Whether anything has to be measured."""
        return self.criterion.needs_similarity or self.recovery != "none" or self.compare is not None

    @property
    def labels_suffice(self) -> bool:
        """Whether a plan can be made from labels alone, where there are too few tiles to compare blocks."""
        return self.criterion.probes_labels and self.recovery == "none" and self.compare is None

    def extraction(self, num_blocks: int) -> ExtractionConfig:
        """What the pass over the tiles has to compute, for an encoder of so many blocks."""
        return ExtractionConfig(
            self.criterion, self.bounds, self.tokens, self.min_tiles, self.max_tiles, self.seed, self.spans(num_blocks)
        )

    def spans(self, num_blocks: int) -> list[Span]:
        """Ranges of blocks to fit linear maps for."""
        found = self.criterion.spans(num_blocks, self.bounds) if self.recovery == "linear" else ()
        target = self.target_depth(num_blocks)
        spans = {(before, target if after == num_blocks else after) for before, after in found}
        spans = {(before, after) for before, after in spans if before < after}
        if self.compare is not None and self.tokens == "patch":
            spans |= {(depth, num_blocks) for depth in range(1, num_blocks)}
        return sorted(spans)

    def target_depth(self, num_blocks: int) -> int:
        """Number of first blocks of the intact encoder whose output a recovery is for."""
        if self.recovery_target == "best":
            assert self.best_depth is not None
            return self.best_depth
        return num_blocks if self.recovery_target == "last" else int(self.recovery_target)

    def check_target(self, num_blocks: int) -> None:
        """Refuse a target that the encoder does not have, or that no choice leaves a block to recover for.

        Raises:
            DepthError: If it is one.
        """
        if isinstance(self.recovery_target, str):
            return
        fewest = self.criterion.allowed(num_blocks, self.bounds)[0]
        if not fewest <= self.recovery_target <= num_blocks:
            msg = (
                f"Found recovery_target {self.recovery_target} for {num_blocks} blocks of which at least {fewest} are kept, "
                f"expected {fewest} to {num_blocks}, 'last' or 'best': change it."
            )
            raise DepthError(msg)
