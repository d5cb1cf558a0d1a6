"""Labels of tokens, features as the cut encoder answers them, and probes whose answer is known."""

import copy
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import torch
import yaml
from sklearn.linear_model import LogisticRegression
from terratorch.datamodules import GenericNonGeoClassificationDataModule, GenericNonGeoPixelwiseRegressionDataModule

import terratorch_simpler.demo as demo
from terratorch_simpler.cli import main
from terratorch_simpler.data import DatamoduleTiles
from terratorch_simpler.encoders import PatchGrid
from terratorch_simpler.errors import ConfigurationError, LabelsError
from terratorch_simpler.extraction import check_labels, collect_labelled
from terratorch_simpler.extraction.labelled import patch_labels, read_targets
from terratorch_simpler.lightning.labelled_images import check_split, labelled_rows
from terratorch_simpler.models.backbone import find_backbone
from terratorch_simpler.sweep.probing import (
    ProbeSamples,
    bootstrap_accuracy,
    correct_by_probe,
    fit_predict,
    probe_variants,
)
from terratorch_simpler.sweep.variants import Variant, replace_encoder
from tests import layouts
from tests.families import FAMILIES, wrapped
from tests.in_memory_tiles import Tiles, land
from tests.rasters import write
from tests.test_sweep import read

pytestmark = pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.FewTilesWarning")
SHAPE = (6, 64, 64)

# --- the class of a patch


def slow_labels(masks, images, grid, special=1):
    """Pixel by pixel."""
    frames, height, width = grid.size
    _, rows, columns = grid.patch
    top, left = (height - masks.shape[1]) // 2, (width - masks.shape[2]) // 2
    found = []
    for mask in masks.tolist():
        of_image = [-1] * special
        for _ in range(frames // grid.patch[0]):
            for row in range(height // rows):
                for column in range(width // columns):
                    pixels = []
                    for y in range(row * rows - top, (row + 1) * rows - top):
                        for x in range(column * columns - left, (column + 1) * columns - left):
                            inside = 0 <= y < len(mask) and 0 <= x < len(mask[0])
                            pixels.append(mask[y][x] if inside else -1)
                    known = [pixel for pixel in pixels if pixel != -1]
                    enough = len(known) * 2 > len(pixels)
                    of_image.append(min(set(known), key=lambda c: (-known.count(c), c)) if enough else -1)
        found.append([of_image] * images)
    return torch.tensor(found)


@pytest.mark.parametrize(("size", "grid", "images"), [
    ((8, 12), PatchGrid((1, 8, 12), (1, 4, 4)), 1),
    ((6, 7), PatchGrid((1, 8, 8), (1, 2, 4)), 1),  # padded by the model
    ((8, 8), PatchGrid((4, 8, 8), (2, 4, 4)), 3),  # frames within an image, and frames as images
    ((9, 9), PatchGrid((1, 9, 9), (1, 4, 4)), 1),  # the last row and column make no patch
])  # fmt: skip
def test_labels_of_patches_are_those_of_a_slow_reference(size, grid, images):
    generator = torch.Generator().manual_seed(0)
    masks = torch.randint(-2, 3, (5, *size), generator=generator).clamp(min=-1)  # many without a class, many ties
    masks[0] = -1
    masks[1, :2] = 2
    found = patch_labels(masks, images, [1, grid])
    assert torch.equal(found, slow_labels(masks, images, grid))
    assert {-1, 0, 2} <= set(found.unique().tolist())


def test_half_the_pixels_are_not_enough():
    masks = torch.tensor([[[1, -1], [1, -1]], [[1, -1], [1, 0]]])
    assert patch_labels(masks, 1, [PatchGrid((1, 2, 2), (1, 2, 2))]).flatten().tolist() == [-1, 1]


def test_masks_without_any_class_have_no_labels():
    assert patch_labels(torch.full((2, 4, 4), -1), 1, [2, PatchGrid((1, 4, 4), (1, 2, 2))]).unique().tolist() == [-1]


def test_masks_of_a_resized_image_are_resized_to_the_nearest_pixel():
    masks = torch.arange(4).reshape(1, 2, 2).repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert patch_labels(masks, 1, [PatchGrid((1, 4, 4), (1, 2, 2))]).flatten().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("target", "message"), [
    (None, "There is no mask and no label in the data"),
    (torch.zeros(2, 4, 4), r"no whole numbers \(regression\)"),
    (torch.zeros(2, 1), r"no whole numbers \(regression\)"),
    (torch.zeros(2, 7), r"Found labels of shape \(7,\) for an image \(multi-label"),
    (torch.zeros(2, 7, dtype=torch.int64), r"Found labels of shape \(7,\) for an image \(multi-label"),
    (torch.zeros(2, 3, 4, 4, dtype=torch.int64), r"Found labels of shape \(3, 4, 4\)"),
])  # fmt: skip
def test_labels_that_are_no_classes_are_refused(target, message):
    with pytest.raises(LabelsError, match=message):
        read_targets({} if target is None else {"target": target}, None)


def test_labels_to_ignore_are_none():
    target = torch.tensor([[[0, 255], [-3, 2]]], dtype=torch.uint8).short()
    assert read_targets({"target": target}, 255).tolist() == [[[0, -1], [2**8 - 3, 2]]]
    assert read_targets({"target": torch.tensor([[3], [-1]])}, None).tolist() == [3, -1]


# --- features


def labels_of(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 3, (count, 4, 4), generator=generator).repeat_interleave(16, 1).repeat_interleave(16, 2)


def collect(backbone, source, **kwargs):
    with torch.no_grad():
        return collect_labelled(lambda batch: backbone(batch["image"]), backbone, source, backbone, what="images", **kwargs)


def as_cut(backbone):
    norm = backbone.final_norm
    return lambda block, output: output if norm is None else norm(output)


NORMED = [f for f in FAMILIES if f.key in ("prithvi", "terramind", "clay", "dinov3", "dofa", "timm", "prithvi vpt")]


@pytest.mark.parametrize("family", NORMED, ids=lambda family: family.key)
@pytest.mark.parametrize("depth", [1, 4])
def test_features_of_a_depth_are_those_of_the_encoder_that_was_really_cut(family, depth):
    backbone = wrapped(family)
    size = family.shape[-1]
    masks = labels_of(3)[:, :size, :size]
    source = Tiles(family.image(3), extra={"target": masks})
    found = collect(backbone, source, readout=as_cut(backbone))
    backbone.prune_depth(range(depth))
    with torch.no_grad():
        features = backbone(family.image(3))[-1]
    if features.ndim == 4:
        features = features.flatten(2).mT
    patches = size // backbone._spec.patch_size(backbone.encoder)[-1]
    # TerraTorch appends the class token of DINOv3.
    tokens = features[:, : patches**2] if family.key == "dinov3" else features[:, -(patches**2) :]
    taken = 16 if patches**2 >= 16 else patches**2
    assert found.features.shape[1:] == (3 * taken, tokens.shape[-1])
    assert found.images.tolist() == [i for i in range(3) for _ in range(taken)]
    if taken == patches**2:  # all of them, in order
        torch.testing.assert_close(found.features[depth - 1], tokens.flatten(0, 1))
        step = size // patches
        assert found.labels.tolist() == masks[:, ::step, ::step].flatten().tolist()


def test_patches_without_data_or_class_are_no_rows_and_few_are_drawn_of_each(build):
    backbone, masks, valid = build(), labels_of(2), torch.ones(2, 64, 64, dtype=torch.bool)
    masks[0, :16] = -1
    valid[0, 16:32] = False
    found = collect(backbone, Tiles(land(2), valid=valid, extra={"target": masks}))
    assert torch.bincount(found.images).tolist() == [8, 16]
    assert found.labels[:8].tolist() == masks[0, 32::16, ::16].flatten().tolist()
    large = collect(backbone, Tiles(land(2, size=128), extra={"target": labels_of(2).repeat(1, 2, 2)}))
    assert torch.bincount(large.images).tolist() == [16, 16]
    again = collect(backbone, Tiles(land(2, size=128), extra={"target": labels_of(2).repeat(1, 2, 2)}, batch_size=1))
    assert torch.equal(large.labels, again.labels)
    torch.testing.assert_close(large.features, again.features)
    other = collect(backbone, Tiles(land(2, size=128), extra={"target": labels_of(2).repeat(1, 2, 2)}), seed=1)
    assert not torch.equal(large.features, other.features)


@pytest.mark.parametrize("class_token", [False, True])
def test_labels_of_images_take_one_row_of_each(build, class_token):
    backbone, images = build(), land(6)
    target = torch.tensor([0, 1, -1, 1, 0, 5])
    found = collect(backbone, Tiles(images, extra={"target": target}), class_token=class_token, ignore_index=5)
    assert (found.labels.tolist(), found.images.tolist()) == ([0, 1, 1, 0], [0, 1, 3, 4])
    outputs = []
    with torch.no_grad():
        hook = backbone.blocks[2].register_forward_hook(lambda m, i, o: outputs.append(o))
        backbone(images)
        hook.remove()
    tokens = outputs[0][:, 0] if class_token else outputs[0][:, 1:].mean(dim=1)
    torch.testing.assert_close(found.features[2], tokens[[0, 1, 3, 4]])


def test_an_encoder_without_a_class_token_gives_the_mean(build):
    backbone = build("simpler_terramind_v1_tiny", modalities=["S2L2A"])
    source = Tiles(land(4, bands=12), extra={"target": torch.tensor([0, 1, 0, 1])})
    token, mean = collect(backbone, source, class_token=True), collect(backbone, source)
    assert torch.equal(token.features, mean.features)


def test_images_are_capped(build):
    found = collect(build(), Tiles(land(40), extra={"target": labels_of(40)}, batch_size=7), limit=10)
    assert set(found.images.tolist()) == set(range(10))


def test_one_class_is_refused_with_and_without_the_model(build):
    source = Tiles(land(4), extra={"target": torch.full((4, 64, 64), 2)})
    for look in (lambda: collect(build(), source), lambda: check_labels(source, None, "images")):
        with pytest.raises(LabelsError, match="Found only class 2 in the labels of the images, expected two classes"):
            look()
    with pytest.raises(LabelsError, match="There is no class at all in the labels of the images"):
        check_labels(source, 2, "images")


# --- labels of a datamodule


@pytest.mark.parametrize(("split", "count"), [("train", 48), ("val", 4)])
def test_masks_of_a_datamodule_come_with_their_images(datamodule, scenes, split, count):
    data = datamodule()
    data.setup("fit")
    tiles = DatamoduleTiles(data, split=split, labels=True)
    names = (scenes / "splits" / f"{split}.txt").read_text().split()
    assert len(tiles) == count
    seen = 0
    for batch in tiles:
        for index, mask in zip(batch["index"], batch["target"], strict=True):
            with rasterio.open(scenes / "masks" / f"{sorted(names)[index]}_mask.tif") as file:
                assert np.array_equal(mask, file.read(1))
            seen += 1
    assert seen == count
    assert "target" not in next(iter(DatamoduleTiles(data)))


def test_masks_that_are_the_images_again_are_none(datamodule):
    data = datamodule()
    data.setup("fit")
    data.train_dataset.segmentation_mask_files = data.train_dataset.image_files
    assert "target" not in next(iter(DatamoduleTiles(data, labels=True)))


def test_a_datamodule_without_validation_images_is_refused(datamodule):
    data = datamodule()
    with pytest.raises(ConfigurationError, match="No val_dataset in GenericNonGeoSegmentationDataModule"):
        DatamoduleTiles(data, split="val", labels=True)


def run_of(trainer, data):
    made = trainer()
    data.setup("fit")
    data.trainer = made
    return SimpleNamespace(
        datamodule=data, strategy=made.strategy, precision_plugin=made.precision_plugin, precision=made.precision
    )


def test_regression_is_refused(trainer, task, scenes):
    splits = {
        f"{split}_{key}": scenes / folder
        for split in ("train", "val", "test")
        for key, folder in (("data_root", "images"), ("label_data_root", "masks"), ("split", f"splits/{split}.txt"))
    }
    data = GenericNonGeoPixelwiseRegressionDataModule(
        batch_size=8, num_workers=0, img_grep="*_image.tif", label_grep="*_mask.tif", means=[0.0] * 6, stds=[1.0] * 6,
        **splits,
    )  # fmt: skip
    with pytest.raises(LabelsError, match="regression"):
        check_split(run_of(trainer, data), task(), "train", 0)


def test_without_a_datamodule_there_are_no_labels(trainer, task):
    with pytest.raises(LabelsError, match="There is no datamodule, expected one with labels"):
        check_split(trainer(), task(), "train", 0)


def test_labels_of_images_from_a_datamodule(trainer, task, tmp_path):
    for split in ("train", "val"):
        for label, name in enumerate(("field", "lake")):
            for number in range(4):
                pixels = (1000 + 300 * layouts.smooth(6, 64, 64, seed=10 * number + label)).astype(np.float32)
                write(tmp_path / split / name / f"{number}.tif", pixels)
    data = GenericNonGeoClassificationDataModule(
        batch_size=3, num_workers=0, num_classes=2, train_data_root=tmp_path / "train", val_data_root=tmp_path / "val",
        test_data_root=tmp_path / "val", means=[1000.0] * 6, stds=[300.0] * 6,
    )  # fmt: skip
    found = labelled_rows(run_of(trainer, data), task(), "train", 0)
    assert found.features.shape == (12, 8, 192)
    assert sorted(found.labels.tolist()) == [0] * 4 + [1] * 4
    assert dict(zip(found.images.tolist(), found.labels.tolist(), strict=True)) == {i: i // 4 for i in range(8)}


# --- probes


def toy(count, seed, classes=4, gap=8.0, per_image=4):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) // per_image % classes
    features = torch.randn(count, 16, generator=generator)
    features[torch.arange(count), labels] += gap
    return ProbeSamples(features, labels, torch.arange(count) // per_image)


def probe(train, test):
    """Accuracy of both probes."""
    images = test.images.numpy()
    return {name: bootstrap_accuracy(each, images) for name, each in correct_by_probe(train, test).items()}


def test_separable_classes_are_told_apart_and_shuffled_ones_are_not():
    train, test = toy(400, 0), toy(200, 1)
    assert {name: tuple(found) for name, found in probe(train, test).items()} == {
        "knn": (1.0, 1.0, 1.0), "linear": (1.0, 1.0, 1.0),
    }  # fmt: skip
    order = torch.randperm(400, generator=torch.Generator().manual_seed(2))
    for found in probe(train._replace(labels=train.labels[order]), test).values():
        assert found.value == pytest.approx(0.25, abs=0.1)
        assert found.low < found.value < found.high
    noisy = probe(toy(400, 0, gap=1.0), toy(200, 1, gap=1.0))
    assert all(0.3 < found.value < 0.95 and found.low < found.value < found.high for found in noisy.values())


def test_a_probe_that_does_not_converge_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_predict(LogisticRegression(max_iter=1), toy(400, 0), toy(200, 1))


def test_whole_images_are_drawn():
    right = np.repeat(np.array([True, False] * 10), 50)
    images = np.arange(1000) // 50
    whole, single = bootstrap_accuracy(right, images), bootstrap_accuracy(right, np.arange(1000))
    assert whole.value == single.value == 0.5
    assert single.high - single.low == pytest.approx(4 * np.sqrt(0.25 / 1000), rel=0.1)
    assert whole.high - whole.low == pytest.approx(4 * np.sqrt(0.25 / 20), rel=0.15)
    assert bootstrap_accuracy(right, images) == whole
    worse = right & (images > 3)
    assert bootstrap_accuracy(worse.astype(int) - right, images).value == -0.1
    unequal = bootstrap_accuracy(np.array([True, True, True, False]), np.array([7, 7, 7, 9]))
    assert (unequal.value, unequal.low, unequal.high) == (0.75, 0.0, 1.0)


# --- all variants


def separable(count, seed):
    """Images whose patches show their class by their colour."""
    labels = labels_of(count, seed)
    tints = torch.randn(3, 6, generator=torch.Generator().manual_seed(9))
    noise = 0.1 * torch.randn(count, 6, 64, 64, generator=torch.Generator().manual_seed(seed))
    return tints[labels].permute(0, 3, 1, 2) + noise, labels


@pytest.fixture
def run(trainer, task, monkeypatch):
    """A task on images held in memory."""
    sources = {split: Tiles(images, extra={"target": labels})
               for split, (images, labels) in {"train": separable(24, 1), "val": separable(8, 2)}.items()}  # fmt: skip
    monkeypatch.setattr(
        "terratorch_simpler.lightning.labelled_images.labelled_source", lambda trainer, split, seed: sources[split]
    )
    return trainer(), task()


def test_every_variant_is_judged_by_the_features_it_would_answer(run, monkeypatch):
    made, model = run
    seen = []
    monkeypatch.setattr(
        "terratorch_simpler.sweep.probing.correct_by_probe", lambda *rows: seen.append(rows) or correct_by_probe(*rows)
    )
    intact = copy.deepcopy(find_backbone(model))
    find_backbone(model).prune_depth(range(3))
    variants = [Variant((0,)), Variant((0, 1)), Variant(tuple(range(12))), Variant((0, 6))]
    found = probe_variants(made, model, intact, variants, 0)
    assert find_backbone(model).num_blocks == 3  # its own is back
    assert intact.num_blocks == 12
    assert [set(columns) for columns in found] == [{
        "knn", "knn_low", "knn_high", "linear", "linear_low", "linear_high",
    }] * 4  # fmt: skip
    assert found[0]["linear"] > 0.9
    for variant, columns, judged in zip(variants, found, seen, strict=True):
        cut = copy.deepcopy(intact)
        cut.prune_depth(variant.kept)
        with replace_encoder(model, cut):
            rows = [labelled_rows(made, model, split, 0, readout=as_cut(cut)) for split in ("train", "val")]
        for part, of_judge in zip(rows, judged, strict=True):
            torch.testing.assert_close(part.features[-1], of_judge.features)
        alone = probe(*(ProbeSamples(part.features[-1], part.labels, part.images) for part in rows))
        assert columns["knn"] == alone["knn"].value
        assert columns["linear"] == pytest.approx(alone["linear"].value, abs=0.02)


def test_recovered_features_are_judged_beside_the_others(run):
    made, model = run
    intact = copy.deepcopy(find_backbone(model))
    variants = [Variant((0,)), Variant((0, 1)), Variant((0, 6))]
    depths = []

    def same(depth, output):
        depths.append(depth)
        return output

    found = probe_variants(made, model, intact, variants, 0, same)
    assert set(depths) == {1, 2}
    for columns in found[:2]:
        assert (columns["knn_recovered"], columns["linear_recovered"]) == (columns["knn"], columns["linear"])
        assert {columns[f"{name}_gain{end}"] for name in ("knn", "linear") for end in ("", "_low", "_high")} == {0}
    assert "knn_recovered" not in found[2]
    lost = probe_variants(made, model, intact, variants, 0, lambda depth, output: torch.randn_like(output))
    for columns in lost[:2]:
        assert columns["linear_recovered"] < 0.6
        assert columns["linear_gain"] == pytest.approx(columns["linear_recovered"] - columns["linear"])
        assert columns["linear_gain_low"] < columns["linear_gain"] < columns["linear_gain_high"] < 0


# --- the command


@pytest.fixture(scope="module")
def config(tmp_path_factory, scenes):
    folder = tmp_path_factory.mktemp("probe")
    path = demo.write_config(folder, scenes, demo.ENCODER)
    settings = yaml.safe_load(path.read_text())
    settings["trainer"]["callbacks"] = [{"class_path": "terratorch_simpler.SimplerCallback"}]
    settings["trainer"].update(enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    settings["data"]["init_args"].update(num_workers=0, predict_data_root=str(scenes / "images"))
    path.write_text(yaml.safe_dump(settings))
    return path


def test_the_command_probes_every_depth(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "120")  # the table has room for all columns
    monkeypatch.setattr("terratorch_simpler.sweep.cost.LARGEST_BATCH", 1)
    monkeypatch.setattr("terratorch_simpler.sweep.run.build_controls", lambda *_: iter(()))
    assert main(["sweep", "-c", str(config), "-o", str(tmp_path), "--probe", "--repeats", "1"]) == 0
    _, rows = read(tmp_path / "sweep.csv")
    assert len(rows) >= 12
    for row in rows:
        for name in ("knn", "linear"):
            low, value, high = (float(row[key]) for key in (f"{name}_low", name, f"{name}_high"))
            assert 0 <= low <= value <= high <= 1
        recovered = [row[f"{name}_recovered"] for name in ("knn", "linear")]
        if row["kept"] == " ".join(map(str, range(int(row["depth"])))):
            assert all(0 <= float(value) <= 1 for value in recovered)
            assert row["depth"] == "12" or float(row["recovery_r2"]) <= 1
        else:
            assert recovered == ["", ""]
    whole = next(row for row in rows if row["depth"] == "12")
    assert (whole["knn_recovered"], whole["linear_recovered"]) == (whole["knn"], whole["linear"])
    assert max(float(row["linear"]) for row in rows) > 0.5  # six classes
    assert "k-NN" in capsys.readouterr().out


def test_without_classes_nothing_is_computed(config, tmp_path, scenes, capsys, monkeypatch):
    monkeypatch.setattr("terratorch_simpler.lightning.selection.measure", lambda *a, **k: pytest.fail("streamed"))
    one = tmp_path / "masks"
    for path in (scenes / "masks").iterdir():
        with rasterio.open(path) as file:
            write(one / path.name, np.zeros_like(file.read()))
    args = ["--data.init_args.val_label_data_root", str(one)]
    assert main(["sweep", "-c", str(config), "-o", str(tmp_path / "out"), "--probe", *args]) == 2
    assert "Found only class 0 in the labels of the validation images" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
