"""From settings and a measurement to a plan: what the callback, the commands and the Python functions share."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from terratorch_simpler.alternatives import compare_alternatives, depths_without_budget
from terratorch_simpler.criteria import Choice, Criterion, LabelSets, Simpler, Statistics, verdict_on
from terratorch_simpler.criteria.base import half_depth
from terratorch_simpler.criteria.verdict import doubts_about
from terratorch_simpler.encoders import InputShape
from terratorch_simpler.errors import (
    DepthError,
    FewTilesWarning,
    TooFewTilesError,
    UnsettledError,
    UnsettledWarning,
)
from terratorch_simpler.extraction import Measurement, count_macs, progress_bar
from terratorch_simpler.indices import spans_between
from terratorch_simpler.models.plain import Encoder
from terratorch_simpler.plan import MIN_GROUP_TILES, SlimmingPlan, Verdict, package_versions
from terratorch_simpler.selection_config import OnUnsettled, SelectionConfig


def build_plan(
    encoder: Encoder,
    config: SelectionConfig,
    measurement: Measurement | None,
    data: dict[str, Any] | None,
    labelled: LabelSets | None = None,
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
    blocks = encoder.full_num_blocks
    choice = _choose(config, blocks, measurement, labelled, show_progress)
    parameters = encoder.num_parameters()
    shape: InputShape | None = (data or {}).get("input_shape", encoder.input_shape)
    macs = None if shape is None else count_macs(encoder, shape)
    plan = SlimmingPlan(
        backbone=encoder.name,
        full_num_blocks=blocks,
        kept_blocks=choice.kept_blocks,
        width=config.width,
        criterion={"name": config.criterion.name, "args": config.criterion.args},
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
    if measurement is None and labelled is None:
        _check_target_of(config, choice.kept_blocks, blocks)
        return plan
    overview = compare_alternatives(encoder, config.criterion, config.bounds, choice, measurement, shape)
    kept, verdict = _settle(config, choice, _judge(encoder, config, choice, measurement, overview), blocks)
    if kept == choice.kept_blocks:  # what on_unsettled keeps instead is meant, whatever was to be recovered
        _check_target_of(config, kept, blocks)
    target = max(config.target_depth(blocks), kept[-1] + 1)
    plan = replace(
        plan,
        kept_blocks=kept,
        verdict=verdict,
        overview={**overview, **choice.details},
        recovery_target=None if config.recovery == "none" or target == blocks else target,
    )
    if measurement is None:
        return plan
    plan = replace(
        plan,
        similarity=measurement.similarity.tolist(),
        votes=measurement.votes,
        tiles_seen=measurement.tiles_seen,
        rows_seen=measurement.rows_seen,
    )
    return _with_maps(plan, measurement, target) if config.recovery == "linear" else plan


def _choose(
    config: SelectionConfig,
    num_blocks: int,
    measurement: Measurement | None,
    labelled: LabelSets | None,
    show_progress: bool,
) -> Choice:
    """What the criterion chooses from statistics, labels or neither."""
    criterion, bounds = config.criterion, config.bounds
    if measurement is not None:
        statistics = replace(measurement.statistics, labelled=labelled)
    elif labelled is not None:
        statistics = Statistics.of_labels(labelled)
    else:
        return criterion.choose(None, num_blocks, bounds)
    if not criterion.probes_labels:
        return criterion.choose(statistics, num_blocks, bounds)
    fits = num_blocks * (len(labelled) if isinstance(labelled, Mapping) else 1)
    with progress_bar(show_progress, fits, "Fitting probes to the outputs of blocks") as progress:
        return criterion.choose(replace(statistics, progress=progress), num_blocks, bounds)


def _judge(
    encoder: Encoder, config: SelectionConfig, choice: Choice, measurement: Measurement | None, overview: dict[str, Any]
) -> Verdict | None:
    """The verdict on a choice; beside one by labels, ``overview`` is given that of criterion simpler too."""
    if measurement is None:
        return choice.verdict and choice.verdict.doubted(doubts_about(is_untrained(encoder), None))
    simpler, criterion = overview["criteria"].get(Simpler.name), config.criterion
    if criterion.probes_labels and simpler is not None:
        unlabeled = {name: other for name, other in overview["criteria"].items() if name != criterion.name}
        by_simpler = Simpler().choose(measurement.statistics, encoder.full_num_blocks, config.bounds)
        verdict = _verdict_on(encoder, config, Simpler(), by_simpler, measurement, {"criteria": unlabeled})
        simpler.update({} if verdict is None else {"verdict": verdict.as_plain()})
    return _verdict_on(encoder, config, criterion, choice, measurement, overview)


def _verdict_on(
    encoder: Encoder,
    config: SelectionConfig,
    criterion: Criterion,
    choice: Choice,
    measurement: Measurement,
    overview: Mapping[str, Any],
) -> Verdict | None:
    return verdict_on(
        criterion,
        choice,
        config.bounds,
        encoder.full_num_blocks,
        measurement.evidence,
        min_tiles=config.min_tiles,
        seed=config.seed,
        untrained=is_untrained(encoder),
        implausible=measurement.implausible,
        others=depths_without_budget(overview, criterion.name),
    )


def _settle(
    config: SelectionConfig, choice: Choice, verdict: Verdict | None, num_blocks: int
) -> tuple[tuple[int, ...], Verdict | None]:
    """The blocks to keep, and the verdict, after what ``on_unsettled`` asks for."""
    if verdict is None or verdict.level != "unsettled" or config.on_unsettled not in ("half", "intact"):
        return choice.kept_blocks, verdict
    depth = num_blocks
    if config.on_unsettled == "half":
        depth = half_depth(num_blocks, config.criterion.allowed(num_blocks, config.bounds))
        if "label_sets" in choice.details:  # one that is settled may need more
            depth = max(depth, len(choice.kept_blocks))
    reason = (
        f"The criterion '{config.criterion.name}' chose {len(choice.kept_blocks)} of {num_blocks} blocks; on_unsettled "
        f"'{config.on_unsettled}' keeps {depth}."
    )
    return tuple(range(depth)), replace(verdict, reasons=(*verdict.reasons, reason))


def _with_maps(plan: SlimmingPlan, measurement: Measurement, target: int) -> SlimmingPlan:
    """The plan with a linear map for every range of dropped blocks, up to the target of the recovery."""
    spans, statistics = spans_between(plan.kept_blocks, target), measurement.recovery
    if not statistics:  # without sums, no choice leaves a range to recover
        return replace(plan, maps={}, overview={**(plan.overview or {}), "repaired": []})
    explained = [[*span, statistics.patch.explained(span)] for span in spans]
    return replace(plan, maps=statistics.solve(spans), overview={**(plan.overview or {}), "repaired": explained})


def _check_target_of(config: SelectionConfig, kept: tuple[int, ...], num_blocks: int) -> None:
    """Refuse to keep more than the recovery target.

    Raises:
        DepthError: If it does.
    """
    target, last = config.target_depth(num_blocks), kept[-1] + 1
    if config.recovery != "none" and config.recovery_target != "best" and target < last:
        msg = (
            f"Found recovery_target {target}, and the criterion '{config.criterion.name}' keeps block {last - 1}, which "
            f"comes after it, expected a target of {last} or more: change it, or set max_depth: {target}."
        )
        raise DepthError(msg)


def is_unsettled(plan: SlimmingPlan) -> bool:
    """Whether the plan has a verdict that says so."""
    return plan.verdict is not None and plan.verdict.level == "unsettled"


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
