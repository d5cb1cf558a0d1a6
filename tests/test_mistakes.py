"""What our commands say of a mistake in a config: one sentence with the cause and what to do, and status 2."""

import copy

import huggingface_hub.constants
import pytest
import yaml
from terratorch.registry import BACKBONE_REGISTRY

from terratorch_simpler import DownloadError
from terratorch_simpler.cli import main
from terratorch_simpler.errors import ConfigurationError, SimplerWarning
from terratorch_simpler.terratorch import hub
from terratorch_simpler.terratorch.command_line import build_run
from tests.cli_runner import config as run_config

MODEL = "model.init_args.model_args"
CALLBACK = "trainer.callbacks.0.init_args"
MISTAKES = {
    f"{CALLBACK}.min_tile": (16, "SimplerCallback takes no argument 'min_tile' (did you mean 'min_tiles'?)"),
    f"{CALLBACK}.min_tiles": ("many", "SimplerCallback got 'many' for min_tiles, expected a whole number"),
    f"{CALLBACK}.on_unsettled": ("stop", "got 'stop' for on_unsettled, expected one of 'apply', 'half', 'intact', 'error'"),
    f"{CALLBACK}.criterion": ("cka", "Found criterion 'cka', expected one of angular, block_influence"),
    f"{CALLBACK}.plan": ("gone.json", "There is no readable plan at gone.json"),
    "trainer.callbacks.0.class_path": (
        "terratorch_simpler.SimplerCalback",
        "terratorch_simpler has no class 'SimplerCalback' (did you mean 'SimplerCallback'?)",
    ),
    "trainer.max_epoch": (3, "has a setting 'trainer.max_epoch' (did you mean 'trainer.max_epochs'?)"),
    "trainer.max_steps": ("few", "sets trainer.max_steps to 'few', expected a whole number"),
    "model.class_path": (
        "terratorch.tasks.SemanticSegmentatonTask",
        "terratorch.tasks has no class 'SemanticSegmentatonTask' (did you mean 'SemanticSegmentationTask'?)",
    ),
    "model.init_args.model_factory": (
        "EncoderDecodrFactory",
        "TerraTorch knows no model_factory 'EncoderDecodrFactory' (did you mean 'EncoderDecoderFactory'?)",
    ),
    f"{MODEL}.backbone": (
        "simpler_prithvi_eo_v2_tiny",
        "knows no backbone 'prithvi_eo_v2_tiny' for 'simpler_prithvi_eo_v2_tiny' (did you mean "
        "'simpler_prithvi_eo_v2_tiny_tl'?)",
    ),
    f"{MODEL}.backbone ": ("prithvi_eo_v2_tinytl", "'prithvi_eo_v2_tinytl' (did you mean 'prithvi_eo_v2_tiny_tl'?)"),
    f"{MODEL}.backbone_kep": (4, "takes no argument 'backbone_kep' (did you mean 'backbone_keep'?)"),
    f"{MODEL}.backbone_keep": (24, "Found keep 24, expected 1 to 12"),
    f"{MODEL}.pretraned": (True, "No part of the model takes pretraned of model_args"),
    f"{MODEL}.decoder": ("UnetDecoder", "knows no decoder 'UnetDecoder' (did you mean 'UNetDecoder'?)"),
    f"{MODEL}.decoder_chanels": ([16, 8, 8, 4], "takes no argument 'chanels' (did you mean 'decoder_channels'?)"),
    f"{MODEL}.necks.0.indices": (
        [5, 11, 17, 23],
        "neck SelectIndices takes the outputs [5, 11, 17, 23], expected indices from 0 to 11, since the encoder gives 12",
    ),
    f"{MODEL}.necks.0.name": ("SelectIndex", "knows no neck 'SelectIndex' (did you mean 'SelectIndices'?)"),
    "data.class_path": (
        "terratorch.datamodules.GenericSegmentationDataModule",
        "has no class 'GenericSegmentationDataModule' (did you mean 'GenericNonGeoSegmentationDataModule'?)",
    ),
    "data.init_args.batch_sise": (4, "takes no argument 'batch_sise' (did you mean 'batch_size'?)"),
    "data.init_args.train_data_root": ("/nowhere", "No training images in GenericNonGeoSegmentationDataModule (data root"),
    "data.init_args.means": ([1.0, 2.0], "means has 2 values for tiles with 6 bands"),
}  # fmt: skip


@pytest.fixture
def settings(tmp_path, scenes, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return run_config(scenes, tmp_path)


def written(settings, key=None, value=None):
    """The path of a config with one setting changed."""
    settings = copy.deepcopy(settings)
    settings["trainer"]["callbacks"] = settings["trainer"]["callbacks"][:1]
    if key is not None:
        place, *names = settings, *key.strip().split(".")
        for name in names[:-1]:
            place = place[int(name) if name.isdigit() else name]
        place[names[-1]] = value
    with open("config.yaml", "w") as file:
        yaml.safe_dump(settings, file)
    return "config.yaml"


def said(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("terratorch-simpler")]
    assert len(lines) == 1
    assert "Union" not in lines[0]
    assert len(lines[0]) < 500
    return lines[0]


@pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.SimplerWarning")
@pytest.mark.parametrize("key", MISTAKES)
def test_a_mistake_in_a_config_is_one_sentence_and_status_2(settings, capsys, key):
    value, expected = MISTAKES[key]
    assert main(["plan", "-c", written(settings, key, value)]) == 2
    assert expected in said(capsys)


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        ("plan", ["--ckpt_path", "gone.ckpt"], "The checkpoint gone.ckpt does not exist"),
        ("plan", ["-o", "config.yaml/out"], "expected a folder to write to"),
        ("plan", ["--data.init_args.batch_sise", "4"], "takes no argument 'batch_sise' (did you mean 'batch_size'?)"),
        ("plan", ["--data.init_args.batch_size", "four"], "got 'four' for batch_size, expected a whole number"),
        ("sweep", ["--widths", "2"], "--widths takes shares above 0 and up to 1"),
        ("export", ["--ckpt_path", "gone.ckpt", "-o", "out"], "The checkpoint gone.ckpt does not exist"),
        ("export", ["--ckpt_path", "config.yaml", "-o", "out"], "There is no readable checkpoint at config.yaml"),
        ("export", ["--ckpt_path", "config.yaml", "-o", "config.yaml/out"], "expected a folder to write to"),
    ],
)
def test_a_mistake_in_the_arguments_is_one_sentence_and_status_2(settings, capsys, command, arguments, expected):
    assert main([command, "-c", written(settings), *arguments]) == 2
    assert expected in said(capsys)


@pytest.mark.parametrize("option", ["--output-dir", "--on-unsettled", "--outputdir"])
def test_a_typo_of_an_option_of_ours_is_seen_before_terratorch_reads_anything(settings, capsys, monkeypatch, option):
    monkeypatch.setattr("terratorch_simpler.commands.build_run", lambda *_: pytest.fail("read"))
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "-c", written(settings), option, "x"])
    assert stopped.value.code == 2
    assert f"unrecognized arguments: {option} (did you mean '--o" in said(capsys)


@pytest.mark.parametrize("answers", [True, False])
def test_weights_that_cannot_be_fetched(settings, capsys, monkeypatch, tmp_path, answers):
    """A Hub that does not answer is asked once; a typo of ours would have waited half a minute."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", answers)  # as in HF_HUB_OFFLINE=1
    monkeypatch.setattr(hub, "_answers", lambda: False)
    model = settings["model"]["init_args"]["model_args"]
    model["backbone_pretrained"] = True
    del model["backbone_embed_dim"], model["backbone_num_heads"]
    assert main(["plan", "-c", written(settings)]) == 1
    line = said(capsys)
    assert all(part in line for part in ("prithvi_eo_v2_tiny_tl", "HF_HOME", "backbone_ckpt_path", str(tmp_path / "empty")))
    with pytest.raises(DownloadError):
        BACKBONE_REGISTRY.build("simpler_prithvi_eo_v2_tiny_tl", pretrained=True)
    assert huggingface_hub.constants.HF_HUB_OFFLINE is answers


def test_weights_that_do_not_exist(settings, capsys):
    settings["model"]["init_args"]["model_args"] |= {"backbone_pretrained": True, "backbone_ckpt_path": "gone.pt"}
    assert main(["plan", "-c", written(settings)]) == 2
    assert "There is no file gone.pt, expected one with weights: change backbone_ckpt_path" in said(capsys)


def test_a_checkpoint_of_another_task_is_not_exported(settings, capsys):
    run = build_run(["-c", written(settings)])
    run.trainer.strategy.connect(run.model)
    run.trainer.save_checkpoint("fit.ckpt")
    other = written(settings, "model.class_path", "terratorch.tasks.PixelwiseRegressionTask")
    assert main(["export", "-c", other, "--ckpt_path", "fit.ckpt", "-o", "plain"]) == 2
    line = said(capsys)
    assert "checkpoint fit.ckpt is of a SemanticSegmentationTask, but the config describes a PixelwiseRegressionTask" in line


@pytest.mark.parametrize(
    ("bands", "expected"),
    [
        (["BLUE", "GREN"], "knows no band 'GREN' (did you mean 'GREEN'?)"),
        (None, "needs backbone_model_bands"),
    ],
)
def test_bands_that_an_encoder_does_not_know(settings, capsys, bands, expected):
    model = settings["model"]["init_args"]["model_args"]
    for key in ("backbone_embed_dim", "backbone_num_heads"):
        del model[key]
    model["backbone"] = "simpler_dofa_small_patch16_224"
    if bands:
        model["backbone_model_bands"] = bands
    assert main(["plan", "-c", written(settings)]) == 2
    assert expected in said(capsys)


def test_bands_that_prithvi_has_no_weights_for(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.warns(SimplerWarning, match="weights for NIR, VV are random"), pytest.raises(DownloadError):
        BACKBONE_REGISTRY.build(
            "simpler_prithvi_eo_v2_tiny_tl", pretrained=True, bands=["BLUE", "NIR", "HLSBands.RED", "VV"]
        )


def test_a_typo_in_plain_terratorch_is_said_as_well():
    with pytest.raises(ConfigurationError, match="did you mean 'simpler_prithvi_eo_v2_300_tl'"):
        BACKBONE_REGISTRY.build("simpler_prithvi_eo_v2_300tl", pretrained=False)
