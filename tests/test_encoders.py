"""Every family of encoders over the same cases: intact, cut, copied, saved, trained, in other precisions."""

import copy
import random

import pytest
import torch

from terratorch_simpler.measure import check_input
from tests.families import FAMILIES, plain, wrapped

CUTS = ["first", "half", "all but one"]
over_families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.key)


def run(encoder, inputs):
    random.seed(0)  # TerraMind's Thinking-in-Modalities draws tokens
    torch.manual_seed(0)
    with torch.no_grad():
        return list(encoder(inputs))


def equal(found, expected):
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def raw_outputs(backbone, inputs):
    seen = []
    handles = backbone.watch(seen.append)
    features = run(backbone, inputs)
    for handle in handles:
        handle.remove()
    return features, seen


def number(cut, family, total):
    return {"first": family.fewest, "half": max(total // 2, family.fewest), "all but one": total - 1}[cut]


@over_families
def test_intact_features_are_those_of_terratorch_bit_for_bit(family):
    theirs, ours = plain(family), wrapped(family)
    image = family.image()
    features = run(ours, image)
    assert equal(features, run(theirs, image))
    if family.key != "prithvi vit_adapter":
        assert list(ours.out_channels) == list(theirs.out_channels)
    check_input(ours, image)


@over_families
@pytest.mark.parametrize("cut", CUTS)
def test_cut_encoder(family, cut):
    intact, ours = wrapped(family), wrapped(family)
    image, total = family.image(), intact.full_num_blocks
    k = number(cut, family, total)
    ours.keep_blocks(range(k))
    features = run(ours, image)

    # as long as before
    full, raw = raw_outputs(intact, image)
    assert len(features) == len(full) == len(ours.out_channels)
    assert ours.num_blocks == len(ours.blocks) == k

    # what the depth-k encoder of TerraTorch says, where there is one
    if family.depth is not None:
        theirs = plain(family, seed=7, **family.depth(k))
        theirs.load_state_dict(ours.encoder.state_dict(), strict=True)
        expected = run(theirs, image)
        if family.key == "prithvi vit_adapter":
            assert equal(features, expected)
        else:
            assert equal(features, [expected[position] for position in ours.feature_positions])

    # the features of the intact encoder, the last one normed
    if family.key != "prithvi vit_adapter":
        for feature, position in zip(features, ours.feature_positions, strict=True):
            if family.norm is None or position < k - 1:
                assert torch.equal(feature, full[position])
            else:
                normed = family.norm(intact.encoder)(raw[position])
                normed = torch.cat([normed[:, :1], normed[:, -feature.shape[1] + 1 :]], 1) if "vpt" in family.key else normed
                assert torch.allclose(feature, normed[:, : feature.shape[1]], atol=1e-6)

    # a copy runs its own weights
    twin = copy.deepcopy(ours)
    assert equal(run(twin, image), features)
    with torch.no_grad():
        for parameter in twin.blocks.parameters():
            parameter.add_(0.1)
    assert equal(run(ours, image), features)
    assert not equal(run(twin, image), features)

    # a checkpoint brings its shape
    loaded = wrapped(family, seed=5)
    loaded.load_state_dict(ours.state_dict(), strict=True)
    assert loaded.kept == ours.kept
    assert equal(run(loaded, image), features)

    # as does moving between precisions
    assert equal(run(ours.double().float(), image), features)


def without_gradient(backbone, image):
    random.seed(0)
    backbone.train()
    for parameter in backbone.parameters():
        parameter.grad = None
    sum(feature.float().square().mean() for feature in backbone(image)).backward()
    return {name for name, parameter in backbone.named_parameters() if parameter.requires_grad and parameter.grad is None}


@over_families
@pytest.mark.parametrize("cut", CUTS)
def test_gradients_reach_exactly_the_kept_parameters(family, cut):
    ours, image = wrapped(family), family.image()
    blocks = [set(map(id, block.parameters())) for block in ours.blocks]
    # Heads and norms that TerraTorch keeps and never uses, scales of time and place that were not given.
    spare = without_gradient(ours, image)
    k = number(cut, family, ours.full_num_blocks)
    ours.keep_blocks(range(k))
    held = {id(parameter) for parameter in ours.parameters()}
    assert all(ids <= held for ids in blocks[:k])
    assert not any(ids & held for ids in blocks[k:])
    assert without_gradient(ours, image) == spare
    assert not spare & {name for name, parameter in ours.named_parameters() if id(parameter) in set().union(*blocks)}


@over_families
def test_kept_blocks_with_gaps(family):
    intact, ours = wrapped(family), wrapped(family)
    kept = (0, 2, 3, intact.full_num_blocks - 1)
    ours.keep_blocks(kept)
    for block, position in zip(kept, range(4), strict=True):
        ids = zip(ours.blocks[position].parameters(), intact.blocks[block].parameters(), strict=True)
        assert all(torch.equal(a, b) for a, b in ids)
    loaded = wrapped(family, seed=3, keep=2 if family.fewest == 1 else 5)
    loaded.load_state_dict(ours.state_dict(), strict=True)
    assert loaded.kept == kept
    assert equal(run(loaded, family.image()), run(ours, family.image()))


@over_families
def test_tokens_of_every_block_are_seen_raw_and_laid_out(family):
    backbone, image = wrapped(family), family.image()
    _, raw = raw_outputs(backbone, image)
    assert len(raw) == backbone.full_num_blocks
    layout = backbone.layout(image, raw[0].shape[1])
    assert sum(part if isinstance(part, int) else part.tokens for part in layout) == raw[0].shape[1]
    assert all(output.shape == raw[0].shape for output in raw)


def test_pickled_encoders_run_their_own_weights():
    import pickle

    for family in FAMILIES:
        if family.key in ("prithvi", "timm", "terramind", "dofa"):
            ours = wrapped(family, keep=4)
            assert equal(run(pickle.loads(pickle.dumps(ours)), family.image()), run(ours, family.image()))
