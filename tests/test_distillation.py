"""Distillation without labels: what the pruned encoder learns, and how a run saves, loads and resumes it."""

import copy
import dataclasses
from itertools import chain

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from terratorch_simpler import SimplerCallback
from terratorch_simpler import distillation as module_of_distill
from terratorch_simpler.criteria import Bounds, Probe
from terratorch_simpler.distillation import HELD_OUT, STEP_TILES, distill, pruned_copy
from terratorch_simpler.errors import (
    ConfigurationError,
    DepthError,
    OutOfMemoryError,
    PlanError,
    RecoveryError,
    SimplerWarning,
)
from terratorch_simpler.functional.hsic import layer_normed
from terratorch_simpler.lightning import selection
from terratorch_simpler.models.backbone import SimplerBackbone
from terratorch_simpler.plan import SlimmingPlan
from tests.cli_runner import together
from tests.in_memory_tiles import Tiles, land
from tests.synthetic_features import idle

in_a_run = pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.SimplerWarning")


def train(backbone, tiles, kept, target, steps=3, width=1.0, **options):
    student = pruned_copy(backbone, kept, width)
    options = {"max_tiles": 4096, "seed": 0, **options}
    found = distill(
        lambda batch: backbone(batch["image"]), backbone, student, tiles, target=target, steps=steps, **options
    )  # fmt: skip
    return found, student


def small(build, **kwargs):
    return build(embed_dim=48, num_heads=3, **kwargs)


class Blocks(nn.Module):
    """Linear blocks over the patches of an image, and nothing else."""

    def __init__(self, matrices, patch=4):
        super().__init__()
        self.patch_size = patch
        self.out_channels = [len(matrix) for matrix in matrices]
        self.patch = nn.Unfold(patch, stride=patch)
        self.blocks = nn.ModuleList(nn.Linear(len(matrix), len(matrix), bias=False) for matrix in matrices)
        for block, matrix in zip(self.blocks, matrices, strict=True):
            block.weight.data = matrix.T.clone()

    def forward(self, image):
        tokens, features = self.patch(image).mT, []
        for block in self.blocks:
            tokens = block(tokens)
            features.append(tokens)
        return features


def test_one_linear_block_learns_the_product_of_all():
    # LayerNorm takes the mean and the scale of a token away: W is the product of the blocks up to these.
    width, generator = 16, torch.Generator().manual_seed(0)
    near = [torch.eye(width) + 0.1 * torch.randn(width, width, generator=generator) / width**0.5 for _ in range(3)]
    backbone = SimplerBackbone(Blocks(near), block_path="blocks")
    images = torch.randn(96, 1, 16, 16, generator=generator)
    found, student = train(backbone, Tiles(images), [0], target=3, steps=800)
    centre = torch.eye(width) - 1 / width
    expected = near[0] @ near[1] @ near[2] @ centre
    learned = student.blocks[0].weight.detach().T @ centre
    scale = (learned * expected).sum() / learned.square().sum()
    assert (scale * learned - expected).norm() < 0.03 * expected.norm()
    assert (near[0] @ centre - expected).norm() > 0.1 * expected.norm()  # it had to be learned
    assert found.explained_before < 0.98
    assert found.explained_after > 0.995


def test_explained_variance_is_that_of_held_out_tiles(build):
    backbone, images = small(build), land(64)
    found, student = train(backbone, Tiles(images, batch_size=7), range(3), target=6, steps=2)
    held = images[torch.arange(64) % HELD_OUT == HELD_OUT - 1]
    intact = pruned_copy(backbone, range(6), 1.0)
    for encoder, expected in (
        (pruned_copy(backbone, range(3), 1.0), found.explained_before),
        (student, found.explained_after),
    ):
        with torch.no_grad():
            y, z = (layer_normed(last_tokens(one, held)).double().flatten(0, 1) for one in (intact, encoder))
        assert 1 - (y - z).square().sum() / (y - y.mean(0)).square().sum() == pytest.approx(expected, abs=1e-5)
    assert (found.held_out, found.tiles) == (8, 56)


def last_tokens(encoder, images):
    seen = []
    handles = encoder.register_block_hooks(seen.append)
    encoder.eval()(images)
    for handle in handles:
        handle.remove()
    return seen[-1]


def test_it_explains_more_afterwards_and_the_intact_encoder_is_as_before(build):
    backbone = small(build)
    before = copy.deepcopy(backbone.state_dict())
    state, threads = torch.get_rng_state(), backbone.training
    found, student = train(backbone, Tiles(land(96)), range(3), target=12, steps=40)
    assert found.explained_after > found.explained_before + 0.02
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert backbone.training == threads
    assert backbone.num_blocks == 12
    assert not backbone._forward_pre_hooks
    assert set(found.weights) <= dict(student.encoder.named_parameters()).keys()
    assert any(name.startswith("blocks.2.") for name in found.weights)


def test_blocks_that_do_nothing_leave_nothing_to_learn(build):
    backbone = idle(build, range(5, 12))
    found, _ = train(backbone, Tiles(land(64)), range(5), target=12, steps=1)
    assert found.explained_before == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("kept", [[0, 1, 2, 8, 9], [4, 5, 11]], ids=str)
def test_gaps_and_widths_are_distilled_too(build, kept):
    backbone = small(build)
    found, student = train(backbone, Tiles(land(64)), kept, target=12, steps=25, width=0.5)
    assert (student.kept, student.width) == (tuple(kept), 0.5)
    assert found.explained_after > found.explained_before


def test_neither_batches_nor_memory_change_what_is_learned(build, monkeypatch):
    backbone, images = small(build), land(80)
    expected, _ = train(backbone, Tiles(images, batch_size=16), range(3), target=6)
    loss = module_of_distill._Pair.loss

    def little_memory(self, batch):
        if len(batch["index"]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss(self, batch)

    monkeypatch.setattr(module_of_distill._Pair, "loss", little_memory)
    found, _ = train(backbone, Tiles(images, batch_size=11), range(3), target=6)
    assert found.tiles == expected.tiles
    for name, value in expected.weights.items():
        torch.testing.assert_close(found.weights[name], value, rtol=0, atol=2e-4)


def test_no_memory_for_both_says_so_and_changes_nothing(build, monkeypatch):
    def none(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module_of_distill._Pair, "loss", none)
    backbone = small(build)
    before = copy.deepcopy(backbone.state_dict())
    with pytest.raises(
        OutOfMemoryError, match=r"Not enough memory to train the pruned encoder beside the intact one .* Nothing"
    ):
        train(backbone, Tiles(land(64)), range(3), target=6)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_files_are_held_out_whole_where_there_are_enough(build):
    images = land(64)

    class FromFiles(Tiles):
        def batch(self, positions):
            return {**super().batch(positions), "path": [f"scene_{position // 4}.tif" for position in positions]}

    source = module_of_distill._Tiles(FromFiles(images, batch_size=6), 64, by_file=True)
    held = {path for part in source.held_out() for path in part["path"]}
    steps = source.steps()
    trained = {path for _ in range(4) for part in next(steps) for path in part["path"]}
    assert held == {"scene_7.tif", "scene_15.tif"}
    assert not held & trained
    assert len(trained) == 14


def test_steps_are_of_32_tiles_in_the_order_of_the_source():
    source = module_of_distill._Tiles(Tiles(land(50, size=32), batch_size=9), 40, by_file=False)
    steps = source.steps()
    found = [[number for part in next(steps) for number in part["position"]] for _ in range(3)]
    order = [number for number in range(40) if number % HELD_OUT != HELD_OUT - 1]
    assert [len(step) for step in found] == [STEP_TILES] * 3
    assert list(chain.from_iterable(found)) == (order * 3)[: 3 * STEP_TILES]


def test_too_few_tiles_say_so(build):
    with pytest.raises(RecoveryError, match="There are too few tiles to hold some out, expected at least 8"):
        train(small(build), Tiles(land(6)), range(3), target=6)


@in_a_run
def test_two_ranks_learn_what_one_learns(tmp_path):
    found = {ranks: together(distilled, tmp_path / str(ranks), ranks) for ranks in (1, 2)}
    assert all(torch.equal(value, found[2][1].weights[name]) for name, value in found[2][0].weights.items())
    for name, value in found[1][0].weights.items():
        torch.testing.assert_close(found[2][0].weights[name], value, rtol=0, atol=2e-4)
    assert found[1][0].explained_after == pytest.approx(found[2][0].explained_after, abs=1e-4)


def distilled(processes):
    from tests.test_distributed import small_backbone

    return train(small_backbone(), Tiles(land(70, size=64)), range(2), target=5, processes=processes)[0]


# --- through fit

SETTINGS = {"criterion": "fixed", "drop_blocks": 8, "recovery": "distill", "recovery_steps": 3}


@in_a_run
@pytest.mark.parametrize("target", ["last", 7], ids=str)
def test_fit_starts_from_distilled_weights_which_plan_checkpoint_and_resume_keep(
    trainer, task, datamodule, tmp_path, target, caplog
):
    module = task()
    settings = {**SETTINGS, "recovery_target": target, "output_dir": str(tmp_path / "out")}
    run = trainer(SimplerCallback(**settings), ModelCheckpoint(tmp_path / "ckpt", save_last=True), enable_checkpointing=True)
    with caplog.at_level("INFO"):
        run.fit(module, datamodule=datamodule())
    block = 11 if target == "last" else 6
    assert f"Distilled the output of block {block} in 3 steps over 42 tiles" in caplog.text
    plan = SlimmingPlan.load(tmp_path / "out" / "plan.json")
    assert plan.recovery_target == (None if target == "last" else 7)
    assert plan.overview["distilled"].keys() == {"steps", "tiles", "held_out", "explained_before", "explained_after"}
    assert (
        f"trained without labels as the output of block {block}, explains" in (tmp_path / "out" / "report.html").read_text()
    )
    start = task(seed=0).model.encoder
    given = task(backbone_plan=str(tmp_path / "out" / "plan.json")).model.encoder
    parameters = dict(given.encoder.named_parameters())
    assert all(torch.equal(parameters[name], weight) for name, weight in plan.weights.items())
    assert not torch.equal(parameters["blocks.0.mlp.fc1.weight"], start.encoder.blocks[0].mlp.fc1.weight)
    trained = dict(module.model.encoder.encoder.named_parameters())
    assert not torch.equal(trained["blocks.0.mlp.fc1.weight"], parameters["blocks.0.mlp.fc1.weight"])
    assert module.model.encoder.plan.weights is None

    caplog.clear()
    resumed, tested = task(seed=3), task(seed=4)
    with caplog.at_level("INFO"):
        trainer(SimplerCallback(**settings), max_epochs=2).fit(
            resumed, datamodule=datamodule(), ckpt_path=tmp_path / "ckpt" / "last.ckpt"
        )
    assert "Distilled" not in caplog.text
    trainer().test(tested, datamodule=datamodule(), ckpt_path=tmp_path / "ckpt" / "last.ckpt", verbose=False)
    weights = module.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in tested.state_dict().items())


def in_order(datamodule):
    """The same batches in every epoch: Lightning does not restore the random state of a run."""
    shuffled = datamodule.train_dataloader

    def loader():
        found = shuffled()
        return DataLoader(found.dataset, found.batch_size, collate_fn=found.collate_fn)

    datamodule.train_dataloader = loader
    return datamodule


@in_a_run
def test_a_resumed_run_ends_like_one_that_was_not_interrupted(trainer, task, datamodule, tmp_path):
    def fit(folder, epochs, **kwargs):
        torch.manual_seed(0)
        module = task()
        checkpoint = ModelCheckpoint(tmp_path / folder, save_last=True)
        callback = SimplerCallback(**SETTINGS, output_dir=str(tmp_path / folder))
        run = trainer(callback, checkpoint, enable_checkpointing=True, max_epochs=epochs)
        run.fit(module, datamodule=in_order(datamodule()), **kwargs)
        return module.state_dict()

    whole = fit("whole", 2)
    fit("half", 1)
    resumed = fit("half", 2, ckpt_path=tmp_path / "half" / "last.ckpt")
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=1e-6)


@in_a_run
@pytest.mark.filterwarnings("ignore:After 3 steps of distillation")
def test_a_plan_in_the_cache_brings_its_weights(trainer, task, datamodule, tmp_path, caplog):
    found = []
    for attempt, width in (("first", 1.0), ("second", 1.0), ("third", 0.5)):
        settings = {"plan_cache": str(tmp_path / "cache"), "output_dir": str(tmp_path / attempt), "width": width}
        caplog.clear()
        with caplog.at_level("INFO"):
            trainer(SimplerCallback(**SETTINGS, **settings)).fit(task(), datamodule=datamodule())
        assert ("Took the plan of an earlier run" in caplog.text) == (attempt == "second")
        found.append(SlimmingPlan.load(tmp_path / attempt / "plan.json"))
    assert found[0] == found[1]
    assert all(torch.equal(weight, found[1].weights[name]) for name, weight in found[0].weights.items())


@in_a_run
def test_only_adapters_are_trained_where_there_are_some(trainer, task, datamodule, tmp_path):
    lora = {
        "method": "LORA",
        "replace_qkv": "qkv",
        "peft_config_kwargs": {"target_modules": ["qkv.q_linear", "qkv.v_linear"], "r": 4},
    }
    module = task(peft_config=lora)
    frozen = {name for name, one in module.named_parameters() if not one.requires_grad}
    callback = SimplerCallback(**SETTINGS, output_dir=str(tmp_path))
    with pytest.warns(SimplerWarning, match=r"explains less of the output of block 11 on held-out tiles than its mean does"):
        trainer(callback).fit(module, datamodule=datamodule())
    plan = SlimmingPlan.load(tmp_path / "plan.json")
    assert plan.overview["distilled"]["explained_after"] < 0
    assert plan.weights
    assert all("lora_" in name for name in plan.weights)
    assert plan.overview["distilled"]["explained_after"] > plan.overview["distilled"]["explained_before"]
    assert {name for name, one in module.named_parameters() if not one.requires_grad} <= frozen
    with pytest.raises(PlanError, match=r"Found weights of shape .* and none in .* adapters \(LoRA\) included"):
        task(backbone_plan=str(tmp_path / "plan.json"))
    again = task(peft_config=lora)
    trainer(SimplerCallback(plan=str(tmp_path / "plan.json"))).fit(again, datamodule=datamodule())


@in_a_run
def test_a_frozen_encoder_is_distilled_and_stays_frozen(trainer, task, datamodule, tmp_path):
    module = task()
    module.model.freeze_encoder()
    trainer(SimplerCallback(**SETTINGS, output_dir=str(tmp_path))).fit(module, datamodule=datamodule())
    plan = SlimmingPlan.load(tmp_path / "plan.json")
    encoder = dict(module.model.encoder.encoder.named_parameters())
    assert not any(one.requires_grad for one in encoder.values())
    assert all(torch.equal(encoder[name], weight) for name, weight in plan.weights.items())


@in_a_run
def test_nothing_to_distill_says_so(trainer, task, datamodule, tmp_path, caplog):
    settings = {**SETTINGS, "recovery_target": 4, "output_dir": str(tmp_path)}
    with caplog.at_level("INFO"):
        trainer(SimplerCallback(**settings)).fit(task(), datamodule=datamodule())
    assert "Nothing to distill: the pruned encoder already gives the output of block 3" in caplog.text
    assert SlimmingPlan.load(tmp_path / "plan.json").weights == {}


@in_a_run
@in_a_run
def test_the_copy_is_made_before_the_task_needs_the_device(trainer, task, datamodule, monkeypatch):
    """Copied on the device, the intact encoder would be there twice before memory is checked."""
    done, on_device = [], selection.on_device
    monkeypatch.setattr(selection, "pruned_copy", lambda *args: done.append("copy") or pruned_copy(*args))
    monkeypatch.setattr(selection, "on_device", lambda *args: done.append("device") or on_device(*args))
    trainer(SimplerCallback(**SETTINGS)).fit(task(), datamodule=datamodule())
    assert done[-2:] == ["copy", "device"]


@pytest.mark.parametrize("how", ["missing", "other plan", "cut off", "NaN"])
def test_weights_that_are_not_those_of_the_plan_are_refused(build, tmp_path, how):
    backbone = small(build)
    found, _ = train(backbone, Tiles(land(64)), range(3), target=12, steps=1)
    plan = SlimmingPlan(
        backbone.name, 12, (0, 1, 2), {"name": "fixed", "args": {}}, recovery="distill", weights=found.weights
    )
    plan.save(tmp_path / "plan.json")
    file = tmp_path / "plan.recovery.pt"
    if how == "missing":
        file.unlink()
    elif how == "other plan":
        dataclasses.replace(plan, weights=None, tiles_seen=3).save(tmp_path / "plan.json")
    elif how == "cut off":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        broken = {name: weight.clone().fill_(torch.nan) for name, weight in found.weights.items()}
        dataclasses.replace(plan, weights=broken).save(tmp_path / "plan.json")
    with pytest.raises(PlanError, match=r"There are no readable weights at .*plan\.recovery\.pt .* recovery distill"):
        SlimmingPlan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="Found a plan with recovery distill and no weights"):
        small(build).slim(dataclasses.replace(plan, weights=None))


# --- the target


@in_a_run
def test_a_linear_map_to_another_block(trainer, task, datamodule, tmp_path):
    module = task()
    settings = {"criterion": "fixed", "drop_blocks": 9, "recovery": "linear", "recovery_target": 6}
    trainer(SimplerCallback(**settings, output_dir=str(tmp_path))).fit(module, datamodule=datamodule())
    plan = SlimmingPlan.load(tmp_path / "plan.json")
    assert (plan.depth, plan.recovery_target, list(plan.maps)) == (3, 6, [3])
    assert [repaired[:2] for repaired in plan.overview["repaired"]] == [[3, 6]]
    assert module.model.encoder.pruned_state.recovered[0][0] == 3


@in_a_run
@pytest.mark.parametrize("recovery", ["linear", "distill"])
def test_best_is_the_block_of_the_highest_probe_score(trainer, task, datamodule, tmp_path, recovery, monkeypatch):
    """It may come after what is kept: only that is limited by max_depth."""
    bounds, best_depth = [], Probe.best_depth
    monkeypatch.setattr(Probe, "best_depth", lambda *args: bounds.append(args[-1]) or best_depth(*args))
    settings = {"criterion": "probe", "recovery": recovery, "recovery_target": "best", "recovery_steps": 2, "max_depth": 11}
    trainer(SimplerCallback(**settings, output_dir=str(tmp_path))).fit(task(), datamodule=datamodule())
    plan = SlimmingPlan.load(tmp_path / "plan.json")
    assert bounds == [Bounds()]
    best = max(plan.depth, *(depth for depth, score in plan.scores.items() if score == max(plan.scores.values())))
    assert plan.recovery_target == (best if best < 12 else None)
    if recovery == "linear":
        assert list(plan.maps) == ([plan.depth] if plan.depth < best else [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recovery_target": 6}, "Found recovery_target 6 with recovery none, expected linear or distill"),
        ({"recovery": "distill", "recovery_target": "first"}, "Found recovery_target 'first', expected 'last', 'best' or a"),
        ({"recovery": "distill", "recovery_target": 0}, "Found recovery_target 0, expected 'last', 'best' or a number"),
        ({"recovery": "distill", "recovery_target": "best"}, "'best' with criterion 'simpler', expected 'probe'"),
        ({"recovery": "distill", "recovery_steps": 0}, "Found recovery_steps 0, expected at least 1"),
    ],
)
def test_settings_that_contradict_each_other(options, message):
    with pytest.raises(ConfigurationError, match=message):
        SimplerCallback(**options)


@in_a_run
@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (13, {}, "Found recovery_target 13 for 12 blocks of which at least 2 are kept, expected 2 to 12"),
        (3, {"min_depth": 5}, "Found recovery_target 3 for 12 blocks of which at least 5 are kept, expected 5 to 12"),
        (3, {"criterion": "block_influence", "drop_blocks": 4}, "Found recovery_target 3 for 12 blocks of which at least 8"),
    ],
)
@pytest.mark.parametrize("recovery", ["linear", "distill"])
def test_targets_outside_the_encoder_or_below_what_is_kept(
    trainer, task, datamodule, tmp_path, recovery, target, options, message
):
    module = task()
    callback = SimplerCallback(recovery=recovery, recovery_target=target, output_dir=str(tmp_path / "out"), **options)
    with pytest.raises(DepthError, match=message):
        trainer(callback).fit(module, datamodule=datamodule())
    assert not (tmp_path / "out" / "plan.json").exists()
    assert module.model.encoder.num_blocks == 12
