"""SimplerCallback inside real Lightning runs of TerraTorch's task and datamodule."""

import copy
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from terratorch.models import EncoderDecoderFactory
from terratorch.registry import BACKBONE_REGISTRY
from terratorch.tasks import SemanticSegmentationTask

from terratorch_simpler import GeoTiffTiles, SimplerCallback, SlimmingPlan
from terratorch_simpler.criteria import Fixed
from terratorch_simpler.errors import (
    CheckpointError,
    ConfigurationError,
    DegenerateFeaturesError,
    DepthError,
    FewTilesWarning,
    PlanError,
    SimplerWarning,
    SkippedTilesWarning,
    TilesError,
    UntrainedEncoderWarning,
)
from terratorch_simpler.pruning.recovery import RecoveryWeights
from tests.extras import needs_peft

# The encoders here are random and the tiles few; what is tested does not depend on it.
pytestmark = pytest.mark.filterwarnings(
    "ignore::terratorch_simpler.errors.UntrainedEncoderWarning", "ignore::terratorch_simpler.errors.FewTilesWarning"
)


@pytest.fixture
def trainer(trainer):
    """One step of training, if not said otherwise: what is tested here happens before it."""

    def make(*callbacks, **kwargs):
        return trainer(*callbacks, **{"limit_train_batches": 1, "limit_val_batches": 1, **kwargs})

    return make


def plan_of(folder) -> SlimmingPlan:
    return SlimmingPlan.load(folder / "plan.json")


def test_fit_cuts_before_the_optimizer_exists(trainer, task, datamodule, tmp_path, capsys):
    module, run = task(), trainer(SimplerCallback())
    downstream = {n: id(m) for n, m in module.model.named_modules() if n and not n.startswith("encoder")}
    run.fit(module, datamodule=datamodule())
    backbone = module.model.encoder
    assert 2 <= backbone.num_blocks <= 10
    held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    assert downstream == {n: id(m) for n, m in module.model.named_modules() if n and not n.startswith("encoder")}
    plan = plan_of(tmp_path / "simpler")
    assert plan == backbone.plan
    assert plan.kept_blocks == backbone.kept == tuple(range(backbone.num_blocks))
    assert (plan.tiles_seen, plan.rows_seen > 500, plan.votes) == (48, True, None)
    assert plan.parameters == {"before": 5_634_050, "after": backbone.num_parameters()}
    assert plan.macs["after"] < plan.macs["before"]
    assert max(plan.scores, key=plan.scores.get) == backbone.num_blocks
    assert plan.data["input_shape"] == [6, 64, 64]
    assert plan.versions["terratorch"]
    out = capsys.readouterr().out
    assert f"first {backbone.num_blocks} of 12 blocks kept" in out
    assert "5.6 M" in out
    with (tmp_path / "simpler" / "report.png").open("rb") as file:
        assert file.read(8) == b"\x89PNG\r\n\x1a\n"
    assert {path.name for path in (tmp_path / "simpler").iterdir()} == {"plan.json", "report.html", "report.png"}


def test_training_is_that_of_an_encoder_built_with_that_depth(trainer, task, datamodule):
    """Nothing of the selection leaks into training: same random numbers, same batches, same weights."""
    torch.manual_seed(0)
    chosen = task()
    torch.manual_seed(1)
    trainer(SimplerCallback(), limit_train_batches=None, limit_val_batches=None).fit(chosen, datamodule=datamodule())
    built = task(backbone_keep=list(chosen.model.encoder.kept))
    torch.manual_seed(1)
    trainer(limit_train_batches=None, limit_val_batches=None).fit(built, datamodule=datamodule())
    ours, theirs = chosen.state_dict(), built.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"])
@pytest.mark.filterwarnings("ignore:You passed `Trainer")
def test_precisions(trainer, task, datamodule, tmp_path, precision):
    module = task()

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    module.configure_optimizers = stop  # the cut is what is tested, not whether TerraTorch trains in this precision
    with pytest.raises(Stop):
        trainer(SimplerCallback(), precision=precision).fit(module, datamodule=datamodule())
    assert plan_of(tmp_path / "simpler").tiles_seen == 48


def test_fast_dev_run_cuts_and_writes_nothing(trainer, task, datamodule, tmp_path):
    module = task()
    trainer(SimplerCallback(), fast_dev_run=True).fit(module, datamodule=datamodule())
    assert module.model.encoder.num_blocks < 12
    assert not list(tmp_path.iterdir())


def test_figure_goes_to_tensorboard_and_files_to_the_log_dir(trainer, task, datamodule, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    trainer(SimplerCallback(), logger=logger).fit(task(), datamodule=datamodule())
    assert plan_of(tmp_path / "lightning_logs" / "version_0" / "simpler").full_num_blocks == 12
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 1}).Reload()
    assert "simpler/report" in events.Tags()["images"]

    (text,) = events.Tensors("simpler/report/text_summary")
    told = text.tensor_proto.string_val[0].decode()
    assert "of 12 blocks kept**" in told
    assert "| parameters | 5.6 M |" in told


class Remembers(Logger):
    """Stands in for a logger that is not installed here: remembers what it was given."""

    name, version = "stand-in", 0

    def __init__(self):
        self.given = []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, *args, **kwargs):
        pass


class LikeWandb(Remembers):
    def log_image(self, key, images, step=None):
        self.given.append((key, [Path(image).name for image in images]))

    def log_table(self, key, columns=None, data=None, dataframe=None, step=None):
        self.given.append((key, columns, data))


class LikeMLflow(Remembers, MLFlowLogger):
    run_id = "7"

    @property
    def experiment(self):
        return self

    def log_figure(self, run_id, figure, path):
        self.given.append((run_id, "figure", path))

    def log_artifact(self, run_id, local_path, artifact_path=None):
        self.given.append((run_id, Path(local_path).name, artifact_path))
        assert Path(local_path).read_text().startswith("<!DOCTYPE html>")

    def set_tag(self, run_id, key, value):
        self.given.append((run_id, key, value))

    def finalize(self, status):
        pass


def test_report_goes_to_loggers_in_the_form_they_take(trainer, task, datamodule, tmp_path):
    wandb, mlflow, plain = LikeWandb(), LikeMLflow(), Remembers()
    trainer(SimplerCallback(output_dir=str(tmp_path / "out")), logger=[wandb, mlflow, plain]).fit(
        task(), datamodule=datamodule()
    )
    plan = plan_of(tmp_path / "out")
    (table, columns, rows), picture = wandb.given
    assert (table, columns) == ("simpler/plan", ["encoder", "before", "after", "change"])
    assert rows[0] == ["verdict", "", str(plan.verdict), ""]
    assert rows[1][:3] == ["blocks", "12", str(len(plan.kept_blocks))]
    assert [row[0] for row in rows[1:]] == ["blocks", "parameters", "MACs per tile"]
    assert picture == ("simpler/report", ["report.png"])
    assert mlflow.given == [
        ("7", "report.html", "simpler"),
        ("7", "simpler.verdict", str(plan.verdict)),
        ("7", "figure", "simpler/report.png"),
    ]
    assert plain.given == []


def test_loggers_without_pictures_and_an_output_dir(trainer, task, datamodule, tmp_path):
    callback = SimplerCallback(output_dir=str(tmp_path / "here"))
    trainer(callback, logger=CSVLogger(tmp_path)).fit(task(), datamodule=datamodule())
    assert plan_of(tmp_path / "here")
    assert callback.written == tmp_path / "here"


def test_labels_are_not_read_for_the_choice(trainer, task, datamodule, monkeypatch):
    read = []
    original = rasterio.open
    monkeypatch.setattr(rasterio, "open", lambda path, *a, **k: read.append(str(path)) or original(path, *a, **k))

    class Chosen(Exception):
        pass

    def stop(self, *_, **__):
        raise Chosen

    monkeypatch.setattr(SimplerCallback, "_report", stop)
    with pytest.raises(Chosen):
        trainer(SimplerCallback()).fit(task(), datamodule=datamodule())
    assert len([path for path in read if "_image" in path]) >= 48
    assert not [path for path in read if "_mask" in path]


def plans_of(trainer, task, datamodule, tmp_path, *settings):
    plans = []
    for number, (callback_args, data_args) in enumerate(settings):
        output = tmp_path / str(number)
        module = task()
        trainer(SimplerCallback(output_dir=str(output), **callback_args), max_steps=1).fit(
            module, datamodule=datamodule(**data_args)
        )
        plans.append(plan_of(output))
    return plans


def test_same_plan_whatever_workers_and_batch_size(trainer, task, datamodule, tmp_path):
    plans = plans_of(
        trainer, task, datamodule, tmp_path, ({}, {}), ({}, {"num_workers": 2}), ({}, {"batch_size": 3, "num_workers": 1})
    )
    assert plans[0].kept_blocks == plans[1].kept_blocks == plans[2].kept_blocks
    assert plans[0].similarity == plans[1].similarity
    np.testing.assert_allclose(plans[0].similarity, plans[2].similarity, rtol=0, atol=1e-5)
    assert plans[0].data == plans[1].data == plans[2].data


def test_seed_changes_what_is_drawn_and_repeats(trainer, task, datamodule, tmp_path):
    one, again, other = plans_of(
        trainer, task, datamodule, tmp_path, *[({"seed": seed, "max_tiles": 36, "min_tiles": 32}, {}) for seed in (0, 0, 1)]
    )
    assert one == again
    assert one.similarity != other.similarity
    assert one.data["fingerprint"] != other.data["fingerprint"]


def test_geotiff_tiles_instead_of_the_datamodule(trainer, task, datamodule, scenes, tmp_path):
    tiles = GeoTiffTiles(str(scenes / "images"), tile_size=32, max_nodata_fraction=0.9)
    trainer(SimplerCallback(tiles=tiles)).fit(task(), datamodule=datamodule())
    plan = plan_of(tmp_path / "simpler")
    assert plan.data["source"] == "GeoTiffTiles"
    assert plan.data["input_shape"] == [6, 32, 32]
    assert plan.tiles_seen + sum(tiles.skipped.values()) == 56 * 4


def test_index_of_the_files_is_kept_next_to_the_plan_in_a_folder_of_the_user(trainer, task, datamodule, scenes, tmp_path):
    tiles = GeoTiffTiles(str(scenes / "images"), tile_size=64)
    trainer(SimplerCallback(tiles=tiles, output_dir=str(tmp_path / "out"))).fit(task(), datamodule=datamodule())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"plan.json", "report.html", "report.png", "tiles.json"}
    assert len(json.loads((tmp_path / "out" / "tiles.json").read_text())["files"]) == 56
    again = GeoTiffTiles(str(scenes / "images"), tile_size=64, index_cache=str(tmp_path / "out" / "tiles.json"))
    assert len(again) == len(tiles)


def test_time_spent_waiting_for_tiles_is_told(trainer, task, datamodule, caplog):
    with caplog.at_level("INFO"):
        trainer(SimplerCallback(), limit_train_batches=0).fit(task(), datamodule=datamodule())
    (line,) = [record.getMessage() for record in caplog.records if "for tiles" in record.getMessage()]
    told = re.fullmatch(r"Compared the blocks over 48 tiles in (.+) s; waited (.+) s of these \((.+)%\) for tiles\.", line)
    seconds, waited, share = map(float, told.groups())
    assert 0 < waited < seconds
    assert abs(seconds * share / 100 - waited) < 0.15  # each is rounded


def test_geotiff_tiles_with_time_and_place_for_an_encoder_that_takes_them(trainer, task, datamodule, scenes, tmp_path):
    seen = []
    module = task()
    module.model.encoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append({key: value.shape[1:] for key, value in kwargs.items()}), with_kwargs=True
    )
    tiles = GeoTiffTiles(str(shutil.copytree(scenes / "images", tmp_path / "images")), tile_size=64, use_metadata=True)
    for path in tiles.paths:
        with rasterio.open(path, "r+") as target:
            target.update_tags(DATE_ACQUIRED="2020-07-01")
    trainer(SimplerCallback(tiles=tiles), limit_train_batches=0).fit(module, datamodule=datamodule())
    assert {"temporal_coords": (1, 2), "location_coords": (2,)} in seen


@pytest.mark.parametrize("cached", [False, True])
def test_geotiff_tiles_with_other_bands_than_the_encoder(trainer, task, datamodule, scenes, tmp_path, cached):
    tiles = GeoTiffTiles(str(scenes / "images"), tile_size=64, bands=[1, 2, 3])  # fewer than the datamodule has means for
    callback = SimplerCallback(tiles=tiles, plan_cache=str(tmp_path / "cache") if cached else None)
    with pytest.raises(TilesError, match="Found tiles with 3 bands, expected the 6 bands of 'prithvi_eo_v2_tiny_tl'"):
        trainer(callback).fit(task(), datamodule=datamodule())


def test_an_encoder_behind_a_layer_that_changes_the_bands(trainer, datamodule):
    class Adapted(LightningModule):
        def __init__(self):
            super().__init__()
            self.adapter = torch.nn.Conv2d(6, 3, 1)
            self.encoder = BACKBONE_REGISTRY.build("simpler_timm_vit_tiny_patch16_224", pretrained=False, img_size=64)

        def forward(self, image):
            return self.encoder(self.adapter(image))

        def training_step(self, batch, _):
            return self(batch["image"])[-1].square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    module = Adapted()
    trainer(SimplerCallback(), limit_val_batches=0, limit_train_batches=1).fit(module, datamodule=datamodule())
    assert module.encoder.num_blocks < 12


def test_loaders_without_a_datamodule_need_tiles(trainer, task, datamodule, scenes):
    data = datamodule()
    data.setup("fit")
    with pytest.raises(ConfigurationError, match="There is neither a datamodule nor tiles, expected one of them"):
        trainer(SimplerCallback()).fit(task(), train_dataloaders=data.train_dataloader())
    tiles = GeoTiffTiles(str(scenes / "images"), tile_size=64, means=[1000.0] * 6, stds=[500.0] * 6)
    module = task()
    run = trainer(SimplerCallback(tiles=tiles), limit_train_batches=0)
    run.fit(module, train_dataloaders=data.train_dataloader())
    assert module.model.encoder.num_blocks < 12


def test_bounds_and_budget(trainer, task, datamodule):
    for callback, depth in [
        (SimplerCallback(min_depth=9, max_depth=9), 9),
        (SimplerCallback(criterion="fixed", drop_blocks=7), 5),
        (SimplerCallback(criterion=Fixed(keep=[0, 3, 4])), 3),
    ]:
        module = task()
        trainer(callback, fast_dev_run=True).fit(module, datamodule=datamodule())
        assert module.model.encoder.num_blocks == depth


def test_few_blocks_need_a_depth_by_hand(trainer, task, datamodule):
    arguments = {"backbone": "simpler_prithvi_eo_tiny", "indices": (0, 1, 2, 3)}
    with pytest.raises(DepthError, match="Found an encoder of 4 blocks, expected at least 5"):
        trainer(SimplerCallback()).fit(task(**arguments), datamodule=datamodule())
    module = task(**arguments)
    trainer(SimplerCallback(criterion="fixed", drop_blocks=2), fast_dev_run=True).fit(module, datamodule=datamodule())
    assert module.model.encoder.num_blocks == 2


@pytest.mark.parametrize("given", ["keep", "plan"])
def test_all_blocks_given_by_hand_stay(given, trainer, task, datamodule, tmp_path, monkeypatch):
    monkeypatch.setattr("terratorch_simpler.lightning.callback.select", lambda *a, **k: pytest.fail("selected"))
    path = SlimmingPlan("prithvi_eo_v2_tiny_tl", 12, tuple(range(12)), {"name": "fixed", "args": {}}).save(
        tmp_path / "p.json"
    )
    module = task(**{"keep": {"backbone_keep": 12}, "plan": {"backbone_plan": str(path)}}[given])
    trainer(SimplerCallback(criterion="fixed", drop_blocks=9)).fit(module, datamodule=datamodule())
    assert module.model.encoder.num_blocks == 12


@pytest.mark.parametrize("built", [{"backbone_width": 0.5}, {"backbone_keep": 6}, {"backbone_keep": 4}])
def test_a_plan_for_an_encoder_that_is_built_otherwise_is_refused(built, trainer, task, datamodule, tmp_path):
    path = SlimmingPlan("prithvi_eo_v2_tiny_tl", 12, (0, 1, 2, 3), {"name": "fixed", "args": {}}).save(tmp_path / "p.json")
    module, run = task(**built), trainer(SimplerCallback(plan=str(path)), fast_dev_run=True)
    if built == {"backbone_keep": 4}:  # as the plan says
        run.fit(module, datamodule=datamodule())
        assert module.model.encoder.num_blocks == 4
        return
    with pytest.raises(
        ConfigurationError, match=r"Found both plan .*p\.json \(4 blocks at width 1, recovery none\) and an enc"
    ):
        run.fit(module, datamodule=datamodule())


def test_a_plan_with_maps_is_refused_where_the_encoder_has_none(trainer, task, datamodule, tmp_path):
    maps = {4: RecoveryWeights(torch.eye(192), torch.eye(192))}
    kept, criterion = (0, 1, 2, 3), {"name": "fixed", "args": {}}
    plan = SlimmingPlan("prithvi_eo_v2_tiny_tl", 12, kept, criterion, recovery="linear", maps=maps)
    path = plan.save(tmp_path / "p.json")
    run = trainer(SimplerCallback(plan=str(path)), fast_dev_run=True)
    with pytest.raises(ConfigurationError, match=r"recovery linear\) and an encoder that is built with 4 of 12 blocks"):
        run.fit(task(backbone_keep=list(plan.kept_blocks)), datamodule=datamodule())


def test_a_quick_try_of_a_recovery_is_quick_and_sees_enough_tiles(trainer, task, datamodule, monkeypatch):
    seen = []

    class Selected(Exception):
        pass

    def select(*args):
        seen.append(args[4])
        raise Selected

    monkeypatch.setattr("terratorch_simpler.lightning.callback.select", select)
    for recovery in ("none", "linear", "distill"):
        with pytest.raises(Selected):
            trainer(SimplerCallback(recovery=recovery), fast_dev_run=True).fit(task(), datamodule=datamodule())
    assert [(config.min_tiles, config.max_tiles) for config in seen] == [(64, 64), (256, 256), (64, 64)]
    assert all(config.recovery_steps == 2 for config in seen)


def test_hooks_of_a_datamodule_that_are_not_called_are_named(trainer, task, datamodule, recwarn):
    data = datamodule()
    trainer(SimplerCallback(), fast_dev_run=True).fit(task(), datamodule=data)
    assert not [warning for warning in recwarn if "is not called while" in str(warning.message)]

    class OwnHook(type(data)):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return super().on_after_batch_transfer(batch, dataloader_idx)

    data.__class__ = OwnHook
    with pytest.warns(SimplerWarning, match=r"OwnHook\.on_after_batch_transfer is not called while tiles are compared"):
        trainer(SimplerCallback(), fast_dev_run=True).fit(task(), datamodule=data)


def test_given_plan_is_applied_without_streaming(trainer, task, datamodule, tmp_path, monkeypatch):
    monkeypatch.setattr("terratorch_simpler.lightning.selection.measure", lambda *a, **k: pytest.fail("streamed"))
    plan = SlimmingPlan("prithvi_eo_v2_tiny_tl", 12, (0, 1, 2, 3), {"name": "simpler", "args": {}})
    path = plan.save(tmp_path / "given.json")
    module = task()
    trainer(SimplerCallback(plan=str(path))).fit(module, datamodule=datamodule())
    assert module.model.encoder.plan == plan == plan_of(tmp_path / "simpler")
    assert {path.name for path in (tmp_path / "simpler").iterdir()} == {"plan.json", "report.html"}  # no similarity to draw


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "prithvi_eo_v2_300_tl"}, "Found a plan for backbone 'prithvi_eo_v2_300_tl'"),
        ({"version": 3}, "Found 3 for key 'version'"),
        ({"kept_blocks": [0, 30]}, "for key 'kept_blocks'"),
    ],
)
def test_wrong_plan_is_refused_before_anything_is_cut(trainer, task, datamodule, tmp_path, changes, message):
    plan = SlimmingPlan("prithvi_eo_v2_tiny_tl", 12, (0, 1), {"name": "simpler", "args": {}})
    path = plan.save(tmp_path / "given.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    module = task()
    with pytest.raises(PlanError, match=message):
        trainer(SimplerCallback(plan=str(path))).fit(module, datamodule=datamodule())
    assert module.model.encoder.num_blocks == 12
    assert not list((tmp_path / "simpler").glob("*"))


def test_plain_backbone_is_refused_with_the_line_to_write(trainer, task, datamodule):
    with pytest.raises(ConfigurationError, match="write backbone: simpler_prithvi_eo_v2_tiny_tl"):
        trainer(SimplerCallback()).fit(task("prithvi_eo_v2_tiny_tl"), datamodule=datamodule())


def test_fewer_than_32_tiles_are_an_error(trainer, task, datamodule, scenes, tmp_path):
    module = task()
    split = tmp_path / "few.txt"
    split.write_text("\n".join(f"scene_{i:04d}" for i in range(20)))
    with pytest.raises(
        TilesError,
        match=r"Only 20 usable tiles; comparing blocks needs at least 32.*more unlabeled.*or a plan, or set backbone_keep",
    ):
        trainer(SimplerCallback()).fit(module, datamodule=datamodule(train_split=split))
    assert module.model.encoder.num_blocks == 12
    assert not list((tmp_path / "simpler").glob("*"))


@pytest.mark.filterwarnings("always::terratorch_simpler.errors.SimplerWarning")
def test_warnings_about_few_tiles_and_random_weights(trainer, task, datamodule):
    with (
        pytest.warns(FewTilesWarning, match=r"Only 48 tiles available \(256 recommended"),
        pytest.warns(UntrainedEncoderWarning),
    ):
        trainer(SimplerCallback()).fit(task(), datamodule=datamodule())


@pytest.mark.parametrize("averaging", [StochasticWeightAveraging(1e-3), WeightAveraging()])
def test_callbacks_that_copy_the_model_must_come_after(trainer, task, datamodule, averaging):
    averaging = copy.deepcopy(averaging)
    with pytest.raises(ConfigurationError, match=f"Found {type(averaging).__name__}, which has copied the intact model"):
        trainer(copy.deepcopy(averaging), SimplerCallback()).fit(task(), datamodule=datamodule())
    module = task()
    trainer(SimplerCallback(), averaging, max_epochs=2).fit(module, datamodule=datamodule())
    assert module.model.encoder.num_blocks < 12


def test_two_backbones_are_refused(trainer, task, datamodule):
    module = task()
    module.second = task().model
    with pytest.raises(ConfigurationError, match="Found 2 SimplerBackbones"):
        trainer(SimplerCallback()).fit(module, datamodule=datamodule())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_tiles": 300, "max_tiles": 200}, "Found min_tiles 300 and max_tiles 200"),
        ({"min_depth": 5, "max_depth": 4}, "Found min_depth 5 above max_depth 4"),
        ({"criterion": "best"}, "Found criterion 'best'"),
        ({"drop_blocks": 3}, "which needs no budget"),
    ],
)
def test_options_that_contradict_are_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        SimplerCallback(**options)


def test_encoder_that_is_cut_already_is_left_alone(trainer, task, datamodule, tmp_path):
    module = task(backbone_keep=4)
    trainer(SimplerCallback()).fit(module, datamodule=datamodule())
    assert module.model.encoder.num_blocks == 4
    assert not list((tmp_path / "simpler").glob("*"))


def test_resuming_takes_the_shape_of_the_checkpoint_and_streams_nothing(trainer, task, datamodule, tmp_path, monkeypatch):
    first = task()
    saved = ModelCheckpoint(dirpath=tmp_path, filename="last")
    run = trainer(SimplerCallback(max_depth=6), saved, enable_checkpointing=True)
    run.fit(first, datamodule=datamodule())
    monkeypatch.setattr("terratorch_simpler.lightning.selection.measure", lambda *a, **k: pytest.fail("streamed"))
    second = task(seed=5)
    again = trainer(SimplerCallback(), max_epochs=2)
    again.fit(second, datamodule=datamodule(), ckpt_path=tmp_path / "last.ckpt")
    assert second.model.encoder.kept == first.model.encoder.kept
    assert again.global_step == 2 * run.global_step
    held = {id(p) for group in again.optimizers[0].param_groups for p in group["params"]}
    assert held == {id(p) for p in second.parameters()}
    states = [r.optimizers[0].state_dict()["state"] for r in (run, again)]
    assert states[0].keys() == states[1].keys()  # moments of exactly the kept parameters were restored


def test_resuming_works_even_if_lightning_hides_the_path(trainer, task, datamodule, tmp_path, monkeypatch):
    """Were the path not found, the encoder would be measured again, and the checkpoint's shape still win."""
    first = task()
    saved = ModelCheckpoint(dirpath=tmp_path, filename="last")
    trainer(SimplerCallback(max_depth=3), saved, enable_checkpointing=True).fit(first, datamodule=datamodule())
    monkeypatch.setattr("terratorch_simpler.lightning.callback.checkpoint_to_resume", lambda _: (None, True))
    second = task(seed=5)
    trainer(SimplerCallback(min_depth=8), max_epochs=2).fit(
        second, datamodule=datamodule(), ckpt_path=tmp_path / "last.ckpt"
    )
    assert second.model.encoder.kept == first.model.encoder.kept


def test_checkpoint_of_a_plain_backbone_is_refused(trainer, task, datamodule, tmp_path):
    saved = ModelCheckpoint(dirpath=tmp_path, filename="plain")
    trainer(saved, enable_checkpointing=True).fit(task("prithvi_eo_v2_tiny_tl"), datamodule=datamodule())
    with pytest.raises(CheckpointError, match=r"Checkpoint .*plain.ckpt has no 'kept_blocks'"):
        trainer(SimplerCallback(), max_epochs=2).fit(task(), datamodule=datamodule(), ckpt_path=tmp_path / "plain.ckpt")


def test_checkpoint_of_a_deeper_encoder_is_refused(trainer, task, datamodule, tmp_path):
    saved = ModelCheckpoint(dirpath=tmp_path, filename="deep")
    narrow = {"backbone_embed_dim": 48, "backbone_num_heads": 3}
    deep = task("simpler_prithvi_eo_v2_300_tl", **narrow, backbone_keep=[0, 20])
    trainer(saved, enable_checkpointing=True).fit(deep, datamodule=datamodule())
    with pytest.raises(
        CheckpointError, match="Found a checkpoint of an encoder with 24 blocks, expected one of 'prithvi_eo_v2"
    ):
        trainer(SimplerCallback(), max_epochs=2).fit(task(), datamodule=datamodule(), ckpt_path=tmp_path / "deep.ckpt")


def test_nan_weights_are_an_error_that_names_the_block(trainer, task, datamodule, tmp_path):
    module = task()
    with torch.no_grad():
        module.model.encoder.blocks[4].mlp.fc1.bias[0] = float("nan")
    with pytest.raises(DegenerateFeaturesError, match="NaN or Inf after encoder block 4, 5, 6"):
        trainer(SimplerCallback()).fit(module, datamodule=datamodule())
    assert module.model.encoder.num_blocks == 12
    assert not any(m._forward_hooks for m in module.modules())
    assert not list((tmp_path / "simpler").glob("*"))


@pytest.mark.filterwarnings("always::terratorch_simpler.errors.SkippedTilesWarning")
def test_tiles_with_nan_are_skipped_and_counted(trainer, task, datamodule, tmp_path):
    with pytest.warns(SkippedTilesWarning, match=r"Skipped tiles: \d+ NaN without no_data_replace; first: .*_image.tif"):
        trainer(SimplerCallback(), limit_train_batches=0).fit(task(), datamodule=datamodule(no_data_replace=None))
    plan = plan_of(tmp_path / "simpler")
    assert plan.tiles_seen == 48 - plan.data["skipped"]["NaN without no_data_replace"] < 48


@needs_peft
def test_lora_attached_by_the_task(trainer, task, datamodule):
    lora = {"method": "LORA", "replace_qkv": "qkv", "peft_config_kwargs": {"target_modules": ["q_linear"], "r": 2}}
    with pytest.warns(UserWarning, match="PEFT without a pretrained backbone"):
        module = task(peft_config=lora)
    trainer(SimplerCallback(max_depth=5)).fit(module, datamodule=datamodule())
    assert {n.split(".blocks.")[1][0] for n, _ in module.named_parameters() if "lora_" in n} <= set("01234")
    with pytest.warns(UserWarning, match="PEFT without a pretrained backbone"):
        fresh = task(peft_config=lora, seed=3)
    fresh.load_state_dict(module.state_dict(), strict=True)


@pytest.mark.filterwarnings("ignore:expand_temporal_dimension=True assumes")
def test_time_series_in_a_temporal_wrapper(trainer, task, datamodule, scenes, tmp_path):
    """Two dates stacked in one file, each through the encoder by itself."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    for path in sorted((scenes / "images").glob("*.tif"))[:36]:
        with rasterio.open(path) as src:
            pixels, profile = src.read(), {**src.profile, "count": 12}
        with rasterio.open(folder / path.name, "w", **profile) as dst:
            dst.write(np.concatenate([pixels, np.where(pixels == -9999, pixels, pixels // 2)]))
    bands = ["BLUE", "GREEN", "RED", "NIR_NARROW", "SWIR_1", "SWIR_2"]
    series = {"expand_temporal_dimension": True, "dataset_bands": bands, "output_bands": bands, "rgb_indices": [0, 1, 2]}
    data = datamodule(train_data_root=folder, val_data_root=folder, **series)
    module = task(backbone_use_temporal=True)
    trainer(SimplerCallback(), limit_train_batches=1, limit_val_batches=0).fit(module, datamodule=data)
    assert module.model.encoder.encoder.num_blocks < 12
    assert plan_of(tmp_path / "simpler").data["input_shape"] == [6, 64, 64]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_the_gpu_chooses_what_the_cpu_chooses(trainer, task, datamodule, tmp_path, precision):
    plans = []
    for accelerator in ("cpu", "gpu"):
        output = tmp_path / accelerator
        run = trainer(
            SimplerCallback(output_dir=str(output)),
            accelerator=accelerator,
            devices=1,
            precision=precision if accelerator == "gpu" else "32-true",
        )
        run.fit(task(), datamodule=datamodule())
        plans.append(plan_of(output))
    np.testing.assert_allclose(
        plans[0].similarity, plans[1].similarity, rtol=0, atol=1e-4 if precision == "32-true" else 2e-2
    )
    assert plans[0].kept_blocks == plans[1].kept_blocks or precision != "32-true"


@pytest.mark.gpu
def test_tiles_lie_in_page_locked_memory_for_the_gpu(trainer, task, datamodule, scenes, tmp_path, monkeypatch):
    pinned, plans = [], []
    collate = GeoTiffTiles._collate
    monkeypatch.setattr(
        GeoTiffTiles, "_collate", lambda self, image, tiles: pinned.append(image.is_pinned()) or collate(self, image, tiles)
    )
    for accelerator in ("cpu", "gpu"):
        tiles, output = GeoTiffTiles(str(scenes / "images"), tile_size=32), tmp_path / accelerator
        run = trainer(SimplerCallback(tiles=tiles, output_dir=str(output)), accelerator=accelerator, devices=1)
        run.fit(task(), datamodule=datamodule())
        plans.append(plan_of(output))
        assert set(pinned) == {accelerator == "gpu"}
        pinned.clear()
    np.testing.assert_allclose(plans[0].similarity, plans[1].similarity, rtol=0, atol=1e-4)


def test_any_lightning_module_with_a_simpler_backbone_will_do(trainer, datamodule):
    class Own(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = EncoderDecoderFactory().build_model(
                "segmentation", "simpler_prithvi_eo_v2_tiny_tl", "FCNDecoder", num_classes=6, decoder_channels=8
            )

        def forward(self, x, **kwargs):
            return self.net(x, **kwargs).output

        def training_step(self, batch, _):
            return torch.nn.functional.cross_entropy(self(batch["image"]), batch["mask"].long(), ignore_index=-1)

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    module = Own()
    trainer(SimplerCallback(), limit_val_batches=0).fit(module, datamodule=datamodule())
    assert module.net.encoder.num_blocks < 12
    assert not isinstance(module, SemanticSegmentationTask)


# --- export at the end of fit


def test_export_that_cannot_work_is_refused_before_streaming(trainer, datamodule, task, monkeypatch, tmp_path):
    monkeypatch.setattr("terratorch_simpler.lightning.selection.measure", lambda *args, **kwargs: pytest.fail("streamed"))
    terramind = task(
        "simpler_terramind_v1_tiny", backbone_modalities={"image": 6},
        necks=[{"name": "SelectIndices", "indices": [2, 5, 8, 11]}, {"name": "ReshapeTokensToImage"},
               {"name": "LearnedInterpolateToPyramidal"}],
    )  # fmt: skip
    with pytest.raises(
        ConfigurationError, match="Found export: true for 'terramind_v1_tiny', expected an encoder whose dep"
    ):
        trainer(SimplerCallback(export=True), enable_checkpointing=True).fit(terramind, datamodule=datamodule())
    with pytest.raises(ConfigurationError, match="Found export: true without checkpoints"):
        trainer(SimplerCallback(export=True)).fit(task(), datamodule=datamodule())
    with pytest.raises(ConfigurationError, match="Found export: true with recovery: linear, expected another"):
        trainer(SimplerCallback(export=True, recovery="linear"), enable_checkpointing=True).fit(
            task(), datamodule=datamodule()
        )


def test_export_without_the_command_line_writes_the_task(trainer, datamodule, task, tmp_path):
    callback = SimplerCallback(output_dir=str(tmp_path / "out"), export=True)
    made = task()
    trainer(callback, enable_checkpointing=True, limit_train_batches=1, limit_val_batches=1).fit(
        made, datamodule=datamodule()
    )
    written = yaml.safe_load((tmp_path / "out" / "plain" / "config.yaml").read_text())
    assert written["model"]["class_path"] == "terratorch.tasks.segmentation_tasks.SemanticSegmentationTask"
    kept = len(plan_of(tmp_path / "out").kept_blocks)
    assert written["model"]["init_args"]["model_args"]["backbone_depth"] == kept
    card = (tmp_path / "out" / "plain" / "README.md").read_text()
    assert "| criterion | simpler |" in card
    assert f"| kept blocks | {kept} of 12:" in card
    assert "`config.yaml` has no datamodule: add one under `data`." in card
