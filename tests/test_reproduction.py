"""The paper's tables, run again on generated data of the same layouts: composition, every row, and what a kill leaves."""

import csv
import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import rasterio
import yaml
from PIL import Image

from benchmarks.reproduction import experiments, prepare, table
from benchmarks.reproduction.__main__ import main, run_terratorch
from benchmarks.reproduction.experiments import EXPERIMENTS, compose
from benchmarks.reproduction.scores import WriteScores
from tests import layouts
from tests.cli_runner import Command
from tests.rasters import write
from tests.test_configs import RUNS, terratorch

LAYOUTS = {
    "mados": RUNS["mados"],
    "bigearthnet": (layouts.bigearthnet_v2, RUNS["bigearthnet"][1]),
    "sen4map": RUNS["sen4map"],
    "cifar100": RUNS["vit_mae_cifar100"],
    "terramind_mados": (layouts.mados, {"backbone": "simpler_terramind_v1_tiny", "backbone_pretrained": False}),
}
SMALL = {
    "trainer.accelerator": "cpu",
    "trainer.precision": "32-true",
    "trainer.limit_train_batches": 2,
    "trainer.limit_val_batches": 1,
    "trainer.limit_test_batches": 1,
    "trainer.enable_progress_bar": False,
    "trainer.enable_model_summary": False,
    "trainer.logger": False,
    "data.init_args.num_workers": 0,
    "data.init_args.batch_size": 4,
}

pytestmark = [
    pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.FewTilesWarning"),
    pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.UntrainedEncoderWarning"),
]


def overrides(name, **more):
    """What makes an experiment small enough for a test."""
    model_args = {f"model.init_args.model_args.{key}": value for key, value in LAYOUTS[name][1].items()}
    settings = {**SMALL, "trainer.max_epochs": 1, **model_args, **more}
    if name == "sen4map":
        settings["data.init_args.num_workers"] = 1  # PyTorch allows its prefetch_factor with workers only
    pairs = [(f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)) for key, value in settings.items()]
    return [arg for number, pair in enumerate(pairs) for arg in (pair if number % 2 else ["=".join(pair)])]


class Recorder:
    """Runs commands in this process, and remembers them."""

    def __init__(self):
        self.commands = []

    def __call__(self, args):
        self.commands.append(list(args))
        terratorch(*args)


def read_csv(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def cells(output, name):
    line = (output / "table.md").read_text().splitlines()[2 + list(EXPERIMENTS).index(name)]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_published_numbers():
    """The golden facts of the paper."""
    published = {name: cells_of(experiment) for name, experiment in EXPERIMENTS.items()}
    assert published["mados"] == ["66.9", "62.8", "94%", "5 (64.57 M parameters)"]
    assert published["bigearthnet"] == ["73.4", "71.2", "97%", ""]
    assert published["sen4map"] == ["66.6", "63.8", "96%", ""]
    assert published["terramind_mados"] == ["69.6", "62.2", "89%", ""]
    assert published["cifar100"] == ["", "", "", ""]


def cells_of(experiment):
    return table._published(experiment)[3:]


def test_the_page_holds_the_empty_table():
    page = (Path(experiments.__file__).parent / "README.md").read_text()
    assert table.render([]) in page
    assert all(line.endswith("|  |  |  |  |  |  |") for line in table.render([]).splitlines()[2:])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_composition(name, tmp_path):
    experiment = EXPERIMENTS[name]
    of = {
        variant: compose(experiment, variant, 7, Path("/data"), tmp_path / variant, tmp_path / "plans")
        for variant in experiment.variants
    }
    assert set(of) == ({"full", "simpler", "fixed"} if name == "mados" else {"full", "simpler"})
    shipped = yaml.safe_load(experiment.configs[0].read_text())
    for variant, config in of.items():
        callbacks = {entry["class_path"] for entry in config["trainer"]["callbacks"]}
        assert ("terratorch_simpler.SimplerCallback" in callbacks) == (variant == "simpler")
        assert config["seed_everything"] == 7
        assert config["optimizer"] == shipped["optimizer"]
        assert config["trainer"]["max_epochs"] == shipped["trainer"]["max_epochs"]
        paths = [value for key, value in config["data"]["init_args"].items() if key.endswith(("_root", "_split", "_path"))]
        assert paths
        assert all(path.startswith("/data/") for path in paths)
        model_args = config["model"]["init_args"]["model_args"]
        assert model_args["backbone"].startswith("simpler_")
        assert model_args.get("backbone_keep") == (5 if variant == "fixed" else None)


def test_every_row_of_mados(tmp_path, capsys):
    """All variants through fit and test; a second call does nothing."""
    layouts.mados(tmp_path / "data", None)
    output = tmp_path / "results"
    arguments = ["mados", "--data_root", str(tmp_path / "data"), "-o", str(output), "--seeds", "0"]
    arguments += overrides("mados")
    recorder = Recorder()
    assert main(arguments, recorder) == 0
    assert [command[0] for command in recorder.commands] == ["fit", "test"] * 3
    rows = {row["variant"]: row for row in read_csv(output / "results.csv")}
    assert set(rows) == {"full", "simpler", "fixed"}
    assert (rows["full"]["blocks"], rows["fixed"]["blocks"], rows["full"]["full_blocks"]) == ("24", "5", "24")
    assert 2 <= int(rows["simpler"]["blocks"]) < 24
    assert int(rows["fixed"]["parameters"]) < int(rows["full"]["parameters"])
    assert all(row["metric"] == "mIoU" and 0 <= float(row["score"]) <= 1 for row in rows.values())
    assert (output / "mados/simpler_seed0/simpler/plan.json").is_file()
    assert not list(output.glob("mados/*/checkpoints/last.ckpt"))
    row = cells(output, "mados")
    assert row[3:7] == ["66.9", "62.8", "94%", "5 (64.57 M parameters)"]
    assert row[7] == f"{100 * float(rows['full']['score']):.1f} (n = 1)"
    assert row[10] == f"{rows['simpler']['blocks']} of 24"
    assert cells(output, "sen4map")[7:] == [""] * 6
    again = Recorder()
    assert main(arguments, again) == 0
    assert again.commands == []
    with pytest.raises(SystemExit) as err:
        main([*arguments, "--trainer.max_epochs=2"], again)
    assert err.value.code == 2
    assert "expected the same for all runs of mados: give another --output_dir" in capsys.readouterr().err


def die_in_second_epoch(rank):
    def die(self, trainer, pl_module):
        if trainer.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    WriteScores.on_train_epoch_start = die


def test_goes_on_where_it_was_killed(tmp_path, capfd, caplog):
    layouts.mados(tmp_path / "data", None)
    output = tmp_path / "results"
    arguments = ["mados", "--data_root", str(tmp_path / "data"), "-o", str(output), "--seeds", "3", "--variants", "simpler"]
    arguments += overrides("mados", **{"trainer.max_epochs": 2})

    def killed(args):
        assert args[:2] == ["fit", "--config"]
        command = Command(
            tmp_path / "killed", yaml.safe_load(Path(args[2]).read_text()), *args[3:], before=die_in_second_epoch
        )
        (status,) = command.wait()
        raise subprocess.CalledProcessError(status, args)

    assert main(arguments, killed) == 1
    assert "terratorch ended with -9" in capfd.readouterr().err
    folder = output / "mados/simpler_seed3"
    assert (folder / "checkpoints/last.ckpt").is_file()
    assert read_csv(output / "results.csv") == []
    plan = (folder / "simpler/plan.json").stat().st_mtime_ns
    recorder = Recorder()
    assert main(arguments, recorder) == 0
    assert recorder.commands[0][-2:] == ["--ckpt_path", str(folder / "checkpoints/last.ckpt")]
    assert "nothing is selected again" in caplog.text
    assert (folder / "simpler/plan.json").stat().st_mtime_ns == plan
    assert [row["seed"] for row in read_csv(output / "results.csv")] == ["3"]


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "mados"])
def test_the_other_rows_run(name, tmp_path):
    layout, _ = LAYOUTS[name]
    (tmp_path / "data").mkdir()
    layout(tmp_path / "data", None)
    output = tmp_path / "results"
    arguments = [name, "--data_root", str(tmp_path / "data"), "-o", str(output), "--seeds", "0", "--variants", "simpler"]
    assert main([*arguments, *overrides(name)], Recorder()) == 0
    (row,) = read_csv(output / "results.csv")
    assert row["metric"] == EXPERIMENTS[name].key
    assert 0 <= float(row["score"]) <= 1
    assert 2 <= int(row["blocks"]) < int(row["full_blocks"])


def test_one_failure_does_not_stop_the_others(tmp_path, capsys):
    tried = []

    def fails(args):
        tried.append(args[0])
        raise subprocess.CalledProcessError(2, args)

    assert main(["cifar100", "-o", str(tmp_path), "--seeds", "0", "1"], fails) == 1
    assert tried == ["fit"] * 4
    assert capsys.readouterr().err.count("terratorch ended with 2") == 4
    for wrong, said in ((["cifar10"], "Found experiments ['cifar10']"), (["--a.b"], "Found '--a.b' among the settings")):
        with pytest.raises(SystemExit):
            main(["-o", str(tmp_path), *wrong], fails)
        assert said in capsys.readouterr().err


def test_the_command_line_reads_what_is_composed(tmp_path, monkeypatch, capfd):
    """TerraTorch in a process of its own, started somewhere else."""
    config = compose(EXPERIMENTS["bigearthnet"], "simpler", 0, tmp_path, tmp_path / "run", tmp_path / "plans")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.chdir(tmp_path)
    run_terratorch(["fit", "--config", "config.yaml", "--print_config"])
    assert "benchmarks.reproduction.scores.WriteScores" in capfd.readouterr().out


def test_prepare_mados(tmp_path):
    """Two crops whose names are part of each other's, in different splits, as the archive has them."""
    source, bands = tmp_path / "MADOS", {60: (443,), 10: (492, 560, 665, 833), 20: (704, 740, 783, 865, 1614, 2202)}
    (source / "splits").mkdir(parents=True)
    for split, name in {"train": "Scene_1_1", "val": "Scene_1_10", "test": "Scene_11_1"}.items():
        (source / "splits" / f"{split}_X.txt").write_text(f"{name}\n")
        scene, _, crop = name.rpartition("_")
        for res, wavelengths in bands.items():
            for nm in wavelengths:
                pixels = np.full((1, 240 * 10 // res, 240 * 10 // res), nm / 10_000, np.float32)
                write(source / scene / str(res) / f"{scene}_L2R_rhorc_{nm}_{crop}.tif", pixels)
        write(source / scene / "10" / f"{scene}_L2R_cl_{crop}.tif", np.full((1, 240, 240), 6, np.uint8))
    prepare.main(["mados", str(source), str(tmp_path)])
    with rasterio.open(tmp_path / "mados/images/Scene_1_10_image.tif") as image:
        assert image.shape == (240, 240)
        assert image.read(window=((0, 1), (0, 1))).ravel().round().tolist() == sorted(sum(bands.values(), ()))
    with rasterio.open(tmp_path / "mados/masks/Scene_11_1_mask.tif") as mask:
        assert set(mask.read().ravel().tolist()) == {6}
    from terratorch.datasets import GenericNonGeoSegmentationDataset

    of = {
        split: GenericNonGeoSegmentationDataset(
            tmp_path / "mados/images", 15, tmp_path / "mados/masks", "*_image.tif", "*_mask.tif",
            split=tmp_path / f"mados/splits/{split}.txt",
        )
        for split in ("train", "val", "test")
    }  # fmt: skip
    assert {split: len(dataset) for split, dataset in of.items()} == {"train": 1, "val": 1, "test": 1}
    (source / "Scene_1/20/Scene_1_L2R_rhorc_704_10.tif").unlink()
    with pytest.raises(SystemExit, match=r"Found 10 bands of Scene_1_10 .* unpack the archive again"):
        prepare.main(["mados", str(source), str(tmp_path)])


def test_prepare_cifar100(tmp_path, monkeypatch):
    class Two(list):
        classes = ("apple", "bee")

        def __init__(self, root, train):
            super().__init__((Image.new("RGB", (32, 32), (i, i, i)), i % 2) for i in range(40 if train else 6))

    monkeypatch.setattr(prepare, "CIFAR100", Two)
    prepare.main(["cifar100", "anywhere", str(tmp_path)])
    counts = {
        path.relative_to(tmp_path / "cifar100").as_posix(): len(list(path.iterdir()))
        for path in tmp_path.glob("cifar100/*/*")
    }
    expected = {"train": 18, "val": 2, "test": 3}
    assert counts == {f"{split}/{name}": count for split, count in expected.items() for name in ("apple", "bee")}
