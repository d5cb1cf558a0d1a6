"""What plan.json says of what was not chosen."""

import copy
import types

import pytest
import torch

from terratorch_simpler.alternatives import _depths, compare_alternatives
from terratorch_simpler.criteria import Angular, Bounds, Fixed, Simpler
from terratorch_simpler.extraction import ExtractionConfig, count_macs, macs_by_block, measure
from tests.families import FAMILIES, wrapped
from tests.in_memory_tiles import Tiles, land


def look(backbone, criterion, spans=(), bounds=Bounds(), count=80):  # noqa: B008
    found = measure(
        lambda batch: backbone(batch["image"]),
        backbone,
        Tiles(land(count)),
        ExtractionConfig(criterion, bounds, spans=spans),
    )
    blocks = backbone.full_num_blocks
    choice = criterion.choose(found.statistics, blocks, bounds)
    return found, choice, compare_alternatives(backbone, criterion, bounds, choice, found, "linear" if spans else "none")


def test_every_criterion_chooses_from_the_same_statistics(build):
    found, choice, seen = look(build(), Simpler())
    assert seen["criteria"].keys() == {"simpler", "knee", "block_influence", "angular", "cka_intervals"}
    assert seen["criteria"]["simpler"] == {"kept_blocks": list(choice.kept_blocks), "scores": dict(choice.scores)}
    depth = len(choice.kept_blocks)
    other = Angular(12 - depth).choose(found.statistics, 12, Bounds())
    assert seen["criteria"]["angular"] == {"kept_blocks": list(other.kept_blocks), "scores": dict(other.scores)}
    assert set(seen["depths"]) == set(range(1, 13))
    assert [cost["similarity"] for cost in seen["depths"].values()] == found.similarity[:, -1].tolist()
    assert all(cost["recovery_r2"] is None for cost in seen["depths"].values())
    assert "repaired" not in seen


def test_criteria_that_cannot_choose_are_left_out(build):
    _, _, seen = look(build(embed_dim=48, num_heads=3, depth=4), Fixed(4))
    assert seen["criteria"].keys() == {"fixed", "knee"}  # too shallow for simpler, and nothing to drop
    _, _, seen = look(build(embed_dim=48, num_heads=3, depth=4), Fixed(3))
    assert seen["criteria"].keys() == {"fixed", "knee", "block_influence", "angular", "cka_intervals"}


def test_what_a_map_explains_is_told_for_every_depth(build):
    criterion = Simpler()
    backbone = build(embed_dim=48, num_heads=3)
    found, _, seen = look(backbone, criterion, criterion.spans(12, Bounds()))
    told = {number: cost["recovery_r2"] for number, cost in seen["depths"].items()}
    assert {number for number, value in told.items() if value is not None} == set(range(2, 11))
    assert told[10] == found.recovery.patch.explained((10, 12)) > told[2]


def measured(backbone, shape):
    """All that costs are told from."""
    similarity = torch.eye(backbone.full_num_blocks)
    return types.SimpleNamespace(similarity=similarity, input_shape=shape, recovery=None)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.key)
def test_costs_of_a_depth_are_those_of_the_cut_encoder(family):
    backbone = wrapped(family)
    shape = family.shape
    total, by_block = macs_by_block(backbone, shape)
    assert total == count_macs(backbone, shape)
    assert len(by_block) == backbone.num_blocks
    depth = max(backbone.num_blocks // 2, backbone.fewest_blocks)
    told = _depths(backbone, measured(backbone, shape))[depth]
    cut = copy.deepcopy(backbone)
    cut.prune_depth(range(depth))
    assert (cut.num_parameters(), count_macs(cut, shape)) == (told["parameters"], told["macs"])
