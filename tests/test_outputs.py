"""Where plan and report go: remote folders, folders that cannot be written to, folders that hold a plan already."""

from contextlib import suppress

import fsspec
import pytest
from lightning.pytorch.loggers import CSVLogger

from terratorch_simpler import SimplerCallback, SlimmingPlan
from terratorch_simpler.data import GeoTiffTiles
from terratorch_simpler.errors import ConfigurationError
from terratorch_simpler.files import below, check_folder, folder_of, written_to
from tests.cli_runner import Command, config

pytestmark = pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.SimplerWarning")

REPORTS = {"plan.json", "report.html", "report.png"}


@pytest.fixture
def memory(monkeypatch, tmp_path):
    """fsspec's file system in memory; a folder that is made by mistake shows in the working directory."""
    monkeypatch.chdir(tmp_path)
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()


def names(filesystem, folder):
    return {path.rpartition("/")[2] for path in filesystem.ls(folder, detail=False)}


def test_plan_and_report_in_a_remote_folder(memory, trainer, task, datamodule, tmp_path):
    callback = SimplerCallback(output_dir="memory://bucket/chosen")
    trainer(callback).fit(task(), datamodule=datamodule())
    assert names(memory, "/bucket/chosen") == REPORTS
    assert callback.written == "memory://bucket/chosen"
    (tmp_path / "plan.json").write_bytes(memory.cat_file("/bucket/chosen/plan.json"))
    assert SlimmingPlan.load(tmp_path / "plan.json").tiles_seen == 48
    assert not [path for path in tmp_path.iterdir() if "memory" in path.name]


def test_plan_and_report_in_the_remote_folder_of_a_logger(memory, trainer, task, datamodule, tmp_path):
    logger = CSVLogger("memory://bucket/runs", name="water")
    trainer(SimplerCallback(), logger=logger).fit(task(), datamodule=datamodule())
    assert names(memory, "/bucket/runs/water/version_0/simpler") == REPORTS
    assert not [path for path in tmp_path.iterdir() if "memory" in path.name]


@pytest.fixture
def nothing_is_streamed(monkeypatch):
    monkeypatch.setattr("terratorch_simpler.lightning.selection.measure", lambda *_args, **_kwargs: pytest.fail("streamed"))


@pytest.mark.usefixtures("nothing_is_streamed")
@pytest.mark.parametrize("option", ["output_dir", "plan_cache"])
def test_a_folder_that_cannot_be_written_to_is_refused_before_streaming(trainer, task, datamodule, tmp_path, option):
    (tmp_path / "file").write_text("in the way")
    callback = SimplerCallback(**{option: str(tmp_path / "file" / "out")})
    with pytest.raises(
        ConfigurationError, match=rf"Could not write to {option} .*out \(.+\), expected a folder to write to: change"
    ):
        trainer(callback).fit(task(), datamodule=datamodule())


@pytest.mark.usefixtures("nothing_is_streamed")
def test_a_file_system_that_is_unknown_is_refused_before_streaming(trainer, task, datamodule, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigurationError, match=r"Could not write to output_dir nowhere://x \(Protocol not known: nowhere.*expected a"
    ):
        trainer(SimplerCallback(output_dir="nowhere://x")).fit(task(), datamodule=datamodule())
    assert not (tmp_path / "nowhere:").exists()


@pytest.mark.usefixtures("nothing_is_streamed")
@pytest.mark.parametrize("option", ["plan_cache", "index_cache"])
def test_caches_are_local(memory, trainer, task, datamodule, scenes, option):
    tiles = GeoTiffTiles(str(scenes / "images"), tile_size=32, index_cache="memory://bucket/index.json")
    callback = SimplerCallback(plan_cache="memory://bucket") if option == "plan_cache" else SimplerCallback(tiles)
    with pytest.raises(ConfigurationError, match=rf"Found {option} memory://.*bucket, expected a folder of this machine"):
        trainer(callback).fit(task(), datamodule=datamodule())


def test_what_is_written_remotely_is_written_whole(memory):
    with suppress(ZeroDivisionError), written_to(folder_of("memory://bucket/out")) as folder:
        (folder / "a.txt").write_text("half")
        _ = 1 / 0
    assert not memory.exists("/bucket/out/a.txt")
    with written_to("memory://bucket/out") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "a.txt").write_text("a")
    assert memory.cat_file("/bucket/out/deep/a.txt") == b"a"


def test_paths_and_urls(tmp_path):
    assert folder_of(tmp_path) == folder_of(str(tmp_path)) == folder_of(f"file://{tmp_path}") == tmp_path
    assert below(folder_of("memory://bucket/out/"), "plan.json") == "memory://bucket/out/plan.json"
    check_folder("output_dir", tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


# --- the same trainer, or the same folder, twice


def test_a_second_fit_of_the_cut_model_leaves_the_plan(trainer, task, datamodule, tmp_path, caplog):
    both = trainer(SimplerCallback())
    model, data = task(), datamodule()
    both.fit(model, datamodule=data)
    first = (tmp_path / "simpler" / "plan.json").read_bytes()
    both.fit_loop.max_epochs = 2
    both.fit(model, datamodule=data)
    assert (tmp_path / "simpler" / "plan.json").read_bytes() == first
    assert "Replaces" not in caplog.text


def test_a_plan_that_replaces_another_says_so(trainer, task, datamodule, tmp_path, caplog):
    caplog.set_level("INFO")
    for seed in (0, 0, 1):
        assert "Replaces" not in caplog.text
        trainer(SimplerCallback(criterion="simpler", seed=seed)).fit(task(), datamodule=datamodule())
    assert f"Replaces the plan of an earlier fit in {tmp_path / 'simpler'}" in caplog.text


@pytest.mark.parametrize("resumed", [False, True])
def test_fast_dev_run_of_a_model_that_is_cut(trainer, task, datamodule, tmp_path, resumed):
    model = task()
    first = trainer(SimplerCallback())
    first.fit(model, datamodule=datamodule())
    first.save_checkpoint(tmp_path / "cut.ckpt")
    plan = (tmp_path / "simpler" / "plan.json").read_bytes()
    again = trainer(SimplerCallback(), fast_dev_run=True)
    again.fit(task() if resumed else model, datamodule=datamodule(), ckpt_path=tmp_path / "cut.ckpt" if resumed else None)
    assert (tmp_path / "simpler" / "plan.json").read_bytes() == plan
    assert again.global_step == (first.global_step if resumed else 1)  # one step in all, as in Lightning


def test_fit_shows_our_log_lines_on_rank_zero_alone(scenes, tmp_path):
    settings = config(scenes, tmp_path)
    settings["trainer"] |= {"limit_train_batches": 1, "limit_val_batches": 0, "max_epochs": 1}
    command = Command(tmp_path, settings, ranks=2)
    assert command.wait() == [0, 0], command.output()
    for line in ("Compared the blocks over", "The plan is in"):
        assert (command.output(0).count(line), command.output(1).count(line)) == (1, 0)
