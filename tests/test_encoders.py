"""Every family of encoders over the same cases: intact, cut, copied, saved, trained, in other precisions."""

import copy
import random
from pathlib import Path

import pytest
import torch
from terratorch.registry import BACKBONE_REGISTRY
from terratorch.tasks import SemanticSegmentationTask

from terratorch_simpler import SimplerCallback, SlimmingPlan
from terratorch_simpler.criteria import Simpler
from terratorch_simpler.encoders import PatchGrid
from terratorch_simpler.errors import DepthError, TilesError, UnsupportedEncoderError
from terratorch_simpler.extraction import ExtractionConfig, check_input, count_macs, measure
from terratorch_simpler.models.backbone import SimplerBackbone
from tests.families import END, FAMILIES, START, plain, table, wrapped
from tests.in_memory_tiles import Tiles

pytestmark = [
    pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.FewTilesWarning"),
    pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.UntrainedEncoderWarning"),
]
CUTS = ["first", "half", "all but one"]
over_families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.key)


def run(encoder, inputs):
    random.seed(0)  # TerraMind's Thinking-in-Modalities draws tokens
    torch.manual_seed(0)
    with torch.no_grad():
        return list(encoder(inputs))


def equal(found, expected):
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def backbone_of(task):
    return next(part for part in task.modules() if isinstance(part, SimplerBackbone))


def raw_outputs(backbone, inputs):
    seen = []
    handles = backbone.register_block_hooks(seen.append)
    features = run(backbone, inputs)
    for handle in handles:
        handle.remove()
    return features, seen[1:]


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
    ours.prune_depth(range(k))
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

    # and what was cut grows back
    ours.load_state_dict(intact.state_dict(), strict=True)
    assert equal(run(ours, image), full)


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
    ours.prune_depth(range(k))
    held = {id(parameter) for parameter in ours.parameters()}
    assert all(ids <= held for ids in blocks[:k])
    assert not any(ids & held for ids in blocks[k:])
    assert without_gradient(ours, image) == spare
    assert not spare & {name for name, parameter in ours.named_parameters() if id(parameter) in set().union(*blocks)}


@over_families
def test_kept_blocks_with_gaps(family):
    intact, ours = wrapped(family), wrapped(family)
    kept = (0, 2, 3, intact.full_num_blocks - 1)
    ours.prune_depth(kept)
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


def noise(family, count=32):
    """Tiles of any shape, each with a tint of its own."""
    image = family.image(batch=count)
    for part in image.values() if isinstance(image, dict) else [image]:
        part += torch.linspace(-2, 2, count).view(-1, *[1] * (part.ndim - 1))
    return Tiles(image, batch_size=8)


@over_families
def test_similarity_of_every_family(family):
    backbone = wrapped(family)
    found = measure(
        lambda batch: backbone(batch["image"]), backbone, noise(family), ExtractionConfig(Simpler(), min_tiles=32)
    )
    assert found.similarity.shape == (backbone.full_num_blocks,) * 2
    assert torch.allclose(found.similarity.diagonal(), torch.ones(backbone.full_num_blocks, dtype=torch.float64))
    layout = backbone.layout(family.image(), raw_outputs(backbone, family.image())[1][0].shape[1])
    patches = sum(part.tokens for part in layout if not isinstance(part, int))
    assert found.rows_seen == 32 * min(patches, 16)
    assert count_macs(backbone, found.input_shape) > 0


def test_pickled_encoders_run_their_own_weights():
    import pickle

    for family in FAMILIES:
        if family.key in ("prithvi", "timm", "terramind", "dofa"):
            ours = wrapped(family, keep=4)
            assert equal(run(pickle.loads(pickle.dumps(ours)), family.image()), run(ours, family.image()))


# --- what cannot be cut, or not so far


def test_vit_adapter_needs_a_block_for_each_of_its_ranges():
    family = next(family for family in FAMILIES if family.key == "prithvi vit_adapter")
    ours = wrapped(family)
    with pytest.raises(
        DepthError, match="Found 3 blocks to keep, expected at least 4 for Prithvi with ViT-Adapter: ViT-Ada"
    ):
        ours.prune_depth(range(3))
    assert ours.num_blocks == 24
    with pytest.raises(DepthError, match="Found 3 blocks to keep"):
        wrapped(family, keep=3)
    with pytest.raises(DepthError, match=r"Found backbone_out_indices \[5\] with vit_adapter: true"):
        wrapped(family, out_indices=[5])


@pytest.mark.parametrize(("k", "ranges"), [(4, [[0, 0], [1, 1], [2, 2], [3, 3]]), (5, [[0, 1], [2, 2], [3, 3], [4, 4]])])
def test_vit_adapter_lays_its_ranges_where_indices_are_answered(k, ranges):
    family = next(family for family in FAMILIES if family.key == "prithvi vit_adapter")
    ours = wrapped(family, keep=k)
    assert ours.encoder.interaction_indexes == ranges
    assert ours.feature_positions == tuple(last for _, last in ours.encoder.interaction_indexes)


def test_vit_adapter_ranges_of_unequal_length_keep_a_block_each():
    family = next(family for family in FAMILIES if family.key == "prithvi vit_adapter")
    short = [[0, 0], [1, 1], [2, 2], [3, 23]]
    ours = wrapped(family, interaction_indexes=short)
    for k in (20, 10, 5, 4):
        ours.prune_depth(range(k))
        assert (
            ours.encoder.interaction_indexes
            == wrapped(family, keep=k, interaction_indexes=short).encoder.interaction_indexes
        )
        flat = [block for first, last in ours.encoder.interaction_indexes for block in range(first, last + 1)]
        assert flat == list(range(k))
        run(ours, family.image())


def test_selection_with_vit_adapter_keeps_at_least_four(trainer, tmp_path, datamodule):
    family = next(family for family in FAMILIES if family.key == "prithvi vit_adapter")
    with family.before():
        torch.manual_seed(0)
        task = SemanticSegmentationTask(
            model_factory="EncoderDecoderFactory",
            model_args={
                "backbone": f"simpler_{family.name}", "decoder": "UNetDecoder", "decoder_channels": [16, 8, 8, 4],
                "num_classes": 6, **{f"backbone_{key}": value for key, value in family.kwargs.items()},
            },
            ignore_index=-1,
        )  # fmt: skip
    with torch.no_grad():
        for block in list(backbone_of(task).blocks)[2:]:  # settled after two blocks: that is what the rule would keep
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.zero_()
                layer.bias.zero_()
    trainer(SimplerCallback(output_dir=str(tmp_path)), limit_train_batches=1, limit_val_batches=1).fit(
        task, datamodule=datamodule()
    )
    assert len(SlimmingPlan.load(tmp_path / "plan.json").kept_blocks) == 4


BY_PATH = next(family for family in FAMILIES if family.key == "by path")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "vit_model.layers",
            "Found nothing at backbone_block_path 'vit_model.layers' of ViTEncoderWrapper, expected its list",
        ),
        ("vit_model.norm", "Found a LayerNorm at backbone_block_path 'vit_model.norm' .*name one such as vit_model.blocks"),
        ("vit_model.blocks.0", "Found a Block at backbone_block_path"),
    ],
)
def test_block_path_that_leads_nowhere_is_refused(path, message):
    with pytest.raises(UnsupportedEncoderError, match=message):
        wrapped(BY_PATH, block_path=path)


class Strange(torch.nn.Module):
    def __init__(self, blocks, out_channels):
        super().__init__()
        self.blocks = torch.nn.ModuleList(blocks)
        if out_channels:
            self.out_channels = out_channels

    def forward(self, x):
        features = []
        for block in self.blocks:
            x = block(x)
            features.append(x)
        return features[: len(self.out_channels)] if len(self.out_channels) > 1 else x


def linears(*widths):
    return [torch.nn.Linear(4, width) for width in widths]


@pytest.mark.parametrize(
    ("blocks", "channels", "message"),
    [
        (linears(4, 4, 5), [4] * 3, "Found block 2 of other weights than block 0 at backbone_block_path 'blocks'"),
        (linears(4), [4], "Found 1 block at backbone_block_path 'blocks', expected at least two equal blocks"),
        (linears(4, 4, 4), [4, 4], r"Found 2 features \(out_channels\) of Strange with 3 blocks"),
        (linears(4, 4, 4), None, "There is no out_channels in Strange"),
    ],
)
def test_blocks_that_cannot_be_cut_are_refused(blocks, channels, message):
    with pytest.raises(UnsupportedEncoderError, match=message):
        SimplerBackbone(Strange(blocks, channels), block_path="blocks")


def test_encoder_by_path_that_returns_its_last_feature_only():
    ours = SimplerBackbone(Strange(linears(4, 4, 4, 4), [4]), block_path="blocks")
    x = torch.randn(2, 9, 4)
    expected = ours.encoder.blocks[1](ours.encoder.blocks[0](x))
    ours.prune_depth(range(2))
    assert equal(ours(x), [expected])
    assert ours.out_channels == [4]


def test_encoder_by_path_that_does_not_follow_the_cut_is_an_error_not_a_wrong_answer():
    class Fixed(Strange):
        def forward(self, x):
            return [x] * 4

    ours = SimplerBackbone(Fixed(linears(4, 4, 4, 4), [4] * 4), block_path="blocks", keep=2)
    with pytest.raises(UnsupportedEncoderError, match="Found 4 features of Fixed with 2 blocks, expected one for each"):
        ours(torch.randn(2, 9, 4))


def test_encoder_by_path_is_measured_on_its_patches():
    ours = wrapped(BY_PATH)
    layout = ours.layout(BY_PATH.image(), 17)
    assert layout == [1, PatchGrid((1, 64, 64), (1, 16, 16))]
    with pytest.raises(TilesError, match=r"Found 9 tokens at 'vit_model\.blocks', expected at least the 16 patches"):
        ours.layout(BY_PATH.image(), 9)


@pytest.mark.parametrize("name", ["timm_samvit_base_patch16", "timm_cait_xxs24_224", "timm_mixer_s32_224"])
def test_other_models_of_timm_are_refused_with_what_can_be_done(name):
    with pytest.raises(
        UnsupportedEncoderError, match="Found an encoder of class TimmBackboneWrapper, expected one of the fam"
    ):
        BACKBONE_REGISTRY.build(f"simpler_{name}", pretrained=False)


@pytest.mark.parametrize("asked", [None, [2, 5, 8, 11], [11, 2, 2], [-1], 2])
def test_out_indices_of_timm_are_those_of_timm(asked):
    family = next(family for family in FAMILIES if family.key == "timm")
    theirs, ours = plain(family, out_indices=asked), wrapped(family, out_indices=asked)
    if asked is None:
        theirs = BACKBONE_REGISTRY.build(family.name, embed_dim=48, num_heads=3, img_size=64).eval()
        ours = BACKBONE_REGISTRY.build(f"simpler_{family.name}", embed_dim=48, num_heads=3, img_size=64).eval()
        ours.load_state_dict({**ours.state_dict(), **{f"encoder.{k}": v for k, v in theirs.state_dict().items()}})
        assert len(ours.out_channels) == 3
    found, expected = run(ours, family.image()), run(theirs, family.image())
    assert all(any(torch.equal(a, b) for b in expected) for a in found)
    assert len(found) == len(set(map(id, expected))) or asked == [11, 2, 2]


def test_weights_of_dinov3_come_from_a_path(tmp_path):
    (tmp_path / "weights.pth").touch()
    family = next(family for family in FAMILIES if family.key == "dinov3")
    with family.before():
        assert BACKBONE_REGISTRY.build("simpler_dinov3_vits16", ckpt_path=str(tmp_path / "weights.pth")).pretrained is None
        assert BACKBONE_REGISTRY.build("simpler_dinov3_vits16", ckpt_path=None).pretrained is False


def test_dofa_returns_the_last_feature_by_default():
    family = next(family for family in FAMILIES if family.key == "dofa")
    ours, theirs = wrapped(family, out_indices=None), plain(family, out_indices=None)
    assert equal(run(ours, family.image()), run(theirs, family.image()))
    assert ours.out_channels == theirs.out_channels == [384]
    ours.prune_depth(range(3))
    assert len(run(ours, family.image())) == 1


@pytest.mark.parametrize("merge_method", ["mean", "max", "concat", "dict"])
def test_merged_modalities_of_a_cut_terramind(merge_method):
    family = next(family for family in FAMILIES if family.key == "terramind modalities")
    unmerged, merged = (wrapped(family, merge_method=how, keep=5) for how in (None, merge_method))
    merged.load_state_dict({**merged.state_dict(), **unmerged.state_dict()})
    image = family.image()
    names = list(image)
    found, tokens = run(merged, image), run(unmerged, image)
    assert list(image) == names  # the caller's dictionary is as it was
    for feature, both in zip(found, tokens, strict=True):
        optical, radar = both.chunk(2, dim=1)
        expected = {
            "mean": lambda a, b: torch.stack([a, b]).mean(0),
            "max": torch.maximum,
            "concat": lambda a, b: torch.cat([a, b], dim=-1),
            "dict": lambda a, b: {"S2L2A": a, "S1RTC": b},
        }[merge_method](optical, radar)
        if merge_method == "dict":
            assert feature.keys() == expected.keys()
            assert all(torch.equal(feature[name], expected[name]) for name in expected)
        else:
            torch.testing.assert_close(feature, expected, rtol=0, atol=1e-6)


def test_terramind_leaves_unknown_modalities_in_the_callers_dictionary():
    family = next(family for family in FAMILIES if family.key == "terramind modalities")
    image = {**family.image(), "clouds": torch.zeros(2)}
    with pytest.warns(UserWarning, match="Unknown input modality: clouds"):
        run(wrapped(family), image)
    assert "clouds" in image


def test_table_of_the_docs_is_the_one_that_was_tested():
    page = (Path(__file__).parents[1] / "docs" / "encoders.md").read_text()
    assert page.split(START)[1].split(END)[0].strip() == table(), "run python -m tests.families"
