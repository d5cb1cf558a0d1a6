"""`probe`: the smallest depth whose features predict the labels as well as those of the best depth."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from terratorch_simpler.criteria.base import TIE, Bounds, Choice, Criterion, half_depth
from terratorch_simpler.criteria.statistics import LabelledFeatures, Statistics, naming
from terratorch_simpler.criteria.verdict import ENOUGH_SHARE, RESAMPLES
from terratorch_simpler.errors import ConfigurationError, DegenerateFeaturesError, LabelsError
from terratorch_simpler.functional.ridge import Ridge
from terratorch_simpler.functional.scores import METRICS, LabelKind, jackknife, jackknife_errors, score_predictions
from terratorch_simpler.plan import Level, Verdict

Rule = Literal["one_standard_error", "best"]
STRENGTHS = [10.0**exponent for exponent in range(-4, 3)]
"""Relative strengths of the penalty that are tried (ours)."""
NOISE = 3.0
"""Depths are told apart if the best and the worst differ by so many standard errors of their difference: of twelve depths
that are alike and independent, best and worst differ by 3.26 / sqrt(2) = 2.3 on average (ours)."""

ENOUGH_GROUPS = 8
"""With fewer groups to score, a choice is weak (ours)."""


@dataclass(frozen=True)
class ProbeResult:
    """Scores a ridge probe of the labels after every block.

    Attributes:
        scores: Score after each block, (L,), float64.
        left_out: Scores without each subset of the groups, (J, L).
        baseline: Score of the most frequent class, or the mean.
        strengths: Chosen strength of the penalty after each block.
        num_groups: Groups that the scores are over.
    """

    scores: Tensor
    left_out: Tensor
    baseline: float
    strengths: list[float]
    num_groups: int

    @property
    def errors(self) -> Tensor:
        """Standard error of every score over groups, (L,)."""
        return jackknife_errors(self.left_out)

    @property
    def errors_of_differences(self) -> Tensor:
        """Standard errors of the differences of all pairs of scores, (L, L): groups that are hard cancel out."""
        return jackknife_errors(self.left_out[:, :, None] - self.left_out[:, None, :])

    def resampled(self, number: int, seed: int = 0) -> Tensor:
        """Scores as other groups could have given them, (number, L).

        They are drawn from a normal distribution with the jackknife's covariance, (J - 1) / J * sum of d d' over the
        deviations d of the scores without a subset: no score is computed again.
        """
        deviations = self.left_out - self.left_out.mean(dim=0)
        subsets = len(deviations)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(number, subsets, generator=generator, dtype=torch.float64)
        scores: Tensor = self.scores + ((subsets - 1) / subsets) ** 0.5 * drawn @ deviations
        return scores


class Probe(Criterion):
    """Keep the first c blocks, the smallest c whose probe is not distinguishable from the best (method of this package).

    A ridge regression from the LayerNormed output of every block to the labels, with a strength chosen by leave-group-out
    cross-validation, is scored on the validation split if there is one, else by the same cross-validation. A depth is not
    distinguishable from the best if the difference of their scores is at most its standard error over groups. If best and
    worst depth differ by no more than noise, or no depth beats the most frequent class, half of the blocks are kept. The
    verdict is weak if fewer than 80 % of the resamples over groups make the same choice.

    Args:
        groups: Regular expression whose first group, searched in the path of an image's first file, names what must not be
            split between fitting and scoring, for instance a place. By default every file is a group.
        rule: "one_standard_error", or "best" for the depth of the highest score.

    Raises:
        ConfigurationError: If ``groups`` is no regular expression with a group, or ``rule`` is unknown.
    """

    name = "probe"
    description = (
        "Keeps the fewest blocks whose ridge probe scores within a standard error of the best depth (rule best: that one). "
        "Lines are standard errors over groups; the dotted line is the score of a constant prediction."
    )
    needs_labels = True
    probes_labels = True

    def __init__(self, groups: str | None = None, rule: Rule = "one_standard_error") -> None:
        if rule not in get_args(Rule):
            msg = f"rule is {rule!r} for criterion 'probe', expected one of {', '.join(get_args(Rule))}: change it."
            raise ConfigurationError(msg)
        try:
            has_group = groups is None or re.compile(groups).groups > 0
        except re.error as err:
            msg = f"groups is {groups!r} for criterion 'probe', expected a regular expression ({err}): correct it."
            raise ConfigurationError(msg) from err
        if not has_group:
            msg = (
                f"groups is {groups!r} for criterion 'probe', expected a group in parentheses: put the place's name in some."
            )
            raise ConfigurationError(msg)
        self.groups = groups
        self.rule = rule

    @property
    def args(self) -> dict[str, object]:  # noqa: D102
        return {"groups": self.groups, "rule": self.rule}

    def depths(self, num_blocks: int) -> range:
        """Any depth."""
        return range(1, num_blocks + 1)

    def score(self, statistics: Statistics, depths: list[int]) -> Tensor:
        """Score of the probe of every depth; of several label sets, for the one that asks for most blocks.

        Raises:
            LabelsError: If there are no labels, or none that a probe can be fitted to.
            DegenerateFeaturesError: If features are not finite.
        """
        scores = self.choose(statistics, statistics.num_blocks, Bounds()).scores or {}
        return torch.tensor([scores[depth] for depth in depths], dtype=torch.float64)

    def choose(self, statistics: Statistics | None, num_blocks: int, bounds: Bounds) -> Choice:
        """Take the smallest allowed depth that is not distinguishable from the best allowed one.

        Of several label sets each has such a depth, and the largest is taken: good enough for all. The verdict is that of
        the least sure one, and scores are of the set that asks for most blocks.

        Raises:
            DepthError: If the bounds leave no depth.
            LabelsError: If there are no labels, or none that a probe can be fitted to.
            DegenerateFeaturesError: If features are not finite.
        """
        assert statistics is not None  # needs_labels is set
        allowed = bounds.within(self.depths(num_blocks), num_blocks)
        done, tell = count(1), statistics.progress or (lambda _: None)

        def one_more() -> None:
            tell(next(done))

        if isinstance(statistics.labelled, Mapping):
            choices = {}
            for name, labelled in statistics.labelled.items():
                with naming(name):
                    choices[name] = self._choose(labelled, num_blocks, allowed, one_more)
            choice = _good_enough_for_all(choices)
        else:
            choice = self._choose(statistics.labelled, num_blocks, allowed, one_more)
        return choice if len(allowed) > 1 else replace(choice, verdict=None)  # there was nothing to choose

    def _choose(
        self, labelled: LabelledFeatures | None, num_blocks: int, allowed: list[int], one_more: Callable[[], None]
    ) -> Choice:
        """Choose for one label set; ``one_more`` is called after every block."""
        if labelled is None:
            msg = "There are no labels for criterion 'probe': choose another criterion, or give the data its labels."
            raise LabelsError(msg)
        result, judged_on, weak = self._probe(labelled, one_more)
        metric = METRICS[labelled.kind]
        scores, errors, noise = result.scores, result.errors, result.errors_of_differences
        best, worst = max(allowed, key=lambda c: float(scores[c - 1])), min(allowed, key=lambda c: float(scores[c - 1]))
        from_best = scores[best - 1] - scores
        error_of_worst = noise[best - 1, worst - 1]
        reasons = []
        if from_best[worst - 1] <= NOISE * error_of_worst + TIE:
            reasons.append(
                f"The depths cannot be told apart: best ({best}) and worst ({worst}) differ by "
                f"{from_best[worst - 1]:.3f} in {metric}, with a standard error of {error_of_worst:.3f}."
            )
        if scores[best - 1] - result.baseline <= errors[best - 1] + TIE:
            reasons.append(
                f"No depth beats the baseline: the best {metric} is {scores[best - 1]:.3f}, with a standard error of "
                f"{errors[best - 1]:.3f}, and that of a constant prediction {result.baseline:.3f}."
            )
        settled = not reasons
        depth = int(self._depths(scores[None], noise, allowed)) if settled else half_depth(num_blocks, allowed)
        if settled:
            if result.num_groups < ENOUGH_GROUPS:
                weak.append(
                    f"Scores are over {result.num_groups} groups, and standard errors are rough below {ENOUGH_GROUPS}."
                )
            voted = self._depths(result.resampled(RESAMPLES), noise, allowed)
            share = float((voted == depth).double().mean())
            if share < ENOUGH_SHARE:
                low, high = (int(voted.double().quantile(q, interpolation="nearest")) for q in (0.1, 0.9))
                weak.append(
                    f"Only {100 * share:.0f} % of the resamples choose {depth} blocks, expected at least "
                    f"{100 * ENOUGH_SHARE:.0f} %; eight of ten choose {low} to {high}."
                )
            what = "Smallest depth not distinguishable from the best" if self.rule == "one_standard_error" else "Best depth"
            beside = "" if best in (depth, num_blocks) else f"; the best, {best}: {scores[best - 1]:.3f}"
            if len(allowed) < num_blocks and (other := int(scores.argmax()) + 1) not in (*allowed, num_blocks):
                beside += f"; beyond the bounds, {other}: {scores[other - 1]:.3f}"
            reasons.append(
                f"{what}: {depth} ({metric} {scores[depth - 1]:.3f} ± {errors[depth - 1]:.3f}{beside}; all {num_blocks}: "
                f"{scores[-1]:.3f})."
            )
        details: dict[str, Any] = {
            "metric": metric,
            "judged_on": judged_on,
            "groups": result.num_groups,
            "errors": dict(enumerate(errors.tolist(), start=1)),
            "baseline": result.baseline,
            "best_depth": best,
            "intact": float(scores[-1]),
        }
        by_depth: Mapping[int, float] = dict(enumerate(scores.tolist(), start=1))
        verdict = Verdict("unsettled" if not settled else "weak" if weak else "clear", (*weak, *reasons))
        return Choice(tuple(range(depth)), by_depth, verdict, {"probe": details})

    def _depths(self, scores: Tensor, noise: Tensor, allowed: list[int]) -> Tensor:
        """The depth that the rule takes from each row of scores (R, L), (R,); ``noise`` is of differences, (L, L)."""
        columns = torch.tensor(allowed) - 1
        best, position = scores[:, columns].max(dim=1)
        near = best[:, None] - scores[:, columns] <= TIE
        if self.rule == "one_standard_error":
            near = best[:, None] - scores[:, columns] <= noise[columns[position]][:, columns] + TIE
        return columns[near.int().argmax(dim=1)] + 1

    def best_depth(self, labelled: LabelledFeatures, num_blocks: int, bounds: Bounds) -> int:
        """The allowed depth of the highest score, whether it can be told apart from others or not.

        Args:
            labelled: Features with labels.
            num_blocks: Blocks L of the intact encoder.
            bounds: Bounds on the depth.

        Raises:
            DepthError: If the bounds leave no depth.
            LabelsError: If no probe can be fitted to the labels.
        """
        scores = self._probe(labelled).result.scores
        return max(bounds.within(self.depths(num_blocks), num_blocks), key=lambda depth: float(scores[depth - 1]))

    def _probe(self, labelled: LabelledFeatures, one_more: Callable[[], None] | None = None) -> _Judged:
        """Probe and score; validation images of one place alone have no standard error."""
        train = group_numbers(labelled, self.groups)
        validation = labelled.validation
        if validation is None:
            return _Judged(probe_blocks(labelled, train, one_more=one_more), "cross-validation", [])
        _check_same_labels(labelled, validation)
        both = LabelledFeatures(
            labelled.features, labelled.labels, torch.cat([labelled.images, validation.images + len(labelled.names)]),
            (*labelled.names, *validation.names), labelled.kind,
        )  # fmt: skip
        groups = group_numbers(both, self.groups)
        inside, outside = groups[: len(train)], groups[len(train) :]
        if len(outside.unique()) < 2:
            return _Judged(probe_blocks(labelled, train, one_more=one_more), "cross-validation", [])
        apart = ~torch.isin(inside, outside)  # a place is never on both sides
        groups_in_all = len(inside.unique())
        shared = groups_in_all - len(inside[apart].unique())
        if groups_in_all - shared < min(2, groups_in_all):
            msg = (
                f"{shared} of {groups_in_all} groups of training images are also in validation and must not be fitted, "
                "expected at least 2 that are not: use other validation images, or change groups of criterion 'probe'."
            )
            raise LabelsError(msg)
        weak = []
        if 2 * shared > groups_in_all:
            weak.append(
                f"{shared} of {groups_in_all} groups of training images are also in validation, so they were not fitted."
            )
        rows = LabelledFeatures(labelled.features[:, apart], labelled.labels[apart], kind=labelled.kind)
        return _Judged(probe_blocks(rows, inside[apart], validation, outside, one_more), "validation", weak)


class _Judged(NamedTuple):
    """Scores, what they are of, and why they are weak."""

    result: ProbeResult
    judged_on: str
    weak: list[str]


def _check_same_labels(train: LabelledFeatures, validation: LabelledFeatures) -> None:
    """Refuse training and validation images whose labels are of two kinds, or of different numbers of labels.

    Raises:
        LabelsError: If they are.
    """
    kinds = [
        f"{one.kind} of {one.labels.shape[1]} labels" if one.labels.ndim == 2 else one.kind for one in (train, validation)
    ]
    if kinds[0] != kinds[1]:
        msg = f"Training labels are for {kinds[0]}, and validation labels for {kinds[1]}, expected the same: correct one."
        raise LabelsError(msg)


def _good_enough_for_all(choices: Mapping[str, Choice]) -> Choice:
    """One choice from those of every label set."""
    verdicts = {name: choice.verdict for name, choice in choices.items() if choice.verdict is not None}
    surest_last = sorted(verdicts, key=lambda name: -get_args(Level).index(verdicts[name].level))
    reasons = [f"{name}: {reason}" for name in surest_last for reason in verdicts[name].reasons]
    label_sets = {
        name: {
            **choice.details["probe"], "depth": len(choice.kept_blocks), "level": verdicts[name].level,
            "scores": choice.scores,
        }
        for name, choice in choices.items()
    }  # fmt: skip
    deepest = max(choices.values(), key=lambda choice: len(choice.kept_blocks))
    verdict = Verdict(verdicts[surest_last[0]].level, tuple(reasons))
    return Choice(deepest.kept_blocks, deepest.scores, verdict, {"label_sets": label_sets})


def group_numbers(labelled: LabelledFeatures, pattern: str | None) -> Tensor:
    """Group of every row, numbered from 0 in the order in which groups come, (N,).

    Args:
        labelled: Rows, with the name of the image that each is of.
        pattern: Regular expression whose first group names the group; None for the whole name.

    Raises:
        ConfigurationError: If it does not match a name.
    """
    numbers: dict[str, int] = {}
    of_image = []
    for name in labelled.names:
        found = None if pattern is None else re.search(pattern, name)
        if pattern is not None and (found is None or found[1] is None):
            msg = (
                f"groups {pattern!r} of criterion 'probe' does not match '{name}', expected every file to match: change it."
            )
            raise ConfigurationError(msg)
        of_image.append(numbers.setdefault(name if found is None else found[1], len(numbers)))
    return torch.tensor(of_image)[labelled.images]


def probe_blocks(
    train: LabelledFeatures,
    groups: Tensor,
    validation: LabelledFeatures | None = None,
    validation_groups: Tensor | None = None,
    one_more: Callable[[], None] | None = None,
) -> ProbeResult:
    """Fit a ridge regression to the output of every block and score it on other groups.

    Args:
        train: Rows to fit.
        groups: Group of each.
        validation: Rows to score; by default the rows to fit, each by the regression without its group.
        validation_groups: Group of each.
        one_more: Called after every block.

    Raises:
        LabelsError: If there are fewer than two groups, or labels do not vary, or not without one group.
        DegenerateFeaturesError: If features are not finite.
    """
    if (found := len(groups.unique())) < 2:
        msg = (
            f"Labelled rows come from {found} group, expected at least 2 for cross-validation: give labels of more places, "
            "or change groups of criterion 'probe'."
        )
        raise LabelsError(msg)
    for rows in (train, *([] if validation is None else [validation])):
        if wrong := [n for n, block in enumerate(rows.features, start=1) if not torch.isfinite(block).all()]:
            msg = f"Labelled features after blocks {wrong} are not finite: run the encoder in higher precision."
            raise DegenerateFeaturesError(msg)
    judged_labels = train.labels if validation is None else validation.labels
    targets, judged = one_hot(train.kind, train.labels, judged_labels)
    _check_varies(targets, groups)
    judged_groups = groups if validation_groups is None else validation_groups
    judged_groups = judged_groups.unique(return_inverse=True)[1]
    scores, left_out, strengths = [], [], []
    for block, features in enumerate(train.features):
        ridge = Ridge.fit(features, targets)
        held_out = ridge.leave_group_out(features, targets, groups, STRENGTHS)
        crossed = torch.tensor([score_predictions(train.kind, each, targets) for each in held_out])
        chosen = int((crossed >= crossed.max() - TIE).nonzero().max())  # of equals the strongest
        strengths.append(STRENGTHS[chosen])
        predicted = held_out[chosen]
        if validation is not None:
            predicted = ridge.predict(validation.features[block], STRENGTHS[chosen])

        def score(rows: Tensor, predicted: Tensor = predicted) -> float:
            return score_predictions(train.kind, predicted[rows], judged[rows])

        scores.append(score(torch.ones(len(judged), dtype=torch.bool)))
        left_out.append(jackknife(score, judged_groups))
        if one_more is not None:
            one_more()
    constant = targets.mean(dim=0).expand_as(judged)
    return ProbeResult(
        torch.tensor(scores, dtype=torch.float64), torch.stack(left_out, dim=1),
        score_predictions(train.kind, constant, judged), strengths, len(judged_groups.unique()),
    )  # fmt: skip


def one_hot(kind: LabelKind, labels: Tensor, judged: Tensor) -> tuple[Tensor, Tensor]:
    """Targets of a regression, (N, K) and (M, K), float64: classes become one-hot, in as many columns as there are classes.

    Args:
        kind: Kind of labels.
        labels: Labels to fit, (N,), or (N, K) if an image has several.
        judged: Labels to score, (M,) or (M, K).
    """
    if kind in ("multilabel", "regression"):
        return tuple(each.double().reshape(len(each), -1) for each in (labels, judged))  # type: ignore[return-value]
    classes = torch.cat([labels, judged]).unique()
    return (labels[:, None] == classes).double(), (judged[:, None] == classes).double()


def _check_varies(targets: Tensor, groups: Tensor) -> None:
    varies = (targets != targets[0]).any()
    if not varies:
        msg = "All labels are the same, expected two classes or values at least: check labels and masks."
        raise LabelsError(msg)
    folds = [targets[groups != group] for group in groups.unique()]
    if not any((fold != fold[0]).any() for fold in folds):
        msg = (
            "Without any one group all labels are the same, so nothing can be cross-validated: give labels of more places, "
            "or change groups of criterion 'probe'."
        )
        raise LabelsError(msg)
