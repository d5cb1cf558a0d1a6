"""Does the criterion know? A choice is clear, weak or unsettled, with the figures that say why (ours)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import Tensor

from terratorch_simpler.criteria.base import TIE, Bounds, Choice, Criterion, first_best, kept_alike
from terratorch_simpler.criteria.statistics import Evidence
from terratorch_simpler.errors import DegenerateFeaturesError, NoAnswerError
from terratorch_simpler.plan import Verdict, format_score

ENOUGH_SHARE = 0.8
"""A choice that fewer resamples repeat is weak."""
STANDARD_ERRORS = 3.0
"""Scores of all depths that differ by less than this many standard errors are not told apart."""
MOST_APART = 0.25
"""Conventions, or criteria, that choose depths further apart than this share of the blocks disagree."""
TOO_FEW = 4
"""With so many groups or files, or fewer, the share of resamples means nothing."""
RESAMPLES = 1000


def judge(
    scores: Mapping[int, float],
    depth: int,
    num_blocks: int,
    *,
    resampled: Tensor | None = None,
    share: float | None = None,
    no_vote: str = "",
    conventions: Mapping[str, int] | None = None,
    others: Mapping[str, int] | None = None,
    doubts: Sequence[str] = (),
    needs_positive_score: bool = False,
) -> Verdict:
    """Judge a choice; what is not given is not judged.

    Args:
        scores: Score of every depth that could be chosen, in order; empty if the depth itself was not chosen.
        depth: The chosen depth.
        num_blocks: Blocks L of the intact encoder.
        resampled: Scores of the same depths in each resample, (R, C).
        share: Share of the resamples with the same choice.
        no_vote: Why there are no resamples, if there should be some.
        conventions: Depth chosen by name of the convention.
        others: Depth chosen by name of another criterion without a budget.
        doubts: Further reasons why the choice is weak, each a sentence; given for an unsettled one as well.
        needs_positive_score: Whether a score of 0 or less means that nothing speaks for a depth.

    Returns:
        Level and reasons: those of the level, or, where it is clear, what supports the choice.

    Example:
        >>> judge({2: 0.1, 3: 0.3, 4: 0.2}, 3, 6, share=0.9, conventions={"raw": 3, "LayerNorm": 4}).level
        'clear'
        >>> judge({2: 0.1, 3: 0.3, 4: 0.2}, 3, 6, share=0.6).reasons
        ('Only 60 % of the resamples choose it, expected at least 80 %.',)
    """
    conventions, others = conventions or {}, others or {}
    unsettled = [
        *_flat(scores, resampled, needs_positive_score),
        *_at_an_end(scores, depth),
        *_apart("The conventions of comparing tokens", conventions, num_blocks),
    ]
    if unsettled:
        return Verdict("unsettled", (*unsettled, *doubts))
    weak = [no_vote] if no_vote else []
    if share is not None and share < ENOUGH_SHARE:
        weak.append(f"Only {100 * share:.0f} % of the resamples choose it, expected at least {100 * ENOUGH_SHARE:.0f} %.")
    weak += doubts
    for name, other in others.items():
        weak += _apart("Other criteria disagree: they", {"this one": depth, name: other}, num_blocks)
    if weak:
        return Verdict("weak", tuple(weak))
    support = [] if share is None else [f"{100 * share:.0f} % of the resamples choose it."]
    if conventions:
        chosen = ", ".join(f"{name} {other}" for name, other in conventions.items())
        support.append(f"The conventions of comparing tokens choose alike: {chosen}.")
    return Verdict("clear", tuple(support))


def _flat(scores: Mapping[int, float], resampled: Tensor | None, needs_positive_score: bool) -> list[str]:
    """Scores that speak for no depth."""
    if not scores:
        return []
    values = torch.tensor(list(scores.values()), dtype=torch.float64)
    best, worst = float(values.max()), float(values.min())
    reasons = []
    if needs_positive_score and best <= 0:
        reasons.append(f"No depth scores above 0: the highest score is {format_score(best)}.")
    if len(scores) < 2:
        return reasons
    error = 0.0
    if resampled is not None:
        difference = resampled[:, int(values.argmax())] - resampled[:, int(values.argmin())]
        error = float(difference.std()) if len(difference) > 1 else float("inf")
    if best - worst < TIE:
        reasons.append(f"All depths score the same, within {TIE:g}: their curve is rounding.")
    elif best - worst < STANDARD_ERRORS * error:
        reasons.append(
            f"Scores span {format_score(best - worst)} from the lowest to the highest, less than {STANDARD_ERRORS:g} "
            f"standard errors of {format_score(error)}."
        )
    return reasons


def _at_an_end(scores: Mapping[int, float], depth: int) -> list[str]:
    """A choice at the first or last allowed depth, towards which the score rises over the nearer half of the depths."""
    depths, values = list(scores), torch.tensor(list(scores.values()), dtype=torch.float64)
    if len(depths) < 3 or depth not in (depths[0], depths[-1]):
        return []
    last = depth == depths[-1]
    half = -(-len(depths) // 2)
    towards = values[-half:] if last else values[:half].flip(0)
    if float(values.max() - values.min()) < TIE or bool((towards.diff() < -TIE).any()):
        return []
    return [
        f"The score still rises towards {'more' if last else 'fewer'} blocks at {depth}, the {'last' if last else 'first'} "
        "depth that is allowed."
    ]


def _apart(who: str, chosen: Mapping[str, int], num_blocks: int) -> list[str]:
    if not chosen or max(chosen.values()) - min(chosen.values()) <= MOST_APART * num_blocks:
        return []
    listed = ", ".join(f"{depth} ({name})" for name, depth in chosen.items())
    return [f"{who} choose depths more than a quarter of the {num_blocks} blocks apart: {listed}."]


def verdict_on(
    criterion: Criterion,
    choice: Choice,
    bounds: Bounds,
    num_blocks: int,
    evidence: Evidence,
    *,
    min_tiles: int,
    seed: int,
    untrained: bool = False,
    implausible: str | None = None,
    others: Mapping[str, int] | None = None,
) -> Verdict | None:
    """The verdict on the choice of a criterion.

    Args:
        criterion: The criterion.
        choice: Its choice; a verdict of its own counts, and is clear only if nothing speaks against any choice.
        bounds: Bounds on the kept depth.
        num_blocks: Blocks L of the intact encoder.
        evidence: From the pass that it chose from.
        min_tiles: Tiles that are recommended.
        seed: Seed of the resamples.
        untrained: Whether the encoder is known to hold random weights.
        implausible: What is implausible about the images that reach the encoder, a sentence.
        others: Depth chosen by name of another criterion without a budget.

    Returns:
        The verdict; None if nothing was chosen: blocks are given by hand, or only one depth is allowed.
    """
    doubts = doubts_about(untrained, implausible)
    if choice.verdict is not None or not criterion.needs_similarity:
        return choice.verdict and choice.verdict.doubted(doubts)
    allowed = criterion.allowed(num_blocks, bounds)
    budget = criterion.drop_blocks is not None
    if len(allowed) < 2 and not budget:
        return None
    depth = len(choice.kept_blocks)
    scores = {} if budget or choice.scores is None else {number: choice.scores[number] for number in allowed}
    if criterion.needs_labels:  # it looks at labels, not at the similarity of many tiles
        return judge(scores, depth, num_blocks, others=others, doubts=doubts)
    tiles = sum(evidence.tiles_of_file)
    if tiles < min_tiles:
        doubts.append(f"Only {tiles} tiles were seen, fewer than the {min_tiles} of min_tiles.")
    resampled, share, no_vote = _resampled(criterion, choice, allowed, evidence, seed)
    return judge(
        scores,
        depth,
        num_blocks,
        resampled=resampled,
        share=share,
        no_vote=no_vote,
        conventions={} if budget else _conventions(criterion, bounds, num_blocks, evidence),
        others={} if budget else others,
        doubts=doubts,
        needs_positive_score=criterion.needs_positive_score,
    )


def doubts_about(untrained: bool, implausible: str | None) -> list[str]:
    """Why no choice at all may be clear: a sentence each.

    Args:
        untrained: Whether the encoder is known to hold random weights.
        implausible: What is implausible about the images that reach the encoder, a sentence.
    """
    doubts = ["The encoder holds random weights, on which no depth means anything."] if untrained else []
    return doubts if implausible is None else [*doubts, implausible]


def _resampled(
    criterion: Criterion, choice: Choice, allowed: list[int], evidence: Evidence, seed: int
) -> tuple[Tensor | None, float | None, str]:
    """Scores in each resample, share of the resamples with the same choice, and why there are none."""
    groups, places = evidence.groups, evidence.num_places
    if len(groups) <= TOO_FEW:
        return None, None, f"Not enough tiles for a vote: {len(groups)} groups of tiles, more than {TOO_FEW} are needed."
    if places <= TOO_FEW:
        files = len(evidence.tiles_of_file)
        return (
            None,
            None,
            (
                f"Not enough places for a vote: {files} files weigh as much as {places:.1f} equal ones, more than {TOO_FEW} "
                "are needed."
            ),
        )
    spread = evidence.design_effect**0.5
    statistics = groups.resampled(RESAMPLES, seed, spread)
    # Spread out, the estimate of a block's own variance may fall below zero: such a resample chooses nothing.
    usable = (statistics.hsic.diagonal(dim1=-2, dim2=-1)[:, 1:] > 0).all(dim=-1)
    statistics = statistics[usable]
    if criterion.drop_blocks is not None:
        same = kept_alike(criterion, statistics, choice.kept_blocks, allowed)
        return None, float(same.sum()) / RESAMPLES, ""
    scores = criterion.score(statistics, allowed)
    wins = first_best(scores) == allowed.index(len(choice.kept_blocks))
    return scores, float(wins.sum()) / RESAMPLES, ""


def _conventions(criterion: Criterion, bounds: Bounds, num_blocks: int, evidence: Evidence) -> dict[str, int]:
    """Depth chosen under each convention that has an answer."""
    chosen = {}
    for name, statistics in evidence.conventions.items():
        with suppress(DegenerateFeaturesError, NoAnswerError):
            chosen[name] = len(criterion.choose(statistics, num_blocks, bounds).kept_blocks)
    return chosen
