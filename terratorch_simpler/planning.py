"""From settings and a measurement to a plan: what the callback, the commands and the Python functions share."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from terratorch_simpler.alternatives import compare_alternatives, depths_without_budget
from terratorch_simpler.criteria import Bounds, Choice, Criterion, Labels, Simpler, Statistics, verdict_on
from terratorch_simpler.criteria.base import half_depth
from terratorch_simpler.criteria.verdict import UNSETTLED, doubts_about
from terratorch_simpler.encoders import InputShape
from terratorch_simpler.errors import (
    ConfigurationError,
    DepthError,
    FewTilesWarning,
    TooFewTilesError,
    UnsettledError,
    UnsettledWarning,
)
from terratorch_simpler.extraction import ExtractionConfig, Measurement, Tokens, count_macs, progress_bar
from terratorch_simpler.indices import Span, spans_between
from terratorch_simpler.models.plain import Encoder
from terratorch_simpler.plan import MIN_GROUP_TILES, SlimmingPlan, Verdict, package_versions

OnUnsettled = Literal["apply", "half", "intact", "error"]
"""Take the choice of the criterion and warn; keep half of the blocks; keep all of them; or end the run."""


@dataclass(frozen=True)
class SelectionConfig:
    """Settings of one selection; the arguments of :class:`~terratorch_simpler.SimplerCallback`."""

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


def build_plan(
    encoder: Encoder,
    config: SelectionConfig,
    measurement: Measurement | None,
    data: dict[str, Any] | None,
    labelled: Labels | None = None,
    show_progress: bool = False,
) -> SlimmingPlan:
    """Choose the blocks to keep; parameters and MACs are still those of the intact encoder.

    Args:
        encoder: The intact encoder.
        config: Settings of the selection.
        measurement: Statistics of its blocks; None if the criterion needs none, or has labels and too few tiles.
        data: What the plan says of the tiles.
        labelled: Features with labels, if the criterion needs them.
        show_progress: Whether a criterion that fits probes shows a progress bar.
    """
    blocks, criterion = encoder.full_num_blocks, config.criterion
    bounds = config.bounds
    statistics = None if measurement is None else replace(measurement.statistics, labelled=labelled)
    if measurement is None and labelled is not None:
        statistics = Statistics.of_labels(labelled)
    if statistics is not None and criterion.probes_labels:
        fits = blocks * (len(labelled) if isinstance(labelled, Mapping) else 1)
        with progress_bar(show_progress, fits, "Fitting probes to the outputs of blocks") as progress:
            choice = criterion.choose(replace(statistics, progress=progress), blocks, bounds)
    else:
        choice = criterion.choose(statistics, blocks, bounds)
    _check_target_of(config, choice, blocks)
    parameters = encoder.num_parameters()
    shape: InputShape | None = (data or {}).get("input_shape", encoder.input_shape)
    macs = None if shape is None else count_macs(encoder, shape)
    plan = SlimmingPlan(
        backbone=encoder.name,
        full_num_blocks=blocks,
        kept_blocks=choice.kept_blocks,
        width=config.width,
        criterion={"name": criterion.name, "args": criterion.args},
        recovery=config.recovery,
        scores=choice.scores,
        similarity=None,
        votes=None,
        tiles_seen=0,
        rows_seen=0,
        parameters={"before": parameters, "after": parameters},
        macs=None if macs is None else {"before": macs, "after": macs},
        data=data,
        versions=package_versions(),
        verdict=choice.verdict,
    )
    if statistics is None:
        return plan
    overview = compare_alternatives(encoder, criterion, bounds, choice, measurement, shape)
    untrained = is_untrained(encoder)
    if measurement is None:
        verdict = choice.verdict and choice.verdict.doubted(doubts_about(untrained, None))
    else:
        verdict = verdict_on(
            criterion,
            choice,
            bounds,
            blocks,
            measurement.evidence,
            min_tiles=config.min_tiles,
            seed=config.seed,
            untrained=untrained,
            implausible=measurement.implausible,
            others=depths_without_budget(overview, criterion.name),
        )
        if criterion.probes_labels and (simpler := overview["criteria"].get(Simpler.name)) is not None:
            unlabeled = _verdict_of_simpler(encoder, config, measurement, overview)
            simpler.update({} if unlabeled is None else {"verdict": unlabeled.as_plain()})
    kept = choice.kept_blocks
    if verdict is not None and verdict.level == UNSETTLED and config.on_unsettled in ("half", "intact"):
        kept = tuple(range(_cautious_depth(config, blocks)))
        said = f"The criterion '{criterion.name}' chose {len(choice.kept_blocks)} of {blocks} blocks"
        verdict = replace(
            verdict, reasons=(*verdict.reasons, f"{said}; on_unsettled '{config.on_unsettled}' keeps {len(kept)}.")
        )
    target = max(config.target_depth(blocks), kept[-1] + 1)
    maps = None
    if config.recovery == "linear" and measurement is not None:
        spans, found = spans_between(kept, target), measurement.recovery
        overview["repaired"] = [[*span, found.patch.explained(span)] for span in spans] if found else []
        maps = found.solve(spans) if found else {}  # without sums, no choice leaves a range to recover
    plan = replace(
        plan,
        kept_blocks=kept,
        verdict=verdict,
        overview={**overview, **choice.details},
        recovery_target=None if config.recovery == "none" or target == blocks else target,
        maps=maps,
    )
    if measurement is None:
        return plan
    return replace(
        plan,
        similarity=measurement.similarity.tolist(),
        votes=measurement.votes,
        tiles_seen=measurement.tiles_seen,
        rows_seen=measurement.rows_seen,
    )


def _check_target_of(config: SelectionConfig, choice: Choice, num_blocks: int) -> None:
    """Refuse a choice that keeps more than the recovery target.

    Raises:
        DepthError: If it does.
    """
    target, last = config.target_depth(num_blocks), choice.kept_blocks[-1] + 1
    if config.recovery != "none" and config.recovery_target != "best" and target < last:
        msg = (
            f"Found recovery_target {target}, and the criterion '{config.criterion.name}' keeps block {last - 1}, which "
            f"comes after it, expected a target of {last} or more: change it, or set max_depth: {target}."
        )
        raise DepthError(msg)


def _verdict_of_simpler(
    encoder: Encoder, config: SelectionConfig, measurement: Measurement, overview: Mapping[str, Any]
) -> Verdict | None:
    """The verdict that criterion simpler would have had, from the same tiles, beside a choice by labels."""
    simpler, blocks = Simpler(), encoder.full_num_blocks
    unlabeled = {name: other for name, other in overview["criteria"].items() if name != config.criterion.name}
    return verdict_on(
        simpler,
        simpler.choose(measurement.statistics, blocks, config.bounds),
        config.bounds,
        blocks,
        measurement.evidence,
        min_tiles=config.min_tiles,
        seed=config.seed,
        untrained=is_untrained(encoder),
        implausible=measurement.implausible,
        others=depths_without_budget({"criteria": unlabeled}, simpler.name),
    )


def _cautious_depth(config: SelectionConfig, num_blocks: int) -> int:
    """All blocks, or half of them within the bounds."""
    if config.on_unsettled == "intact":
        return num_blocks
    return half_depth(num_blocks, config.criterion.allowed(num_blocks, config.bounds))


def is_unsettled(plan: SlimmingPlan) -> bool:
    """Whether the plan has a verdict that says so."""
    return plan.verdict is not None and plan.verdict.level == UNSETTLED


def check_on_unsettled(value: str) -> None:
    """Refuse what is none of :data:`OnUnsettled`.

    Raises:
        ConfigurationError: If it is not.
    """
    if value not in get_args(OnUnsettled):
        msg = f"Found on_unsettled {value!r}, expected one of {', '.join(get_args(OnUnsettled))}: change it."
        raise ConfigurationError(msg)


def tell_unsettled(plan: SlimmingPlan, on_unsettled: OnUnsettled, reasons_shown: bool = False) -> None:
    """Warn of an unsettled plan, or end the run; the report should be written before.

    Args:
        plan: The plan that is applied.
        on_unsettled: What was done about it.
        reasons_shown: Whether the user has just seen the reasons, so that a warning need not give them again.

    Raises:
        UnsettledError: If that is "error".

    Warns:
        UnsettledWarning: If it is anything else.
    """
    if not is_unsettled(plan):
        return
    assert plan.verdict is not None
    said = f"The choice of criterion '{plan.criterion['name']}' is {plan.verdict}."
    because = f"{said} {' '.join(plan.verdict.reasons)}"
    probed = not {"probe", "label_sets"}.isdisjoint(plan.overview or {})
    other = "give more labels" if probed else "use a criterion with labels or a budget"
    advice = f"give the depth by hand (backbone_keep), {other}"
    if on_unsettled == "error":
        raise UnsettledError(f"{because} on_unsettled is 'error': {advice}, or change on_unsettled.")
    done = {"apply": f" It is applied all the same: {advice}, or set on_unsettled."}.get(on_unsettled, "")
    warnings.warn((said if reasons_shown else because) + done, UnsettledWarning, stacklevel=2)


def is_untrained(encoder: Encoder) -> bool:
    """Whether the encoder is known to hold random weights: it was built so, or its norms are as they are initialised."""
    if getattr(encoder, "pretrained", None) is False:
        return True
    norms = [part for part in encoder.blocks.modules() if "Norm" in type(part).__name__]
    weights, biases = (
        [value for part in norms if isinstance(value := getattr(part, name, None), Tensor)] for name in ("weight", "bias")
    )
    return bool(weights) and all(torch.all(weight == 1) for weight in weights) and not any(map(torch.any, biases))


def describe_tiles(source_description: Mapping[str, Any], shape: InputShape, skipped: Mapping[str, int]) -> dict[str, Any]:
    """What a plan says of the tiles: the source, the shape of one input if known, and how many were skipped, by reason."""
    plain = {name: list(part) for name, part in shape.items()} if isinstance(shape, dict) else list(shape)
    return {**source_description, **({"input_shape": plain} if plain else {}), "skipped": dict(skipped)}


def warn_not_compared(error: TooFewTilesError) -> None:
    """Warn that a plan is made from labels alone.

    Args:
        error: What the pass over the tiles ended with.

    Warns:
        FewTilesWarning: Always.
    """
    counts = ", ".join(f"{count} {reason}" for reason, count in error.skipped.items())
    skipped = f" (skipped: {counts})" if counts else ""
    warnings.warn(
        f"The blocks were not compared: there are {error.tiles} usable tiles{skipped}, and comparing needs at least "
        f"{MIN_GROUP_TILES}. The depth is chosen from the labels alone, without similarity, votes and other criteria.",
        FewTilesWarning,
        stacklevel=4,  # beyond the decorator of the caller
    )
