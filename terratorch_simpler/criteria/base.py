"""Base classes of criteria: bounds, ties, bootstrap, and the registry of names."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from terratorch_simpler.criteria.statistics import GroupSums, Statistics
from terratorch_simpler.errors import ConfigurationError, DepthError
from terratorch_simpler.indices import Span
from terratorch_simpler.plan import Verdict

TIE = 1e-6
"""Scores closer than this are a tie, which goes to the smaller depth; float32 is off by up to 2.5e-7 (ours)."""


@dataclass(frozen=True)
class Bounds:
    """Bounds on the kept depth given by the user, both inclusive; None leaves a side open."""

    min_depth: int | None = None
    max_depth: int | None = None

    def at_least(self, depth: int) -> Bounds:
        """The same bounds, with no depth below ``depth``."""
        return Bounds(max(self.min_depth or 1, depth), self.max_depth) if depth > 1 else self

    def within(self, depths: range, num_blocks: int) -> list[int]:
        """Depths that respect the bounds.

        Args:
            depths: Depths the criterion can score.
            num_blocks: Blocks of the intact encoder.

        Raises:
            DepthError: If none is left.
        """
        low = depths.start if self.min_depth is None else self.min_depth
        high = depths.stop - 1 if self.max_depth is None else self.max_depth
        allowed = [depth for depth in depths if low <= depth <= high]
        if not allowed:
            msg = (
                f"Found min_depth {self.min_depth} and max_depth {self.max_depth} for an encoder of {num_blocks} blocks, "
                f"expected bounds that leave a depth between {depths.start} and {depths.stop - 1}: widen them, or give "
                "the depth by hand with backbone_keep."
            )
            raise DepthError(msg)
        return allowed


def half_depth(num_blocks: int, allowed: Sequence[int]) -> int:
    """Half of the blocks, rounded up, or the nearest allowed depth: what is kept where nothing is known.

    Example:
        >>> half_depth(12, range(1, 13)), half_depth(7, range(1, 8)), half_depth(12, range(8, 11))
        (6, 4, 8)
    """
    return min(max((num_blocks + 1) // 2, allowed[0]), allowed[-1])


@dataclass(frozen=True)
class Choice:
    """The choice of a criterion.

    Attributes:
        kept_blocks: Blocks to keep, 0-based, ascending.
        scores: Score of every candidate depth, or None if the criterion does not score.
        verdict: Verdict of the criterion itself on its choice; None to have it judged like that of any other.
        details: Further entries for ``overview`` of plan.json.
    """

    kept_blocks: tuple[int, ...]
    scores: Mapping[int, float] | None = None
    verdict: Verdict | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


class Criterion(ABC):
    """Turns the statistics of a pass into a choice of blocks to keep.

    A custom criterion implements :meth:`depths` and :meth:`score`, and :meth:`kept` if it does not keep
    the first c blocks.

    Attributes:
        name: Name in YAML and in plan.json.
        description: What the criterion does, in a sentence for the report.
        papers: What its papers are cited for, by arXiv number, for the report.
        needs_similarity: False if no tile has to be streamed to decide.
        needs_labels: Whether the tiles must have labels.
        probes_labels: Whether labels of any kind are wanted, those of a validation split too, with LayerNormed features of
            the encoder as pretrained; otherwise classes, with raw outputs of the encoder as tuned.
        drop_blocks: Number of blocks to drop; None if the criterion chooses the depth itself.
        needs_positive_score: Whether a score of 0 or less means that nothing speaks for a depth.
    """

    name: ClassVar[str]
    description: ClassVar[str] = ""
    papers: ClassVar[Mapping[str, str]] = {}
    needs_similarity: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    needs_positive_score: ClassVar[bool] = False
    probes_labels: ClassVar[bool] = False
    drop_blocks: int | None = None

    @property
    def args(self) -> dict[str, object]:
        """Settings of the criterion as written to plan.json."""
        return {}

    @abstractmethod
    def depths(self, num_blocks: int) -> range:
        """Depths the criterion can score in an encoder of ``num_blocks`` blocks.

        Raises:
            DepthError: If the encoder is too shallow for the criterion.
        """

    @abstractmethod
    def score(self, statistics: Statistics, depths: list[int]) -> Tensor:
        """Score of every depth, the larger the better.

        Args:
            statistics: Statistics of the intact encoder; leading dimensions are resamples of a bootstrap.
            depths: C depths to score.

        Returns:
            Scores of shape (..., C).
        """

    def kept(self, statistics: Statistics, depths: list[int]) -> Tensor:
        """Which blocks to keep at every depth: the first ones, unless overridden.

        Args:
            statistics: As for :meth:`score`.
            depths: C depths.

        Returns:
            Bools of shape (..., C, L).
        """
        first = torch.arange(statistics.num_blocks) < torch.tensor(depths)[:, None]
        return first.expand(*statistics.hsic.shape[:-2], *first.shape)

    def allowed(self, num_blocks: int, bounds: Bounds) -> list[int]:
        """Depths that may be chosen: one if there is a budget.

        Args:
            num_blocks: Blocks L of the intact encoder.
            bounds: Bounds on the kept depth.

        Raises:
            DepthError: If none is left.
        """
        depths = bounds.within(self.depths(num_blocks), num_blocks)
        if self.drop_blocks is None:
            return depths
        depth = num_blocks - self.drop_blocks
        if depth not in depths:
            msg = (
                f"Found drop_blocks {self.drop_blocks} of {num_blocks} blocks, expected {depths[0]} to {depths[-1]} blocks "
                "to be kept: change drop_blocks, min_depth or max_depth."
            )
            raise DepthError(msg)
        return [depth]

    def spans(self, num_blocks: int, bounds: Bounds) -> list[Span]:
        """Ranges of blocks that may be dropped, for linear recovery: all after the first c, unless overridden.

        Args:
            num_blocks: Blocks L of the intact encoder.
            bounds: Bounds on the kept depth.
        """
        return [(depth, num_blocks) for depth in self.allowed(num_blocks, bounds) if depth < num_blocks]

    def choose(self, statistics: Statistics | None, num_blocks: int, bounds: Bounds) -> Choice:
        """Pick the depth with the highest score; ties go to the smaller one.

        Args:
            statistics: Statistics over all tiles; None only if the criterion needs none.
            num_blocks: Blocks L of the intact encoder.
            bounds: Bounds on the kept depth.

        Raises:
            DepthError: If no depth can be chosen.
        """
        assert statistics is not None  # a criterion without statistics overrides choose
        depths = bounds.within(self.depths(num_blocks), num_blocks)
        scores = self.score(statistics, depths)
        allowed = self.allowed(num_blocks, bounds)
        best = allowed[int(first_best(torch.stack([scores[depths.index(depth)] for depth in allowed])))]
        kept = self.kept(statistics, [best])[0].nonzero().flatten().tolist()
        return Choice(tuple(kept), dict(zip(depths, scores.tolist(), strict=True)))


class BudgetCriterion(Criterion):
    """Drop a given number of blocks at the least cost; the score of a depth is minus the cost of reaching it.

    Args:
        drop_blocks: Number of blocks to drop.

    Raises:
        ConfigurationError: If it is not at least 1.
    """

    drop_blocks: int

    def __init__(self, drop_blocks: int) -> None:
        if isinstance(drop_blocks, bool) or not isinstance(drop_blocks, int) or drop_blocks < 1:
            msg = f"Found drop_blocks {drop_blocks!r} for criterion '{self.name}', expected a number from 1: change it."
            raise ConfigurationError(msg)
        self.drop_blocks = drop_blocks

    @property
    def args(self) -> dict[str, object]:  # noqa: D102
        return {"drop_blocks": self.drop_blocks}

    def depths(self, num_blocks: int) -> range:
        """All depths below the full one.

        Raises:
            DepthError: If the budget leaves no block.
        """
        if not self.drop_blocks < num_blocks:
            msg = (
                f"Found drop_blocks {self.drop_blocks} for an encoder of {num_blocks} blocks, expected 1 to "
                f"{num_blocks - 1}: change drop_blocks."
            )
            raise DepthError(msg)
        return range(1, num_blocks)

    def spans(self, num_blocks: int, bounds: Bounds) -> list[Span]:
        """All ranges of at most as many blocks as are dropped."""
        self.allowed(num_blocks, bounds)
        return [(i, i + n) for n in range(1, self.drop_blocks + 1) for i in range(num_blocks - n + 1)]


def first_best(scores: Tensor) -> Tensor:
    """Index of the first score that is within ``TIE`` of the best, along the last dimension.

    Args:
        scores: Scores of C depths, (..., C).

    Returns:
        Indices, (...).
    """
    best = scores.amax(dim=-1, keepdim=True)
    return (scores >= best - TIE).int().argmax(dim=-1)


def bootstrap(criterion: Criterion, groups: GroupSums, bounds: Bounds, seed: int, resamples: int = 1000) -> dict[int, float]:
    """Votes: share of bootstrap resamples of the groups that choose each depth.

    Args:
        criterion: The criterion.
        groups: Sums of each group.
        bounds: Bounds on the kept depth.
        seed: Seed of the resamples.
        resamples: Number of resamples.

    Returns:
        Share of each depth that may be chosen. They sum to 1. A criterion with a budget has only one depth: its share is
        that of the resamples that choose the same blocks as all groups together.
    """
    depths = criterion.allowed(groups.hsic.shape[-1] - 1, bounds)
    resampled = groups.resampled(resamples, seed)
    if criterion.drop_blocks is not None:
        kept = criterion.kept(groups.total(), depths)[0].nonzero().flatten().tolist()
        return {depths[0]: float(kept_alike(criterion, resampled, kept, depths).double().mean())}
    winners = first_best(criterion.score(resampled, depths))
    shares = torch.bincount(winners, minlength=len(depths)).double() / resamples
    return dict(zip(depths, shares.tolist(), strict=True))


def kept_alike(criterion: Criterion, resampled: Statistics, kept: Sequence[int], depths: list[int]) -> Tensor:
    """Resamples in which a criterion with a budget keeps the same blocks.

    Args:
        criterion: The criterion.
        resampled: Statistics of R resamples.
        kept: The blocks, 0-based.
        depths: The depth that its budget leaves.

    Returns:
        Bools, (R,).
    """
    same = torch.zeros(resampled.num_blocks, dtype=torch.bool)
    same[list(kept)] = True
    return (criterion.kept(resampled, depths)[:, 0] == same).all(dim=-1)


_CRITERIA: dict[str, type[Criterion]] = {}


def register(criterion: type[Criterion]) -> type[Criterion]:
    """Register a criterion by its name.

    Raises:
        ConfigurationError: If another criterion has that name.
    """
    if _CRITERIA.setdefault(criterion.name, criterion) is not criterion:
        msg = f"Found two criteria named '{criterion.name}', expected a name of its own for each: rename one."
        raise ConfigurationError(msg)
    return criterion


def known_criteria() -> dict[str, type[Criterion]]:
    """All registered criteria by name."""
    return dict(_CRITERIA)


def build_criterion(criterion: str | Criterion, drop_blocks: int | None = None) -> Criterion:
    """Build a criterion from its name; a criterion is returned as it is.

    Args:
        criterion: Name of a registered criterion, or a criterion.
        drop_blocks: Budget, for criteria that take one.

    Raises:
        ConfigurationError: If the name is unknown, or a budget is missing, or given to a criterion that takes none.
    """
    if isinstance(criterion, Criterion):
        if drop_blocks is not None:
            msg = (
                f"Found drop_blocks {drop_blocks} beside a criterion built by class_path, expected the budget among its "
                "init_args: move it there."
            )
            raise ConfigurationError(msg)
        return criterion
    if criterion not in _CRITERIA:
        msg = f"Found criterion '{criterion}', expected one of {', '.join(sorted(_CRITERIA))}, or a class_path."
        raise ConfigurationError(msg)
    kind = _CRITERIA[criterion]
    budget = inspect.signature(kind).parameters.get("drop_blocks")
    if drop_blocks is None:
        if budget is not None and budget.default is budget.empty:
            msg = f"Found criterion '{criterion}' without drop_blocks, expected how many blocks to drop: set drop_blocks."
            raise ConfigurationError(msg)
        return kind()
    if budget is None:
        msg = f"Found drop_blocks {drop_blocks} for criterion '{criterion}', which needs no budget: remove drop_blocks."
        raise ConfigurationError(msg)
    return kind(drop_blocks=drop_blocks)  # type: ignore[call-arg]
