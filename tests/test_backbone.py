"""SimplerBackbone over the Prithvi family: features, cutting, copies, and checkpoints that carry their shape."""

import copy
import gc
import inspect
import pickle
import re
import weakref
from dataclasses import replace

import pytest
import timm
import torch
from terratorch.models import EncoderDecoderFactory
from terratorch.models.decoders import UperNetDecoder
from terratorch.registry import BACKBONE_REGISTRY

from terratorch_simpler import prune
from terratorch_simpler.errors import CheckpointError, DepthError, PlanError, UnsupportedEncoderError
from terratorch_simpler.indices import feature_position
from terratorch_simpler.models.backbone import SimplerBackbone
from terratorch_simpler.plan import SlimmingPlan

# The real architectures, narrowed where the real one would only cost time: name, arguments, input shape.
SMALL = {"embed_dim": 48, "num_heads": 3}
CASES = [
    ("prithvi_eo_tiny", {}, (6, 64, 64)),
    ("prithvi_eo_v1_100", {**SMALL, "num_frames": 3}, (6, 3, 64, 64)),
    ("prithvi_eo_v2_tiny_tl", {}, (6, 64, 64)),
    ("prithvi_eo_v2_100_tl", {**SMALL, "num_frames": 4}, (6, 4, 64, 64)),
    ("prithvi_eo_v2_300", SMALL, (6, 64, 64)),
    ("prithvi_eo_v2_300_tl", {**SMALL, "bands": ["RED", "GREEN"]}, (2, 64, 64)),
    ("prithvi_eo_v2_600", {"embed_dim": 48, "num_heads": 4}, (6, 56, 56)),
    ("prithvi_eo_v2_600_tl", {"embed_dim": 48, "num_heads": 4, "num_frames": 2}, (6, 2, 56, 56)),
    ("prithvi_eo_v2_tiny_tl", {"vpt": True, "vpt_n_tokens": 5}, (6, 64, 64)),
]
family = pytest.mark.parametrize(("name", "kwargs", "shape"), CASES)


def image(shape, batch=2, seed=1):
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


def plan_for(backbone, kept):
    return SlimmingPlan(backbone.name, backbone.full_num_blocks, tuple(kept), {"name": "fixed", "args": {}})


@family
def test_intact_features_are_those_of_terratorch_bit_for_bit(build, name, kwargs, shape):
    plain, wrapped = build(name, **kwargs), build(f"simpler_{name}", **kwargs)
    x = image(shape)
    expected, found = plain(x), wrapped(x)
    assert len(found) == len(expected) == wrapped.num_blocks == len(wrapped.out_channels)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(wrapped.encoder(x), expected, strict=True))
    assert wrapped.out_channels == plain.out_channels


@family
@pytest.mark.parametrize("depth", ["first", "half", "all but one"])
def test_cut_features_are_those_of_terratorch_built_with_that_depth(build, name, kwargs, shape, depth):
    wrapped = build(f"simpler_{name}", **kwargs)
    total = wrapped.full_num_blocks
    kept = {"first": 1, "half": total // 2, "all but one": total - 1}[depth]
    plain = build(name, seed=7, depth=kept, **kwargs)
    wrapped.prune_depth(range(kept))
    plain.load_state_dict(wrapped.encoder.state_dict(), strict=True)
    x = image(shape)
    expected, found = plain(x), wrapped(x)
    assert len(found) == total
    for i, feature in enumerate(found):
        assert torch.equal(feature, expected[feature_position(i, kept, total)])
    assert wrapped.num_blocks == kept == len(wrapped.encoder.out_indices) == len(wrapped.encoder.out_channels)
    assert len(wrapped.out_channels) == total


@family
def test_gradients_reach_exactly_the_kept_parameters(build, name, kwargs, shape):
    wrapped = build(f"simpler_{name}", **kwargs)
    intact = wrapped.num_parameters()
    wrapped.prune_depth(range(2))
    assert wrapped.num_parameters() < intact
    sum(feature.square().mean() for feature in wrapped(image(shape))).backward()
    without = {n for n, p in wrapped.named_parameters() if p.grad is None}
    # Scales of time and place get gradients only with coordinates.
    assert all("embed_enc" in n for n in without)


def test_golden_parameter_count_of_the_paper(build):
    backbone = build("simpler_prithvi_eo_v2_300")
    block = sum(p.numel() for p in backbone.blocks[0].parameters())
    assert block == 12_596_224
    backbone.prune_depth(range(5))
    assert backbone.num_parameters() == 64_558_080
    assert sum(p.numel() for p in backbone.parameters()) == 64_558_080


def test_gaps_are_kept_and_features_follow(build):
    wrapped = build(keep=[0, 4, 9])
    intact = build()
    assert wrapped.kept == (0, 4, 9)
    for position, block in enumerate((0, 4, 9)):
        for a, b in zip(wrapped.blocks[position].parameters(), intact.blocks[block].parameters(), strict=True):
            assert torch.equal(a, b)
    features = wrapped(image((6, 64, 64)))
    assert features[0] is features[3]
    assert features[11] is features[8]
    assert not torch.equal(features[3], features[4])


def test_out_indices_are_numbered_as_in_the_full_encoder(build):
    indices = [11, 2, 2, -1, 5]
    intact, cut = build(out_indices=indices), build(out_indices=indices, keep=5)
    x = image((6, 64, 64))
    every = build()(x)
    assert all(torch.equal(f, every[i]) for f, i in zip(intact(x), indices, strict=True))
    every_cut = build(keep=5)(x)
    assert all(torch.equal(f, every_cut[i]) for f, i in zip(cut(x), indices, strict=True))
    assert cut.out_channels == [192] * 5


def test_out_index_outside_the_encoder_is_refused(build):
    with pytest.raises(DepthError, match="Found feature index 12, expected -12 to 11"):
        build(out_indices=[3, 12])


def test_coordinates_pass_through(build):
    backbone = build(keep=3)
    x = image((6, 64, 64))
    time, place = torch.tensor([[[2020.0, 100.0]]] * 2), torch.tensor([[47.0, 8.0]] * 2)
    plain = backbone(x)
    assert not torch.equal(backbone(x, temporal_coords=time)[0], plain[0])
    assert not torch.equal(backbone(x, location_coords=place)[0], plain[0])


def test_temporal_wrapper_around_a_cut_backbone(build):
    factory = EncoderDecoderFactory()
    torch.manual_seed(0)
    model = factory.build_model(
        "segmentation",
        "simpler_prithvi_eo_v2_tiny_tl",
        "UNetDecoder",
        num_classes=2,
        backbone_use_temporal=True,
        backbone_temporal_pooling="mean",
        necks=NECKS,
        decoder_channels=[32, 16, 8, 4],
    )
    model.encoder.encoder.prune_depth(range(4))
    assert model.eval()(image((6, 3, 64, 64))).output.shape == (2, 2, 64, 64)


def test_freeze_is_the_encoders_own(build):
    backbone = build(vpt=True, vpt_n_tokens=2)
    backbone.freeze()
    trainable = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert trainable == {f"encoder.vpt_prompt_embeddings.{i}" for i in range(12)}
    backbone.prune_depth(range(3))
    trainable = {name for name, p in backbone.named_parameters() if p.requires_grad}
    assert trainable == {f"encoder.vpt_prompt_embeddings.{i}" for i in range(3)}


def test_prepare_features_is_offered_because_prithvi_has_it(build):
    backbone = build(keep=4)
    maps = backbone.prepare_features_for_image_model(backbone(image((6, 64, 64))))
    assert [m.shape for m in maps] == [(2, 192, 4, 4)] * 12
    assert not hasattr(backbone, "no_such_thing")


def test_cutting_frees_the_dropped_blocks(build):
    backbone = build()
    dropped = [weakref.ref(p) for block in list(backbone.blocks)[3:] for p in block.parameters()]
    backbone.prune_depth(range(3))
    gc.collect()
    assert not any(ref() is not None for ref in dropped)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_run_their_own_weights(build, how):
    backbone = build(keep=4)
    copied = copy.deepcopy(backbone) if how == "deepcopy" else pickle.loads(pickle.dumps(backbone))
    x = image((6, 64, 64))
    assert torch.equal(copied(x)[0], backbone(x)[0])
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.zero_()
    assert not torch.equal(copied(x)[0], backbone(x)[0])
    copied.prune_depth([0])
    assert (copied.num_blocks, backbone.num_blocks) == (1, 4)
    copied.load_state_dict(backbone.state_dict())  # the copy's load hook reshapes the copy
    assert (copied.num_blocks, backbone.num_blocks) == (4, 4)


def test_plan_is_applied_at_build_and_remembered(build, tmp_path):
    plan = plan_for(build(), [0, 1, 2])
    path = plan.save(tmp_path / "plan.json")
    backbone = build(plan=str(path))
    assert backbone.plan == plan
    assert backbone.num_blocks == 3
    assert build().plan is None


def test_plan_for_another_encoder_is_refused(build):
    backbone = build()
    with pytest.raises(PlanError, match="expected 'prithvi_eo_v2_tiny_tl' with 12"):
        backbone.slim(replace(plan_for(backbone, [0, 1]), backbone="prithvi_eo_v2_300_tl"))
    assert backbone.num_blocks == 12


def test_plan_and_keep_together_are_refused(build, tmp_path):
    with pytest.raises(DepthError, match="Found both keep 3 and a plan"):
        build(plan=plan_for(build(), [0, 1]).save(tmp_path / "plan.json"), keep=3)


@pytest.mark.parametrize(
    ("keep", "expected"), [(0, "Found keep 0"), (13, "expected 1 to 12"), ([], "at least one"), ([3, 3], "repeated")]
)
def test_keep_that_does_not_fit_is_refused(build, keep, expected):
    with pytest.raises(DepthError, match=expected):
        build(keep=keep)


@pytest.mark.parametrize(("keep", "kept"), [("3", (0, 1, 2)), ("[0, 5]", (0, 5))])
def test_keep_from_the_command_line_is_text(build, keep, kept):
    assert build(keep=keep).kept == kept


def test_pretrained_from_the_command_line_is_text():
    assert BACKBONE_REGISTRY.build("simpler_prithvi_eo_tiny", pretrained="false").pretrained is False


def test_blocks_that_are_gone_cannot_be_kept(build):
    backbone = build(keep=3)
    with pytest.raises(DepthError, match=r"Found blocks \[5\] to keep, expected some of \[0, 1, 2\]"):
        backbone.prune_depth([0, 5])


@pytest.mark.parametrize(
    "name", ["prithvi_swin_B", "satlas_swin_b_sentinel2_si_rgb", "timm_convnext_tiny", "timm_resnet18", "timm_regnetx_002"]
)
def test_hierarchical_encoders_are_refused_by_name(name):
    with pytest.raises(UnsupportedEncoderError, match=f"Found backbone '{name}'.* depth cannot be pruned"):
        BACKBONE_REGISTRY.build(f"simpler_{name}", pretrained=False)


def test_unknown_family_is_refused():
    with pytest.raises(
        UnsupportedEncoderError, match="Found an encoder of class Linear, expected one of the families Prithvi"
    ):
        SimplerBackbone(torch.nn.Linear(2, 2))


def test_registry_knows_simpler_names_and_leaves_the_others_alone():
    assert "simpler_prithvi_eo_v2_300_tl" in BACKBONE_REGISTRY
    assert "simpler_no_such_backbone" not in BACKBONE_REGISTRY
    assert not isinstance(BACKBONE_REGISTRY.build("prithvi_eo_tiny"), SimplerBackbone)
    with pytest.raises(Exception, match="The model no_such_backbone could not be instantiated"):
        BACKBONE_REGISTRY.build("no_such_backbone")
    with pytest.raises(Exception, match="TerraTorch knows no backbone 'no_such_backbone' for 'simpler_no_such_backbone'"):
        BACKBONE_REGISTRY.build("simpler_no_such_backbone")


NECKS = [
    {"name": "SelectIndices", "indices": [2, 5, 8, 11]},
    {"name": "ReshapeTokensToImage"},
    {"name": "LearnedInterpolateToPyramidal"},
]
# TerraTorch 1.2.12 has taken it away; LearnedInterpolateToPyramidal holds the same layers.
needs_scale_modules = pytest.mark.skipif(
    "scale_modules" not in inspect.signature(UperNetDecoder).parameters,
    reason="UperNetDecoder of the installed TerraTorch has no scale_modules",
)
DECODERS = [
    ("UNetDecoder", {"decoder_channels": [32, 16, 8, 4]}, NECKS),
    ("UperNetDecoder", {"decoder_channels": 32}, NECKS),
    pytest.param(
        *("UperNetDecoder", {"decoder_channels": 32, "decoder_scale_modules": True}, NECKS[:2]), marks=needs_scale_modules
    ),
    ("FCNDecoder", {"decoder_channels": 32}, None),
]


@pytest.mark.parametrize(("decoder", "kwargs", "necks"), DECODERS)
@pytest.mark.parametrize("kept", [2, 5])
def test_cut_model_equals_plain_terratorch_with_mapped_indices(decoder, kwargs, necks, kept):
    def model(backbone, indices, **more):
        torch.manual_seed(0)
        used = necks and [{**neck, "indices": indices} if "indices" in neck else neck for neck in necks]
        return EncoderDecoderFactory().build_model(
            "segmentation", backbone, decoder, num_classes=3, necks=used, **kwargs, **more
        )

    ours = model("simpler_prithvi_eo_v2_tiny_tl", [2, 5, 8, 11])
    downstream = [id(p) for n, p in ours.named_parameters() if not n.startswith("encoder.")]
    ours.encoder.prune_depth(range(kept))
    assert downstream == [id(p) for n, p in ours.named_parameters() if not n.startswith("encoder.")]
    if necks is None:  # without SelectIndices the decoder takes the last feature
        plain = model("prithvi_eo_v2_tiny_tl", None, backbone_depth=kept)
    else:
        plain = model("prithvi_eo_v2_tiny_tl", [feature_position(i, kept, 12) for i in (2, 5, 8, 11)], backbone_depth=kept)
    state = {k.replace("encoder.encoder.", "encoder."): v for k, v in ours.state_dict().items()}
    del state["encoder._extra_state"]
    plain.load_state_dict(state, strict=True)
    x = image((6, 64, 64))
    outputs = [m.train(False)(x).output for m in (ours, plain)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().mean().backward()
    expected = {n: p.grad for n, p in plain.named_parameters()}
    for name, parameter in ours.named_parameters():
        other = expected[name.replace("encoder.encoder.", "encoder.")]
        assert (parameter.grad is None) == (other is None)
        assert other is None or torch.allclose(parameter.grad, other, atol=1e-7)


def upernet(necks, **kwargs):
    torch.manual_seed(0)
    return EncoderDecoderFactory().build_model(
        *("segmentation", "simpler_prithvi_eo_v2_tiny_tl", "UperNetDecoder"),
        num_classes=3, necks=necks, decoder_channels=32, **kwargs,
    )  # fmt: skip


def scale_modules_as_neck(state):
    """What docs/troubleshooting.md says to do with the weights of a UPerNet with scale_modules."""
    return {re.sub(r"^decoder\.(fpn\d)\.", r"neck.2.\1.", key): value for key, value in state.items()}


@needs_scale_modules
def test_weights_of_scale_modules_are_those_of_the_neck():
    old, new = upernet(NECKS[:2], decoder_scale_modules=True).eval(), upernet(NECKS).eval()
    new.load_state_dict(scale_modules_as_neck(old.state_dict()), strict=True)
    x = image((6, 64, 64))
    assert torch.equal(old(x).output, new(x).output)


def test_weights_of_scale_modules_are_refused_by_name_where_there_are_none():
    """A checkpoint of UPerNet with scale_modules, as TerraTorch before 1.2.12 wrote it, and a config with the neck."""
    model = upernet(NECKS)
    state = model.state_dict()
    old = {re.sub(r"^neck\.2\.(fpn\d)\.", r"decoder.\1.", key): value for key, value in state.items()}
    assert old.keys() != state.keys()
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "decoder\.fpn1\.0\.weight"'):
        upernet(NECKS).load_state_dict(old, strict=True)
    upernet(NECKS).load_state_dict(scale_modules_as_neck(old), strict=True)


# --- checkpoints


def random_state(build, keep):
    return build(seed=3, keep=keep).state_dict()


@pytest.mark.parametrize("there", [3, 12, [0, 4, 9], [11]])
@pytest.mark.parametrize("here", [None, 3, 5, [2, 7]])
def test_loading_takes_the_shape_of_the_checkpoint(build, here, there):
    saved = build(seed=3, keep=there)
    backbone = build(seed=4, keep=here)
    backbone.load_state_dict(saved.state_dict(), strict=True)
    assert backbone.kept == saved.kept
    x = image((6, 64, 64))
    assert all(torch.equal(a, b) for a, b in zip(backbone(x), saved(x), strict=True))
    parameters = list(backbone.parameters())
    assert len({p.data_ptr() for p in parameters}) == len(parameters)  # grown blocks share nothing


def test_loading_drops_a_plan_that_no_longer_holds(build, tmp_path):
    backbone = build(plan=plan_for(build(), [0, 1, 2]).save(tmp_path / "plan.json"))
    backbone.load_state_dict(random_state(build, 3))
    assert backbone.plan is not None
    backbone.load_state_dict(random_state(build, 5))
    assert backbone.plan is None


def test_the_callers_state_dict_stays_untouched(build):
    state = random_state(build, 3)
    keys = list(state)
    build().load_state_dict(state)
    assert list(state) == keys


def test_checkpoints_load_with_weights_only(build, tmp_path):
    torch.save(random_state(build, [0, 4]), tmp_path / "weights.pt")
    backbone = build()
    backbone.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert backbone.kept == (0, 4)


def test_checkpoint_of_another_depth_is_refused(build):
    with pytest.raises(
        CheckpointError, match="Found a checkpoint of an encoder with 4 blocks, expected one of 'prithvi_eo_v2"
    ):
        build().load_state_dict(build("simpler_prithvi_eo_tiny").state_dict())


def test_checkpoint_of_another_width_is_refused(build):
    other = build("simpler_prithvi_eo_v2_tiny_tl", embed_dim=96, num_heads=3)
    with pytest.raises(CheckpointError, match=r"of shape \(1, 1, 96\) in the checkpoint, expected \(1, 1, 192\)"):
        build().load_state_dict(other.state_dict())
    assert build().num_blocks == 12


def test_checkpoint_without_simpler_is_refused(build):
    with pytest.raises(CheckpointError, match="holds 'prithvi_eo_v2_tiny_tl' without 'simpler_'"):
        build().load_state_dict(build("prithvi_eo_v2_tiny_tl").state_dict())


def test_learned_rotary_frequencies_follow_their_blocks():
    """Some models of timm learn them for every block."""
    size = {"img_size": 64, "depth": 6, "embed_dim": 96, "num_heads": 3}
    torch.manual_seed(0)
    plain = timm.create_model("vit_small_patch16_rope_mixed_224", **size).eval()
    with torch.no_grad():
        plain.rope.freqs.normal_(0, 2)
        for name, parameter in plain.named_parameters():
            if "gamma" in name:
                parameter.fill_(0.5)
    backbone = BACKBONE_REGISTRY.build("simpler_timm_vit_small_patch16_rope_mixed_224", pretrained=False, **size).eval()
    backbone.encoder.model.load_state_dict(plain.state_dict(), strict=False)
    frequencies = backbone.encoder.model.rope.freqs
    backbone.prune_depth([0, 3, 5])
    prune(plain, [0, 3, 5])
    assert backbone.encoder.model.rope.freqs is frequencies  # an optimizer may hold it
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = plain.forward_intermediates(images, indices=[2], intermediates_only=True)[-1]
        torch.testing.assert_close(backbone(images)[-1], expected)
        intact = BACKBONE_REGISTRY.build("simpler_timm_vit_small_patch16_rope_mixed_224", pretrained=False, **size).eval()
        intact.load_state_dict(backbone.state_dict())
        assert torch.equal(intact(images)[-1], backbone(images)[-1])
        state = backbone.state_dict()  # as earlier versions saved it, which had no frequencies dropped
        first = state["encoder.model.rope.freqs"]
        state["encoder.model.rope.freqs"] = torch.cat([first, first], dim=1)
        intact.load_state_dict(state)
        assert torch.equal(intact.encoder.model.rope.freqs, first)
        intact.match_checkpoint(intact.pruned_state._replace(kept=tuple(range(6))))
        assert intact.encoder.model.rope.freqs.shape[1] == 6


def test_a_plan_that_no_longer_holds_is_forgotten(build):
    backbone = build(embed_dim=48, num_heads=3)
    backbone.slim(SlimmingPlan(backbone.name, 12, (0, 1, 2, 3), {"name": "fixed", "args": {}}))
    assert backbone.plan is not None
    backbone.prune_depth([0, 2])
    assert backbone.plan is None
