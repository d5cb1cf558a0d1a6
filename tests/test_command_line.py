"""Configs as `terratorch fit` reads them: one parser for all commands."""

import sys
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import CSVLogger
from terratorch.__main__ import main as terratorch_main
from terratorch.datamodules import GenericNonGeoSegmentationDataModule

from terratorch_simpler import SlimmingPlan, cli
from terratorch_simpler.terratorch.command_line import build_run, read_settings
from tests.cli_runner import config as run_config


@pytest.fixture
def folder(tmp_path, scenes, monkeypatch):
    """A folder to work in, with one config in several forms."""
    whole = run_config(scenes, tmp_path)
    whole["trainer"]["callbacks"].pop()
    (tmp_path / "parts").mkdir()
    rest = {key: value for key, value in whole.items() if key not in ("data", "model")}
    files = {
        "whole": whole,
        "parts/data": whole["data"],
        "parts/model": whole["model"],
        "split": {**rest, "data": "parts/data.yaml", "model": "parts/model.yaml"},
        "rest": {**rest, "ckpt_path": "left over from fit"},
        "data": {"data": {**whole["data"], "init_args": {**whole["data"]["init_args"], "batch_size": 3}}},
        "later": {"data": {"init_args": {"batch_size": 7}}, "trainer": {"max_epochs": 5}},
        "short": {**whole, "data": {**whole["data"], "class_path": "GenericNonGeoSegmentationDataModule"}},
    }
    for name, content in files.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.chdir(tmp_path)
    return tmp_path


FORMS = {
    "one file": "-c whole.yaml",
    "an equals sign": "--config=whole.yaml",
    "files for data and model": "-c split.yaml",
    "several files, later ones override": "-c rest.yaml -c data.yaml --model parts/model.yaml -c later.yaml",
    "a setting before a file, which overrides it": "-c whole.yaml --trainer.max_epochs 9 -c later.yaml",
    "negative values": "-c whole.yaml --trainer.devices -1 --data.init_args.no_label_replace=-1",
    "a class by its name": "-c whole.yaml --data GenericNonGeoSegmentationDataModule --data.batch_size 5 "
    "--data.num_workers 0 --data.num_classes 6 --data.train_data_root a --data.val_data_root b --data.test_data_root c "
    "--data.img_grep *.tif",
    "a class by its name in the file": "-c short.yaml",
    "a list that grows": "-c whole.yaml --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=val/loss",
    "settings without a dot": "-c whole.yaml --seed_everything 7 --out_dtype uint8 --optimizer SGD --optimizer.lr 1e-3",
    "settings of the model as text": "-c whole.yaml --model.init_args.model_args.backbone_keep 3",
}  # fmt: skip


def as_fit_reads(arguments, capsys, monkeypatch):
    """What the real command would run with, by its own account."""
    monkeypatch.setattr(sys, "argv", ["terratorch", "fit", *arguments, "--print_config"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        terratorch_main()
    assert not end.value.code
    return yaml.safe_load(capsys.readouterr().out)


def without_what_a_run_brings(settings):
    """`--print_config` tells neither the files, nor the seed that was drawn."""
    return {key: value for key, value in settings.items() if key != "config"}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_settings_are_those_of_fit(folder, form, capsys, monkeypatch):
    arguments = form.split()
    expected = as_fit_reads(arguments, capsys, monkeypatch)
    assert without_what_a_run_brings(read_settings(arguments)[0]) == expected


def test_settings_from_the_environment(folder, capsys, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    monkeypatch.setenv("PL_FIT__TRAINER__MAX_STEPS", "11")
    arguments = ["-c", "whole.yaml"]
    expected = as_fit_reads(arguments, capsys, monkeypatch)
    assert expected["trainer"]["max_steps"] == 11
    assert without_what_a_run_brings(read_settings(arguments)[0]) == expected


def test_what_plan_builds_is_read_alike(folder, capsys, monkeypatch):
    arguments = FORMS["several files, later ones override"].split()
    expected = as_fit_reads(arguments, capsys, monkeypatch)
    run = build_run(arguments)
    assert (run.datamodule.batch_size, run.trainer.max_epochs) == (7, 5)
    assert run.model.hparams["model_args"] == expected["model"]["init_args"]["model_args"]


@pytest.mark.parametrize(
    ("args", "own", "settings"),
    [
        ("-c a.yaml -o out", "-c a.yaml -o out", "-c a.yaml"),
        ("--config=a -c b --debug", "--config=a -c b --debug", "--config=a -c b"),
        ("-c a --trainer.devices -1 -o out", "-c a -o out", "-c a --trainer.devices -1"),
        ("-ca -oout --model X --data.x -.5 --data.y=-1", "-ca -oout", "-ca --model X --data.x -.5 --data.y=-1"),
        ("--trainer.callbacks+=X --ckpt_path=p -c a", "--ckpt_path=p -c a", "--trainer.callbacks+=X -c a"),
    ],
)
def test_arguments_of_a_command_and_settings_of_fit(args, own, settings):
    plan = cli.build_commands()["plan"]
    assert cli._split(plan, args.split()) == (own.split(), settings.split())


@pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.SimplerWarning")
def test_plan_of_files_for_data_and_model(folder, capsys):
    arguments = ["-c", "split.yaml", "-c", "later.yaml", "--trainer.devices", "1", "--optimizer", "SGD", "-o", "chosen"]
    assert cli.main(["plan", *arguments]) == 0, capsys.readouterr().err
    assert SlimmingPlan.load("chosen/plan.json").tiles_seen == 48


@pytest.mark.parametrize("data", ["data.yaml", "parts/data.yaml"])
def test_export_reads_the_config_as_fit_does_and_opens_no_data(folder, in_process, capsys, monkeypatch, data):
    run = build_run(["-c", "whole.yaml", "--model.init_args.model_args.backbone_keep", "3"])
    run.trainer.strategy.connect(run.model)
    run.trainer.save_checkpoint("fit.ckpt")
    monkeypatch.setattr(GenericNonGeoSegmentationDataModule, "setup", lambda *_args: pytest.fail("data"))
    if data.startswith("parts"):  # the datamodule may not even be built

        def fail(*_args, **_kwargs):
            raise FileNotFoundError

        monkeypatch.setattr(GenericNonGeoSegmentationDataModule, "__init__", fail)
    given = "-c split.yaml" if data.startswith("parts") else f"-c rest.yaml -c {data} --model parts/model.yaml"
    assert cli.main(["export", *given.split(), "--ckpt_path", "fit.ckpt", "-o", "plain"]) == 0, capsys.readouterr().err
    plain = yaml.safe_load((folder / "plain" / "config.yaml").read_text())
    expected = yaml.safe_load((folder / data).read_text())
    assert plain["data"]["init_args"].items() >= expected.get("data", expected)["init_args"].items()
    assert plain["model"]["init_args"]["model_args"]["backbone"] == "prithvi_eo_v2_tiny_tl"
    assert "terratorch_simpler" not in str(plain)
    normalized = "GenericNonGeoSegmentationDataModule did this in training" in (folder / "plain" / "README.md").read_text()
    assert normalized is not data.startswith("parts")


class Recorder(CSVLogger):
    """Notes how a run ended."""

    def finalize(self, status):
        super().finalize(status)
        with Path(self.root_dir, "ended.txt").open("a") as file:
            file.write(f"{status}\n")


def recorded(folder, command, *arguments):
    settings = yaml.safe_load((folder / "whole.yaml").read_text())
    logger = {"class_path": "tests.test_command_line.Recorder", "init_args": {"save_dir": str(folder), "name": "log"}}
    settings["trainer"]["logger"] = logger
    (folder / "log").mkdir()
    (folder / "logged.yaml").write_text(yaml.safe_dump(settings))
    status = cli.main([command, "-c", "logged.yaml", "-o", "chosen", *arguments])
    return status, (folder / "log" / "ended.txt").read_text().split()


@pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.SimplerWarning")
@pytest.mark.parametrize(("command", "more"), [("plan", []), ("sweep", ["--repeats", "1"])])
def test_a_run_that_ends_with_a_plan_is_logged_as_a_success(folder, command, more):
    assert recorded(folder, command, *more) == (0, ["success"])


@pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.SimplerWarning")
def test_a_run_that_fails_is_logged_as_failed(folder):
    status, ended = recorded(folder, "plan", "--data.init_args.train_data_root", "nowhere")
    assert (status, ended) == (2, ["failed"])
