"""The user's random numbers: what the package does in between shows in nothing that is drawn afterwards."""

import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from terratorch_simpler import SimplerCallback
from terratorch_simpler.criteria import Simpler
from terratorch_simpler.extraction import ExtractionConfig, count_macs, measure
from terratorch_simpler.lightning import labelled_images
from tests.in_memory_tiles import Tiles, land

pytestmark = pytest.mark.filterwarnings(
    "ignore::terratorch_simpler.errors.UntrainedEncoderWarning", "ignore::terratorch_simpler.errors.FewTilesWarning"
)


class WithLabels(Simpler):
    """Reads labels, and chooses as ever."""

    name = "with_labels"
    needs_labels = True


NARROW = {"backbone_embed_dim": 48, "backbone_num_heads": 3}


def draws():
    return [random.random(), float(np.random.rand()), float(torch.rand(()))]


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


class Gpus:
    """Two GPUs as far as random numbers go: PyTorch's own seeding code, with generators of the CPU."""

    def __init__(self, monkeypatch):
        self.generators = [torch.Generator(), torch.Generator()]
        monkeypatch.setattr(torch.cuda, "default_generators", tuple(self.generators))
        monkeypatch.setattr(torch.cuda.random, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)

    def state(self):
        return [generator.get_state() for generator in self.generators]

    def draw(self):
        return [float(torch.rand((), generator=generator)) for generator in self.generators]


@pytest.fixture
def gpus(monkeypatch):
    return Gpus(monkeypatch)


class DrawsOnGpus(nn.Module):
    """A layer that draws on every GPU, as Thinking-in-Modalities does, or dropout that was left on."""

    def __init__(self, gpus):
        super().__init__()
        self.gpus = gpus
        self.drawn = []

    def forward(self, x):
        self.drawn.append(self.gpus.draw())
        return x


def test_simulated_gpus_are_seeded_by_pytorch(gpus):
    torch.manual_seed(3)
    before = gpus.draw()
    torch.manual_seed(3)
    assert gpus.draw() == before


def test_a_pass_leaves_every_gpu_as_it_was_and_draws_from_its_seed(build, gpus):
    seed_all(5)
    backbone, state = build(), gpus.state()
    layer = DrawsOnGpus(gpus)
    backbone.register_forward_pre_hook(lambda _, args: (layer(args[0]), *args[1:]))
    for _ in range(2):
        measure(lambda batch: backbone(batch["image"]), backbone, Tiles(land(40)), ExtractionConfig(Simpler(), min_tiles=32))
        count_macs(backbone, (6, 64, 64))
        assert all(map(torch.equal, gpus.state(), state))
        gpus.draw()  # the user goes on
        state = gpus.state()
    half = len(layer.drawn) // 2
    assert layer.drawn[:half] == layer.drawn[half:]


class Stop(Exception):
    pass


def stop(*_):
    raise Stop


@pytest.mark.parametrize("how", [{}, {"criterion": WithLabels()}], ids=["tiles", "labels"])
def test_a_selection_leaves_every_gpu_as_it_was(trainer, task, datamodule, gpus, how):
    module = task(**NARROW)
    module.configure_optimizers = stop
    seed_all(5)
    state = gpus.state()
    with pytest.raises(Stop):
        trainer(SimplerCallback(**how)).fit(module, datamodule=datamodule())
    assert all(map(torch.equal, gpus.state(), state))


def test_a_gpu_that_is_first_used_by_labelled_features_is_left_as_it_starts(trainer, task, datamodule, gpus, monkeypatch):
    module, data = task(**NARROW), datamodule()
    data.setup("fit")
    run = trainer()
    run.datamodule = data
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)

    @contextmanager
    def initialises(*_):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        yield

    monkeypatch.setattr(labelled_images, "on_device", initialises)
    layer, state, drawn = DrawsOnGpus(gpus), gpus.state(), []
    module.model.encoder.register_forward_pre_hook(lambda _, args: (layer(args[0]), *args[1:]))
    for _ in range(2):
        layer.drawn = []
        labelled_images.labelled_rows(run, module, "train", 0)
        drawn.append(layer.drawn)
        assert all(map(torch.equal, gpus.state(), state))
    assert drawn[0] == drawn[1] != []


def test_a_selection_seeds_no_gpu_that_is_not_in_use_yet(trainer, task, datamodule, monkeypatch):
    """PyTorch would remember to seed it as soon as it is, in the middle of training."""
    module, generators = task(**NARROW), (torch.Generator(), torch.Generator())
    module.configure_optimizers = stop
    torch.manual_seed(11)
    with pytest.raises(Stop):
        trainer(SimplerCallback()).fit(module, datamodule=datamodule())
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    monkeypatch.setattr(torch.cuda.random, "device_count", lambda: 2)
    for remembered in torch.cuda._lazy_seed_tracker.get_calls():
        if remembered:
            remembered[0]()
    assert [generator.initial_seed() for generator in generators] == [11, 11]


class Recorded(Callback):
    """Draws of every generator at every step of training."""

    def __init__(self):
        self.drawn = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.drawn.append(draws())

    def on_train_end(self, trainer, pl_module):
        self.drawn.append(draws())


def trained(trainer, module, datamodule, *callbacks, **options):
    seed_all(7)
    recorded = Recorded()
    trainer(*callbacks, recorded, **options).fit(module, datamodule=datamodule)
    after = draws()
    return recorded.drawn, after, {name: value.clone() for name, value in module.state_dict().items()}


CASES = {
    "depth": ({}, {}),
    "width": ({"width": 0.5}, {}),
    "recovery": ({"recovery": "linear", "criterion": "fixed", "drop_blocks": 3}, {}),
    "labels": ({"criterion": WithLabels()}, {"num_workers": 2}),
    "cache": ({"plan_cache": True}, {"num_workers": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_training_draws_the_same_with_a_selection_and_with_its_plan(trainer, task, datamodule, tmp_path, case):
    how, data = CASES[case]
    if "plan_cache" in how:
        how = {"plan_cache": str(tmp_path / "cache")}
    noisy = {**NARROW, "head_dropout": 0.3, "backbone_drop_path": 0.2}
    folder = tmp_path / "selected"
    found = [trained(trainer, task(**noisy), datamodule(**data), SimplerCallback(output_dir=str(folder), **how))]
    if "plan_cache" in how:  # found again
        found.append(trained(trainer, task(**noisy), datamodule(**data), SimplerCallback(output_dir=str(folder), **how)))
    given = SimplerCallback(plan=str(folder / "plan.json"), output_dir=str(tmp_path / "given"))
    expected = trained(trainer, task(**noisy), datamodule(**data), given)
    assert len(expected[0]) > 3
    for one in found:
        assert one[:2] == expected[:2]
        assert one[2].keys() == expected[2].keys()
        assert all(torch.equal(one[2][name], expected[2][name]) for name in expected[2])


def test_an_export_at_the_end_of_fit_draws_nothing_of_the_users(trainer, task, datamodule, tmp_path, gpus):
    after = []
    for export in (False, True):
        checkpoints = ModelCheckpoint(tmp_path / str(export))
        callbacks = [SimplerCallback(export=export, output_dir=str(tmp_path / "out")), checkpoints]
        module = task(**NARROW)
        after.append([trained(trainer, module, datamodule(), *callbacks, enable_checkpointing=True)[1], gpus.draw()])
        assert (tmp_path / "out" / "plain").exists() == export
    assert after[0] == after[1]


def test_what_a_module_of_ones_own_draws_in_front_of_the_encoder_is_put_back(trainer, build, datamodule, gpus):
    class Own(LightningModule):
        def __init__(self):
            super().__init__()
            self.noise = DrawsOnGpus(gpus)
            self.encoder = build(embed_dim=48, num_heads=3)

        def forward(self, image):
            return self.encoder(self.noise(image))

        def configure_optimizers(self):
            raise Stop

        def training_step(self, batch):
            pass

    module = Own()
    seed_all(5)
    state = gpus.state()
    with pytest.raises(Stop):
        trainer(SimplerCallback()).fit(module, datamodule=datamodule())
    assert module.noise.drawn
    assert all(map(torch.equal, gpus.state(), state))
