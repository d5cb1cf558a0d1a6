"""TerraTorch's deployment file names our package, whichever command has written it last."""

import re
import subprocess
import sys

import pytest
import yaml

from terratorch_simpler import SlimmingPlan
from tests.cli_runner import Command, config

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


def test_fit_keeps_the_import(settings, tmp_path):
    found = settings(keep=3)
    found["trainer"].update(limit_train_batches=1, limit_val_batches=0)
    run(tmp_path, found, "fit")
    assert deployed(tmp_path)["trainer"]["callbacks"] == [OURS]


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


def test_the_config_of_the_report_builds_in_a_process_that_knows_nothing_of_us(settings, tmp_path):
    """Every line of YAML on the page, in one config."""
    run(tmp_path, settings(OURS), "fit")
    folder = tmp_path / "logs" / "simpler"
    parts = re.findall(r"<pre>(.*?)</pre>", (folder / "report.html").read_text(), re.DOTALL)
    blocks = [yaml.safe_load(re.sub(r"<[^>]*>", "", part)) for part in parts]
    by_plan, by_hand = (block for block in blocks if "backbone" in block)
    (callbacks,) = (block for block in blocks if "trainer" in block)
    code = (
        "import sys; from terratorch.cli_tools import build_lightning_cli;"
        "run = build_lightning_cli(['--config', sys.argv.pop()], run=False);"
        "print('blocks', len(run.model.model.encoder.blocks), 'terratorch_simpler' in sys.modules)"
    )
    kept = len(SlimmingPlan.load(folder / "plan.json").kept_blocks)
    for number, block in enumerate((by_plan, by_hand)):
        found = settings(keep=None)
        found["trainer"].update(callbacks["trainer"])
        found["model"]["init_args"]["model_args"].update(block)
        del found["optimizer"]
        (folder / f"again{number}.yaml").write_text(yaml.safe_dump(found))
        done = subprocess.run(
            [sys.executable, "-c", code, f"again{number}.yaml"], cwd=folder, capture_output=True, text=True, check=False
        )
        assert f"blocks {kept} True" in done.stdout, done.stderr[-2000:]
