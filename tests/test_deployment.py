"""TerraTorch's deployment file names our package, whichever command has written it last."""

import pytest
import yaml

from tests.runs import Command, config

COMMANDS = ("fit", "test", "predict", "validate")


@pytest.fixture
def settings(scenes, tmp_path):
    """A fit of one epoch that logs into a folder of its own; with callbacks, or with a cut in the config only."""

    def make(*callbacks, keep=None):
        found = config(scenes, tmp_path)
        found["trainer"].update(max_epochs=1, default_root_dir=str(tmp_path / "logs"), enable_checkpointing=False)
        found["trainer"]["callbacks"] = list(callbacks)
        found["data"]["init_args"]["predict_data_root"] = str(scenes / "images")
        found["model"]["init_args"]["model_args"].update({"backbone_keep": keep} if keep else {})
        return found

    return make


def run(folder, settings, command, *args, **kwargs):
    more = ["--predict_output_dir", str(folder / "predictions")] if command == "predict" else []
    done = Command(folder / command, settings, *more, *args, command=command, **kwargs)
    assert done.wait() == [0] * kwargs.get("ranks", 1), done.output()


def deployed(folder):
    return yaml.safe_load((folder / "logs" / "config_deploy.yaml").read_text())


OURS = {"class_path": "terratorch_simpler.SimplerCallback"}
MONITOR = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/loss"}}
SLIMMABLE = {"class_path": "terratorch_simpler.SlimmableTraining", "init_args": {"widths": [1.0, 0.5]}}


@pytest.mark.parametrize(
    ("callbacks", "keep"),
    [([MONITOR, OURS], None), ([SLIMMABLE], None), ([], 3)],
    ids=["our callback after others", "slimmable training alone", "no callback"],
)
def test_every_command_keeps_the_import(settings, tmp_path, callbacks, keep):
    for command in COMMANDS:
        run(tmp_path, settings(*callbacks, keep=keep), command)
        deploy = deployed(tmp_path)
        assert deploy["trainer"]["callbacks"] == [OURS], command
        assert deploy["model"]["init_args"]["model_args"]["backbone"].startswith("simpler_")
    for command in COMMANDS[1:]:  # from the file itself, in its folder
        run(tmp_path, deploy, command, "--trainer.default_root_dir", str(tmp_path / "logs"), "--trainer.precision", "32")
        assert deployed(tmp_path)["trainer"]["callbacks"] == [OURS], command


def test_a_plain_backbone_is_deployed_as_terratorch_does(settings, tmp_path):
    plain = settings()
    plain["model"]["init_args"]["model_args"]["backbone"] = "prithvi_eo_v2_tiny_tl"
    run(tmp_path, plain, "fit")
    assert "callbacks" not in deployed(tmp_path)["trainer"]


def test_one_of_several_processes_writes_it(settings, tmp_path):
    run(tmp_path, settings(keep=3), "fit", ranks=2)
    assert deployed(tmp_path)["trainer"]["callbacks"] == [OURS]
    assert not list((tmp_path / "logs").glob(".part-*"))
