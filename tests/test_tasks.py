"""Every task of TerraTorch that trains an encoder: selection, training, test, and test again from the checkpoint."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import yaml
from albumentations.pytorch import ToTensorV2
from lightning.pytorch import LightningDataModule, LightningModule
from terratorch import tasks as shipped
from terratorch.__main__ import main as terratorch_main
from terratorch.datamodules import (
    GenericMultiModalDataModule,
    GenericNonGeoClassificationDataModule,
    GenericNonGeoObjectDetectionDataModule,
    GenericNonGeoPixelwiseRegressionDataModule,
    GenericNonGeoSegmentationDataModule,
)
from terratorch.tasks import (
    ClassificationTask,
    EmbeddingGenerationTask,
    InferenceTask,
    MultiLabelClassificationTask,
    ObjectDetectionTask,
    PixelwiseRegressionTask,
    ReconstructionTask,
    ScalarRegressionTask,
    SemanticSegmentationTask,
    TerraTorchTask,
)
from torch.utils.data import DataLoader

from terratorch_simpler import GeoTiffTiles, SimplerCallback, SlimmingPlan, cli
from terratorch_simpler.errors import ConfigurationError
from terratorch_simpler.models.backbone import SimplerBackbone
from tests import layouts
from tests.cli_runner import MEANS, STDS
from tests.installed import shipped_classes, since
from tests.rasters import write

pytestmark = [
    pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.FewTilesWarning"),
    pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.UntrainedEncoderWarning"),
]
TINY = "simpler_prithvi_eo_v2_tiny_tl"
BANDS = ["BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2"]
NECKS = [
    {"name": "SelectIndices", "indices": [2, 5, 8, 11]},
    {"name": "ReshapeTokensToImage"},
    {"name": "LearnedInterpolateToPyramidal"},
]
UNET = {"decoder": "UNetDecoder", "decoder_channels": [16, 8, 8, 4]}
needs_embedding_tasks = pytest.mark.skipif(
    not hasattr(shipped, "EmbeddingClassificationTask"),
    reason="the installed TerraTorch has no tasks with estimators on features",
)


def backbone_of(task):
    return next(part for part in task.modules() if isinstance(part, SimplerBackbone))


def fit(trainer, tmp_path, task, datamodule, tiles=48, **kwargs):
    """Select, train, test, and test again from the checkpoint with a task that knows nothing of the cut."""
    callback = SimplerCallback(output_dir=str(tmp_path / "simpler"))
    run = trainer(callback, limit_train_batches=2, limit_val_batches=1, limit_test_batches=2, **kwargs)
    made = task()
    run.fit(made, datamodule=datamodule)
    plan = SlimmingPlan.load(tmp_path / "simpler" / "plan.json")
    assert plan.tiles_seen == tiles
    assert 2 <= len(plan.kept_blocks) <= 10
    assert backbone_of(made).num_blocks == len(plan.kept_blocks)
    run.save_checkpoint(tmp_path / "fit.ckpt")
    first = run.test(made, datamodule=datamodule, verbose=False)
    fresh = task()
    again = trainer(limit_test_batches=2).test(
        fresh, datamodule=datamodule, ckpt_path=tmp_path / "fit.ckpt", weights_only=True, verbose=False
    )
    assert backbone_of(fresh).kept == plan.kept_blocks
    assert first == pytest.approx(again, nan_ok=True) if isinstance(first, dict) else str(first) == str(again)
    return plan


SEGMENTATION = {
    "UNet": {"necks": NECKS, **UNET},
    "UPerNet": {"necks": NECKS, "decoder": "UperNetDecoder", "decoder_channels": 16},
    "FCN": {"necks": NECKS[:2], "decoder": "FCNDecoder", "decoder_channels": 16},
    "FCN without necks": {"decoder": "FCNDecoder", "decoder_channels": 16},
    "linear": {
        "necks": NECKS[:2], "decoder": "LinearDecoder", "decoder_upsampling_size": 16, "decoder_num_classes": 6,
    },
    "smp_Unet": {"necks": NECKS, "decoder": "smp_Unet", "decoder_decoder_channels": [8, 8, 4]},
    "smp_FPN": {"necks": NECKS, "decoder": "smp_FPN", "decoder_pyramid_channels": 8, "decoder_segmentation_channels": 8},
}  # fmt: skip


@pytest.mark.parametrize("decoder", SEGMENTATION)
def test_segmentation(trainer, tmp_path, datamodule, decoder):
    model_args = {"backbone": TINY, "num_classes": 6, **SEGMENTATION[decoder]}

    def task():
        torch.manual_seed(0)
        return SemanticSegmentationTask(model_factory="EncoderDecoderFactory", model_args=dict(model_args), ignore_index=-1)

    fit(trainer, tmp_path, task, datamodule())


def test_pixelwise_regression(trainer, tmp_path, scenes):
    splits = {
        f"{split}_{key}": scenes / folder
        for split in ("train", "val", "test")
        for key, folder in (("data_root", "images"), ("label_data_root", "masks"), ("split", f"splits/{split}.txt"))
    }
    datamodule = GenericNonGeoPixelwiseRegressionDataModule(
        batch_size=8, num_workers=0, img_grep="*_image.tif", label_grep="*_mask.tif", no_data_replace=0, means=MEANS,
        stds=STDS, **splits,
    )  # fmt: skip

    def task():
        torch.manual_seed(0)
        return PixelwiseRegressionTask(
            model_factory="EncoderDecoderFactory", model_args={"backbone": TINY, "necks": NECKS, **UNET}
        )

    fit(trainer, tmp_path, task, datamodule)


@pytest.fixture
def classes(tmp_path):
    for split, count in {"train": 24, "val": 4, "test": 4}.items():
        for label, name in enumerate(("field", "lake")):
            for number in range(count):
                pixels = (1000 + 300 * layouts.smooth(6, 64, 64, seed=10 * number + label)).astype(np.float32)
                write(tmp_path / "classes" / split / name / f"{number}.tif", pixels)
    return GenericNonGeoClassificationDataModule(
        batch_size=8, num_workers=0, num_classes=2, train_data_root=tmp_path / "classes/train",
        val_data_root=tmp_path / "classes/val", test_data_root=tmp_path / "classes/test", means=MEANS, stds=STDS,
    )  # fmt: skip


@pytest.mark.parametrize(
    "neck", [{"pooling": "cls"}, {"pooling": "mean", "drop_cls": True}, {"pooling": "mean", "indices": [5]}]
)
def test_classification(trainer, tmp_path, classes, neck):
    def task():
        torch.manual_seed(0)
        necks = [{"name": "AggregateTokens", **neck}]
        model_args = {"backbone": TINY, "necks": necks, "decoder": "IdentityDecoder", "num_classes": 2}
        return ClassificationTask(model_factory="EncoderDecoderFactory", model_args=model_args)

    fit(trainer, tmp_path, task, classes)


class Labeled(LightningDataModule):
    """40 images of two kinds, with a label that their number gives."""

    def __init__(self, label):
        super().__init__()
        self.label = label

    def setup(self, stage):
        samples = []
        for number in range(40):
            image = torch.from_numpy(layouts.smooth(6, 64, 64, seed=number)).float() + 2 * (number % 2)
            samples.append({"image": image, "label": torch.tensor(self.label(number))})
        self.train_dataset, self.val_dataset, self.test_dataset = samples, samples[:4], samples[4:12]

    def train_dataloader(self):
        return DataLoader(self.train_dataset, 8)

    def val_dataloader(self):
        return DataLoader(self.val_dataset, 4)

    def test_dataloader(self):
        return DataLoader(self.test_dataset, 4)


MEAN_TOKEN = [{"name": "AggregateTokens", "pooling": "mean", "drop_cls": True}]


def labels_of(number):
    return [number % 2, 1 - number % 2, int(number % 3 == 0)]


def test_multilabel_classification(trainer, tmp_path):
    def task():
        torch.manual_seed(0)
        model_args = {"backbone": TINY, "necks": MEAN_TOKEN, "decoder": "IdentityDecoder", "num_classes": 3}
        return MultiLabelClassificationTask(model_factory="EncoderDecoderFactory", model_args=model_args)

    fit(trainer, tmp_path, task, Labeled(labels_of), tiles=40)


def test_scalar_regression(trainer, tmp_path):
    def task():
        torch.manual_seed(0)
        model_args = {"backbone": TINY, "necks": MEAN_TOKEN, "decoder": "IdentityDecoder", "num_outputs": 1}
        return ScalarRegressionTask(model_factory="EncoderDecoderFactory", model_args=model_args)

    fit(trainer, tmp_path, task, Labeled(lambda number: [number / 40]), tiles=40)


def estimator_on_features(name, classes):
    torch.manual_seed(0)
    model_args = {
        "backbone": TINY, "necks": MEAN_TOKEN, "decoder": "SklearnDecoder", "decoder_num_classes": classes,
        "decoder_n_estimators": 5, "decoder_random_state": 0, "num_classes": classes,
    }  # fmt: skip
    return getattr(shipped, name)(model_args=model_args)


@needs_embedding_tasks
def test_an_estimator_on_features_of_several_labels(trainer, tmp_path):
    """The estimator is no module: TerraTorch keeps it in a file beside the checkpoint."""
    fit(trainer, tmp_path, lambda: estimator_on_features("EmbeddingClassificationTask", 3), Labeled(labels_of), tiles=40)


@needs_embedding_tasks
def test_an_estimator_on_features_of_the_pruned_encoder(trainer, tmp_path):
    """The task that the other is made of, which has neither validation nor test."""
    task = estimator_on_features("EmbeddingDecodingTask", 2)
    datamodule = Labeled(lambda number: number % 2)
    trainer(SimplerCallback(output_dir=str(tmp_path / "simpler")), limit_val_batches=0).fit(task, datamodule=datamodule)
    plan = SlimmingPlan.load(tmp_path / "simpler" / "plan.json")
    assert backbone_of(task).num_blocks == len(plan.kept_blocks) < plan.full_num_blocks
    # TerraTorch puts a linear layer that nobody trains behind the estimator, so its own answer is looked at.
    answers = []
    task.model.decoder.register_forward_hook(lambda _module, _args, output: answers.append(output))
    task.eval()(torch.stack([sample["image"] for sample in datamodule.train_dataset]))
    assert answers[0].argmax(dim=1).tolist() == [sample["label"].item() for sample in datamodule.train_dataset]


@pytest.fixture
def boxes(tmp_path):
    """Scenes with bright squares, and their boxes."""
    random = np.random.default_rng(0)
    for split, count in {"train": 40, "val": 4, "test": 4}.items():
        for number in range(count):
            pixels = 1000 + 300 * layouts.smooth(6, 64, 64, seed=number)
            row, column = random.integers(4, 36, 2)
            pixels[:, row : row + 20, column : column + 20] += 2000
            write(tmp_path / "boxes" / split / f"{number}.tif", pixels.astype(np.float32))
            found = {"boxes": [[int(column), int(row), int(column) + 20, int(row) + 20]], "labels": [1]}
            (tmp_path / "boxes" / split / f"{number}.json").write_text(json.dumps(found))
    return GenericNonGeoObjectDetectionDataModule(
        batch_size=4, num_workers=0, num_classes=2, img_grep="*.tif", train_data_root=tmp_path / "boxes/train",
        val_data_root=tmp_path / "boxes/val", test_data_root=tmp_path / "boxes/test", means=MEANS, stds=STDS,
        **{f"{split}_transform": [ToTensorV2()] for split in ("train", "val", "test")},
    )  # fmt: skip


def test_detection(trainer, tmp_path, boxes):
    def task():
        torch.manual_seed(0)
        return ObjectDetectionTask(
            model_factory="ObjectDetectionModelFactory",
            model_args={
                "backbone": TINY, "backbone_bands": BANDS, "necks": [*NECKS, {"name": "FeaturePyramidNetworkNeck"}],
                "framework": "faster-rcnn", "num_classes": 2,
            },
            boxes_field="boxes",
        )  # fmt: skip

    fit(trainer, tmp_path, task, boxes, tiles=40)


def terratorch(*args):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["terratorch", *map(str, args)])
        terratorch_main()


def test_embeddings_of_a_cut_encoder(tmp_path, scenes, monkeypatch, capsys):
    """A plan from unlabeled scenes, then embeddings of the encoder it describes: nothing is trained."""
    monkeypatch.chdir(tmp_path)
    data = {
        "class_path": "terratorch.datamodules.GenericNonGeoSegmentationDataModule",
        "init_args": {
            "batch_size": 8, "num_workers": 0, "num_classes": 6, "img_grep": "*_image.tif", "label_grep": "*_mask.tif",
            **{f"{split}_data_root": str(scenes / "images") for split in ("train", "val", "test", "predict")},
            "train_label_data_root": str(scenes / "masks"), "val_label_data_root": str(scenes / "masks"),
            "test_label_data_root": str(scenes / "masks"), "no_data_replace": 0, "means": MEANS, "stds": STDS,
        },
    }  # fmt: skip
    model = {
        "class_path": "terratorch.tasks.EmbeddingGenerationTask",
        "init_args": {
            "model_args": {"backbone": TINY, "backbone_pretrained": False}, "output_dir": "embeddings", "layers": [5, -1],
            "has_cls": True, "embedding_pooling": "mean", "output_format": "parquet",
        },
    }  # fmt: skip
    trainer = {
        "accelerator": "cpu", "precision": "32-true", "logger": False,
        "callbacks": [{"class_path": "terratorch_simpler.SimplerCallback"}],
    }  # fmt: skip
    config = {"seed_everything": 0, "trainer": trainer, "data": data, "model": model}
    Path("embed.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["plan", "-c", "embed.yaml", "-o", "chosen"]) == 0, capsys.readouterr().err
    plan = SlimmingPlan.load("chosen/plan.json")
    model["init_args"]["model_args"]["backbone_plan"] = "chosen/plan.json"
    Path("embed.yaml").write_text(yaml.safe_dump(config))
    terratorch("predict", "--config", "embed.yaml", "--predict_output_dir", "embeddings")
    written = sorted(Path("embeddings").rglob("*.parquet"))
    assert written
    task = EmbeddingGenerationTask(**{**model["init_args"], "output_dir": str(tmp_path / "again")})
    assert backbone_of(task).num_blocks == len(plan.kept_blocks)


def flood_config(tmp_path):
    roots = {f"{split}_data_root": "S2Hand" for split in ("train", "val", "test", "predict")}
    labels = {f"{split}_label_data_root": "LabelHand" for split in ("train", "val", "test")}
    lists = {f"{split}_split": f"splits/{split}.txt" for split in ("train", "val", "test")}
    bands = list(range(13))
    return {
        "seed_everything": 0,
        "trainer": {
            "accelerator": "cpu", "precision": "32-true", "max_epochs": 2, "log_every_n_steps": 1,
            "enable_checkpointing": True, "enable_progress_bar": False, "enable_model_summary": False,
            "callbacks": [{"class_path": "terratorch_simpler.SimplerCallback"}],
        },
        "data": {
            "class_path": "terratorch.datamodules.GenericNonGeoSegmentationDataModule",
            "init_args": {
                "batch_size": 8, "num_workers": 0, "num_classes": 2, "img_grep": "*_S2Hand.tif",
                "label_grep": "*_LabelHand.tif",
                **roots, **labels, **lists, "dataset_bands": bands, "output_bands": bands, "rgb_indices": [3, 2, 1],
                "no_data_replace": 0, "no_label_replace": -1,
                # TerraMind's own statistics of L1C.
                "means": [2357.089, 2137.385, 2018.788, 2082.986, 2295.651, 2854.537, 3122.849, 3040.56, 3306.481, 1473.847,
                          506.07, 2472.825, 1838.929],
                "stds": [1624.683, 1675.806, 1557.708, 1833.702, 1823.738, 1733.977, 1732.131, 1679.732, 1727.26, 1024.687,
                         442.165, 1331.411, 1160.419],
            },
        },
        "model": {
            "class_path": "terratorch.tasks.SemanticSegmentationTask",
            "init_args": {
                "model_factory": "EncoderDecoderFactory",
                "model_args": {
                    "backbone": "simpler_terramind_v1_tiny", "backbone_pretrained": False, "backbone_modalities": ["S2L1C"],
                    "necks": [NECKS[0], {"name": "ReshapeTokensToImage", "remove_cls_token": False}, NECKS[2]], **UNET,
                    "num_classes": 2,
                },
                "loss": "ce", "ignore_index": -1,
            },
        },
    }  # fmt: skip


def test_real_floods_with_terramind_through_fit_resume_test_and_predict(shared_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layouts.floods(tmp_path, shared_data)
    Path("floods.yaml").write_text(yaml.safe_dump(flood_config(tmp_path)))
    terratorch("fit", "--config", "floods.yaml")
    logs = next(Path("lightning_logs").iterdir())
    plan = SlimmingPlan.load(logs / "simpler/plan.json")
    assert plan.tiles_seen == 40
    assert plan.data["input_shape"] == [13, 64, 64]
    full = next(path for path in (logs / "checkpoints").glob("*.ckpt") if "state_dict" not in path.name)
    terratorch("fit", "--config", "floods.yaml", "--ckpt_path", full, "--trainer.max_epochs", 3)
    terratorch("test", "--config", "floods.yaml", "--ckpt_path", full, "--trainer.logger", "false")
    out = ("--predict_output_dir", "out", "--trainer.logger", "false")
    terratorch(
        "predict", "--config", logs / "config_deploy.yaml", "--ckpt_path", full, *out, "--trainer.precision", "32-true"
    )
    predicted = sorted(Path("out").glob("*.tif"))
    assert len(predicted) == 48
    with rasterio.open(predicted[0]) as source:
        assert source.crs.to_epsg() == 32632  # that of the chips
        assert set(np.unique(source.read())) <= {0, 1}


def test_time_series_with_a_temporal_wrapper_around_terramind(trainer, tmp_path):
    """Frames pass the encoder as separate images: rows come from all of them."""
    bands = list(range(12))
    for split, count in {"train": 32, "val": 2, "test": 2}.items():
        for number in range(count):
            pixels = (2000 + 500 * layouts.smooth(36, 32, 32, seed=number)).astype(np.float32)
            write(tmp_path / split / f"{number}_image.tif", pixels)
            write(tmp_path / split / f"{number}_mask.tif", (pixels[:1] > 2000).astype(np.uint8))
    roots = {f"{s}_{kind}": tmp_path / s for s in ("train", "val", "test") for kind in ("data_root", "label_data_root")}
    datamodule = GenericNonGeoSegmentationDataModule(
        batch_size=8, num_workers=0, num_classes=2, img_grep="*_image.tif", label_grep="*_mask.tif", **roots,
        dataset_bands=bands, output_bands=bands, rgb_indices=[3, 2, 1], expand_temporal_dimension=True, no_data_replace=0,
        means=[2000.0] * 12, stds=[600.0] * 12,
    )  # fmt: skip

    def task():
        torch.manual_seed(0)
        necks = [NECKS[0], {"name": "ReshapeTokensToImage", "remove_cls_token": False}, NECKS[2]]
        model_args = {
            "backbone": "simpler_terramind_v1_tiny", "backbone_modalities": ["S2L2A"], "backbone_use_temporal": True,
            "backbone_temporal_pooling": "mean", "necks": necks, **UNET, "num_classes": 2,
        }  # fmt: skip
        return SemanticSegmentationTask(model_factory="EncoderDecoderFactory", model_args=model_args, ignore_index=-1)

    plan = fit(trainer, tmp_path, task, datamodule, tiles=32)
    assert plan.data["input_shape"] == [12, 32, 32]
    assert plan.rows_seen == 32 * 12  # 4 patches in each of 3 frames


@pytest.mark.parametrize("own_means", [True, False])
def test_geotiff_tiles_for_one_modality(shared_data, tmp_path, trainer, monkeypatch, own_means):
    """Unlabeled Sentinel-2 scenes beside a datamodule of modalities, with their own means or the datamodule's."""
    layouts.land_cover(tmp_path, shared_data)
    root = tmp_path / "land_cover"
    means, stds = [1500.0] * 12, [1000.0] * 12
    datamodule = GenericMultiModalDataModule(
        task="segmentation", batch_size=8, num_classes=10, modalities=["S2L2A"], image_grep={"S2L2A": "*_S2L2A.tif"},
        label_grep="*_LULC.tif", means={"S2L2A": means}, stds={"S2L2A": stds}, no_data_replace=0,
        **{f"{split}_data_root": {"S2L2A": str(root / split / "S2L2A")} for split in ("train", "val", "test")},
        **{f"{split}_label_data_root": str(root / split / "LULC") for split in ("train", "val", "test")},
    )  # fmt: skip
    torch.manual_seed(0)
    task = SemanticSegmentationTask(
        model_factory="EncoderDecoderFactory",
        model_args={
            "backbone": "simpler_terramind_v1_tiny", "backbone_modalities": ["S2L2A"], **UNET, "num_classes": 10,
            "necks": [NECKS[0], {"name": "ReshapeTokensToImage", "remove_cls_token": False}, NECKS[2]],
        },
        ignore_index=-1,
    )  # fmt: skip
    seen = []
    handle = backbone_of(task).register_forward_pre_hook(
        lambda _module, args: seen.append(args[0]["S2L2A"] if isinstance(args[0], dict) else args[0])
    )
    statistics = {"means": means, "stds": stds} if own_means else {}
    tiles = GeoTiffTiles(str(shared_data / "terramind_examples/S2L2A"), 32, num_workers=0, **statistics)
    callback = SimplerCallback(tiles=tiles, output_dir=str(tmp_path / "simpler"), min_tiles=32, max_tiles=64)
    trainer(callback, limit_train_batches=1, limit_val_batches=1).fit(task, datamodule=datamodule)
    handle.remove()
    first = next(iter(GeoTiffTiles(str(shared_data / "terramind_examples/S2L2A"), 32, num_workers=0)))["image"]
    torch.testing.assert_close(seen[0], (first - 1500.0) / 1000.0)
    assert SlimmingPlan.load(tmp_path / "simpler/plan.json").tiles_seen == 64


def a_whole_model(name):
    """Tasks around models that have no backbone of TerraTorch's registry."""
    if name == "ReconstructionTask":
        return ReconstructionTask("FullModelFactory", {"model": torch.nn.Conv2d(6, 6, 1)})
    return InferenceTask(model=torch.nn.Conv2d(6, 6, 1))


@pytest.mark.parametrize("name", ["ReconstructionTask", "InferenceTask"])
def test_tasks_of_whole_models_are_refused(trainer, tmp_path, name):
    task = a_whole_model(name)
    run = trainer(SimplerCallback(output_dir=str(tmp_path / "simpler")))
    run.strategy.connect(task)
    with pytest.raises(
        ConfigurationError, match=f"^There is no SimplerBackbone in {name}, expected one .* 'simpler_': write"
    ):
        run.callbacks[0].setup(run, task, "fit")
    assert not (tmp_path / "simpler").exists()


TASKS = {
    "ClassificationTask": test_classification,
    "EmbeddingGenerationTask": test_embeddings_of_a_cut_encoder,
    "InferenceTask": test_tasks_of_whole_models_are_refused,
    "MultiLabelClassificationTask": test_multilabel_classification,
    "ObjectDetectionTask": test_detection,
    "PixelwiseRegressionTask": test_pixelwise_regression,
    "ReconstructionTask": test_tasks_of_whole_models_are_refused,
    "ScalarRegressionTask": test_scalar_regression,
    "SemanticSegmentationTask": test_segmentation,
    **since(
        "1.2.12",
        {
            "EmbeddingClassificationTask": test_an_estimator_on_features_of_several_labels,
            "EmbeddingDecodingTask": test_an_estimator_on_features_of_the_pruned_encoder,
        },
    ),
}
"""Every task, and the test that tries it."""

WITHOUT_A_TEST = {
    "TerraTorchTask": "a base class",
    "ECCCTask": "needs granitewxc, and builds its model without a registry",
    "WxCDownscalingTask": "needs granitewxc",
    "WxCTask": "its factory, WxCModelFactory, is refused: test_source.py",
}


def test_there_is_a_row_for_every_task_that_is_installed():
    found, missing = shipped_classes(shipped, LightningModule, "Task")
    assert found | missing == TASKS.keys() | WITHOUT_A_TEST.keys()
    assert issubclass(SemanticSegmentationTask, TerraTorchTask)
