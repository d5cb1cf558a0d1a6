"""Devices, on a machine without any: what runs together lies together, nothing waits, and all comes back where it was."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn
from torchmetrics import MeanMetric

from terratorch_simpler import selection
from terratorch_simpler.criteria import Bounds, Simpler
from terratorch_simpler.processes import Processes
from terratorch_simpler.selection import Selection, labelled_rows, on_device
from tests.fake_gpu import FakeGpu
from tests.memory import Tiles, land


@pytest.fixture
def gpu(monkeypatch):
    return FakeGpu(monkeypatch)


class Own(LightningModule):
    """A user's own: a scale, a buffer and a layer before the encoder."""

    def __init__(self, encoder):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6, 1, 1))
        self.register_buffer("offset", torch.zeros(6, 1, 1))
        self.mix = nn.Conv2d(6, 6, 1)
        self.encoder = encoder
        self.seen = []

    def forward(self, image):
        x = self.mix(image * self.scale + self.offset)
        self.seen.append(x.device.type)
        return self.encoder(x)


class Elsewhere(nn.Module):
    """Parts on two devices, a buffer that two share, and a metric."""

    def __init__(self, gpu):
        super().__init__()
        self.here = nn.Linear(2, 2)
        self.tied = nn.Linear(2, 2)
        self.tied.weight = self.here.weight
        self.norm = nn.BatchNorm1d(2)
        self.same = nn.BatchNorm1d(2)
        self.same.running_mean = self.norm.running_mean
        self.metric = MeanMetric()
        with gpu.mode:
            self.register_buffer("there", torch.empty(3, device="cuda:1"))


def everything(module):
    held = [tensors for part in module.modules() for tensors in (part._parameters, part._buffers)]
    return [(id(tensor), tensor.device) for tensors in held for tensor in tensors.values() if tensor is not None]


@pytest.mark.parametrize("fails", [False, True])
def test_all_comes_back_where_it_was(gpu, fails):
    module = Elsewhere(gpu)
    before, state = everything(module), {name: value.clone() for name, value in module.here.state_dict().items()}
    with gpu.mode:
        try:
            with on_device(module, gpu.device):
                assert {device.type for _, device in everything(module)} == {"cuda"}
                if fails:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            pass
    assert everything(module) == before
    assert module.same.running_mean is module.norm.running_mean
    assert module.metric.device.type == module.metric.mean_value.device.type == "cpu"
    assert all(torch.equal(value, state[name]) for name, value in module.here.state_dict().items())


def test_lightnings_own_idea_of_the_device_stays(gpu, build):
    module = Own(build(embed_dim=48, num_heads=3))
    module._device = torch.device("cuda", 0)  # Lightning says so before setup, when all is on the CPU yet
    with gpu.mode, on_device(module, gpu.device):
        pass
    assert module.device == torch.device("cuda", 0)


@pytest.fixture
def lent(gpu, monkeypatch):
    """The selection's device is the GPU."""
    monkeypatch.setattr(selection, "on_device", lambda module, device: gpu.lent(on_device, module, device))
    return gpu


def fake_trainer(gpu, datamodule=None):
    return SimpleNamespace(
        strategy=SimpleNamespace(root_device=gpu.device), precision_plugin=SimpleNamespace(forward_context=lambda: gpu.mode),
        datamodule=datamodule, fast_dev_run=True, is_global_zero=True, progress_bar_callback=None,
    )  # fmt: skip


def one_batch(gpu, found):
    """A pass of one batch."""

    def run(forward, backbone, source, *_, **__):
        batch = next(iter(source))
        outputs = []
        handles = backbone.watch(outputs.append)
        with gpu.mode:
            forward({key: gpu.like(value) for key, value in batch.items()})
        for handle in handles:
            handle.remove()
        found.extend(output.device.type for output in outputs)
        raise InterruptedError

    return run


@pytest.mark.filterwarnings("ignore::terratorch_simpler.errors.UntrainedEncoderWarning")
def test_whatever_runs_before_the_encoder_is_moved_with_it(lent, build, monkeypatch):
    module, found = Own(build(embed_dim=48, num_heads=3)), []
    before = everything(module)
    monkeypatch.setattr(selection, "measure", one_batch(lent, found))
    how = Selection(Simpler(), Bounds(), 1.0, "patch", 32, 64, 0)
    with pytest.raises(InterruptedError):
        selection._stream(fake_trainer(lent), module, module.encoder, Tiles(land(40)), how, Processes(), None)
    assert found == ["cuda"] * 13
    assert module.seen == ["cuda"]
    assert everything(module) == before


def test_labelled_features_are_read_on_the_same_device(lent, build, monkeypatch):
    module, found = Own(build(embed_dim=48, num_heads=3)), []
    before = everything(module)
    monkeypatch.setattr(selection, "collect_labelled", one_batch(lent, found))
    monkeypatch.setattr(selection, "_labelled_source", lambda *_: Tiles(land(40)))
    with pytest.raises(InterruptedError):
        labelled_rows(fake_trainer(lent), module, "train", 0)
    assert found == ["cuda"] * 13
    assert module.seen == ["cuda"]
    assert everything(module) == before
