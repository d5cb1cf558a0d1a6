"""Plans that runs share: made once, found again only by whoever would make the same, whole whatever happens."""

import json
import os
import shutil
import time
from datetime import timedelta
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from terratorch_simpler import GeoTiffTiles, SimplerCallback, SlimmingPlan, cache
from terratorch_simpler.cache import PlanCache, describe_selection, hash_of_weights
from terratorch_simpler.criteria import Bounds, Simpler
from terratorch_simpler.data import DatamoduleTiles
from terratorch_simpler.data.batches import BatchTiles
from terratorch_simpler.errors import ConfigurationError, SimplerWarning
from terratorch_simpler.lightning import selection as lightning_selection
from terratorch_simpler.selection_config import SelectionConfig
from tests import datamodules
from tests.cli_runner import CONTEXT, Command, config
from tests.extras import needs_peft
from tests.in_memory_tiles import Tiles, land

pytestmark = pytest.mark.filterwarnings(
    "ignore::terratorch_simpler.errors.UntrainedEncoderWarning",
    "ignore::terratorch_simpler.errors.FewTilesWarning",
    "ignore::terratorch_simpler.errors.SkippedTilesWarning",
)


@pytest.fixture
def streams(monkeypatch):
    """Counts how often tiles are streamed."""
    from terratorch_simpler.lightning import selection

    calls, measure = [], selection.measure
    monkeypatch.setattr(selection, "measure", lambda *args, **kwargs: calls.append(1) or measure(*args, **kwargs))
    return calls


@pytest.fixture
def choose(trainer, task, datamodule, tmp_path):
    """Fit for no step at all; gives the plan."""

    def fit(module=None, data=None, run=None, **callback):
        module = module or task()
        callback = {"plan_cache": str(tmp_path / "cache"), "output_dir": str(tmp_path / "out"), **callback}
        trainer(SimplerCallback(**callback), limit_train_batches=0, limit_val_batches=0, **(run or {})).fit(
            module, datamodule=data or datamodule()
        )
        plan = SlimmingPlan.load(tmp_path / "out" / "plan.json")
        assert module.model.encoder.kept == plan.kept_blocks
        return plan

    return fit


def test_a_second_run_streams_nothing_and_says_so(choose, streams, tmp_path, caplog):
    first = choose()
    with caplog.at_level("INFO"):
        again = choose()
    assert again == first
    assert len(streams) == 1
    assert "Took the plan of an earlier run with the same encoder, tiles and settings from" in caplog.text
    (kept,) = (tmp_path / "cache").iterdir()  # no lock, no unfinished pass is left
    assert SlimmingPlan.load(kept) == first


def test_batch_size_and_workers_are_not_part_of_the_question(choose, streams, datamodule):
    choose()
    choose(data=datamodule(batch_size=3, num_workers=1))
    assert len(streams) == 1


@pytest.fixture(scope="module")
def of_another_run(tmp_path_factory):
    """A cache that the first test fills."""
    return tmp_path_factory.mktemp("run") / "cache"


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"seed": 1},
        {"min_depth": 4},
        {"max_tiles": 300},
        {"tokens": "mean"},
        {"weights": 1},
        {"data": {"means": [600.0] * 6}},
        {"data": {"no_data_replace": 1}},
        {"data": {"constant_scale": 0.5}},
        {"data": {"img_grep": "*[1-9]_image.tif", "label_grep": "*[1-9]_mask.tif", "train_split": None}},
        {"run": {"precision": "bf16-mixed"}},
        {"tiles": 32},
    ],
    ids=str,
)
def test_whatever_the_plan_depends_on_makes_another(
    choose, streams, task, datamodule, scenes, tmp_path, of_another_run, changed
):
    if not of_another_run.exists():
        choose(plan_cache=str(of_another_run))
        streams.clear()
    shutil.copytree(of_another_run, tmp_path / "cache")
    expected = [1] if changed else []
    changed = dict(changed)
    data = changed.pop("data", {})
    more = {"data": datamodule(**data)}
    if changed.pop("weights", None):
        more["module"] = task(seed=5)
    if size := changed.pop("tiles", None):
        more["tiles"] = GeoTiffTiles(str(scenes / "images"), tile_size=size)
    choose(**more, **changed)
    assert streams == expected


def test_a_changed_image_of_the_same_size_among_the_first_is_seen(choose, streams, datamodule, scenes, tmp_path):
    images = shutil.copytree(scenes / "images", tmp_path / "images")
    choose(data=datamodule(train_data_root=images))
    for path in images.iterdir():
        with rasterio.open(path, "r+") as target:
            pixels = target.read()
            target.write(np.where(pixels == target.nodata, pixels, pixels + 1))
    choose(data=datamodule(train_data_root=images))
    assert len(streams) == 2


def restored(path, change):
    """Change a file, and give it the time of the last change that it had."""
    times = os.stat(path)
    change(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def other_pixels(path):
    size = path.stat().st_size
    with rasterio.open(path, "r+") as target:
        pixels = target.read()
        target.write(np.where(pixels == target.nodata, pixels, pixels[:, ::-1]))
    assert path.stat().st_size == size


@pytest.mark.parametrize("source", ["datamodule", "tiles"])
def test_other_pixels_in_any_file_of_the_same_size_and_time_are_seen(choose, streams, datamodule, scenes, tmp_path, source):
    images = shutil.copytree(scenes / "images", tmp_path / "images")
    for path in images.iterdir():  # the size stays the same where nothing is compressed
        with rasterio.open(path) as source_file:
            profile, pixels = {**source_file.profile, "compress": None}, source_file.read()
        with rasterio.open(path, "w", **profile) as target:
            target.write(pixels)
    arguments = {"train_data_root": images}

    def again():
        tiles = {"tiles": GeoTiffTiles(str(images), tile_size=64)} if source == "tiles" else {}
        choose(data=datamodule(**arguments), **tiles)

    again()
    order = DatamoduleTiles(set_up(datamodule(**arguments)))._order
    names = (scenes / "splits" / "train.txt").read_text().split()
    for count, position in enumerate((20, 47), start=2):
        restored(next(images.glob(f"*{names[order[position]]}*")), other_pixels)
        again()
        assert len(streams) == count


def set_up(datamodule):
    datamodule.setup("fit")
    return datamodule


def test_a_touched_file_is_a_changed_one_and_a_copy_with_its_times_is_not(choose, streams, datamodule, scenes, tmp_path):
    images = shutil.copytree(scenes / "images", tmp_path / "images")
    choose(data=datamodule(train_data_root=images))
    copies = shutil.copytree(images, tmp_path / "elsewhere")
    choose(data=datamodule(train_data_root=copies))
    assert len(streams) == 1
    os.utime(next(images.glob("*0003_image.tif")), (1e9, 1e9))
    choose(data=datamodule(train_data_root=images))
    assert len(streams) == 2


def test_every_tile_counts_on_request(datamodule, build, trainer, task):
    """64 of these 200 windows are looked at, or all of them."""
    from terratorch_simpler.criteria import Bounds, Simpler
    from terratorch_simpler.lightning import selection

    how = selection.SelectionConfig(Simpler(), Bounds(), 1.0, "patch", 32, 4096, 0)
    source = Tiles(land(200, size=32))
    source.modification_fingerprint = lambda: ""
    run = trainer()
    some = selection._cache_key(run, task(), build(), source, how)["seen"]
    every = selection._cache_key(run, task(), build(), source, how, every_tile=True)["seen"]
    assert (len(some), len(every)) == (50, 200)
    assert [position for position, _ in some] == list(range(0, 200, 4))
    source.images[199] += 1
    assert selection._cache_key(run, task(), build(), source, how, every_tile=True)["seen"] != every
    assert PlanCache("folder", every_tile=True).every_tile


def test_files_of_every_modality_count(tmp_path):
    datamodule = set_up(datamodules.multimodal(tmp_path))
    before = DatamoduleTiles(datamodule).modification_fingerprint()
    os.utime(tmp_path / "train" / "S1" / "3_s1.tif", (1e9, 1e9))
    assert DatamoduleTiles(datamodule).modification_fingerprint() != before


def test_a_plan_given_by_hand_wins(choose, streams, tmp_path):
    first = choose()
    by_hand = tmp_path / "hand.json"
    content = json.loads((tmp_path / "out" / "plan.json").read_text())
    by_hand.write_text(json.dumps({**content, "kept_blocks": [0, 1, 2]}))
    assert choose(plan=str(by_hand)).kept_blocks == (0, 1, 2) != first.kept_blocks
    assert len(streams) == 1


def test_dry_runs_keep_nothing(choose, trainer, task, datamodule, tmp_path):
    callback = SimplerCallback(plan_cache=str(tmp_path / "cache"))
    trainer(callback, fast_dev_run=True).fit(task(), datamodule=datamodule())
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", [b"", b"{", b'{"format": "terratorch-simpler/plan"}', b"\x80\x04c", None])
def test_a_damaged_entry_is_made_anew(choose, streams, tmp_path, content):
    first = choose()
    (kept,) = (tmp_path / "cache").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.warns(SimplerWarning, match="It is made again"):
        again = choose()
    assert again == first
    assert len(streams) == 2
    assert SlimmingPlan.load(kept) == first


def test_a_plan_of_another_encoder_in_its_place_is_not_applied(choose, tmp_path):
    first = choose()
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_text(kept.read_text().replace('"prithvi_eo_v2_tiny_tl"', '"prithvi_eo_v1_100"'))
    with pytest.warns(SimplerWarning, match="Found a plan for backbone 'prithvi_eo_v1_100'.*It is made again"):
        assert choose() == first


def test_a_folder_that_cannot_be_made_is_said_before_streaming(choose, streams, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match=r"Could not write to plan_cache .*expected a folder to write to"):
        choose(plan_cache=str(tmp_path / "file" / "cache"))
    assert not streams


def test_a_plan_that_cannot_be_kept_is_applied_all_the_same(choose, tmp_path, monkeypatch):
    save = SlimmingPlan.save

    def full(self, path):
        if "cache" in str(path):
            raise OSError(28, "No space left on device")
        return save(self, path)

    monkeypatch.setattr(SlimmingPlan, "save", full)
    with pytest.warns(SimplerWarning, match="Could not write the plan to plan_cache"):
        assert choose().kept_blocks


@pytest.mark.filterwarnings("ignore:You are using PEFT without")
@needs_peft
def test_random_adapters_and_prompts_do_not_matter_to_the_key(task, build):
    lora = {"method": "LORA", "replace_qkv": "qkv", "peft_config_kwargs": {"target_modules": ["q_linear"], "r": 2}}

    def with_lora(seed, peft_config):
        module = task(peft_config=peft_config, seed=0)
        torch.manual_seed(seed)
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter)
        return hash_of_weights(next(part for part in module.modules() if type(part).__name__ == "SimplerBackbone"))

    assert with_lora(1, lora) == with_lora(2, lora)
    prompts = []
    for seed in (1, 2):
        backbone = build(vpt=True, vpt_n_tokens=4)
        torch.manual_seed(seed)
        for name, parameter in backbone.named_parameters():
            if "vpt" in name:
                torch.nn.init.normal_(parameter)
        prompts.append(hash_of_weights(backbone))
    assert prompts[0] == prompts[1]
    assert prompts[0] != hash_of_weights(build(seed=3))


# --- at the same time


def sleep_while_measuring(rank):
    from terratorch_simpler.lightning import selection

    measure = selection.measure

    def slow(*args, **kwargs):
        print("streaming", flush=True)
        time.sleep(2)
        return measure(*args, **kwargs)

    selection.measure = slow


def test_four_runs_at_once_share_one_selection(scenes, tmp_path):
    """An array job: all start together, one streams."""
    commands = [
        Command(
            tmp_path / str(number), config(scenes, tmp_path / str(number), plan_cache=str(tmp_path / "cache")),
            "--trainer.max_epochs", "0", before=sleep_while_measuring,
        )
        for number in range(4)
    ]  # fmt: skip
    assert [command.wait() for command in commands] == [[0]] * 4, commands[0].output()
    assert sum("\nstreaming\n" in command.output() for command in commands) == 1
    plans = [SlimmingPlan.load(tmp_path / str(number) / "simpler" / "plan.json") for number in range(4)]
    assert all(plan == plans[0] for plan in plans)
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".json"]


def hold(path, seconds):
    from filelock import FileLock

    with FileLock(path):
        (open(f"{path}.held", "w")).close()
        time.sleep(seconds)


def entry_while_held(folder, seconds, monkeypatch, build):
    backbone, cache = build(), PlanCache(folder)
    with cache.entry({"a": 1}, backbone) as (path, _):
        pass
    lock = path.with_suffix(".lock")
    holder = CONTEXT.Process(target=hold, args=(str(lock), seconds))
    holder.start()
    while not lock.with_name(f"{lock.name}.held").exists():
        time.sleep(0.05)
    started = time.monotonic()
    with cache.entry({"a": 1}, backbone) as (again, plan):
        waited = time.monotonic() - started
    assert (again, plan) == (path, None)
    holder.kill()
    holder.join()
    return timedelta(seconds=waited)


def test_a_run_that_hangs_is_not_waited_for_forever(tmp_path, monkeypatch, build, caplog):
    monkeypatch.setattr(cache, "PATIENCE_SECONDS", 1.0)
    with caplog.at_level("INFO"):
        assert entry_while_held(tmp_path, 30, monkeypatch, build) < timedelta(seconds=10)
    assert "Going on without the lock" in caplog.text


def test_a_run_that_died_holds_no_lock(tmp_path, monkeypatch, build):
    assert entry_while_held(tmp_path, 1.5, monkeypatch, build) < timedelta(seconds=10)


def test_a_file_system_without_locks_only_costs_work(tmp_path, monkeypatch, build):
    import fcntl

    def refuse(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with PlanCache(tmp_path).entry({"a": 1}, build()) as (_, plan):
        assert plan is None


ANSWERS = st.dictionaries(st.text(), st.integers() | st.text())


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(one=ANSWERS, other=ANSWERS)
def test_another_question_is_another_entry(tmp_path, build, one, other):
    backbone, paths = _small(build), []
    for selection in (one, other):
        with PlanCache(tmp_path).entry(selection, backbone) as (path, _):
            paths.append(path)
    assert (paths[0] == paths[1]) == (one == other)


def _small(build, _built=[]):  # noqa: B006  built once for all examples
    if not _built:
        _built.append(build(embed_dim=48, num_heads=3, depth=2))
    return _built[0]


def test_settings_that_no_weight_shows_are_part_of_the_key(build):
    """The wavelengths of DOFA; of distilled adapters their scale; and the arguments of a criterion of one's own."""

    def encoder(**arguments):
        return lightning_selection._encoder_key(SimpleNamespace(hparams={"model_args": arguments}))

    one = encoder(backbone="simpler_dofa", backbone_model_bands=["RED", "GREEN"], decoder="UNetDecoder")
    assert one != encoder(backbone="simpler_dofa", backbone_model_bands=["GREEN", "RED"], decoder="UNetDecoder")
    assert one == encoder(backbone_model_bands=["RED", "GREEN"], backbone_ckpt_path="elsewhere.pt", decoder="FCNDecoder")
    assert lightning_selection._encoder_key(SimpleNamespace()) == "[]"

    config = SelectionConfig(Simpler(), Bounds(), 1.0, "patch", 32, 64, 0, recovery="distill")
    keys = []
    for options in ({"lora_alpha": 8}, {"lora_alpha": 64}, {"lora_alpha": 8, "use_rslora": True}, {"lora_alpha": 8}):
        adapter = SimpleNamespace(to_dict=lambda options=options: options | {"target_modules": {"qkv", "fc1"}})
        keys.append(lightning_selection._recovery_key(config, SimpleNamespace(peft_config={"default": adapter})))
    assert keys[0] == keys[3]
    assert len({json.dumps(key) for key in keys}) == 3

    class Mine(Simpler):
        def __init__(self, depth):
            self.depth = depth

    backbone, images = _small(build), land(40).split(8)
    source = BatchTiles([{"image": batch} for batch in images], 40, 32)
    described = [
        describe_selection(backbone, source, criterion, Bounds(), 40, lambda inputs: inputs)["criterion"]
        for criterion in (Mine(2), Mine(3), Mine(2), Simpler())
    ]
    assert described[0] == described[2]
    assert described[0] != described[1]
    assert described[0][1] != described[3][1]
