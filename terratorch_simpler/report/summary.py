"""What a report says of a plan, in words and numbers: the terminal, the figure and the page all tell this."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from terratorch_simpler.plan import MIN_BOOTSTRAP_GROUPS, MIN_GROUP_TILES, SlimmingPlan, format_score

LONGEST = 200
"""Characters that are shown of a text from a plan or a table, which may come from anywhere."""
LONGEST_VERDICT = 1000
FEWEST_FOR_VOTES = MIN_BOOTSTRAP_GROUPS * MIN_GROUP_TILES
"""Fewest tiles for votes."""
MISSING = "–"  # noqa: RUF001  an en dash reads as "nothing" where a hyphen reads as a minus


class Criterion(NamedTuple):
    """What one criterion would keep.

    Attributes:
        name: Its name in YAML.
        kept: Block numbers, 0-based.
        scores: Score of each depth it judged, or None.
        chosen: Whether this is the criterion of the plan.
        probe: Standard errors and baseline of its scores, where it has fitted probes.
    """

    name: str
    kept: tuple[int, ...]
    scores: dict[int, float] | None
    chosen: bool
    probe: Mapping[str, Any] | None = None


class Depth(NamedTuple):
    """What the first ``depth`` blocks cost and give; None where it was not measured.

    Attributes:
        depth: Number of first blocks kept.
        score: Score by the criterion of the plan.
        error: Its standard error, where it is of a probe.
        votes: Share of resamples that choose it.
        parameters: Parameters of the encoder.
        macs: Multiply-accumulate operations for one tile.
        similarity: CKA of the last kept block with the last block.
        recovery_r2: Share of the last block's variance that a linear map restores.
        chosen: Whether the plan keeps that many blocks.
    """

    depth: int
    score: float | None
    error: float | None
    votes: float | None
    parameters: int | None
    macs: int | None
    similarity: float | None
    recovery_r2: float | None
    chosen: bool


class LabelSet(NamedTuple):
    """What one of several label sets asks for.

    Attributes:
        name: Its name.
        depth: Blocks that it asks for.
        probed: The entry of the plan, with scores and standard errors by depth.
        chosen: Whether it asks for most blocks, which decides.
    """

    name: str
    depth: int
    probed: Mapping[str, Any]
    chosen: bool

    def cells(self, num_blocks: int) -> list[str]:
        """A row of a table, as :data:`LABEL_SET_HEAD` names it."""
        probed = self.probed
        return [
            printable(self.name), f"{self.depth} of {num_blocks}", printable(probed["metric"]),
            score(probed["scores"][self.depth], probed["errors"][self.depth]),
            score(probed["intact"]), score(probed["baseline"]), probed["level"],
        ]  # fmt: skip


LABEL_SET_HEAD = ["label set", "depth", "metric", "score", "all blocks", "constant", "verdict"]


def label_sets(plan: SlimmingPlan) -> list[LabelSet]:
    """What every label set asks for, in order; none if labels had no names."""
    entries = (plan.overview or {}).get("label_sets", {})
    largest = max((entry["depth"] for entry in entries.values()), default=0)
    first = next((name for name, entry in entries.items() if entry["depth"] == largest), None)
    return [LabelSet(name, entry["depth"], entry, name == first) for name, entry in entries.items()]


def probed(plan: SlimmingPlan) -> Mapping[str, Any] | None:
    """Standard errors and baseline of the plan's scores; None unless they are of probes."""
    own: Mapping[str, Any] | None = (plan.overview or {}).get("probe")
    return next((each.probed for each in label_sets(plan) if each.chosen), own)


def criteria(plan: SlimmingPlan) -> list[Criterion]:
    """What every criterion chose: that of the plan first, whatever ``on_unsettled`` made of it; without scores last."""
    own = str(plan.criterion["name"])
    probe = probed(plan)
    others = (plan.overview or {"criteria": {}})["criteria"]
    kept = others[own]["kept_blocks"] if own in others else plan.kept_blocks
    found = [Criterion(own, tuple(kept), dict(plan.scores) if plan.scores else None, True, probe)]
    found += [
        Criterion(name, tuple(other["kept_blocks"]), other["scores"] or None, False)
        for name, other in sorted(others.items(), key=lambda item: (not item[1]["scores"], item[0]))
        if name != own
    ]
    return found


def depths(plan: SlimmingPlan) -> list[Depth]:
    """Every depth that something is known of, in order."""
    scores, votes = plan.scores or {}, plan.votes or {}
    costs = (plan.overview or {"depths": {}})["depths"]
    measured = range(1, plan.full_num_blocks + 1) if plan.similarity is not None else ()
    errors = (probed(plan) or {"errors": {}})["errors"]
    found = []
    for depth in sorted({*scores, *votes, *costs, *measured}):
        cost = costs.get(depth, {})
        own = None if plan.similarity is None else plan.similarity[depth - 1][-1]
        found.append(
            Depth(
                depth,
                scores.get(depth),
                errors.get(depth),
                votes.get(depth),
                cost.get("parameters"),
                cost.get("macs"),
                cost.get("similarity", own),
                cost.get("recovery_r2"),
                depth == len(plan.kept_blocks),
            )
        )
    return found


def is_prefix(kept: Sequence[int]) -> bool:
    """Whether the kept blocks are the first ones, without a gap."""
    return tuple(kept) == tuple(range(len(kept)))


def runs(kept: Sequence[int]) -> list[tuple[int, int]]:
    """First and last block of every stretch without a gap.

    Example:
        >>> runs([0, 1, 2, 5])
        [(0, 2), (5, 5)]
    """
    held = set(kept)
    starts = [i for i in kept if i - 1 not in held]
    ends = [i for i in kept if i + 1 not in held]
    return list(zip(starts, ends, strict=True))


def block_ranges(kept: Sequence[int]) -> str:
    """Block numbers as short as they go.

    Example:
        >>> block_ranges([0, 1, 2, 5])
        '0-2, 5'
    """
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs(kept))


def kept_words(plan: SlimmingPlan) -> str:
    """What is kept, in a few words."""
    kept = plan.kept_blocks
    which = f"first {len(kept)}" if is_prefix(kept) else f"blocks {block_ranges(kept)}"
    width = "" if plan.width == 1.0 else f" at width {plan.width:g}"
    repaired = "" if plan.recovery == "none" else f", {plan.recovery} recovery"
    return f"{which} of {plan.full_num_blocks} blocks kept{width}{repaired}"


def verdict_words(plan: SlimmingPlan) -> str | None:
    """How reliable the choice is, and why, in one line; None without a verdict."""
    if plan.verdict is None:
        return None
    return printable(" ".join([f"{plan.verdict}.", *plan.verdict.reasons]), LONGEST_VERDICT)


def reasons(plan: SlimmingPlan) -> list[str]:
    """What the choice rests on, a few words each."""
    depth, probe, sets = len(plan.kept_blocks), probed(plan), label_sets(plan)
    parts = [f"criterion {plan.criterion['name']}"]
    if plan.scores is not None and depth in plan.scores:
        budget = plan.criterion["args"].get("drop_blocks") is not None  # fewer dropped blocks always score higher
        other = None if budget else max((s for d, s in plan.scores.items() if d != depth), default=None)
        beside = "" if other is None else f", {'next best' if other <= plan.scores[depth] else 'best'} {score(other)}"
        error = None if probe is None else probe["errors"].get(depth)
        parts.append(f"score {score(plan.scores[depth], error)}{beside}")
    if sets:
        parts.append(f"{len(sets)} label sets, scores of '{next(each.name for each in sets if each.chosen)}'")
    if probe is not None:
        parts.append(f"{probe['metric']} by {probe['judged_on']} over {probe['groups']} groups")
    elif plan.votes is not None:
        parts.append(f"{percent(plan.votes.get(depth, 0.0))} of resamples choose it")
    elif plan.tiles_seen:
        parts.append("too few tiles for votes" if plan.tiles_seen < FEWEST_FOR_VOTES else "no votes")
    for before, after, explained in (plan.overview or {}).get("repaired", []):
        parts.append(
            f"the map for blocks {before}-{after - 1} explains {percent(explained)} of the variance on held-out tiles"
        )
    if (distilled := (plan.overview or {}).get("distilled")) is not None:
        parts.append(
            f"after {distilled['steps']} steps of distillation it explains {percent(distilled['explained_after'])} of the "
            f"output of block {(plan.recovery_target or plan.full_num_blocks) - 1} on {distilled['held_out']} held-out "
            f"tiles, {percent(distilled['explained_before'])} before"
        )
    if plan.tiles_seen:
        parts.append(f"{plan.tiles_seen:,} tiles, {plan.rows_seen:,} tokens")
    return parts


def score(value: float | None, error: float | None = None) -> str:
    """A score, and its standard error if it has one.

    Example:
        >>> score(0.85), score(0.85, 0.0312), score(-2e-5), score(1e300)
        ('0.850', '0.850 ± 0.031', '-2e-05', '1e+300')
    """
    if value is None:
        return MISSING
    return format_score(value) if error is None else f"{format_score(value)} ± {format_score(error)}"


def percent(part: float | None) -> str:
    """A share in per cent.

    Example:
        >>> percent(0.125)
        '12.5 %'
    """
    return MISSING if part is None else f"{100 * part:.1f} %"


def change(after: float | None, before: float | None) -> str:
    """What has become less, or more, in per cent of what was before.

    Example:
        >>> change(4_744_322, 5_634_050), change(7, 7)
        ('-15.8 %', '0.0 %')
    """
    if after is None or before is None or not before:
        return MISSING
    rounded = round(100 * (after / before - 1), 1)
    return f"{rounded:+.1f} %" if rounded else "0.0 %"


def lowest_shown(values: Iterable[float]) -> float:
    """Where the scale of a similarity that ends at 1 begins: at a tenth below all values, so that structure is seen.

    Example:
        >>> lowest_shown([0.93, 1.0]), lowest_shown([0.34, 1.0]), lowest_shown([-0.1])
        (0.8, 0.3, 0.0)
    """
    return min(max(math.floor(min(values) * 10) / 10, 0.0), 0.8)


def short(number: float | None) -> str:
    """A count, from a thousand on with one decimal and its unit.

    Example:
        >>> short(303_872_000), short(12_412_637_568), short(950)
        ('303.9 M', '12.4 G', '950')
    """
    if number is None:
        return MISSING
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size * 0.99995:  # 999,950 is 1.0 M, not 1000.0 k
            return f"{number / size:.1f} {unit}"
    return f"{number:.3g}"


def printable(text: object, longest: int = LONGEST) -> str:
    """A text that was read from somewhere, without what steers a terminal or breaks an encoding, and not too long."""
    shown = str(text)
    shown = shown if len(shown) <= longest else f"{shown[: longest - 1]}…"
    return "".join(letter if letter.isprintable() or letter == " " else "\N{REPLACEMENT CHARACTER}" for letter in shown)
