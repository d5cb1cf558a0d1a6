"""From settings and a measurement to a plan: what the callback, the commands and the Python functions share."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata

from terratorch_simpler import __version__
from terratorch_simpler.alternatives import compare_alternatives
from terratorch_simpler.criteria import Bounds, Criterion
from terratorch_simpler.encoders import InputShape
from terratorch_simpler.extraction import ExtractionConfig, Measurement, Tokens, count_macs
from terratorch_simpler.indices import Span, spans_between
from terratorch_simpler.models.plain import Encoder
from terratorch_simpler.plan import SlimmingPlan


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
    choice = criterion.choose(None if measurement is None else measurement.statistics, blocks, config.bounds)
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
    )
    if measurement is None:
        return plan
    recovery = None if config.recovery == "none" else measurement.recovery
    return replace(
        plan,
        similarity=measurement.similarity.tolist(),
        votes=measurement.votes,
        tiles_seen=measurement.tiles_seen,
        rows_seen=measurement.rows_seen,
        overview=compare_alternatives(encoder, criterion, config.bounds, choice, measurement, config.recovery),
        maps=None if recovery is None else recovery.solve(spans_between(choice.kept_blocks, blocks)),
    )


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
