"""The pass over the tiles: what is drawn, what is left as it was, and that batching does not matter."""

import random
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from terratorch.datamodules.generic_multimodal_data_module import MultimodalNormalize

from terratorch_simpler.criteria import Bounds, Simpler
from terratorch_simpler.errors import DegenerateFeaturesError, SimplerWarning, TilesError
from terratorch_simpler.extraction import ExtractionConfig, count_macs, measure
from terratorch_simpler.extraction.input_statistics import InputStatistics
from terratorch_simpler.functional.hsic import linear_cka
from terratorch_simpler.lightning.task import batch_normalizer
from tests.in_memory_tiles import Tiles, land
from tests.synthetic_features import make_identity


def run(backbone, tiles, **kwargs):
    kwargs = {"min_tiles": 32, "max_tiles": 4096, **kwargs}
    bounds = kwargs.pop("bounds", Bounds())
    forward = kwargs.pop("forward", lambda batch: backbone(batch["image"]))
    others = {name: kwargs.pop(name) for name in ("stop_after", "progress", "processes") if name in kwargs}
    return measure(forward, backbone, tiles, ExtractionConfig(Simpler(), bounds, **kwargs), **others)


def test_similarity_is_that_of_the_raw_block_outputs(build):
    backbone, images = build(), land(40)
    outputs = []
    hooks = [block.register_forward_hook(lambda m, i, o: outputs.append(o[:, 1:])) for block in backbone.blocks]
    with torch.no_grad():
        backbone(images)
    for hook in hooks:
        hook.remove()
    # 64 px tiles have 16 patch tokens: all are drawn, in order.
    expected = linear_cka(torch.stack(outputs).flatten(1, 2))
    found = run(backbone, Tiles(images))
    torch.testing.assert_close(found.similarity, expected, rtol=0, atol=1e-5)
    assert (found.tiles_seen, found.rows_seen, found.votes, found.converged) == (40, 640, None, False)
    assert found.input_shape == (6, 64, 64)


@pytest.mark.parametrize("tokens", ["patch", "cls", "mean", "all"])
def test_batch_size_in_flight_does_not_matter(build, tokens):
    backbone, images = build(), land(140)
    first, *others = [run(backbone, Tiles(images, batch_size=size), tokens=tokens, min_tiles=140) for size in (1, 13, 64)]
    for other in others:
        torch.testing.assert_close(first.similarity, other.similarity, rtol=0, atol=1e-5)
        assert (first.tiles_seen, first.rows_seen, first.converged) == (other.tiles_seen, other.rows_seen, other.converged)
        assert first.votes == other.votes
    rows = {"patch": 16, "cls": 1, "mean": 1, "all": 16}[tokens]
    assert first.rows_seen == 140 * rows


def test_early_stop_is_tile_exact_whatever_the_batch_size(build):
    backbone, images = build(), land(300)
    for block in list(backbone.blocks)[5:]:  # the depth is plain after few tiles
        make_identity(block)
    found = [run(backbone, Tiles(images, batch_size=size), min_tiles=128) for size in (7, 100)]
    assert all(f.converged for f in found)
    assert {f.tiles_seen for f in found} == {128}
    assert max(found[0].votes.values()) >= 0.95


@pytest.mark.parametrize("converged", [4, 6, 8])
def test_planted_stabilisation_is_found(build, converged):
    backbone = build()
    with torch.no_grad():
        for number, block in enumerate(backbone.blocks):
            if number >= converged:
                make_identity(block)
            else:  # each block changes more than the one before
                block.mlp.fc2.weight.mul_(0.2 * 1.5**number)
                block.attn.proj.weight.mul_(0.2 * 1.5**number)
    found = run(backbone, Tiles(land(96)))
    choice = Simpler().choose(found.statistics, 12, Bounds())
    assert len(choice.kept_blocks) == converged
    torch.testing.assert_close(
        found.similarity[converged - 1, converged:], torch.ones(12 - converged).double(), rtol=0, atol=1e-6
    )


class SlowTiles(Tiles):
    """Tiles that come late, and tell when they are no longer wanted."""

    closed = False

    def __iter__(self):
        try:
            for batch in super().__iter__():
                time.sleep(0.05)
                yield batch
        finally:
            self.closed = True


def test_time_spent_waiting_for_tiles_is_measured(build):
    backbone = build()
    quick, slow = [run(backbone, kind(land(64), batch_size=8)) for kind in (Tiles, SlowTiles)]
    assert 8 * 0.05 <= slow.data_wait < slow.seconds
    assert quick.data_wait < 8 * 0.05
    assert slow.seconds > quick.data_wait


def test_error_while_computing_ends_the_stream(build):
    tiles = SlowTiles(land(64))
    with pytest.raises(ZeroDivisionError) as error:
        measure(lambda _: 1 / 0, build(), tiles, ExtractionConfig(Simpler()))
    assert tiles.closed
    del error


@pytest.mark.filterwarnings("ignore:Found tiles without S1RTC")
def test_modalities_that_some_tiles_lack(build, monkeypatch):
    """TerraTorch's allow_missing_modalities: batches hold either both or one."""
    optical, radar = land(64, bands=12), land(64, bands=2, seed=1)
    backbone = build("simpler_terramind_v1_tiny", modalities=["S2L2A", "S1RTC"], img_size=64)

    class Mixed(Tiles):
        def batch(self, positions):
            found = super().batch(positions)
            if positions[0] >= 32:
                del found["image"]["S1RTC"]
            return found

    pixels = {}

    def warn_implausible(self, _processes):
        pixels.update({name: int(sums[0, 0]) for name, sums in self.sums.items()})

    monkeypatch.setattr(InputStatistics, "warn_implausible", warn_implausible)
    found = run(backbone, Mixed({"S2L2A": optical, "S1RTC": radar}))
    assert found.tiles_seen == 64
    assert pixels == {"S2L2A": 64 * 64 * 64, "S1RTC": 32 * 64 * 64}


def test_max_tiles_is_exact(build):
    assert run(build(), Tiles(land(80), batch_size=16), max_tiles=40).tiles_seen == 40


def test_many_tiles_are_pooled_in_large_groups(build, monkeypatch):
    sizes = []
    monkeypatch.setattr("terratorch_simpler.metrics.bootstrap", lambda _, groups, *__: sizes.append(len(groups)) or {1: 0.5})
    backbone = build(embed_dim=48, num_heads=3, depth=6)
    found = run(backbone, Tiles(land(544, size=32), batch_size=64), min_tiles=256)
    assert found.tiles_seen == 544
    # Groups of 32 until there are eight of 64; the last 32 tiles are a group of their own; and once more at the end.
    assert sizes == [8, 10, 12, 14, 8, 9, 9]


def test_seed_changes_the_rows_and_repeats(build):
    backbone, tiles = build(), Tiles(land(40, size=128))  # 64 tokens a tile, 16 drawn
    one, again, other = (run(backbone, tiles, seed=seed).similarity for seed in (0, 0, 1))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_rows_of_a_tile_depend_on_its_own_number_only(build):
    """Reversing the tiles within a group changes nothing but the order of the rows."""
    backbone, images = build(), land(40, size=128)
    forward = Tiles(images)
    backward = Tiles(images.flip(0))
    backward.__class__ = type("Backward", (Tiles,), {"__iter__": lambda self: _renumbered(self)})
    a, b = run(backbone, forward).similarity, run(backbone, backward).similarity
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def _renumbered(tiles):
    for batch in Tiles.__iter__(tiles):
        yield {**batch, "index": [len(tiles) - 1 - number for number in batch["index"]]}


def test_patches_without_data_are_not_rows(build):
    backbone, images = build(), land(40)
    valid = torch.ones(40, 64, 64, dtype=torch.bool)
    valid[:, :16] = False  # the first row of patches
    valid[3] = False
    valid[:, 16:20, 16:20] = False  # a patch with some data stays
    found = run(backbone, Tiles(images, valid))
    assert (found.tiles_seen, found.rows_seen) == (39, 39 * 12)
    assert found.skips.counts == {"nodata": 1}


def test_padding_the_model_adds_is_not_compared(build):
    backbone, images = build(), land(40, size=48)
    padded = measure(
        lambda batch: backbone(torch.nn.functional.pad(batch["image"], (8, 8, 8, 8), mode="reflect")),
        backbone,
        Tiles(images),
        ExtractionConfig(Simpler(), min_tiles=32),
    )
    # 64 px hold 16 patches; the outer ring shows 8 px of the image in each patch, so all of them hold data.
    assert padded.rows_seen == 40 * 16
    wide = measure(
        lambda batch: backbone(torch.nn.functional.pad(batch["image"], (16, 16, 16, 16), mode="reflect")),
        backbone,
        Tiles(land(40, size=32)),
        ExtractionConfig(Simpler(), min_tiles=32),
    )
    assert wide.rows_seen == 40 * 4


def test_time_series_and_their_prompts(build):
    backbone = build(num_frames=3, vpt=True, vpt_n_tokens=4)
    images = torch.stack([land(40, seed=s) for s in range(3)], dim=2)
    assert run(backbone, Tiles(images)).input_shape == (6, 3, 64, 64)
    per_frame = torch.ones(40, 3, 64, 64, dtype=torch.bool)
    per_frame[:, 1:] = False
    per_frame[:, 0, 16:] = False
    found = run(backbone, Tiles(images, per_frame))
    assert found.rows_seen == 40 * 4


def test_frames_that_pass_as_images_are_drawn_per_tile(build):
    backbone = build()
    images = torch.stack([land(40, seed=s) for s in range(3)], dim=2)
    found = measure(
        lambda batch: backbone(batch["image"].transpose(1, 2).flatten(0, 1)),
        backbone,
        Tiles(images),
        ExtractionConfig(Simpler(), min_tiles=32),
    )
    assert (found.tiles_seen, found.rows_seen) == (40, 640)


def test_everything_borrowed_comes_back(build):
    backbone = build(drop_path=0.5).train()
    backbone.blocks[2].eval()
    backbone.blocks[1].requires_grad_(False)
    modes = {n: m.training for n, m in backbone.named_modules()}
    flags = {n: p.requires_grad for n, p in backbone.named_parameters()}
    weights = {n: p.clone() for n, p in backbone.state_dict().items()}
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()

    class Broken(Tiles):
        def __iter__(self):
            torch.rand(3), np.random.rand(3), random.random()
            for batch in super().__iter__():
                yield batch
                if self.batch_size == 15:
                    raise OSError("disk is gone")

    run(backbone, Broken(land(40)))
    with pytest.raises(OSError, match="disk is gone"):
        run(backbone, Broken(land(40), batch_size=15))
    assert {n: m.training for n, m in backbone.named_modules()} == modes
    assert {n: p.requires_grad for n, p in backbone.named_parameters()} == flags
    assert all(torch.equal(weights[n], p) for n, p in backbone.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in backbone.modules())
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()
    assert torch.is_grad_enabled()


def test_what_follows_the_encoder_is_not_run(build):
    backbone, ran = build(), []

    def forward(batch):
        backbone(batch["image"])
        ran.append(1)

    measure(forward, backbone, Tiles(land(40)), ExtractionConfig(Simpler(), min_tiles=32))
    assert not ran


def test_too_few_tiles_are_refused(build):
    with pytest.raises(
        TilesError,
        match=r"Only 31 usable tiles; comparing blocks needs at least 32.*more unlabeled.*or a plan, or set backbone_keep",
    ):
        run(build(), Tiles(land(31)))


def test_wrong_band_count_is_refused(build):
    with pytest.raises(TilesError, match="Found tiles with 10 bands, expected the 6 bands of 'prithvi_eo_v2_tiny_tl'"):
        run(build(), Tiles(land(40, bands=10)))


def channel_adapter(backbone, bands, layer=None):
    """A layer in front of the encoder that takes other bands."""
    layer = layer or torch.nn.Conv2d(bands, 3, 1)
    return lambda batch: backbone(layer(batch["image"]))


@pytest.fixture
def three_bands(build):
    return build("simpler_timm_vit_tiny_patch16_224", img_size=64)


def test_a_layer_before_the_encoder_may_take_other_bands(three_bands):
    found = measure(channel_adapter(three_bands, 6), three_bands, Tiles(land(40)), ExtractionConfig(Simpler(), min_tiles=32))
    assert (found.tiles_seen, found.input_shape) == (40, (3, 64, 64))


def test_bands_that_such_a_layer_does_not_take_are_said(three_bands):
    tiles = Tiles(land(40, bands=10))
    with pytest.raises(
        TilesError, match=r"Found tiles with 10 bands, expected the 3 bands of .* does not take them either \(Run"
    ):
        measure(channel_adapter(three_bands, 6), three_bands, tiles, ExtractionConfig(Simpler()))


def test_bands_that_come_wrong_to_the_encoder_are_said_before_it_runs(three_bands):
    forward = channel_adapter(three_bands, 6, torch.nn.Conv2d(6, 4, 1))
    with pytest.raises(TilesError, match="Found tiles with 4 bands, expected the 3 bands of 'timm_vit_tiny_patch16_224'"):
        measure(forward, three_bands, Tiles(land(40)), ExtractionConfig(Simpler()))


def test_other_errors_are_told_as_they_are(three_bands):
    def forward(batch):
        raise RuntimeError("no luck")

    with pytest.raises(RuntimeError, match=r"^no luck$"):  # before the encoder, with the right bands
        measure(forward, three_bands, Tiles(land(40, bands=3)), ExtractionConfig(Simpler()))
    three_bands.blocks[3].register_forward_pre_hook(forward)
    del forward
    with pytest.raises(TypeError):  # inside it, with the right bands there
        measure(channel_adapter(three_bands, 6), three_bands, Tiles(land(40)), ExtractionConfig(Simpler()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_the_images_is_an_error_not_a_plan(build, value):
    images = land(40)
    images[7, 2, 3, 4] = value
    with pytest.raises(DegenerateFeaturesError, match="Found NaN or Inf after encoder block 0, 1, 2"):
        run(build(), Tiles(images))


def test_block_with_constant_output_is_named(build):
    backbone = build()
    handle = backbone.blocks[6].register_forward_hook(lambda m, i, o: torch.full_like(o, 2.0))
    with pytest.raises(DegenerateFeaturesError, match="constant over all tokens after encoder block 6"):
        run(backbone, Tiles(land(40)))
    handle.remove()


def test_class_token_of_an_encoder_without_one_is_refused(build):
    backbone = build("simpler_terramind_v1_tiny", modalities=["S2L2A"])
    with pytest.raises(TilesError, match="no class token"):
        run(backbone, Tiles(land(40, bands=12)), tokens="cls")


class Modalities(Tiles):
    """Two modalities of the same places."""

    def __init__(self, images, others, **kwargs):
        super().__init__(images, **kwargs)
        self.others = others

    def __iter__(self):
        for batch in super().__iter__():
            yield {**batch, "image": {"S2L2A": batch["image"], "S1RTC": self.others[batch["index"]]}}


def raw_outputs(backbone, inputs):
    outputs = []
    handles = backbone.register_block_hooks(outputs.append)
    with torch.no_grad():
        backbone(inputs)
    for handle in handles:
        handle.remove()
    return outputs[1:]


def terramind(build, **kwargs):
    return build("simpler_terramind_v1_tiny", modalities=["S2L2A", "S1RTC"], **kwargs)


@pytest.mark.parametrize("merge_method", ["mean", "concat", "dict", None])
def test_similarity_of_modalities_is_that_of_all_their_patches(build, merge_method):
    backbone = terramind(build, merge_method=merge_method)
    optical, radar = land(40, size=32, bands=12), land(40, size=32, bands=2, seed=1)
    outputs = raw_outputs(backbone, {"S2L2A": optical, "S1RTC": radar})
    found = run(backbone, Modalities(optical, radar))  # four patches of each modality: all are drawn, in order
    torch.testing.assert_close(found.similarity, linear_cka(torch.stack(outputs).flatten(1, 2)), rtol=0, atol=1e-5)
    assert found.rows_seen == 40 * 8
    assert found.input_shape == {"S2L2A": (12, 32, 32), "S1RTC": (2, 32, 32)}


def test_modalities_do_not_depend_on_the_batch_and_leave_it_alone(build):
    backbone, optical, radar = terramind(build), land(70, bands=12), land(70, bands=2, seed=1)
    first = run(backbone, Modalities(optical, radar, batch_size=7))
    second = run(backbone, Modalities(optical, radar, batch_size=32))
    assert torch.allclose(first.similarity, second.similarity, atol=1e-6)


def test_patches_without_data_are_left_out_in_every_modality(build):
    backbone, optical, radar = terramind(build), land(40, bands=12), land(40, bands=2, seed=1)
    valid = torch.ones(40, 64, 64, dtype=torch.bool)
    valid[:, :48] = False  # one row of four patches is left in each of the two
    assert run(backbone, Modalities(optical, radar, valid=valid)).rows_seen == 40 * 8


def test_thinking_in_modalities_is_measured_on_its_input(build):
    backbone = build("simpler_terramind_v1_tiny_tim", modalities=["S2L2A"], img_size=32)
    tiles = Tiles(land(40, size=32, bands=12))
    random.seed(1)
    found = run(backbone, tiles)
    random.seed(2)  # the encoder draws tokens from it
    again = run(backbone, tiles)
    assert found.rows_seen == 40 * 4  # patches of the input, not those that the encoder made up
    assert torch.equal(found.similarity, again.similarity)


def test_modalities_that_do_not_fit_are_refused(build):
    both = Modalities(land(40, bands=12), land(40, bands=2))
    with pytest.raises(TilesError, match="Found tiles with the modalities S2L2A, S1RTC, expected one image for 'prithvi"):
        run(build(), both)
    with pytest.raises(TilesError, match="Found tiles of one image, expected the modalities S2L2A, S1RTC of 'terramind"):
        run(terramind(build), Tiles(land(40, bands=12)))
    with pytest.raises(TilesError, match="Found tiles with the modalities S2L2A, S1RTC, expected DEM of 'terramind"):
        run(build("simpler_terramind_v1_tiny", modalities=["DEM"]), both)
    with pytest.raises(
        TilesError, match="Found tiles with 3 bands, expected the 2 bands of 'terramind_v1_tiny' for modality 'S1RTC'"
    ):
        run(terramind(build), Modalities(land(40, bands=12), land(40, bands=3)))


def test_one_image_is_not_taken_for_two_modalities_that_a_datamodule_normalises_by_name(build):
    backbone = build("simpler_terramind_v1_tiny", modalities=["S1GRD", "S1RTC"])  # both of two bands
    means, stds = ({name: [value] * 2 for name in ("S1GRD", "S1RTC")} for value in (0.0, 1.0))
    normalise = MultimodalNormalize(means, stds)
    trainer, tiles = SimpleNamespace(datamodule=SimpleNamespace(aug=normalise)), Tiles(land(40, bands=2))
    normalised = batch_normalizer(trainer, backbone, tiles)
    with pytest.raises(TilesError, match="Found tiles of one image, expected the modalities S1GRD, S1RTC"):
        run(backbone, tiles, forward=lambda batch: backbone(normalised({"image": batch["image"]})["image"]))


def test_modalities_on_different_grids(build):
    backbone = terramind(build, merge_method=None)
    optical, radar = land(40, bands=12), land(40, size=32, bands=2, seed=1)
    valid = torch.ones(40, 1, 1, dtype=torch.bool)  # what a datamodule's tiles have where grids differ
    found = run(backbone, Modalities(optical, radar, valid=valid), tokens="mean")
    assert found.rows_seen == 40
    outputs = raw_outputs(backbone, {"S2L2A": optical, "S1RTC": radar})
    means = torch.stack(outputs).mean(dim=2)  # 16 and 4 patches, all of them
    torch.testing.assert_close(found.similarity, linear_cka(means), rtol=0, atol=1e-4)


def test_a_missing_modality_is_said(build):
    backbone = build("simpler_terramind_v1_tiny", modalities=["S2L2A", "S1RTC", "DEM"])
    with pytest.warns(SimplerWarning, match="Found tiles without DEM, expected all modalities"):
        run(backbone, Modalities(land(40, bands=12), land(40, bands=2)))


def test_macs_are_the_closed_form_count(build):
    backbone = build()
    tokens, width, patches = 17, 192, 16
    block = 12 * width**2 * tokens + 2 * tokens**2 * width  # qkv, proj, MLP; q k' and attention times v
    embedding = patches * 6 * 16 * 16 * width
    assert count_macs(backbone, (6, 64, 64)) == embedding + 12 * block
    backbone.prune_depth(range(5))
    assert count_macs(backbone, (6, 64, 64)) == embedding + 5 * block
