"""The real commands, one run after the other as a user would: fit, resume, test, validate, predict, and ours."""

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import yaml
from terratorch.__main__ import main as terratorch_main
from terratorch.cli_tools import LightningInferenceModel
from terratorch.tasks import SemanticSegmentationTask

import terratorch_simpler.demo as demo
from terratorch_simpler import SlimmingPlan, __version__
from terratorch_simpler.cli import ABOUT, build_commands, main
from terratorch_simpler.models.backbone import SimplerBackbone
from terratorch_simpler.report import summary
from tests.checkpoints import kept_in

pytestmark = pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.FewTilesWarning")


def terratorch(*args):
    """TerraTorch's command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["terratorch", *map(str, args)])
        terratorch_main()


def fresh_process(folder, *args):
    """A command in a process that has imported nothing of ours."""
    command = [sys.executable, "-m", *map(str, args)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def config(tmp_path_factory, scenes):
    """The demo's config on small scenes, one epoch, with the encoder that ships with the package."""
    folder = tmp_path_factory.mktemp("run")
    path = demo.write_config(folder, scenes, demo.ENCODER)
    settings = yaml.safe_load(path.read_text())
    settings["trainer"]["callbacks"] = [{"class_path": "terratorch_simpler.SimplerCallback"}]
    settings["trainer"].update(max_epochs=1, enable_progress_bar=False, enable_model_summary=False)
    settings["data"]["init_args"].update(num_workers=0, predict_data_root=str(scenes / "images"))
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def fitted(config):
    """Log folder of one `terratorch fit` in a process of its own."""
    done = fresh_process(config.parent, "terratorch", "fit", "--config", config)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "of 12 blocks kept" in done.stdout
    return newest_logs(config.parent)


@pytest.fixture(scope="module")
def plan(fitted):
    return SlimmingPlan.load(fitted / "simpler" / "plan.json")


def newest_logs(folder):
    return max((folder / "lightning_logs").glob("version_*"), key=lambda path: path.stat().st_mtime_ns)


def checkpoints(fitted):
    full = next(path for path in (fitted / "checkpoints").glob("*.ckpt") if "state_dict" not in path.name)
    return full, next((fitted / "checkpoints").glob("*state_dict*.ckpt"))


def read(path) -> np.ndarray:
    with rasterio.open(path) as src:
        return src.read(1)


def backbone_of(module) -> SimplerBackbone:
    return next(part for part in module.modules() if isinstance(part, SimplerBackbone))


def test_fit_leaves_plan_report_and_checkpoints(fitted, plan):
    assert (plan.backbone, plan.full_num_blocks, plan.tiles_seen) == ("prithvi_eo_v2_tiny_tl", 12, 48)
    assert (fitted / "simpler" / "report.png").stat().st_size > 10_000
    assert f"{len(plan.kept_blocks)} of 12 blocks kept" in (fitted / "simpler" / "report.html").read_text()
    for path in checkpoints(fitted):
        state = torch.load(path, weights_only=True)["state_dict"]
        assert kept_in(state) == plan.kept_blocks
        blocks = {key.split(".blocks.")[1].split(".")[0] for key in state if ".blocks." in key}
        assert len(blocks) == len(plan.kept_blocks)


def test_resume_goes_on_without_streaming(config, fitted, plan, monkeypatch):
    monkeypatch.setattr("terratorch_simpler.lightning.selection.measure", lambda *a, **k: pytest.fail("streamed"))
    full, _ = checkpoints(fitted)
    before = torch.load(full, weights_only=True)
    terratorch("fit", "--config", config, "--ckpt_path", full, "--trainer.max_epochs", 2)
    again = newest_logs(config.parent)
    after = torch.load(checkpoints(again)[0], weights_only=True)
    assert after["global_step"] == 2 * before["global_step"]
    assert kept_in(after["state_dict"]) == plan.kept_blocks
    assert not (again / "simpler").exists()


@pytest.mark.parametrize("which", ["full", "state dict only"])
@pytest.mark.parametrize("command", ["test", "validate"])
def test_evaluation(config, fitted, command, which, capsys):
    path = checkpoints(fitted)[which != "full"]
    terratorch(command, "--config", config, "--ckpt_path", path, "--trainer.logger", "false")
    assert "mIoU" in capsys.readouterr().out


def test_predict_writes_georeferenced_rasters(config, fitted, scenes, tmp_path):
    terratorch(
        *("predict", "--config", config, "--ckpt_path", checkpoints(fitted)[0]),
        *("--predict_output_dir", tmp_path, "--trainer.logger", "false"),
    )
    written = sorted(tmp_path.glob("*.tif"))
    assert len(written) == 56
    with rasterio.open(written[0]) as src, rasterio.open(scenes / "images" / "scene_0000_image.tif") as image:
        assert src.crs == image.crs
        assert src.transform == image.transform
        assert set(src.read(1).ravel().tolist()) <= {-1, 0, 1, 2, 3, 4, 5}


def test_deploy_file_predicts_alike_in_a_process_that_knows_nothing_of_us(config, fitted, tmp_path):
    path, _ = checkpoints(fitted)  # the other one is what the demo predicts with
    precision = ("--trainer.precision", "32-true")  # the file's own becomes bfloat16 on a CPU
    done = fresh_process(
        tmp_path,
        *("terratorch", "predict", "--config", fitted / "config_deploy.yaml", "--ckpt_path", path, *precision),
        *("--predict_output_dir", tmp_path / "deployed"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    terratorch(
        *("predict", "--config", config, "--ckpt_path", path, "--trainer.logger", "false"),
        *("--predict_output_dir", tmp_path / "direct"),
    )
    deployed, direct = (sorted((tmp_path / folder).glob("*.tif")) for folder in ("deployed", "direct"))
    assert len(deployed) == len(direct) == 56
    assert all((read(a) == read(b)).mean() > 0.999 for a, b in zip(deployed, direct, strict=True))
    assert len(np.unique(np.concatenate([read(path).ravel() for path in deployed]))) > 3


def test_deploy_file_names_our_callback_and_nothing_of_this_machine(fitted):
    deploy = yaml.safe_load((fitted / "config_deploy.yaml").read_text())
    assert deploy["trainer"]["callbacks"] == [{"class_path": "terratorch_simpler.SimplerCallback"}]
    assert "custom_modules_path" not in deploy


@pytest.mark.parametrize("weights_only", [None, True, False])
def test_load_from_checkpoint(fitted, plan, weights_only):
    module = SemanticSegmentationTask.load_from_checkpoint(checkpoints(fitted)[0], weights_only=weights_only)
    assert backbone_of(module).kept == plan.kept_blocks


def test_inference_model_from_config(fitted, plan, scenes, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["python"])
    model = LightningInferenceModel.from_config(str(fitted / "config_deploy.yaml"), checkpoints(fitted)[1])
    assert backbone_of(model.model).kept == plan.kept_blocks
    prediction = model.inference(scenes / "images" / "scene_0003_image.tif")
    assert prediction.shape == (64, 64)


# --- our own commands


def test_plan_chooses_what_fit_chose(config, plan, tmp_path, capsys):
    overrides = ["--data.init_args.batch_size", "5", "--trainer.logger=false"]
    assert main(["plan", "-c", str(config), *overrides, "-o", str(tmp_path / "out")]) == 0
    found = SlimmingPlan.load(tmp_path / "out" / "plan.json")
    assert found.kept_blocks == plan.kept_blocks
    assert (tmp_path / "out" / "report.png").is_file()
    out = capsys.readouterr().out
    assert "blocks kept" in out
    assert out.strip().splitlines()[-1] == str(tmp_path / "out" / "plan.json")


def test_plan_works_without_our_callback_in_the_config_and_trains_nothing(config, tmp_path, monkeypatch):
    monkeypatch.setattr(SemanticSegmentationTask, "training_step", lambda *_, **__: pytest.fail("trained"))
    settings = yaml.safe_load(config.read_text())
    del settings["trainer"]["callbacks"]
    settings["ckpt_path"] = "left over from fit"
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(settings))
    assert main(["plan", "-c", str(tmp_path / "plain.yaml"), "-o", str(tmp_path / "out")]) == 0
    assert SlimmingPlan.load(tmp_path / "out" / "plan.json").tiles_seen == 48


def test_plan_from_geotiff_tiles_in_the_config(config, scenes, tmp_path):
    settings = yaml.safe_load(config.read_text())
    tiles = {
        "paths": str(scenes / "images"),
        "tile_size": 32,
        "bands": [1, "GREEN", 3, 4, 5, 6],
        "scale": "file",
        "offset": 0.0,
        "pad": "reflect",
        "filename_regex": r"scene_00(?P<date>\d{2})",
        "date_format": "%y",
        "max_nodata_fraction": 0.9,
        "timeout": 20,
    }
    callback = {
        "tiles": {"class_path": "terratorch_simpler.GeoTiffTiles", "init_args": tiles},
        "min_tiles": 32,
        "max_tiles": 64,
    }
    settings["trainer"]["callbacks"] = [{"class_path": "terratorch_simpler.SimplerCallback", "init_args": callback}]
    (tmp_path / "tiles.yaml").write_text(yaml.safe_dump(settings))
    plans = []
    for workers, out in ((0, "a"), (3, "b"), (3, "b")):  # the last with the index of the one before
        workers = f"--trainer.callbacks.tiles.num_workers={workers}"
        assert main(["plan", "-c", str(tmp_path / "tiles.yaml"), workers, "-o", str(tmp_path / out)]) == 0
        assert {path.name for path in (tmp_path / out).iterdir()} == {"plan.json", "report.html", "report.png", "tiles.json"}
        plans.append((tmp_path / out / "plan.json").read_text())
    assert plans[0] == plans[1] == plans[2]
    data = json.loads(plans[0])["data"]
    assert (data["source"], data["files"]) == ("GeoTiffTiles", 56)


def test_show_prints_table_and_curve(fitted, plan, capsys):
    assert main(["show", str(fitted / "simpler" / "plan.json")]) == 0
    out = capsys.readouterr().out
    assert f"first {len(plan.kept_blocks)} of 12 blocks kept" in out
    assert all(summary.score(score) in out for score in plan.scores.values())
    assert out.count("chosen") == 1


def one_line(capsys) -> str:
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("terratorch-simpler")]
    assert len(err) == 1
    return err[0]


def test_plan_on_a_plain_backbone_fails_with_the_line_to_write(config, tmp_path, capsys):
    name = "--model.init_args.model_args.backbone"
    assert main(["plan", "-c", str(config), name, "prithvi_eo_v2_tiny_tl", "-o", str(tmp_path)]) == 2
    assert "write backbone: simpler_prithvi_eo_v2_tiny_tl" in one_line(capsys)
    assert not list(tmp_path.iterdir())


def test_plan_on_a_cut_backbone_says_so(config, capsys):
    assert main(["plan", "-c", str(config), "--model.init_args.model_args.backbone_keep", "3"]) == 2
    assert "Blocks or width of the encoder are given" in one_line(capsys)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "The config bad.yaml does not exist: give the path"),
        ("trainer: [", "The config bad.yaml is no valid YAML at line 1, column 11 ("),
        ("hello", "The config bad.yaml holds 'hello', expected settings of terratorch fit"),
        ("modell: {}", "The config lacks the setting model: add it."),
        ("modell: {class_path: a}", "has a setting 'modell' (did you mean 'model'?)"),
        ("trainer: {max_epoch: 3}", "has a setting 'trainer.max_epoch' (did you mean 'trainer.max_epochs'?)"),
    ],
)
@pytest.mark.parametrize(
    ("command", "arguments"), [("plan", []), ("sweep", []), ("export", ["--ckpt_path", "fit.ckpt", "-o", "plain"])]
)
def test_bad_config_is_status_2_and_one_line(tmp_path, capsys, monkeypatch, text, message, command, arguments):
    monkeypatch.chdir(tmp_path)
    Path("fit.ckpt").touch()
    if text is not None:
        Path("bad.yaml").write_text(text)
    assert main([command, "-c", "bad.yaml", *arguments]) == 2
    assert message in one_line(capsys)


def test_damaged_plan_is_status_2(tmp_path, capsys):
    (tmp_path / "plan.json").write_text(json.dumps({"format": "terratorch-simpler/plan", "version": 99}))
    assert main(["show", str(tmp_path / "plan.json")]) == 2
    assert "Found 99 for key 'version'" in one_line(capsys)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["show"], "the following arguments are required: plan"),
        (["show", "a", "--debugg"], "unrecognized arguments: --debugg (did you mean '--debug'?)"),
        (["plan"], "the following arguments are required: -c/--config"),
        (["sweep", "-c", "a", "--repeats", "few"], "invalid int value: 'few'"),
        (["export", "-c", "a", "--ckpt_path", "b", "-o", "c", "--formats", "onxx"], "invalid choice: 'onxx'"),
    ],
)
def test_bad_arguments_are_status_2(args, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(args)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_help_has_a_sentence_an_example_and_every_default_once(capsys):
    for name, command in build_commands().items():
        text = " ".join(command.format_help().split())
        assert f"example: terratorch-simpler {name} " in text
        assert not [word for word in ("``", "null", "default: default", "(required)") if word in text]
        for action in command._actions:
            assert (action.help or "").count("default") <= 1
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert all(f"{name} {about}" in said for name, (about, _) in ABOUT.items())


def test_version_names_the_packages_that_a_problem_depends_on(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    expected = f"terratorch-simpler {__version__}, TerraTorch {version('terratorch')}, torch {version('torch')}\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("place", ["plan.json", ".", "..", "nothing"])
def test_show_takes_a_plan_its_folder_or_the_log_folder(tmp_path, capsys, place):
    folder = tmp_path / "simpler"
    SlimmingPlan("vit", 3, (0, 1), {"name": "fixed", "args": {}}).save(folder / "plan.json")
    (folder / "nothing").mkdir()
    assert main(["show", str(folder / place)]) == (2 if place == "nothing" else 0)
    said = capsys.readouterr()
    if place == "nothing":
        assert "holds neither plan.json nor simpler/plan.json: give the folder" in said.err
    else:
        assert "first 2 of 3 blocks kept" in said.out


@pytest.mark.parametrize("command", [["plan"], ["sweep", "--repeats", "1"]], ids=["plan", "sweep"])
def test_several_devices_wait_for_the_one_that_writes(config, tmp_path, command):
    """Lightning's launcher ends all processes as soon as one of them has failed."""
    script = Path(sys.executable).with_name("terratorch-simpler")  # which the launcher starts again for the other device
    arguments = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    made = [str(script), *command, "-c", str(config), "-o", str(tmp_path / "out"), *arguments]
    done = subprocess.run(made, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "are given, expected" not in done.stderr
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert "plan.json" in written
    assert ("sweep.csv" in written) == (command[0] == "sweep")
    assert done.stdout.count(str(tmp_path / "out" / "plan.json")) == 1


def test_plan_in_a_quick_try_writes_nothing(config, tmp_path, capsys):
    assert main(["plan", "-c", str(config), "-o", str(tmp_path / "out"), "--trainer.fast_dev_run", "true"]) == 0
    assert "are given, expected" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("args", [["show", "plan.json"], ["--version"], ["sweep", "--help"]])
def test_light_commands_import_nothing_heavy(tmp_path, args):
    SlimmingPlan("vit", 3, (0, 1), {"name": "fixed", "args": {}}).save(tmp_path / "plan.json")
    code = (
        "import sys\nfrom terratorch_simpler.cli import main\n"
        f"try: main({args})\nexcept SystemExit: pass\n"
        "print(*{'terratorch', 'lightning', 'torch', 'torchgeo', 'timm'} & set(sys.modules), 'imported')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == ["imported"]


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(Exception, match="There is no readable plan"):
        main(["show", str(tmp_path / "none.json"), "--debug"])


def test_demo_says_which_command_failed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "ENCODER", tmp_path / "gone.pt")
    monkeypatch.setattr(demo, "SPLITS", {"train": 2, "val": 1, "test": 1})
    monkeypatch.setattr(os, "environ", {**os.environ, "PYTHONWARNINGS": "ignore"})
    assert main(["demo", "-o", str(tmp_path / "demo")]) == 1
    assert "terratorch fit failed, expected it to run" in one_line(capsys)


def test_two_processes_cut_alike(config, plan, tmp_path):
    """Two real processes (gloo): one plan, written once, and a checkpoint that one process loads."""
    settings = yaml.safe_load(config.read_text())
    strategy = "ddp_find_unused_parameters_true"  # without coordinates a TL encoder has two parameters without gradient
    settings["trainer"].update(accelerator="cpu", devices=2, strategy=strategy, default_root_dir=str(tmp_path))
    (tmp_path / "ddp.yaml").write_text(yaml.safe_dump(settings))
    done = fresh_process(tmp_path, "terratorch", "fit", "--config", tmp_path / "ddp.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("of 12 blocks kept") == 1
    logs = tmp_path / "lightning_logs" / "version_0"
    assert SlimmingPlan.load(logs / "simpler" / "plan.json").kept_blocks == plan.kept_blocks
    assert len(list((tmp_path / "lightning_logs").iterdir())) == 1
    terratorch("test", "--config", config, "--ckpt_path", checkpoints(logs)[0], "--trainer.logger", "false")
