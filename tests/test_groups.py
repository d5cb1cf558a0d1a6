"""Which tiles make up a group: the same whoever reads them, and however fast."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from terratorch_simpler.data import Shard
from terratorch_simpler.extraction.groups import END, GroupPlanner, TileRef, half_group_sizes


def sizes_alone(tiles, max_tiles=10**6):
    groups = GroupPlanner(max_tiles)
    found = []
    for position in range(tiles):
        groups.add([TileRef(position, 0, 3)], position + 1)
        found += groups.complete()
    groups.add([], END)
    found += groups.complete()
    assert [tile.position for group in found for tile in group.tiles] == list(range(min(tiles, max_tiles)))
    return [len(group.tiles) for group in found]


@pytest.mark.parametrize(
    ("tiles", "expected"),
    [
        (0, []),
        (31, [31]),
        (64, [64]),
        (95, [95]),  # 31 left over join
        (96, [64, 32]),
        (136, [64, 72]),
        (512, [64] * 8),
    ],
)
def test_groups_of_tiles(tiles, expected):
    assert sizes_alone(tiles) == expected


@pytest.mark.parametrize(("tiles", "expected"), [(20, [20]), (63, [63]), (64, [32, 32]), (80, [32, 48]), (95, [32, 63])])
def test_small_groups_of_a_group(tiles, expected):
    assert half_group_sizes(tiles) == expected


def test_a_group_waits_for_half_of_the_next():
    groups = GroupPlanner(1000)
    groups.add([TileRef(position, 0, 1) for position in range(95)], 95)
    assert not list(groups.complete())
    groups.add([TileRef(95, 0, 1)], 96)
    (group,) = groups.complete()
    assert (group.number, len(group.tiles), group.end) == (0, 64, 64)


def test_a_tile_waits_until_every_process_has_passed_it():
    groups = GroupPlanner(1000)
    groups.add([TileRef(position, 1, 1) for position in range(64, 192)], position=5)
    assert (groups.num_tiles, list(groups.complete())) == (0, [])
    groups.add([TileRef(position, 0, 1) for position in range(5, 64)], position=192)
    assert groups.num_tiles == 187
    first, *_ = groups.complete()
    assert [tile.position for tile in first.tiles] == list(range(5, 69))
    assert first.rank == 0  # holds 59 of the 64


@given(
    total=st.integers(0, 700),
    processes=st.integers(1, 5),
    max_tiles=st.integers(32, 800),
    unusable=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_groups_do_not_depend_on_processes_or_their_pace(total, processes, max_tiles, unusable, seed):
    chance = random.Random(seed)
    usable = {position for position in range(total) if chance.random() >= unusable}
    alone = GroupPlanner(max_tiles)
    alone.add([TileRef(position, 0, 1) for position in sorted(usable)], END)
    expected = [([tile.position for tile in group.tiles], group.end) for group in alone.complete()]

    shares = [Shard(processes, rank, 64).positions(total).tolist() for rank in range(processes)]
    assert sorted(position for share in shares for position in share) == list(range(total))
    groups, found = GroupPlanner(max_tiles), []
    while not groups.done:
        new, reached = [], []
        for rank, share in enumerate(shares):
            for _ in range(chance.randint(0, 150)):
                if share and (position := share.pop(0)) in usable:
                    new.append(TileRef(position, rank, 1))
            reached.append(share[0] if share else END)
        groups.add(new, min(reached))
        found += groups.complete()
    assert [([tile.position for tile in group.tiles], group.end) for group in found] == expected
    assert groups.num_tiles == alone.num_tiles
    assert [group.number for group in found] == list(range(len(found)))
    for group in found:
        held = [tile.rank for tile in group.tiles]
        assert held.count(group.rank) == max(held.count(rank) for rank in range(processes))


def test_neighbours_go_to_the_same_share():
    assert Shard(2, 1, 64).positions(200).tolist() == [*range(64, 128), *range(192, 200)]
    assert Shard(3, 0, 2, start=1).positions(9).tolist() == [1, 6, 7]


@given(total=st.integers(0, 300), shards=st.integers(1, 6), block=st.integers(1, 70), start=st.integers(0, 320))
def test_shares_are_disjoint_and_keep_their_blocks_wherever_they_start(total, shards, block, start):
    shares = [Shard(shards, index, block, start).positions(total).tolist() for index in range(shards)]
    assert sorted(position for share in shares for position in share) == list(range(min(start, total), total))
    for index, share in enumerate(shares):
        assert share == [position for position in Shard(shards, index, block).positions(total) if position >= start]
