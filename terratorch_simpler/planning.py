"""From settings and a measurement to a plan: what the callback, the commands and the Python functions share."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from terratorch_simpler import __version__
from terratorch_simpler.alternatives import compare_alternatives, depths_without_budget
from terratorch_simpler.criteria import Bounds, Criterion, Simpler, verdict_on
from terratorch_simpler.criteria.verdict import UNSETTLED
from terratorch_simpler.encoders import InputShape
from terratorch_simpler.errors import ConfigurationError, UnsettledError, UnsettledWarning
from terratorch_simpler.extraction import ExtractionConfig, Measurement, Tokens, count_macs
from terratorch_simpler.indices import Span, spans_between
from terratorch_simpler.models.plain import Encoder
from terratorch_simpler.plan import SlimmingPlan, Verdict

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
    on_unsettled: OnUnsettled = "apply"
    compare: Callable[[Measurement], None] | None = None  # called with the measurement, which then covers every depth

    @property
    def needs_tiles(self) -> bool:
        """Whether anything has to be measured."""
        return self.criterion.needs_similarity or self.recovery != "none" or self.compare is not None

    def extraction(self, num_blocks: int) -> ExtractionConfig:
        """What the pass over the tiles has to compute, for an encoder of so many blocks."""
        return ExtractionConfig(
            self.criterion, self.bounds, self.tokens, self.min_tiles, self.max_tiles, self.seed, self.spans(num_blocks)
        )

    def spans(self, num_blocks: int) -> list[Span]:
        """Ranges of blocks to fit linear maps for."""
        spans = set() if self.recovery == "none" else set(self.criterion.spans(num_blocks, self.bounds))
        if self.compare is not None and self.tokens == "patch":
            spans |= {(depth, num_blocks) for depth in range(1, num_blocks)}
        return sorted(spans)


def build_plan(
    encoder: Encoder, config: SelectionConfig, measurement: Measurement | None, data: dict[str, object] | None
) -> SlimmingPlan:
    """Choose the blocks to keep; parameters and MACs are still those of the intact encoder.

    Args:
        encoder: The intact encoder.
        config: Settings of the selection.
        measurement: Statistics of its blocks; None if the criterion needs none.
        data: What the plan says of the tiles.
    """
    blocks, criterion = encoder.full_num_blocks, config.criterion
    bounds = config.bounds
    choice = criterion.choose(None if measurement is None else measurement.statistics, blocks, bounds)
    parameters = encoder.num_parameters()
    shape = encoder.input_shape if measurement is None else measurement.input_shape
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
    if measurement is None:
        return plan
    overview = compare_alternatives(encoder, criterion, bounds, choice, measurement, config.recovery)
    verdict = verdict_on(
        criterion,
        choice,
        bounds,
        blocks,
        measurement.evidence,
        min_tiles=config.min_tiles,
        seed=config.seed,
        untrained=is_untrained(encoder),
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
        if "repaired" in overview and measurement.recovery is not None:
            spans = spans_between(kept, blocks)
            overview["repaired"] = [[*span, measurement.recovery.patch.explained(span)] for span in spans]
    recovery = None if config.recovery == "none" else measurement.recovery
    return replace(
        plan,
        kept_blocks=kept,
        verdict=verdict,
        similarity=measurement.similarity.tolist(),
        votes=measurement.votes,
        tiles_seen=measurement.tiles_seen,
        rows_seen=measurement.rows_seen,
        overview={**overview, **choice.details},
        maps=None if recovery is None else recovery.solve(spans_between(kept, blocks)),
    )


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
        others=depths_without_budget({"criteria": unlabeled}, simpler.name),
    )


def _cautious_depth(config: SelectionConfig, num_blocks: int) -> int:
    """All blocks, or half of them within the bounds."""
    if config.on_unsettled == "intact":
        return num_blocks
    allowed = config.criterion.allowed(num_blocks, config.bounds)
    return min(max(num_blocks // 2, allowed[0]), allowed[-1])


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


def tell_unsettled(plan: SlimmingPlan, on_unsettled: OnUnsettled) -> None:
    """Warn of an unsettled plan, or end the run; the report should be written before.

    Args:
        plan: The plan that is applied.
        on_unsettled: What was done about it.

    Raises:
        UnsettledError: If that is "error".

    Warns:
        UnsettledWarning: If it is anything else.
    """
    if not is_unsettled(plan):
        return
    assert plan.verdict is not None
    said = f"The choice of criterion '{plan.criterion['name']}' is {plan.verdict}. {' '.join(plan.verdict.reasons)}"
    probed = (plan.overview or {}).get("probe") is not None
    other = "give more labels" if probed else "use a criterion with labels or a budget"
    advice = f"give the depth by hand (backbone_keep), {other}"
    if on_unsettled == "error":
        raise UnsettledError(f"{said} on_unsettled is 'error': {advice}, or change on_unsettled.")
    done = {"apply": f" It is applied all the same: {advice}, or set on_unsettled."}.get(on_unsettled, "")
    warnings.warn(said + done, UnsettledWarning, stacklevel=2)


def is_untrained(encoder: Encoder) -> bool:
    """Whether the encoder is known to hold random weights: it was built so, or its norms are as they are initialised."""
    if getattr(encoder, "pretrained", None) is False:
        return True
    norms = [part for part in encoder.blocks.modules() if "Norm" in type(part).__name__]
    weights, biases = (
        [value for part in norms if isinstance(value := getattr(part, name, None), Tensor)] for name in ("weight", "bias")
    )
    return bool(weights) and all(torch.all(weight == 1) for weight in weights) and not any(map(torch.any, biases))


def describe_tiles(source_description: dict[str, object], measurement: Measurement) -> dict[str, object]:
    """What a plan says of the tiles: the source, the shape of one input, and how many were skipped, by reason."""
    shape: InputShape = measurement.input_shape
    plain = {name: list(part) for name, part in shape.items()} if isinstance(shape, dict) else list(shape)
    return {**source_description, "input_shape": plain, "skipped": dict(measurement.skips.counts)}


def package_versions() -> dict[str, str]:
    """Versions of the packages that a plan depends on."""
    others = {package: metadata.version(package) for package in ("terratorch", "torch", "lightning")}
    # Not metadata.version() for our own: a source tree that is only on the path has no metadata.
    return {"python": platform.python_version(), "terratorch_simpler": __version__, **others}
