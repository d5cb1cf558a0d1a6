"""Every criterion against a slow reference, and on encoders with known idle blocks; ties, bounds, bootstrap, registry."""

import itertools
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from terratorch_simpler.criteria import (
    Angular,
    BlockInfluence,
    Bounds,
    CkaIntervals,
    Criterion,
    Fixed,
    GroupSums,
    Knee,
    Simpler,
    Statistics,
    bootstrap,
    build_criterion,
    known_criteria,
    register,
)
from terratorch_simpler.criteria.knee import knee_curve
from terratorch_simpler.criteria.simpler import score_curve
from terratorch_simpler.errors import ConfigurationError, DepthError
from terratorch_simpler.extraction import ExtractionConfig, measure
from terratorch_simpler.metrics import LayerSimilarity
from tests.in_memory_tiles import Tiles, land
from tests.synthetic_features import idle, random_statistics


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


def test_budget_for_a_criterion_without_one_is_refused():
    with pytest.raises(ConfigurationError, match="Found drop_blocks 3 for criterion 'simpler', which needs no budget"):
        build_criterion("simpler", drop_blocks=3)


def test_a_second_criterion_of_the_same_name_is_refused():
    class Impostor(Simpler):
        name: ClassVar[str] = "simpler"

    with pytest.raises(ConfigurationError, match="two criteria named 'simpler'"):
        register(Impostor)
    assert isinstance(build_criterion("simpler"), Criterion)


# --- criteria with a budget, and the knee

BUDGETED = ["block_influence", "angular", "cka_intervals"]


def ranges_dropped(kept: tuple[int, ...], blocks: int) -> list[tuple[int, int]]:
    """Runs of dropped blocks as (state before, state after), found by walking along the blocks."""
    runs, start = [], None
    for block in range(blocks + 1):
        gone = block < blocks and block not in kept
        if gone and start is None:
            start = block
        if not gone and start is not None:
            runs.append((start, block))
            start = None
    return runs


def all_kept(blocks: int, drop: int):
    return itertools.combinations(range(blocks), blocks - drop)


def cost_by_walking(name: str, found: Statistics, kept: tuple[int, ...], blocks: int) -> float:
    gone = [block for block in range(blocks) if block not in kept]
    if name == "block_influence":
        return sum(1 - float(found.cosine[block, block + 1]) for block in gone)
    matrix = found.angle if name == "angular" else 1 - found.hsic
    return sum(float(matrix[start, end]) for start, end in ranges_dropped(kept, blocks))


@settings(max_examples=60, deadline=None)
@given(blocks=st.integers(2, 8), seed=st.integers(0, 9999), data=st.data())
@pytest.mark.parametrize(
    ("name", "most"), [("block_influence", 99), ("angular", 1), ("cka_intervals", 1), ("cka_intervals", 2)]
)
def test_drops_what_costs_least_of_all_that_may_be_dropped(name, most, blocks, seed, data):
    drop = data.draw(st.integers(1, blocks - 1))
    criterion = CkaIntervals(drop, ranges=most) if name == "cka_intervals" else build_criterion(name, drop)
    found = random_statistics(blocks, seed)
    choice = criterion.choose(found, blocks, Bounds())
    may = [kept for kept in all_kept(blocks, drop) if len(ranges_dropped(kept, blocks)) <= most]
    costs = {kept: cost_by_walking(name, found, kept, blocks) for kept in may}
    assert choice.kept_blocks == min(costs, key=costs.__getitem__)
    assert choice.scores[blocks - drop] == pytest.approx(-min(costs.values()))
    assert set(choice.scores) == set(range(1, blocks))


def test_intervals_equal_exhaustive_search_for_twelve_blocks():
    for seed, drop in itertools.product(range(3), range(1, 12)):
        found = random_statistics(12, seed)
        may = [kept for kept in all_kept(12, drop) if len(ranges_dropped(kept, 12)) <= 2]
        best = min(may, key=lambda kept: cost_by_walking("cka_intervals", found, kept, 12))
        assert CkaIntervals(drop).choose(found, 12, Bounds()).kept_blocks == best


FLOAT32_ERROR = 2.5e-7
"""Most that float32 features and their sums were seen to change S by."""


@settings(max_examples=200, deadline=None)
@given(blocks=st.integers(5, 9), seed=st.integers(0, 9999), values=st.integers(2, 5), data=st.data())
@pytest.mark.parametrize("name", [*BUDGETED, "simpler"])
def test_near_ties_are_decided_as_in_exact_arithmetic(name, blocks, seed, values, data):
    """Few values, so that costs are often equal; then what float32 adds to them."""
    steps = random_statistics(blocks, seed)
    exact = [(getattr(steps, key) * values).round() / values for key in ("hsic", "cosine", "angle")]
    exact[0].fill_diagonal_(1.0)
    noise = FLOAT32_ERROR * (2 * torch.rand(3, *exact[0].shape, generator=torch.Generator().manual_seed(seed)).double() - 1)
    noise = (noise + noise.mT) / 2
    noise.diagonal(dim1=1, dim2=2).zero_()
    criterion = build_criterion(name, data.draw(st.integers(1, blocks - 1)) if name in BUDGETED else None)
    near = Statistics(*(value + error for value, error in zip(exact, noise, strict=True)))
    assert (
        criterion.choose(near, blocks, Bounds()).kept_blocks
        == criterion.choose(Statistics(*exact), blocks, Bounds()).kept_blocks
    )


def test_a_flat_curve_is_a_tie():
    """As a random encoder gave it: scores of 2e-9 are nothing."""
    noise = 1e-8 * torch.rand(13, 13, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    alike = (1 - noise - noise.T).fill_diagonal_(1.0)
    assert len(build_criterion("simpler").choose(Statistics(alike, alike, alike), 12, Bounds()).kept_blocks) == 2


@pytest.mark.parametrize("name", BUDGETED)
def test_of_equal_costs_the_last_blocks_are_dropped(name):
    noise = 1e-14 * torch.rand(9, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alike = torch.ones(9, 9, dtype=torch.float64) - noise
    found = Statistics(alike.fill_diagonal_(1.0), alike, noise.fill_diagonal_(0.0))
    for drop in range(1, 8):
        assert build_criterion(name, drop).choose(found, 8, Bounds()).kept_blocks == tuple(range(8 - drop))


@pytest.mark.parametrize("name", [*BUDGETED, "knee", "simpler"])
def test_a_batch_of_draws_is_judged_one_by_one(name):
    several = [random_statistics(7, seed) for seed in range(5)]
    batch = Statistics(*(torch.stack([getattr(one, key) for one in several]) for key in ("hsic", "cosine", "angle")))
    criterion = build_criterion(name, 3 if name in BUDGETED else None)
    depths = [2, 3, 5]
    for number, one in enumerate(several):
        torch.testing.assert_close(criterion.score(batch, depths)[number], criterion.score(one, depths))
        assert torch.equal(criterion.kept(batch, depths)[number], criterion.kept(one, depths))
    assert criterion.kept(batch, depths).sum(dim=-1).tolist() == [depths] * 5


@settings(max_examples=60, deadline=None)
@given(blocks=st.integers(2, 9), seed=st.integers(0, 9999))
def test_knee_matches_the_definition(blocks, seed):
    s = random_statistics(blocks, seed).similarity
    r = [sum(float(s[k, j]) for j in range(k + 1, blocks)) / (blocks - k - 1) for k in range(blocks - 1)] + [1.0]
    expected = [(r[k] - r[0]) / (1 - r[0]) - (k + 1) / blocks for k in range(blocks)]
    assert knee_curve(s).tolist() == pytest.approx(expected, rel=1e-9, abs=1e-9)


def test_knee_of_blocks_that_are_all_alike_keeps_one():
    found = Statistics(*(torch.ones(9, 9, dtype=torch.float64),) * 3)
    assert Knee().choose(found, 8, Bounds()).kept_blocks == (0,)


@pytest.mark.parametrize(
    ("gone", "kept_by"),
    [
        (range(8, 12), {"block_influence", "angular", "cka_intervals"}),
        (range(4, 8), {"block_influence", "angular", "cka_intervals"}),
        ([2, 3, 7, 8], {"block_influence", "cka_intervals"}),
        ([1, 4, 7, 10], {"block_influence"}),
    ],
    ids=["end", "middle", "two ranges", "scattered"],
)
def test_idle_blocks_are_the_ones_that_go(build, gone, kept_by):
    found = measure_once(idle(build, gone), BlockInfluence(4))
    expected = tuple(block for block in range(12) if block not in gone)
    chosen = {
        name for name in BUDGETED if build_criterion(name, 4).choose(found.statistics, 12, Bounds()).kept_blocks == expected
    }
    assert chosen == kept_by
    assert found.votes is None or found.votes == {8: 1.0}


def measure_once(backbone, criterion, count=96, **options):
    options = {"min_tiles": 9999, **options}
    return measure(
        lambda batch: backbone(batch["image"]), backbone, Tiles(land(count)), ExtractionConfig(criterion, **options)
    )


def test_knee_of_an_encoder_that_settles(build):
    found = measure_once(idle(build, range(5, 12)), Knee())
    assert Knee().choose(found.statistics, 12, Bounds()).kept_blocks == tuple(range(5))


def test_stream_stops_early_once_the_same_blocks_always_win(build):
    found = measure_once(idle(build, [3, 9]), BlockInfluence(2), count=400, min_tiles=128)
    assert (found.converged, found.tiles_seen, found.votes) == (True, 128, {10: 1.0})


def test_votes_of_a_budget_count_the_same_blocks():
    groups = []
    for seed in (0, 1, 2, 3):
        one = random_statistics(6, seed)
        groups.append((one.hsic, one.cosine, one.angle))
    sums = GroupSums(*map(torch.stack, zip(*groups, strict=True)), torch.ones(4, dtype=torch.int64))
    votes = bootstrap(BlockInfluence(2), sums, Bounds(), seed=0)
    assert set(votes) == {4}
    assert 0.3 < votes[4] < 1.0
    kept = BlockInfluence(2).choose(sums.total(), 6, Bounds()).kept_blocks
    drawn = sums.resampled(1000, seed=0)
    again = [
        BlockInfluence(2).choose(Statistics(h, c, a), 6, Bounds()).kept_blocks
        for h, c, a in zip(drawn.hsic, drawn.cosine, drawn.angle, strict=True)
    ]
    assert votes[4] == again.count(kept) / 1000


@pytest.mark.parametrize("name", BUDGETED)
def test_a_missing_budget_is_asked_for(name):
    with pytest.raises(ConfigurationError, match=f"Found criterion '{name}' without drop_blocks, expected how many blocks"):
        build_criterion(name)


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize("drop", [0, -1, True, 2.0])
def test_a_budget_that_is_none_is_refused(name, drop):
    with pytest.raises(
        ConfigurationError, match=f"Found drop_blocks {drop!r} for criterion '{name}', expected a number from 1"
    ):
        build_criterion(name, drop)


@pytest.mark.parametrize("name", BUDGETED)
@pytest.mark.parametrize("drop", [6, 7])
def test_a_budget_that_leaves_no_block_is_refused(name, drop):
    with pytest.raises(DepthError, match=f"Found drop_blocks {drop} for an encoder of 6 blocks, expected 1 to 5"):
        build_criterion(name, drop).choose(random_statistics(6, 0), 6, Bounds())


def test_a_budget_outside_the_bounds_is_refused():
    with pytest.raises(DepthError, match="Found drop_blocks 4 of 6 blocks, expected 3 to 5 blocks to be kept"):
        Angular(4).choose(random_statistics(6, 0), 6, Bounds(min_depth=3))


@pytest.mark.parametrize("ranges", [0, 3, True, "2"])
def test_other_numbers_of_ranges_are_refused(ranges):
    with pytest.raises(ConfigurationError, match=f"Found ranges {ranges!r} for criterion 'cka_intervals', expected 1 or 2"):
        CkaIntervals(2, ranges)


def test_a_custom_criterion_is_a_small_class():
    """As in the documentation; not registered here, which would last."""

    class HalfThere(Criterion):
        name: ClassVar[str] = "half_there"

        def depths(self, num_blocks):
            return range(1, num_blocks + 1)

        def score(self, found, depths):
            return -(found.similarity[..., -1][..., [depth - 1 for depth in depths]] - 0.5).abs()

    s = torch.eye(5, dtype=torch.float64)
    s[:, -1] = s[-1] = torch.tensor([0.1, 0.2, 0.45, 0.9, 1.0])
    hsic = torch.nn.functional.pad(s, (1, 0, 1, 0))
    assert HalfThere().choose(Statistics(hsic, hsic, hsic), 5, Bounds()).kept_blocks == (0, 1, 2)


def test_the_names_are_those_of_the_documentation():
    assert {"simpler", "knee", "block_influence", "angular", "cka_intervals", "fixed"} <= known_criteria().keys()
