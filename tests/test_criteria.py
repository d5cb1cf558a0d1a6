"""The score g(c) on matrices worked out by hand, ties, bounds, votes, and the table of rules."""

from typing import ClassVar

import pytest
import torch

from terratorch_simpler.criteria import (
    Bounds,
    Criterion,
    Fixed,
    GroupSums,
    Simpler,
    Statistics,
    bootstrap,
    build_criterion,
    register,
)
from terratorch_simpler.criteria.simpler import score_curve
from terratorch_simpler.errors import ConfigurationError, DepthError
from terratorch_simpler.metrics import LayerSimilarity


def reference_score(s: torch.Tensor, c: int) -> float:
    def delta(m: torch.Tensor) -> float:
        rows = [sum(abs(float(m[i + 1, j] - m[i, j])) for j in range(m.shape[1])) / m.shape[1] for i in range(len(m) - 1)]
        return sum(rows) / len(rows)

    return delta(s[:c, :c]) - delta(s[c:, c:])


def statistics(similarity: torch.Tensor) -> Statistics:
    """Statistics of an encoder whose blocks are as similar as this; nothing is known of what enters the first one."""
    hsic = torch.nn.functional.pad(similarity, (1, 0, 1, 0))
    hsic[..., 0, 0] = 1
    return Statistics(hsic, hsic, 1 - hsic)


def sums(groups: list[torch.Tensor]) -> GroupSums:
    metric = LayerSimilarity(len(groups[0]), len(groups))
    for number, group in enumerate(groups):
        metric.update(torch.cat([torch.randn_like(group[:1]), group]), tiles=4, group=number)
    return metric.sums()


def settled_after(c: int, blocks: int) -> torch.Tensor:
    """Representations drift ever faster up to block c, and stay there."""
    place = torch.arange(blocks).clamp(max=c - 1).double() ** 2
    return 1 - (place[:, None] - place[None, :]).abs() / blocks**2


def test_score_matches_the_definition():
    a = torch.randn(9, 9, generator=torch.Generator().manual_seed(0)).double()
    s = (a + a.T) / 2
    depths = list(range(2, 8))
    assert score_curve(s, depths).tolist() == pytest.approx([reference_score(s, c) for c in depths])


def test_score_by_hand():
    # Two halves: alike within, 0 between. c = 2: nothing moves on either side. c = 3: kept rows 2 -> 3 move in all 3
    # columns, so delta(kept) = (0 + 1) / 2, delta(dropped) = 0.
    s = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3))
    assert score_curve(s, [2, 3]).tolist() == pytest.approx([0.0, 0.5])


def test_score_is_batched():
    s = torch.rand(3, 2, 7, 7, dtype=torch.float64)
    scores = score_curve(s, [2, 3, 4, 5])
    assert scores.shape == (3, 2, 4)
    assert torch.allclose(scores[1, 0], score_curve(s[1, 0], [2, 3, 4, 5]))


@pytest.mark.parametrize("c", [2, 3, 5, 8])
def test_planted_depth_is_found(c):
    choice = Simpler().choose(statistics(settled_after(c, 12)), 12, Bounds())
    assert len(choice.kept_blocks) == c
    assert set(choice.scores) == set(range(2, 11))


def test_drift_at_a_constant_pace_is_a_tie_between_the_last_moving_block_and_the_one_before():
    # The step from row c to row c + 1 belongs to neither part, so cutting one block earlier scores the same.
    place = torch.arange(12).clamp(max=6).double()
    scores = Simpler().choose(statistics(1 - (place[:, None] - place[None, :]).abs() / 12), 12, Bounds()).scores
    assert scores[6] == pytest.approx(scores[7]) == pytest.approx(1 / 12)
    assert max(score for depth, score in scores.items() if depth not in (6, 7)) < 1 / 12


def test_all_alike_is_a_tie_and_goes_to_the_smallest_depth():
    choice = Simpler().choose(statistics(torch.ones(8, 8).double()), 8, Bounds())
    assert choice.kept_blocks == (0, 1)
    assert set(choice.scores.values()) == {0.0}


def test_tie_up_to_rounding_goes_to_the_smaller_depth():
    s = torch.ones(8, 8).double()
    s[7, 7] += 1e-12
    assert Simpler().choose(statistics(s), 8, Bounds()).kept_blocks == (0, 1)


def test_bounds_move_the_choice():
    s = settled_after(5, 12)
    assert len(Simpler().choose(statistics(s), 12, Bounds(min_depth=7)).kept_blocks) == 7
    assert len(Simpler().choose(statistics(s), 12, Bounds(max_depth=4)).kept_blocks) == 4
    assert list(Simpler().choose(statistics(s), 12, Bounds(4, 6)).scores) == [4, 5, 6]


def test_bounds_that_leave_nothing_are_refused():
    with pytest.raises(DepthError, match="Found min_depth 11 and max_depth None for an encoder of 12 blocks"):
        Simpler().choose(statistics(settled_after(5, 12)), 12, Bounds(min_depth=11))


@pytest.mark.parametrize("blocks", [1, 4])
def test_shallow_encoders_are_refused(blocks):
    with pytest.raises(DepthError, match=f"Found an encoder of {blocks} blocks, expected at least 5 .* backbone_keep"):
        Simpler().choose(statistics(torch.ones(blocks, blocks)), blocks, Bounds())


def drifting_group(c: int, seed: int) -> torch.Tensor:
    """8 blocks of which those after c add nothing to the residual stream."""
    generator = torch.Generator().manual_seed(seed)
    outputs = [torch.randn(200, 16, generator=generator)]
    for block in range(1, 8):
        fresh = torch.randn(200, 16, generator=generator)
        outputs.append(outputs[-1] + (0.2 * 2**block * fresh if block < c else 0))
    return torch.stack(outputs)


def test_votes_are_unanimous_when_groups_agree():
    votes = bootstrap(Simpler(), sums([drifting_group(4, seed) for seed in range(6)]), Bounds(), seed=0)
    assert votes == {2: 0.0, 3: 0.0, 4: 1.0, 5: 0.0, 6: 0.0}


def test_votes_are_split_when_groups_disagree():
    groups = [drifting_group(4, seed) for seed in range(3)] + [1e-2 * drifting_group(3, seed) for seed in range(3)]
    votes = bootstrap(Simpler(), sums(groups), Bounds(), seed=0)
    assert sum(votes.values()) == pytest.approx(1.0)
    assert 0 < votes[3] < 0.1  # wins only where no group of the first kind was drawn: (1/2) ** 6
    assert votes[4] > 0.5


def test_fixed_keeps_what_it_is_told():
    assert Fixed(keep=3).choose(None, 4, Bounds()).kept_blocks == (0, 1, 2)
    assert Fixed(keep=[0, 3]).choose(None, 4, Bounds()).kept_blocks == (0, 3)
    assert build_criterion("fixed", drop_blocks=7).choose(None, 12, Bounds()).kept_blocks == (0, 1, 2, 3, 4)


def test_fixed_outside_the_bounds_is_refused():
    with pytest.raises(DepthError, match="Found 3 blocks given by hand, expected 5 to 12"):
        Fixed(keep=3).choose(None, 12, Bounds(min_depth=5))


def test_fixed_needs_exactly_one_setting():
    with pytest.raises(ConfigurationError, match="expected exactly one of them"):
        build_criterion("fixed")


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(
        ConfigurationError,
        match=r"Found criterion 'simplr', expected one of angular, .*, simpler, sls, or a class_path",
    ):
        build_criterion("simplr")


def test_budget_for_a_rule_without_one_is_refused():
    with pytest.raises(ConfigurationError, match="Found drop_blocks 3 for criterion 'simpler', which needs no budget"):
        build_criterion("simpler", drop_blocks=3)


def test_a_second_rule_of_the_same_name_is_refused():
    class Impostor(Simpler):
        name: ClassVar[str] = "simpler"

    with pytest.raises(ConfigurationError, match="two criteria named 'simpler'"):
        register(Impostor)
    assert isinstance(build_criterion("simpler"), Criterion)
