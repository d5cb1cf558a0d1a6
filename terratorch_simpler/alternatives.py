"""What was not chosen, for the report: blocks that other criteria would keep, and cost and similarity of every depth."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from torch import nn

from terratorch_simpler.criteria import Bounds, BudgetCriterion, Choice, Criterion, known_criteria
from terratorch_simpler.encoders import InputShape
from terratorch_simpler.errors import DegenerateFeaturesError, DepthError, NoAnswerError
from terratorch_simpler.extraction import Measurement, macs_by_block
from terratorch_simpler.models.plain import Encoder


def compare_alternatives(
    backbone: Encoder,
    criterion: Criterion,
    bounds: Bounds,
    choice: Choice,
    measurement: Measurement | None,
    shape: InputShape | None = None,
) -> dict[str, Any]:
    """Compare what other criteria and depths would give, from the same statistics.

    Args:
        backbone: The intact encoder.
        criterion: Criterion that chose.
        bounds: Bounds on the kept depth.
        choice: Its choice.
        measurement: The statistics; None if blocks were not compared, which leaves the costs of all depths.
        shape: Shape of one input of the encoder, or of each modality, for want of a measurement; None if it is not known.

    Returns:
        The entry ``overview`` of plan.json.
    """
    kept = choice.kept_blocks
    chosen = {"kept_blocks": list(kept), "scores": None if choice.scores is None else dict(choice.scores)}
    if measurement is None:
        return {"criteria": {criterion.name: chosen}, "depths": _depths(backbone, None, shape)}
    others, no_answer = _other_criteria(criterion, bounds, len(kept), measurement)
    overview: dict[str, Any] = {
        "criteria": {**others, criterion.name: chosen},
        "depths": _depths(backbone, measurement),
    }
    if no_answer:
        overview["no_answer"] = no_answer
    return overview


def _other_criteria(
    criterion: Criterion, bounds: Bounds, depth: int, measurement: Measurement
) -> tuple[dict[str, Any], dict[str, str]]:
    """Choices of the other criteria, and why one has no answer, by name."""
    blocks = measurement.statistics.num_blocks
    choices: dict[str, Any] = {}
    no_answer: dict[str, str] = {}
    for name, kind in known_criteria().items():
        if not kind.needs_similarity or kind.needs_labels or name == criterion.name:
            continue
        if issubclass(kind, BudgetCriterion) and depth == blocks:
            continue
        with suppress(DepthError, DegenerateFeaturesError):  # it cannot choose for this encoder, or not within these bounds
            # A criterion with a budget gets that of the chosen depth.
            other = kind(blocks - depth) if issubclass(kind, BudgetCriterion) else kind()
            try:
                choice = other.choose(measurement.statistics, blocks, bounds)
            except NoAnswerError as err:
                no_answer[name] = str(err)
                continue
            choices[name] = {"kept_blocks": list(choice.kept_blocks), "scores": dict(choice.scores or {}) or None}
    return choices, no_answer


def depths_without_budget(overview: Mapping[str, Any], criterion: str) -> dict[str, int]:
    """Depth chosen by each criterion without a budget that finds one at all.

    Args:
        overview: The entry of plan.json.
        criterion: Name of the criterion that chose; it is left out.
    """
    found = {}
    for name, other in overview["criteria"].items():
        kind = known_criteria().get(name)
        if name == criterion or kind is None or issubclass(kind, BudgetCriterion):
            continue
        if kind.needs_positive_score and max((other["scores"] or {}).values(), default=0.0) <= 0:
            continue
        found[name] = len(other["kept_blocks"])
    return found


def _depths(
    backbone: Encoder, measurement: Measurement | None, shape: InputShape | None = None
) -> dict[int, dict[str, Any]]:
    total = backbone.full_num_blocks
    prompts = [part for part in backbone.modules() if isinstance(part, nn.ParameterList) and len(part) == total]
    parameters = [
        sum(parameter.numel() for parameter in (*block.parameters(), *(part[number] for part in prompts)))
        for number, block in enumerate(backbone.blocks)
    ]
    shape = shape if measurement is None else measurement.input_shape
    macs, by_block = (None, []) if shape is None else macs_by_block(backbone, shape)
    recovery = None if measurement is None else measurement.recovery
    equations = recovery.patch if recovery is not None and recovery.patch.sufficient else None
    costs: dict[int, dict[str, Any]] = {}
    for depth in range(1, total + 1):
        span = (depth, total)
        costs[depth] = {
            "parameters": backbone.num_parameters() - sum(parameters[depth:]),
            "macs": None if macs is None else macs - sum(by_block[depth:]),
            "similarity": None if measurement is None else float(measurement.similarity[depth - 1, -1]),
            "recovery_r2": equations.explained(span) if equations is not None and span in equations.spans else None,
        }
    return costs
