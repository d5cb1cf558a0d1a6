"""What was not chosen: what other rules would keep, and what every depth costs and keeps; for the report."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from torch import nn

from terratorch_simpler.criteria import Bounds, BudgetCriterion, Choice, Criterion, known_criteria
from terratorch_simpler.errors import DegenerateFeaturesError, DepthError
from terratorch_simpler.extraction import Measurement, macs_by_block
from terratorch_simpler.indices import spans_between
from terratorch_simpler.models.backbone import SimplerBackbone


def overview(
    backbone: SimplerBackbone,
    criterion: Criterion,
    bounds: Bounds,
    choice: Choice,
    found: Measurement,
    recovery: str = "none",
) -> dict[str, Any]:
    """Look at everything that the same statistics say.

    Args:
        backbone: The intact encoder.
        criterion: The rule that has chosen.
        bounds: Bounds on the kept depth.
        choice: What it has chosen.
        found: The statistics.
        recovery: How the cut is repaired.

    Returns:
        What goes to ``overview`` in plan.json.
    """
    kept = choice.kept_blocks
    chosen = {"kept_blocks": list(kept), "scores": None if choice.scores is None else dict(choice.scores)}
    seen: dict[str, Any] = {
        "criteria": {**_others(criterion, bounds, len(kept), found), criterion.name: chosen},
        "depths": _depths(backbone, found),
    }
    if recovery != "none" and found.repairs is not None:
        spans = spans_between(kept, backbone.full_num_blocks)
        seen["repaired"] = [[*span, found.repairs.patch.explained(span)] for span in spans]
    return seen


def _others(criterion: Criterion, bounds: Bounds, depth: int, found: Measurement) -> dict[str, Any]:
    blocks = found.statistics.num_blocks
    judged: dict[str, Any] = {}
    for name, rule in known_criteria().items():
        if not rule.needs_similarity or rule.needs_labels or name == criterion.name:
            continue
        if issubclass(rule, BudgetCriterion) and depth == blocks:
            continue
        with suppress(DepthError, DegenerateFeaturesError):  # it cannot judge this encoder, or not within these bounds
            # A rule with a budget is asked what it would keep of the same depth.
            built = rule(blocks - depth) if issubclass(rule, BudgetCriterion) else rule()
            choice = built.choose(found.statistics, blocks, bounds)
            judged[name] = {"kept_blocks": list(choice.kept_blocks), "scores": dict(choice.scores or {}) or None}
    return judged


def _depths(backbone: SimplerBackbone, found: Measurement) -> dict[int, dict[str, Any]]:
    total = backbone.full_num_blocks
    beside = [part for part in backbone.modules() if isinstance(part, nn.ParameterList) and len(part) == total]  # prompts
    parameters = [
        sum(parameter.numel() for parameter in (*block.parameters(), *(part[number] for part in beside)))
        for number, block in enumerate(backbone.blocks)
    ]
    macs, by_block = macs_by_block(backbone, found.input_shape)
    repairs = found.repairs.patch if found.repairs is not None and found.repairs.patch.enough else None
    costs: dict[int, dict[str, Any]] = {}
    for depth in range(1, total + 1):
        span = (depth, total)
        costs[depth] = {
            "parameters": backbone.num_parameters() - sum(parameters[depth:]),
            "macs": macs - sum(by_block[depth:]),
            "similarity": float(found.similarity[depth - 1, -1]),
            "recovery_r2": repairs.explained(span) if repairs is not None and span in repairs.spans else None,
        }
    return costs
