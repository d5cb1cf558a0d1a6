"""Several processes that select together: the plan of one, and an end for all when one of them fails."""

import json
import os
import random
import time

import numpy as np
import pytest
import torch

from terratorch_simpler import SlimmingPlan
from terratorch_simpler.criteria import Simpler
from terratorch_simpler.distributed import Processes
from terratorch_simpler.errors import DegenerateFeaturesError, ProcessError, TilesError
from terratorch_simpler.extraction import ExtractionConfig, measure
from terratorch_simpler.models.backbone import SimplerBackbone
from tests.cli_runner import Command, config, together
from tests.in_memory_tiles import Tiles, land

# --- the pass itself


def small_backbone() -> SimplerBackbone:
    from terratorch.registry import BACKBONE_REGISTRY

    torch.manual_seed(0)
    return BACKBONE_REGISTRY.build("simpler_prithvi_eo_v2_tiny_tl", pretrained=False, embed_dim=48, num_heads=3, depth=6)


def measured(processes: Processes, count: int, unusable: float, seed: int, options: dict, spoil=None):
    """The pass of one process; some tiles cannot be read, some show nothing, the batches are of any size."""
    chance = random.Random(seed)
    broken = {number for number in range(count) if chance.random() < unusable / 2}
    valid = torch.ones(count, 32, 32, dtype=torch.bool)
    for number in range(count):
        if chance.random() < unusable / 2:
            valid[number] = False
    images = land(count, size=32)
    if spoil is not None:
        images[spoil] = float("nan")
    tiles = Tiles(images, valid, batch_size=5 + 3 * processes.rank, broken=broken)
    backbone = small_backbone()
    if options.pop("converged", False):  # the depth is plain after few tiles
        with torch.no_grad():
            for number, block in enumerate(backbone.blocks):
                for layer in (block.attn.proj, block.mlp.fc2):
                    layer.weight.mul_(2.0**number if number < 3 else 0.0)
    found = measure(
        lambda batch: backbone(batch["image"]), backbone, tiles,
        ExtractionConfig(Simpler(), **{"min_tiles": 10_000, "max_tiles": 10_000, **options}), processes=processes,
    )  # fmt: skip
    return {
        "similarity": found.similarity,
        "votes": found.votes,
        "counts": (found.tiles_seen, found.rows_seen, found.converged, dict(found.skips.counts), found.skips.named),
    }


CASES = {
    "whole groups": (300, 0.0, {}),
    "rows change hands": (400, 0.5, {}),
    "most is unusable": (900, 0.9, {}),
    "fewer tiles than a block": (50, 0.1, {}),
    "settles early": (700, 0.3, {"min_tiles": 128, "converged": True}),
    "max_tiles": (400, 0.2, {"max_tiles": 161}),
    "large groups": (700, 0.1, {"tokens": "cls"}),
}


@pytest.mark.parametrize("case", CASES)
def test_same_measurement_whatever_the_number_of_processes(case, tmp_path):
    count, unusable, options = CASES[case]
    alone = measured(Processes(), count, unusable, 1, dict(options))
    for ranks in (2, 4):
        found = together(measured, tmp_path / str(ranks), ranks, count, unusable, 1, dict(options))
        for one in found:
            assert one["counts"] == alone["counts"]
            torch.testing.assert_close(one["similarity"], alone["similarity"], rtol=0, atol=1e-6)
            assert one["votes"] == alone["votes"]
            assert torch.equal(one["similarity"], found[0]["similarity"])
    if case == "settles early":
        assert alone["counts"][2]
        assert alone["counts"][0] < 500
    if case == "max_tiles":
        assert alone["counts"][0] == 161


def test_an_error_in_the_features_is_the_same_in_all_processes(tmp_path):
    found = together(measured, tmp_path, 3, 300, 0.0, 1, {}, 70)
    assert {type(one) for one in found} == {DegenerateFeaturesError}
    assert len({str(one) for one in found}) == 1


def too_many_broken(processes: Processes):
    tiles = Tiles(land(400, size=32), broken=range(64, 128), max_bad_fraction=0.1)  # all of them of process 1
    backbone = small_backbone()
    measure(lambda batch: backbone(batch["image"]), backbone, tiles, ExtractionConfig(Simpler()), processes=processes)


def test_damage_is_judged_over_all_processes(tmp_path):
    found = together(too_many_broken, tmp_path, 2)
    assert all(isinstance(one, TilesError) for one in found)
    assert all("of 400 tiles are unreadable" in str(one) for one in found)


def swapped(processes: Processes, dtype: torch.dtype):
    """Every process gives each other one as many rows as its own rank, filled with both ranks."""
    parcels = [
        [torch.full((2, processes.rank, 3), 10.0 * processes.rank + other, dtype=dtype)] if other != processes.rank else []
        for other in range(processes.count)
    ]
    rows = [other if other != processes.rank else 0 for other in range(processes.count)]
    return processes.all_to_all(parcels, rows, torch.empty(2, 0, 3, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_rows_of_any_type_change_hands(tmp_path, dtype):
    for rank, got in enumerate(together(swapped, tmp_path, 3, dtype)):
        expected = [10.0 * other + rank for other in range(3) if other != rank for _ in range(other)]
        assert got.dtype == dtype
        assert torch.equal(got, torch.tensor(expected, dtype=dtype)[None, :, None].expand(2, -1, 3))


# --- failing


def failing(processes: Processes, how: str):
    for number in range(5):
        processes.all_gather(lambda number=number: fail_in(processes.rank, number, how))
    return "finished"


def fail_in(rank: int, number: int, how: str):
    if (rank, number) != (1, 3):
        return number
    if how == "ours":
        raise TilesError("There are too few tiles.")
    if how == "foreign":
        raise KeyError("bands")
    if how == "killed":
        os.kill(os.getpid(), 9)
    if how == "hangs":
        time.sleep(20)
    if how == "exits":
        raise SystemExit(3)
    if how == "cannot be sent":
        return lambda: number
    return number


def test_an_error_of_ours_ends_all_with_its_own_type(tmp_path):
    found = together(failing, tmp_path, 3, "ours")
    assert {type(one) for one in found} == {TilesError}
    assert str(found[1]) == "There are too few tiles."
    assert str(found[0]) == str(found[2]) == "In process 1 of 3: There are too few tiles."


def test_a_foreign_error_is_told_and_raised_where_it_is(tmp_path):
    found = together(failing, tmp_path, 3, "foreign")
    assert isinstance(found[1], KeyError)
    for other in (found[0], found[2]):
        assert isinstance(other, ProcessError)
        assert "Process 1 of 3 failed (KeyError: 'bands')" in str(other)


def test_an_answer_that_cannot_be_sent_ends_all_at_once(tmp_path):
    started = time.monotonic()
    found = together(failing, tmp_path, 3, "cannot be sent")
    assert "pickle" in str(found[1])
    assert not isinstance(found[1], ProcessError)
    for other in (found[0], found[2]):
        assert isinstance(other, ProcessError)
        assert "Process 1 of 3 failed" in str(other)
        assert "pickle" in str(other)
    assert time.monotonic() - started < 50  # not the patience of a minute


def test_a_killed_process_ends_the_others_at_once(tmp_path):
    started = time.monotonic()
    found = together(failing, tmp_path, 3, "killed")
    assert found[1] is None
    assert all(isinstance(one, ProcessError) for one in (found[0], found[2]))
    assert "lost the connection" in str(found[0])
    assert time.monotonic() - started < 50  # not the patience of a minute


def test_a_process_that_hangs_ends_the_others_after_a_while(tmp_path):
    found = together(failing, tmp_path, 2, "hangs", patience=3)
    assert isinstance(found[0], ProcessError)
    assert "lost the connection" in str(found[0])


def test_an_exit_ends_all(tmp_path):
    assert together(failing, tmp_path, 3, "exits") == [None, None, None]


def test_one_process_needs_no_group():
    processes = Processes()
    assert (processes.all_gather(lambda: 5), processes.broadcast_from_zero(lambda: 6), processes.run_all(lambda: 7)) == (
        [5],
        6,
        7,
    )
    with pytest.raises(KeyError, match="bands"):
        processes.all_gather(lambda: {}["bands"])


# --- terratorch fit


@pytest.fixture(scope="module")
def tiles_for_many(tmp_path_factory):
    """150 training scenes, six of them without any data, three damaged."""
    import rasterio

    from terratorch_simpler.demo.scenes import write_scenes

    folder = tmp_path_factory.mktemp("many")
    write_scenes(folder, {"train": 150, "val": 4, "test": 4}, size=64)
    names = (folder / "splits" / "train.txt").read_text().split()
    for name in names[5:125:20]:
        with rasterio.open(next(folder.glob(f"images/{name}*")), "r+") as target:
            target.write(np.full((6, 64, 64), target.nodata, dtype=target.dtypes[0]))
    return folder


def fit(folder, scenes, ranks, *args, before=None, **callback):
    command = Command(folder, config(scenes, folder, **callback), *args, ranks=ranks, before=before)
    return command, command.wait()


def test_fit_in_one_two_and_four_processes_makes_the_same_plan(tiles_for_many, tmp_path):
    plans = {}
    for ranks in (1, 2, 4):
        folder = tmp_path / str(ranks)
        command, status = fit(folder, tiles_for_many, ranks, "--trainer.max_epochs", "1")
        assert status == [0] * ranks, command.output()
        plans[ranks] = SlimmingPlan.load(folder / "simpler" / "plan.json")
        trained = [json.loads((folder / f"trained.{rank}.json").read_text()) for rank in range(ranks)]
        assert all(one == trained[0] for one in trained)  # all cut alike, and equal weights after an epoch
        assert trained[0]["kept"] == list(plans[ranks].kept_blocks)
        said = [command.output(rank) for rank in range(ranks)]
        assert "blocks kept" in said[0]
        assert not any("blocks kept" in text or "Compared the blocks" in text for text in said[1:])
        assert {path.name for path in (folder / "simpler").iterdir()} == {"plan.json", "report.html", "report.png"}
    assert plans[1].tiles_seen == 144
    assert plans[1].data["skipped"] == {"nodata": 6}
    for plan in (plans[2], plans[4]):
        np.testing.assert_allclose(plan.similarity, plans[1].similarity, rtol=0, atol=1e-6)
        same = ("kept_blocks", "votes", "tiles_seen", "rows_seen", "parameters", "macs", "data")
        assert all(getattr(plan, name) == getattr(plans[1], name) for name in same)


def test_fit_on_tiles_of_their_own_opens_the_files_once(tiles_for_many, tmp_path):
    plans = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        tiles = {
            "class_path": "terratorch_simpler.GeoTiffTiles",
            "init_args": {"paths": str(tiles_for_many / "images"), "tile_size": 32, "batch_size": 20, "num_workers": 2},
        }
        command, status = fit(
            folder, tiles_for_many, ranks, "--trainer.max_epochs", "0", tiles=tiles, before=only_the_first_opens
        )
        assert status == [0] * ranks, command.output()
        plans.append(SlimmingPlan.load(folder / "simpler" / "plan.json"))
        assert len(json.loads((folder / "simpler" / "tiles.json").read_text())["files"]) == 158
    np.testing.assert_allclose(plans[1].similarity, plans[0].similarity, rtol=0, atol=1e-6)
    assert plans[1].data == plans[0].data
    assert plans[0].tiles_seen == plans[1].tiles_seen >= 256


def only_the_first_opens(rank):
    if rank:
        from terratorch_simpler.data import geotiff

        def refuse(*_):
            raise AssertionError("the first process has opened these files already")

        geotiff.read_headers = refuse


def crash_in_the_second_process(rank):
    if rank == 1:
        from terratorch_simpler.extraction.hooks import FeatureExtractor

        run, calls = FeatureExtractor.run, []

        def run_or_crash(self, forward, batch):
            calls.append(1)
            if len(calls) == 3:
                raise ZeroDivisionError("broken on purpose")
            return run(self, forward, batch)

        FeatureExtractor.run = run_or_crash


def die_in_the_second_process(rank):
    if rank == 1:
        from terratorch_simpler.extraction.hooks import FeatureExtractor

        FeatureExtractor.run = lambda *_: os.kill(os.getpid(), 9)


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (crash_in_the_second_process, "Process 1 of 2 failed (ZeroDivisionError: broken on purpose)"),
        (die_in_the_second_process, "Process 0 of 2 lost the connection to another one"),
    ],
)
def test_one_failing_process_ends_the_job_with_a_message_in_the_first(tiles_for_many, tmp_path, before, message):
    command, status = fit(tmp_path, tiles_for_many, 2, before=before)
    assert None not in status  # both ended by themselves
    assert 0 not in status
    assert command.output().count(message) == 1
    assert not (tmp_path / "simpler" / "plan.json").exists()
    assert not command.left_behind()


def test_training_images_that_are_missing_on_one_machine_are_said(tiles_for_many, tmp_path):
    command, status = fit(tmp_path, tiles_for_many, 2, before=fewer_images_in_the_second_process)
    assert status == [1, 1]
    assert "Found other training images on rank 1" in command.output()


def fewer_images_in_the_second_process(rank):
    if rank == 1:
        from terratorch.datamodules import GenericNonGeoSegmentationDataModule

        setup = GenericNonGeoSegmentationDataModule.setup

        def setup_with_fewer(self, stage):
            setup(self, stage)
            self.train_dataset.image_files = self.train_dataset.image_files[:-3]
            self.train_dataset.segmentation_mask_files = self.train_dataset.segmentation_mask_files[:-3]

        GenericNonGeoSegmentationDataModule.setup = setup_with_fewer
