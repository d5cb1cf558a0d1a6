"""What an exported model says of itself: the description in graphs, and the model card beside every format."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version

import fsspec
import numpy as np
import pytest
import torch
import yaml
from terratorch.datamodules import GenericMultiModalDataModule, GenericNonGeoSegmentationDataModule
from torchgeo.datamodules import EuroSATDataModule

from terratorch_simpler import SlimmingPlan, cli
from terratorch_simpler.errors import SimplerWarning
from terratorch_simpler.export import describe, find_plan, load_trained, may_write_card, write_card
from terratorch_simpler.export.card import NORMALIZATION
from terratorch_simpler.plan import Verdict
from tests.extras import needs_onnx

NAME = "prithvi_eo_v2_tiny_tl"
BANDS = ["BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2"]
MEANS = [529.7, 865.58, 1026.29, 2071.0, 1959.32, 1365.22]
STDS = [424.3, 480.25, 680.5, 1020.1, 1000.75, 780.1]
SMALL = {
    "backbone": f"simpler_{NAME}", "backbone_bands": BANDS, "decoder": "FCNDecoder", "decoder_channels": 8,
    "decoder_num_convs": 1, "num_classes": 2, "class_names": ["land", "water"],
}  # fmt: skip
TIMM = {"backbone": "simpler_timm_vit_tiny_patch16_224", "decoder": "FCNDecoder", "decoder_channels": 8, "num_classes": 2}
DATA = {
    "batch_size": 2, "num_workers": 0, "num_classes": 2, "train_data_root": "a", "val_data_root": "b", "test_data_root": "c",
    "dataset_bands": BANDS, "output_bands": BANDS, "means": MEANS, "stds": STDS, "constant_scale": 0.5,
}  # fmt: skip
PLAN = SlimmingPlan(
    NAME, 12, (0, 1), {"name": "simpler", "args": {}}, parameters={"before": 5_000_000, "after": 900_000},
    verdict=Verdict("weak", ("One resample in three keeps more.",)),
)  # fmt: skip


@pytest.fixture
def exported(trained, tmp_path, capsys):
    """A folder that the command has exported to, of a fit whose plan lies in its usual place."""

    def export(*formats):
        _, config, checkpoint = trained([0, 1], **SMALL)
        config["data"] = {"class_path": "terratorch.datamodules.GenericNonGeoSegmentationDataModule", "init_args": DATA}
        config["trainer"]["callbacks"][0]["init_args"] = {"output_dir": str(tmp_path / "chosen")}
        PLAN.save(tmp_path / "chosen" / "plan.json")
        (tmp_path / "fit.yaml").write_text(yaml.safe_dump(config))
        folder = tmp_path / "out"
        files = ["-c", str(tmp_path / "fit.yaml"), "--ckpt_path", str(checkpoint), "-o", str(folder)]
        assert cli.main(["export", *files, "--image_size", "64", "--formats", *formats]) == 0
        assert str(folder / "README.md") in capsys.readouterr().out
        return folder

    return export


def card(folder):
    """Front matter and text."""
    _, front, text = (folder / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def check(about):
    assert about["backbone"] == NAME
    assert (about["full_num_blocks"], about["kept_blocks"], about["width"]) == (12, [0, 1], 1.0)
    assert (about["bands"], about["means"], about["stds"], about["scale"]) == (BANDS, MEANS, STDS, 0.5)
    assert about["class_names"] == ["land", "water"]
    assert about["inputs"] == {"image": [6, 64, 64]}
    assert about["image_size"] == [64, 64]
    assert about["must_normalize"] is True
    assert about["normalized_by"] == "GenericNonGeoSegmentationDataModule"
    assert about["criterion"] == "simpler"
    assert about["verdict"] == {"level": "weak", "reasons": list(PLAN.verdict.reasons)}
    assert about["parameters"]["before"] == 5_000_000 > about["parameters"]["after"]
    assert about["license"] is None  # the weights are random
    assert about["versions"]["torch"] == version("torch")


@needs_onnx
def test_graphs_know_what_they_are_and_their_cards_run(exported):
    import onnxruntime

    folder = exported("onnx", "pt2")
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    check({name: json.loads(text) for name, text in session.get_modelmeta().custom_metadata_map.items()})
    files = {"description.json": ""}
    torch.export.load(folder / "model.pt2", extra_files=files)
    check(json.loads(files["description.json"]))
    front, text = card(folder)
    assert front["library_name"] == "onnx"
    assert {"terratorch", "onnx", "pt2"} <= set(front["tags"])
    assert front["pipeline_tag"] == "image-segmentation"
    assert not {"license", "base_model"} & front.keys()
    programs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(programs) == 2
    for program in programs:
        done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() in ("(1, 2, 64, 64)", "torch.Size([1, 2, 64, 64])")


def test_without_a_datamodule_nothing_is_guessed(trained):
    task, config, checkpoint = trained([0, 1], **SMALL)
    about = describe(load_trained(config, checkpoint))
    assert (about.means, about.stds, about.scale, about.normalized_by, about.must_normalize) == (None,) * 5
    assert (about.criterion, about.verdict) == (None, None)
    assert about.bands == BANDS  # those of the backbone
    assert about.image_size == [224, 224]
    full = {**task.hparams["model_args"], "backbone_keep": None}
    intact = describe(load_trained(*trained(None, **full)[1:])).parameters["after"]
    assert about.parameters == {"before": intact, "after": sum(p.numel() for p in task.model.encoder.parameters())}


def of_kornia():
    datamodule = EuroSATDataModule(root="none")  # which sets its own statistics
    return datamodule, datamodule.mean.tolist()


def without_means():
    return GenericNonGeoSegmentationDataModule(**{**DATA, "means": None, "stds": None}), None


@pytest.mark.parametrize("make", [of_kornia, without_means])
def test_normalization_is_what_the_datamodule_does_in_prediction(trained, make):
    _, config, checkpoint = trained([0, 1], **SMALL)
    datamodule, means = make()
    about = describe(load_trained(config, checkpoint), datamodule)
    assert about.means == (None if means is None else pytest.approx(means))
    assert about.must_normalize is (means is not None)
    assert about.normalized_by == (None if means is None else "EuroSATDataModule")


NAMES = {"S2L2A": ["RED", "NIR"], "S1RTC": ["VV", "VH"]}


def of_modalities(**more):
    roots = {f"{split}_data_root": dict.fromkeys(NAMES, split) for split in ("train", "val", "test")}
    labels = {f"{split}_label_data_root": split for split in ("train", "val", "test")}
    return GenericMultiModalDataModule(
        batch_size=2, num_workers=0, num_classes=2, modalities=list(NAMES), rgb_modality="S2L2A", task="segmentation",
        means={"S2L2A": [1.0, 2.0], "S1RTC": [3.0, 4.0]}, stds={"S2L2A": [5.0, 6.0], "S1RTC": [7.0, 8.0]},
        output_bands=NAMES, **roots, **labels, **more,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:rgb_modality is deprecated")
def test_modalities_have_their_own_values(trained, tmp_path):
    necks = [{"name": "SelectIndices", "indices": [2, 5, 8, 11]}, {"name": "ReshapeTokensToImage"}]
    stack = {"necks": necks, "decoder": "FCNDecoder", "decoder_channels": 8, "num_classes": 2}
    _, config, checkpoint = trained([0, 1], backbone="simpler_terramind_v1_tiny", backbone_modalities=list(NAMES), **stack)
    about = describe(load_trained(config, checkpoint), of_modalities(constant_scale={"S2L2A": 0.1}))
    assert list(about.inputs) == list(NAMES)
    assert about.bands == NAMES
    assert about.means == {"S2L2A": [1.0, 2.0], "S1RTC": [3.0, 4.0]}
    assert about.stds == {"S2L2A": [5.0, 6.0], "S1RTC": [7.0, 8.0]}
    assert about.scale == {"S2L2A": 0.1, "S1RTC": 1.0}
    assert "S2L2A: RED, NIR; S1RTC: VV, VH" in write_card(about, tmp_path, ["onnx"]).read_text()
    stack["backbone_modalities"] = ["S1RTC"]
    _, config, checkpoint = trained([0, 1], backbone="simpler_terramind_v1_tiny", **stack)
    about = describe(load_trained(config, checkpoint), of_modalities())
    assert (list(about.inputs), about.bands, about.means, about.scale) == (["image"], ["VV", "VH"], [3.0, 4.0], 1.0)


@pytest.mark.filterwarnings("ignore:rgb_modality is deprecated")
@pytest.mark.parametrize(("scale", "known"), [(None, 1.0), (0.5, 0.5), ({"S2L2A": 0.1, "S1RTC": 1.0}, None)])
def test_modalities_in_one_image_are_one_after_another(trained, scale, known):
    bands = ["RED", "NIR_NARROW", "SWIR_1", "SWIR_2"]
    _, config, checkpoint = trained([0, 1], **{**SMALL, "backbone_bands": bands})
    scale = dict.fromkeys(NAMES, scale) if isinstance(scale, float) else scale
    about = describe(load_trained(config, checkpoint), of_modalities(concat_bands=True, constant_scale=scale))
    assert about.bands == ["RED", "NIR", "VV", "VH"]
    assert (about.means, about.stds) == ([1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0])
    assert about.scale == known
    assert about.must_normalize is (True if known else None)  # by what is not known in full


@pytest.mark.filterwarnings("ignore:rgb_modality is deprecated")
def test_code_of_the_card_normalizes_as_terratorch_does():
    torch.manual_seed(0)
    images = {"S2L2A": torch.randn(1, 2, 8, 8), "S1RTC": torch.randn(1, 2, 3, 8, 8)}
    datamodule = of_modalities()
    expected = datamodule.aug({"image": {"S2L2A": 0.1 * images["S2L2A"], "S1RTC": images["S1RTC"].clone()}})["image"]
    about = {"scale": {"S2L2A": 0.1, "S1RTC": 1.0}, "means": datamodule.aug.means, "stds": datamodule.aug.stds}
    found = {name: image.numpy() for name, image in images.items()}
    exec(NORMALIZATION, {"np": np, "about": about, "images": found})
    assert all(np.allclose(found[name], expected[name], atol=1e-6) for name in images)
    found = {"image": images["S1RTC"].numpy()}
    exec(NORMALIZATION, {"np": np, "about": {"scale": 1.0, "means": [3.0, 4.0], "stds": [7.0, 8.0]}, "images": found})
    assert np.allclose(found["image"], expected["S1RTC"], atol=1e-6)


@pytest.mark.parametrize(
    ("stack", "repository"),
    [
        (SMALL, "ibm-nasa-geospatial/Prithvi-EO-2.0-tiny-TL"),
        (TIMM, "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"),
        ({**SMALL, "backbone_ckpt_path": "gone.pt"}, None),
        ({**TIMM, "backbone_ckpt_path": "gone.pt"}, None),
    ],
    ids=["Prithvi", "timm", "own file", "own file of timm"],
)
def test_base_model_is_that_of_the_hub(trained, tmp_path, stack, repository):
    own = stack.pop("backbone_ckpt_path", None)
    _, config, checkpoint = trained([0, 1], **stack)
    content = torch.load(checkpoint, weights_only=True)
    content["hyper_parameters"]["model_args"] |= {"backbone_pretrained": True, "backbone_ckpt_path": own}
    torch.save(content, checkpoint)
    about = describe(load_trained(config, checkpoint))
    assert (about.base_model, about.license) == (repository, repository and "apache-2.0")
    front, _ = card(write_card(about, tmp_path, ["pt2"]).parent)
    assert front["library_name"] == "pytorch"
    assert (front.get("license"), front.get("base_model")) == (about.license, about.base_model)


def test_a_readme_of_somebody_else_is_kept(trained, tmp_path):
    _, config, checkpoint = trained([0, 1], **SMALL)
    about = describe(load_trained(config, checkpoint))
    assert may_write_card(tmp_path)
    write_card(about, tmp_path, ["pt2"])
    assert may_write_card(tmp_path)  # our own is written anew
    (tmp_path / "README.md").write_text("# Mine")
    with pytest.warns(SimplerWarning, match=r"Found a README\.md in .* that terratorch-simpler has not written"):
        assert not may_write_card(tmp_path)
    with fsspec.open("memory://cards/README.md", "w") as file:
        file.write("# Mine")
    with pytest.warns(SimplerWarning, match="memory://cards"):
        assert not may_write_card("memory://cards")
    assert may_write_card("memory://elsewhere")


def test_only_the_plan_that_made_the_model_is_told(trained, tmp_path):
    _, config, checkpoint = trained([0, 1], **SMALL)
    loaded = load_trained(config, checkpoint)
    assert find_plan(loaded, config, checkpoint) is None
    logs = tmp_path / "logs"
    config["trainer"]["callbacks"][0]["init_args"] = {"plan": str(tmp_path / "other.json"), "output_dir": str(tmp_path)}
    replace(PLAN, kept_blocks=(0, 1, 2)).save(tmp_path / "other.json")
    (tmp_path / "plan.json").write_text("{}")
    assert find_plan(loaded, config, checkpoint) is None
    PLAN.save(logs / "simpler" / "plan.json")
    assert find_plan(loaded, config, logs / "checkpoints" / "best.ckpt") == PLAN
